#!/usr/bin/env bash
# On the device: install once, see that the device works, build its engine, repeat the receipt's tokens, serve.
#   ./start.sh                 all of it; what was done before is not done again
#   ./start.sh --install-only  the virtual environment alone, for an image built where the device is not
#   ./start.sh --check-only    everything but serving
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")"
set -a
. ./headrace.env
set +a

if [ ! -e .venv/.installed ]; then
  python=${PYTHON:-python3}
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "Headrace needs Python 3.11 or newer; say PYTHON=/path/to/python3.11 $0"; exit 2; }
  # shellcheck disable=SC2086
  "$python" -m venv ${VENV_FLAGS:-} .venv || { echo 'no venv module: install python3-venv'; exit 2; }
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps wheels/*.whl
  touch .venv/.installed
fi
[ "${1:-}" != --install-only ] || exit 0

headrace=.venv/bin/headrace
if [ "$DEVICE" = auto ]; then $headrace doctor; else $headrace doctor --require "$DEVICE"; fi

if [ -n "${ENGINE_TARGET:-}" ]; then
  gpu=$($headrace doctor --json | .venv/bin/python -c \
    'import json, sys; device = json.load(sys.stdin)["cuda_device"]; print(device["capability"] if device else "")')
  # An engine that is there already is not built again.
  $headrace engine artifact --target "$ENGINE_TARGET" ${gpu:+--gpu "$gpu"} --max-batch "$MAX_BATCH" \
    --prefill-chunk "$PREFILL_CHUNK" ${MAX_LEN:+--max-len "$MAX_LEN"} || [ "$DEVICE" = auto ]
fi

if [ ! -e .venv/.verified ]; then
  $headrace verify artifact --device "$DEVICE"
  touch .venv/.verified
fi
[ "${1:-}" != --check-only ] || exit 0

# shellcheck disable=SC2086
exec $headrace serve artifact --device "$DEVICE" --host "$HOST" --port "$PORT" --max-batch "$MAX_BATCH" \
  --prefill-chunk "$PREFILL_CHUNK" ${MAX_LEN:+--max-len "$MAX_LEN"} ${SERVE_FLAGS:-}
