"""The audit of a judge as one HTML page: self-contained, light and dark, without scripts.

Takes what `audit` found and returns the page; writes nothing. It loads nothing, and its policy forbids that anything
in it could; text that models wrote is escaped.
"""

import re
from collections.abc import Iterable

from dpo_cli.audit import Audit, Estimate, Example, JudgeAudit, LengthEffect, Reliability, verdict
from dpo_cli.judges import label_of
from dpo_cli.schema import Judgment
from dpo_cli.stats import Histogram, Proportion
from dpo_cli.svg import STYLE, bars, escaped, interval, lines, scatter

TEXT_SHOWN = 1_200  # characters of an example's text
HALF = 0.5
_COMMAND = re.compile("`(.*?)`")

CSS = """
:root { color-scheme: light dark; --paper: #f7f6f3; --card: #fff; --ink: #1d1f24; --dim: #6b7078; --line: #e4e2dc;
  --good: #2f8f5b; --bad: #d2622a; --series-0: #3b6fb6; --series-1: #c2527c; --series-2: #7a8b2f; --series-3: #7d5bb5; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15171b; --card: #1e2127; --ink: #e8e6e1; --dim: #9aa0a8; --line: #343840;
    --good: #58c08a; --bad: #f0894f; --series-0: #78a8ea; --series-1: #e88bb0; --series-2: #b5c763;
    --series-3: #b699ec; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 3rem; max-width: 68rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.7rem; letter-spacing: -.02em; }
h2 { margin: 2.4rem 0 .8rem; font-size: 1.15rem; }
h3 { margin: 0 0 .2rem; font-size: .95rem; }
p { margin: 0; }
.dim, figcaption { color: var(--dim); }
figcaption, .card p.dim { font-size: .85rem; margin-bottom: .7rem; }
.grid { display: grid; gap: .9rem; }
.stack { grid-template-rows: 1fr; align-content: stretch; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr)); }
.plots { grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
.card { margin: 0; padding: .9rem 1.1rem; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  min-width: 0; }
.tile b { display: block; font-size: 1.5rem; font-weight: 600; letter-spacing: -.02em; line-height: 1.3;
  font-variant-numeric: tabular-nums; }
.tile span { font-size: .85rem; color: var(--dim); }
.findings { margin: 1.4rem 0; padding: 0; list-style: none; }
.findings li { padding: .55rem .9rem; margin-bottom: .45rem; border-left: 4px solid var(--bad); background: var(--card);
  border-radius: 0 8px 8px 0; }
.findings li.calm { border-color: var(--good); }
.text { white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0 0; font: inherit; }
.answer { margin-top: .8rem; padding-left: .8rem; border-left: 3px solid var(--line); }
.answer.best { border-color: var(--good); }
.answer.worst { border-color: var(--bad); }
table { border-collapse: collapse; width: 100%; }
code { white-space: nowrap; font: .92em ui-monospace, monospace; }
svg + figcaption { margin-top: 1.1rem; }
svg + svg { margin-top: 1rem; }
.example { margin-bottom: .9rem; }
.prompt { margin-top: .6rem; padding: .4rem .8rem .6rem; background: var(--paper); border-radius: 8px; }
tr:first-child td { border-top: 0; }
td { padding: .25rem 0; border-top: 1px solid var(--line); }
td:last-child { text-align: right; font-variant-numeric: tabular-nums; }
footer { margin-top: 2.5rem; font-size: .85rem; color: var(--dim); }
"""


def page(found: Audit) -> str:
    """The page."""
    names = " and ".join(found.judges) or "nobody"
    facts = [f"{found.judged:,} of {found.total:,} prompts judged"]
    if found.usage.input:
        facts.append(f"{found.usage.input:,} tokens in, {found.usage.output:,} out")
    facts.append(f"${found.usd:,.2f}" if found.usd >= 1 or not found.usd else f"${found.usd:,.4f}")
    findings = "".join(f"<li>{_with_commands(finding)}</li>" for finding in found.findings)
    body = [
        f'<h1>What the judge did</h1><p class="dim">{escaped(names)} · {escaped(" · ".join(facts))}</p>',
        f'<ul class="findings">{findings or "<li class=calm>Nothing stands out.</li>"}</ul>',
        _grid("tiles", _tiles(found)),
        *(_judge(name, judge) for name, judge in found.judges.items()),
        _between(found.between_judges),
        _length(found.length, found.length_controlled),
        _grid("plots", [_reasons("Skipped", found.skipped), _reasons("Errors", found.errors)]),
        "<h2>Worth a look</h2>" + "".join(map(_example, found.examples)) if found.examples else "",
        "<footer>Intervals are 95%. Length is in characters, its slope within prompts. Made by nothing-dpo.</footer>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Judge audit: {escaped(names)}</title><style>{CSS}{STYLE}</style></head>"
        f"<body>{''.join(body)}</body></html>\n"
    )


def _grid(kind: str, cards: Iterable[str]) -> str:
    inside = "".join(cards)
    return f'<div class="grid {kind}">{inside}</div>' if inside else ""


def _with_commands(text: str) -> str:
    return _COMMAND.sub(r"<code>\1</code>", escaped(text))


def _tile(value: str, name: str) -> str:
    return f'<div class="card tile"><b>{escaped(value)}</b><span>{escaped(name)}</span></div>'


def _figure(title: str, caption: str, plot: str) -> str:
    return f'<figure class="card"><h3>{escaped(title)}</h3><figcaption>{escaped(caption)}</figcaption>{plot}</figure>'


