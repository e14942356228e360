import io
import os
import re
import signal
import unicodedata
from functools import partial

import msgspec
import pytest
from rich.console import Console
from screen import FORBIDDEN, HOSTILE, Terminal

from dpo_cli.analysis import data_stats, judge_audit
from dpo_cli.config import resolve
from dpo_cli.data.records import Completions, Judgment, Order, Preference
from dpo_cli.data.row_index import Rows
from dpo_cli.errors import UserError
from dpo_cli.training import run_history
from dpo_cli.training.gates import Gate
from dpo_cli.view import (
    audit,
    braille,
    browse,
    completions,
    judgments,
    pairs,
    plan,
    progress,
    text,
    training,
    workflows,
)
from dpo_cli.workflows.sweep import SweepPoint, SweepResult

# What rich itself writes: colours and styles.
SGR = re.compile(r"\x1b\[[0-9;]*m")


def terminal(width=100, height=40):
    return Console(
        file=io.StringIO(),
        force_terminal=True,
        width=width,
        height=height,
        color_system="truecolor",
        legacy_windows=False,
    )


def drawn(console):
    return console.file.getvalue()


def unstyled(console):
    return SGR.sub("", drawn(console))


def message(content, role="user"):
    return {"role": role, "content": content}


def pair(chosen="good", rejected="bad", prompt="ask", identity="0123456789abcdef", **fields):
    return Preference(
        id=identity, prompt=[message("be kind", "system"), message(prompt)], chosen=[message(chosen, "assistant")],
        rejected=[message(rejected, "assistant")], **fields,
    )  # fmt: skip


def rows_of(path, *records):
    path.write_bytes(b"".join(msgspec.json.encode(record) + b"\n" for record in records))
    return Rows.open([path])


def hostile_drawings(folder):
    """Every function that draws what models and users wrote, with a hostile text in every place."""
    for number, wild in enumerate(HOSTILE):
        bad = wild.encode(errors="replace").decode()  # a JSON file holds no lone surrogate
        preference = pair(bad, bad + " more", bad, bad, chosen_score=2, rejected_score=1, score_gap=1)
        record = Completions(
            id=bad, prompt=[message(bad, bad)], completions=[bad, "x"], finish_reasons=[bad, "stop"], model=bad,
            sampling={"stop": bad},
        )  # fmt: skip
        rationale = msgspec.json.encode({"rationale": bad}).decode()
        judgment = Judgment(
            id=bad, completions_id="c", scores=[1.0, 2.0], ranking=[1, 0], judge={"model": bad},
            orders=[Order([0, 1], {"A": 1.0, "B": 2.0}, bad), Order([1, 0], {}, rationale)],
        )  # fmt: skip
        failed = Judgment(id=bad, completions_id="c", error=bad)
        gates = {wild: Gate(1.0, 2.0, False)}
        run = run_history.Run(
            name=wild, series={wild: [(1, 2.0)], "loss": [(1, 2.0)]}, last={wild: 2.0, "loss": 2.0},
            events=[{"event": wild, "step": wild, wild: wild}],
            report=run_history.Trained(
                stage="dpo", run=wild, adapter=wild, rows=1, held_out=1, steps=1, verdict="fail", gates=gates,
                best_checkpoint=wild, policy_sha256=wild,
            ),
        )  # fmt: skip
        pair_file, completion_file, judgment_file = (
            rows_of(folder / f"{number}-{len(records)}-{records[0].__class__.__name__}.jsonl", *records)
            for records in ([preference], [record], [judgment, failed])
        )
        setting = resolve.Setting("a.b", wild, wild, "")
        unnamed = Judgment(id=bad, completions_id="c", skipped=bad)
        judged = judge_audit.audit({"a": judgment, "b": failed, "c": unnamed}, {"a": record})
        yield from (
            partial(pairs.pair, preference=preference, place=wild),
            partial(pairs.pair_list, rows=pair_file, first=0, count=9),
            partial(completions.completions_list, rows=completion_file, first=0, count=9),
            partial(judgments.judgments_list, rows=judgment_file, first=0, count=9),
            partial(completions.completions, record=record, place=wild),
            partial(judgments.judgment, record=judgment, judged=record, place=wild),
            partial(completions.completion_stats, stats=data_stats.completion_stats([record])),
            partial(audit.audit, found=judged),
            partial(training.run, run=run),
            partial(plan.settings, rows=[setting]),
            lambda console, wild=wild: progress.RichProgress(console).log(wild),
        )


