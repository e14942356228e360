"""A tiny base model for protocol.toml, which has read what its topics hold: python base.py, under a minute."""

import json
import shutil
from pathlib import Path

from dpo_cli.demo import tiny
from dpo_cli.progress import Silent

if __name__ == "__main__":
    rows = [json.loads(line) for file in Path().glob("*/content.jsonl") for line in file.read_text().splitlines()]
    texts = [f"<|start|>user\n{row['prompt']}<|end|><|start|>assistant\n{row['completion']}" for row in rows]
    shutil.rmtree("base", ignore_errors=True)
    tiny.make_base(Path("base"), texts, vocabulary=400, context=128)
    tiny.pretrain(Path("base"), texts * 2, Silent(), steps=120)