def _tiles(found: Audit) -> Iterable[str]:
    if found.scores is not None and found.gaps is not None:
        yield _tile(f"{found.scores.mean:.2f}", "mean score")
        yield _tile(f"{found.gaps.mean:.2f}", "mean of best − worst")
    if found.consistent is not None:
        yield _tile(f"{found.consistent.share:.1%}", "best and worst the same in every order")
    if found.skipped_share is not None:
        yield _tile(f"{found.skipped_share.share:.1%}", "skipped")
    if found.errors:
        yield _tile(f"{sum(found.errors.values()):,}", "errors")


def _judge(name: str, judge: JudgeAudit) -> str:
    cards = []
    if judge.first_wins is not None and judge.expected_first is not None:
        caption = f"Orders in which the first candidate wins; {judge.undecided:,} without a single best are left out."
        wins = _interval("first shown wins", judge.first_wins, judge.expected_first)
        cards.append(_figure("Does it prefer what it sees first?", caption, wins + _places(name, judge.places)))
    several = judge.orders > judge.judgments
    tiles = _grid("tiles", _reliability(judge.between_orders, "orders")) if several else ""
    cards.append(f'<div class="grid stack">{_histogram(judge.scores)}{tiles}</div>')
    return f"<h2>{escaped(name)}</h2>{_grid('plots', cards)}"


def _places(name: str, places: list[Estimate]) -> str:
    caption = "<figcaption>Mean score by place of display, less the mean of its order.</figcaption>"
    return caption + lines(
        "Mean score by place of display",
        {name: [(place, found.value) for place, found in enumerate(places)]}, "place of display", "points",
        {name: [(place, found.low, found.high) for place, found in enumerate(places)]},
        [label_of(place) for place in range(len(places))],
    )  # fmt: skip


def _interval(name: str, found: Proportion, mark: float) -> str:
    return interval(f"{name}, of {found.n:,}", found.low, found.share, found.high, mark)


def _histogram(found: Histogram | None) -> str:
    if found is None:
        return ""
    caption = "Every score it gave. A judge that uses two or three values can't rank much."
    return _figure("How it uses its scale", caption, bars("Scores", found.labels, found.counts, "score"))


def _reliability(found: Reliability, between: str) -> Iterable[str]:
    if found.flips is not None:
        yield _tile(f"{found.flips.share:.1%}", f"of {found.flips.n:,} pairs flip between {between}")
    if found.tau is not None:
        yield _tile(f"{found.tau:.2f}", f"Kendall τ-b between {between}")
    if found.alpha is not None:
        yield _tile(f"{found.alpha:.2f}", f"Krippendorff α, {verdict(found.alpha)}")


def _between(found: Reliability | None) -> str:
    return "<h2>Between the judges</h2>" + _grid("tiles", _reliability(found, "judges")) if found else ""


def _length(raw: LengthEffect, controlled: LengthEffect) -> str:
    if raw.slope is None:
        return ""
    cards = []
    for name, effect in (("as given", raw), ("with --length-control", controlled)):
        slope = effect.slope.value if effect.slope else 0.0
        plot = scatter(
            f"Score against length, {name}", effect.points, slope, "100 characters above the prompt's mean",
            "points above the prompt's mean",
        )  # fmt: skip
        if effect.longer_chosen:
            plot += _interval("longer one chosen", effect.longer_chosen, HALF)
        cards.append(_figure(f"Scores {name}", f"{_slope(effect.slope)} points per 100 characters.", plot))
    return "<h2>Length</h2>" + _grid("plots", cards)


def _slope(slope: Estimate | None) -> str:
    if slope is None:
        return "–"
    return f"{round(slope.value, 2) + 0:+.2f} ({slope.low:+.2f} – {slope.high:+.2f})".replace("-", "−")


def _reasons(title: str, counts: dict[str, int]) -> str:
    if not counts:
        return ""
    rows = "".join(f"<tr><td>{escaped(reason)}</td><td>{count:,}</td></tr>" for reason, count in counts.items())
    return f'<div><h2>{title}</h2><div class="card"><table>{rows}</table></div></div>'


def _example(example: Example) -> str:
    row, judged = example.judgment, example.completions
    note = row.skipped or "scores " + ", ".join(f"{score:.3g}" for score in row.scores or [])
    parts = [f'<h3>{escaped(example.why.capitalize())}</h3><p class="dim">{escaped(row.id)} · {escaped(note)}</p>']
    if judged is not None:
        parts.append(f'<div class="prompt">{_text(judged.prompt[-1]["content"])}</div>')
        ranking = row.ranking or range(len(judged.completions))
        parts += [
            _answer(row, judged.completions[index], index, place, len(ranking))
            for place, index in enumerate(ranking) if index < len(judged.completions)
        ]  # fmt: skip
    return f'<div class="card example">{"".join(parts)}</div>'


def _answer(row: Judgment, text: str, index: int, place: int, count: int) -> str:
    given = [
        f"{order.scores[label]:.3g} shown as {label}"
        for order in row.orders or [] if index in order.order
        and (label := label_of(order.order.index(index))) in order.scores
    ]  # fmt: skip
    score = f"{row.scores[index]:.3g}" if row.scores and index < len(row.scores) else "no score"
    kind = "" if not row.scores else " best" if place == 0 else " worst" if place == count - 1 else ""
    head = escaped(" · ".join([f"completion {index}", f"{len(text):,} characters", *given]))
    return f'<div class="answer{kind}"><b>{escaped(score)}</b> <span class="dim">{head}</span>{_text(text)}</div>'


def _text(text: str) -> str:
    cut = text if len(text) <= TEXT_SHOWN else text[:TEXT_SHOWN] + " …"
    return f'<p class="text">{escaped(cut)}</p>'
