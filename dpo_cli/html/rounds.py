"""The rounds of `run` as a page: each against the one before, and how far it went from it.

Takes what `rounds.run` returned, and returns the page; writes nothing.
"""

from dpo_cli.html.markup import Markup, markup
from dpo_cli.html.page import columns, document, figure, footer, grid, verdict
from dpo_cli.html.svg import lines
from dpo_cli.workflows.rounds import Round, RoundsResult


def rounds(result: RoundsResult) -> str:
    """The page."""
    names = [f"round {one.number}" for one in result.rounds]
    stopped = [f"round {one.number} stopped: {one.stopped}" for one in result.rounds if one.stopped]
    said = stopped or [f"every round passed its gates; the adapter is {result.adapter}"]
    return document(
        f"{len(names)} rounds",
        [
            markup('<h1>{}</h1><p class="dim">Each round against the one before, on held-out prompts.</p>', "Rounds"),
            markup('<ul class="findings"><li class="{}">{}</li></ul>', "" if stopped else "calm", "; ".join(said)),
            _plots(result, names),
            columns(
                ("round", "pairs", "held out", "win rate", "95%", "score", "KL a completion", "dollars", "gates"),
                map(_row, result.rounds),
            ),
            footer("Shaded: 95% intervals by prompt. Win rates are against the adapter that the round started from."),
        ],
    )


def _plots(result: RoundsResult, names: list[str]) -> Markup:
    held = [(float(place), one.evaluation) for place, one in enumerate(result.rounds) if one.evaluation]
    wins = [(place, one.win_rate) for place, one in held]
    band = [(place, *one.interval) for place, one in held]
    kls = [(place, one.kl.nats_per_sequence) for place, one in held if one.kl]
    scores = [(place, one.scores.policy) for place, one in held if one.scores]
    cards = [
        figure("Win rate", "Dashed: as good as the round before.", lines(
            "Win rate", {"win rate": wins}, "", "", {"win rate": band}, names, 0.5)),
    ]  # fmt: skip
    for title, caption, curve in (
        ("KL, nats a completion", "From the round before.", kls),
        ("Score", "Mean rating of single answers.", scores),
    ):
        if curve:
            cards.append(figure(title, caption, lines(title, {title: curve}, "", "", None, names)))
    return grid("thirds", cards)


def _row(one: Round) -> list[str]:
    held = one.evaluation
    kl = held.kl.nats_per_sequence if held and held.kl else None
    return [
        str(one.number),
        f"{one.pairs:,}",
        f"{one.held_out:,}",
        "–" if held is None else f"{held.win_rate:.3f}",
        "–" if held is None else f"[{held.interval[0]:.3f}, {held.interval[1]:.3f}]",
        "–" if held is None or held.scores is None else f"{held.scores.reference:.2f} → {held.scores.policy:.2f}",
        "–" if kl is None else f"{kl:.3g}",
        f"{one.usd:.2f}",
        verdict("fail" if one.stopped else "pass"),
    ]
