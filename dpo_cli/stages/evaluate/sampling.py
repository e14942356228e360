"""Both adapters' completions, each sampled once and kept: a stopped run goes on, and a new adapter starts anew.

A side's folder is named by what made its completions, the adapter's weights included, and holds a completions.jsonl
of the usual form. An endpoint is believed to serve what its names say: if a served adapter was changed without the
folder on this machine, nothing here can know (`--fresh`).
"""

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from msgspec import Struct, field
from msgspec.structs import replace

from dpo_cli import engines
from dpo_cli.config.resolve import get
from dpo_cli.config.settings import Config
from dpo_cli.data.formats.prompts import PromptFile
from dpo_cli.data.records import Completions, Message, Prompt, content_id, prompt_id
from dpo_cli.data.resumable import Resumable
from dpo_cli.endpoint.costs import Receipt
from dpo_cli.endpoint.prices import price_of
from dpo_cli.endpoint.responses import EMPTY, after_thinking
from dpo_cli.engines import _engine
from dpo_cli.engines._engine import Request, Sampled
from dpo_cli.errors import UserError
from dpo_cli.models.base_model import find_base, fingerprint
from dpo_cli.progress import Progress

FOLDER = "evaluation"  # in `data`
REFERENCE, POLICY = "reference", "policy"
DIGITS = 16  # of a fingerprint


class RunBudget:
    """The dollars of one run, which samples and judges from one purse.

    Args:
        cap: most that it may spend; None: no limit.

    `receipt` is of what was paid so far, None if no endpoint was asked.
    """

    def __init__(self, cap: float | None) -> None:
        self.cap = cap
        self.receipt: Receipt | None = None

    @property
    def left(self) -> float | None:
        """Dollars that may still be spent."""
        if self.cap is None or self.receipt is None:
            return self.cap
        return max(0.0, self.cap - self.receipt.usd - self.receipt.unseen_usd)

    def add(self, receipt: Receipt | None) -> None:
        """Count what one step has paid."""
        if receipt is not None:
            self.receipt = receipt if self.receipt is None else self.receipt + receipt


class Side(Struct, kw_only=True):
    """One of the two adapters: the settings that sample it, with its own folder as `data`, and what they amount to."""

    name: str
    config: Config
    made_with: dict[str, Any]


class Answers(Struct, kw_only=True):
    """What a side answered, by prompt; `failed` counts the prompts without an answer by reason."""

    rows: dict[str, Completions]
    usd: float = 0.0
    failed: dict[str, int] = field(default_factory=dict)


def held_out_prompts(config: Config, progress: Progress, limit: int | None = None) -> dict[str, Prompt]:
    """The held-out prompts by id: those of `evaluate.prompts`, or of val.jsonl.

    Raises:
        UserError: there are none.
    """
    path = Path(config.evaluate.prompts) if config.evaluate.prompts else Path(config.data) / "val.jsonl"
    if not path.exists():
        raise UserError("no held-out prompts there", where=str(path), hint="--prompts FILE")
    file = PromptFile(path, config.evaluate.columns, config.evaluate.skip_bad)
    prompts = {prompt_id(*prompt): prompt for prompt in file}
    for note in file.notes(Path(config.data)):
        progress.log(note)
    if not prompts:
        raise UserError("no prompts in it", where=str(path), hint="--prompts FILE")
    return dict(list(prompts.items())[:limit])


def make_side(name: str, config: Config, progress: Progress) -> Side:
    """The reference (`model.adapter`) or the policy (`model.dpo_adapter`), under the sampling of `[generate]`.

    The sides draw with different seeds: with the same draws, a policy that moved by a hair would win or tie every
    comparison.
    """
    model, seed = config.model, config.evaluate.seed
    if name == POLICY:
        model, seed = replace(model, adapter=model.dpo_adapter, name=model.dpo_name), seed + 1
    generate = replace(config.generate, seed=seed, n=config.evaluate.samples)
    config = replace(config, model=model, generate=generate)
    generate.engine = _engine.choose(config, progress)
    made_with = _made_with(config)
    folder = Path(config.data) / FOLDER / content_id(made_with)
    return Side(name=name, config=replace(config, data=str(folder)), made_with=made_with)


def forget(side: Side) -> None:
    """Throw away what the side has answered."""
    shutil.rmtree(side.config.data, ignore_errors=True)


def known(side: Side) -> Resumable[Completions]:
    """What the side has answered in former runs."""
    return Resumable.read(_path(side), Completions)


