"""Sending and fetching: to a folder, and to Cloud Storage by Google's own client against gcp-storage-emulator."""

import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from training import exit_code_of, kill_this_process

from dpo_cli import storage
from dpo_cli.errors import Exit, UserError
from dpo_cli.progress import Silent
from dpo_cli.storage import sync

FILES = {"a.jsonl": b"one\n" * 100, "deep/b.bin": os.urandom(3_000_000)}
BIG = os.urandom(12_000_000)  # more than one part of a resumable upload


@pytest.fixture(scope="module")
def emulator():
    from gcp_storage_emulator.server import create_server

    server = create_server("127.0.0.1", 0, in_memory=True)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def bucket(emulator, monkeypatch):
    """A bucket of its own, and the client's way to it."""
    from google.cloud.storage import Client

    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{emulator._api._httpd.server_port}")
    emulator.wipe()
    Client().create_bucket("shelf")
    return Client().bucket("shelf")


@pytest.fixture(params=["folder", "gs"])
def dest(request, tmp_path):
    if request.param == "folder":
        return str(tmp_path / "there")
    request.getfixturevalue("bucket")
    return "gs://shelf/some/path"


def put(files, dest, progress=None, **options):
    return sync.put(files, dest, progress or Silent(), **options)


class AtMegabyte(Silent):
    """Progress that kills this process once so much was sent."""

    def __init__(self, limit):
        self.limit = limit

    def update(self, done, **counters):
        if done >= self.limit:
            kill_this_process()


def names_there(dest):
    return sorted(storage.connect(dest).listing())


def on_disk(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_what_is_put_is_what_is_got(dest, tmp_path):
    sent = put(FILES, dest)
    assert set(sent.sent) == {*FILES, "COMPLETE"}
    assert sent.bytes == sum(sent.sent.values())
    assert sync.get(dest, tmp_path / "back", Silent()).fetched == {name: len(data) for name, data in FILES.items()}
    assert on_disk(tmp_path / "back") == FILES
    (tmp_path / "back/a.jsonl").write_text("mine")
    again = sync.get(dest, tmp_path / "back", Silent())
    assert (set(again.fetched), set(again.skipped)) == ({"a.jsonl"}, {"deep/b.bin"})
    assert on_disk(tmp_path / "back") == FILES


def test_hashes_that_are_known_are_not_taken_again(tmp_path, monkeypatch):
    content = {name: sync.hashed(data) for name, data in FILES.items()}
    taken, hashed = [], sync.hashed
    monkeypatch.setattr(sync, "hashed", lambda source: taken.append(source) or hashed(source))
    put(FILES, str(tmp_path / "there"), known={"a.jsonl": content["a.jsonl"]})
    assert taken == [FILES["deep/b.bin"]]
    marker = (tmp_path / "there" / "COMPLETE").read_bytes()
    assert sync.read_manifest(marker, "") == content


def test_what_is_there_is_not_sent_again(dest):
    put(FILES, dest)
    second = put(FILES, dest)
    assert (second.sent, second.bytes, set(second.skipped)) == ({}, 0, {*FILES, "COMPLETE"})
    third = put(FILES | {"a.jsonl": b"two\n" * 100}, dest)
    assert set(third.sent) == {"a.jsonl", "COMPLETE"}


def test_a_dry_run_says_what_would_be_sent_and_sends_nothing(dest):
    put({"a.jsonl": FILES["a.jsonl"]}, dest)
    before = names_there(dest)
    would = put(FILES, dest, dry_run=True)
    assert (set(would.sent), set(would.skipped)) == ({"deep/b.bin", "COMPLETE"}, {"a.jsonl"})
    assert names_there(dest) == before


def test_after_a_kill_only_the_rest_is_sent(dest, tmp_path):
    """Killed while the second of three files goes, over a place that was complete before."""
    put({"old": b"x"}, dest)
    (tmp_path / "big").write_bytes(BIG)
    files = {"one": FILES["deep/b.bin"], "two": tmp_path / "big", "three": b"3"}
    assert exit_code_of(lambda: put(files, dest, AtMegabyte(8))) == -9
    assert names_there(dest) == ["old", "one"]  # nothing torn, and no longer called complete
    rest = put(files, dest)
    assert (set(rest.sent), set(rest.skipped)) == ({"two", "three", "COMPLETE"}, {"one"})
    sync.get(dest, tmp_path / "back", Silent())
    assert on_disk(tmp_path / "back") == {"one": files["one"], "two": BIG, "three": b"3"}


def test_progress_ends_at_all_of_it_and_never_goes_back(dest):
    steps = []

    class Noted(Silent):
        def begin(self, stage, total, done=0):
            steps.extend([total, done])

        def update(self, done, **counters):
            steps.append(done)

    put(FILES, dest)
    put(FILES | {"big": BIG}, dest, Noted())
    total, *done = steps
    assert (total, done[0], done[-1]) == (15, 3, 15)
    assert done == sorted(done)


def test_what_was_changed_since_is_refused(dest, tmp_path):
    put(FILES, dest)
    storage.connect(dest).remove("a.jsonl")
    storage.connect(dest).send({"a.jsonl": b"two\n" * 100}, lambda size: None)
    with pytest.raises(UserError, match=r"a.jsonl is not what was sent") as caught:
        sync.get(dest, tmp_path / "back", Silent())
    assert caught.value.code == Exit.FAILED
    assert "a.jsonl" not in on_disk(tmp_path / "back")
    storage.connect(dest).remove("a.jsonl")
    with pytest.raises(UserError, match=r"a.jsonl is gone"):
        sync.get(dest, tmp_path / "back", Silent())


def test_files_that_another_wrote_are_fetched_without_a_marker(dest, tmp_path):
    storage.connect(dest).send(FILES, lambda size: None)
    sync.get(dest, tmp_path / "back", Silent())
    assert on_disk(tmp_path / "back") == FILES


def test_nothing_to_fetch_is_said(dest, tmp_path):
    with pytest.raises(UserError, match="nothing is there"):
        sync.get(dest, tmp_path / "back", Silent())


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "deep/../../evil"])
def test_a_name_that_leads_out_of_the_folder_is_refused(tmp_path, name):
    marker = sync.manifest({name: sync.hashed(b"x")})
    storage.connect(str(tmp_path / "there")).send({"COMPLETE": marker}, lambda size: None)
    with pytest.raises(UserError, match="leads out"):
        sync.get(str(tmp_path / "there"), tmp_path / "back", Silent())