@pytest.mark.parametrize("width", [60, 100])
def test_hostile_text_is_shown_and_never_obeyed(tmp_path, width):
    for draw in hostile_drawings(tmp_path):
        console = terminal(width)
        draw(console)
        left = unstyled(console)
        obeyed = {c for c in left if unicodedata.category(c) in FORBIDDEN} - {"\n", "\ufe0f"}
        assert not obeyed, (sorted(map(ascii, obeyed)), left)


def test_what_is_hidden_is_named():
    assert text.safe("a\x1bb\x07\x9b\u202e\u200b\r\n\x7f").plain == "a␛b␇\\x9b<U+202E><U+200B>␍\n␡"
    assert text.safe("[bold]x[/] :smile:").plain == "[bold]x[/] :smile:"
    assert text.safe_line("a\nb").plain == "a ⏎ b"
    assert text.safe("❤\ufe0f a\ufe0f").plain == "❤\ufe0f a<U+FE0F>"


def test_no_character_that_formats_is_forgotten():
    # Arabic and Kaithi number signs, Egyptian joiners and shorthand are of category Cf and visible.
    visible = {*range(0x600, 0x606), 0x6DD, 0x70F, 0x890, 0x891, 0x8E2, 0x110BD, 0x110CD, *range(0x13430, 0x13440)}
    formats = {code for code in range(0x110000) if unicodedata.category(chr(code)) in FORBIDDEN} - visible - {0x0A}
    assert not [hex(code) for code in formats if chr(code) in text.safe(chr(code)).plain]


def test_the_words_that_differ_are_named():
    left, right = "one two three four five six.", "one two three 4 five six."
    assert pairs.difference(left, right) == ([(14, 18)], [(14, 15)])
    assert pairs.difference("same words here", "same words here") == ([], [])


def test_single_words_in_common_are_chance():
    # `the` and `of` stand in both, alone: each side differs as a whole, from the common beginning on.
    left, right = "[A] the end of days", "[A] sum of the parts"
    spans = pairs.difference(left, right)
    assert [left[start:end] for start, end in spans[0]] == ["the end of days"]
    assert [right[start:end] for start, end in spans[1]] == ["sum of the parts"]
    assert pairs.difference("nothing alike", "wholly other words") == ([], [])
    assert pairs.difference("", "something") == ([], [])


def test_a_pair_stands_side_by_side_where_there_is_room():
    record = pair("the good one", "the bad one", chosen_score=8.5, rejected_score=4.0, score_gap=4.5,
                  chosen_finish_reason="length")  # fmt: skip
    wide, narrow = terminal(80), terminal(79)
    pairs.pair(wide, record, "train.jsonl:7")
    pairs.pair(narrow, record)
    assert any("the good one" in row and "the bad one" in row for row in unstyled(wide).split("\n"))
    assert not any("the good one" in row and "the bad one" in row for row in unstyled(narrow).split("\n"))
    for shown in ("0123456789abcdef", "train.jsonl:7", "gap 4.5", "chosen  8.5", "rejected  4", "cut", "be kind"):
        assert shown in unstyled(wide)
    assert max(map(len, unstyled(narrow).split("\n"))) <= 79


def test_a_list_says_where_it_stands(tmp_path):
    records = [pair(identity=f"{number:016x}") for number in range(30)]
    console = terminal(80)
    pairs.pair_list(console, rows_of(tmp_path / "train.jsonl", *records), 10, 5)
    assert "rows 11–15 of 30 · next: --offset 15" in unstyled(console)
    console = terminal(80)
    pairs.pair_list(console, rows_of(tmp_path / "train.jsonl", *records), 99, 5)
    assert "no row 100: there are 30" in unstyled(console)


def test_a_run_with_gaps_one_point_or_nothing_is_drawn():
    nan = float("nan")
    for series in (
        {},
        {"loss": [(1, 0.5)]},
        {"loss": [(1, nan)]},
        {"loss": [(1, 1.0), (2, nan), (3, 0.0)], "eval_kl": [(3, nan)]},
    ):
        last = {name: points[-1][1] for name, points in series.items()}
        console = terminal(80)
        training.run(console, run_history.Run(name="dpo", series=series, last=last, events=[], report=None))
        assert ("loss" in unstyled(console)) == bool(series)
        assert ("no metrics yet" in unstyled(console)) == (not series)


