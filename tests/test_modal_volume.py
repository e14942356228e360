"""Pushing to a Modal volume: the real client over loopback, against a small server of our own (modal_server.py)."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from modal_server import ModalServer
from test_storage import on_disk, put

from dpo_cli.errors import UserError
from dpo_cli.progress import Silent
from dpo_cli.storage import sync

FILES = {"a.jsonl": b"one\n" * 100, "deep/b.bin": b"b" * 2_000_000}
DEST = "modal://shelf/some/path"


@pytest.fixture(scope="module")
def modal(tmp_path_factory):
    """One server for all tests."""
    folder = tmp_path_factory.mktemp("modal")
    with ModalServer(folder, folder / "vol") as served:
        yield served


@pytest.fixture
def server(modal):
    """The server with an empty volume."""
    shutil.rmtree(modal.volume("shelf"), ignore_errors=True)
    modal.volume("shelf").mkdir(parents=True)
    return modal


def there(server):
    return on_disk(server.volume("shelf") / "some/path")


def test_what_is_put_is_there_and_is_not_sent_again(server, tmp_path):
    assert set(put(FILES, DEST).sent) == {*FILES, "COMPLETE"}
    found = there(server)
    assert set(found) == {*FILES, "COMPLETE"}
    assert {name: found[name] for name in FILES} == FILES
    before = len(server.uploaded)
    assert put(FILES, DEST).sent == {}
    assert len(server.uploaded) == before
    assert set(put(FILES | {"a.jsonl": b"two\n" * 100}, DEST).sent) == {"a.jsonl", "COMPLETE"}
    assert sync.get(DEST, tmp_path / "back", Silent()).skipped == {}
    assert on_disk(tmp_path / "back") == FILES | {"a.jsonl": b"two\n" * 100}


KILLED = """
import sys; sys.path.insert(0, sys.argv[1])
from test_storage import AtMegabyte, put
put({"one": b"1" * 3_000_000, "two": b"2" * 3_000_000}, sys.argv[2], AtMegabyte(3000))  # kilobytes
"""


def test_after_a_kill_only_the_rest_is_sent(server):
    put({"old": b"x"}, DEST)
    killed = subprocess.run([sys.executable, "-c", KILLED, str(Path(__file__).parent), DEST], env=dict(os.environ))
    assert killed.returncode == -9
    assert set(there(server)) == {"old", "one", "INCOMPLETE"}
    rest = put({"one": b"1" * 3_000_000, "two": b"2" * 3_000_000}, DEST)
    assert (set(rest.sent), set(rest.skipped)) == ({"two", "COMPLETE"}, {"one"})
    assert set(there(server)) == {"old", "one", "two", "COMPLETE"}


def test_a_file_that_a_container_wrote_since_is_sent_again(server):
    put(FILES, DEST)
    file = server.volume("shelf") / "some/path/a.jsonl"
    file.write_bytes(b"two\n" * 100)
    os.utime(file, (2**31, 2**31))
    assert "a.jsonl" in put(FILES, DEST).sent
    assert file.read_bytes() == FILES["a.jsonl"]


def test_what_is_missing_is_said_with_the_command_that_makes_it(server):
    with pytest.raises(UserError, match="no such volume") as caught:
        put(FILES, "modal://other/path")
    assert caught.value.hint == "modal volume create other"


def test_without_a_token_and_without_a_server_it_is_said_within_seconds(server):
    script = (
        "from dpo_cli import storage\nfrom dpo_cli.errors import UserError\n"
        "from dpo_cli.storage import modal\nmodal.CONNECT_SECONDS = 2\n"
        f"try: storage.connect({DEST!r})\nexcept UserError as error: print(error, '|', error.hint)\n"
    )

    def said(**environment):
        done = subprocess.run(
            [sys.executable, "-c", script], env=os.environ | environment, capture_output=True, text=True
        )
        return done.stdout

    nobody = {"MODAL_TOKEN_ID": "", "MODAL_TOKEN_SECRET": "", "MODAL_CONFIG_PATH": "/nonexistent"}
    assert said(**nobody) == "modal://shelf: not logged in to Modal | modal token new\n"
    assert "does not answer within 2 s" in said(MODAL_SERVER_URL="http://127.0.0.1:9")
