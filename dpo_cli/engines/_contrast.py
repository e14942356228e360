"""Completions from two system prompts, so that a judge has something to tell apart."""

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from dpo_cli.config.settings import Config
from dpo_cli.data.records import Message, Usage
from dpo_cli.engines import Sample
from dpo_cli.engines._engine import Request, Sampled
from dpo_cli.progress import Progress

if TYPE_CHECKING:
    from dpo_cli.endpoint.costs import Receipt


def contrasted(sample: Sample, good: str, bad: str) -> Sample:
    """An engine that answers from two system prompts: a prompt's first completion from `good`, later ones from `bad`.

    Which of them is the better is for a judge to say.
    """

    def sample_both(
        requests: list[Request], config: Config, deliver: Callable[[Sampled], None], progress: Progress
    ) -> "Receipt | None":
        parts = {request.id: split(request, good, bad) for request in requests}
        owners = {part.id: key for key, split_ in parts.items() for part in split_}
        answers: dict[str, Sampled] = {}

        def take(sampled: Sampled) -> None:
            answers[sampled.id] = sampled
            key = owners[sampled.id]
            if all(part.id in answers for part in parts[key]):
                deliver(_join(key, [answers.pop(part.id) for part in parts[key]]))

        return sample([part for split_ in parts.values() for part in split_], config, take, progress)

    return sample_both


def split(request: Request, good: str, bad: str) -> list[Request]:
    """A request for each completion, with the system prompt that it is made from."""
    first = len(request.have)
    return [
        Request(
            id=f"{request.id}/{index}",
            prompt=_with_system(request.prompt, good if index == 0 else bad),
            have=request.have,
            need=1,
            tools=request.tools,
        )
        for index in range(first, first + request.need)
    ]


def _with_system(prompt: list[Message], text: str) -> list[Message]:
    """The prompt with a system text, which follows the prompt's own if it has one."""
    own = [message["content"] for message in prompt if message["role"] == "system"]
    rest = [message for message in prompt if message["role"] != "system"]
    return [{"role": "system", "content": "\n\n".join([*own, text])}, *rest]


def _join(key: str, parts: list[Sampled]) -> Sampled:
    messages = [message for part in parts for message in part.messages or [None] * len(part.texts)]
    return Sampled(
        id=key,
        texts=[text for part in parts for text in part.texts],
        finish_reasons=[reason for part in parts for reason in part.finish_reasons],
        usage=sum((part.usage for part in parts), Usage()),
        messages=messages if any(messages) else [],
        error=next((part.error for part in parts if part.error is not None), None),
        missing=dict(sum((Counter(part.missing) for part in parts), Counter())),
        changes={name: value for part in parts for name, value in part.changes.items()},
    )
