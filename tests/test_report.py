"""The page: whole, closed to the outside, and deaf to what completions say."""

import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from test_audit import audited, judged, order, row, simulated

from dpo_cli import html
from dpo_cli.data.records import Judgment
from dpo_cli.html import labels, svg
from dpo_cli.training import guards, run_history
from dpo_cli.training.gates import Gate
from dpo_cli.workflows.sweep import SweepPoint, SweepResult

HOSTILE = "</p></svg><script>alert(1)</script><img src=https://evil.example/x onerror='go()'>\u202e\x1b[31m &amp;"
MEDIA = Path(__file__).parents[1] / ".github" / "media"
VOID = {"meta", "!doctype"}


class Page(HTMLParser):
    """Elements and attributes of a page; fails where a tag is closed that is not open."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def hostile():
    rows = simulated(20)
    bad = row(99, HOSTILE, HOSTILE + " again", HOSTILE * 200)
    rows.append((bad, judged(bad, order([0, 1, 2], 9, 1, 30), order([1, 2, 0], 1, 30, 9), judge={"model": HOSTILE})))
    rows.append((row(100), Judgment(id=HOSTILE, completions_id="", skipped=HOSTILE)))
    rows.append((row(101), Judgment(id=HOSTILE + "!", completions_id="", error=HOSTILE)))
    return audited(*rows)


def test_hostile_text_is_shown_and_stays_text():
    text = html.audit(hostile())
    found = Page(text)
    assert {"script", "img", "iframe", "link", "a", "object"}.isdisjoint(found.tags)
    assert not [name for name, _ in found.attributes if name.startswith("on") or name in ("src", "href")]
    assert "<script>alert(1)</script>" in found.text
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "<U+202E>" in found.text


def test_the_page_loads_nothing():
    text = html.audit(audited(*simulated(20)))
    assert "://" not in text
    assert "url(" not in text
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in Page(text).attributes


def test_the_page_has_every_part():
    found = audited(*simulated(60, primacy=3.0, per_character=0.01))
    text = Page(html.audit(found)).text
    for part in ("Does it prefer what it sees first?", "How it uses its scale", "Krippendorff", "Scores as given",
                 "Scores with --length-control", "Largest gap", "prefers what it is shown first"):  # fmt: skip
        assert part in text
    assert f"{found.judges['m'].first_wins.value:.1%}" in text
    assert Page(html.audit(found)).tags.count("svg") == 7


def test_a_page_of_little_is_a_page():
    assert "Nothing stands out" in Page(html.audit(audited())).text
    single = row(1, "a", "b")
    assert "How it uses its scale" in Page(html.audit(audited((single, judged(single, order([0, 1], 5, 5)))))).text


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (-0.7, 0.8, [-0.5, 0, 0.5]), (3, 3, [3]), (0, 0.04, [0, 0.01, 0.02, 0.03, 0.04])],
)
def test_ticks_are_round(low, high, expected):
    assert svg.ticks(low, high) == pytest.approx(expected)


def test_a_bar_is_as_high_as_its_count():
    drawn = Page(svg.bars("t", ["1", "2"], [5, 10]))
    heights = [float(value) for name, value in drawn.attributes if name == "height"]
    assert heights == [pytest.approx(heights[1] / 2), svg.FLOOR - svg.TOP]


def test_a_curve_goes_through_its_finite_points():
    drawn = Page(svg.lines("t", {"a": [(0, 0), (1, float("nan")), (2, 4)], "b": [(0, 2)]}, "x", "y"))
    curves = [value.split() for name, value in drawn.attributes if name == "points" and value]
    assert [len(curve) for curve in curves] == [2, 1]
    (left, low), (right, high) = (map(float, point.split(",")) for point in curves[0])
    assert left < right
    assert low > high  # y grows downwards
    assert "a: from 0 to 4." in drawn.text


def test_an_interval_is_red_where_it_leaves_chance_out():
    def style(low, high):
        return [value for name, value in Page(svg.interval("n", low, 0.5, high, 0.4)).attributes if name == "class"]

    assert "bad" in style(0.45, 0.6)
    assert "good" in style(0.3, 0.6)


def measured(**more):
    """A run of ten steps with a rollback and a loss that is no number."""
    series = {
        "loss": [(step, 0.69 - 0.01 * step) for step in range(1, 11)], "eval_loss": [(5, 0.68), (10, float("nan"))],
        "logps/chosen": [(1, -90.0)], "learning_rate": [(1, 0.0), (10, 1e-5)], "eval_rewards/margins": [(5, 0.1)],
        "eval_rewards/margins_stderr": [(5, 0.02)], guards.KL: [(5, 0.03)], "eval_beta": [(5, 0.1), (10, 0.2)],
    }  # fmt: skip
    events = [
        {"event": "step_zero", "step": 0, "loss": 0.6931, "ok": True},
        {"event": "kl_limit", "step": 10, "action": "rollback", "kl_nats_per_token": 0.25, "limit": 0.1},
        {"event": "rolled_back", "step": 10, "to": 5},
        {"event": "length_drift", "step": 5, "action": "warn", "sampled_tokens": 31.0},
    ]
    gate = Gate(0.61, 0.5, True, (0.52, 0.7))
    found = {
        "report": run_history.Trained(
            stage="dpo", run="runs/dpo", adapter="out", verdict="fail", reasons=["kl_nats_per_token fails"],
            best_checkpoint="checkpoint-5", gates={"held_out_accuracy": gate}, rows=40, held_out=9, steps=10,
        ),
        "config": {"identity": {"stage": "dpo", "data": {"sha256": {"train.jsonl": "ab12"}}}, "policy_sha256": "cd34",
                   "config": {"train": {"beta": 0.1}, "gate": {"kl_limit": 0.1}}, "versions": {"trl": "1.2.3"}},
    }  # fmt: skip
    last = {name: points[-1][1] for name, points in series.items()}
    return run_history.Run(name="dpo", series=series, last=last, events=events, **found | more)


def test_a_runs_page_has_its_curves_gates_guards_settings_and_hashes():
    drawn = Page(html.run(measured()))
    for part in ("Loss, nats", "Margins", "KL, nats a token", "Log-probabilities", "Learning rate", "Beta", "rollback",
                 "kl nats per token 0.25", "kl_limit: the policy's own text", "kl_nats_per_token fails",
                 "0.52 – 0.7", "ab12", "cd34", "1.2.3", "beta"):  # fmt: skip
        assert part in drawn.text, part
    assert "Accuracies" not in drawn.text, "there is nothing to draw"


def test_guards_are_marked_where_they_acted_on_every_curve_and_the_kl_that_was_rolled_back_is_shown():
    text = html.run(measured())
    drawn = Page(text)
    plots = drawn.tags.count("svg") - 1  # the accuracy's interval has no steps
    marks = [value for name, value in drawn.attributes if name == "class" and value == "event"]
    assert len(marks) == 2 * 2 * plots, "a line and a number at steps 5 and 10"
    assert drawn.text.count("1, 2") >= plots
    assert "over the limit, 10: 0.25" in drawn.text
    assert text.count('class="mark"') == 4, "ln 2, margin 0, the KL limit and the accuracy's chance"


def test_a_run_in_progress_and_a_hostile_one_are_pages():
    drawn = Page(html.run(measured(report=None, config=None)))
    assert "not finished" in drawn.text
    bad = {"event": HOSTILE, "step": 3, "action": HOSTILE, HOSTILE: HOSTILE}
    gates = {HOSTILE: Gate(1.0, 2.0, None)}
    wild = run_history.Run(
        name=HOSTILE, series={HOSTILE: [(1, 1.0)]}, last={}, events=[bad, {"event": HOSTILE, "step": HOSTILE}],
        report=run_history.Trained(
            stage="dpo", run=HOSTILE, adapter=HOSTILE, rows=1, held_out=1, steps=1, verdict="fail", reasons=[HOSTILE],
            best_checkpoint=HOSTILE, gates=gates,
        ),
        config={"config": {"train": {HOSTILE: HOSTILE}}, "versions": {HOSTILE: HOSTILE}},
    )  # fmt: skip
    found = Page(html.run(wild))
    assert {"script", "img"}.isdisjoint(found.tags)
    assert not [name for name, _ in found.attributes if name.startswith("on") or name in ("src", "href")]


def test_inspect_run_writes_the_page_and_says_where(tmp_path):
    from typer.testing import CliRunner

    from dpo_cli.cli import app

    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "metrics.jsonl").write_text('{"step": 1, "loss": 0.7}\n{"step": 2, "loss": 0.6}\n')
    page = tmp_path / "page.html"
    given = ["inspect", "run", "mine", "--html", str(page), "--set", f"runs={tmp_path / 'runs'}"]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 0 and f"look at {page} in a browser" in done.stderr
    assert "Loss, nats" in Page(page.read_text()).text


def test_a_sweeps_page_shows_its_runs_side_by_side_and_says_when_the_best_is_not_told_from_chance():
    def point(value, accuracy, reach):
        return SweepPoint(value, f"runs/dpo-beta-{value}", "", "pass", accuracy, 0.2, 0.6, 0.02, reach, (0.1, 0.3))

    swept = SweepResult("beta", [point(0.1, 0.6, (0.5, 0.7)), point(0.5, 0.9, (0.85, 0.95))], 0.1, 0.5)
    drawn = Page(html.sweep(swept, {point.run: measured() for point in swept.points}))
    assert "best: beta = 0.5, the most accurate of those that pass" in drawn.text and "★ 0.5" in drawn.text
    assert drawn.tags.count("svg") == 6 and "overlap, so" not in drawn.text
    swept.points[1].accuracy_interval = (0.65, 0.95)
    assert "the intervals overlap, so the held-out pairs are too few to tell" in Page(html.sweep(swept, {})).text
    swept.best = None
    assert "no run stayed within 0.1 nats a token" in Page(html.sweep(swept, {})).text


def test_no_name_of_a_point_lies_on_another_name_or_point():
    crowd = [(0.1, 0.5, "one"), (0.1, 0.501, "two"), (0.12, 0.502, "three"), (0.11, 0.49, "four"), (0.9, 0.5, "far")]
    drawn = svg.against("wins", ("curve", [(0.0, 0.5), (1.0, 1.0)]), {"runs": crowd}, "KL", "win rate")
    found = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)">(one|two|three|four|far)<', drawn)
    boxes = [labels.box(labels.Label(float(x), float(y), anchor, False), len(name)) for x, y, anchor, name in found]
    assert len(boxes) == 5
    circles = [
        (float(x) - 4, float(y) - 4, float(x) + 4, float(y) + 4)
        for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)" r="4"', drawn)
    ]
    assert len(circles) == 5
    for place, box in enumerate(boxes):
        for other in [*boxes[:place], *circles]:
            apart = box[2] <= other[0] or other[2] <= box[0] or box[3] <= other[1] or other[3] <= box[1]
            assert apart, (found[place], other)
    far = next(one for one in found if one[3] == "far")
    centre = re.search(r'cx="([\d.]+)" cy="([\d.]+)" r="4"><title>far', drawn)
    assert abs(float(far[0]) - float(centre[1])) <= 10 and abs(float(far[1]) - float(centre[2])) <= 10


def test_a_plot_of_its_own_has_its_colours_written_out():
    drawn = svg.standalone(svg.bars("Scores", ["1", "2"], [3, 4]))
    assert ElementTree.fromstring(drawn).tag.endswith("svg")
    assert "var(" not in drawn and svg.COLOURS["series-0"][0] in drawn and svg.COLOURS["series-0"][1] in drawn
    assert "var(" not in "".join(path.read_text() for path in MEDIA.glob("*.svg"))
