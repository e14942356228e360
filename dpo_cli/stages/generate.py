"""Prompts to completions: sample the SFT adapter until every prompt has `n`.

Reads prompts (the rows of any file that `data.reader` opens, or of val.jsonl in a folder) and
what completions.jsonl in `data` holds already; appends to it a line for each prompt that is finished, in the order in
which they finish. The last line of an id wins, and a clean finish drops the lines before it. Rows that were made with
another model or other sampling settings are never mixed with new ones.

With `contrast`, two completions a prompt come from two system prompts; they are completions like any others, of which
a judge says which is better.
"""

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Raw, Struct
from msgspec.structs import replace

from dpo_cli import engines
from dpo_cli.config.resolve import get
from dpo_cli.config.settings import Config
from dpo_cli.data.bulk import paused_collection
from dpo_cli.data.formats.prompts import PromptFile
from dpo_cli.data.jsonl import read_rows
from dpo_cli.data.reader import has_files
from dpo_cli.data.records import Completions, Usage, message_key, prompt_id
from dpo_cli.data.resumable import Delivery, Resumable
from dpo_cli.data.same_settings import refuse_other_settings
from dpo_cli.endpoint.costs import Estimate, Receipt
from dpo_cli.engines import Sample, _engine
from dpo_cli.engines._contrast import contrasted, split
from dpo_cli.engines._engine import Request, Sampled
from dpo_cli.errors import UserError
from dpo_cli.progress import Progress

SHOWN_ERRORS = 3
NOTHING = Raw(b"")


class Generated(Struct, kw_only=True):
    """What a run did.

    `prompts` are distinct ones, `merged` the duplicates among them. `owed_prompts` and `owed_completions` are what was
    missing at the start: a request a prompt, more where the server refuses `n`. `completions` and what follows are
    this run's own: `identical` ones came twice for one prompt although they were sampled anew, `cut` ones ran into
    max_tokens; `failed` counts prompts, and `error` is the first one's. `missing` counts, by the reason, the replies
    that are no completions. `receipt` is of paid calls, where there were any; `estimate`, with `dry_run`, of those that
    are owed. `left_out` are lines on what was not read.
    """

    path: str
    dry_run: bool
    prompts: int = 0
    merged: int = 0
    done_before: int = 0
    owed_prompts: int = 0
    owed_completions: int = 0
    completions: int = 0
    identical: int = 0
    cut: int = 0
    failed: int = 0
    error: str | None = None
    missing: dict[str, int] = msgspec.field(default_factory=dict)
    usage: Usage = msgspec.field(default_factory=Usage)
    receipt: Receipt | None = None
    estimate: Estimate | None = None
    left_out: list[str] = []


def run(config: Config, progress: Progress, limit: int | None = None, dry_run: bool = False) -> Generated:
    """Sample what is missing; prompts that fail are counted, and owed again by the next run.

    Args:
        config: `data`, `[model]` and `[generate]` are read.
        progress: told about prompts, completions and tokens.
        limit: only the first so many prompts.
        dry_run: count what is owed, and do nothing.

    Raises:
        UserError: bad prompts, nothing to sample from, rows made with other settings, or what the engine raises.
    """
    config = _contrast(config)
    settings = config.generate
    if settings.temperature == 0 and settings.n > 1 and not settings.contrast:
        raise UserError(f"temperature 0 gives {settings.n} times the same", hint="--n 1, or --temperature 0.9")
    keep = _line_filter(settings.keep_lines)
    engine = _engine.choose(config, progress)
    path = Path(config.data) / "completions.jsonl"
    result = Generated(path=str(path), dry_run=dry_run)
    with Resumable(path, _Made, _same_settings(config, engine, path), dry_run=dry_run) as rows:
        owed = _find_owed(rows, config, limit, result)
        if dry_run and engine == "endpoint":
            result.estimate = _estimate(owed, config)
        elif dry_run:
            deque(owed, maxlen=0)  # they are counted
        elif requests := list(owed):
            opened = _open_rows(config, engine, requests, rows)
            with rows.reporting(progress, "generate", result.prompts, len(requests)) as delivery:
                sample = engines.load(engine)
                if settings.contrast:
                    sample = contrasted(sample, settings.good_system, settings.bad_system)
                _Work(opened, keep, rows, delivery, result).finish(sample, requests, config)
    return result


def read_prompts(config: Config) -> PromptFile:
    """Every prompt of `generate.prompts`, a file or a folder that holds val.jsonl, duplicates included.

    Raises:
        UserError: no such file; while it is read, no prompts in it, or a line that holds none.
    """
    path = Path(config.generate.prompts)
    file = path / "val.jsonl" if (path / "val.jsonl").exists() else path
    if not file.exists() or (file.is_dir() and not has_files(file)):
        where = path / "val.jsonl" if path.is_dir() else path
        raise UserError("no prompts there", where=str(where), hint="--prompts FILE, or a folder that holds val.jsonl")
    return PromptFile(file, config.generate.columns, config.generate.skip_bad)


