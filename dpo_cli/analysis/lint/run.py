"""Preference lint: what is wrong with train.jsonl and val.jsonl, and a copy without it.

Reads our own preference rows and, where it is at hand, the base model's tokenizer; writes only the copy.
Deterministic: the same files give the same findings and bytes. Errors make training wrong (leakage, contradictions,
broken templates, copies); warnings are to be looked at. Not covered: whether the preferences are right.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from dpo_cli.analysis.lint import corpus, rules
from dpo_cli.analysis.lint.findings import Finding, Pair, PairFiles, SplitSide
from dpo_cli.analysis.lint.tokens import token_counter
from dpo_cli.config.settings import Config
from dpo_cli.data.files import write_files
from dpo_cli.data.jsonl import encode_rows
from dpo_cli.data.records import Preference
from dpo_cli.errors import UserError
from dpo_cli.statistics import Interval

LENGTH_BIAS = 0.6  # P(longer chosen) beyond which, or below one minus which, the data teaches length

# Rules whose errors cost a row; copies and leakage are mended without.
DROPPED = {"empty-side", "identical-sides", "cut-side", "template", "length", "contradiction"}


class Lint(Struct, kw_only=True):
    """`inspect pairs --lint`: rows by side, findings (errors first) and how many; `tokens` says what counted them."""

    train: int
    val: int
    errors: int
    warnings: int
    findings: list[Finding]
    longer_chosen: Interval | None
    tokens: str


class Fixed(Struct, kw_only=True):
    """What the cleaned copy holds, and how many rows it lacks or has on the other side."""

    train: int
    val: int
    dropped: int
    moved: int
    train_path: str
    val_path: str


class Linted(Struct, kw_only=True):
    """What lint found, the cleaned copy if one was asked for, and the errors that are left in it, else in the data."""

    lint: Lint
    fixed: Fixed | None
    errors_left: int


def run(config: Config, folder: Path | None = None) -> Linted:
    """Lint the pairs of `config.data`, a folder or one file, and write a cleaned copy to `folder`.

    Raises:
        UserError: no pairs there, `file:line` of a row that is no pair, or the copy would replace what it is of.
    """
    data = Path(config.data)
    train = data if data.is_file() else data / "train.jsonl"
    val = data / "val.jsonl"  # of a file there is none
    if not train.exists():
        raise UserError("no such file", where=str(train), hint="nothing-dpo judge, or nothing-dpo pair")
    if folder is not None and folder.resolve() == train.parent.resolve():
        raise UserError("this would replace the pairs themselves", where="--fix", hint="name another folder")
    max_length, count_tokens = config.train.max_length, token_counter(config.model.base)
    found = lint(train, val, max_length, count_tokens)
    if folder is None:
        return Linted(lint=found, fixed=None, errors_left=found.errors)
    with read_split(train, val) as pairs:
        fixed = write_fixed(pairs, found.findings, folder)
    copy = lint(Path(fixed.train_path), Path(fixed.val_path), max_length, count_tokens)
    return Linted(lint=found, fixed=fixed, errors_left=copy.errors)


def lint(
    train: Path,
    val: Path,
    max_length: int,
    count_tokens: Callable[[str], int] | None = None,
    length_bias: float = LENGTH_BIAS,
) -> Lint:
    """Check both sides of the split; without `val` there is only one.

    Args:
        train: train.jsonl.
        val: val.jsonl, which may be missing.
        max_length: longest prompt plus completion, in tokens.
        count_tokens: tokens of a text; unset: estimated from its characters.
        length_bias: share of pairs with the longer side chosen, above which it is a bias.

    Raises:
        UserError: train is missing, or `file:line` of a row that is no pair.
    """
    with read_split(train, val) as pairs:
        findings = check(pairs, max_length, count_tokens, length_bias)
        longer_chosen = corpus.longer_chosen(pairs)
    severities = Counter(finding.severity for finding in findings)
    sides = Counter(pair.side for pair in pairs.all_keys())
    return Lint(
        train=sides["train"],
        val=sides["val"],
        errors=severities["error"],
        warnings=severities["warning"],
        findings=findings,
        longer_chosen=longer_chosen,
        tokens="tokenizer" if count_tokens else f"estimated, {rules.CHARACTERS_PER_TOKEN} characters a token",
    )


def read_split(train: Path, val: Path) -> PairFiles:
    """The pairs of both sides, to be opened.

    Raises:
        UserError: train is missing, or `file:line` of a row that is no pair.
    """
    return PairFiles({"train": train, "val": val} if val.exists() else {"train": train})


def check(
    pairs: Sequence[Pair],
    max_length: int,
    count_tokens: Callable[[str], int] | None = None,
    length_bias: float = LENGTH_BIAS,
) -> list[Finding]:
    """All findings, errors first, each rule's in the order of the rows."""
    findings = [
        *rules.check_rows(pairs, max_length, count_tokens),
        *corpus.check_contradictions(pairs),
        *corpus.check_duplicates(pairs),
        *corpus.check_leakage(pairs),
        *corpus.check_near_leakage(pairs),
        *corpus.check_near_duplicates(pairs),
        *corpus.check_length_bias(pairs, length_bias),
        *corpus.check_outliers(pairs),
    ]
    return sorted(findings, key=lambda finding: finding.severity)  # stable, and "error" < "warning"


