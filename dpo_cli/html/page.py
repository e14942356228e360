"""What every page has: its frame, its looks and its pieces.

A page is self-contained, light and dark, without scripts. It loads nothing, and its policy forbids that anything in it
could. What is given as text is escaped, what is given as `Markup` is not.
"""

from collections.abc import Iterable

from dpo_cli.html.markup import Markup, joined, markup
from dpo_cli.html.svg import CARD, DARK, LIGHT, STYLE, variables
from dpo_cli.training.gates import MARKS, GateVerdict

CSS = (
    f"""
:root {{ color-scheme: light dark; --paper: #f7f6f3; --card: {CARD[LIGHT]}; {variables(LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{ --paper: #15171b; --card: {CARD[DARK]}; {variables(DARK)} }} }}
"""
    + """* { box-sizing: border-box; }
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
.thirds { grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); margin-bottom: .9rem; }
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
.scroll { overflow-x: auto; } .half { max-width: 33rem; margin-top: .9rem; }
.facts td:first-child { width: 1%; color: var(--dim); white-space: nowrap; padding-right: 1.5rem; vertical-align: top; }
.facts td:last-child { text-align: left; overflow-wrap: anywhere; }
.columns { font-variant-numeric: tabular-nums; }
.columns th { padding: .1rem 1rem .35rem 0; text-align: left; font-weight: 600; font-size: .85rem; color: var(--dim); }
.columns td { padding-right: 1rem; text-align: left; }
.yes { color: var(--good); } .open { color: var(--dim); } .no { color: var(--bad); }
summary { cursor: pointer; padding: .2rem 0; } details table { margin-top: .6rem; }
footer { margin-top: 2.5rem; font-size: .85rem; color: var(--dim); }
"""
)


def document(title: str, parts: Iterable[str]) -> str:
    """The whole page: a title and its parts."""
    page = markup(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<title>{}</title><style>{}{}</style></head><body>{}</body></html>\n",
        title,
        Markup(CSS),
        Markup(STYLE),
        joined(parts),
    )
    return str(page)


def grid(kind: str, cards: Iterable[str]) -> Markup:
    """Cards beside each other, as many as fit; nothing if there are none."""
    inside = joined(cards)
    return markup('<div class="grid {}">{}</div>', kind, inside) if inside else Markup()


def footer(text: str) -> Markup:
    """What the numbers are, and who made the page."""
    return markup("<footer>{} Made by nothing-dpo.</footer>", text)


def tile(value: str, name: str, style: str = "") -> Markup:
    """A number in large type, and what it is."""
    return markup('<div class="card tile"><b class="{}">{}</b><span>{}</span></div>', style, value, name)


def figure(title: str, caption: str, plot: str) -> Markup:
    """A plot with its title and what it says."""
    return markup('<figure class="card"><h3>{}</h3><figcaption>{}</figcaption>{}</figure>', title, caption, plot)


def facts(rows: Iterable[tuple[str, str]]) -> Markup:
    """Names and values below each other."""
    lines = joined(markup("<tr><td>{}</td><td>{}</td></tr>", name, value) for name, value in rows)
    return markup('<table class="facts">{}</table>', lines)


def columns(headers: Iterable[str], rows: Iterable[Iterable[str]]) -> Markup:
    """A table with headers; its cells are markup."""
    head = joined(markup("<th>{}</th>", header) for header in headers)
    lines = joined(markup("<tr>{}</tr>", joined(markup("<td>{}</td>", cell) for cell in row)) for row in rows)
    return markup('<div class="card scroll"><table class="columns"><tr>{}</tr>{}</table></div>', head, lines)


def verdict(word: GateVerdict | None) -> Markup:
    """A verdict with its mark, in its colour; a dash for none."""
    if word is None:
        return Markup("–")
    style = {"pass": "yes", "fail": "no", "not shown": "open"}[word]
    return markup('<span class="{}">{} {}</span>', style, MARKS[word], word)
