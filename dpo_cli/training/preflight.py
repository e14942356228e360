"""What a run would need, from the files at hand: reads rows, base and adapter, and asks `plan.py`.

Reads train.jsonl, val.jsonl, the base's config.json and tokenizer.json, and the adapter. Writes nothing, downloads
at most a config.json, and needs no torch.
"""

from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from dpo_cli.adapter import read_adapter
from dpo_cli.config.presets import NOTES, PRESETS
from dpo_cli.config.resolve import resolve
from dpo_cli.config.settings import Config
from dpo_cli.errors import UserError
from dpo_cli.models.base_model import check_base, find_base
from dpo_cli.training import plan
from dpo_cli.training.inputs import TrainingRow, read_inputs
from dpo_cli.training.known_shapes import shape_of
from dpo_cli.training.plan import Plan, Shape, TokenLengths
from dpo_cli.training.trained_parameters import of_adapter, of_fresh_adapter

# What the table of presets is reckoned for where there are no files: Llama 3.2 3B, 1,000 pairs of 600 + 150 tokens.
USUAL_SHAPE = Shape(
    hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24, num_key_value_heads=8,
    head_dim=128, vocab_size=128256, tie_word_embeddings=True,
)  # fmt: skip
USUAL_LENGTHS = [TokenLengths(600, [150, 150])] * 1000


class Cost(Struct):
    """A preset: where it is from and what came of it, what it sets, and what a run with it needs."""

    name: str
    note: str
    settings: dict[str, object]
    memory_gb: float
    fits: bool
    hours: float
    usd: float
    steps: int


def run(config: Config, data: Path | None = None, limit: int | None = None) -> Plan:
    """The plan of `train` with these settings.

    Raises:
        UserError: bad input, or nothing is known of the base.
    """
    inputs = read_inputs(config, "dpo", data, limit)
    if _has_weights(config.model.base):
        check_base(config.model.base)
    shape, sizes = shape_of(config.model.base)
    adapter, warnings = _adapter(config, shape)
    count, counted_by = plan.token_count_or_estimate(find_base(config.model.base) or Path("nowhere"))

    def lengths(rows: Sequence[TrainingRow]) -> list[TokenLengths]:
        return [
            TokenLengths(plan.count(row.prompt, count), [plan.count(one, count) for one in row.completions])
            for row in rows
        ]

    made = plan.make(
        config.train,
        config.plan,
        shape,
        adapter,
        lengths(inputs.rows),
        lengths(inputs.held_out),
        counted_by,
    )
    made.sizes = sizes
    made.warnings += warnings
    return made


def of_encoded(config: Config, base: Path, rows: Sequence[TokenLengths], held_out: Sequence[TokenLengths]) -> Plan:
    """The plan of a run whose rows are encoded already, from their token counts."""
    shape = plan.read_shape(base)
    return plan.make(config.train, config.plan, shape, _adapter(config, shape)[0], rows, held_out, "the encoder")


def presets(config: Config) -> list[Cost]:
    """What every preset costs, on this base if it is here and a usual 3B model else, for 1,000 usual pairs."""
    try:
        shape, _ = shape_of(config.model.base)
    except UserError:
        shape = USUAL_SHAPE
    costs = []
    for name, settings in PRESETS.items():
        chosen = resolve(preset=name, environment={}, file=Path("/dev/null")).config
        adapter, _ = of_fresh_adapter(chosen.train, shape, None)
        made = plan.make(chosen.train, config.plan, shape, adapter, USUAL_LENGTHS, [], "assumed")
        costs.append(
            Cost(name, NOTES[name], dict(settings), made.total_gb, made.fits, made.hours, made.usd["modal"], made.steps)
        )
    return costs


def _adapter(config: Config, shape: Shape) -> tuple[int, list[str]]:
    """Weights of the adapter that is trained, and warnings."""
    section = config.model
    base = check_base(section.base, tokenizer=False) if _has_weights(section.base) else None
    if section.adapter and Path(section.adapter).exists() and not section.adapter_into_base:
        return of_adapter(read_adapter(Path(section.adapter), section.base, section.same_base)), []
    trained, lost = of_fresh_adapter(config.train, shape, base)
    if not lost or config.train.full:
        return trained, []
    return trained, [f"no layer is called {', '.join(lost)}: train.target_modules counts without"]


def _has_weights(base: str) -> bool:
    """Whether a base is here with its weights: of a Hub id, config.json alone may be."""
    folder = find_base(base)
    return folder is not None and any(any(folder.glob(name)) for name in ("*.safetensors*", "pytorch_model*"))
