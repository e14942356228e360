"""Scored rollouts of NeMo Gym to preference pairs, by the definitions of the NeMo Gym guide to DPO.

Reads a JSONL file of rollouts: `responses_create_params.input`, `reward`, and the answer under `output` (as the guide
has it) or `response.output` (as NeMo Gym writes it). Writes nothing. A pair's sides are final messages: what an answer
thought and called before is left out, and counted. Unlike the guide, which takes the last user message for the prompt,
the whole conversation is the prompt, tool calls and their results with it: the same last words after different
beginnings are different prompts.
"""

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from dpo_cli.data.bad_rows import BadRows
from dpo_cli.data.messages import read_tool_calls
from dpo_cli.data.reader import parse_rows
from dpo_cli.data.records import Message, Preference, Tool, message_key, preference_id, prompt_id, read_tools
from dpo_cli.errors import UserError
from dpo_cli.stages.pair.stratified import is_wide, stratified_places

STRATEGIES = ("same-prompt", "stratified")
ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}


class Rollout(Struct):
    """One answer and its reward; `finish_reason` is `length` where the token limit ended it, None if unknown."""

    prompt: list[Message]
    answer: list[Message]
    reward: float
    finish_reason: str | None = None
    tools: list[Tool] | None = None

    @property
    def key(self) -> str:
        """Id of its prompt."""
        return prompt_id(self.prompt, self.tools)


class RolloutStatistics(Struct, kw_only=True):
    """What the guide prints: pairs, their average gap and rewards; and what they were made of.

    `skipped` counts rollouts by the reason for which they can't be a side, `left_out` those whose answers are more than
    their last message.
    """

    rollouts: int
    prompts: int
    skipped: dict[str, int]
    left_out: dict[str, int]
    pairs: int
    average_gap: float
    average_chosen_reward: float
    average_rejected_reward: float


def pair_rollouts(
    path: Path,
    strategy: str,
    bad: BadRows | None = None,
    *,
    min_gap: float,
    high: float,
    low: float,
    max_pairs: int,
    seed: int,
) -> tuple[list[Preference], RolloutStatistics]:
    """Pairs of a file of rollouts; scores are rewards.

    Args:
        path: the rollouts.
        bad: takes rows that are no rollouts.
        strategy: `same-prompt` (best against worst of a prompt) or `stratified` (high against low rewards).
        min_gap: least difference of the rewards; the guide has 0.2.
        high: least reward of a chosen side, for `stratified`; the guide has 0.7.
        low: greatest reward of a rejected side, for `stratified`; the guide has 0.4.
        max_pairs: most pairs, for `stratified`, which would give high times low.
        seed: seed of the choice among them.

    Raises:
        UserError: `file:line` of a row that is no rollout, an unknown strategy, or the advice when no pair comes out.
    """
    if strategy not in STRATEGIES:
        raise UserError(f"'{strategy}' does not pair rollouts", where="--strategy", hint=" or ".join(STRATEGIES))
    rollouts, skipped, left_out = read_rollouts(path, bad)
    if strategy == "same-prompt":
        pairs = same_prompt(rollouts, min_gap)
    else:
        pairs = stratified(rollouts, min_gap=min_gap, high=high, low=low, max_pairs=max_pairs, seed=seed)
    prompts = Counter(rollout.key for rollout in rollouts)
    if not pairs:
        raise UserError(
            f"no pair comes out of {len(rollouts)} rollouts of {len(prompts)} prompts{_counted(skipped)}",
            where=str(path),
            hint=_advice(rollouts, prompts, strategy, min_gap, high, low),
        )
    return pairs, RolloutStatistics(
        rollouts=len(rollouts),
        prompts=len(prompts),
        skipped=dict(skipped.most_common()),
        left_out=dict(left_out),
        pairs=len(pairs),
        average_gap=statistics.fmean(pair.score_gap or 0.0 for pair in pairs),
        average_chosen_reward=statistics.fmean(pair.chosen_score or 0.0 for pair in pairs),
        average_rejected_reward=statistics.fmean(pair.rejected_score or 0.0 for pair in pairs),
    )


