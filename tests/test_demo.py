"""The demo: its text, its judge, and a small run from nothing to a served-ready adapter."""

from itertools import pairwise
from pathlib import Path

import pytest
from adapters import base_model

from dpo_cli.config.resolve import resolve
from dpo_cli.demo import run as demo
from dpo_cli.demo.run import Sizes
from dpo_cli.demo.scenes import cast, make_scenes
from dpo_cli.demo.score import voices
from dpo_cli.errors import UserError
from dpo_cli.progress import Silent

OPENING = [{"role": "user", "content": "[PIP] Do not sit on the fan yet.\n[BRAM] Doom has a sound."}]


def test_every_line_is_where_the_judge_expects_it() -> None:
    _, characters = cast()
    assert len(characters) == 4
    for name, character in characters.items():
        assert len(character.words) == 4
        for line in character.voice:
            assert voices(OPENING, f"[{name}] {line}") > 0, line
        for line in character.plain + character.opens:
            assert voices(OPENING, f"[{name}] {line}") == 0, line


def test_scenes_are_the_same_for_a_seed_and_share_no_opening() -> None:
    scenes = make_scenes(500, 0.35, seed=1)
    assert scenes == make_scenes(500, 0.35, seed=1)
    assert scenes != make_scenes(500, 0.35, seed=2)
    assert len({scene.opening for scene in scenes}) == 500
    voiced = sum(voices([{"role": "user", "content": scene.opening}], scene.rest) for scene in scenes) / 500
    assert voiced == pytest.approx(3.5, abs=0.3)
    for scene in scenes:
        speakers = [line.partition("]")[0] for line in f"{scene.opening}\n{scene.rest}".splitlines()]
        assert len(speakers) == 5
        assert all(one != other for one, other in pairwise(speakers))


@pytest.mark.parametrize(
    ("completion", "hits"),
    [
        ("[MARLO] Receipt, please.\n[PIP] Lever up.\n[BRAM] Alas, soup.", 3),
        ("[MARLO] Receipt, please.\n[PIP] Hold this.\n[BRAM] The soup was cold.", 1),
        ("[PIP] Receipt, please.", 0),  # MARLO's word
        ("[MARLO] Receipts are boring.", 0),  # another word
        ("[BRAM] Doom has a sound.", 0),  # said in the opening
        ("[MARLO] Receipt, please.\n[MARLO] Receipt, please.", 1),
        ("MARLO: Receipt, please.", 0),
        ("[MARLO] Receipt, please.\n", 1),
        ("", 0),
    ],
)
def test_the_judge_by_hand(completion: str, hits: int) -> None:
    assert voices(OPENING, completion) == pytest.approx(10 * hits / 3)


def test_neither_short_nor_long_wins() -> None:
    lines = ["[PIP] Lever up.", "[BRAM] Alas, soup.", "[PIP] Spring in.", "[BRAM] Doom again.", "[PIP] Lever down."]
    scores = [voices(OPENING, "\n".join(lines[:count])) for count in range(1, 6)]
    assert scores == pytest.approx([10 / 3, 20 / 3, 10, 7.5, 6])


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "nothing-dpo.toml").write_text('data = "mine"\n')
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match="no folder of the demo"):
        demo.run(tmp_path, Silent(), fresh=True)
    assert (tmp_path / "data").exists()


def test_a_base_has_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its settings name it from wherever they are read; what was made for another base is left alone."""
    monkeypatch.chdir(tmp_path)
    base = base_model(tmp_path / 'some "base"')
    nothing = Sizes(base=0, demonstrations=0, prompts=0, held_out=0, steps=0)
    for first in (True, False):  # the folder is the demo's own the second time, also with settings that a user added
        with pytest.raises(UserError, match="no rows to train on"):
            demo.run(None, Silent(), sizes=nothing, base=base.name)
        with (tmp_path / 'demo-some "base"' / "nothing-dpo.toml").open("a") as file:
            file.write("[train]\nbeta = 0.2\n" if first else "")
    monkeypatch.chdir(tmp_path / 'demo-some "base"')
    config = resolve(environment={}).config
    assert (config.model.base, config.train.beta) == (str(base), 0.2)
    for other in (None, "HuggingFaceTB/SmolLM2-135M-Instruct"):
        with pytest.raises(UserError, match="for another base"):
            demo.run(Path(), Silent(), sizes=nothing, base=other)


class Stages(Silent):
    """Keeps which stages had work to do."""

    def __init__(self) -> None:
        self.begun: list[str] = []

    def begin(self, stage: str, total: int | None, done: int = 0) -> None:
        self.begun.append(stage)


def test_the_whole_pipeline_and_nothing_twice(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    sizes = Sizes(base=400, demonstrations=64, prompts=40, held_out=16, steps=100)
    here = Path.cwd()
    result = demo.run(folder, Silent(), sizes=sizes)
    assert Path.cwd() == here
    assert result.dpo.step_zero is not None
    assert result.dpo.step_zero.ok
    assert result.dpo.reference_sha256 == result.sft.policy_sha256 != result.dpo.policy_sha256
    assert result.generated.completions >= 4 * 40
    assert result.judged.judged > 0
    assert result.paired.train > 0
    assert result.evaluation.n == 16
    assert '"name":"spin-dpo"' in result.serve_config
    for name in ("base/config.json", "adapters/dpo/adapter_config.json", "data/dpo/train.jsonl", "data/heldout.jsonl"):
        assert (folder / name).is_file()

    stages = Stages()
    again = demo.run(folder, stages, sizes=sizes)
    assert stages.begun == []
    assert again.evaluation == result.evaluation
