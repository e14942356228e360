"""What votes and criteria buy: a judge of known noise ranks answers whose quality is known.

    python tests/bench/votes.py [--prompts 400] [--votes 1,2,3,5,8]

The judge is a loopback server. Its score of a text is the text's quality plus three kinds of noise: one that stays for
a text and a criterion (its taste), one of each call, and a preference for what is shown first. Votes average the last
two out, criteria the first; nothing here says how noisy a real judge is. Each line is a whole `judge` and `pair` run:
the share of prompts whose best answer ranks first (ties share), the share of prompts that give a pair, how many of
these pairs are right, and what 1,000 prompts cost at the given price. The last lines are a panel of three models, one
of which is much noisier than the others.
"""

import argparse
import random
import re
import sys
import tempfile
from pathlib import Path
from statistics import fmean

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from judging import reply  # noqa: E402
from openai_server import Call, Server, candidates  # noqa: E402

from dpo_cli.config.settings import Config, JudgeSection, PairSection  # noqa: E402
from dpo_cli.data.jsonl import read_latest, write_rows  # noqa: E402
from dpo_cli.data.records import Completions, Judgment, Preference, prompt_id  # noqa: E402
from dpo_cli.errors import UserError  # noqa: E402
from dpo_cli.progress import Silent  # noqa: E402
from dpo_cli.stages import judge  # noqa: E402
from dpo_cli.stages.pair import run as pair  # noqa: E402

CRITERIA = ("Truth", "Warmth", "Clarity")
WHOLE = "Judge the answers by " + ", ".join(CRITERIA) + "."
APART = "Judge the answers.\n\n" + "\n\n".join(f"## {name}\n\nHow good it is in {name}." for name in CRITERIA)


def quality(number: int, side: int) -> float:
    """The quality of a text, which its words name: answers of one prompt lie within 2.5 points of each other."""
    return random.Random(f"prompt {number}").uniform(3.5, 6) + random.Random(f"{number}/{side}").uniform(0, 2.5)


# Models of a panel, and how many times as much noise as the judge's they have.
PANEL = {"judge-a": 0.5, "judge-b": 1.0, "judge-c": 3.0}


def noisy(taste: float, call: float, first: float):
    """A judge whose noise has these standard deviations, in points; `first` is its preference for the first place."""

    def answer(asked: Call) -> str:
        criterion = re.search(r"How good it is in (\w+)", asked.text)
        name = criterion[1] if criterion else "whole"
        shown = candidates(asked.body["messages"][-1]["content"])
        scores = {}
        times = PANEL.get(asked.body["model"], 1.0)
        for place, (label, text) in enumerate(shown.items()):
            number, side = map(int, re.findall(r"\d+", text))
            stays = random.Random(f"{asked.body['model']} {name} {text}").gauss(0, taste)
            passes = random.Random(f"{asked.key} {asked.attempt} {label}").gauss(0, call)
            value = quality(number, side) + times * (stays + passes) + first * (place == 0)
            scores[label] = round(max(1, min(10, value)))
        return "reply!" + reply(scores)

    return answer


def keyed(count: int, answers: int) -> list[Completions]:
    """Prompts with answers of known quality."""
    rows = []
    for number in range(count):
        prompt = [{"role": "user", "content": f"Question {number}?"}]
        texts = [f"Answer {number} of side {side}." for side in range(answers)]
        rows.append(
            Completions(
                id=prompt_id(prompt),
                prompt=prompt,
                completions=texts,
                finish_reasons=["stop"] * answers,
                model="w",
                sampling={},
            )
        )
    return rows


def worth(text: str) -> float:
    """The quality that a text's words name."""
    number, side = map(int, re.findall(r"\d+", text))
    return quality(number, side)


def share_right(rows: list[Completions], scores: dict[str, list[float]]) -> float:
    """The share of prompts whose best answer has the highest score; ties share."""
    won = 0.0
    for row in rows:
        given = scores[row.id]
        top = [text for text, score in zip(row.completions, given, strict=True) if score == max(given)]
        won += sum(worth(text) == max(map(worth, row.completions)) for text in top) / len(top)
    return won / len(rows)


def of_models(judgment: Judgment) -> dict[str, list[float]]:
    """The mean scores of each model of a panel."""
    given: dict[str, list[list[float]]] = {}
    for order in judgment.orders or []:
        by_index = {index: order.scores["ABCDEFGH"[place]] for place, index in enumerate(order.order)}
        given.setdefault(order.model or "", []).append([by_index[index] for index in sorted(by_index)])
    return {model: [fmean(scores) for scores in zip(*orders, strict=True)] for model, orders in given.items()}


