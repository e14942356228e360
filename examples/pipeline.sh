#!/usr/bin/env bash
# The pipeline against an endpoint, top to bottom. Copy this folder, and run it there; nothing-dpo.toml is read from it.
# Any step may be stopped and run again: it goes on where it was, and pays for nothing twice.
#
#   SERVE_URL        an OpenAI-compatible server with the SFT adapter, such as http://localhost:8000/v1
#   BASE_MODEL       the base model, and
#   ADAPTER_PATH     the SFT adapter on it, where they are not those of nothing-dpo.toml
#   OPENAI_API_KEY   the judge's key
#   OPENAI_BASE_URL  the judge's endpoint, where it is not OpenAI
set -euo pipefail
cd "$(dirname "$0")"
: "${SERVE_URL:?is not set: the server with the SFT adapter, such as http://localhost:8000/v1}"
: "${OPENAI_API_KEY:?is not set: the key of the judge}"

nothing-dpo generate --n 3                       # prompts.jsonl         -> data/dpo/completions.jsonl
nothing-dpo judge                                # completions.jsonl     -> judgments.jsonl, train.jsonl, val.jsonl
nothing-dpo inspect pairs --stats                # are they worth training on?
# train.jsonl -> adapters/nothing-gpt-dpo. Exit code 3: trained, and a gate fails or is not shown, as with a dozen prompts.
nothing-dpo train --backend local || [ $? = 3 ]
nothing-dpo serve-config --format yaml > serve.yaml
echo "to serve both adapters: vllm serve --config serve.yaml"
