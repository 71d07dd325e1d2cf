#!/usr/bin/env bash
# Runs every command of the README's `sh` blocks in a folder of its own, as a newcomer would, and fails at the first that
# fails. A block under a heading with "GPU" or with the word `skip-in-ci` after `sh` is left out.
set -euo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -r "$repository"/{Cargo.toml,Cargo.lock,src,plans,tests,examples,README.md} "$work"/
ln -s "${CARGO_TARGET_DIR:-$repository/target}" "$work/target"
cd "$work"
awk '/^```sh$/ {on = 1; next} /^```/ {on = 0} on && NF && $1 !~ /^#/' README.md >commands
count=0
while IFS= read -r command; do
    printf '$ %s\n' "$command"
    bash -euo pipefail -c "$command" </dev/null
    count=$((count + 1))
done <commands
printf '%d commands of the README ran\n' "$count"
test "$count" -gt 0
