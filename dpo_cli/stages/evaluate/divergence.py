"""KL(policy || reference): how far the policy has gone from where it came, on text that it samples at temperature 1.

In this process it is summed over the whole vocabulary. By an endpoint that gives log-probabilities and takes prompts as
tokens (vLLM) it is the mean of log policy(y) - log reference(y): without bias as well, with more noise; only if asked
for, and one request at a time, since log-probabilities of a prompt under an adapter, in one batch with other requests,
end vLLM 0.32 on a CPU. Elsewhere there is none, and the result says why. Measured prompts are appended to kl.jsonl in
`evaluation/`; nothing is measured twice.
"""

import asyncio
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

from msgspec import Struct

from dpo_cli.config.settings import Config
from dpo_cli.data.messages import wire
from dpo_cli.data.records import Prompt, content_id
from dpo_cli.data.resumable import Resumable
from dpo_cli.endpoint.client import Endpoint
from dpo_cli.endpoint.http import COMPLETIONS, Rejected
from dpo_cli.endpoint.prices import price_of
from dpo_cli.endpoint.responses import Reply
from dpo_cli.engines._engine import UNLIMITED
from dpo_cli.engines.endpoint import KEY_VARIABLE
from dpo_cli.progress import Progress
from dpo_cli.stages.evaluate.sampling import FOLDER, RunBudget, Side

ROWS, LEDGER = "kl.jsonl", "kl.replies.jsonl"
TOGETHER = 8  # prompts that are sampled in one batch; the draws depend on what is in it

Prompts = dict[str, Prompt]


class Divergence(Struct, kw_only=True):
    """Mean KL of a sequence in nats, with its standard error over `n` prompts, and of a token; `how` it was found."""

    nats_per_sequence: float
    error: float | None
    nats_per_token: float
    n: int
    how: Literal["whole vocabulary", "log-ratio"]


class Measured(Struct):
    """One line of kl.jsonl: the nats of one sequence, and its tokens."""

    id: str
    nats: float
    tokens: int


class Unmeasurable(Exception):
    """There is no way to find the KL here; says why."""


def measure(
    reference: Side, policy: Side, prompts: Prompts, config: Config, progress: Progress, purse: RunBudget
) -> Divergence:
    """Measure KL on the first `evaluate.kl_prompts` of the prompts.

    Raises:
        Unmeasurable: the adapters are not here, or the endpoint gives no log-probabilities.
        UserError: what the endpoint or the models raise.
    """
    chosen = dict(list(prompts.items())[: config.evaluate.kl_prompts])
    by_endpoint = config.generate.engine == "endpoint" or policy.config.generate.engine == "endpoint"
    if by_endpoint and not config.evaluate.kl_by_endpoint:
        raise Unmeasurable("by an endpoint only with --set evaluate.kl_by_endpoint=true")
    who = [reference.made_with, policy.made_with]
    groups = [list(chosen)[start : start + TOGETHER] for start in range(0, len(chosen), TOGETHER)]
    keys = {key: content_id("kl", who, key, None if by_endpoint else group) for group in groups for key in group}
    with Resumable(Path(config.data) / FOLDER / ROWS, Measured) as measured:
        owed = measured.missing({row: key for key, row in keys.items()})
        if owed:

            def deliver(key: str, nats: float, tokens: int) -> None:
                if keys[key] not in measured.known:
                    measured.deliver(Measured(keys[key], nats, tokens))
                    delivery.note()

            with measured.reporting(progress, "kl", len(chosen), len(owed)) as delivery:
                if by_endpoint:
                    left = {key: chosen[key] for key in owed.values()}
                    asyncio.run(_ask(reference, policy, left, config, delivery, purse, deliver))
                else:
                    groups = [group for group in groups if not measured.known.keys() >= {keys[key] for key in group}]
                    _compute(config, [{key: chosen[key] for key in group} for group in groups], deliver, delivery)
    rows = [measured.known[keys[key]] for key in chosen if keys[key] in measured.known]
    if not rows:
        raise Unmeasurable("no prompt leaves room in the model's context")
    nats = [row.nats for row in rows]
    return Divergence(
        nats_per_sequence=fmean(nats),
        error=stdev(nats) / math.sqrt(len(nats)) if len(nats) > 1 else None,
        nats_per_token=sum(nats) / sum(row.tokens for row in rows),
        n=len(rows),
        how="log-ratio" if by_endpoint else "whole vocabulary",
    )


