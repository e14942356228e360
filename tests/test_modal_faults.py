"""Modal and money: what is lost, cancelled, started twice or capped. The real client over loopback, our own server."""

import json
import threading
import time

import pytest
from test_modal import asked, modal, only_server, whole  # noqa: F401
from training import Lines

from dpo_cli.errors import Exit, UserError
from dpo_cli.jobs import cap, launch, lease, registry
from dpo_cli.jobs.backends import modal as backend
from dpo_cli.progress import Silent

pytest.importorskip("modal_proto.api_pb2")


@pytest.fixture
def lost(modal):  # noqa: F811
    """A submission whose answer was lost: its app is known, its call is not."""
    server, config, _ = modal
    server.lost_call = True
    with pytest.raises(UserError):
        launch.submit("modal", asked(config), config, Silent())
    return server, config, registry.get("modal", config)


def test_a_job_is_cancelled_when_the_service_says_so(lost, monkeypatch):
    server, config, job = lost
    monkeypatch.setattr(backend, "CONNECT_SECONDS", 1.0)
    server.silent = True
    with pytest.raises(UserError):
        launch.cancel(job, config)
    server.silent = False
    job = registry.get("modal", config)
    assert backend.status(job, config).state == "pending" and not server.stopped
    with pytest.raises(UserError, match="cut short"):
        launch.run("modal", asked(config), config, Silent())
    assert len(server.calls) == 1, "the same command must not start a second one"
    assert launch.cancel(job, config).status.state == "cancelled"
    assert server.stopped == [job.handle["app_id"]]


def test_a_container_needs_half_an_hour_at_most_to_start(modal):  # noqa: F811
    server, config, _ = modal
    launch.cancel(launch.submit("modal", asked(config), config, Silent()), config)
    [function] = server.functions.values()
    assert (function.startup_timeout_secs, function.timeout_secs) == (1800, 86400)


def test_the_timeout_follows_from_the_cap(modal):  # noqa: F811
    _, config, _ = modal
    config.plan.max_hours = 1.0
    made = backend.settings(asked(config), config)
    assert made["timeout"] == 3600 + cap.GRACE_SECONDS


def test_a_run_that_another_checkout_started_is_left_alone(modal, tmp_path, monkeypatch):  # noqa: F811
    server, config, _ = modal
    first = launch.submit("modal", asked(config), config, Silent())
    launch.cancel(first, config)
    other = server.calls[first.handle["call_id"]]
    other.result = None  # it runs, as far as the service knows
    (checkout := tmp_path / "checkout").mkdir()
    monkeypatch.chdir(checkout)
    config.runs, config.model.dpo_adapter = str(checkout / "runs"), str(checkout / "out")
    spec = asked(config)
    assert set(spec.results) == set(first.spec.results)
    volume = server.volume(config.modal.volume)
    folder = volume / "runs" / ".leases" / lease.name_of(spec.results)
    folder.mkdir(parents=True)
    held = folder / f"{other.id}.json"
    held.write_text(json.dumps(lease.Holder(time.time() - 60, other.id, "ann@laptop:/home/ann/scenes")._asdict()))
    refused = launch.run("modal", spec, config, Silent())
    assert refused.status.exit_code == Exit.USAGE and refused.status.state == "failed"
    assert "ann@laptop:/home/ann/scenes holds it since" in refused.status.reason and "--name OTHER" in refused.hint
    assert held.exists() and not (volume / "runs" / "dpo" / "metrics.jsonl").exists()


def test_a_lost_network_is_a_line_and_the_log_goes_on(modal, monkeypatch):  # noqa: F811
    server, config, _ = modal
    monkeypatch.setattr(backend, "RECONNECT_SECONDS", 0.2)

    class Drops(Lines):
        def log(self, text):
            super().log(text)
            if "held-out loss" in text and not self.dropped:
                self.dropped = True
                server.refuse_connections(1.0)

        dropped = False

    ended = launch.run("modal", asked(config), config, progress := Drops())
    assert (ended.status.state, ended.status.exit_code) == ("succeeded", Exit.OK)
    assert progress.dropped and sum("held-out loss" in line for line in progress.lines) == 3


class Copy:
    """A container's view of a volume: it sees what was committed when it last looked, as on Modal."""

    def __init__(self, shared, own, meet):
        self.shared, self.own, self.meet, self.commits = shared, own, meet, 0

    def reload(self):
        for file in self.shared.iterdir():
            (self.own / file.name).write_bytes(file.read_bytes())

    def commit(self):
        if not self.commits:
            self.meet.wait()  # both have looked
        self.commits += 1
        for file in self.own.glob(f"{self.own.name}.json"):
            (self.shared / file.name).write_bytes(file.read_bytes())
        if not (self.own / f"{self.own.name}.json").exists():
            (self.shared / f"{self.own.name}.json").unlink(missing_ok=True)


def test_of_two_that_look_at_the_same_time_one_writes(tmp_path):
    looked, committed, results = threading.Barrier(2, timeout=5), threading.Barrier(2, timeout=5), {}
    (shared := tmp_path / "shared").mkdir()

    def take(call):
        (own := tmp_path / call).mkdir()
        view = Copy(shared, own, looked)
        try:
            with lease.hold(
                own, call, call, {"a", "b"}.__contains__, view.reload, view.commit, lambda seconds: committed.wait()
            ):
                results[call] = "held"
                time.sleep(0.3)
        except lease.Held as held:
            results[call] = str(held)

    threads = [threading.Thread(target=take, args=(call,)) for call in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(value == "held" for value in results.values()) == [False, True], results
    assert not list(shared.iterdir())


def hold(folder, call, running):
    with lease.hold(folder, call, "me", running.__contains__, lambda: None, lambda: None, lambda seconds: None):
        return True


def test_what_a_killed_holder_left_holds_nothing_and_its_own_next_attempt_goes_on(tmp_path):
    (tmp_path / "gone.json").write_text(json.dumps(lease.Holder(1.0, "gone", "x")._asdict()))
    (tmp_path / "torn.json").write_text('{"since": 1')
    assert hold(tmp_path, "me", {"me"})
    (tmp_path / "me.json").write_text(json.dumps(lease.Holder(1.0, "me", "x")._asdict()))
    assert hold(tmp_path, "me", {"me", "gone-not"})
    (tmp_path / "other.json").write_text(json.dumps(lease.Holder(1.0, "other", "y")._asdict()))
    with pytest.raises(lease.Held, match="y holds it since 1970-01-01 00:00 UTC"):
        hold(tmp_path, "me", {"me", "other"})
