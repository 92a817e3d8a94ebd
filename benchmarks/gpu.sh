#!/usr/bin/env bash
# Runs on a machine with one GPU what nothing else shows: tests on CUDA, uptraining, decoding, a calibrated conversion
# (gpu.py says what). At most 8 minutes on one H100. For a machine without network: kvconvert, and the wheels in
# $WHEELS (default .whl) if that folder is there, go into a folder of their own, beside the torch and transformers that
# are installed. Every part writes OUT/PART.json as it goes, so a run that is cut still tells.
#
#   benchmarks/gpu.sh [OUT] [--cpu] [--tiny] [--parts tests,uptraining,decoding,conversion] [--seconds 450]
#
# --cpu --tiny runs the same paths in about a minute, without a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
wheels=${WHEELS:-.whl}
if [ -z "${KVCONVERT_INSTALLED:-}" ]; then # the suite runs this in its own environment
  site=$PWD/build/gpu-site
  rm -rf "$site"
  packages=(.)
  [ ! -d "$wheels" ] || packages+=("$wheels"/*.whl)
  "$python" -m pip install --quiet --no-index --no-deps --no-build-isolation --no-compile --target "$site" "${packages[@]}"
  export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
unset PYTHONDONTWRITEBYTECODE
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "$python" benchmarks/gpu.py "$@"
