"""A training run as a page: its gates, its curves with the guards' actions on them, its settings and hashes.

Takes what `stats.read_run` found, of a run in progress as far as it has come, and returns the page; writes nothing.
"""

import math
from collections.abc import Iterator
from typing import Any

from msgspec import Struct

from dpo_cli.data.same_settings import flat
from dpo_cli.html.markup import Markup, joined, markup
from dpo_cli.html.page import columns, document, facts, figure, footer, grid, tile, verdict
from dpo_cli.html.svg import interval, lines
from dpo_cli.statistics import CONFIDENCE
from dpo_cli.training.guards import KL, LN2, MARGIN
from dpo_cli.training.remedies import REMEDIES, advice, shown_by
from dpo_cli.training.run_history import Run, Trained

BETA = "eval_beta"
OVER = "over the limit"
SHARE = "held_out_accuracy"
SEQUENCE_KL = "eval_kl_nats_per_sequence"
WARNED = "warn"  # an action that changes nothing


class Plot(Struct, frozen=True):
    """Curves that belong together: label -> metric. Left out where the run has none of them.

    `limit` is where the dashed line is: a number, or the setting of the gate that holds it.
    """

    title: str
    caption: str
    unit: str
    curves: dict[str, str]
    limit: float | str | None = None


PLOTS = (
    Plot("Loss", "Below ln 2, the dashed line, it prefers chosen.", "nats",
         {"train": "loss", "held out": "eval_loss"}, LN2),
    Plot("Margins", "Reward of chosen less that of rejected; shaded: 95% of the held-out mean.", "",
         {"train": "rewards/margins", "held out": MARGIN}, 0.0),
    Plot("Accuracies", "Share of pairs whose chosen side has the larger reward; dashed: chance.", "",
         {"train": "rewards/accuracies", "held out": "eval_rewards/accuracies"}, 0.5),
    Plot("KL", "Policy from reference, on the policy's own text; dashed: the limit.", "nats a token",
         {"held-out prompts": KL}, "kl_limit"),
    Plot("Drift on the pairs", "How far the policy has moved on the text of the pairs; no KL.", "nats a token",
         {"train": "kl", "held out": "eval_kl"}),
    Plot("Log-probabilities", "Of whole completions under the policy. Both falling: see the guards.", "nats",
         {"chosen": "logps/chosen", "rejected": "logps/rejected", "chosen, held out": "eval_logps/chosen",
          "rejected, held out": "eval_logps/rejected"}),
    Plot("Rewards", "β times what each side's log-probability has gained over the reference's.", "",
         {"chosen": "rewards/chosen", "rejected": "rewards/rejected", "chosen, held out": "eval_rewards/chosen",
          "rejected, held out": "eval_rewards/rejected"}, 0.0),
    Plot("Learning rate", "As it was, with what the guards changed.", "", {"learning rate": "learning_rate"}),
    Plot("Gradient norm", "Before it is clipped.", "", {"train": "grad_norm"}),
    Plot("Beta", "The pull to the reference, with what the guards changed.", "", {"beta": BETA}),
    Plot("Token accuracy", "Share of tokens that the model would have written.", "",
         {"train": "mean_token_accuracy", "held out": "eval_mean_token_accuracy"}),
)  # fmt: skip


def run(found: Run) -> str:
    """The page."""
    report, config = found.report, found.config or {}
    settings = config.get("config", {})
    acts = found.acts()
    return document(
        f"Run {found.name}",
        [
            _head(found, report),
            _findings(found, report),
            grid("tiles", _tiles(found, report)),
            _gates(report),
            _plots(found, acts, settings.get("gate", {})),
            _acts(acts),
            _asked(config),
            footer(f"Steps are optimizer steps. {_level(report, settings.get('gate', {}))}"),
        ],
    )


def _head(found: Run, report: Trained | None) -> Markup:
    steps = max((points[-1][0] for points in found.series.values()), default=0)
    if report is None:
        said = [f"step {steps:,.0f}", "not finished"]
    else:
        said = [f"step {steps:,.0f} of {report.steps:,}", f"{report.rows:,} pairs, {report.held_out:,} held out"]
    return markup('<h1>Run {}</h1><p class="dim">{}</p>', found.name, " · ".join(said))


def _findings(found: Run, report: Trained | None) -> Markup:
    """Why a gate says no, and what mends what the guards saw."""
    said: list[str] = list(report.reasons) if report else []
    said += [
        markup("<b>{}</b>: {}. Try: {}.", name, REMEDIES[name].symptom, advice(name)) for name in shown_by(found.events)
    ]
    if not said:
        return Markup('<ul class="findings"><li class="calm">Nothing stands out.</li></ul>')
    return markup('<ul class="findings">{}</ul>', joined(markup("<li>{}</li>", line) for line in said))


def _tiles(found: Run, report: Trained | None) -> Iterator[str]:
    if report and report.verdict:
        yield tile(report.verdict, "verdict of the gates", "yes" if report.verdict == "pass" else "no")
    if report and report.best_checkpoint:
        yield tile(report.best_checkpoint.removeprefix("checkpoint-"), "step of the adapter that is kept")
    zero = next((one for one in reversed(found.events) if one.get("event") == "step_zero"), None)
    if zero:
        yield tile(_value(zero.get("loss")), f"loss at step zero, {'' if zero.get('ok') else 'not '}ln 2 = {LN2:.4f}")
    kept = (report.metrics if report else {}) or found.last
    for name, said in ((MARGIN, "held-out margin"), (KL, "nats of KL a token"), (SEQUENCE_KL, "nats of KL a sequence")):
        if name in kept:
            yield tile(_value(kept[name], 3), said)


