"""Completions from an OpenAI-compatible endpoint that serves the SFT adapter (vLLM, or whatever speaks like it).

Paid replies go to `generate.replies.jsonl` first, so that a kill costs only what was in flight. What the server
refuses (`n`, a sampling parameter) is left out for the rest of the run, with a line in the log.
"""

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from dpo_cli.config.settings import Config
from dpo_cli.data.messages import wire
from dpo_cli.data.records import Usage, content_id
from dpo_cli.endpoint.client import Endpoint
from dpo_cli.endpoint.costs import Receipt
from dpo_cli.endpoint.dialect import Dialect
from dpo_cli.endpoint.http import Rejected
from dpo_cli.endpoint.prices import price_of
from dpo_cli.endpoint.responses import Reply
from dpo_cli.engines import Request, Sampled
from dpo_cli.progress import Progress

KEY_VARIABLE = "SERVE_API_KEY"  # vLLM asks for a key only if it was started with one
EXTERNAL_KEY_VARIABLE = "OPENAI_API_KEY"  # of generate.contrast_url
LEDGER = "generate.replies.jsonl"
REPORT_SECONDS = 0.5


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
        self._dialect = Dialect(endpoint, config.model.name, progress.log)
        self._seed = config.generate.seed
        self._body: dict[str, Any] = {
            "model": config.model.name,
            "max_tokens": config.generate.max_tokens,
            "temperature": config.generate.temperature,
            "top_p": config.generate.top_p,
            "frequency_penalty": config.generate.frequency_penalty,
        }
        if config.model.chat_template_kwargs:  # vLLM's own field
            self._body["chat_template_kwargs"] = config.model.chat_template_kwargs

    async def complete(self, request: Request) -> Sampled:
        """All completions of one prompt, in as few requests as the server allows."""
        result = Sampled(id=request.id, texts=[], finish_reasons=[], usage=Usage())
        try:
            while (missing := request.need - len(result.texts)) > 0:
                reply = await self._ask(request, len(request.have) + len(result.texts), missing)
                result.usage += reply.usage
                for choice in reply.choices[:missing]:
                    result.texts.append(choice.text or choice.refusal or "")
                    result.finish_reasons.append(choice.finish_reason)
        except Rejected as error:
            result.error = str(error)
        return result

    async def _ask(self, request: Request, first: int, missing: int) -> Reply:
        """Completions from index `first` on: at most `missing`, at least one."""
        body = {
            **self._body,
            "messages": wire(request.prompt),
            **({"tools": request.tools} if request.tools else {}),
            "n": missing,
            # vLLM gives child i the seed + i: completion i is the same, however many are asked for at once.
            "seed": int(content_id(self._seed, request.id), 16) % 2**31 + first,
        }
        return await self._dialect.chat(body, replicate=first)
