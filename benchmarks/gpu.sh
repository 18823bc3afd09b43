#!/usr/bin/env bash
# Correctness and speed of the Triton kernels on this machine's GPU, in under nine minutes: prints tables, and writes
# JSON with the GPU's name to benchmarks/results/. Needs PyTorch with Triton, and no installation of this package.
# Without a GPU it says so and exits with 2. PYTHON chooses the interpreter, --output another folder.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
if ! "$python" -c 'import torch' 2>/dev/null; then
    echo "benchmarks/gpu.sh: expected a Python with PyTorch, found none in $python (set PYTHON=...)" >&2
    exit 2
fi
PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH} exec "$python" -m benchmarks.gpu "$@"
