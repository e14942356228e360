"""A language model as judge: candidates side by side in one message, in cyclic orders, one JSON reply an order.

Talks to any OpenAI-compatible endpoint; paid replies go to `judge.replies.jsonl` first, so that a kill costs only what
was in flight. An order whose reply is no valid verdict is asked again, and never scored without one. Panels of several
models are not covered.

Permuted orders: arXiv:2406.07791, 2603.20562. The mean of the scores: arXiv:2503.03064.
"""

import asyncio
import re
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

from dpo_cli.config import Config, JudgeSection
from dpo_cli.endpoint import Choice, Endpoint, Estimate, Price, Receipt, Rejected, Reply, Tier, price_of
from dpo_cli.endpoint import estimate as price_estimate
from dpo_cli.endpoint.batch import Batches, Owed, waiting
from dpo_cli.errors import UserError
from dpo_cli.judges import Task, conclude, label_of
from dpo_cli.judges._batch import answer
from dpo_cli.judges._wire import Verdict, read_verdict, verdict_schema, write_message
from dpo_cli.progress import Progress
from dpo_cli.schema import Judgment, Order, Usage, content_id

LEDGER = "judge.replies.jsonl"
BATCHES = "judge.batches.jsonl"
KEY_VARIABLE = "OPENAI_API_KEY"
REPORT_SECONDS = 0.5
REPLY_TOKENS, SENTENCE_TOKENS = 120, 60  # of a usual reply, reasoning included: altogether, and for a candidate
FLEX_SECONDS = 900.0  # OpenAI's advice: flex answers when there is room

# The form in which a reply is asked for; an endpoint that refuses one is asked for the next.
FORMATS = ("json_schema, strict", "json_schema", "json_object", "plain text")

# How an endpoint's complaint names each field of the request that it may do without.
_FIELDS = {
    "response_format": re.compile(r"response_format|json_schema|json_object|structured.?output|guided|grammar", re.I),
    "max_completion_tokens": re.compile(r"\bmax_completion_tokens\b"),
    "max_tokens": re.compile(r"\bmax_tokens\b"),
    "reasoning_effort": re.compile(r"\breasoning_effort\b|\breasoning\.effort\b"),
    "service_tier": re.compile(r"\bservice_tier\b|\bflex\b"),
    "prompt_cache_options": re.compile(r"\bprompt_cache_options\b"),
}
_TOO_LONG = re.compile(r"context.?length|maximum context|too (large|long)", re.I)  # this request, not its fields
_POLICY = ("content_filter", "content_policy_violation", "invalid_prompt")

# Shutdowns that OpenAI has announced (model list of its SDK, 3.52).
ENDINGS = {
    "2026-07-23": ("gpt-5-chat-latest", "gpt-5.1-chat-latest", "gpt-5.1-codex"),
    "2026-08-10": ("gpt-5.2-chat-latest", "gpt-5.3-chat-latest"),
    "2026-12-11": ("gpt-5", "gpt-5-mini", "gpt-5-nano", "gpt-5-2025-08-07", "gpt-5-mini-2025-08-07",
                   "gpt-5-nano-2025-08-07"),
    "2027-01-14": ("gpt-4.1", "gpt-4.1-mini", "gpt-4.1-2025-04-14", "gpt-4.1-mini-2025-04-14", "gpt-4o",
                   "gpt-4o-2024-11-20", "gpt-4o-2024-08-06", "gpt-4o-mini", "gpt-4o-mini-2024-07-18"),
    "2027-04-01": ("gpt-5.1", "gpt-5.1-2025-11-13", "gpt-5.4-nano", "gpt-5.4-nano-2026-03-17"),
}  # fmt: skip


def identity(config: Config) -> dict[str, Any]:
    """Model, rubric (as a hash), orders, seed and, where it is sent, reasoning effort."""
    settings = config.judge
    who: dict[str, Any] = {"judge": "llm", "model": settings.model, "rubric": content_id(read_rubric(settings.rubric))}
    who |= {"orders": settings.orders, "seed": settings.seed}
    return who | ({"reasoning_effort": settings.reasoning_effort} if _is_openai(settings.url) else {})


def calls(tasks: Sequence[Task], config: Config) -> int:
    """One call an order."""
    return sum(min(config.judge.orders, len(task.shown)) for task in tasks)


