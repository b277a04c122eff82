#!/usr/bin/env bash
# Tests of an installed wheel: a fresh virtual environment, no source tree, no nvcc.
#
#   tests/installed.sh [WHEEL] [PYTEST ARGUMENT ...]
#
# Makes a venv with $PYTHON (python3), installs WHEEL (default: the newest of dist/) and $TORCH into it,
# copies tests/ alone to a temporary folder, and runs there, without a CUDA compiler on PATH:
# import, `info`, `demo --ops`, then every test that needs no source tree.
#   TORCH="torch==2.11.0"   which torch to install; pip's own options work too
#   SYSTEM_SITE=1           use the torch and the test tools of $PYTHON instead, and no network
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
if [[ ${1:-} == *.whl ]]; then
  wheel=$(realpath "$1")
  shift
else
  wheel=$(ls -t "$root"/dist/*.whl 2>/dev/null | head -n 1)
fi
[[ -f $wheel ]] || { echo "no wheel: expected one in dist/ or a path as the first argument"; exit 2; }

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [[ -n ${SYSTEM_SITE:-} ]]; then
  # Some systems have venv without ensurepip: then pip comes from the parent too.
  "$python" -m venv --system-site-packages "$work/venv" > "$work/log" 2>&1 \
    || "$python" -m venv --clear --without-pip --system-site-packages "$work/venv"
  # A venv made from a venv sees the base interpreter's packages alone: name the parent's too.
  "$python" -c 'import site; print(*site.getsitepackages(), sep="\n")' \
    > "$("$work/venv/bin/python" -c 'import site; print(site.getsitepackages()[0])')/parent.pth"
  "$work/venv/bin/python" -m pip install -q --no-index --no-deps "$wheel"
else
  "$python" -m venv "$work/venv"
  # shellcheck disable=SC2086
  "$work/venv/bin/python" -m pip install -q --disable-pip-version-check \
    "$wheel" ${TORCH:-"torch>=2.11"} numpy pytest hypothesis \
    "nvidia-cuda-cuobjdump==13.*" "nvidia-cuda-nvdisasm==13.*"
fi

cp -r "$root/tests" "$work/tests"
find "$work/tests" -name __pycache__ -prune -exec rm -rf {} +
# Only pytest's own section: without setup.py and csrc/ the folder is no source tree.
sed -n '/^\[tool.pytest/,$p' "$root/pyproject.toml" > "$work/pyproject.toml"
cd "$work"
export PATH="$work/venv/bin:/usr/bin:/bin" PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
unset CUDA_HOME CUDA_PATH PYTHONPATH
if command -v nvcc > /dev/null; then
  echo "note: nvcc is on the PATH of the system, at $(command -v nvcc)"
fi

python - "$work" <<'PYTHON'
import sys, torch, sm120_ops
if not sm120_ops.__file__.startswith(sys.argv[1]):
    sys.exit(f"sm120_ops comes from {sm120_ops.__file__}, not from the wheel")
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
print(f"sm120_ops {sm120_ops.__version__}, torch {torch.__version__}, "
      f"Python {sys.version.split()[0]}, {gpu}")
PYTHON
python -m sm120_ops info
python -m sm120_ops demo --ops
python -m pytest -q -p no:cacheprovider tests -m "not source" "$@"