def read_rollouts(path: Path, bad: BadRows | None = None) -> tuple[list[Rollout], Counter[str], Counter[str]]:
    """The rollouts that can be a side; a count of the others by reason; and one of what is left out of their answers.

    Raises:
        UserError: `file:line` of a row that is no rollout.
    """
    rollouts: list[Rollout] = []
    skipped: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    for _, rollout in parse_rows(path, lambda row: read_rollout(row, left_out), bad):
        if isinstance(rollout, str):
            skipped[rollout] += 1
        else:
            rollouts.append(rollout)
    return rollouts, skipped, left_out


def read_rollout(row: dict[str, Any], left_out: Counter[str] | None = None) -> Rollout | str:
    """A rollout, or why it can't be a side of a pair.

    Args:
        row: as NeMo Gym, or its guide, has it.
        left_out: counts the answers before whose last message something else stands.

    Raises:
        ValueError: naming the field that is wrong.
    """
    parameters = row.get("responses_create_params")
    if not isinstance(parameters, dict) or "input" not in parameters:
        raise ValueError('no "responses_create_params" with an "input"')
    value = row.get("reward")
    if isinstance(value, float) and not math.isfinite(value):
        return "its reward is no number"
    if value is None:
        return "no reward"
    if not isinstance(value, (bool, int, float)):
        raise ValueError('"reward" is not a number')
    response = row if "output" in row else row.get("response")
    if not isinstance(response, dict) or response.get("output") is None:
        return "no output"
    if not isinstance(response["output"], list):
        raise ValueError('no "output", and no "response" with one, that is a list')
    prompt = _messages(parameters["input"], "input")
    if parameters.get("instructions"):
        prompt.insert(0, {"role": "system", "content": str(parameters["instructions"])})
    if not prompt or prompt[-1]["role"] not in ("user", "tool"):
        return "the prompt does not end with a user message"
    answers = _messages(response["output"], "output")
    if not answers or answers[-1]["role"] != "assistant" or not answers[-1]["content"].strip():
        return "no message in the output"
    *before, last = answers
    if left_out is not None and (before or len(last) > 2):
        left_out["tool calls and reasoning before the last message"] += 1
    answer: list[Message] = [{"role": "assistant", "content": last["content"]}]
    return Rollout(prompt, answer, float(value), _finish_reason(response), _tools(parameters.get("tools")))


def _tools(value: Any) -> list[Tool] | None:
    """Tools of the Responses API, whose functions lie a level higher, as chat templates want them."""
    found = read_tools(value)
    return found and [
        tool
        if "function" in tool or tool.get("type") != "function"
        else {"type": "function", "function": {key: inner for key, inner in tool.items() if key != "type"}}
        for tool in found
    ]


def _messages(items: Any, field: str) -> list[Message]:
    """The items of the Responses API as messages: calls in a row are one message, reasoning belongs to what follows."""
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise ValueError(f'"{field}" is not a text or a list of items')
    messages: list[Message] = []
    thought = ""
    for item in items:
        kind = item.get("type") or "message"
        if kind == "reasoning":
            thought += _reasoning(item)
            continue
        if kind == "function_call_output":
            result = item.get("output")
            text = result if isinstance(result, str) else msgspec.json.encode(result).decode()
            messages.append({"role": "tool", "content": text, "tool_call_id": str(item.get("call_id", ""))})
            continue
        if kind == "message":
            message: Message = {"role": _role(item, field), "content": _text(item.get("content"), field)}
            messages.append(message)
        elif kind == "function_call":
            [call] = read_tool_calls({"id": item.get("call_id"), "function": item}, field)
            if messages and messages[-1].get("tool_calls"):
                messages[-1]["tool_calls"].append(call)
                continue
            message = {"role": "assistant", "content": "", "tool_calls": [call]}
            messages.append(message)
        else:
            raise ValueError(f'"{field}" has an item of type {kind}, which is no message')
        if thought and message["role"] == "assistant":
            message["reasoning_content"] = thought
        thought = ""
    return messages


def _reasoning(item: dict[str, Any]) -> str:
    parts = item.get("content") or item.get("summary") or []
    return "".join(part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str))


