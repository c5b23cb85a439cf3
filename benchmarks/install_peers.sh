#!/usr/bin/env bash
# Other people's samplers for benchmarks/race.py, in an environment of their own: .venv-peers, about 1.5 GB.
#
# dalle-pytorch and min-dalle go in without their dependencies: these would build a tokenizer, or pull in torchvision
# and a trainer that sampling does not touch.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python3 -m venv .venv-peers
pip() { .venv-peers/bin/python -m pip install --quiet --disable-pip-version-check "$@"; }
pip torch==2.13.0 numpy==2.4.6
pip --no-deps dalle-pytorch==1.6.6 min-dalle==0.4.11
pip "setuptools<81" wheel einops==0.8.2 regex ftfy tqdm requests pyyaml packaging pillow omegaconf emoji webdataset \
  axial-positional-embedding==0.2.1 rotary-embedding-torch==0.9.1 tokenizers transformers==5.24.0 x-transformers==2.31.5