@pytest.mark.parametrize("width", [80, 140])
def test_a_sweep_shows_its_numbers_and_plots_beside_each_other_and_names_the_best(width):
    points = [
        SweepPoint(
            value, f"runs/dpo-beta-{value}", "", "pass", accuracy, margin, 0.65, kl, (accuracy - 0.1, accuracy + 0.1)
        )
        for value, accuracy, margin, kl in ((0.05, 0.55, 0.4, 0.3), (0.5, 0.7, -0.2, 0.02))
    ]
    console = terminal(width)
    workflows.swept(console, SweepResult("beta", points, 0.1, 0.5))
    lines = unstyled(console).splitlines()
    assert max(map(len, lines)) <= width
    first, best = lines[1:3]
    assert best.startswith("★ 0.5") and all(number in best for number in ("70.0%", "-0.2", "0.02", "pass"))
    assert best.count("┊") == 2, "chance and the limit"
    assert first.count("█") > 2 * best.count("█"), "a larger margin, and a KL that hides its limit"
    assert "┤" in first and "the limit" in lines[3]
    said = " ".join(lines[4:])
    assert "divided by beta" in said and "best: beta = 0.5" in said and "overlap" in said


def test_guards_are_marked_below_the_curves_where_they_acted():
    acted = [{"event": "kl_limit", "step": 20, "action": "stop"}, {"event": "encoded", "step": 0}]
    series = {"loss": [(0, 1.0), (40, 0.0)]}
    console = terminal(80)
    training.run(console, run_history.Run(name="dpo", series=series, last={"loss": 0.0}, events=acted, report=None))
    [marks] = [line for line in unstyled(console).splitlines() if "▲" in line and "guards" not in line]
    assert marks.count("▲") == 1 and 20 < marks.index("▲") < 32, "half-way"


def test_a_curve_goes_from_the_first_point_to_the_last():
    falling = [(0, 1.0), (1, 0.0)]
    assert braille.braille(falling, braille.frame(falling, 2, 1)) == ["⠑⢄"]
    broken = [(0, 1.0), (1, float("nan")), (2, 1.0), (3, 0.0)]
    assert braille.braille(broken, braille.frame(broken, 2, 1)) == ["⠁⢣"]
    assert braille.sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert braille.sparkline([1, float("nan"), 1], 3) == "▄ ▄"
    assert braille.sparkline([0, 0, 7, 7], 2) == "▁█"


def test_settings_that_are_no_default_stand_out():
    console = terminal(100)
    plan.settings(console, resolve.settings(resolve.resolve({"train.beta": 0.2}, environment={})))
    rows = {row.split()[0]: row for row in drawn(console).split("\n") if len(row.split()) > 1}
    [changed] = [row for row in rows.values() if "train.beta" in row]
    [default] = [row for row in rows.values() if "train.loss_type" in row]
    assert "\x1b[1m" in changed and "flag" in changed
    assert "\x1b[2m" in default


@pytest.mark.parametrize("width", [80, 200])
def test_settings_stand_beside_their_value_at_any_width(width):
    console = terminal(width)
    long = resolve.resolve({"train.beta": 0.2, "model.base": "場" * 40}, environment={})
    plan.settings(console, resolve.settings(long))
    lines = drawn(console).split("\n")
    for row in resolve.settings(long):
        begins = (plan._setting(row.value)[:4] or " ").split(" ")[0]
        assert any(row.key in line and begins in line and row.source in line for line in lines), row.key


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_lines_come_at_most_every_few_seconds():
    stream, clock = io.StringIO(), Clock()
    lines = progress.LineProgress(stream, every=5, clock=clock)
    lines.begin("generate", 300, done=100)
    for done in range(101, 301):
        clock.now += 0.0625
        new = done - 100
        lines.update(done, completions=3 * new, tokens=300 * new, in_flight=8, failed=1, usd=0.5)
    lines.log("a warning\n\x1b[31m")
    lines.end()
    lines.end()
    assert stream.getvalue().splitlines() == [
        "generate: 100/300  33% (100 from before)",
        "generate: 180/300  60% · 48 completions/s · 4,800 tokens/s · 8 in flight · 1 failed · $0.5000 · 8 s left",
        "generate: 260/300  86% · 48 completions/s · 4,800 tokens/s · 8 in flight · 1 failed · $0.5000 · 2 s left",
        "a warning ⏎ ␛[31m",
        "generate: 300/300  100% · 48 completions/s · 4,800 tokens/s · 1 failed · $0.5000 · in 12 s",
    ]


