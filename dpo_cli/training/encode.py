"""Pairs and demonstrations to token ids: exactly those that a server sees, whole to the end, or refused and counted.

A row that is longer than allowed loses the oldest part of its prompt (turns, then lines, then characters) and never
any of its completion, since that would train a model that does not stop. Needs a tokenizer with a chat template and
no torch. Reads and writes nothing. Not covered: images.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple, Protocol

from msgspec import Struct

from dpo_cli.config.settings import Thinking
from dpo_cli.data import thinking
from dpo_cli.data.records import Message, Tool, text_of
from dpo_cli.data.thinking import Turn
from dpo_cli.errors import UserError

TOO_LONG = "longer than max_length without its prompt's oldest part"
IDENTICAL = "chosen and rejected are the same tokens"
NOT_A_PREFIX = "the prompt's last token changes when a completion follows"
DROPPED = "the chat template leaves out a part of the completion"
EMPTY = "the chosen side says nothing"
IGNORED = -100  # a label that carries no loss
TRIED_WHOLE = 16  # rows of which each text is tokenized whole as well
# What to do where most rows are refused for a reason.
REMEDIES = {
    TOO_LONG: "raise max_length",
    IDENTICAL: "make pairs whose sides differ: raise pair.min_gap or generate.temperature",
    NOT_A_PREFIX: "--set model.chat_template=FILE with a template that leaves the prompt as it is when answered",
    DROPPED: "--set model.chat_template=FILE with a template that keeps the whole answer",
    EMPTY: "make the pairs again without empty answers: nothing-dpo pair",
}


class Sequences(Struct):
    """Token ids of one prompt and of its completions, without padding; a pair's gap, scores and weight."""

    prompt: list[int]
    completions: list[list[int]]
    gap: float | None = None
    weight: float = 1.0
    scores: tuple[float, float] | None = None


class EncodedRow(Protocol):
    """What `Sequences` holds, wherever it is."""

    @property
    def prompt(self) -> list[int]:
        """Token ids of the prompt."""

    @property
    def completions(self) -> list[list[int]]:
        """Token ids of each completion."""

    @property
    def gap(self) -> float | None:
        """How far apart the scores of a pair are; None: not known."""

    @property
    def weight(self) -> float:
        """What the pair counts."""

    @property
    def scores(self) -> tuple[float, float] | None:
        """Scores of chosen and rejected; None: not known."""


class Encoded(Struct):
    """What became of the rows: the usable ones and their indices, how many were shortened, reason -> rows refused."""

    rows: list[Sequences]
    kept: list[int]
    shortened: int
    refused: dict[str, int]


class Exchange(NamedTuple):
    """A prompt, what follows it, the tools that it may call, and the row's place for messages to the user."""

    prompt: list[Message]
    completions: list[list[Message]]
    tools: list[Tool] | None = None
    where: str | None = None


