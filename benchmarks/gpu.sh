#!/usr/bin/env bash
# Everything that needs a GPU, in one command: the tests marked `gpu`, then drawing over its floor, then training over its
# peak, plain and with compiled blocks. Prints tables.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON="${PYTHON:-.venv/bin/python}"
"$PYTHON" -c 'import torch, sys; sys.exit(0 if torch.cuda.is_available() else "no CUDA device: nothing was run")'
"$PYTHON" -m pytest tests -q -m gpu
"$PYTHON" benchmarks/decode.py --device cuda
"$PYTHON" benchmarks/train.py --preset gpu --device cuda
"$PYTHON" benchmarks/train.py --preset gpu --device cuda --stages transformer --set distributed.compile_blocks=true
