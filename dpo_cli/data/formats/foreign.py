"""Rows for LLaMA-Factory, axolotl, ms-swift and OpenAI's fine-tuning, and the files and commands that go with them.

_Row formats are those of the tools' own readers: LLaMA-Factory's sharegpt ranking (data/README.md), axolotl's
`chat_template.default` for DPO, ms-swift's `messages` with `rejected_response` or `rejected_messages`, and OpenAI's
preference input, which Azure, Fireworks and Together take too. What a tool has no place for is refused by name; where
it keeps reasoning in the text, it goes there between <think> tags. The commands were not run here.
"""

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from dpo_cli.config.settings import Config
from dpo_cli.data.files import write_file
from dpo_cli.data.messages import Message, call_text, wire
from dpo_cli.data.records import Preference
from dpo_cli.errors import UserError

_Row = dict[str, Any]
_SPEAKERS = {"user": "human", "assistant": "gpt", "tool": "observation", "system": "system"}
NAME = "nothing_dpo"  # of the dataset in dataset_info.json


def row_format(to: str, rows: Sequence[Preference]) -> Callable[[Preference], _Row]:
    """How these rows are written for a tool; all of them have the same columns.

    Raises:
        UserError: a row holds what the tool has no place for.
    """
    refuse(to, rows)
    has_system = any(row.prompt[0]["role"] == "system" for row in rows)
    has_tools = any(row.tools for row in rows)
    if to == "llama-factory":
        return lambda row: _llama_factory(row, has_system, has_tools)
    if to == "ms-swift":
        single = all(_is_text(side) for row in rows for side in (row.chosen, row.rejected))
        return lambda row: _ms_swift(row, single, has_tools)
    return {"axolotl": _axolotl, "openai": _openai}[to]


def refuse(to: str, rows: Sequence[Preference]) -> None:
    """Refuse pairs that a tool's format can't hold.

    Raises:
        UserError: naming the first of them, and why.
    """
    for row in rows:
        fault = _FAULTS[to](row)
        if fault:
            raise UserError(
                f"pair {row.id}: {fault}, which {to} has no place for", where="--to", hint="--to trl holds everything"
            )


def _is_text(side: list[Message]) -> bool:
    return len(side) == 1 and "tool_calls" not in side[0]


def _sides_fault(row: Preference) -> str | None:
    several = any(len(side) != 1 for side in (row.chosen, row.rejected))
    return "a side of several messages" if several else None


def _llama_factory_fault(row: Preference) -> str | None:
    messages = [message for message in row.prompt if message["role"] != "system"]
    if any(message["role"] == "system" for message in row.prompt[1:]):
        return "a system message after the first"
    if [message["role"] == "assistant" for message in messages] != [bool(n % 2) for n in range(len(messages))]:
        return "messages of one side in a row"
    mixed = any(message.get("tool_calls") and message["content"] for message in messages + row.chosen + row.rejected)
    return "text and tool calls in one message" if mixed else _sides_fault(row)


def _axolotl_fault(row: Preference) -> str | None:
    if row.tools or any(message.get("tool_calls") for message in row.prompt + row.chosen + row.rejected):
        return "tools or tool calls"
    return _sides_fault(row)


def _openai_fault(row: Preference) -> str | None:
    if any(message.get("reasoning_content") for message in row.prompt + row.chosen + row.rejected):
        return "reasoning"
    return _sides_fault(row)


_FAULTS: dict[str, Callable[[Preference], str | None]] = {
    "llama-factory": _llama_factory_fault,
    "axolotl": _axolotl_fault,
    "openai": _openai_fault,
    "ms-swift": lambda row: None,
}


def _text(message: Message) -> str:
    """A message's content, its reasoning before it as reasoning models write it."""
    reasoning = message.get("reasoning_content")
    return f"<think>\n{reasoning}\n</think>\n\n{message['content']}" if reasoning else message["content"]


def _llama_factory(row: Preference, has_system: bool, has_tools: bool) -> _Row:
    def turn(message: Message) -> _Row:
        if calls := message.get("tool_calls"):
            functions = [call["function"] for call in calls]
            value = msgspec.json.encode(functions if len(functions) > 1 else functions[0]).decode()
            return {"from": "function_call", "value": value}
        return {"from": _SPEAKERS.get(message["role"], message["role"]), "value": _text(message)}

    head, rest = (row.prompt[0], row.prompt[1:]) if row.prompt[0]["role"] == "system" else (None, row.prompt)
    plain: _Row = {
        "conversations": [*map(turn, rest)],
        "chosen": turn(row.chosen[0]),
        "rejected": turn(row.rejected[0]),
    }
    if has_system:
        plain["system"] = head["content"] if head else ""
    if has_tools:
        plain["tools"] = msgspec.json.encode(row.tools).decode() if row.tools else ""
    return plain


def _axolotl(row: Preference) -> _Row:
    def plain(message: Message) -> _Row:
        return {"role": message["role"], "content": _text(message)}

    return {"messages": [*map(plain, row.prompt)], "chosen": plain(row.chosen[0]), "rejected": plain(row.rejected[0])}


