"""Why prompts give no pair, and what to do where none does."""

from collections import Counter
from pathlib import Path

from dpo_cli.config.settings import PairSection
from dpo_cli.errors import Exit, UserError

FAILED = "the judge failed"
INVERTED = "an order inverts the pair"
POSITION = "position: the judge's orders contradict each other"
SAME = "both sides say the same"
TIE, SMALL_GAP = "a tie", "the gap is below min_gap"
TOO_CLOSE = (TIE, SMALL_GAP)
NOT_HIGH = "no score is high, or none that is low goes with it"
_MORE_ORDERS = "more orders average it out: nothing-dpo judge --votes 6; or a stronger judge model"

# What to try, by the reason that is most frequent.
_HINTS = {
    "not judged yet": "nothing-dpo judge",
    FAILED: "nothing-dpo judge, which asks again; if it fails as before, another --model",
    "judged before its completions changed": "nothing-dpo judge",
    SMALL_GAP: "a lower --min-gap, or more completions a prompt: nothing-dpo generate --n 5",
    TIE: "more completions a prompt: nothing-dpo generate --n 5",
    INVERTED: f"--no-require-consistent, or {_MORE_ORDERS}",
    POSITION: _MORE_ORDERS,
    NOT_HIGH: "a lower --high, a higher --low, or --strategy best-worst",
}
# What to try where the judge failed, by a word of its most frequent fault.
_JUDGE_HINTS = {
    "reasoning_content": "start the judge's server without a reasoning parser, or nothing-dpo judge --extra-body "
    """'{"chat_template_kwargs": {"enable_thinking": false}}'""",
    "cut off": "--max-tokens 4096 for nothing-dpo judge, or --reasoning-effort low",
    "context": "a judge that reads longer messages, or fewer completions a prompt",
    "no JSON object": "a judge that writes JSON: nothing-dpo judge --model NAME",
}
SHOWN_REASONS = 5


def no_pair(skipped: Counter[str], min_gap: float, errors: Counter[str]) -> UserError:
    """That no pair came out, why, and what to do about the most frequent reason; `errors` are the judge's."""
    most = skipped.most_common(1)[0][0]
    hint = _HINTS.get(most, "more varied completions: nothing-dpo generate --temperature 1.0 --n 5")
    if most == FAILED:
        fault = errors.most_common(1)[0][0]
        hint = next((advice for word, advice in _JUDGE_HINTS.items() if word in fault), hint)
    if most == SMALL_GAP:
        hint += f" (min_gap is {min_gap:g})"
    message = f"no pair comes out of {skipped.total()} prompts: {counted(skipped)}"
    message += f" ({counted(errors)})" if most == FAILED else ""
    return UserError(message, hint=hint, code=Exit.FAILED if most == FAILED else Exit.USAGE)


def counted(skipped: Counter[str]) -> str:
    """The most frequent reasons with their counts."""
    said = [f"{count} x {reason}" for reason, count in skipped.most_common(SHOWN_REASONS)]
    others = skipped.total() - sum(count for _, count in skipped.most_common(SHOWN_REASONS))
    return ", ".join(said + [f"{others} x other reasons"] * (others > 0))


def no_judgments(path: Path) -> UserError:
    """That there is nothing to make pairs of."""
    return UserError("no judgments", where=str(path), hint="nothing-dpo judge")


def warn_of_split(train: int, val: int, settings: PairSection) -> list[str]:
    """What is odd about the split. It is not mended: moving a prompt across would break it for every later run."""
    if not val and settings.val_share > 0:
        return [
            f"val.jsonl is empty: none of the {train} pairs' prompts falls into the share of "
            f"{settings.val_share:g}; make more pairs or raise pair.val_share, else there is nothing to evaluate on"
        ]
    if not train:
        return [f"train.jsonl is empty: all {val} pairs are held out; make more pairs or lower pair.val_share"]
    return []
