"""The house's own rules: who may import whom, and how long a room may be."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "dpo_cli"
FILES = sorted(PACKAGE.rglob("*.py"))

# Rooms, lowest first: each imports only rooms before it.
ROOMS = [
    "errors", "terminal", "schema", "store", "presets", "settings", "config", "progress", "storage", "job", "transfer",
    "relay", "adapter", "remedies", "guards", "plan", "endpoint", "engines", "judges", "generate", "judge", "formats",
    "rollouts", "length", "strategies", "pair", "training", "dpo", "stats", "train", "audit", "evaluate", "entry",
    "backends", "launch", "sweep", "pages", "svg", "report", "lint", "push", "serve_config", "rounds",
    "protocol", "demo", "view", "cli",
]  # fmt: skip
STAGES = {"generate", "judge", "pair", "train", "evaluate", "serve_config"}
HEAVY = frozenset({
    "training/attention", "training/head", "training/packed", "training/reference", "training/trainer",
    "training/loop", "training/merge", "training/sft", "training/later", "training/sampled_kl", "training/batches",
    "dpo", "engines/transformers", "judges/reward_model", "evaluate/adapters", "evaluate/harness", "demo/tiny",
    "formats/export", "lint/tokens", "serve_config/scored", "training/stack", "training/lora",
})  # fmt: skip
ALLOWED = {
    "typer": {"cli"},
    "rich": {"view", "cli"},
    "aiohttp": {"endpoint"},
    **dict.fromkeys(("torch", "transformers", "trl", "peft", "datasets"), HEAVY),
}


def room(file: Path) -> str:
    """`engines/transformers` for a module of a package whose name alone would not tell, else the top-level name."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return "/".join(parts) if (PACKAGE / parts[0]).is_dir() and parts[0] not in ("view", "endpoint") else parts[0]


def imports(file: Path) -> list[tuple[str, bool]]:
    """(module, at the top of the file?) of everything that a file imports."""
    tree = ast.parse(file.read_text("utf-8"))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node in tree.body) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names = [f"dpo_cli.{alias.name}" for alias in node.names] if node.module == "dpo_cli" else [node.module]
            found += [(str(name), node in tree.body) for name in names]
    return found


@pytest.mark.parametrize("file", FILES, ids=room)
def test_heavy_libraries_stay_in_their_rooms(file):
    for module, _ in imports(file):
        top = module.partition(".")[0]
        if top in ALLOWED:
            assert room(file) in ALLOWED[top] or room(file).partition("/")[0] in ALLOWED[top], f"imports {module}"


@pytest.mark.parametrize("file", [file for file in FILES if room(file) not in ("__init__", "__main__")], ids=room)
def test_rooms_import_rooms_below_them_only(file):
    mine = room(file).partition("/")[0]
    for module, _ in imports(file):
        parts = module.split(".")
        if parts[0] != "dpo_cli" or len(parts) == 1 or parts[1] in (mine, "__version__"):
            continue
        assert ROOMS.index(parts[1]) < ROOMS.index(mine), f"{mine} imports {module}"
        assert not (mine in STAGES and parts[1] in STAGES), f"stage {mine} imports stage {parts[1]}"


@pytest.mark.parametrize("file", FILES, ids=room)
def test_a_room_is_short_enough_to_read(file):
    lines = len(file.read_text("utf-8").splitlines())
    assert lines <= 420 or room(file) == "cli", "about 400 lines; cli.py is the whole command surface by design"


def test_help_loads_nothing_heavy():
    code = (
        "import sys; sys.argv = ['nothing-dpo', 'train', '--help']\n"
        "from dpo_cli.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch','transformers','trl','peft','datasets','openai','genai_prices','yaml','aiohttp'}"
        " & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-1] == "[]"
    assert "--beta" in output
