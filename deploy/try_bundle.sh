#!/usr/bin/env bash
# Tries a bundle as on a new machine: unpacked in an empty directory, with a bare environment and its own packages.
#   deploy/try_bundle.sh dist/NAME-cpu.tar.gz [PORT]
set -euo pipefail
bundle=$(readlink -f "$1")
port=${2:-8123}
room=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill "$server" 2>/dev/null || true; wait; rm -rf "$room"' EXIT

tar -xzf "$bundle" -C "$room"
cd "$room"/*/
sed -i "s/^PORT=.*/PORT=$port/" headrace.env
bare=(env -i PATH="$PATH" HOME="$room" ${PIP_CONFIG_FILE:+PIP_CONFIG_FILE="$PIP_CONFIG_FILE"} ${PIP_INDEX_URL:+PIP_INDEX_URL="$PIP_INDEX_URL"})
SECONDS=0
"${bare[@]}" ./start.sh --check-only
echo "installed and verified after $SECONDS s"
"${bare[@]}" ./start.sh > server.log 2>&1 &
server=$!
for _ in $(seq 120); do
  if curl -fsS "http://127.0.0.1:$port/readyz" 2>/dev/null; then break; fi
  kill -0 "$server" 2>/dev/null || { cat server.log; exit 1; }
  sleep 0.5
done
model=$(curl -fsS "http://127.0.0.1:$port/v1/models" | .venv/bin/python -c 'import json, sys; print(json.load(sys.stdin)["data"][0]["id"])')
curl -fsS "http://127.0.0.1:$port/v1/completions" -H 'Content-Type: application/json' \
  -d "{\"model\": \"$model\", \"prompt\": \"One, two, three,\", \"max_tokens\": 8, \"temperature\": 0}"
kill "$server"
wait "$server"
server=
echo "served, answered and ended with 0, ${SECONDS} s in all"
