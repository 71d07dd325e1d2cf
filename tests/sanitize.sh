#!/usr/bin/env bash
# Every candidate of every kernel under compute-sanitizer: tests/sanitize.sh [memcheck|racecheck|initcheck|synccheck]...
# Several processes at a time share the device, one for each tool, shape and type. Prints a line for each, and fails if one of them is
# not clean or did not run. TEST=FILE names a built test binary, JOBS=N says how many at a time, LIMIT=SECONDS when to stop and
# count what was not run as a failure.
set -uo pipefail
cd "$(dirname "$0")/.."
tools=("$@")
[ ${#tools[@]} -gt 0 ] || tools=(memcheck racecheck initcheck synccheck)
test="${TEST:-$(cargo test --release --locked --test gpu --no-run --message-format=json |
    sed -n 's/.*"executable":"\([^"]*\/gpu-[^"]*\)".*/\1/p' | tail -1)}"
logs="$(mktemp -d)"
export LFM2C_REQUIRE_GPU=1 LFM2C_STATE=random test logs

# One trial under one tool; what it printed and how it ended stay in files of their own.
one() {
    IFS='|' read -r tool trial <<<"$1"
    log="$logs/$tool ${trial#candidates }"
    begin=$SECONDS
    compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 5 "$test" "$trial" --exact >"$log" 2>&1
    echo "$? $((SECONDS - begin))" >"$log.code"
}
export -f one

"$test" --list | sed -n 's/: test$//p' | grep '^candidates ' | sort -k2r >"$logs/trials" || { cat "$logs/trials"; exit 1; }
for tool in "${tools[@]}"; do sed "s/^/$tool|/" "$logs/trials"; done >"$logs/list"
timeout "${LIMIT:-0}" xargs -d '\n' -P "${JOBS:-9}" -I{} bash -c 'one "$1"' _ {} <"$logs/list"

failed=0
while IFS='|' read -r tool trial; do
    log="$logs/$tool ${trial#candidates }"
    code="not run" seconds=""
    [ ! -e "$log.code" ] || read -r code seconds <"$log.code"
    kernels=$(sed -n 's/.* \([0-9]* kernels\)$/\1/p' "$log" 2>/dev/null)
    [ "$code" != 0 ] || [ -n "$kernels" ] || code="not run"
    case "$code" in
    0) echo "$tool ${trial#candidates }: $kernels clean, $seconds s" ;;
    "not run") echo "$tool ${trial#candidates }: not run to its end" && failed=1 ;;
    *) echo "$tool ${trial#candidates }: NOT CLEAN, exit code $code, $seconds s" && failed=1 && grep '=========' "$log" | head -40 && tail -n 8 "$log" ;;
    esac
done <"$logs/list"
exit $failed
