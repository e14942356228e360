"""A language model as judge: candidates side by side in one message, one JSON reply a vote.

A vote is one order of the candidates; `judge.orders` or `judge.votes` says how many. A rubric with two `##` sections or
more is asked criterion by criterion, and a vote's scores are their weighted mean. Talks to any OpenAI-compatible
endpoint; paid replies go to `judge.replies.jsonl` first, so that a kill costs only what was in flight. What is no valid
verdict is asked again, and never scored. Of a panel every model must answer, at the same endpoint.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial, reduce
from itertools import product
from operator import add
from pathlib import Path
from typing import Any

import msgspec

from dpo_cli.config.settings import Config, JudgeSection
from dpo_cli.data.records import Judgment, content_id
from dpo_cli.endpoint.batch import Batches, waiting
from dpo_cli.endpoint.client import Endpoint
from dpo_cli.endpoint.costs import Estimate, Receipt
from dpo_cli.endpoint.costs import estimate as price_estimate
from dpo_cli.endpoint.prices import Price, Tier, cheaper_models, price_of
from dpo_cli.endpoint.shutdowns import shutdown_warning
from dpo_cli.errors import UserError
from dpo_cli.judges import _panel
from dpo_cli.judges._batch import answer
from dpo_cli.judges._forms import GRADE, RANKING, RATING, Form
from dpo_cli.judges._llm_judge import LlmJudge, criteria_for
from dpo_cli.judges._orders import count_votes
from dpo_cli.judges._prompt import material_bytes, write_message
from dpo_cli.judges._ranking import label_of
from dpo_cli.judges._request import is_openai, request
from dpo_cli.judges._rubric import Criterion, read_rubric
from dpo_cli.judges._task import Task
from dpo_cli.progress import Progress

LEDGER = "judge.replies.jsonl"
BATCHES = "judge.batches.jsonl"
KEY_VARIABLE = "OPENAI_API_KEY"
REPORT_SECONDS = 0.5
LISTING_SECONDS = 3.0  # to wait for a list of models, which is wanted for a warning only
UNLIMITED_REPLY = 8192  # tokens that a reply without a limit is thought to have at most
REPLY_TOKENS, SENTENCE_TOKENS = 120, 60  # of a usual reply, reasoning included: altogether, and for a candidate
FLEX_SECONDS = 900.0  # OpenAI's advice: flex answers when there is room

# What can be asked of a completion by itself: a score from 1 to 10, or 1 for right and 0 for wrong.
FORMS = {"rate": RATING, "grade": GRADE}


def identity(config: Config) -> dict[str, Any]:
    """Model or models, rubric (as a hash), orders or votes, seed and, where it is sent, reasoning effort.

    Criteria that are asked apart are named: the same rubric asked as a whole would be another judge.
    """
    settings = config.judge
    models = settings.models
    if not models:
        raise UserError("no judge model", where="judge.model", hint="--model NAME")
    model = models[0] if len(models) == 1 else models
    who: dict[str, Any] = {"judge": "llm", "model": model, "rubric": content_id(read_rubric(settings.rubric))}
    who |= {"orders": settings.orders} if settings.votes is None else {"votes": settings.votes}
    who |= {"seed": settings.seed} | ({"extra_body": settings.extra_body} if settings.extra_body else {})
    criteria = [one.name for one in criteria_for(RANKING, settings.rubric)]
    who |= {"criteria": criteria} if len(criteria) > 1 else {}
    return who | ({"reasoning_effort": settings.reasoning_effort} if is_openai(settings.url) else {})


def calls(shown: Iterable[int], config: Config) -> int:
    """One call a vote, criterion and model."""
    settings = config.judge
    each = len(settings.models) * len(criteria_for(RANKING, settings.rubric))
    return sum(each * count_votes(count, settings) for count in shown)


def estimate(tasks: Sequence[Task], config: Config, form: Form = RANKING) -> Estimate:
    """What the tasks would cost if each vote is asked once; replies that are in the ledger are counted as well."""
    settings = config.judge
    criteria = criteria_for(form, settings.rubric)
    tier = "batch" if settings.batch else _live_tier(config)
    cap, found = settings.max_tokens or UNLIMITED_REPLY, []
    votes: Counter[int] = Counter()  # by how many candidates they show
    material = 0  # bytes of what all votes show
    for task in tasks:
        count = count_votes(len(task.shown), settings)
        votes[len(task.shown)] += count
        material += count * material_bytes(task)
    owed = votes.total() * len(criteria)
    typical = sum(
        min(cap, REPLY_TOKENS + SENTENCE_TOKENS * count) * asked * len(criteria) for count, asked in votes.items()
    )
    for model in settings.models:
        size = 0 if "messages" in settings.extra_body else material * len(criteria)
        for (count, asked), criterion in product(votes.items(), criteria):
            size += asked * _bytes_around(model, count, criterion, settings, form)
        assumed = f"a reply is {REPLY_TOKENS} tokens and {SENTENCE_TOKENS} a candidate"
        if settings.max_tokens is None:
            assumed += f", and none is longer than {UNLIMITED_REPLY:,} tokens, though nothing says so"
        if settings.orders == "auto" and settings.votes is None:
            assumed += ", and every third order is asked"
        if len(criteria) > 1:
            assumed += f"; {len(criteria)} criteria, each asked apart: {', '.join(one.name for one in criteria)}"
        price = _price(config, tier)(model)
        given = settings.price is not None
        others = {} if given else cheaper_models(settings.url, model, tier)
        one = price_estimate(owed, size, typical, owed * cap, price, given, assumed, others)
        if warning := _ending(model):
            one.assumptions.append(warning)
        if capped := _capped(votes, settings):
            one.assumptions.append(capped)
        found.append(one)
    return reduce(add, found)


def _bytes_around(model: str, count: int, criterion: Criterion, settings: JudgeSection, form: Form) -> int:
    """Bytes of a request that shows so many candidates, its material left out."""
    labels = [label_of(place) for place in range(count)]
    message = write_message(criterion.text, [], dict.fromkeys(labels, ""), settings.seed, form)
    return len(msgspec.json.encode(request(model, message, labels, settings.max_tokens, settings, form)))


def _ending(model: str, listed: Mapping[str, str] | None = None) -> str | None:
    """A warning if the end of a model is announced, as of today."""
    return shutdown_warning(
        model, datetime.now(UTC).date(), f"the default judge model is {JudgeSection().model}", listed
    )


async def _warn_of_endings(endpoint: Endpoint, models: Sequence[str], log: Callable[[str], None]) -> None:
    """Say which models end, by the endpoint's own list where that says it."""
    try:
        listed = await asyncio.wait_for(endpoint.models(), LISTING_SECONDS)
    except TimeoutError:
        listed = {}
    for model in models:
        if warning := _ending(model, {name: day for name, day in listed.items() if day}):
            log(warning)


