"""Whether the server sees the tokens that training sees: prompts, encoded by both, compared.

Asks `/tokenize` of a vLLM server. Reads and writes no file. Not covered: servers without `/tokenize`; there the
tokenizer's own chat template is all that was asked, by `encode.py`.
"""

import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

from dpo_cli.errors import Exit, UserError
from dpo_cli.progress import Progress
from dpo_cli.schema import Message
from dpo_cli.training.encode import Encoder

ROWS = 10
TIMEOUT = 5.0  # seconds


def check_tokens(encoder: Encoder, prompts: Sequence[list[Message]], url: str | None, progress: Progress) -> bool:
    """Compare the first prompts' token ids with the server's; whether there was a server to ask.

    Args:
        encoder: of training.
        prompts: as messages.
        url: of the OpenAI-compatible endpoint, with or without `/v1`; None: there is none.
        progress: hears what was done.

    Raises:
        UserError: they differ; the likely cause is named.
    """
    asked = prompts[:ROWS]
    if url is None:
        progress.log("tokens: no server to compare with (SERVE_URL); the tokenizer's own chat template was used")
        return False
    root = url.rstrip("/").removesuffix("/v1")
    for prompt in asked:
        ours = encoder.prompt_ids(prompt)
        try:
            theirs = _tokenize(root, prompt, encoder.chat_template_kwargs)
        except (OSError, ValueError, KeyError) as error:
            progress.log(
                f"tokens: {root}/tokenize does not answer ({error}); the tokenizer's own chat template was used"
            )
            return False
        if ours != theirs:
            raise UserError(
                f"training and the server see different tokens: {difference(ours, theirs, encoder.tokenizer)}",
                where=f"{root}/tokenize", hint="serve the same base and chat template: nothing-dpo serve-config",
                code=Exit.FAILED,
            )  # fmt: skip
    progress.log(f"tokens: {len(asked)} prompts are the same tokens on the server")
    return True


def difference(ours: list[int], theirs: list[int], tokenizer: Any) -> str:
    """What distinguishes two encodings of one prompt, in words."""
    bos = tokenizer.bos_token_id
    if theirs == [bos, *ours]:
        return "the server doubles BOS" if ours[:1] == [bos] else "training lacks BOS"
    if ours == [bos, *theirs]:
        return "training doubles BOS" if theirs[:1] == [bos] else "the server lacks BOS"
    if ours[: len(theirs)] == theirs:
        return f"the server lacks the generation prompt {tokenizer.decode(ours[len(theirs) :])!r}"
    if theirs[: len(ours)] == ours:
        return f"training lacks the generation prompt {tokenizer.decode(theirs[len(ours) :])!r}"
    at = next(index for index, (one, other) in enumerate(zip(ours, theirs, strict=False)) if one != other)
    here, there = (tokenizer.decode(ids[at : at + 8]) for ids in (ours, theirs))
    return f"from token {at} on, {here!r} in training and {there!r} on the server"


def _tokenize(root: str, prompt: list[Message], chat_template_kwargs: dict[str, Any]) -> list[int]:
    body = {"messages": prompt, "add_generation_prompt": True, "chat_template_kwargs": chat_template_kwargs}
    request = urllib.request.Request(
        f"{root}/tokenize", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=TIMEOUT) as reply:
        tokens: list[int] = json.load(reply)["tokens"]
    return tokens