def estimate(tasks: Sequence[Task], config: Config) -> Estimate:
    """What the tasks would cost if each order is asked once; replies that are in the ledger are counted as well."""
    settings = config.judge
    rubric = read_rubric(settings.rubric)
    tier = "batch" if settings.batch else _live_tier(config)
    cap, price = settings.max_tokens, _price(config, tier)(settings.model)
    owed = size = typical = 0
    for task in tasks:
        for order in cyclic_orders(task, settings.orders, settings.seed):
            message, candidates = compose(task, order, rubric, settings.seed)
            size += len(msgspec.json.encode(request(message, list(candidates), cap, settings, Dialect())))
            typical += min(cap, REPLY_TOKENS + SENTENCE_TOKENS * len(candidates))
            owed += 1
    return price_estimate(
        owed, size, typical, owed * cap, price, given=settings.price is not None,
        typical=f"a reply is {REPLY_TOKENS} tokens and {SENTENCE_TOKENS} a candidate",
    )  # fmt: skip


def judge(tasks: Sequence[Task], config: Config, deliver: Callable[[Judgment], None], progress: Progress) -> Receipt:
    """Judge every task over the network.

    Raises:
        UserError: the endpoint, the model, the key, the price, the budget or the rubric does not allow it.
    """
    settings = config.judge
    if settings.batch and settings.flex:
        raise UserError("--batch and --flex are two tiers", hint="one of them")
    if not settings.batch and (open_ := waiting(Path(config.data) / BATCHES)):
        twice = f"{open_:,} requests wait in batches, and would be paid twice"
        raise UserError(twice, where=str(Path(config.data) / BATCHES), hint="nothing-dpo judge --batch")
    warning = ending_warning(settings.model, datetime.now(UTC).date())
    if warning:
        progress.log(warning)
    return asyncio.run(_judge(tasks, config, deliver, progress))


async def _judge(
    tasks: Sequence[Task], config: Config, deliver: Callable[[Judgment], None], progress: Progress
) -> Receipt:
    settings = config.judge
    async with Endpoint(
        settings.url, api_key_variable=KEY_VARIABLE, ledger=Path(config.data) / LEDGER,
        concurrency=settings.concurrency, timeout=max(settings.timeout, FLEX_SECONDS if settings.flex else 0),
        price=_price(config, _live_tier(config)), max_usd=settings.max_usd, log=progress.log,
    ) as endpoint:  # fmt: skip
        court = Court(endpoint, config, progress.log)
        done = failed = 0

        async def handle(task: Task) -> None:
            nonlocal done, failed
            judgment = await court.judgment(task)
            deliver(judgment)
            done, failed = done + 1, failed + (judgment.error is not None)

        def tell() -> None:
            spend = endpoint.spend
            progress.update(
                done, tokens=spend.usage.input + spend.usage.output, in_flight=endpoint.in_flight + spend.waiting,
                retries=spend.retries, failed=failed, usd=spend.usd,
            )  # fmt: skip

        async def report() -> None:
            while True:
                tell()
                await asyncio.sleep(REPORT_SECONDS)

        async def in_batches() -> None:
            price, queue = _price(config, "batch"), settings.batch_queue_tokens
            with Batches(endpoint, Path(config.data) / BATCHES, price, queue, progress.log) as batches:
                if not await batches.collect([], settings.wait):
                    return  # what former runs have sent is paid, and comes first
                await first()
                court.chat = batches.chat
                for task in await answer(tasks[1:], court.owed, batches, settings.wait):
                    await handle(task)

        async def first() -> None:
            """One task alone and live: it finds out what the endpoint takes."""
            for task in tasks[:1]:
                await handle(task)

        reporter = asyncio.create_task(report())
        try:
            if settings.batch:
                await in_batches()
            else:
                await first()
                await endpoint.each(tasks[1:], handle)
        finally:
            reporter.cancel()
            tell()
        return endpoint.spend


def _price(config: Config, tier: Tier | None) -> Callable[[str], Price | None]:
    """What a model's calls cost on a tier."""
    return partial(price_of, config.judge.url, override=config.judge.price, tier=tier)


def _live_tier(config: Config) -> Tier | None:
    return "flex" if config.judge.flex else None


class Dialect(Struct, frozen=True):
    """What an endpoint takes, as far as is known: index into `FORMATS`, and fields that it refused."""

    format: int = 0
    dropped: frozenset[str] = frozenset()


