"""Files of other tools to pairs: rows that are pairs as they are, answers with scores by a strategy.

Reads the files; writes nothing but, with `skip_bad`, the rows that it left out. Answers to one prompt are taken
together from wherever they stand, so that KTO's rows, one answer each, make pairs.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct, field

from dpo_cli.config.settings import PairSection
from dpo_cli.data.bad_rows import BadRows
from dpo_cli.data.columns import read_mapping
from dpo_cli.data.formats.preferences import HINT, read_row
from dpo_cli.data.reader import parse_rows
from dpo_cli.data.records import Preference
from dpo_cli.data.spool import Spool
from dpo_cli.errors import UserError
from dpo_cli.stages.pair.rated import RatedRows

HEADERLESS = ("prompt", "good", "bad")


class Imported(Struct, kw_only=True):
    """What was read: pairs in the order of the rows, rows by format, columns left out, answers that are in no pair."""

    pairs: Spool[Preference] = field(default_factory=lambda: Spool(Preference))
    formats: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    unpaired: Counter[str] = field(default_factory=Counter)
    bad: BadRows


def read(paths: Sequence[Path], settings: PairSection, min_gap: float) -> Imported:
    """The pairs of these files.

    Raises:
        UserError: a file can't be read or holds no rows; or `file:line` of a row that can't, without `skip_bad`.
    """
    mapping = read_mapping(settings.columns)
    result = Imported(bad=BadRows(settings.skip_bad, offer=True))
    rated = RatedRows()
    for path in paths:
        before = result.formats.total() + len(result.bad.rows)
        rows = parse_rows(path, lambda row: read_row(row, mapping, result.dropped), result.bad, HEADERLESS)
        for _, (name, found) in rows:
            result.formats[name] += 1
            if isinstance(found, Preference):
                result.pairs.append(found)
            else:
                rated.append(name, found)
        if result.formats.total() + len(result.bad.rows) == before:
            raise UserError("the file holds no rows", where=str(path), hint=HINT)
    result.pairs.extend(rated.pairs(settings, min_gap, result.unpaired))
    return result
