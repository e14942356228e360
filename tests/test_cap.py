"""A cap on what a rented card may cost: it saves, ends with 4, and the same command goes on; attempts add up."""

import pytest
from training import settings

from dpo_cli.errors import Exit, UserError
from dpo_cli.jobs import cap as capping
from dpo_cli.jobs import spec as jobs_spec
from dpo_cli.jobs import worker
from dpo_cli.jobs.cap import Cap, seconds_for
from dpo_cli.jobs.progress_lines import Outcome, Relay, parse


def test_the_lower_of_dollars_and_hours_decides():
    assert seconds_for(None, None, 0.8) is None
    assert seconds_for(1.6, None, 0.8) == 7200
    assert seconds_for(1.6, 1.0, 0.8) == 3600
    assert seconds_for(None, 0.5, 0.0) == 1800
    with pytest.raises(UserError, match="price"):
        seconds_for(1.0, None, 0.0)


class ReachedAtStep(Cap):
    """A cap that is reached when a step is done, whatever the clock says."""

    step = 6

    def _watch(self):
        pass

    def at(self, done):
        if done == self.step:
            self._reached = True
            self._stop()


@pytest.fixture
def capped(tmp_path, start, monkeypatch):
    """A run under a cap that is reached in its middle."""
    caps = []

    class Watched(ReachedAtStep):
        def __enter__(self):
            caps.append(self)
            return super().__enter__()

    class Told(Relay):
        def update(self, done, **counters):
            super().update(done, **counters)
            caps[-1].at(done)

    monkeypatch.setattr(worker, "Cap", Watched)
    monkeypatch.setattr(worker, "Relay", Told)
    config = settings(start, start / "base", f"runs={tmp_path / 'runs'}", f"model.dpo_adapter={tmp_path / 'out'}")
    config.gate.kl_limit = 1000.0
    spec = jobs_spec.make(config, "train", volume=None, seconds=3600.0)
    spec.submission = "one"
    return tmp_path, spec


def test_at_the_cap_it_saves_and_ends_with_4_and_the_same_command_goes_on(capped, capsys):
    folder, spec = capped
    outcome = worker.serve(spec)
    assert outcome.exit_code == Exit.BUDGET
    assert "cap of 1 hours" in outcome.error and "goes on from the last checkpoint" in outcome.hint
    lines = [
        line for text in capsys.readouterr().out.splitlines() if (line := parse(text)) is not None and line.outcome
    ]
    assert lines[-1].outcome.exit_code == Exit.BUDGET, "the last line of the log decides"
    assert [path.name for path in (folder / "runs/dpo/checkpoints").glob("checkpoint-6")], "it saved"
    spec.submission = "two"
    outcome = worker.serve(spec)
    assert outcome.exit_code in (Exit.OK, Exit.GATE) and outcome.result["resumed_from"] == 6


def test_an_attempt_with_nothing_left_does_not_begin(capped, monkeypatch):
    folder, spec = capped
    (folder / "runs").mkdir(exist_ok=True)
    (folder / "runs" / ".used-one.json").write_text('{"seconds": 3590.0}')
    monkeypatch.setattr(worker, "_serve_here", lambda *_: pytest.fail("it began"))
    assert worker.serve(spec).exit_code == Exit.BUDGET


def test_what_ends_by_itself_ends_as_it_would(tmp_path):
    spec = jobs_spec.Spec(command="train", name="x", config={}, seconds=3600.0, submission="s")
    with Cap(spec, tmp_path, stop=lambda: pytest.fail("not at the cap")) as found:
        ended = Outcome(exit_code=Exit.GATE)
    assert not found.reached() and found.outcome(ended) is ended


def test_attempts_add_up(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(capping.time, "monotonic", lambda: clock[0])
    spec = jobs_spec.Spec(command="train", name="x", config={}, seconds=3600.0, submission="s")
    for attempt in (1, 2):
        with Cap(spec, tmp_path, stop=lambda: None) as found:
            clock[0] += 1700
        assert found.used == attempt * 1700
    with Cap(spec, tmp_path, stop=lambda: None) as found:
        assert not found.reached()
        clock[0] += 190
    with Cap(spec, tmp_path, stop=lambda: None) as found:
        assert found.reached()
    another = jobs_spec.Spec(command="train", name="x", config={}, seconds=3600.0, submission="t")
    with Cap(another, tmp_path, stop=lambda: None) as found:
        assert not found.reached(), "each submission has a cap of its own"