def _contrast(config: Config) -> Config:
    """With `contrast`, two completions a prompt, and the external model where there is one."""
    settings = config.generate
    if not settings.contrast:
        return config
    name = settings.contrast_model or config.model.name
    if settings.contrast_url is None:
        generate = replace(settings, n=2)
    else:
        generate = replace(settings, n=2, engine="endpoint", url=settings.contrast_url)
    return replace(config, generate=generate, model=replace(config.model, name=name))


def made_with(config: Config, engine: str) -> dict[str, Any]:
    """The settings, by name, that make completions comparable: one file holds rows of one kind."""
    keys = [f"generate.{name}" for name in ("temperature", "top_p", "max_tokens", "frequency_penalty", "seed")]
    keys += ["generate.keep_lines", "model.chat_template_kwargs"]
    if engine != "endpoint":
        keys += ["model.base", "model.adapter"]
    contrast = {"good": config.generate.good_system, "bad": config.generate.bad_system}
    made: dict[str, Any] = {"contrast": contrast} if config.generate.contrast else {}
    if config.generate.extra_body and engine == "endpoint":
        made["extra_body"] = config.generate.extra_body
    if config.generate.system_role is None and engine == "endpoint":
        made["system_role"] = None
    if config.generate.bf16 is not None and engine != "endpoint":
        made["bf16"] = config.generate.bf16
    return {"engine": engine, **made, **{key.partition(".")[2]: get(config, key) for key in keys}}


def _estimate(requests: Iterable[Request], config: Config) -> Estimate:
    """What the owed completions would cost, in one request a prompt, or one a system prompt; keeps no request."""
    settings = config.generate
    if settings.contrast:
        requests = (part for one in requests for part in split(one, settings.good_system, settings.bad_system))
    return _engine.estimate(requests, config)


class _Made(Struct, gc=False):
    """What a row says without its texts: a hundred thousand are read in the blink of an eye."""

    id: str
    completions: list[Raw]
    model: Raw
    sampling: Raw


def _find_owed(rows: Resumable[_Made], config: Config, limit: int | None, result: Generated) -> Iterator[Request]:
    """Yield what is missing, in the order of the prompts; counts it in `result`."""
    n = config.generate.n
    seen: set[int] = set()  # hashes of the ids; of prompts no more is kept
    file = read_prompts(config)
    with paused_collection():
        for prompt in file:
            key = prompt_id(*prompt)
            if hash(key) in seen:
                result.merged += 1
                continue
            if len(seen) == limit:
                break
            seen.add(hash(key))
            made = rows.known.get(key)
            need = n - (len(made.completions) if made else 0)
            if need > 0:
                result.owed_prompts += 1
                result.owed_completions += need
                yield Request(id=key, prompt=prompt.messages, have=[], need=need, tools=prompt.tools)
    if not seen and not file.bad.rows:
        raise UserError("the file is empty", where=str(file.path), hint="one prompt a line")
    result.left_out = file.notes(None if result.dry_run else Path(result.path).parent)
    result.prompts = len(seen)
    result.done_before = len(seen) - result.owed_prompts


@cache
def _nothing(count: int) -> list[Raw]:
    return [NOTHING] * count


def _same_settings(config: Config, engine: str, path: Path) -> Callable[[int, _Made], None]:
    """A check of each row that refuses those made with other settings."""
    now = {"model": config.model.name, **made_with(config, engine)}
    checked: set[tuple[bytes, bytes]] = set()

    def check(number: int, row: _Made) -> None:
        kind = (bytes(row.model), bytes(row.sampling))
        # Each part keeps the whole line: of the completions only their number is needed again.
        row.model = row.sampling = NOTHING
        row.completions = _nothing(len(row.completions))
        if kind in checked:
            return
        checked.add(kind)
        try:
            sampling = msgspec.json.decode(kind[1], type=dict[str, Any])
        except msgspec.ValidationError:
            raise UserError('"sampling" is not an object', where=f"{path}:{number}") from None
        refused = {name: now.get(name) for name in sampling.pop("refused", ())}  # whatever was meant, it was not sent
        refuse_other_settings(
            "made",
            {"model": msgspec.json.decode(kind[0]), **sampling, **refused},
            now,
            where=f"{path}:{number}",
            hint="--data FOLDER for a set of its own, or go on with the old settings",
        )

    return check


