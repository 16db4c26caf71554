#!/usr/bin/env bash
# The peers that ask for other versions of what megallama needs, into a folder beside the environment, without what they
# depend on but for what they import. Usage: benchmarks/peers.sh FOLDER
set -euo pipefail
PYTHON=$(dirname "$0")/../.venv/bin/python
"$PYTHON" -m pip install --quiet --upgrade --no-deps --target "$1" \
  'cut-cross-entropy==25.1.1' \
  'litdata>=0.2.76,<0.3' \
  'litgpt>=0.5.13,<0.6' \
  'jsonargparse>=4.37,<4.54' 'lightning>=2.6.1,<3' 'lightning-utilities>=0.15,<1' 'pytorch-lightning>=2.6.1,<3' \
  'torchmetrics>=1.8,<2'
touch "$1/installed"
