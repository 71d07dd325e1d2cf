#!/usr/bin/env bash
# Every candidate of every kernel under compute-sanitizer: tests/sanitize.sh [memcheck|racecheck|initcheck|synccheck]...
# Each tool, shape and type is divided among PARTS processes, of which JOBS at a time share the device. Prints a line for each, and fails
# if one of them is not clean or did not run. What ran clean is noted in the folder RECORD, by machine code, and not run
# again while that stays the same. TEST=FILE names a built test binary; LIMIT=SECONDS says when to stop.
set -uo pipefail
cd "$(dirname "$0")/.."
tools=("$@")
[ ${#tools[@]} -gt 0 ] || tools=(memcheck racecheck initcheck synccheck)
test="${TEST:-$(cargo test --release --locked --test gpu --no-run --message-format=json |
    sed -n 's/.*"executable":"\([^"]*\/gpu-[^"]*\)".*/\1/p' | tail -1)}"
logs="$(mktemp -d)" parts="${PARTS:-6}" record="${RECORD:-$(mktemp -d)}"
export LFM2C_REQUIRE_GPU=1 test logs parts record
mkdir -p "$record"
for tool in "${tools[@]}"; do touch "$record/$tool" && cp "$record/$tool" "$logs/$tool.known"; done

# A part of a trial under one tool; what it printed and how it ended stay in files of their own.
one() {
    IFS='|' read -r tool trial part <<<"$1"
    log="$logs/$tool ${trial#candidates } $part"
    begin=$SECONDS
    LFM2C_PART="$part/$parts" LFM2C_KNOWN="$logs/$tool.known" compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 5 \
        "$test" "$trial" --exact >"$log" 2>&1
    code=$?
    [ $code != 0 ] || sed -n 's/^\(test .*\.\.\. \)\?ran //p' "$log" >>"$record/$tool"
    echo "$code $((SECONDS - begin))" >"$log.code"
}
export -f one

"$test" --list | sed -n 's/: test$//p' | grep '^candidates ' | sort -k2 >"$logs/trials" || { cat "$logs/trials"; exit 1; }
for tool in "${tools[@]}"; do
    while IFS= read -r trial; do for part in $(seq 1 "$parts"); do echo "$tool|$trial|$part"; done; done <"$logs/trials"
done >"$logs/list"
timeout "${LIMIT:-0}" xargs -d '\n' -P "${JOBS:-8}" -I{} bash -c 'one "$1"' _ {} <"$logs/list"

failed=0
for tool in "${tools[@]}"; do
    while IFS= read -r trial; do
        ended=0 bad=0 seconds=0
        for part in $(seq 1 "$parts"); do
            log="$logs/$tool ${trial#candidates } $part"
            [ -e "$log.code" ] || continue
            read -r code took <"$log.code"
            ended=$((ended + 1)) seconds=$((seconds + took))
            [ "$code" = 0 ] || { bad=$((bad + 1)) && echo "exit code $code:" && grep '=========' "$log" | head -30 && tail -n 8 "$log"; }
        done
        ran=$(cat "$logs/$tool ${trial#candidates } "? 2>/dev/null | grep -c '\bran ')
        echo "$tool ${trial#candidates }: $ended of $parts parts ended, $bad not clean; $ran kernels ran in $seconds s"
        [ "$ended" = "$parts" ] && [ "$bad" = 0 ] || failed=1
    done <"$logs/trials"
done
exit $failed
