"""What a stopped command goes on with, and what it refuses to be mixed with."""

import json

import msgspec
import pytest

from dpo_cli.data.jsonl import Journal
from dpo_cli.data.resumable import Resumable
from dpo_cli.data.same_settings import refuse_other_settings
from dpo_cli.errors import UserError
from dpo_cli.progress import Silent


class Row(msgspec.Struct):
    id: str
    text: str = ""


class Told(Silent):
    def __init__(self):
        self.calls = []

    def begin(self, stage, total, done=0):
        self.calls.append((stage, done, total))

    def update(self, done, **counters):
        self.calls.append((done, counters))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_only_what_is_missing_is_asked_for_and_the_last_line_of_an_id_stays(tmp_path):
    path = tmp_path / "rows.jsonl"
    with pytest.raises(KeyboardInterrupt), Resumable(path, Row) as rows:
        rows.deliver(Row("a", "old"))
        rows.deliver(Row("b", "b"))
        rows.deliver(Row("a", "new"))
        raise KeyboardInterrupt
    assert [row["text"] for row in lines(path)] == ["old", "b", "new"]  # nothing is tidied up on the way out
    with Resumable(path, Row) as rows:
        wanted = {"c": "c", "a": "new", "b": "other"}
        assert rows.missing(wanted) == {"c": "c"}
        assert rows.missing(wanted, lambda row, text: row.text == text) == {"c": "c", "b": "other"}
        rows.deliver(Row("c", "c"))
        assert rows.delivered == {"c"} and rows.known["c"].text == "c"
    assert [row["text"] for row in lines(path)] == ["new", "b", "c"]


def test_a_clean_file_is_not_written_again(tmp_path):
    path = tmp_path / "rows.jsonl"
    with Resumable(path, Row) as rows:
        rows.deliver(Row("a"))
    inode = path.stat().st_ino
    with Resumable(path, Row) as rows:
        assert rows.missing({"a": 1}) == {}
        rows.deliver(Row("b"))
    assert path.stat().st_ino == inode


def test_a_file_that_is_refused_or_only_read_is_not_touched(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"id": "a"}\n{"id": "b", "te')

    def check(number, row):
        raise UserError(f"line {number}")

    with pytest.raises(UserError, match="line 1"), Resumable(path, Row, check):
        raise AssertionError
    assert set(Resumable.read(path, Row).known) == {"a"}
    assert path.read_bytes() == b'{"id": "a"}\n{"id": "b", "te'
    with Resumable(path, Row) as rows:
        rows.deliver(Row("c"))
    assert [row["id"] for row in lines(path)] == ["a", "c"]


@pytest.mark.parametrize("content", ['{"id": "a"}'.encode("utf-16"), b"\x1f\x8b\x08 gzip", b"id,text\na,b"])
def test_a_file_of_another_kind_is_never_cut(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError), Journal(path) as journal:
        journal.append(Row("a"))
    assert path.read_bytes() == content


def test_a_dry_run_locks_and_makes_nothing(tmp_path):
    with Journal(tmp_path / "rows.jsonl"), Resumable(tmp_path / "rows.jsonl", Row, dry_run=True) as rows:
        assert rows.known == {}
    with Resumable(tmp_path / "sub" / "rows.jsonl", Row, dry_run=True):
        pass
    assert not (tmp_path / "sub").exists() and not (tmp_path / "rows.jsonl").exists()


def test_progress_counts_rows_and_adds_up_the_counters_of_several_parts(tmp_path):
    told = Told()
    with (
        Resumable(tmp_path / "rows.jsonl", Row) as rows,
        rows.reporting(told, "sample", total=5, owed=3) as delivery,
    ):
        rows.deliver(Row("a"))
        rows.deliver(Row("a"))  # once more: it is one row
        delivery.update(0, usd=2.0, in_flight=1)
        delivery.next_part()
        rows.deliver(Row("b"))
        delivery.update(0, usd=0.5)
        delivery.note(tokens=7)
    assert told.calls == [
        ("sample", 2, 5),
        (3, {"usd": 2.0, "in_flight": 1}),
        (4, {"usd": 2.5, "in_flight": 1}),
        (4, {"tokens": 7, "usd": 2.5, "in_flight": 1}),
    ]


def test_settings_are_compared_by_name_however_deep_they_are():
    before = {"model": {"base": "a"}, "beta": 0.1, "gone": 1}
    refuse_other_settings("made", before, dict(before), "here", "hint")
    with pytest.raises(UserError) as raised:
        refuse_other_settings(
            "made", before, {"model": {"base": "b"}, "beta": 0.1}, "here:1", "do this", lambda key: f"train.{key}"
        )
    assert raised.value.message == (
        "made with other settings: train.model.base was a, now b; train.gone was 1, now None"
    )
    assert (raised.value.where, raised.value.hint) == ("here:1", "do this")
