#!/usr/bin/env bash
# Run the examples in a copy of their folder, against the tests' own server and a tiny model. `nothing-dpo` and the
# `python` of its environment must be on PATH.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
cp -r examples "$work/examples"
python - "$work" <<'MODEL'
import sys
from pathlib import Path

sys.path.insert(0, "tests")
from adapters import base_model, save_adapter

work = Path(sys.argv[1])
save_adapter(work / "sft", base_model(work / "base"))
MODEL

python tests/openai_server.py > "$work/url" &
server=$!
trap 'kill $server; rm -rf "$work"' EXIT
for _ in $(seq 100); do [ -s "$work/url" ] && break; sleep 0.1; done

export SERVE_URL OPENAI_BASE_URL OPENAI_API_KEY=none BASE_MODEL="$work/base" ADAPTER_PATH="$work/sft"
SERVE_URL=$(cat "$work/url") OPENAI_BASE_URL=$SERVE_URL
cd "$work/examples"
# A dozen prompts make one step at the real settings, and one step moves nothing that a gate could see.
sed -i -e 's/^learning_rate = .*/learning_rate = 2e-3\nnum_train_epochs = 3\nwarmup_steps = 0/' nothing-dpo.toml
bash pipeline.sh
test -s adapters/nothing-gpt-dpo/adapter_model.safetensors
grep -q '"name":"hardware-dpo"' serve.yaml

mkdir scored
cp data/dpo/completions.jsonl scored
nothing-dpo judge --judge function --function score.py:format_and_freshness --data scored --min-gap 0.1

# The protocol as it lies; it samples in this process.
cd protocol
python base.py
env -u SERVE_URL -u ADAPTER_PATH -u BASE_MODEL nothing-dpo protocol protocol.toml --dry-run
env -u SERVE_URL -u ADAPTER_PATH -u BASE_MODEL nothing-dpo protocol protocol.toml
test -s adapters/sailor/adapter_model.safetensors