def fix(pairs: Sequence[Pair], findings: Iterable[Finding]) -> list[Pair]:
    """The pairs without errors and without near-duplicates.

    Rows that are wrong in themselves go, of contradictory ones all; of copies one stays, the held-out one if there is
    one; prompts on both sides of the split, or almost the same, move to the side that has more of their rows. No
    prompt is moved to both.
    """
    wrong = {
        location.where
        for finding in findings
        if finding.severity == "error" and finding.rule in DROPPED
        for location in finding.rows
    }
    kept = corpus.unique([pair for pair in pairs if pair.where not in wrong])
    copies = {pair.where for group in corpus.near_groups(kept) for pair in group[1:]}
    kept = [pair for pair in kept if pair.where not in copies]
    sides = _sides(kept)
    order = {pair.where: index for index, pair in enumerate(pairs)}
    return sorted(
        (msgspec.structs.replace(pair, side=sides[pair.prompt_key]) for pair in kept),
        key=lambda pair: order[pair.where],
    )


def _sides(pairs: Sequence[Pair]) -> dict[int, SplitSide]:
    """The one side of each prompt: where most rows of its group are; in a tie val, which is the smaller one."""
    group_of = corpus.prompt_groups(pairs)
    votes: Counter[tuple[int, SplitSide]] = Counter((group_of(pair), pair.side) for pair in pairs)

    def side(group: int) -> SplitSide:
        return "train" if votes[group, "train"] > votes[group, "val"] else "val"

    return {pair.prompt_key: side(group_of(pair)) for pair in pairs}


def write_fixed(pairs: Sequence[Pair], findings: Iterable[Finding], folder: Path) -> Fixed:
    """Write `fix`'s pairs as train.jsonl and val.jsonl of another folder.

    Raises:
        UserError: the folder can't be written.
    """
    fixed = fix(pairs, findings)
    before = {pair.where: pair.side for pair in pairs}
    paths: dict[SplitSide, Path] = {"train": folder / "train.jsonl", "val": folder / "val.jsonl"}
    rows: dict[SplitSide, list[Preference]] = {"val": [], "train": []}
    for pair in fixed:
        rows[pair.side].append(pair.row)
    write_files({paths[side]: encode_rows(own) for side, own in rows.items()}, private=True)
    sides = Counter(pair.side for pair in fixed)
    return Fixed(
        train=sides["train"],
        val=sides["val"],
        dropped=len(pairs) - len(fixed),
        moved=sum(before[pair.where] != pair.side for pair in fixed),
        train_path=str(paths["train"]),
        val_path=str(paths["val"]),
    )