def _ms_swift(row: Preference, single: bool, has_tools: bool) -> _Row:
    def turns(message: Message) -> list[_Row]:
        """A tool call is a turn of its own."""
        role = "tool_response" if message["role"] == "tool" else message["role"]
        calls = [{"role": "tool_call", "content": call_text(call)} for call in message.get("tool_calls", [])]
        text = _text(message)
        return [{"role": role, "content": text}, *calls] if text or not calls else calls

    def all_turns(messages: list[Message]) -> list[_Row]:
        return [turn for message in messages for turn in turns(message)]

    plain: _Row = {"messages": all_turns(row.prompt + row.chosen)}
    if single:
        plain["rejected_response"] = _text(row.rejected[0])
    else:
        plain["rejected_messages"] = all_turns(row.prompt + row.rejected)
    if has_tools:
        plain["tools"] = msgspec.json.encode(row.tools or []).decode()
    return plain


def _openai(row: Preference) -> _Row:
    asked: _Row = {"messages": wire(row.prompt), "tools": row.tools or [], "parallel_tool_calls": True}
    return {"input": asked, "preferred_output": wire(row.chosen), "non_preferred_output": wire(row.rejected)}


def write_files(to: str, rows: Sequence[Preference], has_val: bool, folder: Path, config: Config) -> list[Path]:
    """What a tool wants beside the rows, so that it finds them."""
    if to == "llama-factory":
        columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
        columns |= {"system": "system"} if any(row.prompt[0]["role"] == "system" for row in rows) else {}
        columns |= {"tools": "tools"} if any(row.tools for row in rows) else {}
        names = {NAME: "train.jsonl", **({f"{NAME}_val": "val.jsonl"} if has_val else {})}
        info = {
            name: {"file_name": file, "formatting": "sharegpt", "ranking": True, "columns": columns}
            for name, file in names.items()
        }
        path = folder / "dataset_info.json"
        write_file(path, msgspec.json.format(msgspec.json.encode(info), indent=2) + b"\n")
        return [path]
    if to == "axolotl":
        import yaml  # not at the top: it is slow to import, and seldom needed

        path = folder / "axolotl.yaml"
        write_file(path, yaml.safe_dump(_axolotl_config(has_val, folder, config), sort_keys=False).encode())
        return [path]
    return []


def _axolotl_config(has_val: bool, folder: Path, config: Config) -> _Row:
    def dataset(name: str) -> list[_Row]:
        path = str((folder / f"{name}.jsonl").resolve())
        return [{"path": path, "ds_type": "json", "split": "train", "type": "chat_template.default"}]

    settings = config.train
    adapter = {} if settings.full else {"adapter": "lora", "lora_r": settings.r, "lora_alpha": settings.lora_alpha}
    if adapter and settings.target_modules == "all-linear":
        adapter["lora_target_linear"] = True
    elif adapter:
        adapter["lora_target_modules"] = settings.target_modules
    return {
        "base_model": config.model.base,
        "chat_template": "tokenizer_default",
        "rl": "dpo",
        "rl_beta": settings.beta,
        "datasets": dataset("train"),
        **({"test_datasets": dataset("val")} if has_val else {}),
        **adapter,
        "sequence_len": settings.max_length,
        "micro_batch_size": settings.per_device_train_batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "num_epochs": settings.num_train_epochs,
        "learning_rate": settings.learning_rate,
        "output_dir": str((folder / "output").resolve()),
    }


def launch_lines(to: str, folder: Path, has_val: bool, config: Config) -> dict[str, str]:
    """What to type: title -> command."""
    where, base, settings = shlex.quote(str(folder)), shlex.quote(config.model.base), config.train
    kind = "full" if settings.full else "lora"
    if to == "llama-factory":
        val = f" --eval_dataset {NAME}_val" if has_val else ""
        return {
            "LLaMA-Factory, with the template of your model": (
                f"llamafactory-cli train --stage dpo --do_train true --dataset_dir {where} --dataset {NAME}{val} "
                f"--model_name_or_path {base} --template YOUR_TEMPLATE --finetuning_type {kind} "
                f"--pref_beta {settings.beta:g} --learning_rate {settings.learning_rate:g} --output_dir {where}/output"
            )
        }
    if to == "axolotl":
        return {"axolotl": f"axolotl train {shlex.quote(str(folder / 'axolotl.yaml'))}"}
    if to == "ms-swift":
        val = f" --val_dataset {shlex.quote(str(folder / 'val.jsonl'))}" if has_val else ""
        return {
            "ms-swift": (
                f"swift rlhf --rlhf_type dpo --model {base} --train_type {kind} --beta {settings.beta:g} "
                f"--dataset {shlex.quote(str(folder / 'train.jsonl'))}{val} "
                f"--learning_rate {settings.learning_rate:g} --output_dir {where}/output"
            )
        }
    return {}
