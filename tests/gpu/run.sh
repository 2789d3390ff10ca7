#!/usr/bin/env bash
# The day a card is at hand, perhaps for a quarter of an hour and without a network: all that it is to show, in under nine minutes.
#   tests/gpu/run.sh pack [KIT]   where there is a network: what the card's machine lacks, into KIT (.gpu-kit)
#   tests/gpu/run.sh [OUT]        there: tests/gpu, then memory by recipe and size, then tokens a second; OUT (runs/card) gets card.json and card.md
# The machine is expected to have torch (a CUDA 13.0 build), triton, transformers and accelerate. PYTHON and KIT name others than python3 and .gpu-kit;
# PLAYED_CARD plays one (tests/card).
set -uo pipefail
cd "$(dirname "$0")/../.."
kit=${KIT:-.gpu-kit} python=${PYTHON:-python3}
if [ "${1:-}" = pack ]; then
  kit=${2:-$kit}
  rm -rf "$kit" && mkdir -p "$kit"
  # Versions are this project's own; TRL and datasets, the largest, only with TRL=1: SDFT is left out without them.
  "$python" -m pip install -q --no-deps --target "$kit" --python-version "${PYTHON_VERSION:-3.12}" --only-binary=:all: -c constraints.txt \
    bitsandbytes peft typer rich shellingham markdown-it-py mdurl pygments pydantic pydantic-core annotated-doc annotated-types typing-inspection \
    typing-extensions gguf tomli-w psutil pytest pytest-timeout pytest-xdist execnet pluggy iniconfig hypothesis sortedcontainers vaderSentiment openai \
    httpx2 httpcore2 h11 anyio sniffio idna truststore jiter distro starlette fastapi uvicorn click prompt-toolkit wcwidth ${TRL:+trl datasets pyarrow multiprocess dill xxhash} || exit 1
  find "$kit/bitsandbytes" -name 'libbitsandbytes_*.so' ! -name '*cuda130*' ! -name '*cpu*' -delete
  find "$kit" -name '__pycache__' -type d -prune -exec rm -rf {} +
  exec du -sh "$kit"
fi
out=${1:-runs/card} plugin=()
mkdir -p "$out"
export PYTHONPATH="$kit:.${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
if [ -n "${PLAYED_CARD:-}" ]; then plugin=(-p tests.card.plugin); fi
timeout "${TESTS_SECONDS:-150}" "$python" -m pytest "${plugin[@]}" -m gpu tests/gpu/test_cuda.py tests/gpu/test_verbs.py --junitxml="$out/tests.xml" || echo "tests/gpu: see $out/tests.xml"
timeout 220 "$python" -m tests.gpu.measure fit --out "$out" --seconds "${FIT_SECONDS:-190}"
if [ -z "${PLAYED_CARD:-}" ]; then timeout 160 "$python" -m tests.gpu.measure speed --out "$out" --seconds 130; fi # a played card has no clock
"$python" -m tests.gpu.measure table --out "$out"
