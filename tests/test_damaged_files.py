"""Damaged files of every dialect and kind: one line of where and what, never a traceback, never a changed file."""

import csv
import gzip
import io
import json
import random
import re

import pytest
import typer
from dialects import DIALECTS
from typer.testing import CliRunner

from dpo_cli.cli import app

FILES = 408  # 17 dialects, two seeds of each of the twelve damages
COMMANDS = [
    ["pair", "--dry-run", "--import"],
    ["pair", "--skip-bad", "--import"],
    ["pair", "--dry-run", "--rollouts"],
    ["generate", "--dry-run", "--url", "http://x", "--prompts"],
]


def jsonl(rows):
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def parquet(rows):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    content = io.BytesIO()
    flat = [{key: value if isinstance(value, str) else json.dumps(value) for key, value in row.items()} for row in rows]
    names = sorted({key for row in flat for key in row})
    columns = {name: [row.get(name) for row in flat] for name in names}
    parquet.write_table(pyarrow.table(columns), content)
    return content.getvalue()


def table(rows):
    text = io.StringIO()
    names = sorted({key for row in rows for key in row})
    writer = csv.DictWriter(text, names)
    writer.writeheader()
    for row in rows:
        writer.writerow({key: value if isinstance(value, str) else json.dumps(value) for key, value in row.items()})
    return text.getvalue().encode()


KINDS = {
    "rows.jsonl": jsonl,
    "rows.json": lambda rows: json.dumps(rows, indent=1).encode(),
    "rows.csv": table,
    "rows.parquet": parquet,
    "rows.jsonl.gz": lambda rows: gzip.compress(jsonl(rows), mtime=0),
    "data.json": lambda rows: json.dumps({"data": rows}).encode(),
}


def truncated(rng, content):
    return content[: rng.randrange(len(content))]


def flipped(rng, content):
    damaged = bytearray(content)
    for _ in range(rng.randint(1, 8)):
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def put_in(piece):
    def damage(rng, content):
        place = rng.randrange(len(content) + 1)
        return content[:place] + piece + content[place:]

    return damage


def misencoded(rng, content):
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        return content[::-1]
    mark = rng.choice(["", "\ufeff"])
    return (mark + text).encode(rng.choice(["utf-16-le", "utf-16-be", "utf-32-le", "cp037"]), "replace")


def value(new):
    """One value anywhere in the rows replaced; works on what is JSON."""

    def damage(rng, content):
        quoted = [found.span(1) for found in re.finditer(rb'": ?("(?:[^"\\]|\\.)*"|[\[{])', content)]
        if not quoted:
            return flipped(rng, content)
        start, end = rng.choice(quoted)
        return content[:start] + new + content[end if content[start : start + 1] == b'"' else start + 1 :]

    return damage


DAMAGES = {
    "truncated": truncated,
    "bits flipped": flipped,
    "NUL bytes": put_in(b"\x00\x00"),
    "no UTF-8": put_in(b"\xe9\xff"),
    "another encoding": misencoded,
    "a number": value(b"3"),
    "null": value(b"null"),
    "NaN": value(b"NaN"),
    "half a character": value(rb'"\ud800"'),
    "thousands of digits": value(b"9" * 6000),
    "nested too deeply": value(b"[" * 5000 + b"]" * 5000),
    "an object": value(b'{"a": [1, {}]}'),
}


def cases():
    for number in range(FILES):
        dialect = list(DIALECTS)[number % len(DIALECTS)]
        damage = list(DAMAGES)[number // len(DIALECTS) % len(DAMAGES)]
        yield number, dialect, damage


def test_no_damaged_file_is_a_bug_or_is_changed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    built = typer.main.get_command(app)  # once: building it takes longer than the command itself
    monkeypatch.setattr("typer.testing._get_command", lambda _: built)
    runner = CliRunner()
    codes = []
    for number, dialect, damage in cases():
        rng = random.Random(number)
        name, make = rng.choice(list(KINDS.items()))
        rows = DIALECTS[dialect][0] * rng.randint(1, 3)
        content = DAMAGES[damage](rng, make(rows))
        file = tmp_path / name
        file.write_bytes(content)
        command = [*rng.choice(COMMANDS), name]
        done = runner.invoke(app, [*command, "--data", f"d{number}", "--quiet"])
        told = f"{number}: {dialect}, {damage}, {' '.join(command)}\n{done.output[-600:]}"
        assert done.exception is None or isinstance(done.exception, SystemExit), told
        assert done.exit_code in (0, 2), told
        assert "bug" not in done.output and "Traceback" not in done.output, told
        if done.exit_code:
            assert name in done.stderr and done.stderr.startswith("error: "), told
            assert done.stderr.count("\n") <= 2, told
        assert file.read_bytes() == content, told
        codes.append(done.exit_code)
    assert len(codes) == FILES and 0.5 < sum(code == 2 for code in codes) / FILES < 0.98