def owed(side: Side, prompts: dict[str, Prompt], rows: Resumable[Completions]) -> list[Request]:
    """What is not sampled yet."""
    requests = []
    n = side.config.generate.n
    if side.config.generate.engine == "endpoint":  # asked again, it may have one
        rows.known = {key: row for key, row in rows.known.items() if all(map(_is_answer, row.answers))}
    for key, prompt in rows.missing(prompts, lambda row, _: len(row.completions) >= n).items():
        have = rows.known[key].completions if key in rows.known else []
        requests.append(Request(id=key, prompt=prompt.messages, have=have, need=n - len(have), tools=prompt.tools))
    return requests


def _is_answer(message: Message) -> bool:
    """Whether a completion says or does anything, beside thinking."""
    return bool(after_thinking(message["content"]) or message.get("tool_calls"))


def sample(side: Side, prompts: dict[str, Prompt], progress: Progress, purse: RunBudget) -> Answers:
    """Have every prompt answered `evaluate.samples` times; one that fails is left out, and owed by the next run.

    A completion without text is no answer, whoever gave it: neither a win of the other side nor a wrong answer.

    Raises:
        UserError: what the engine raises.
    """
    config = side.config
    failed: Counter[str] = Counter()
    tokens = 0
    with Resumable(_path(side), Completions) as rows:
        if requests := owed(side, prompts, rows):

            def deliver(sampled: Sampled) -> None:
                nonlocal tokens
                if sampled.error:
                    failed[sampled.error] += 1
                    progress.log(f"prompt {sampled.id}: {sampled.error}")
                    return
                rows.deliver(_extended(rows.known.get(sampled.id), sampled, side, prompts[sampled.id]))
                tokens += sampled.usage.output
                delivery.note(tokens=tokens)

            with rows.reporting(progress, f"sample {side.name}", len(prompts), len(requests)) as delivery:
                asked = replace(config, generate=replace(config.generate, max_usd=purse.left))
                purse.add(engines.load(config.generate.engine)(requests, asked, deliver, delivery))
    answers = Answers(rows={key: rows.known[key] for key in prompts if key in rows.known})
    for key, row in list(answers.rows.items()):
        if not all(map(_is_answer, row.answers)):
            failed[EMPTY] += 1
            del answers.rows[key]
    answers.failed = dict(failed)
    if config.generate.engine == "endpoint":
        price = price_of(config.generate.url or "", config.model.name, config.generate.price)
        answers.usd = sum(price.usd(row.usage) for row in answers.rows.values()) if price else 0.0
    return answers


def _extended(row: Completions | None, sampled: Sampled, side: Side, prompt: Prompt) -> Completions:
    """A prompt's row with what was sampled added to it."""
    row = row or Completions(
        id=sampled.id,
        prompt=prompt.messages,
        tools=prompt.tools,
        completions=[],
        finish_reasons=[],
        model=side.config.model.name,
        sampling=side.made_with,
    )
    new = sampled.messages or [None] * len(sampled.texts)
    whole = [*(row.messages or [None] * len(row.completions)), *new]
    return replace(
        row,
        messages=whole if any(whole) else [],
        completions=row.completions + sampled.texts,
        usage=row.usage + sampled.usage,
        sampling=sampled.as_sent(row.sampling),
        finish_reasons=row.finish_reasons + sampled.finish_reasons,
    )


def _path(side: Side) -> Path:
    return Path(side.config.data) / "completions.jsonl"


def _made_with(config: Config) -> dict[str, Any]:
    """What makes completions comparable, the weights of the adapter included where they are on this machine."""
    keys = [
        f"generate.{name}" for name in ("engine", "temperature", "top_p", "max_tokens", "frequency_penalty", "seed")
    ]
    made = {key.partition(".")[2]: get(config, key) for key in [*keys, "model.chat_template_kwargs"]}
    adapter, base = config.model.adapter, find_base(config.model.base)
    if adapter is not None:
        made["adapter"] = fingerprint(Path(adapter))[:DIGITS] if Path(adapter).is_dir() else adapter
    if config.generate.engine == "endpoint":
        extra: dict[str, Any] = {"extra_body": config.generate.extra_body} if config.generate.extra_body else {}
        extra |= {"system_role": None} if config.generate.system_role is None else {}
        return made | {"url": config.generate.url, "model": config.model.name} | extra
    made |= {} if config.generate.bf16 is None else {"bf16": config.generate.bf16}
    return made | {"base": config.model.base if base is None else fingerprint(base)[:DIGITS]}
