"""The house's own rules: who may import whom, and how long a room may be."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "dpo_cli"
FILES = sorted(PACKAGE.rglob("*.py"))

# Rooms, lowest first: each imports only rooms before it. Rooms on one line are on one floor, in this order.
ROOMS = [
    "errors", "progress", "terminal", "safe_text", "interrupts", "statistics",
    "models", "adapter", "config", "model_loading",
    "data",
    "storage", "endpoint", "judges", "engines",
    "analysis",
    "training",
    "stages",
    "jobs",
    "workflows", "demo",
    "html", "view",
    "cli",
]  # fmt: skip
HEAVY = frozenset({
    "model_loading", "training/device_check", "training/precision",
    "training/arguments", "training/dpo", "training/kl", "training/loop", "training/losses", "training/merge_adapter",
    "training/reference_check", "training/retreat", "training/scale_adapter", "training/sft",
    "training/stack_adapters", "training/trainer",
    "training/forward/attention", "training/forward/blockwise_attention", "training/forward/collator",
    "training/forward/deferred_metrics", "training/forward/fused_lora", "training/forward/log_probs",
    "training/forward/packed", "training/forward/reference_cache", "engines/transformers", "engines/_batch",
    "engines/_unpadded", "judges/reward_model", "stages/evaluate/adapters", "stages/evaluate/forgetting",
    "stages/evaluate/harness", "stages/serve_config/log_probs", "demo/tiny", "data/formats/export",
    "analysis/lint/tokens",
})  # fmt: skip
ALLOWED = {
    "typer": {"cli"},
    "rich": {"view", "cli"},
    "aiohttp": {"endpoint"},
    **dict.fromkeys(("torch", "transformers", "trl", "peft", "datasets"), HEAVY),
}


def module(file: Path) -> str:
    """`training/forward/packed`; a package goes by its own name."""
    return "/".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix("/__init__")


def room(file: Path) -> str:
    return module(file).partition("/")[0]


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


@pytest.mark.parametrize("file", FILES, ids=module)
def test_heavy_libraries_stay_in_their_rooms(file):
    for imported, _ in imports(file):
        top = imported.partition(".")[0]
        if top in ALLOWED:
            assert module(file) in ALLOWED[top] or room(file) in ALLOWED[top], f"imports {imported}"


@pytest.mark.parametrize("file", [file for file in FILES if room(file) not in ("__init__", "__main__")], ids=module)
def test_rooms_import_rooms_below_them_only(file):
    mine = room(file)
    for imported, _ in imports(file):
        parts = imported.split(".")
        if parts[0] != "dpo_cli" or len(parts) == 1 or parts[1] == "__version__":
            continue
        if parts[1] != mine:
            assert ROOMS.index(parts[1]) < ROOMS.index(mine), f"{mine} imports {imported}"
        elif mine == "stages":
            own = module(file).split("/")[1]
            assert parts[2] == own, f"stage {own} imports stage {parts[2]}"


def test_every_room_has_its_floor():
    there = {room(file) for file in FILES} - {"__init__", "__main__"}
    assert sorted(there) == sorted(ROOMS)


@pytest.mark.parametrize("file", FILES, ids=module)
def test_a_room_is_short_enough_to_read(file):
    lines = len(file.read_text("utf-8").splitlines())
    assert lines <= 420 or module(file) == "cli", "about 400 lines; cli.py is the whole command surface by design"


def public_types(file: Path) -> list[str]:
    """Public classes and type aliases of a module: names that a reader takes for one idea."""
    found = []
    for node in ast.parse(file.read_text("utf-8")).body:
        if isinstance(node, ast.ClassDef):
            found.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            found += [name for name in names if name[0].isupper() and not name.isupper() and len(name) > 1]
    return [name for name in found if not name.startswith("_")]


def test_one_public_name_has_one_meaning():
    homes: dict[str, list[str]] = {}
    for file in FILES:
        for name in public_types(file):
            homes.setdefault(name, []).append(module(file))
    assert {name: places for name, places in homes.items() if len(places) > 1} == {}
