#!/usr/bin/env bash
# Runs every fuzz target of a build folder for 20 s, or with SHMX_LONG=1 for 1,000,000 inputs. A crash or a hang fails.
set -euo pipefail
targets=$1/tests/fuzz
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$targets/fuzz_seeds" "$work/seeds"
limit=-max_total_time=20
[ "${SHMX_LONG:-0}" = 0 ] || limit=-runs=1000000
# A survey looks into /proc of every process: among few it takes half the time.
alone=(unshare --map-root-user --pid --fork --kill-child --mount-proc)
"${alone[@]}" true 2>/dev/null || alone=()
for target in handle sizes arena; do
  mkdir "$work/$target"
  printf '%s: ' "$target"
  # Leaks are looked for at the end; after every input it costs a third of the speed.
  if ! "${alone[@]}" "$targets/fuzz_$target" "$limit" -max_len=512 -timeout=60 -detect_leaks=0 -print_final_stats=1 \
    -artifact_prefix="fuzz-$target-" "$work/$target" "$work/seeds/$target" >"$work/log" 2>&1; then
    cat "$work/log"
    exit 1
  fi
  sed -n 's/stat::number_of_executed_units: */inputs: /p' "$work/log"
done
