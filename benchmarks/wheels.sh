#!/usr/bin/env bash
# Fill a folder with the wheels that benchmarks/gpu.sh lays over a machine with torch and transformers and no network.
#
#   benchmarks/wheels.sh FOLDER [PACKAGE ...]
#
# They are megallama, deepspeed, and what else such a machine lacks: pydantic, zstandard and hjson, and each PACKAGE.
# Needs the network, and python3 with pip. PYTHON_VERSION (3.12) is that of the other machine, which is an x86-64.
set -euo pipefail

[[ $# -ge 1 && $1 != -* ]] || { sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 2; }
FOLDER=$1
shift
ROOT=$(cd "$(dirname "$0")/.." && pwd)
required() { # NAME: as pyproject.toml bounds it
  grep -o "\"$1[<>=][^\"]*" "$ROOT/pyproject.toml" | tr -d '"'
}

mkdir -p "$FOLDER"
rm -f "$FOLDER"/*.whl  # of two versions of a package neither could be installed
COPY=$(mktemp -d)  # building leaves files beside the sources
trap 'rm -rf "$COPY"' EXIT
cp -r "$ROOT/pyproject.toml" "$ROOT/README.md" "$ROOT/megallama" "$COPY"
python3 -m pip wheel --quiet --no-deps --wheel-dir "$FOLDER" "$(required deepspeed)" "$COPY"
PLATFORMS=()
for glibc in 2_17 2_27 2_28 2_34; do PLATFORMS+=(--platform "manylinux_${glibc}_x86_64"); done
python3 -m pip download --quiet --only-binary=:all: --implementation cp --python-version "${PYTHON_VERSION:-3.12}" \
  "${PLATFORMS[@]}" --platform manylinux2014_x86_64 --dest "$FOLDER" \
  "$(required pydantic)" "$(required zstandard)" hjson "$@"
ls "$FOLDER"
