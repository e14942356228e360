import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import msgspec
import pytest

from dpo_cli.data.jsonl import BLOCK_BYTES, Journal, read_latest, read_rows, write_rows
from dpo_cli.data.reader import parse_rows
from dpo_cli.errors import Exit, UserError


class Row(msgspec.Struct):
    id: str
    text: str


def ids(path):
    return [row.id for _, row in read_rows(path, Row)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "rows.jsonl"


def fill(path, *names, text="x"):
    with Journal(path) as journal:
        for name in names:
            journal.append(Row(name, text))


def test_a_row_is_a_line_whatever_its_text_holds(path):
    text = 'a\nb\r\n\u2028\x85"\\ \x00 \x1b[31m é 𝄞'
    fill(path, "a", "b", text=text)
    assert len(path.read_bytes().splitlines()) == 2
    assert [row.text for _, row in read_rows(path, Row)] == [text, text]


def test_a_tail_torn_at_any_byte_costs_its_own_row_only(path):
    fill(path, "a", "b", text="é" * 5)
    whole = path.read_bytes()
    start = whole.index(b"\n") + 1
    for end in range(start, len(whole) + 1):
        path.write_bytes(whole[:end])
        survivors = ["a", "b"] if end >= len(whole) - 1 else ["a"]
        assert ids(path) == survivors  # readers pass it over,
        fill(path, "c")  # and the next writer cuts it
        assert ids(path) == [*survivors, "c"]


def test_a_file_that_is_nothing_but_a_torn_row_is_empty(path):
    path.parent.mkdir()
    path.write_bytes(b'{"id": "a", "te')
    fill(path, "b")
    assert ids(path) == ["b"]


def test_a_torn_row_longer_than_a_read_is_cut_whole(path):
    fill(path, "a")
    with path.open("ab") as file:
        file.write(b'{"id": "b", "text": "' + b"x" * 300_000)
    fill(path, "c")
    assert ids(path) == ["a", "c"]


def test_a_bad_row_is_named_by_its_line(path):
    fill(path, "a")
    with path.open("ab") as file:
        file.write(b'\n{"id": "b", "text": 3}\n{"id": "c", "text": "x"}\n')
    with pytest.raises(UserError) as raised:
        ids(path)
    assert raised.value.where == f"{path}:3"
    assert '"text"' in raised.value.message
    assert raised.value.code == Exit.USAGE


def test_lines_are_counted_on_through_blank_ones_and_through_a_long_file(path):
    count = 3 * BLOCK_BYTES // 100
    fill(path, *map(str, range(count)), text="x" * 100)
    with path.open("ab") as file:
        file.write(b'\n{"id":"last","text":"after a blank line"}\n{"id":"wrong","text":3}\n')
    rows = read_rows(path, Row)
    found = [next(rows) for _ in range(count + 1)]
    assert [number for number, _ in found] == [*range(1, count + 1), count + 2]
    assert [row.id for _, row in found] == [*map(str, range(count)), "last"]
    with pytest.raises(UserError, match=f"rows.jsonl:{count + 3}"):
        next(rows)


@pytest.mark.parametrize("line", ["{]", "[]", "3", '{"id": 1'])
def test_what_is_no_object_is_named_by_its_line(path, line):
    fill(path, "a")
    with path.open("a") as file:
        file.write(line + "\n")
    for read in (lambda: list(read_rows(path, Row)), lambda: list(parse_rows(path, dict))):
        with pytest.raises(UserError) as raised:
            read()
        assert raised.value.where == f"{path}:2"


def test_a_torn_end_is_passed_over_in_our_own_files_only(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id":"a","text":"x"}\n{"id":"b","te')
    assert ids(path) == ["a"]
    with pytest.raises(UserError, match=r"rows\.jsonl:2: not a JSON object"):
        list(parse_rows(path, dict))


def test_the_last_line_of_an_id_wins_and_compaction_keeps_the_bytes_of_the_rest(path):
    path.parent.mkdir()
    path.write_bytes(b'{"id":"a","text":"1"}\n{ "id": "b",  "text": "1", "more": [1] }\n{"id":"a","text":"2"}\n')
    assert read_latest(path, Row)["a"].text == "2"
    with Journal(path) as journal:
        journal.compact()
        journal.append(Row("c", "1"))  # into the new file, not the old one's inode
    assert path.read_bytes() == (
        b'{"id":"a","text":"2"}\n{ "id": "b",  "text": "1", "more": [1] }\n{"id":"c","text":"1"}\n'
    )
    inode = path.stat().st_ino
    with Journal(path) as journal:
        journal.compact()
    assert path.stat().st_ino == inode  # nothing to drop: not rewritten


def test_compaction_keeps_a_second_writer_out(path):
    fill(path, "a", "a")
    with Journal(path) as journal:
        journal.compact()
        with pytest.raises(UserError, match="another nothing-dpo command"), Journal(path):
            pass


def test_a_second_writer_is_refused_and_harms_nothing(path):
    code = (
        "import sys, pathlib\nfrom dpo_cli.data.jsonl import Journal\n"
        "with Journal(pathlib.Path(sys.argv[1])) as journal: journal.append({'id': 'z', 'text': ''})"
    )
    with Journal(path) as journal:
        journal.append(Row("a", "x"))
        done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
        assert "another nothing-dpo command" in done.stderr
        journal.append(Row("b", "x"))
    assert ids(path) == ["a", "b"]
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)
    assert ids(path) == ["a", "b", "z"]


WRITER = """
import itertools, sys, pathlib
from dpo_cli.data.jsonl import Journal
path = pathlib.Path(sys.argv[1])
start = sum(1 for line in path.open("rb") if line.endswith(b"\\n")) if path.exists() else 0
with Journal(path) as journal:
    for number in itertools.count(start):
        journal.append({"id": str(number), "text": "x" * (number * 7919 % 50_000)})
        print(number, flush=True)
"""


def test_kill_9_in_the_middle_of_appends_loses_nothing_that_was_reported(path):
    reported = -1
    for round in range(4):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
        for _ in range(40 + 17 * round):
            reported = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        rest = process.communicate()[0].split()
        reported = int(rest[-1]) if rest else reported
    fill(path, "end")
    found = ids(path)
    assert found[:-1] == [str(number) for number in range(len(found) - 1)]
    assert reported < len(found) - 1 <= reported + 2


def test_compaction_that_is_killed_leaves_one_of_the_two_files(path):
    code = (
        "import sys, pathlib\nfrom dpo_cli.data.jsonl import Journal\n"
        "with Journal(pathlib.Path(sys.argv[1])) as journal:\n  print('go', flush=True)\n  journal.compact()"
    )
    fill(path, *(str(number % 500) for number in range(4000)), text="x" * 500)
    rows = read_latest(path, Row)
    for delay in (0, 0.002, 0.005, 0.01, 0.02):
        process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert read_latest(path, Row) == rows
        assert len(ids(path)) in (500, 4000)


LIMITED = """
import pathlib, resource, sys
from dpo_cli.errors import UserError
from dpo_cli.data.jsonl import Journal
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
with Journal(pathlib.Path(sys.argv[1])) as journal:
    for number in range(1000):
        try:
            journal.append({"id": str(number), "text": "x" * 999})
        except UserError as error:
            print(number, error.code)
            break
    for number in range(1000, 1003):  # what still fits is still taken
        journal.append({"id": str(number), "text": ""})
"""


def test_a_row_that_does_not_fit_is_taken_back_whole(path):
    done = subprocess.run([sys.executable, "-c", LIMITED, str(path)], capture_output=True, text=True, check=True)
    number, code = map(int, done.stdout.split())
    assert code == Exit.FAILED
    assert ids(path) == [*map(str, range(number)), "1000", "1001", "1002"]


FULL = """
import pathlib, sys
from dpo_cli.errors import UserError
from dpo_cli.data.jsonl import BLOCK_BYTES, Journal, write_rows
folder = pathlib.Path(sys.argv[1])
with Journal(folder / "rows.jsonl") as journal:
    journal.append({"id": "a", "text": "x"})
    for attempt in (lambda: journal.append({"id": "b", "text": "x" * 100_000}),
                    lambda: write_rows(folder / "rows.jsonl", [{"id": "c", "text": "x" * 100_000}])):
        try:
            attempt()
        except UserError as error:
            print(error.code, error.message, error.hint, sep="|")
print((folder / "rows.jsonl").read_text(), sorted(file.name for file in folder.iterdir()))
"""


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare, for a file system of its own")
def test_a_full_disk_is_said_and_keeps_what_was_there(tmp_path):
    script = f'mount -t tmpfs -o size=64k none {tmp_path} && exec {sys.executable} -c "$0" {tmp_path}'
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script, FULL], capture_output=True, text=True)
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip(f"no mounts here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    first, second, row, *_, files = done.stdout.strip().splitlines()
    assert first == second
    assert first.startswith("1|the disk is full; everything written before is kept|free some space")
    assert json.loads(row) == {"id": "a", "text": "x"}
    assert files.strip() == "['.rows.jsonl.lock', 'rows.jsonl']"


def test_a_folder_that_may_not_be_written_is_said(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError) as raised, Journal(file / "rows.jsonl"):
        pass
    assert os.strerror(errno.ENOTDIR) in raised.value.message or os.strerror(errno.EEXIST) in raised.value.message


def test_replacing_a_file_is_all_or_nothing(path):
    write_rows(path, [Row("a", "x")])

    def rows():
        yield Row("b", "x")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_rows(path, rows())
    assert ids(path) == ["a"]
    assert [file.name for file in path.parent.iterdir()] == ["rows.jsonl"]
