"""Whether serving and the SFT adapter see the tokens that training sees: rows, encoded by all, compared.

Asks `/tokenize` of a vLLM server, and reads the chat template that the SFT adapter was saved with, where there is one:
vLLM ignores that one, and answers by the base's. Not covered: servers without `/tokenize`; there the tokenizer's own
chat template is all that was asked, by `encode.py`.
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dpo_cli.data.messages import wire
from dpo_cli.data.records import Message, Tool
from dpo_cli.endpoint.plain import request
from dpo_cli.engines.endpoint import KEY_VARIABLE
from dpo_cli.errors import Exit, UserError
from dpo_cli.training.encode import Encoder, Exchange
from dpo_cli.training.run_folder import RunContext

TIMEOUT = 5.0  # seconds


def check_tokens(
    encoder: Encoder,
    rows: Sequence[Exchange],
    url: str | None,
    adapter: Path | None,
    run: RunContext,
) -> bool:
    """Compare the rows' token ids, and their prompts', with the adapter's and the server's.

    Args:
        encoder: of training.
        rows: prompts, and what follows, as messages; none: nothing is asked.
        url: of the OpenAI-compatible endpoint, with or without `/v1`; None: there is none.
        adapter: folder of the SFT adapter.
        run: records the result, and is told what was done.

    Returns:
        Whether there was a server to ask.

    Raises:
        UserError: they differ; the likely cause is named.
    """
    template = own_template(adapter) if adapter else None
    if template is not None and rows:

        def as_trained(messages: list[Message], answer_next: bool, tools: list[Tool] | None) -> list[int]:
            return encoder.ids(messages, answer_next, template, tools)

        _compare(encoder, rows, as_trained, "the SFT adapter's chat template", str(adapter), run)
    if not rows:
        return False
    if url is None:
        run.progress.log("tokens: no server to compare with (SERVE_URL); the tokenizer's own chat template was used")
        return False
    root = url.rstrip("/").removesuffix("/v1")

    def served(messages: list[Message], answer_next: bool, tools: list[Tool] | None) -> list[int]:
        return _tokenize(root, messages, answer_next, tools, encoder.chat_template_kwargs)

    try:
        _compare(encoder, rows, served, "the server", f"{root}/tokenize", run)
    except (OSError, ValueError, KeyError) as error:
        run.progress.log(
            f"tokens: {root}/tokenize does not answer ({error}); the tokenizer's own chat template was used"
        )
        return False
    run.record("tokens", 0, ok=True, rows=len(rows), where=root)
    run.progress.log(f"tokens: {len(rows)} rows are the same tokens on the server")
    return True


def own_template(adapter: Path) -> str | None:
    """The chat template beside an adapter; None: it has none, as PEFT saves it."""
    file, settings = adapter / "chat_template.jinja", adapter / "tokenizer_config.json"
    try:
        if file.exists():
            return file.read_text("utf-8")
        template = json.loads(settings.read_text("utf-8")).get("chat_template") if settings.exists() else None
    except ValueError as error:
        raise UserError(f"no chat template to be read: {error}", where=str(adapter)) from None
    return template if isinstance(template, str) else None


def _compare(
    encoder: Encoder,
    rows: Sequence[Exchange],
    other: Callable[[list[Message], bool, list[Tool] | None], list[int]],
    name: str,
    where: str,
    run: RunContext,
) -> None:
    """Raise UserError at the first row that the other side encodes in another way."""
    for row in rows:
        for messages, answer_next in ((row.prompt, True), (row.prompt + row.completions[0], False)):
            ours = encoder.ids(messages, answer_next, tools=row.tools)
            theirs = other(messages, answer_next, row.tools)
            if ours == theirs:
                continue
            cause = difference(ours, theirs, encoder.tokenizer, name, answer_next)
            run.record("tokens", 0, ok=False, cause=cause, where=where)
            raise UserError(
                f"template mismatch: {cause}",
                where=where,
                hint="one base and one chat template for SFT, training and serving: nothing-dpo serve-config",
                code=Exit.FAILED,
            )


def difference(ours: list[int], theirs: list[int], tokenizer: Any, name: str, answer_next: bool) -> str:
    """What distinguishes two encodings of the same messages, in words.

    Args:
        ours: of training.
        theirs: of the other side.
        tokenizer: to show tokens by.
        name: what the other side is called.
        answer_next: whether they end with the generation prompt, or with the end of the answer.
    """
    bos, end = tokenizer.bos_token_id, "generation prompt" if answer_next else "EOS, the end of the turn:"
    if theirs == [bos, *ours]:
        return f"{name} doubles BOS" if ours[:1] == [bos] else "training lacks BOS"
    if ours == [bos, *theirs]:
        return "training doubles BOS" if theirs[:1] == [bos] else f"{name} lacks BOS"
    if ours[: len(theirs)] == theirs:
        return f"{name} lacks the {end} {tokenizer.decode(ours[len(theirs) :])!r}"
    if theirs[: len(ours)] == ours:
        return f"training lacks the {end} {tokenizer.decode(theirs[len(ours) :])!r}"
    at = next(index for index, (one, two) in enumerate(zip(ours, theirs, strict=False)) if one != two)
    here, there = (tokenizer.decode(ids[at : at + 8]) for ids in (ours, theirs))
    return f"from token {at} on, {here!r} in training and {there!r} by {name}"


def _tokenize(
    root: str,
    messages: list[Message],
    answer_next: bool,
    tools: list[Tool] | None,
    chat_template_kwargs: dict[str, Any],
) -> list[int]:
    body = {
        "messages": wire(messages),
        "add_generation_prompt": answer_next,
        "chat_template_kwargs": chat_template_kwargs,
        **({"tools": tools} if tools else {}),
    }
    status, content = request(f"{root}/tokenize", body, key=os.environ.get(KEY_VARIABLE), timeout=TIMEOUT)
    if status != 200:
        raise OSError(f"status {status}")
    tokens: list[int] = json.loads(content)["tokens"]
    return tokens