class Court:
    """One endpoint, and what has been learnt about it, for many tasks."""

    def __init__(self, endpoint: Endpoint, config: Config, log: Callable[[str], None]) -> None:
        self.endpoint = endpoint
        self.chat = endpoint.chat
        self.settings = config.judge
        self.rubric = read_rubric(config.judge.rubric)
        self.log = log
        self.dialect = Dialect()

    async def judgment(self, task: Task) -> Judgment:
        """The judgment of one task: scored, skipped where the judge refuses, or an error where it can't be had."""
        paid: list[Reply] = []
        orders: list[Order] = []
        preferences: list[list[int]] = []
        judgment = Judgment(id=task.id, completions_id=task.completions_id)
        try:
            for order in cyclic_orders(task, self.settings.orders, self.settings.seed):
                verdict, raw = await self._hear(task, order, paid)
                orders.append(Order(order, {label: float(score) for label, score in verdict.scores.items()}, raw))
                preferences.append(preference(order, verdict))
        except _Refused as refusal:
            judgment.skipped = f"the judge refused: {refusal}"
        except (_Invalid, Rejected) as error:
            judgment.error = str(error)
            judgment.failures = task.failures + 1
        else:
            judgment = conclude(task, *aggregate(orders, preferences), orders)
        judgment.usage = sum((reply.usage for reply in paid), Usage())
        judgment.usd = sum(reply.usd for reply in paid)
        return judgment

    async def owed(self, task: Task) -> list[Owed]:
        """What a task would ask next, an order each, where `chat` sends nothing itself."""
        found = []
        for order in cyclic_orders(task, self.settings.orders, self.settings.seed):
            try:
                await self._hear(task, order, [])
            except Owed as request:
                found.append(request)
            except (_Refused, _Invalid, Rejected):
                break  # whatever the other orders say
        return found

    async def _hear(self, task: Task, order: list[int], paid: list[Reply]) -> tuple[Verdict, str]:
        """Verdict and raw reply for one order.

        What was asked before is in the ledger and free, so each run may ask twice more than the failed ones before it.

        Raises:
            _Refused: the judge declines.
            _Invalid: no reply was a verdict.
            Rejected: the endpoint declines or does not answer.
        """
        message, candidates = compose(task, order, self.rubric, self.settings.seed)
        shown = [*candidates.values(), *(part["content"] for part in task.prompt)]
        cap, replicate = self.settings.max_tokens, 0
        while True:
            choice = await self._ask(message, list(candidates), cap, replicate, paid)
            if choice.refusal or choice.finish_reason == "content_filter":
                raise _Refused(choice.refusal or "content filter")
            try:
                return read_verdict(choice.text, list(candidates), shown), choice.text
            except ValueError as error:
                cut = choice.finish_reason == "length"
                if cut and cap == self.settings.max_tokens:
                    cap *= 2
                elif replicate <= 2 * task.failures:
                    replicate += 1
                else:
                    raise _Invalid(f"no valid verdict: {'cut off by length' if cut else error}") from None

    async def _ask(self, message: str, labels: list[str], cap: int, replicate: int, paid: list[Reply]) -> Choice:
        while True:
            dialect = self.dialect
            body = request(message, labels, cap, self.settings, dialect)
            try:
                reply = await self.chat(body, replicate)
            except Rejected as rejected:
                if rejected.status == 404:
                    raise await self._no_model(rejected) from None
                self._learn(dialect, body, rejected)
                continue
            paid.append(reply)
            return reply.choices[0]

    def _learn(self, dialect: Dialect, body: dict[str, Any], rejected: Rejected) -> None:
        """Change the dialect as the rejection says, or raise what it means."""
        if self.dialect != dialect:
            return  # another task has learnt it meanwhile
        if rejected.code in _POLICY:
            raise _Refused(rejected.message) from rejected
        field = refused_field(body, rejected)
        if field is None:
            raise rejected
        if field == "service_tier":
            raise UserError(f"no flex tier there ({rejected.message})", where=self.endpoint.url, hint="without --flex")
        if field == "response_format":
            self.dialect = msgspec.structs.replace(dialect, format=dialect.format + 1)
            self.log(f"the judge's endpoint refuses {FORMATS[dialect.format]}; now {FORMATS[self.dialect.format]}")
        else:
            self.dialect = msgspec.structs.replace(dialect, dropped=dialect.dropped | {field})
            self.log(f"the judge's endpoint refuses {field}; now without it")

    async def _no_model(self, rejected: Rejected) -> UserError:
        names = ", ".join(await self.endpoint.models())
        hint = f"--model NAME; it serves: {names}" if names else "--model NAME"
        return UserError(
            f"no model '{self.settings.model}' there ({rejected.message})", where=self.endpoint.url, hint=hint
        )


