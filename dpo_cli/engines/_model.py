"""A model that is loaded for sampling: its network, its tokenizer, and prompts as its token ids.

Reads and writes nothing. Not covered: loading, which is the engine's (`transformers.py`).
"""

from typing import Any

from msgspec import Struct

from dpo_cli.data.records import Message, Tool
from dpo_cli.data.thinking import opening
from dpo_cli.errors import UserError

SHOWN = 40  # characters of a message, by which a person finds it


class Model(Struct):
    """A loaded model with what is needed to sample from it."""

    network: Any
    tokenizer: Any
    ends: frozenset[int]
    context: int
    template: dict[str, Any] = {}
    thinking: str | None = None

    def encode(self, prompt: list[Message], tools: list[Tool] | None = None) -> list[int]:
        """Token ids of a prompt under the base model's chat template, up to where the assistant begins.

        Raises:
            UserError: the template refuses it, or makes no text of it.
        """
        from jinja2.exceptions import TemplateError  # it is there where a tokenizer is

        try:
            ids = self._encode(prompt, tools)
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            roles = " ".join(message["role"] for message in prompt)
            raise UserError(
                f"the chat template refuses this conversation ({roles}): {' '.join(str(error).split())}",
                where=_first_words(prompt),
                hint="--set model.chat_template=FILE with a template that takes such conversations",
            ) from None
        if not ids:
            raise UserError("the chat template makes no text of this conversation", where=_first_words(prompt))
        return ids

    def _encode(self, prompt: list[Message], tools: list[Tool] | None) -> list[int]:
        how = {"tools": tools, "add_generation_prompt": True, "return_dict": False, **self.template}
        if self.thinking == "strip":
            text = self.tokenizer.apply_chat_template(prompt, tokenize=False, **how)
            text = text.removesuffix(opening(text))
            stripped: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            return stripped
        ids: list[int] = self.tokenizer.apply_chat_template(prompt, **how)
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of a completion, without special tokens."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def _first_words(prompt: list[Message]) -> str:
    text = " ".join(str(prompt[-1]["content"]).split()) if prompt else ""
    return f"prompt {text[:SHOWN]!r}" + ("..." if text[SHOWN:] else "")
