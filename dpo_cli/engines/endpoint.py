"""Completions from an OpenAI-compatible endpoint that serves the SFT adapter (vLLM, or whatever speaks like it).

Paid replies go to `generate.replies.jsonl` first, so that a kill costs only what was in flight. What the server
refuses (`n`, a sampling parameter) is left out for the rest of the run, with a line in the log. A reply without an
answer is asked for once more, where that may help, and is never a completion.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from dpo_cli.config.settings import Config
from dpo_cli.data.messages import wire
from dpo_cli.data.records import Message, Usage, content_id, read_messages
from dpo_cli.endpoint.client import Endpoint
from dpo_cli.endpoint.costs import Receipt
from dpo_cli.endpoint.dialect import Dialect, without_system
from dpo_cli.endpoint.http import Rejected
from dpo_cli.endpoint.prices import price_of
from dpo_cli.endpoint.responses import PASSING, Choice, Reply
from dpo_cli.engines._engine import Request, Sampled
from dpo_cli.progress import Progress

KEY_VARIABLE = "SERVE_API_KEY"  # vLLM asks for a key only if it was started with one
EXTERNAL_KEY_VARIABLE = "OPENAI_API_KEY"  # of generate.contrast_url
LEDGER = "generate.replies.jsonl"
REPORT_SECONDS = 0.5
SECOND_TRY = 1_000_003  # added to the seed of a completion that is asked for once more
HOPELESS = 3  # prompts without any answer, before the first that has one: nothing is asked once more


def sample(requests: list[Request], config: Config, deliver: Callable[[Sampled], None], progress: Progress) -> Receipt:
    """Sample every request from `generate.url`; a prompt that the server refuses is delivered with its error.

    Raises:
        UserError: no server, no access, no such model, no budget, or no disk space.
    """
    return asyncio.run(_sample(requests, config, deliver, progress))


async def _sample(
    requests: list[Request], config: Config, deliver: Callable[[Sampled], None], progress: Progress
) -> Receipt:
    settings = config.generate
    assert settings.url is not None
    async with Endpoint(
        settings.url,
        api_key_variable=EXTERNAL_KEY_VARIABLE if settings.url == settings.contrast_url else KEY_VARIABLE,
        api_key_required=False,
        ledger=Path(config.data) / LEDGER,
        concurrency=settings.concurrency,
        timeout=settings.timeout,
        price=partial(price_of, settings.url, override=settings.price),
        max_usd=settings.max_usd,
        log=progress.log,
    ) as endpoint:
        sampler = _Sampler(endpoint, config, progress)

        async def handle(request: Request) -> None:
            deliver(await sampler.complete(request))

        reporter = asyncio.create_task(_report(endpoint, progress))
        try:
            await endpoint.each(requests, handle)
        finally:
            reporter.cancel()
            _tell(endpoint, progress)
        return endpoint.spend


async def _report(endpoint: Endpoint, progress: Progress) -> None:
    """Keep the live numbers live while nothing is delivered."""
    while True:
        _tell(endpoint, progress)
        await asyncio.sleep(REPORT_SECONDS)


def _tell(endpoint: Endpoint, progress: Progress) -> None:
    paid = {"usd": endpoint.spend.usd} if endpoint.spend.usd else {}
    progress.update(0, in_flight=endpoint.in_flight, retries=endpoint.spend.retries, **paid)


class _Sampler:
    """Asks for completions, in the form that this server takes."""

    def __init__(self, endpoint: Endpoint, config: Config, progress: Progress) -> None:
        self._dialect = Dialect(endpoint, config.model.name, progress.log, config.generate.extra_body)
        self._seed = config.generate.seed
        names = ("max_tokens", "temperature", "top_p", "frequency_penalty")
        given = {name: getattr(config.generate, name) for name in names}
        self._body: dict[str, Any] = {"model": config.model.name}
        self._body |= {name: value for name, value in given.items() if value is not None}
        self._answered = self._unanswered = 0
        if config.model.chat_template_kwargs:  # vLLM's own field
            self._body["chat_template_kwargs"] = config.model.chat_template_kwargs
        self._extra = config.generate.extra_body
        self._choices = config.generate.choices
        self._system = config.generate.system_role is not None

    async def complete(self, request: Request) -> Sampled:
        """All completions of one prompt, in as few requests as the server allows; what is no answer, once more."""
        result = Sampled(id=request.id, texts=[], finish_reasons=[], usage=Usage())
        again = False
        try:
            while (missing := request.need - len(result.texts)) > 0:
                reply = await self._ask(request, len(request.have) + len(result.texts), missing, again, result)
                lost = self._take(reply.choices[:missing], bool(request.tools), result)
                if not lost:
                    continue
                if again or self._hopeless(lost):
                    result.missing = dict(Counter(lost))
                    result.error = next(iter(lost))
                    break
                again = True
        except Rejected as error:
            result.error = str(error)
        self._answered += bool(result.texts)
        self._unanswered += not result.texts
        return result

    def _take(self, choices: Sequence[Choice], tools: bool, result: Sampled) -> list[str]:
        """Add the answers to the result; why the rest are none. Where tools are offered, to call one is an answer."""
        lost = []
        for choice in choices:
            lacks = choice.lacks(tools)
            if lacks is not None:
                lost.append(lacks)
                continue
            whole = _whole(choice)
            if whole and not result.messages:
                result.messages = [None] * len(result.texts)
            if result.messages or whole:
                result.messages.append(whole)
            result.texts.append(choice.text or choice.refusal or "")
            result.finish_reasons.append(choice.finish_reason)
        return lost

    def _hopeless(self, lost: Sequence[str]) -> bool:
        """Whether asking once more would bring the same."""
        return not set(lost) & set(PASSING) or (not self._answered and self._unanswered >= HOPELESS)

    async def _ask(self, request: Request, first: int, missing: int, again: bool, result: Sampled) -> Reply:
        """Completions from index `first` on: at most `missing`, at least one; other ones if `again`."""
        first += again * SECOND_TRY
        messages = wire(request.prompt)
        body = {
            **self._body,
            "messages": messages if self._system else without_system(messages),
            **({"tools": request.tools} if request.tools else {}),
        }
        if self._choices is not None:
            body["n"] = missing if self._choices == "all" else min(missing, self._choices)
        if self._seed is not None:
            # vLLM gives child i the seed + i: completion i is the same, however many are asked for at once.
            body["seed"] = int(content_id(self._seed, request.id), 16) % 2**31 + first
        reply = await self._dialect.chat(body | self._extra, replicate=first)
        result.usage += reply.usage
        result.changes = {name: value for name, value in self._dialect.changes(body).items() if name != "n"}
        return reply


def _whole(choice: Choice) -> Message | None:
    """An answer as a message, if it is more than its text; tool calls that nobody could read are left out."""
    message: dict[str, Any] = {"role": "assistant", "content": choice.text or choice.refusal or ""}
    if choice.reasoning:
        message["reasoning_content"] = choice.reasoning
    if choice.tool_calls:
        with suppress(ValueError):
            return read_messages([message | {"tool_calls": choice.tool_calls}], "reply")[0]
    return read_messages([message], "reply")[0] if choice.reasoning else None
