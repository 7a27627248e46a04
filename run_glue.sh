#!/usr/bin/env bash
# Runs tasks x methods x seeds and prints the table. Without variables it is the paper's Table 2: 8 tasks, 5 seeds, 40 epochs.
#   TASKS="cola rte" METHODS="kd rail-l" SEEDS="1 2 3" bash run_glue.sh --output-dir runs --epochs 5
#   SEARCH=1 bash run_glue.sh          the paper's grid of learning rates and batch sizes, each point with a --name of its own
# Finished runs are skipped and a failed run does not stop the others, but Ctrl-C does. All arguments go to railkd.py.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
tasks=${TASKS:-cola sst2 mrpc stsb qqp mnli qnli rte}
methods=${METHODS:-none kd pkd-skip alp-kd rail-l rail-c}
seeds=${SEEDS:-1 2 3 4 5}
# On Linux this keeps freed memory in the process, which saves a CPU much work; other systems ignore it.
export MALLOC_MMAP_MAX_=${MALLOC_MMAP_MAX_:-0} MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-2147483647}
root=runs
arguments=()
while [ $# -gt 0 ]; do                         # the table needs the output folder as well
  case $1 in
    --output-dir) root=${2:?--output-dir needs a folder}; shift 2 ;;
    --output-dir=*) root=${1#*=}; shift ;;
    *) arguments+=("$1"); shift ;;
  esac
done
grid=("")
if [ -n "${SEARCH:-}" ]; then
  grid=()
  for lr in 1e-5 2e-5 5e-5 4e-6; do for batch in 8 16 32; do
    grid+=("--name lr$lr-batch$batch --lr $lr --batch-size $batch")
  done; done
fi
failed=()
for point in "${grid[@]}"; do
  for task in $tasks; do for method in $methods; do for seed in $seeds; do
    run="$task $method seed $seed $point"
    echo "== $run"
    # $point is nothing or six words, so it stays without quotes
    python3 "$here/railkd.py" --task "$task" --method "$method" --seed "$seed" --output-dir "$root" \
      $point ${arguments[@]+"${arguments[@]}"}
    code=$?
    if [ $code -eq 130 ]; then exit 130; fi    # Ctrl-C
    if [ $code -ne 0 ]; then failed+=("$run"); fi
  done; done; done
done
echo
python3 "$here/railkd.py" --report "$root"
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${#failed[@]}" >&2
  printf '  %s\n' "${failed[@]}" >&2
  exit 1
fi
