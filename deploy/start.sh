#!/usr/bin/env bash
# On the device: install once, check the device, build its engine, repeat the receipt's tokens, serve.
#   ./start.sh                 everything; finished steps are skipped
#   ./start.sh --install-only  only the virtual environment, for an image that is built without the device
#   ./start.sh --check-only    everything except serving
#   ./start.sh key NAME [...]  make an API key and add its hash to API_KEYS; see `headrace key --help`
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")"
set -a
. ./headrace.env
set +a

if [ ! -e .venv/.installed ]; then
  python=${PYTHON:-python3}
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "Headrace needs Python 3.11 or newer; run PYTHON=/path/to/python3.11 $0"; exit 2; }
  # shellcheck disable=SC2086
  "$python" -m venv ${VENV_FLAGS:-} .venv || { echo 'no venv module: install python3-venv'; exit 2; }
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes --requirement requirements.txt
  # pip checks these hashes too, if the package index has them.
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --requirement device.txt
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps wheels/*.whl
  touch .venv/.installed
fi
[ "${1:-}" != --install-only ] || exit 0

headrace=.venv/bin/headrace
if [ "${1:-}" = key ]; then
  exec $headrace key --file "${API_KEYS:-api_keys.txt}" "${@:2}"
fi
if [ "$DEVICE" = auto ]; then $headrace doctor; else $headrace doctor --require "$DEVICE"; fi

if [ -n "${ENGINE_TARGET:-}" ]; then
  gpu=$($headrace doctor --json | .venv/bin/python -c \
    'import json, sys; device = json.load(sys.stdin)["cuda_device"]; print(device["capability"] if device else "")')
  # An existing engine is not built again.
  $headrace engine artifact --target "$ENGINE_TARGET" ${gpu:+--gpu "$gpu"} --max-batch "$MAX_BATCH" \
    --prefill-chunk "$PREFILL_CHUNK" ${MAX_LEN:+--max-len "$MAX_LEN"} || [ "$DEVICE" = auto ]
fi

# Kept apart, so that the server need not be able to write where the code is.
state=state
mkdir -p "$state"
if [ ! -e "$state/verified" ]; then
  $headrace verify artifact --device "$DEVICE"
  touch "$state/verified"
fi
[ "${1:-}" != --check-only ] || exit 0

# The supervisor (systemd, Docker, Kubernetes) restarts the server when its engine has failed.
# shellcheck disable=SC2086
exec $headrace serve artifact --device "$DEVICE" --host "$HOST" --port "$PORT" --max-batch "$MAX_BATCH" \
  --prefill-chunk "$PREFILL_CHUNK" ${MAX_LEN:+--max-len "$MAX_LEN"} ${API_KEYS:+--api-keys "$API_KEYS"} \
  --exit-on-failure ${SERVE_FLAGS:-}
