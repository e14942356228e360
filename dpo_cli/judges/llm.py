"""A language model as judge: candidates side by side in one message, in cyclic orders, one JSON reply an order.

Talks to any OpenAI-compatible endpoint; paid replies go to `judge.replies.jsonl` first, so that a kill costs only what
was in flight. An order whose reply is no valid verdict is asked again, and never scored without one. Of a panel every
model must answer, at the same endpoint.
"""

import asyncio
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial, reduce
from operator import add
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from dpo_cli.config.settings import Config, JudgeSection
from dpo_cli.data.records import Judgment, Order, Usage, content_id
from dpo_cli.endpoint.batch import Batches, PendingRequest, waiting
from dpo_cli.endpoint.client import Endpoint
from dpo_cli.endpoint.costs import Estimate, Receipt
from dpo_cli.endpoint.costs import estimate as price_estimate
from dpo_cli.endpoint.dialect import Dialect
from dpo_cli.endpoint.http import Rejected
from dpo_cli.endpoint.prices import Price, Tier, price_of
from dpo_cli.endpoint.responses import PASSING, Choice, Reply
from dpo_cli.errors import UserError
from dpo_cli.judges import _panel
from dpo_cli.judges._batch import answer
from dpo_cli.judges._deprecations import ending_warning
from dpo_cli.judges._forms import GRADE, RANKING, RATING, Form, verdict_schema
from dpo_cli.judges._orders import OrderVerdict, cyclic_orders, hear, is_enough
from dpo_cli.judges._prompt import read_rubric, write_message
from dpo_cli.judges._ranking import label_of
from dpo_cli.judges._task import Task
from dpo_cli.judges._verdict import read_verdict
from dpo_cli.progress import Progress

LEDGER = "judge.replies.jsonl"
BATCHES = "judge.batches.jsonl"
KEY_VARIABLE = "OPENAI_API_KEY"
REPORT_SECONDS = 0.5
REPLY_TOKENS, SENTENCE_TOKENS = 120, 60  # of a usual reply, reasoning included: altogether, and for a candidate
FLEX_SECONDS = 900.0  # OpenAI's advice: flex answers when there is room

# What can be asked of a completion by itself: a score from 1 to 10, or 1 for right and 0 for wrong.
FORMS = {"rate": RATING, "grade": GRADE}

_POLICY = ("content_filter", "content_policy_violation", "invalid_prompt")


def identity(config: Config) -> dict[str, Any]:
    """Model or models, rubric (as a hash), orders, seed and, where it is sent, reasoning effort."""
    settings = config.judge
    models = settings.models
    if not models:
        raise UserError("no judge model", where="judge.model", hint="--model NAME")
    model = models[0] if len(models) == 1 else models
    who: dict[str, Any] = {"judge": "llm", "model": model, "rubric": content_id(read_rubric(settings.rubric))}
    who |= {"orders": settings.orders, "seed": settings.seed}
    return who | ({"reasoning_effort": settings.reasoning_effort} if _is_openai(settings.url) else {})


def calls(tasks: Sequence[Task], config: Config) -> int:
    """One call an order and model."""
    settings = config.judge
    return sum(len(settings.models) * len(cyclic_orders(task, settings.orders, settings.seed)) for task in tasks)


def estimate(tasks: Sequence[Task], config: Config, form: Form = RANKING) -> Estimate:
    """What the tasks would cost if each order is asked once; replies that are in the ledger are counted as well."""
    settings = config.judge
    rubric = read_rubric(settings.rubric)
    tier = "batch" if settings.batch else _live_tier(config)
    cap, found = settings.max_tokens, []
    for model in settings.models:
        owed = size = typical = 0
        for task in tasks:
            for order in cyclic_orders(task, settings.orders, settings.seed):
                message, candidates = compose(task, order, rubric, settings.seed, form)
                body = request(model, message, list(candidates), cap, settings, form)
                size += len(msgspec.json.encode(body))
                typical += min(cap, REPLY_TOKENS + SENTENCE_TOKENS * len(candidates))
                owed += 1
        assumed = f"a reply is {REPLY_TOKENS} tokens and {SENTENCE_TOKENS} a candidate"
        if settings.orders == "auto":
            assumed += ", and every third order is asked"
        price = _price(config, tier)(model)
        one = price_estimate(owed, size, typical, owed * cap, price, given=settings.price is not None, typical=assumed)
        if warning := _ending(model):
            one.assumptions.append(warning)
        found.append(one)
    return reduce(add, found)