class _Open(Struct):
    """A row that is being made; its first `had` completions are from former runs, and stay."""

    row: Completions
    had: int

    def twins(self) -> list[int]:
        """Places of new completions that are identical to one before them."""
        if len(self.row.completions) < 2:
            return []
        keys = [message_key(answer) for answer in self.row.answers]
        return [place for place in range(self.had, len(keys)) if keys[place] in keys[:place]]

    def put(self, places: Iterable[int], sampled: Sampled, keep: Callable[[str], str]) -> None:
        """Put what was sampled at these places: the next ones, or those of twins. `keep` filters the texts."""
        row = self.row
        row.usage += sampled.usage
        row.sampling = sampled.as_sent(row.sampling)
        row.completions, row.finish_reasons = [*row.completions], [*row.finish_reasons]  # a request has them as well
        new = sampled.messages or [None] * len(sampled.texts)
        if any(new) and not row.messages:
            row.messages = [None] * len(row.completions)
        whole = bool(row.messages) or any(new)
        for place, text, reason, message in zip(places, sampled.texts, sampled.finish_reasons, new, strict=False):
            row.completions[place : place + 1] = [keep(text)]
            row.finish_reasons[place : place + 1] = [reason]
            if whole:
                row.messages[place : place + 1] = [message and {**message, "content": keep(message["content"])}]


def _open_rows(config: Config, engine: str, requests: list[Request], known: Resumable[_Made]) -> dict[str, _Open]:
    """A row for every request, with the completions that former runs made; tells the requests of those."""
    sampling = made_with(config, engine)
    rows = {
        request.id: _Open(
            Completions(
                id=request.id,
                prompt=request.prompt,
                completions=[],
                finish_reasons=[],
                model=config.model.name,
                sampling=sampling,
                tools=request.tools,
            ),
            had=0,
        )
        for request in requests
    }
    if not rows.keys().isdisjoint(known.known):
        for _, row in read_rows(known.path, Completions):
            if row.id in rows:
                rows[row.id] = _Open(row, had=len(row.completions))
    for request in requests:
        request.have = rows[request.id].row.completions
    return rows


def _line_filter(pattern: str | None) -> Callable[[str], str]:
    """Keep the lines of a text that match; without a pattern, the text as it is."""
    if pattern is None:
        return lambda text: text
    try:
        match = re.compile(pattern).search
    except re.error as error:
        raise UserError(f"'{pattern}' is no pattern: {error}", where="generate.keep_lines") from None
    return lambda text: "\n".join(filter(match, text.split("\n")))


class _Work:
    """Takes what the engine delivers and writes finished rows.

    A prompt with identical completions is not written before those were sampled once more: a run that is killed in
    between then ends in the same rows.
    """

    def __init__(
        self,
        opened: dict[str, _Open],
        keep: Callable[[str], str],
        rows: Resumable[_Made],
        delivery: Delivery,
        result: Generated,
    ) -> None:
        self._open = opened
        self._keep = keep
        self._rows = rows
        self._delivery = delivery
        self._result = result
        self._errors: set[str] = set()

    def finish(self, sample: Sample, requests: list[Request], config: Config) -> None:
        """Sample what is owed, then once more what came out identical."""
        receipt = sample(requests, config, self._deliver, self._delivery)
        self._delivery.next_part()
        again = [
            Request(id=key, prompt=made.row.prompt, have=made.row.completions, need=len(twins), tools=made.row.tools)
            for key, made in self._open.items()
            if (twins := made.twins())
        ]
        if again:
            more = sample(again, _less(config, receipt), self._deliver_again, self._delivery)
            receipt = receipt + more if receipt and more else receipt
        self._result.receipt = receipt

    def _deliver(self, sampled: Sampled) -> None:
        made = self._open[sampled.id]
        if self._count(sampled):
            start = len(made.row.completions)
            made.put(range(start, start + len(sampled.texts)), sampled, self._keep)
            if not made.twins():
                self._write(made)
        self._tell()

    def _deliver_again(self, sampled: Sampled) -> None:
        made = self._open[sampled.id]
        if self._count(sampled):
            made.put(made.twins(), sampled, self._keep)
            self._result.identical += len(made.twins())
            self._write(made)
        self._tell()

    def _count(self, sampled: Sampled) -> bool:
        """Count what came; whether there is anything to keep."""
        result = self._result
        result.usage += sampled.usage
        for kind, count in sampled.missing.items():
            result.missing[kind] = result.missing.get(kind, 0) + count
        if sampled.error is not None:
            result.failed += 1
            result.error = result.error or sampled.error
            if sampled.error not in self._errors and len(self._errors) < SHOWN_ERRORS:
                self._errors.add(sampled.error)
                self._delivery.log(f"prompt {sampled.id}: {sampled.error}")
        return sampled.error is None or bool(sampled.missing and sampled.texts)

    def _write(self, made: _Open) -> None:
        self._rows.deliver(made.row)
        del self._open[made.row.id]
        new = made.row.finish_reasons[made.had :]
        self._result.completions += len(new)
        self._result.cut += new.count("length")

    def _tell(self) -> None:
        result = self._result
        failed = {"failed": result.failed} if result.failed else {}
        self._delivery.note(completions=result.completions, tokens=result.usage.output, **failed)


def _less(config: Config, receipt: Receipt | None) -> Config:
    """The settings with what is left of the budget."""
    cap = config.generate.max_usd
    if cap is None or receipt is None:
        return config
    left = max(0.0, cap - receipt.usd - receipt.unseen_usd)
    return replace(config, generate=replace(config.generate, max_usd=left))
