"""The ledger of paid replies: what was paid once is answered from there, and what is no answer is kept as it came.

One JSONL line a reply, of which the last of a key wins. A reply that could not be read, or held no answer, has its
whole text in `raw`: it answers nothing, until a version that can read it finds an answer there.
"""

from contextlib import suppress
from pathlib import Path

from msgspec import Struct

from dpo_cli.data.jsonl import Journal, RowReader, read_rows_at
from dpo_cli.data.records import Usage
from dpo_cli.endpoint.responses import Choice, ErrorReply, Reply, Unreadable, read_reply


class _Paid(Struct, omit_defaults=True):
    """One line; `usd` is what it cost when it was paid."""

    id: str
    choices: list[Choice]
    usage: Usage
    model: str = ""
    usd: float = 0.0
    prompt_token_ids: list[int] = []
    raw: str = ""

    def reply(self) -> Reply:
        """The reply, read anew where no version could read it before."""
        reply = Reply(self.choices, self.usage, self.model, self.usd, self.prompt_token_ids)
        if self.raw:
            with suppress(ErrorReply, Unreadable, ValueError):
                reply = read_reply(self.raw.encode())
                reply.usage, reply.usd = self.usage, self.usd
        return reply


class Ledger:
    """Paid replies by key; to be opened and closed. Of each only its place in the file is kept.

    Args:
        path: the JSONL file; one process at a time.
    """

    def __init__(self, path: Path) -> None:
        self._journal = Journal(path)
        self._starts: dict[str, int] = {}
        self.path = path

    def __contains__(self, key: object) -> bool:
        """Whether an answer stands there."""
        return isinstance(key, str) and self.get(key, tools=True) is not None

    def open(self) -> None:
        """Read what was paid.

        Raises:
            UserError: another process writes to it, or it can't be read.
        """
        self._journal.__enter__()
        try:
            if self.path.exists():
                self._starts = {row.id: start for start, _, row in read_rows_at(self.path, _Paid)}
        except BaseException:
            self._journal.close()
            raise

    def close(self) -> None:
        """Sync and let go."""
        self._journal.close()

    def get(self, key: str, tools: bool = False) -> Reply | None:
        """The reply of a key, if it holds an answer; a tool call is one where `tools` were offered."""
        paid = self._find(key)
        reply = paid.reply() if paid else None
        return None if reply is None or reply.lacks(tools) else reply

    def put(self, key: str, reply: Reply) -> bool:
        """Keep a paid reply, unless it is there; return whether it was new.

        Raises:
            UserError: the disk is full.
        """
        known = self._find(key)
        if known is not None and (known.reply().lacks(tools=True) is None or known.raw == reply.raw != ""):
            return False
        paid = _Paid(key, reply.choices, reply.usage, reply.model, reply.usd, reply.prompt_token_ids, reply.raw)
        self._starts[key] = self._journal.append(paid)
        return True

    def _find(self, key: str) -> _Paid | None:
        """What was paid under a key, as it stands in the file."""
        start = self._starts.get(key)
        if start is None:
            return None
        with self.path.open("rb") as file:  # anew: a buffer might hold a torn line that has been cut off since
            return RowReader(file, self.path, _Paid).at(start)