def compose(task: Task, order: list[int], rubric: str, seed: int) -> tuple[str, dict[str, str]]:
    """The message that shows a task in one order, and label -> text of what it shows."""
    candidates = {label_of(place): task.completions[index] for place, index in enumerate(order)}
    return write_message(rubric, task.prompt, candidates, seed), candidates


def request(message: str, labels: list[str], cap: int, settings: JudgeSection, dialect: Dialect) -> dict[str, Any]:
    """The request body; beyond OpenAI only what every endpoint knows: model, messages, format and output cap."""
    body: dict[str, Any] = {"model": settings.model, "messages": [{"role": "user", "content": message}]}
    openai = _is_openai(settings.url)
    caps = ["max_completion_tokens", "max_tokens"] if openai else ["max_tokens", "max_completion_tokens"]
    body |= dict.fromkeys([name for name in caps if name not in dialect.dropped][:1], cap)
    if dialect.format <= 1:
        body["response_format"] = verdict_schema(labels, strict=dialect.format == 0)
    elif dialect.format == 2:
        body["response_format"] = {"type": "json_object"}
    if settings.flex:
        body["service_tier"] = "flex"
    if openai:
        extra: dict[str, Any] = {"reasoning_effort": settings.reasoning_effort}
        if re.match(r"gpt-(5\.([6-9]|\d\d)|[6-9]|\d\d)", settings.model):
            # Each message is sent once: writing it to the cache would cost a quarter more and never pay.
            extra["prompt_cache_options"] = {"mode": "explicit"}
        body |= {name: value for name, value in extra.items() if value is not None and name not in dialect.dropped}
    return body


def refused_field(body: dict[str, Any], rejected: Rejected) -> str | None:
    """The field of the request that a rejection complains of, if the request can do without it."""
    if rejected.status not in (400, 422) or _TOO_LONG.search(f"{rejected.code} {rejected.message}"):
        return None
    said = rejected.param or rejected.message
    named = ((match.start(), field) for field, words in _FIELDS.items() if (match := words.search(said)))
    return min(((place, field) for place, field in named if field in body), default=(0, None))[1]


def cyclic_orders(task: Task, count: int, seed: int) -> list[list[int]]:
    """Up to `count` orders of what is shown: a seeded random one and cyclic shifts of it, evenly spread."""
    base = sorted(task.shown, key=lambda index: content_id(seed, task.id, index))
    count = min(count, len(base))
    shifts = [turn * len(base) // count for turn in range(count)]
    return [base[shift:] + base[:shift] for shift in shifts]


def preference(order: list[int], verdict: Verdict) -> list[int]:
    """Completion indices, best first: by score, and by the judge's ranking only between equal scores.

    A ranking that contradicts its scores is so overruled; it stays in the record, as the judge wrote it.
    """
    index_of = {label_of(place): index for place, index in enumerate(order)}
    labels = sorted(verdict.ranking, key=lambda label: -verdict.scores[label])
    return [index_of[label] for label in labels]


def aggregate(orders: list[Order], preferences: list[list[int]]) -> tuple[dict[int, float], dict[int, float]]:
    """Mean score and Borda points (the number of candidates beaten, over all orders) of each completion."""
    total = dict.fromkeys(sorted(orders[0].order), 0.0)
    borda = dict(total)
    for order, best_first in zip(orders, preferences, strict=True):
        for place, index in enumerate(order.order):
            total[index] += order.scores[label_of(place)]
        for place, index in enumerate(best_first):
            borda[index] += len(best_first) - 1 - place
    return {index: score / len(orders) for index, score in total.items()}, borda


def read_rubric(path: str | None) -> str:
    """The criteria: the user's file, or the one that is shipped.

    Raises:
        UserError: the file can't be read or is empty.
    """
    file = Path(path) if path else Path(__file__).with_name("rubric.md")
    try:
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"can't read the rubric: {error}", where="judge.rubric") from None
    if not text.strip():
        raise UserError("the rubric is empty", where=str(file))
    return text


def ending_warning(model: str, today: date) -> str | None:
    """A warning if OpenAI has announced the end of a model."""
    for day, models in ENDINGS.items():
        if model in models:
            was = "was to shut down" if date.fromisoformat(day) <= today else "shuts down"
            return f"{model} {was} on {day}; the default judge model is {JudgeSection().model}"
    return None


def _is_openai(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    return host == "api.openai.com" or host.endswith((".api.openai.com", ".openai.azure.com"))


class _Refused(Exception):
    """The judge declines to judge this."""


class _Invalid(Exception):
    """The judge's replies are no verdicts."""
