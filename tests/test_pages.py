import io

import msgspec
import pytest

from dpo_cli.data import row_index
from dpo_cli.data.records import Completions, Preference, preference_id
from dpo_cli.data.row_index import Rows
from dpo_cli.errors import UserError


def line(number, identity=None, **fields):
    row = {
        "id": identity or f"{number:016x}",
        "prompt": [{"role": "user", "content": f"prompt {number}"}],
        "chosen": [{"role": "assistant", "content": f"good {number}"}],
        "rejected": [{"role": "assistant", "content": f"bad {number}"}],
        **fields,
    }
    return msgspec.json.encode(row) + b"\n"


def write(path, *lines):
    path.write_bytes(b"".join(lines))
    return path


class CountedFile(io.FileIO):
    """A file that counts what is really read from it."""

    read_bytes = 0

    def readinto(self, buffer):
        count = super().readinto(buffer)
        self.read_bytes += count
        return count


def test_the_first_screen_of_a_huge_file_reads_next_to_nothing(tmp_path):
    path = write(tmp_path / "train.jsonl", *map(line, range(50)))
    with path.open("r+b") as file:
        file.truncate(1 << 40)  # a terabyte of hole after 50 rows
    raw = CountedFile(path)
    with Rows([io.BufferedReader(raw)]) as rows:
        shown = [rows.decode(row, Preference).id for row in rows.slice(0, 20)]
        total, exact = rows.total()
    assert shown == [f"{number:016x}" for number in range(20)]
    assert raw.read_bytes < 1 << 20
    assert not exact
    assert total > 1_000_000_000


def test_rows_of_several_files_follow_each_other(tmp_path):
    train = write(tmp_path / "train.jsonl", line(1), b"\n", line(2))
    val = write(tmp_path / "val.jsonl", line(3), b'{"id": "torn', b"")
    with Rows.open([train, write(tmp_path / "empty.jsonl"), val]) as rows:
        found = rows.slice(0, 10)
        assert [rows.decode(row, Preference).id[-1] for row in found] == ["1", "2", "3"]
        assert [rows.place(row) for row in found] == [f"{train}:1", f"{train}:3", f"{val}:1"]
        assert rows.total() == (3, True)
        assert rows.last() == 2
        assert rows.slice(2, 1) == found[2:]
        assert rows.slice(3, 1) == []
        assert [rows.number(row) for row in found] == [0, 1, 2]


def test_an_unfinished_last_line_is_a_row_if_it_is_whole(tmp_path):
    with Rows.open([write(tmp_path / "a.jsonl", line(1), line(2).rstrip())]) as rows:
        assert rows.last() == 1


def test_a_row_is_found_by_a_unique_beginning_of_its_id(tmp_path):
    path = write(tmp_path / "a.jsonl", line(1, "aa11"), line(2, "ab22"), line(3, "ab23", note={"id": "cc"}))
    with Rows.open([path]) as rows:
        row, pair = row_index.find(rows, "ab22", Preference)
        assert (rows.place(row), pair.id) == (f"{path}:2", "ab22")
        assert row_index.find(rows, "aa", Preference)[1].id == "aa11"
        with pytest.raises(UserError, match="several ids begin with 'ab': ab22, ab23"):
            row_index.find(rows, "ab", Preference)
        with pytest.raises(UserError, match="no row has an id that begins with 'cc'"):
            row_index.find(rows, "cc", Preference)


def test_an_id_that_begins_another_names_its_own_row_and_the_last_line_wins(tmp_path):
    path = write(tmp_path / "a.jsonl", line(1, "ab"), line(2, "abc"), line(3, "ab"))
    with Rows.open([path]) as rows:
        assert row_index.find(rows, "ab", Preference)[1].prompt[0]["content"] == "prompt 3"


def test_pairs_of_other_tools_get_an_id_from_their_content(tmp_path):
    sides = {"prompt": "ask", "chosen": "yes", "rejected": "no"}
    path = write(tmp_path / "a.jsonl", line(0).replace(b'"id":"0000000000000000",', b""), msgspec.json.encode(sides))
    expected = preference_id(
        [{"role": "user", "content": "ask"}],
        [{"role": "assistant", "content": "yes"}],
        [{"role": "assistant", "content": "no"}],
    )
    with Rows.open([path]) as rows:
        _, pair = row_index.find(rows, expected[:8], Preference)
    assert pair.id == expected
    assert [found.id for found in row_index.read_pairs(path)][1] == expected


def test_a_bad_row_is_named_by_file_and_line(tmp_path):
    path = write(tmp_path / "a.jsonl", line(1), b'{"id": "x", "prompt": "p", "chosen": "c"}\n', b"not json\n")
    with Rows.open([path]) as rows:
        _, incomplete, broken = rows.slice(0, 3)
        with pytest.raises(UserError, match=r'a\.jsonl:2: no "rejected"'):
            rows.decode(incomplete, Preference)
        with pytest.raises(UserError, match=r"a\.jsonl:3: "):
            rows.decode(broken, Preference)
        with pytest.raises(UserError, match=r"a\.jsonl:1: .*completions"):
            rows.decode(rows.slice(0, 1)[0], Completions)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl: no such file"):
        Rows.open([write(tmp_path / "a.jsonl", line(1)), tmp_path / "none.jsonl"])