def _capped(shown: Iterable[int], settings: JudgeSection) -> str | None:
    """That fewer orders are asked than `judge.orders` says, where there are no more cyclic ones.

    Args:
        shown: how many completions each task shows.
        settings: says how many orders are asked.
    """
    if settings.votes is not None or not isinstance(settings.orders, int) or settings.orders <= 2:
        return None
    fewest = min(shown, default=0)
    if not 1 < fewest < settings.orders:
        return None
    more = f"--votes {settings.orders} goes on with their reversals, then repeats"
    return f"--orders {settings.orders} of {fewest} candidates: there are {fewest} cyclic orders; {more}"


def settle(tasks: Iterable[Task], judgments: Mapping[str, Judgment], config: Config) -> Iterable[Judgment]:
    """A panel's judgments that change once its models are weighed; one model's never do."""
    return _panel.settle(tasks, judgments) if len(config.judge.models) > 1 else ()


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
    if capped := _capped((len(task.shown) for task in tasks), settings):
        progress.log(capped)
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
        await _warn_of_endings(endpoint, settings.models, progress.log)
        asker = LlmJudge(endpoint, config, progress.log, form)
        done = failed = 0

        async def handle(task: Task) -> None:
            nonlocal done, failed
            judgment = await asker.judgment(task)
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
                for dialect in asker.dialects.values():
                    dialect.send = batches.chat
                for task in await answer(tasks[1:], asker.owed, batches, settings.wait):
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
