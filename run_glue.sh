#!/usr/bin/env bash
# Tasks x methods x seeds, then the table. Without variables: the paper's Table 2 (8 tasks, 5 seeds, 40 epochs).
#   TASKS="cola rte" METHODS="kd rail-c" SEEDS="1 2 3" bash run_glue.sh --output-dir runs --epochs 5
#   SEARCH=1 bash run_glue.sh          the paper's grid of learning rates and batch sizes, one folder for each pair
# Finished runs are skipped, a failed one does not stop the rest, Ctrl-C does. Further arguments go to railkd.py.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
tasks=${TASKS:-cola sst2 mrpc stsb qqp mnli qnli rte}
methods=${METHODS:-none kd pkd-skip alp-kd rail-l rail-c}
seeds=${SEEDS:-1 2 3 4 5}
root=runs
arguments=()
while [ $# -gt 0 ]; do                         # the output folder is read here, since the table needs it as well
  case $1 in
    --output-dir) root=${2:?--output-dir needs a folder}; shift 2 ;;
    --output-dir=*) root=${1#*=}; shift ;;
    *) arguments+=("$1"); shift ;;
  esac
done
grid=("")
if [ -n "${SEARCH:-}" ]; then
  grid=()
  for lr in 1e-5 2e-5 5e-5 4e-6; do for batch in 8 16 32; do grid+=("--lr $lr --batch-size $batch"); done; done
fi
failed=()
for point in "${grid[@]}"; do
  folder=$root
  [ -n "$point" ] && folder=$root/$(set -- $point; echo "lr$2-batch$4")
  first=${first:-$folder}
  for task in $tasks; do for method in $methods; do for seed in $seeds; do
    name="$task $method seed $seed $point"
    echo "== $name"
    for made in "$first/$task"/teacher-*; do    # the grid shares what its first point has fine-tuned
      shared=$folder/$task/${made##*/}
      if [ -d "$made/model" ] && [ ! -e "$shared" ]; then
        mkdir -p "$folder/$task" && ln -s "$(cd "$made" && pwd)" "$shared"
      fi
    done
    # a finished run prints its stored results and trains nothing; $point is two flags and their values, or nothing
    python3 "$here/railkd.py" --task "$task" --method "$method" --seed "$seed" --output-dir "$folder" \
      --teacher-cache "$root/teacher-cache" $point ${arguments[@]+"${arguments[@]}"}
    code=$?
    case $code in
      0) ;;
      130 | 143) exit "$code" ;;               # Ctrl-C, SIGTERM: all stops
      *) failed+=("$name") ;;
    esac
  done; done; done
done
echo
python3 "$here/railkd.py" --report "$root"
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${#failed[@]}" >&2
  printf '  %s\n' "${failed[@]}" >&2
  exit 1
fi
