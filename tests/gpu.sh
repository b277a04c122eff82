#!/usr/bin/env bash
# The GPU part of the tests, against an installed wheel and not the source tree.
#
#   tests/gpu.sh [WHEEL] [STAGE ...]     stages: tests determinism sanitizer bench all (default: all)
#
# Needs a GPU of compute capability 9.0 or 12.x and a python3 (or $PYTHON) with torch >= 2.11 for
# CUDA 13, pytest, hypothesis, numpy and rich; the sanitizer stage needs compute-sanitizer on PATH.
# WHEEL is the newest of dist/ unless named. Logs go to $OUT (./gpu-out); a table of the stages comes last.
# Seconds a stage may take: LIMIT_TESTS, LIMIT_DETERMINISM, LIMIT_SANITIZER (each tool), LIMIT_BENCH.
# TESTS_ARGS and BENCH_ARGS are passed on to pytest (tests stage) and to the benchmark.
set -uo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
out=${OUT:-$root/gpu-out}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
: "${LIMIT_TESTS:=420}" "${LIMIT_DETERMINISM:=180}" "${LIMIT_SANITIZER:=420}" "${LIMIT_BENCH:=240}"

wheel=
if [[ ${1:-} == *.whl ]]; then
  wheel=$(realpath "$1")
  shift
else
  wheel=$(ls -t "$root"/dist/*.whl 2>/dev/null | head -n 1)
fi
if [[ ! -f $wheel ]]; then
  echo "no wheel: expected one in dist/ or a path as the first argument; run: make wheel"
  exit 2
fi

stages=("$@")
[[ $# == 0 || " $* " == *" all "* ]] && stages=(tests determinism sanitizer bench)
for stage in "${stages[@]}"; do
  [[ $stage =~ ^(tests|determinism|sanitizer|bench)$ ]] || { echo "unknown stage: $stage"; exit 2; }
done

site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
"$python" -m pip install -q --root-user-action=ignore --no-deps --no-index --no-compile \
  --target "$site" "$wheel" || exit 2
export PYTHONPATH=$site PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
# From tests/ the source tree is not on Python's path; the wheel is what must be imported.
cd "$root/tests" || exit 2
"$python" - "$site" <<'PYTHON' | tee "$out/summary.txt" || exit 2
import sys, torch, sm120_ops
if not sm120_ops.__file__.startswith(sys.argv[1]):
    sys.exit(f"sm120_ops comes from {sm120_ops.__file__}, not from the wheel")
if not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} sees no CUDA GPU")
print(f"sm120_ops {sm120_ops.__version__}, torch {torch.__version__}, "
      f"Python {sys.version.split()[0]}, {torch.cuda.get_device_name()}")
PYTHON

rows=()
failed=0

# record NAME RC SECONDS SUMMARY: one line of the final table
record() {
  rows+=("$(printf '%-22s %4s %6s  %s' "$1" "$2" "$3" "$4")")
  [[ $2 == 0 ]] || failed=1
}

# timed LIMIT LOG COMMAND...: runs with stdout and stderr in the log and on the terminal
timed() {
  local limit=$1 log=$2 begin=$SECONDS
  shift 2
  timeout --kill-after=10 "$limit" "$@" 2>&1 | tee -a "$log"
  rc=${PIPESTATUS[0]}
  seconds=$((SECONDS - begin))
  [[ $rc == 124 || $rc == 137 ]] && echo "stopped after $limit s" | tee -a "$log"
}

last_line() { grep -v '^[[:space:]]*$' "$1" | tail -n 1 | cut -c 1-100; }

# The build, machine-code and release tests belong to the machine that builds.
pytest=("$python" -m pytest -c "$root/pyproject.toml" -p no:cacheprovider -q
        --ignore=test_setup.py --ignore=test_sass.py --ignore=test_release.py)

for stage in "${stages[@]}"; do
  log=$out/$stage.log
  : > "$log"
  echo "== $stage"
  case $stage in
    tests)
      # shellcheck disable=SC2086
      timed "$LIMIT_TESTS" "$log" "${pytest[@]}" -m "not determinism" ${TESTS_ARGS:-} .
      record tests "$rc" "$seconds" "$(last_line "$log")"
      ;;
    determinism)
      timed "$LIMIT_DETERMINISM" "$log" "${pytest[@]}" -m determinism .
      record determinism "$rc" "$seconds" "$(last_line "$log")"
      ;;
    sanitizer)
      # Without torch's caching allocator every tensor is an allocation with bounds of its own.
      for tool in memcheck racecheck synccheck initcheck; do
        echo "-- $tool" | tee -a "$log"
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 timed "$LIMIT_SANITIZER" "$log" \
          compute-sanitizer --tool "$tool" --error-exitcode 86 --print-limit 20 \
          "${pytest[@]}" -m sanitizer .
        found=$(sed -n "/^-- $tool\$/,\$p" "$log" | grep 'SUMMARY' | tail -n 1 | sed 's/^=* *//')
        record "sanitizer $tool" "$rc" "$seconds" "${found:-$(last_line "$log")}"
      done
      ;;
    bench)
      # shellcheck disable=SC2086
      timed "$LIMIT_BENCH" "$log" \
        "$python" -m sm120_ops bench --quick --json "$out/bench.json" ${BENCH_ARGS:-}
      record bench "$rc" "$seconds" "$(last_line "$log")"
      ;;
  esac
done

{
  printf '\n%-22s %4s %6s  %s\n' stage rc sec summary
  printf '%s\n' "${rows[@]}"
} | tee -a "$out/summary.txt"
exit "$failed"
