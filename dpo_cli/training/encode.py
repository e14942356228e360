"""Pairs and demonstrations to token ids: exactly those that a server sees, whole to the end, or refused and counted.

A row that is longer than allowed loses the oldest part of its prompt (turns, then lines, then characters) and never
any of its completion, since that would train a model that does not stop. Needs a tokenizer with a chat template and
no torch. Reads and writes nothing. Not covered: images and tools.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from typing import Any

from msgspec import Struct

from dpo_cli.data.records import Message
from dpo_cli.errors import UserError

TOO_LONG = "longer than max_length without its prompt's oldest part"
IDENTICAL = "chosen and rejected are the same tokens"
NOT_A_PREFIX = "the prompt's last token changes when a completion follows"


class Sequences(Struct):
    """Token ids of one prompt and of its completions, without padding; a pair's gap, scores and weight."""

    prompt: list[int]
    completions: list[list[int]]
    gap: float | None = None
    weight: float = 1.0
    scores: tuple[float, float] | None = None


class Encoded(Struct):
    """What became of the rows: the usable ones and their indices, how many were shortened, reason -> rows refused."""

    rows: list[Sequences]
    kept: list[int]
    shortened: int
    refused: dict[str, int]


class Encoder:
    """A tokenizer with its chat template, the stop tokens of the model, and a length limit.

    Args:
        tokenizer: a transformers tokenizer.
        stop_ids: tokens at which generation stops.
        max_length: longest prompt plus completion, in tokens.
        chat_template_kwargs: variables of the chat template.

    Raises:
        UserError: the tokenizer has no chat template.
    """

    def __init__(
        self, tokenizer: Any, stop_ids: set[int], max_length: int, chat_template_kwargs: dict[str, Any]
    ) -> None:
        if tokenizer.chat_template is None:
            raise UserError(
                "the base model's tokenizer has no chat template", hint="use an instruct model as model.base"
            )
        self.tokenizer = tokenizer
        self.stop_ids = stop_ids
        self.max_length = max_length
        self.chat_template_kwargs = chat_template_kwargs

    def encode(self, rows: Sequence[tuple[list[Message], list[list[Message]]]]) -> Encoded:
        """Encode (prompt, completions) rows.

        Raises:
            UserError: the chat template doubles BOS or does not end the assistant's turn with a stop token.
        """
        refused: Counter[str] = Counter()
        usable, kept = [], []
        shortened = 0
        for index, ((prompt, completions), sequences) in enumerate(zip(rows, self._encode(rows), strict=True)):
            if sequences is not None and self._length(sequences) > self.max_length:
                room = self.max_length - max(map(len, sequences.completions))
                shorter = self._shorten(prompt, room)
                if shorter is None:
                    refused[TOO_LONG] += 1
                    continue
                [sequences] = self._encode([(shorter, completions)])
                shortened += 1
            if sequences is None:
                refused[NOT_A_PREFIX] += 1
            elif len(completions) > len({tuple(ids) for ids in sequences.completions}):
                refused[IDENTICAL] += 1
            else:
                usable.append(sequences)
                kept.append(index)
        return Encoded(usable, kept, shortened, dict(refused))

    def ids(self, messages: list[Message], answer_next: bool, template: str | None = None) -> list[int]:
        """Token ids of messages, ready to be answered or not, by the tokenizer's own chat template or another."""
        [ids] = self._tokenize([self._render(messages, answer_next, template)])
        return ids

    def _encode(self, rows: Sequence[tuple[list[Message], list[list[Message]]]]) -> list[Sequences | None]:
        """All rows in one call to the tokenizer; None where the prompt is no prefix of prompt plus completion."""
        texts = []
        for prompt, completions in rows:
            texts.append(self._render(prompt, answer_next=True))
            texts += [self._render(prompt + completion, answer_next=False) for completion in completions]
        ids = iter(self._tokenize(texts))
        encoded: list[Sequences | None] = []
        for _, completions in rows:
            start = next(ids)
            whole = [next(ids) for _ in completions]
            self._check_bos(start)
            if any(sequence[: len(start)] != start for sequence in whole):
                encoded.append(None)
                continue
            sequences = Sequences(start, [sequence[len(start) :] for sequence in whole])
            for completion in sequences.completions:
                self._check_end(completion)
            encoded.append(sequences)
        return encoded

    def _render(self, messages: list[Message], answer_next: bool, template: str | None = None) -> str:
        text: str = self.tokenizer.apply_chat_template(
            messages,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=answer_next,
            **self.chat_template_kwargs,
        )
        return text

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        # The template writes BOS itself where the model wants one.
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _length(self, sequences: Sequences) -> int:
        return len(sequences.prompt) + max(map(len, sequences.completions))

    def _shorten(self, prompt: list[Message], room: int) -> list[Message] | None:
        """The prompt without as little of its oldest part as fits into `room` tokens; None if nothing fits."""
        cuts = list(_cuts(prompt))

        def fits(cut: tuple[int, int]) -> bool:
            [ids] = self._tokenize([self._render(_cut(prompt, *cut), answer_next=True)])
            return len(ids) <= room

        first = bisect_left(cuts, True, key=fits)
        return _cut(prompt, *cuts[first]) if first < len(cuts) else None

    def _check_bos(self, ids: list[int]) -> None:
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            raise UserError("the chat template begins with BOS twice", hint="correct the base model's chat template")

    def _check_end(self, ids: list[int]) -> None:
        end = next((index for index in reversed(range(len(ids))) if ids[index] in self.stop_ids), None)
        if end is None or self.tokenizer.decode(ids[end + 1 :]).strip():
            stops = ", ".join(map(repr, self.tokenizer.convert_ids_to_tokens(sorted(self.stop_ids))))
            raise UserError(
                f"the chat template does not end the assistant's turn with a stop token ({stops}), "
                f"but with {self.tokenizer.decode(ids[-4:])!r}: the model would never learn to stop",
                hint="set eos_token or eos_token_id of the base model to what ends a turn in its chat template",
            )


def _cuts(prompt: list[Message]) -> list[tuple[int, int]]:
    """(index of the first turn kept, characters cut from its front), from the smallest loss to the largest.

    System messages at the head stay. A conversation goes on from a user's turn; of the last turn, lines go before
    characters of the last line do.
    """
    head = _head(prompt)
    last = len(prompt) - 1
    turns = [index for index in range(head + 1, last) if prompt[index]["role"] == "user"]
    text = prompt[last]["content"] if last >= head else ""
    lines = [index + 1 for index, character in enumerate(text[:-1]) if character == "\n"]
    characters = range((lines or [0])[-1] + 1, len(text))
    whole = [(last, 0)] if last > head else []
    return [(turn, 0) for turn in turns] + whole + [(last, cut) for cut in (*lines, *characters)]


def _cut(prompt: list[Message], turn: int, characters: int) -> list[Message]:
    first: Message = {"role": prompt[turn]["role"], "content": prompt[turn]["content"][characters:]}
    return [*prompt[: _head(prompt)], first, *prompt[turn + 1 :]]


def _head(prompt: list[Message]) -> int:
    """How many system messages the prompt begins with."""
    return next((index for index, message in enumerate(prompt) if message["role"] != "system"), len(prompt))