def _ending(model: str) -> str | None:
    """A warning if the end of a model is announced, as of today."""
    return ending_warning(model, datetime.now(UTC).date())


def settle(tasks: Iterable[Task], judgments: Mapping[str, Judgment], config: Config) -> list[Judgment]:
    """A panel's judgments that change once its models are weighed; one model's never do."""
    return _panel.settle(list(tasks), judgments) if len(config.judge.models) > 1 else []


def judge(
    tasks: Sequence[Task], config: Config, deliver: Callable[[Judgment], None], progress: Progress, form: Form = RANKING
) -> Receipt:
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
    for model in settings.models:
        if warning := _ending(model):
            progress.log(warning)
    return asyncio.run(_judge(tasks, config, deliver, progress, form))


async def _judge(
    tasks: Sequence[Task], config: Config, deliver: Callable[[Judgment], None], progress: Progress, form: Form
) -> Receipt:
    settings = config.judge
    async with Endpoint(
        settings.url,
        api_key_variable=KEY_VARIABLE,
        ledger=Path(config.data) / LEDGER,
        concurrency=settings.concurrency,
        timeout=max(settings.timeout, FLEX_SECONDS if settings.flex else 0),
        price=_price(config, _live_tier(config)),
        max_usd=settings.max_usd,
        log=progress.log,
    ) as endpoint:
        court = LlmJudge(endpoint, config, progress.log, form)
        done = failed = 0

        async def handle(task: Task) -> None:
            nonlocal done, failed
            judgment = await court.judgment(task)
            deliver(judgment)
            done, failed = done + 1, failed + (judgment.error is not None)

        def tell() -> None:
            spend = endpoint.spend
            progress.update(
                done,
                tokens=spend.usage.input + spend.usage.output,
                in_flight=endpoint.in_flight + spend.waiting,
                retries=spend.retries,
                failed=failed,
                usd=spend.usd,
            )

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
                for dialect in court.dialects.values():
                    dialect.send = batches.chat
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
                await endpoint.each(tasks, handle)
        finally:
            reporter.cancel()
            tell()
        return endpoint.spend


def _price(config: Config, tier: Tier | None) -> Callable[[str], Price | None]:
    """What a model's calls cost on a tier."""
    return partial(price_of, config.judge.url, override=config.judge.price, tier=tier)


def _live_tier(config: Config) -> Tier | None:
    return "flex" if config.judge.flex else None


