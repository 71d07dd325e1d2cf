#!/usr/bin/env bash
# Every candidate of every kernel under compute-sanitizer: tests/sanitize.sh [memcheck|racecheck|initcheck|synccheck]...
# Each tool, shape and type is divided among PARTS processes, of which JOBS at a time share the device. Prints a line for each, and fails
# if one of them is not clean or did not run. TEST=FILE names a built test binary; LIMIT=SECONDS says when to stop and count what
# was not run as a failure.
set -uo pipefail
cd "$(dirname "$0")/.."
tools=("$@")
[ ${#tools[@]} -gt 0 ] || tools=(memcheck racecheck initcheck synccheck)
test="${TEST:-$(cargo test --release --locked --test gpu --no-run --message-format=json |
    sed -n 's/.*"executable":"\([^"]*\/gpu-[^"]*\)".*/\1/p' | tail -1)}"
parts="${PARTS:-2}"
logs="$(mktemp -d)"
export LFM2C_REQUIRE_GPU=1 test logs parts

# One part of one trial under one tool; what it printed stays in a file of its own.
one() {
    IFS='|' read -r tool trial part <<<"$1"
    log="$logs/$tool ${trial#candidates } $part"
    begin=$SECONDS
    LFM2C_PART="$part/$parts" compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 5 "$test" "$trial" --exact >"$log" 2>&1
    echo "$? $tool|$trial $((SECONDS - begin))" >>"$logs/codes"
    grep -q 'ERROR SUMMARY: 0 errors\|RACECHECK SUMMARY: 0 hazards' "$log" || { echo "part $part:"; tail -n 8 "$log"; } >>"$logs/failures"
}
export -f one

"$test" --list | sed -n 's/: test$//p' | grep '^candidates ' | sort -k3 >"$logs/trials" || { cat "$logs/trials"; exit 1; }
for tool in "${tools[@]}"; do
    while IFS= read -r trial; do for part in $(seq 1 "$parts"); do echo "$tool|$trial|$part"; done; done <"$logs/trials"
done >"$logs/list"
timeout "${LIMIT:-0}" xargs -d '\n' -P "${JOBS:-8}" -I{} bash -c 'one "$1"' _ {} <"$logs/list"
touch "$logs/codes"

failed=0
for tool in "${tools[@]}"; do
    while IFS= read -r trial; do
        codes=$(grep " $tool|$trial " "$logs/codes")
        run=$(grep -c . <<<"$codes") bad=$(grep -vc '^0 ' <<<"$codes") seconds=$(awk '{s += $NF} END {print s + 0}' <<<"$codes")
        [ -n "$codes" ] || run=0 bad=0
        printf '%-10s %-22s %2d of %2d parts, %d not clean, %d s\n' "$tool" "${trial#candidates }" "$run" "$parts" "$bad" "$seconds"
        [ "$run" = "$parts" ] && [ "$bad" = 0 ] || failed=1
    done <"$logs/trials"
done
if [ -s "$logs/failures" ]; then
    grep -h '=========' "$logs"/*check* | grep -v -e COMPUTE-SANITIZER -e 'SUMMARY: 0' | sort | uniq -c | sort -rn | head -20
    head -n 60 "$logs/failures"
fi
exit $failed