def show_panel(rows: list[Completions], url: str, folder: Path, price: str) -> None:
    """A panel's accuracy with equal weights and by agreement, beside that of its models."""
    measure(rows, url, folder, WHOLE, price, model=list(PANEL), votes=2)
    judgments = read_latest(folder / "judgments.jsonl", Judgment)
    alone = {key: of_models(judgment) for key, judgment in judgments.items()}
    equal = {key: [fmean(scores) for scores in zip(*each.values(), strict=True)] for key, each in alone.items()}
    weighted = {key: judgment.scores or [] for key, judgment in judgments.items()}
    weights = next(iter(judgments.values())).weights
    print(f"\npanel of {len(PANEL)}, 2 votes each")
    for model, times in PANEL.items():
        right = share_right(rows, {key: each[model] for key, each in alone.items()})
        print(f"{model}, noise times {times:g}: {right:.1%} right, weight {weights[model]:.2f}")
    print(f"equal weights: {share_right(rows, equal):.1%} right; by agreement: {share_right(rows, weighted):.1%}")


def measure(rows: list[Completions], url: str, folder: Path, rubric: str, price: str, **settings) -> dict[str, float]:
    """One whole run."""
    write_rows(folder / "completions.jsonl", rows)
    (folder / "rubric.md").write_text(rubric)
    section = JudgeSection(url=url, rubric=str(folder / "rubric.md"), price=price, concurrency=32, **settings)
    config = Config(data=str(folder), judge=section, pair=PairSection(val_share=0.0))
    result = judge.run(config, Silent())
    judgments = read_latest(folder / "judgments.jsonl", Judgment)
    right_first = share_right(rows, {row.id: judgments[row.id].scores or [0.0] * len(row.completions) for row in rows})
    try:
        kept = pair.run(config).train
    except UserError:
        kept = 0
    pairs = read_latest(folder / "train.jsonl", Preference).values() if kept else []
    right = sum(worth(one.chosen[0]["content"]) > worth(one.rejected[0]["content"]) for one in pairs)
    return {
        "right": right_first,
        "kept": kept / len(rows),
        "pairs right": right / kept if kept else 0.0,
        "usd": 1000 * result.usd / len(rows),
        "calls": result.calls,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy, cost and pairs kept, by votes and criteria.")
    parser.add_argument("--prompts", type=int, default=400)
    parser.add_argument("--answers", type=int, default=2, help="of each prompt")
    parser.add_argument("--votes", default="1,2,3,5,8")
    parser.add_argument("--taste", type=float, default=0.8, help="points of noise that stay for a text and criterion")
    parser.add_argument("--call", type=float, default=1.7, help="points of noise of each call")
    parser.add_argument("--first", type=float, default=0.5, help="points for the first place")
    parser.add_argument("--price", default="0.75,0.075,4.5")
    options = parser.parse_args()
    rows = keyed(options.prompts, options.answers)
    votes = [int(count) for count in options.votes.split(",")]
    print(f"{len(rows)} prompts, {options.answers} answers each; noise: {options.taste} stays, {options.call} a call, "
          f"{options.first} for the first place")  # fmt: skip
    print(f"{'rubric':<12}{'votes':>6}{'right':>9}{'pairs kept':>12}{'pairs right':>13}{'$ a 1,000':>11}{'calls':>8}")
    with (
        Server(fault=noisy(options.taste, options.call, options.first)) as server,
        tempfile.TemporaryDirectory() as top,
    ):
        for name, rubric in (("whole", WHOLE), ("3 criteria", APART)):
            for count in votes:
                folder = Path(top) / f"{name}{count}"
                folder.mkdir()
                found = measure(rows, server.url, folder, rubric, options.price, model="judge", votes=count)
                print(
                    f"{name:<12}{count:>6}{found['right']:>9.1%}{found['kept']:>12.1%}{found['pairs right']:>13.1%}"
                    f"{found['usd']:>11.2f}{found['calls']:>8,.0f}",
                    flush=True,
                )
                server.calls.clear()
        folder = Path(top) / "panel"
        folder.mkdir()
        show_panel(rows, server.url, folder, options.price)


if __name__ == "__main__":
    main()