def _gates(report: Trained | None) -> Markup:
    if report is None or not report.gates:
        return Markup()
    rows = []
    for name, gate in report.gates.items():
        between = " – ".join(map(_value, gate.interval)) if gate.interval else Markup()
        rows.append((name, _value(gate.value), between, _value(gate.limit), verdict(gate.verdict)))
    share = report.gates.get(SHARE)
    drawn = ""
    if share and share.interval:
        low, high = share.interval
        drawn = markup(
            '<div class="card half">{}</div>', interval("held-out accuracy", low, share.value, high, share.limit)
        )
    return markup("<h2>Gates</h2>{}{}", columns(("gate", "value", "interval", "limit", ""), rows), drawn)


def _level(report: Trained | None, gate: dict[str, Any]) -> str:
    """What the intervals are, and of how many evaluations the checkpoint is the best."""
    said = f"Intervals are {100 * gate.get('confidence', CONFIDENCE):.4g}%"
    if report is None or report.best_of == 1:
        return f"{said}."
    return (
        f"{said}, and hold for all {report.best_of} evaluations of the held-out pairs at once, "
        "the best of which chose the checkpoint."
    )


def _plots(found: Run, acts: list[dict[str, Any]], gate: dict[str, Any]) -> Markup:
    marks: dict[float, str] = {}
    for number, act in enumerate(acts, 1):
        step = float(act["step"])
        marks[step] = f"{marks[step]}, {number}" if step in marks else str(number)
    cards = []
    for plot in PLOTS:
        curves = {label: found.series[name] for label, name in plot.curves.items() if name in found.series}
        if plot.limit == "kl_limit":
            curves |= _at_acts(acts)
        if not any(math.isfinite(y) for points in curves.values() for _, y in points) or _is_constant_beta(found, plot):
            continue
        limit = gate.get(plot.limit) if isinstance(plot.limit, str) else plot.limit
        bands = {"held out": _band(found)} if MARGIN in plot.curves.values() else None
        drawn = lines(plot.title, curves, "step", "", bands, limit=limit, marks=marks, unjoined=(OVER,))
        cards.append(figure(f"{plot.title}, {plot.unit}" if plot.unit else plot.title, plot.caption, drawn))
    return Markup("<h2>Curves</h2>") + grid("plots", cards) if cards else Markup('<p class="dim">No metrics yet.</p>')


def _is_constant_beta(found: Run, plot: Plot) -> bool:
    return BETA in plot.curves.values() and len({value for _, value in found.series[BETA]}) == 1


def _at_acts(acts: list[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """The KL that each guard acted on: a rollback takes its evaluation out of the metrics."""
    points = [(act["step"], act["kl_nats_per_token"]) for act in acts if act.get("event") == "kl_limit"]
    points = [(step, kl) for step, kl in points if isinstance(kl, int | float)]
    return {OVER: points} if points else {}


def _band(found: Run) -> list[tuple[float, float, float]]:
    errors = dict(found.series.get(f"{MARGIN}_stderr", []))
    return [
        (step, value - 1.96 * errors[step], value + 1.96 * errors[step])
        for step, value in found.series.get(MARGIN, [])
        if step in errors
    ]


def _acts(acts: list[dict[str, Any]]) -> Markup:
    if not acts:
        return Markup('<h2>Guards</h2><p class="dim">None has found anything.</p>')
    rows = []
    for number, act in enumerate(acts, 1):
        details = ", ".join(
            f"{key.replace('_', ' ')} {_value(value)}"
            for key, value in act.items()
            if key not in ("event", "step", "time", "action")
        )
        action = str(act.get("action", ""))
        style = "" if action == WARNED else "no"
        cells = (str(number), f"{act['step']:,}", str(act.get("event", "")))
        rows.append((*cells, markup('<span class="{}">{}</span>', style, action), details))
    return markup("<h2>Guards</h2>{}", columns(("", "step", "guard", "action", ""), rows))


def _asked(config: dict[str, Any]) -> Markup:
    """Settings, hashes and versions."""
    identity, settings = config.get("identity", {}), config.get("config", {})
    stage = "sft" if identity.get("stage") == "sft" else "train"
    parts = [_folded(name, flat(settings[name])) for name in (stage, "gate", "model") if name in settings]
    model = flat(identity.get("model", {})) | config
    hashes = {key.removesuffix("_sha256"): value for key, value in model.items() if key.endswith("_sha256") and value}
    hashes |= identity.get("data", {}).get("sha256", {})
    parts += [_folded("sha256", hashes, True)] if hashes else []
    parts += [_folded("versions", config["versions"])] if config.get("versions") else []
    return markup("<h2>What was asked for</h2>{}", grid("", parts)) if parts else Markup()


def _folded(name: str, values: dict[str, Any], opened: bool = False) -> Markup:
    shown = facts((key, _value(value)) for key, value in values.items())
    kind = Markup(" open") if opened else Markup()
    return markup('<details class="card"{}><summary><b>{}</b></summary>{}</details>', kind, name, shown)


def _value(value: Any, digits: int = 4) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return (f"{value:,}" if isinstance(value, int) else f"{value:.{digits}g}").replace("-", "−")
