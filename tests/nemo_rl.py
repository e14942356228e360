"""A validator of what NeMo RL documents for DPO: its config keys and the rows of its two preference datasets.

From docs/guides/dpo.md, docs/guides/lora.md and examples/configs/dpo.yaml of NeMo RL 0.7.0. Raises AssertionError.
"""

import shlex
from typing import Any

# Section -> key -> type; a dict is a section of its own. What the base config sets and we may override.
SCHEMA: dict[str, Any] = {
    "defaults": str,
    "dpo": {
        "max_num_epochs": int, "max_num_steps": int, "val_period": int, "val_batches": int,
        "val_global_batch_size": int, "val_micro_batch_size": int, "val_at_start": bool, "val_at_end": bool,
        "seed": int, "reference_policy_kl_penalty": float, "preference_average_log_probs": bool,
        "sft_average_log_probs": bool, "preference_loss_weight": float, "sft_loss_weight": float,
    },
    "checkpointing": {
        "enabled": bool, "checkpoint_dir": str, "metric_name": (str, type(None)), "higher_is_better": bool,
        "keep_top_k": int, "save_period": int, "save_optimizer": bool,
    },
    "policy": {
        "model_name": str, "tokenizer": {"name": str, "chat_template_kwargs": (dict, type(None))},
        "train_global_batch_size": int, "train_micro_batch_size": int, "max_total_sequence_length": int,
        "precision": str, "max_grad_norm": float,
        "dtensor_cfg": {
            "_v2": bool, "enabled": bool, "activation_checkpointing": bool, "tensor_parallel_size": int,
            "lora_cfg": {
                "enabled": bool, "target_modules": list, "exclude_modules": list, "match_all_linear": bool,
                "dim": int, "alpha": int, "dropout": float, "dropout_position": str,
            },
        },
        "optimizer": {"name": str, "kwargs": {"lr": float, "weight_decay": float, "eps": float}},
    },
    "data": {
        "max_input_seq_length": int, "shuffle": bool, "num_workers": int, "train": dict,
        "validation": (dict, type(None)), "default": dict,
    },
    "logger": {
        "log_dir": str, "wandb_enabled": bool, "tensorboard_enabled": bool, "mlflow_enabled": bool,
        "monitor_gpus": bool, "wandb": {"project": str, "name": str},
    },
    "cluster": {"gpus_per_node": int, "num_nodes": int},
}  # fmt: skip

BASE_DATA = {
    "train": {"dataset_name": "HelpSteer3", "split": "train"},
    "validation": {"dataset_name": "HelpSteer3", "split": "validation"},
}
SHARED_KEYS = {"dataset_name", "data_path", "subset", "split", "prompt_file", "system_prompt_file"}
DATASET_KEYS = {
    "PreferenceDataset": SHARED_KEYS,
    "BinaryPreferenceDataset": SHARED_KEYS | {"prompt_key", "chosen_key", "rejected_key"},
}


def check_config(config: dict[str, Any]) -> None:
    """Keys and types, and what the data section is once it is merged over the base config."""
    _check_section(config, SCHEMA, "")
    for side, base in BASE_DATA.items():
        if config["data"][side] is None:
            assert side == "validation"
            continue
        merged = {**config["data"]["default"], **base, **config["data"][side]}
        assert merged["dataset_name"] in DATASET_KEYS, f"{side}: {merged['dataset_name']}"
        assert set(merged) <= DATASET_KEYS[merged["dataset_name"]], f"{side}: {merged}"
        assert merged["split"] == "train", f"{side}: a local file has the split train only"
        assert merged["data_path"].startswith("/") and merged["data_path"].endswith(".jsonl")
    assert config["policy"]["train_global_batch_size"] % config["policy"]["train_micro_batch_size"] == 0
    metric = config["checkpointing"]["metric_name"]
    if config["data"]["validation"] is None:
        assert not (config["dpo"]["val_period"] or config["dpo"]["val_at_start"] or metric)
    else:
        assert metric == "val:validation-default_loss"


def _check_section(values: dict[str, Any], schema: dict[str, Any], place: str) -> None:
    for key, value in values.items():
        assert key in schema, f"unknown key {place}{key}"
        if isinstance(schema[key], dict):
            _check_section(value, schema[key], f"{place}{key}.")
        else:
            assert isinstance(value, schema[key]), f"{place}{key} = {value!r}"


def check_row(row: dict[str, Any], dataset: str) -> None:
    """One line of a data file."""
    if dataset == "BinaryPreferenceDataset":
        assert set(row) == {"prompt", "chosen", "rejected"}
        assert all(isinstance(value, str) for value in row.values())
        return
    assert set(row) == {"context", "completions"}
    assert [completion["rank"] for completion in row["completions"]] == [0, 1]
    for messages in (row["context"], *(completion["completion"] for completion in row["completions"])):
        assert messages and all(set(message) == {"role", "content"} for message in messages)
    assert all(completion["completion"][0]["role"] == "assistant" for completion in row["completions"])


def overrides(command: str) -> dict[str, int]:
    """The `section.key=value` arguments of a launch line, which the schema knows."""
    words = [word for word in shlex.split(command) if "=" in word and not word.startswith("--") and "." in word]
    found = dict(word.split("=", 1) for word in words)
    for key in found:
        section, name = key.split(".")
        assert name in SCHEMA[section], f"unknown override {key}"
    return {key: int(value) for key, value in found.items()}
