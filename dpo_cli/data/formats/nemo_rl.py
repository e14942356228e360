"""The recipe for NVIDIA NeMo RL: rows of its preference datasets, a YAML that extends its `dpo` base, launch lines.

Key names and row formats are those of NeMo RL 0.6.0 to 0.7.0 and of its main branch in August 2026
(docs/guides/dpo.md, examples/configs/dpo.yaml, nemo_rl/data/datasets/preference_datasets/). Older versions take
`data.train_data_path` and the like; guides that show those, or `defaults: [dpo]`, no longer load. The learning rate
schedule stays that of the base config. Losses other than the sigmoid are not covered: NeMo RL has none.
"""

import math
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dpo_cli.config.settings import Config
from dpo_cli.data.files import write_file
from dpo_cli.data.records import Preference
from dpo_cli.errors import UserError
from dpo_cli.models.base_model import absolute

CONFIG_FILE = "nemo_rl.yaml"
LAUNCH_FILE = "launch.sh"
MERGE_FILE = "merge_sft.py"
MERGED = "sft"  # where launch.sh puts the base model with the SFT adapter merged into it
# The base config lies in the NeMo RL checkout that the command is run from; NeMo RL resolves a relative path from the
# YAML's own folder, and `${oc.env:…}` before that.
BASE = "${oc.env:PWD}/examples/configs/dpo.yaml"
RUN = "uv run examples/run_dpo.py --config"


def dataset_name(rows: Sequence[Preference]) -> str:
    """The NeMo RL dataset that holds these rows: the binary one's prompt is documented as a single user text."""
    single = all(
        [message["role"] for message in row.prompt] == ["user"]
        and len(row.chosen) == len(row.rejected) == 1
        and all(len(message) == 2 for message in row.prompt + row.chosen + row.rejected)
        for row in rows
    )
    return "BinaryPreferenceDataset" if single else "PreferenceDataset"


def row_format(rows: Sequence[Preference]) -> Callable[[Preference], dict[str, Any]]:
    """How each of these rows is written; both sides of a split have one format.

    Raises:
        UserError: a row has tools, for which its preference datasets have no place.
    """
    if found := next((row.id for row in rows if row.tools), None):
        raise UserError(
            f"pair {found}: tools, which nemo-rl has no place for", where="--to", hint="--to trl holds everything"
        )
    return _binary if dataset_name(rows) == "BinaryPreferenceDataset" else _ranked


def _binary(row: Preference) -> dict[str, Any]:
    return {
        "prompt": row.prompt[0]["content"],
        "chosen": row.chosen[0]["content"],
        "rejected": row.rejected[0]["content"],
    }


def _ranked(row: Preference) -> dict[str, Any]:
    completions = [{"rank": rank, "completion": side} for rank, side in enumerate((row.chosen, row.rejected))]
    return {"context": row.prompt, "completions": completions}


def write_recipe(train: Sequence[Preference], val: Sequence[Preference], folder: Path, config: Config) -> list[Path]:
    """Write the YAML and the launch script beside `train.jsonl` and `val.jsonl`.

    Raises:
        UserError: the recipe has a loss that NeMo RL lacks.
    """
    import yaml  # not at the top: it is slow to import, and seldom needed

    folder = folder.resolve()  # NeMo RL runs elsewhere
    text = _HEADER + yaml.safe_dump(recipe(train, val, folder, config), sort_keys=False, allow_unicode=True)
    write_file(folder / CONFIG_FILE, text.encode())
    write_file(folder / LAUNCH_FILE, _launch_script(folder, len(train), config).encode())
    files = [folder / CONFIG_FILE, folder / LAUNCH_FILE]
    if config.model.adapter is not None:
        write_file(folder / MERGE_FILE, _MERGE.encode())
        files.append(folder / MERGE_FILE)
    return files


_HEADER = """\
# DPO with NVIDIA NeMo RL 0.6 or later, written by nothing-dpo. Start it from the root of a NeMo RL checkout with one of
# the lines in launch.sh: what is not set here comes from that checkout's examples/configs/dpo.yaml.
"""


