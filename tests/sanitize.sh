#!/usr/bin/env bash
# Every candidate of every kernel under compute-sanitizer: tests/sanitize.sh [memcheck|racecheck|initcheck|synccheck]...
# Several processes at a time share the device; of racecheck two, because its work is done there. Prints a line for each tool, shape
# and type, and fails if one of them is not clean or did not run. TEST=FILE names a built test binary, JOBS=N says how many at a
# time, LIMIT=SECONDS when to stop and count what was not run as a failure.
set -uo pipefail
cd "$(dirname "$0")/.."
tools=("$@")
[ ${#tools[@]} -gt 0 ] || tools=(memcheck racecheck initcheck synccheck)
test="${TEST:-$(cargo test --release --locked --test gpu --no-run --message-format=json |
    sed -n 's/.*"executable":"\([^"]*\/gpu-[^"]*\)".*/\1/p' | tail -1)}"
logs="$(mktemp -d)"
export LFM2C_REQUIRE_GPU=1 test logs

# One round of one trial under one tool; what it printed stays in a file of its own.
one() {
    IFS='|' read -r tool trial round <<<"$1"
    log="$logs/$tool ${trial#candidates } $round"
    LFM2C_CANDIDATES="$round" compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 5 \
        "$test" "$trial" --exact >"$log" 2>&1
    code=$?
    echo "$code $tool|$trial" >>"$logs/codes"
    [ $code = 0 ] || { echo "round $round:"; tail -n 8 "$log"; } >>"$logs/failures"
}
export -f one

"$test" --list | sed -n 's/: test$//p' | grep '^candidates ' | sort -k3 >"$logs/trials" || { cat "$logs/trials"; exit 1; }
while IFS= read -r trial; do
    rounds=$(LFM2C_CANDIDATES=0 "$test" "$trial" --exact | sed -n 's/.* of \([0-9]*\) rounds$/\1/p')
    for tool in "${tools[@]}"; do for round in $(seq 1 "${rounds:?}"); do echo "$tool|$trial|$round"; done; done
done <"$logs/trials" >"$logs/list"
for tool in "${tools[@]}"; do
    left=0
    [ -z "${LIMIT:-}" ] || left=$((LIMIT > SECONDS ? LIMIT - SECONDS : 1))
    jobs=8
    [ "$tool" != racecheck ] || jobs=2
    grep "^$tool|" "$logs/list" | timeout "$left" xargs -d '\n' -P "${JOBS:-$jobs}" -I{} bash -c 'one "$1"' _ {}
done
touch "$logs/codes"

failed=0
for tool in "${tools[@]}"; do
    while IFS= read -r trial; do
        rounds=$(grep -c "^$tool|$trial|" "$logs/list") run=$(grep -c " $tool|$trial\$" "$logs/codes")
        bad=$(grep " $tool|$trial\$" "$logs/codes" | grep -vc '^0 ')
        printf '%-10s %-22s %2d of %2d rounds, %d not clean\n' "$tool" "${trial#candidates }" "$run" "$rounds" "$bad"
        [ "$run" = "$rounds" ] && [ "$bad" = 0 ] || failed=1
    done <"$logs/trials"
done
if [ -s "$logs/failures" ]; then
    grep -h '=========' "$logs"/*check* | grep -v -e COMPUTE-SANITIZER -e 'SUMMARY: 0' | sort | uniq -c | sort -rn | head -20
    head -n 60 "$logs/failures"
fi
exit $failed