class Encoder:
    """A tokenizer with its chat template, the stop tokens of the model, and a length limit.

    Args:
        tokenizer: a transformers tokenizer.
        stop_ids: tokens at which generation stops.
        max_length: longest prompt plus completion, in tokens.
        chat_template_kwargs: variables of the chat template.
        thinking: what to do with thinking where the template opens it or leaves it out; None: refuse.

    Raises:
        UserError: the tokenizer has no chat template.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop_ids: set[int],
        max_length: int,
        chat_template_kwargs: dict[str, Any],
        thinking: Thinking | None = None,
    ) -> None:
        if tokenizer.chat_template is None:
            raise UserError(
                "the base model's tokenizer has no chat template",
                hint="use an instruct model as model.base, or --set model.chat_template=FILE",
            )
        self.tokenizer = tokenizer
        self.stop_ids = stop_ids
        self.max_length = max_length
        self.chat_template_kwargs = chat_template_kwargs
        self.thinking = thinking
        # Added tokens that are looked for in the text as it stands: a tokenizer divides it there before anything else.
        added = tokenizer.added_tokens_decoder if tokenizer.is_fast else {}
        self._dividers = {id: token.content for id, token in added.items() if not token.normalized}
        self._divides = bool(self._dividers)
        self._tried_whole = 0

    def settings(self) -> dict[str, Any]:
        """Everything beside the rows and the tokenizer's files that decides what `encode` makes of a row."""
        template = str(self.tokenizer.chat_template)
        return {
            "chat_template": template,
            "chat_template_kwargs": self.chat_template_kwargs,
            "thinking": self.thinking,
            "max_length": self.max_length,
            "stop_ids": sorted(self.stop_ids),
            "now": self._now() if "strftime_now" in template else None,
        }

    def encode(self, rows: Sequence[Exchange]) -> Encoded:
        """Encode rows.

        Raises:
            UserError: the chat template refuses a conversation, doubles BOS, opens or leaves out thinking without
                `thinking` saying what to do, or does not end the assistant's turn with a stop token.
        """
        refused: Counter[str] = Counter()
        usable, kept = [], []
        shortened = 0
        rows = [Exchange(*row) for row in rows]
        for index, (row, found) in enumerate(zip(rows, self._encode(rows), strict=True)):
            sequences = found
            if isinstance(sequences, Sequences) and self._length(sequences) > self.max_length:
                room = self.max_length - max(map(len, sequences.completions))
                shorter = self._shorten(row, room)
                if shorter is None:
                    refused[TOO_LONG] += 1
                    continue
                [sequences] = self._encode([row._replace(prompt=shorter)])
                shortened += 1
            if not isinstance(sequences, Sequences):
                refused[sequences] += 1
            elif len(row.completions) > len({tuple(ids) for ids in sequences.completions}):
                refused[IDENTICAL] += 1
            else:
                usable.append(sequences)
                kept.append(index)
        return Encoded(usable, kept, shortened, dict(refused))

    def ids(
        self,
        messages: list[Message],
        answer_next: bool,
        template: str | None = None,
        tools: list[Tool] | None = None,
    ) -> list[int]:
        """Token ids of messages, ready to be answered or not, by the tokenizer's own chat template or another."""
        [ids] = self._tokenize([self._render(messages, answer_next, template, tools)])
        return ids

    def inserts_date(self) -> bool:
        """Whether the chat template writes today's date, so that the same rows are other tokens tomorrow."""
        if "strftime_now" not in str(self.tokenizer.chat_template):
            return False
        probe: list[Message] = [{"role": "user", "content": "hi"}]
        mark = "@today@"
        return mark in self._render(probe, True, None, None, strftime_now=lambda _: mark)

    def _now(self) -> list[str]:
        """What a template that asks for the time may write: today's date, and what it writes into a short prompt."""
        today = datetime.now(UTC).astimezone().date().isoformat()
        return [today, self._render([{"role": "user", "content": "hi"}], True)]

    def _encode(self, rows: Sequence[Exchange]) -> list[Sequences | str]:
        """Token ids of rows, or the reason why one can't be used; each text goes to the tokenizer once."""
        turns = [self._turns(row) for row in rows]
        ids = self._joined_ids([turn for found in turns if isinstance(found, list) for turn in found])
        encoded: list[Sequences | str] = []
        for found in turns:
            if not isinstance(found, list):
                encoded.append(found)
                continue
            pairs = [ids[turn] for turn in found]
            start = pairs[0][0]
            self._check_bos(start)
            if any(whole[: len(start)] != start for _, whole in pairs):
                encoded.append(NOT_A_PREFIX)
                continue
            sequences = Sequences(start, [whole[len(start) :] for _, whole in pairs])
            for completion in sequences.completions:
                self._check_end(completion)
            encoded.append(sequences)
        return encoded

    def _joined_ids(self, turns: Sequence[Turn]) -> dict[Turn, tuple[list[int], list[int]]]:
        """Token ids of each turn's prompt, and of prompt and completion as one text.

        What stands before the prompt's last added token is tokenized once, since no token reaches across that one.
        """
        prompts = list({turn.prompt: None for turn in turns})
        starts = dict(zip(prompts, self._tokenize(prompts, self._divides), strict=True))
        before = {prompt: self._divide(prompt, ids) for prompt, ids in starts.items()}
        texts = list({turn: turn.prompt[before[turn.prompt][1] :] + turn.completion for turn in turns}.items())
        rests = self._tokenize([text for _, text in texts], self._divides)
        found = {}
        for (turn, _), rest in zip(texts, rests, strict=True):
            start, count = starts[turn.prompt], before[turn.prompt][0]
            if count and rest[: len(start) - count] != start[count:]:  # perhaps not divided as it was thought to be
                [rest], count = self._tokenize([turn.prompt + turn.completion]), 0
            found[turn] = start, start[:count] + rest
        if self._divides and self._tried_whole < TRIED_WHOLE:
            tried = list(found)[:TRIED_WHOLE]
            self._tried_whole += len(tried)
            whole = self._tokenize([text for turn in tried for text in (turn.prompt, turn.prompt + turn.completion)])
            if [ids for turn in tried for ids in found[turn]] != whole:
                self._divides = False
                return self._joined_ids(turns)
        return found

    def _divide(self, prompt: str, ids: list[int]) -> tuple[int, int]:
        """Where the last added token of a prompt is, among its ids and in its text; the beginning if nowhere."""
        if self._divides:
            last = next((index for index in reversed(range(len(ids))) if ids[index] in self._dividers), 0)
            place = prompt.rfind(self._dividers[ids[last]]) if last else -1
            if place > 0:
                return last, place
        return 0, 0

    def _turns(self, row: Exchange) -> list[Turn] | str:
        """Prompt and completion of each side as texts, or the reason why the row can't be used."""
        prompt = self._render(row.prompt, True, None, row.tools, row.where)
        if not text_of(row.completions[0]).strip():
            return EMPTY
        found = []
        for completion in row.completions:
            turn = self._turn(prompt, completion, row)
            if turn is None:
                return NOT_A_PREFIX
            if not _says(turn.completion, completion):
                return DROPPED
            found.append(turn)
        return found

    def _turn(self, prompt: str, completion: list[Message], row: Exchange) -> Turn | None:
        whole = self._render(row.prompt + completion, False, None, row.tools, row.where)
        thought, bare = thinking.split(completion[-1])
        opened = thinking.opening(prompt) if not whole.startswith(prompt) else ""
        lost = thought is not None and _squeezed(thought) not in _squeezed(whole[len(prompt) - len(opened) :])
        if self.thinking is None:
            if opened or lost:
                raise self._thinking_fault(opened.strip(), lost, row.where)
            return Turn(prompt, whole[len(prompt) :]) if whole.startswith(prompt) else None
        if self.thinking == "keep" and not (opened or lost):
            return Turn(prompt, whole[len(prompt) :]) if whole.startswith(prompt) else None
        answer = self._render([*row.prompt, *completion[:-1], bare], False, None, row.tools, row.where)
        return thinking.build(prompt, answer, thought, self.thinking)

    def _thinking_fault(self, opened: str, lost: bool, where: str | None) -> UserError:
        does = [f"writes {opened} into the generation prompt"] if opened else []
        does += ["takes thinking out of answers"] if lost or self._strips() else []
        return UserError(
            f"the chat template {' and '.join(does)}: what would be trained is not what the model writes",
            where=where,
            hint=thinking.SET,
        )

    def _strips(self) -> bool:
        """Whether the template leaves the thinking of an answer out."""
        ask: list[Message] = [{"role": "user", "content": "hi"}]
        reply: Message = {"role": "assistant", "content": "<think>\nbecause\n</think>\n\nso"}
        return "because" not in self._render([*ask, reply], False, None, None)

    def _render(
        self,
        messages: list[Message],
        answer_next: bool,
        template: str | None = None,
        tools: list[Tool] | None = None,
        where: str | None = None,
        **more: Any,
    ) -> str:
        from jinja2.exceptions import TemplateError  # it is there where a tokenizer is

        try:
            text: str = self.tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=answer_next,
                **self.chat_template_kwargs,
                **more,
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            roles = " ".join(message["role"] for message in messages)
            raise UserError(
                f"the chat template refuses this conversation ({roles}): {' '.join(str(error).split())}",
                where=where,
                hint="mend the row, or --set model.chat_template=FILE with a template that takes such conversations",
            ) from None
        return text

    def _tokenize(self, texts: list[str], fast: bool = False) -> list[list[int]]:
        """Token ids of texts; `fast` asks the tokenizer's backend itself, which then keeps nothing but them."""
        if not texts:
            return []
        if fast:
            backend = self.tokenizer.backend_tokenizer
            backend.no_padding()
            backend.no_truncation()
            return [found.ids for found in backend.encode_batch_fast(texts, add_special_tokens=False)]
        # The template writes BOS itself where the model wants one.
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _length(self, sequences: Sequences) -> int:
        return len(sequences.prompt) + max(map(len, sequences.completions))

    def _shorten(self, row: Exchange, room: int) -> list[Message] | None:
        """The prompt without as little of its oldest part as fits into `room` tokens; None if nothing fits."""
        prompt = row.prompt
        cuts = list(_cuts(prompt))

        def fits(cut: tuple[int, int]) -> bool:
            [ids] = self._tokenize([self._render(_cut(prompt, *cut), True, None, row.tools, row.where)])
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


def _says(rendered: str, completion: list[Message]) -> bool:
    """Whether a rendered completion holds the texts of its messages, thinking and white space aside."""
    there = _squeezed(rendered)
    return all(_squeezed(thinking.split(message)[1]["content"]) in there for message in completion)


def _squeezed(text: str) -> str:
    return "".join(text.split())


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
    first = prompt[turn].copy()
    first["content"] = first["content"][characters:]
    return [*prompt[: _head(prompt)], first, *prompt[turn + 1 :]]


def _head(prompt: list[Message]) -> int:
    """How many system messages the prompt begins with."""
    return next((index for index, message in enumerate(prompt) if message["role"] != "system"), len(prompt))
