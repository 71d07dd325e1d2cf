#!/usr/bin/env bash
# Runs every command of the README's `sh` blocks, as a newcomer would, and fails at the first that fails. The test command is
# left out: CI has run it before. What the commands write at the top of the checkout is ignored by git.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/target/release:$PATH" CARGO_TERM_COLOR=never
count=0
while IFS= read -r command; do
    printf '$ %s\n' "$command"
    bash -euo pipefail -c "$command" </dev/null
    count=$((count + 1))
done < <(awk '/^```sh$/ {on = 1; next} /^```/ {on = 0} on && NF && $1 !~ /^#/' README.md | grep -v '^cargo test')
printf '%d commands of the README ran\n' "$count"
test "$count" -gt 5