def test_rates_are_of_this_run_and_of_the_recent_past():
    clock = Clock()
    meter = progress.Meter("judge", 10_000, done=5_000, clock=clock)
    meter.update(5_000, {"tokens": 1e9})  # totals of a former run
    for _ in range(100):
        clock.now += 1
        meter.update(meter.done + 10, {"tokens": meter.counters["tokens"] + 100})
    assert meter.rate() == pytest.approx(10)
    assert meter.rate("tokens") == pytest.approx(100)
    assert meter.eta() == pytest.approx(400)
    for _ in range(120):  # ten times as slow
        clock.now += 1
        meter.update(meter.done + 1, {})
    assert meter.rate() == pytest.approx(1)
    assert meter.rate(whole_run=True) == pytest.approx(1120 / 220)
    assert meter.rate("tokens", whole_run=True) == pytest.approx(100 * 100 / 220)
    clock.now += 120  # a stall
    assert meter.rate() < 0.5


def test_the_panel_shows_the_counters_that_there_are():
    clock = Clock()
    meter = progress.Meter("train", 8, clock=clock)
    for step in range(1, 5):
        clock.now += 1
        meter.update(step, {"loss": 5 - step, "margin": step, "accuracy": 0.5, "kl": 0.1, "memory_gb": 12.34})
    console = terminal(120)
    console.print(progress.panel(meter, 120))
    shown = unstyled(console)
    for part in ("train", "4/8", "50%", "4 s left", "loss 1 █▆▃▁", "margin 4 ▁▃▆█", "50.0%", "kl 0.1", "12.3 GB"):
        assert part in shown
    assert "completions/s" not in shown
    assert "failed" not in shown


def test_the_live_panel_keeps_log_lines_and_leaves_the_cursor_visible():
    console = terminal(100)
    live = progress.RichProgress(console)
    live.begin("generate", 10)
    for done in range(11):
        live.update(done, completions=done)
    live.log("[bold]a warning[/bold]")
    live.end()
    live.end()
    shown = drawn(console)
    assert "[bold]a warning[/bold]" in shown
    assert "10/10" in shown
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l")


BROWSE = """
    import sys
    from pathlib import Path
    from dpo_cli.data.row_index import Rows
    from dpo_cli.view.browse import browse
    from dpo_cli.view.console import stdout_console

    with Rows.open([Path(sys.argv[1])]) as rows:
        browse(stdout_console(), rows)
"""


@pytest.fixture
def many_pairs(tmp_path):
    path = tmp_path / "train.jsonl"
    rows_of(path, *(pair(f"answer {n} of café", prompt=f"question {n}.", identity=f"{n:016x}") for n in range(1, 301)))
    return str(path)


def test_browsing_by_keys(many_pairs):
    screen = Terminal(BROWSE, many_pairs)
    for keys, expected in (
        ("", "question 1."), ("n", "question 2."), ("j", "question 3."), ("k", "question 2."),
        ("\x1b[D", "question 1."), ("p", "first pair"), ("g150\r", "question 150."),
        ("/answer 277\r", "question 277."), (f"/{42:016x}\r", "question 42."), ("/of café\r", "question 43."),
        ("/nowhere\r", "nothing has 'nowhere'"), ("G", "question 300."), ("n", "last pair"), ("/\x1b", "all keys"),
    ):  # fmt: skip
        screen.type(keys)
        screen.wait_for(expected)
    screen.type("q")
    screen.wait_for("\x1b[?1049l")  # the screen as it was
    assert screen.finish() == (0, True)


def test_an_interrupt_gives_the_terminal_back(many_pairs):
    screen = Terminal(BROWSE, many_pairs)
    screen.wait_for("question 1.")
    os.killpg(screen.process.pid, signal.SIGINT)
    screen.wait_for("\x1b[?1049l")
    code, restored = screen.finish()
    assert code != 0
    assert restored


def test_browsing_needs_a_terminal(many_pairs):
    with Rows.open([]) as rows, pytest.raises(UserError, match="needs a terminal"):
        browse.browse(Console(file=io.StringIO()), rows)
