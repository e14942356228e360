"""The audit of a judge as a page.

Takes what `audit` found and returns the page; writes nothing. Text is escaped by default.
"""

import re
from collections.abc import Iterable

from dpo_cli.analysis.judge_audit import Audit, Example, JudgeAudit, LengthEffect
from dpo_cli.analysis.reliability import Reliability, verdict
from dpo_cli.data.records import Judgment
from dpo_cli.html.markup import Markup, escaped, joined, markup
from dpo_cli.html.page import document, figure, footer, grid, tile
from dpo_cli.html.svg import bars, interval, lines, scatter
from dpo_cli.judges._ranking import label_of
from dpo_cli.statistics import Histogram, Interval

TEXT_SHOWN = 1_200  # characters of an example's text
HALF = 0.5
_COMMAND = re.compile("`(.*?)`")


def audit(found: Audit) -> str:
    """The page."""
    names = " and ".join(found.judges) or "nobody"
    facts = [f"{found.judged:,} of {found.total:,} prompts judged"]
    if found.usage.input:
        facts.append(f"{found.usage.input:,} tokens in, {found.usage.output:,} out")
    facts.append(f"${found.usd:,.2f}" if found.usd >= 1 or not found.usd else f"${found.usd:,.4f}")
    findings = joined(markup("<li>{}</li>", _with_commands(finding)) for finding in found.findings)
    body = [
        markup('<h1>What the judge did</h1><p class="dim">{} · {}</p>', names, " · ".join(facts)),
        markup('<ul class="findings">{}</ul>', findings or Markup("<li class=calm>Nothing stands out.</li>")),
        grid("tiles", _tiles(found)),
        *(_judge(name, judge) for name, judge in found.judges.items()),
        _between(found.between_judges),
        _length(found.length, found.length_controlled),
        grid("plots", [_reasons("Skipped", found.skipped), _reasons("Errors", found.errors)]),
        Markup("<h2>Worth a look</h2>") + joined(map(_example, found.examples)) if found.examples else "",
        footer("Intervals are 95%. Length is in characters, its slope within prompts."),
    ]
    return document(f"Judge audit: {names}", body)


def _with_commands(text: str) -> Markup:
    return Markup(_COMMAND.sub(r"<code>\1</code>", escaped(text)))


def _tiles(found: Audit) -> Iterable[str]:
    if found.scores is not None and found.gaps is not None:
        yield tile(f"{found.scores.mean:.2f}", "mean score")
        yield tile(f"{found.gaps.mean:.2f}", "mean of best − worst")
    if found.consistent is not None:
        yield tile(f"{found.consistent.value:.1%}", "best and worst the same in every order")
    if found.skipped_share is not None:
        yield tile(f"{found.skipped_share.value:.1%}", "skipped")
    if found.errors:
        yield tile(f"{sum(found.errors.values()):,}", "errors")


def _judge(name: str, judge: JudgeAudit) -> Markup:
    cards = []
    if judge.first_wins is not None and judge.expected_first is not None:
        caption = f"Orders in which the first candidate wins; {judge.undecided:,} without a single best are left out."
        wins = _interval("first shown wins", judge.first_wins, judge.expected_first)
        cards.append(figure("Does it prefer what it sees first?", caption, wins + _places(name, judge.places)))
    several = judge.orders > judge.judgments
    tiles = grid("tiles", _reliability(judge.between_orders, "orders")) if several else Markup()
    cards.append(markup('<div class="grid stack">{}{}</div>', _histogram(judge.scores), tiles))
    return markup("<h2>{}</h2>{}", name, grid("plots", cards))


def _places(name: str, places: list[Interval]) -> Markup:
    caption = Markup("<figcaption>Mean score by place of display, less the mean of its order.</figcaption>")
    return caption + lines(
        "Mean score by place of display",
        {name: [(place, found.value) for place, found in enumerate(places)]},
        "place of display",
        "points",
        {name: [(place, found.low, found.high) for place, found in enumerate(places)]},
        [label_of(place) for place in range(len(places))],
    )