class LlmJudge:
    """One endpoint, and what has been learnt about it, for many tasks."""

    def __init__(self, endpoint: Endpoint, config: Config, log: Callable[[str], None], form: Form) -> None:
        self.endpoint = endpoint
        self.form = form
        self.settings = config.judge
        self.rubric = read_rubric(config.judge.rubric)
        self.log = log
        self.dialects = {model: Dialect(endpoint, model, log) for model in self.settings.models}

    async def judgment(self, task: Task) -> Judgment:
        """The judgment of one task: scored, skipped where the judge refuses, or an error where it can't be had."""
        paid: list[Reply] = []
        heard: list[OrderVerdict] = []
        judgment = Judgment(id=task.id, completions_id=task.completions_id)
        try:
            for model in self.settings.models:
                mine: list[OrderVerdict] = []
                for asked, order in enumerate(self._orders(task)):
                    if is_enough(task, self.settings.orders, asked, mine):
                        break
                    mine.append(await self._hear(task, order, model, paid))
                heard += mine
        except _Refused as refusal:
            judgment.skipped = f"the judge refused: {refusal}"
        except (_Invalid, Rejected) as error:
            judgment.error = str(error)
            judgment.failures = task.failures + 1
        else:
            judgment = _panel.decide(task, heard)
        judgment.usage = sum((reply.usage for reply in paid), Usage())
        judgment.usd = sum(reply.usd for reply in paid)
        return judgment

    async def owed(self, task: Task) -> list[PendingRequest]:
        """What a task would ask next, an order each, where `chat` sends nothing itself."""
        found = []
        for model in self.settings.models:
            mine: list[OrderVerdict] = []
            for asked, order in enumerate(self._orders(task)):
                if is_enough(task, self.settings.orders, asked, mine):
                    break
                try:
                    mine.append(await self._hear(task, order, model, []))
                except PendingRequest as request:
                    found.append(request)
                except (_Refused, _Invalid, Rejected):
                    return found  # whatever the others say
        return found

    def _orders(self, task: Task) -> list[list[int]]:
        return cyclic_orders(task, self.settings.orders, self.settings.seed)

    async def _hear(self, task: Task, order: list[int], model: str, paid: list[Reply]) -> OrderVerdict:
        """A model's verdict on one order.

        What was asked before is in the ledger and free, so each run may ask twice more than the failed ones before it.

        Raises:
            _Refused: the judge declines.
            _Invalid: no reply was a verdict.
            Rejected: the endpoint declines or does not answer.
        """
        message, candidates = compose(task, order, self.rubric, self.settings.seed, self.form)
        shown = [*candidates.values(), *(part["content"] for part in task.prompt)]
        cap, replicate = self.settings.max_tokens, 0
        while True:
            choice = await self._ask(model, message, list(candidates), cap, replicate, paid)
            if choice.refusal or choice.finish_reason == "content_filter":
                raise _Refused(choice.refusal or "content filter")
            try:
                if lacks := choice.lacks():
                    raise ValueError(lacks)
                verdict = read_verdict(choice.text, list(candidates), shown, self.form)
            except ValueError as error:
                cut = choice.finish_reason == "length"
                if cut and cap == self.settings.max_tokens:
                    cap *= 2
                elif replicate <= 2 * task.failures and (lacks is None or (lacks in PASSING and replicate == 0)):
                    replicate += 1
                else:
                    raise _Invalid(f"no valid verdict: {'cut off by length' if cut and not lacks else error}") from None
            else:
                name = model if len(self.settings.models) > 1 else None
                return hear(Order(order, verdict.scores, choice.text, name), verdict)

    async def _ask(
        self, model: str, message: str, labels: list[str], cap: int, replicate: int, paid: list[Reply]
    ) -> Choice:
        body = request(model, message, labels, cap, self.settings, self.form)
        try:
            reply = await self.dialects[model].chat(body, replicate)
        except Rejected as rejected:
            if rejected.code in _POLICY:
                raise _Refused(rejected.message) from rejected
            if "service_tier" in body and re.search(r"service_tier|flex", rejected.param or rejected.message):
                what = f"no flex tier there ({rejected.message})"
                raise UserError(what, where=self.endpoint.url, hint="without --flex") from None
            raise
        paid.append(reply)
        return reply.choices[0]


def compose(task: Task, order: list[int], rubric: str, seed: int, form: Form) -> tuple[str, dict[str, str]]:
    """The message that shows a task in one order, and label -> text of what it shows."""
    candidates = {label_of(place): task.completions[index] for place, index in enumerate(order)}
    return write_message(form.rubric or rubric, task.prompt, candidates, seed, form), candidates


def request(
    model: str,
    message: str,
    labels: list[str],
    cap: int,
    settings: JudgeSection,
    form: Form = RANKING,
) -> dict[str, Any]:
    """The request body; beyond OpenAI only what every endpoint knows: model, messages, format and output cap."""
    body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": message}]}
    openai = _is_openai(settings.url)
    body["max_completion_tokens" if openai else "max_tokens"] = cap
    body["response_format"] = verdict_schema(labels, True, form)
    if settings.flex:
        body["service_tier"] = "flex"
    if openai:
        extra: dict[str, Any] = {"reasoning_effort": settings.reasoning_effort}
        if re.match(r"gpt-(5\.([6-9]|\d\d)|[6-9]|\d\d)", model):
            # Each message is sent once: writing it to the cache would cost a quarter more and never pay.
            extra["prompt_cache_options"] = {"mode": "explicit"}
        body |= {name: value for name, value in extra.items() if value is not None}
    return body


def _is_openai(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    return host == "api.openai.com" or host.endswith((".api.openai.com", ".openai.azure.com"))


class _Refused(Exception):
    """The judge declines to judge this."""


class _Invalid(Exception):
    """The judge's replies are no verdicts."""