def recipe(train: Sequence[Preference], val: Sequence[Preference], folder: Path, config: Config) -> dict[str, Any]:
    """The settings that differ from NeMo RL's `dpo` base config.

    Raises:
        UserError: the recipe has a loss that NeMo RL lacks.
    """
    settings = config.train
    others = (settings.label_smoothing, settings.offset_alpha, settings.ld_alpha is not None, settings.use_weighting)
    if settings.loss_type != "sigmoid" or any(others):
        raise UserError(
            "NeMo RL's DPO has the sigmoid loss without label smoothing only",
            where="train.loss_type",
            hint="--set train.loss_type=sigmoid --set train.label_smoothing=0",
        )
    batch, micro_batch = batches(config, len(train), gpus=1)
    steps = max(1, math.ceil(settings.num_train_epochs * (len(train) // batch)))
    modules = settings.target_modules
    named = [] if modules == "all-linear" else [modules] if isinstance(modules, str) else modules
    return {
        "defaults": BASE,
        "dpo": {
            "max_num_epochs": max(1, math.ceil(settings.num_train_epochs)),
            "max_num_steps": settings.max_steps if settings.max_steps > 0 else steps,
            "val_period": settings.eval_steps if val else 0,
            "val_batches": -1,  # all of them
            "val_at_start": bool(val),
            "val_at_end": bool(val),
            "reference_policy_kl_penalty": settings.beta,
            "preference_loss_weight": 1.0,
            "sft_loss_weight": 0.0,
            "seed": settings.seed,
        },
        "data": _data(dataset_name([*train, *val]), bool(val), folder),
        "policy": {
            "model_name": model_name(folder, config),
            "tokenizer": {
                "name": "${policy.model_name}",
                "chat_template_kwargs": config.model.chat_template_kwargs or None,
            },
            "max_total_sequence_length": settings.max_length,
            "train_global_batch_size": batch,
            "train_micro_batch_size": micro_batch,
            "max_grad_norm": settings.max_grad_norm,
            "optimizer": {"kwargs": {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}},
            "dtensor_cfg": {
                "_v2": True,  # LoRA needs it
                "activation_checkpointing": settings.gradient_checkpointing is not False,
                "lora_cfg": {
                    "enabled": not settings.full,
                    "match_all_linear": not named,
                    "target_modules": named,
                    "dim": settings.r,
                    "alpha": round(settings.lora_alpha),
                    "dropout": settings.lora_dropout,
                },
            },
        },
        "checkpointing": {
            "enabled": True,
            "checkpoint_dir": str(folder / "checkpoints"),
            "metric_name": "val:validation-default_loss" if val else None,
            "higher_is_better": False,
            "save_period": settings.save_steps,
        },
        "logger": {
            "log_dir": str(folder / "logs"),
            "wandb_enabled": False,
            "tensorboard_enabled": True,
            "wandb": {"project": "nothing-dpo", "name": config.model.dpo_name},
        },
        "cluster": {"gpus_per_node": 1, "num_nodes": 1},
    }


def _data(dataset: str, has_val: bool, folder: Path) -> dict[str, Any]:
    # Each side names its dataset and split: the base config's own (HelpSteer3, split `validation`) are merged below
    # it, and a local file has only the split `train`.
    def side(name: str) -> dict[str, Any]:
        return {"dataset_name": dataset, "data_path": str(folder / f"{name}.jsonl"), "split": "train"}

    default: dict[str, Any] = {"dataset_name": dataset, "prompt_file": None, "system_prompt_file": None}
    if dataset == "BinaryPreferenceDataset":
        default |= {"prompt_key": "prompt", "chosen_key": "chosen", "rejected_key": "rejected"}
    return {"train": side("train"), "validation": side("val") if has_val else None, "default": default}


def model_name(folder: Path, config: Config) -> str:
    """The model that DPO starts from and holds as its reference.

    NeMo RL takes no PEFT adapter to start from: where there is an SFT adapter, it is the merged model.

    Raises:
        UserError: the SFT adapter is missing, so that the base would silently be the reference.
    """
    adapter = config.model.adapter
    if adapter is None:
        return _base(config)
    if not (absolute(adapter) / "adapter_config.json").is_file():
        raise UserError(
            "no SFT adapter there to start from",
            where=adapter,
            hint="name it with --adapter, or --set model.adapter=none to start from the base model",
        )
    return str(folder / MERGED)


def _base(config: Config) -> str:
    folder = absolute(config.model.base)
    return str(folder) if folder.is_dir() else config.model.base


def batches(config: Config, pairs: int, gpus: int) -> tuple[int, int]:
    """Pairs an optimizer step, and pairs a forward on one GPU.

    NeMo RL asks that the first be a multiple of the second times the GPUs, and drops a last batch that is not full;
    so the step's size is the recipe's, or the nearest below it that fits, and never more than there are pairs.
    """
    settings = config.train
    wanted = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    share = max(1, min(wanted, pairs) // gpus)
    micro = max(size for size in range(1, settings.per_device_train_batch_size + 1) if share % size == 0)
    return share * gpus, micro


def launch_lines(folder: Path, pairs: int, config: Config, nodes: int = 2) -> dict[str, str]:
    """What to type, from the root of a NeMo RL checkout: title -> command, for one GPU, eight, and `nodes` x eight."""
    folder = folder.resolve()
    command = f"{RUN} {shlex.quote(str(folder / CONFIG_FILE))}"

    def overrides(gpus: int) -> str:
        batch, micro = batches(config, pairs, gpus)
        return f"policy.train_global_batch_size={batch} policy.train_micro_batch_size={micro}"

    eight = f"{command} cluster.gpus_per_node=8"
    many = shlex.quote(f"{eight} cluster.num_nodes={nodes} {overrides(8 * nodes)}")
    mounts = f'"$PWD:$PWD",{shlex.quote(f"{folder}:{folder}")}'
    merge = {} if config.model.adapter is None else {"first, once: the SFT model": merge_line(folder, config)}
    return merge | {
        "one GPU": command,
        "eight GPUs": f"{eight} {overrides(8)}",
        f"{nodes} nodes of eight GPUs (Slurm)": (
            f"COMMAND={many} CONTAINER=YOUR_CONTAINER MOUNTS={mounts} sbatch --nodes={nodes} --gres=gpu:8 ray.sub"
        ),
    }


def _launch_script(folder: Path, pairs: int, config: Config) -> str:
    *_, one, eight, many = launch_lines(folder, pairs, config).items()
    merge = ""
    if config.model.adapter is not None:
        merge = f"""
# Merged once, the SFT model is what DPO trains and its reference.
if [ ! -e {shlex.quote(str(folder / MERGED))}/tokenizer_config.json ]; then # saved last
  {merge_line(folder, config)}
fi
"""
    return f"""\
#!/usr/bin/env bash
# NeMo RL on the exported pairs. From the root of a NeMo RL checkout:
#   bash {shlex.quote(str(folder / LAUNCH_FILE))} [1|8|nodes]
set -euo pipefail
{merge}
case "${{1:-1}}" in
  1) # {one[0]}
    {one[1]} ;;
  8) # {eight[0]}
    {eight[1]} ;;
  nodes) # {many[0]}; name the container first
    {many[1]} ;;
  *) echo "usage: $0 [1|8|nodes]" >&2; exit 2 ;;
esac
"""


def merge_line(folder: Path, config: Config) -> str:
    """The command that merges the SFT adapter into the base, for NeMo RL takes no PEFT adapter to start from."""
    assert config.model.adapter is not None
    script, merged = folder.resolve() / MERGE_FILE, folder.resolve() / MERGED
    arguments = (script, _base(config), absolute(config.model.adapter), merged)
    return f"uv run --with peft python {' '.join(shlex.quote(str(one)) for one in arguments)}"


_MERGE = """\
# The base model with the SFT adapter merged into it: merge_sft.py BASE ADAPTER MERGED. Written by nothing-dpo.
import sys

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base, adapter, merged = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype="bfloat16")
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(merged)
AutoTokenizer.from_pretrained(base).save_pretrained(merged)
"""