def _compute(
    config: Config, groups: Sequence[Prompts], deliver: Callable[[str, float, int], None], progress: Progress
) -> None:
    """In this process, with both adapters on one base."""
    from dpo_cli.stages.evaluate.adapters import load_both
    from dpo_cli.training.kl import SampledKl
    from dpo_cli.training.trainer import redirect_logs

    with redirect_logs(progress):
        model, as_reference = load_both(config)
        most = config.generate.max_tokens or UNLIMITED
        for group in groups:
            encoded = {key: model.encode(*prompt) for key, prompt in group.items()}
            fitting = {key: ids for key, ids in encoded.items() if len(ids) + most <= model.context}
            if not fitting:
                continue
            seed = int(content_id("kl", config.evaluate.seed, list(group)), 16)  # draws shared by groups share errors
            prompts = list(fitting.values())
            on_both = SampledKl(model.network, as_reference, prompts, most, set(model.ends), seed, nullcontext)
            for key, completion, nats in zip(fitting, *on_both.measure(), strict=True):
                deliver(key, nats, len(completion))


async def _ask(
    reference: Side,
    policy: Side,
    prompts: Prompts,
    config: Config,
    progress: Progress,
    purse: RunBudget,
    deliver: Callable[[str, float, int], None],
) -> None:
    """By the endpoint: the policy writes and says how likely that was; the reference says how likely it finds it."""
    settings = policy.config.generate
    async with Endpoint(
        settings.url or "",
        api_key_variable=KEY_VARIABLE,
        api_key_required=False,
        ledger=Path(config.data) / FOLDER / LEDGER,
        concurrency=1,
        timeout=settings.timeout,
        price=partial(price_of, settings.url or "", override=settings.price),
        max_usd=purse.left,
        log=progress.log,
    ) as endpoint:

        async def handle(key: str) -> None:
            written = await endpoint.chat(_writing(policy, key, prompts[key]))
            choice = written.choices[0]
            if not choice.token_ids or len(choice.log_probs) != len(choice.token_ids) or not written.prompt_token_ids:
                raise Unmeasurable("the endpoint gives no log-probabilities with token ids")
            scored = await endpoint.chat(_scoring(reference, written), path=COMPLETIONS)
            theirs = scored.choices[0].prompt_log_probs[-len(choice.token_ids) :]
            if len(theirs) != len(choice.token_ids):
                raise Unmeasurable("the endpoint gives no log-probabilities of a prompt")
            deliver(key, sum(choice.log_probs) - sum(theirs), len(choice.token_ids))

        try:
            first, *rest = prompts
            await handle(first)  # alone: it finds out whether the endpoint can
            await endpoint.each(rest, handle)
        except Rejected as error:
            raise Unmeasurable(f"the endpoint gives no log-probabilities ({error})") from None
        finally:
            purse.add(endpoint.spend)


def _writing(policy: Side, key: str, prompt: Prompt) -> dict[str, Any]:
    settings, template = policy.config.generate, policy.config.model.chat_template_kwargs
    return {
        "model": policy.config.model.name,
        "messages": wire(prompt.messages),
        **({"tools": prompt.tools} if prompt.tools else {}),
        "max_tokens": settings.max_tokens or UNLIMITED,
        "temperature": 1.0,
        "top_p": 1.0,
        "seed": int(content_id("kl", settings.seed, key), 16) % 2**31,
        "logprobs": True,
        "return_token_ids": True,
        **({"chat_template_kwargs": template} if template else {}),
    }


def _scoring(reference: Side, written: Reply) -> dict[str, Any]:
    ids = [*written.prompt_token_ids, *written.choices[0].token_ids]
    return {
        "model": reference.config.model.name,
        "prompt": ids,
        "max_tokens": 1,
        "temperature": 0.0,
        "prompt_logprobs": 0,
    }