def test_a_full_disk_is_said_and_leaves_no_torn_file(bucket, tmp_path):
    import resource

    put({"big": BIG, "small": b"1"}, "gs://shelf/p")

    def fetch():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
        try:
            sync.get("gs://shelf/p", tmp_path / "back", Silent())
        except UserError as error:
            os._exit(40 + error.code)

    assert exit_code_of(fetch) == 41
    assert "big" not in on_disk(tmp_path / "back")


def test_a_bucket_that_is_not_there_is_said_with_the_command_that_makes_it(bucket):
    with pytest.raises(UserError, match="no such bucket") as caught:
        put(FILES, "gs://other/path")
    assert caught.value.hint == "gcloud storage buckets create gs://other --location=us-central1"


@pytest.mark.parametrize(
    ("status", "said", "command"),
    [(401, "not logged in", "gcloud auth application-default login"), (403, "may not", "add-iam-policy-binding")],
)
def test_a_closed_bucket_is_said_with_the_command_that_opens_it(monkeypatch, status, said, command):
    class Refuses(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(status)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refuses)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_port}")
    with pytest.raises(UserError, match=said) as caught:
        put(FILES, "gs://shelf/path")
    assert command in caught.value.hint
    server.shutdown()
    server.server_close()


def test_without_credentials_the_login_command_is_named(monkeypatch, tmp_path):
    for name in ("STORAGE_EMULATOR_HOST", "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    with pytest.raises(UserError, match="not logged in to Google Cloud") as caught:
        put(FILES, "gs://shelf/path")
    assert caught.value.hint == "gcloud auth application-default login"


@pytest.mark.parametrize(
    ("dest", "said"),
    [("s3://bucket/path", "nothing is sent to"), ("gs://", "no bucket"), ("modal:///x", "no volume"),
     ("hf://alone", "no repository")],
)  # fmt: skip
def test_a_place_that_names_nothing_is_refused(dest, said):
    with pytest.raises(UserError, match=said):
        put(FILES, dest)


def test_the_schemes_are_the_modules():
    assert storage.names() == ["gs", "hf", "modal"]