def _interval(name: str, found: Interval, mark: float) -> Markup:
    return interval(f"{name}, of {found.n:,}", found.low, found.value, found.high, mark)


def _histogram(found: Histogram | None) -> Markup:
    if found is None:
        return Markup()
    caption = "Every score it gave. A judge that uses two or three values can't rank much."
    return figure("How it uses its scale", caption, bars("Scores", found.labels, found.counts, "score"))


def _reliability(found: Reliability, between: str) -> Iterable[str]:
    if found.flips is not None:
        yield tile(f"{found.flips.value:.1%}", f"of {found.flips.n:,} pairs flip between {between}")
    if found.tau is not None:
        yield tile(f"{found.tau:.2f}", f"Kendall τ-b between {between}")
    if found.alpha is not None:
        yield tile(f"{found.alpha:.2f}", f"Krippendorff α, {verdict(found.alpha)}")


def _between(found: Reliability | None) -> Markup:
    return Markup("<h2>Between the judges</h2>") + grid("tiles", _reliability(found, "judges")) if found else Markup()


def _length(raw: LengthEffect, controlled: LengthEffect) -> Markup:
    if raw.slope is None:
        return Markup()
    cards = []
    for name, effect in (("as given", raw), ("with --length-control", controlled)):
        slope = effect.slope.value if effect.slope else 0.0
        plot = scatter(
            f"Score against length, {name}",
            effect.points,
            slope,
            "100 characters above the prompt's mean",
            "points above the prompt's mean",
        )
        if effect.longer_chosen:
            plot += _interval("longer one chosen", effect.longer_chosen, HALF)
        cards.append(figure(f"Scores {name}", f"{_slope(effect.slope)} points per 100 characters.", plot))
    return Markup("<h2>Length</h2>") + grid("plots", cards)


def _slope(slope: Interval | None) -> str:
    if slope is None:
        return "–"
    return f"{round(slope.value, 2) + 0:+.2f} ({slope.low:+.2f} – {slope.high:+.2f})".replace("-", "−")


def _reasons(title: str, counts: dict[str, int]) -> Markup:
    if not counts:
        return Markup()
    rows = joined(markup("<tr><td>{}</td><td>{:,}</td></tr>", reason, count) for reason, count in counts.items())
    return markup('<div><h2>{}</h2><div class="card"><table>{}</table></div></div>', title, rows)


def _example(example: Example) -> Markup:
    row, judged = example.judgment, example.completions
    note = row.skipped or "scores " + ", ".join(f"{score:.3g}" for score in row.scores or [])
    parts = [markup('<h3>{}</h3><p class="dim">{} · {}</p>', example.why.capitalize(), row.id, note)]
    if judged is not None:
        parts.append(markup('<div class="prompt">{}</div>', _text(judged.prompt[-1]["content"])))
        ranking = row.ranking or range(len(judged.completions))
        parts += [
            _answer(row, judged.completions[index], index, place, len(ranking))
            for place, index in enumerate(ranking)
            if index < len(judged.completions)
        ]
    return markup('<div class="card example">{}</div>', joined(parts))


def _answer(row: Judgment, text: str, index: int, place: int, count: int) -> Markup:
    given = [
        f"{order.scores[label]:.3g} shown as {label}"
        for order in row.orders or []
        if index in order.order and (label := label_of(order.order.index(index))) in order.scores
    ]
    score = f"{row.scores[index]:.3g}" if row.scores and index < len(row.scores) else "no score"
    kind = "" if not row.scores else " best" if place == 0 else " worst" if place == count - 1 else Markup()
    head = " · ".join([f"completion {index}", f"{len(text):,} characters", *given])
    return markup('<div class="answer{}"><b>{}</b> <span class="dim">{}</span>{}</div>', kind, score, head, _text(text))


def _text(text: str) -> Markup:
    cut = text if len(text) <= TEXT_SHOWN else text[:TEXT_SHOWN] + " …"
    return markup('<p class="text">{}</p>', cut)