def _role(item: dict[str, Any], field: str) -> str:
    role = item.get("role", "assistant" if field == "output" else None)
    if role not in ROLES:
        raise ValueError(f'"{field}" has a message whose role is {role!r}')
    return ROLES[role]


def _text(content: Any, field: str) -> str:
    if isinstance(content, str):
        return content
    if content is None and field == "output":
        return ""
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise ValueError(f'"{field}" has a message whose content is no text')
    if field == "input" and any(
        part.get("type", "input_text").endswith(("image", "file", "audio")) for part in content
    ):
        raise ValueError('"input" has a message that is not only text')
    return "".join(part["text"] for part in content if isinstance(part.get("text"), str))


def _finish_reason(response: dict[str, Any]) -> str | None:
    if response.get("status") == "completed":
        return "stop"
    details = response.get("incomplete_details")
    return "length" if isinstance(details, dict) and details.get("reason") == "max_output_tokens" else None


def same_prompt(rollouts: Sequence[Rollout], min_gap: float) -> list[Preference]:
    """The best against the worst rollout of each prompt, in the order of the prompts."""
    groups: dict[str, list[Rollout]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.key, []).append(rollout)
    best_worst = (
        # Of equally bad ones the last, as the guide's sort leaves it.
        (max(group, key=_reward), min(reversed(group), key=_reward))
        for group in groups.values()
    )
    return [make_pair(best, worst) for best, worst in best_worst if _is_pair(best, worst, min_gap)]


def stratified(
    rollouts: Sequence[Rollout], *, min_gap: float, high: float, low: float, max_pairs: int, seed: int
) -> list[Preference]:
    """High rewards against low ones, also of different prompts; the prompt is that of the chosen side.

    Where there are more than `max_pairs`, those of one prompt come first, then a random choice of the others: a pair
    across prompts also teaches what belongs to the prompt at all.
    """
    places = stratified_places(
        [rollout.reward for rollout in rollouts],
        [rollout.key for rollout in rollouts],
        lambda good, bad: _is_pair(rollouts[good], rollouts[bad], min_gap),
        min_gap=min_gap,
        high=high,
        low=low,
        max_pairs=max_pairs,
        seed=seed,
    )
    return [make_pair(rollouts[good], rollouts[bad]) for good, bad in places]


def _reward(rollout: Rollout) -> float:
    return rollout.reward


def _is_pair(good: Rollout, bad: Rollout, min_gap: float) -> bool:
    """Far enough apart, and not the same text."""
    if not is_wide(good.reward - bad.reward, min_gap):
        return False
    return [*map(message_key, good.answer)] != [*map(message_key, bad.answer)]


def make_pair(good: Rollout, bad: Rollout) -> Preference:
    """The pair of two rollouts, under the prompt of the better one."""
    return Preference(
        id=preference_id(good.prompt, good.answer, bad.answer, good.tools),
        prompt=good.prompt,
        tools=good.tools,
        chosen=good.answer,
        rejected=bad.answer,
        chosen_score=good.reward,
        rejected_score=bad.reward,
        score_gap=good.reward - bad.reward,
        chosen_finish_reason=good.finish_reason,
        rejected_finish_reason=bad.finish_reason,
    )


def _counted(skipped: Counter[str]) -> str:
    return "".join(f", {count} more skipped: {reason}" for reason, count in skipped.most_common())


def _advice(
    rollouts: Sequence[Rollout], prompts: Counter[str], strategy: str, min_gap: float, high: float, low: float
) -> str:
    """What the guide says when no pair comes out, with the rewards that there are."""
    if not rollouts:
        return "check that the file holds rollouts with answers"
    rewards = [rollout.reward for rollout in rollouts]
    spread = f"rewards go from {min(rewards):g} to {max(rewards):g}, median {statistics.median(rewards):g}"
    lower = f"lower --min-gap (now {min_gap:g})"
    if strategy == "stratified":
        return f"adjust the thresholds (--high {high:g}, --low {low:g}) or {lower}; {spread}"
    if prompts and max(prompts.values()) == 1:
        return f"every prompt has one rollout: collect more a prompt, or --strategy stratified; {spread}"
    return f"{lower}, or --strategy stratified; {spread}"
