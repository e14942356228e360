"""A sweep as a page: its runs side by side, and their curves over each other.

Takes what `sweep.run` returned and the runs' own numbers, and returns the page; writes nothing.
"""

from collections.abc import Mapping

from dpo_cli.html.markup import Markup, markup
from dpo_cli.html.page import columns, document, figure, footer, grid, verdict
from dpo_cli.html.svg import lines
from dpo_cli.training.guards import KL, MARGIN
from dpo_cli.training.run_history import Run
from dpo_cli.workflows.sweep import SweepPoint, SweepResult, best_said

Ends = tuple[float, float] | None


def sweep(swept: SweepResult, runs: Mapping[str, Run]) -> str:
    """The page.

    Args:
        swept: the sweep.
        runs: of its points, by their folder; those that are missing are left out of the curves.
    """
    names = [f"{point.value:g}" for point in swept.points]
    title = "Search for the learning rate" if swept.search else f"Sweep of {swept.setting}"
    return document(
        title,
        [
            markup('<h1>{}</h1><p class="dim">Held out, at the checkpoint that each run kept or rests at.</p>', title),
            markup(
                '<ul class="findings"><li class="{}">{}</li></ul>',
                "calm" if swept.best is not None else "",
                best_said(swept),
            ),
            _side_by_side(swept, names),
            _table(swept),
            _over_each_other(swept, names, runs),
            footer("Shaded: 95% intervals; where they overlap, the order is not shown."),
        ],
    )


def _side_by_side(swept: SweepResult, names: list[str]) -> Markup:
    points = swept.points
    accuracy = _plot(
        swept,
        names,
        "Accuracy",
        [point.accuracy for point in points],
        [point.accuracy_interval for point in points],
        0.5,
    )
    margin = _plot(
        swept, names, "Margin", [point.margin for point in points], [point.margin_interval for point in points], 0.0
    )
    kl = _plot(swept, names, "KL per token", [point.kl for point in points], [None] * len(points), swept.kl_limit)
    return grid(
        "thirds",
        [
            figure("Accuracy", "Dashed: chance.", accuracy),
            figure("Margin", "Divided by beta: nats of log-probability.", margin),
            figure("KL, nats a token", "On the policy's own text; dashed: the limit.", kl),
        ],
    )


def _plot(
    swept: SweepResult, names: list[str], title: str, values: list[float | None], reach: list[Ends], limit: float
) -> Markup:
    curve = [(float(place), value) for place, value in enumerate(values) if value is not None]
    band = [(float(place), *ends) for place, ends in enumerate(reach) if ends]
    return lines(title, {title: curve}, swept.setting, "", {title: band}, names, limit)


def _table(swept: SweepResult) -> Markup:
    def row(point: SweepPoint) -> list[str]:
        best = point.value == swept.best
        name = markup("<b>★ {:g}</b>", point.value) if best else f"{point.value:g}"
        numbers = (point.accuracy, point.margin, point.loss, point.kl)
        cells = ["–" if value is None else f"{value:.4g}" for value in numbers]
        return [name, *cells, _gates(point), point.run]

    headers = (swept.setting, "accuracy", "margin", "loss", "KL", "gates", "run")
    return columns(headers, map(row, swept.points))


def _gates(point: SweepPoint) -> Markup:
    """The verdict and the gates that did not pass; of a run that a search gave up, where it rests."""
    if point.verdict is None and point.step is not None:
        return markup("stopped at step {:,}", point.step)
    said = f": {', '.join(point.failed)}" if point.failed else ""
    return markup("{}{}", verdict(point.verdict), said)


def _over_each_other(swept: SweepResult, names: list[str], runs: Mapping[str, Run]) -> Markup:
    plots = (
        ("Held-out margin", MARGIN, "", 0.0),
        ("KL", KL, "nats a token", swept.kl_limit),
        ("Held-out loss", "eval_loss", "nats", None),
    )
    cards = []
    for title, metric, unit, limit in plots:
        curves = {
            name: runs[point.run].series[metric]
            for name, point in zip(names, swept.points, strict=True)
            if point.run in runs and metric in runs[point.run].series
        }
        if curves:
            drawn = lines(title, curves, "step", "", limit=limit)
            cards.append(figure(f"{title}, {unit}" if unit else title, f"By {swept.setting}, as each run went.", drawn))
    return Markup("<h2>Curves</h2>") + grid("thirds", cards) if cards else Markup()
