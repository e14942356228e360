"""A reward model as judge: `--judge reward-model --reward-model FOLDER_OR_HUB_ID`. Free, and on this machine.

A sequence-classification model of transformers reads prompt and completion as one conversation, in its own chat
template or, if it has none, as lines of `role: text`. The score is its logit, or with two labels the log-odds of the
last one; `pair.min_gap` is in these units. On CUDA it runs in bfloat16 where the card has it, else in float32; but for
that rounding a score depends on the conversation alone, not on what else is in the batch. Models that fit are
Skywork/Skywork-Reward-V2-Qwen3-0.6B and -1.7B: one logit, Qwen3's template, no code of their own.

Control tokens of the model's tokenizer are read as text where a prompt or a completion holds them. A conversation that
is too long loses the beginning of its prompt, and is skipped if the completion alone is too long. A model that needs
code of its own is refused: that code would run here. Not covered: adapters, models that read prompt and completion as
two segments, and more than one device.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from typing import Any

import torch
from jinja2 import TemplateError
from msgspec import Struct
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from dpo_cli.config.settings import Config
from dpo_cli.data.records import Judgment, Message, Tool, said
from dpo_cli.errors import Exit, UserError
from dpo_cli.judges._control_tokens import control_tokens, disarm_all
from dpo_cli.judges._ranking import conclude
from dpo_cli.judges._task import Task
from dpo_cli.models.base_model import find_base, fingerprint
from dpo_cli.progress import Progress

ABSOLUTE = True
KEY = "judge.reward_model"
WINDOW = 256  # prompts that are encoded and sorted by length together
TOO_LONG = "the completion is longer than the reward model reads"
HINT = "--reward-model FOLDER, or a Hub id that this machine can reach"
SMALL = "--reward-model Skywork/Skywork-Reward-V2-Qwen3-0.6B, or another whose architecture transformers has"


class RewardModel(Struct):
    """A loaded reward model.

    `pad` is the padding token of its configuration, if any; `context` the most tokens that it reads; `template` the
    variables of its chat template; `control` the tokens of its tokenizer that no text may hold.
    """

    network: Any
    tokenizer: Any
    pad: int | None
    context: int
    template: dict[str, Any]
    control: frozenset[str] = frozenset()


class _TooLong(Exception):
    """A completion that does not fit; says both numbers of tokens."""


def identity(config: Config) -> dict[str, Any]:
    """The model's name, and its commit on the Hub or a hash of its folder."""
    name = _name(config)
    _read_config(name)  # from the Hub: it names the commit
    folder = find_base(name)
    in_cache = folder is not None and folder.parent.name == "snapshots"
    weights = None if folder is None else folder.name if in_cache else fingerprint(folder)[:16]
    return {"judge": "reward-model", "reward_model": name.rstrip("/").rpartition("/")[2], "weights": weights}


def calls(shown: Iterable[int], config: Config) -> int:
    """None: the model runs here."""
    return 0


def judge(tasks: Sequence[Task], config: Config, deliver: Callable[[Judgment], None], progress: Progress) -> None:
    """Score every shown completion.

    Raises:
        UserError: no such model, a score that is no number, or no memory for a batch.
    """
    model = load(_name(config), config.model.chat_template_kwargs)
    size = config.judge.batch_size
    done = 0
    for start in range(0, len(tasks), WINDOW):
        rows: list[tuple[Task, int, list[int]]] = []
        for task in tasks[start : start + WINDOW]:
            try:
                rows += [
                    (task, index, encode(model, task.prompt, task.completions[index], task.tools))
                    for index in task.shown
                ]
            except _TooLong as error:
                deliver(Judgment(id=task.id, completions_id=task.completions_id, skipped=f"{TOO_LONG}: {error}"))
                done += 1
            except TemplateError as error:
                refused = f"the reward model's chat template refuses the prompt: {error}"
                deliver(Judgment(id=task.id, completions_id=task.completions_id, error=refused))
                done += 1
        rows.sort(key=lambda row: len(row[2]), reverse=True)  # little padding, and a lack of memory shows at once
        found: dict[str, dict[int, float]] = defaultdict(dict)
        for first in range(0, len(rows), size):
            batch = rows[first : first + size]
            for (task, index, _), value in zip(batch, score(model, [ids for *_, ids in batch]), strict=True):
                if not math.isfinite(value):
                    where = f"{KEY}, prompt {task.id}, completion {index}"
                    raise UserError(f"the reward model's score is {value}", where=where, code=Exit.FAILED)
                found[task.id][index] = value
                if len(found[task.id]) == len(task.shown):
                    deliver(conclude(task, found[task.id]))
                    done += 1
            progress.update(done)


def load(name: str, template: dict[str, Any] | None = None) -> RewardModel:
    """Load a reward model, on CUDA where there is one.

    Args:
        name: folder or Hub id.
        template: variables of the chat template.

    Raises:
        UserError: there is no such model, or it has no head that scores.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    labels = _read_config(name).num_labels
    if labels > 2:
        raise UserError(f"'{name}' has {labels} labels; a reward model has 1, or 2", where=KEY, hint=HINT)
    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda and torch.cuda.is_bf16_supported() else torch.float32
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        network, loading = AutoModelForSequenceClassification.from_pretrained(
            name, dtype=dtype, output_loading_info=True, trust_remote_code=False
        )
    except Exception as error:
        raise _unusable(name, error) from error
    if missing := sorted(loading["missing_keys"]):
        raise UserError(f"'{name}' is no reward model: it has no weights for {missing[0]}", where=KEY, hint=HINT)
    network.requires_grad_(False).eval().to("cuda" if cuda else "cpu")
    network.config.use_cache = False

    text = network.config.get_text_config()
    positions = getattr(text, "max_position_embeddings", tokenizer.model_max_length)
    pad = text.pad_token_id if text.pad_token_id in range(text.vocab_size) else None
    added = ((token.content, token.special) for token in tokenizer.added_tokens_decoder.values())
    context = min(positions, tokenizer.model_max_length)
    return RewardModel(network, tokenizer, pad, context, template or {}, control_tokens(added))


def encode(model: RewardModel, prompt: list[Message], completion: str, tools: list[Tool] | None = None) -> list[int]:
    """Token ids of a conversation, without the beginning of its prompt if it is too long.

    Raises:
        _TooLong: the completion alone does not fit.
        TemplateError: the chat template refuses the conversation.
    """
    ids = _render(model, [*prompt, {"role": "assistant", "content": completion}], tools)
    if len(ids) <= model.context:
        return ids
    before = _render(model, [*prompt, {"role": "assistant", "content": ""}], tools)
    common = next((place for place, (one, two) in enumerate(zip(ids, before, strict=False)) if one != two), len(before))
    start = ids[:1] if ids[0] in model.tokenizer.all_special_ids else []
    room = model.context - len(start)
    if len(ids) - common > room:
        raise _TooLong(f"{len(ids) - common} tokens, of {room}")
    return start + ids[-room:]


@torch.inference_mode()
def score(model: RewardModel, rows: list[list[int]]) -> list[float]:
    """Logit of each conversation, or the log-odds of the last of two labels.

    Args:
        model: the reward model.
        rows: token ids; they are padded on the right, which a causal model can't see.

    Raises:
        UserError: no memory for so many at once.
    """
    network = model.network
    lengths = torch.tensor([len(row) for row in rows])
    pad = _filler(rows) if model.pad is None else model.pad
    # transformers takes the last token that is not this one for the last of the conversation.
    network.config.get_text_config().pad_token_id = pad
    ids = torch.tensor([row + [pad] * (int(lengths.max()) - len(row)) for row in rows])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    try:
        logits = network(input_ids=ids.to(network.device), attention_mask=mask.to(network.device)).logits.float()
    except torch.OutOfMemoryError as error:
        hint = f"--batch-size {max(1, len(rows) // 2)}"
        raise UserError(f"no memory for {len(rows)} completions at once", where=KEY, hint=hint) from error
    values: list[float] = (logits[:, -1] - logits[:, 0] if logits.shape[1] == 2 else logits[:, 0]).tolist()
    return values


def _filler(rows: list[list[int]]) -> int:
    """A token that ends no row: taking the last that differs from it then finds the end of each."""
    ends = {row[-1] for row in rows}
    return next(token for token in count() if token not in ends)


def _render(model: RewardModel, messages: list[Message], tools: list[Tool] | None) -> list[int]:
    tokenizer = model.tokenizer
    messages, tools = disarm_all(messages, model.control), disarm_all(tools, model.control)
    if tokenizer.chat_template is None:
        text = "\n".join(f"{message['role']}: {said(message)}" for message in messages)
        ids: list[int] = tokenizer(text)["input_ids"]
    else:
        ids = tokenizer.apply_chat_template(messages, tools=tools, return_dict=False, **model.template)
    return ids


def _name(config: Config) -> str:
    if not config.judge.reward_model:
        raise UserError("no reward model is named", where=KEY, hint=HINT)
    return config.judge.reward_model


def _read_config(name: str) -> Any:
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        raise _unusable(name, error) from error


def _unusable(name: str, error: Exception) -> UserError:
    if "trust_remote_code" in str(error):
        return UserError(f"'{name}' needs code of its own, which would run here: refused", where=KEY, hint=SMALL)
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return UserError(f"no reward model can be loaded from '{name}': {lines[0]}", where=KEY, hint=HINT)
