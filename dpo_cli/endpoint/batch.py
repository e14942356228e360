"""The OpenAI Batch API: chat completions in files, at half the price, within a day; no batch lost and none made twice.

Reads and writes a journal with a line for each step of each batch, and keeps a batch's input file beside it until its
results are in the endpoint's ledger. A batch is named by the hash of its input, which its file's name and its metadata
carry: a run that was stopped between a request and its answer finds by it what the server has done, before it asks
again. Results are joined by key. Other endpoints than chat completions are not covered.
"""

import asyncio
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from dpo_cli.data.files import clean_up, explained, write_file
from dpo_cli.data.jsonl import Journal, read_latest
from dpo_cli.data.records import content_id
from dpo_cli.endpoint.batch_format import (
    ENDED,
    BatchRow,
    BatchState,
    Counts,
    Item,
    read_item,
    read_page,
    read_request,
    read_result,
    read_state,
    request_line,
)
from dpo_cli.endpoint.budget import output_cap
from dpo_cli.endpoint.client import MAX_WAIT_SECONDS, RESTART_SECONDS, Endpoint
from dpo_cli.endpoint.http import CHAT, Rejected, Retryable, Unreachable, json_data
from dpo_cli.endpoint.prices import Price
from dpo_cli.endpoint.responses import Reply, one_line, read_error
from dpo_cli.errors import Exit, UserError

# OpenAI's limits of one input file, with a margin.
MAX_REQUESTS = 50_000
MAX_BYTES = 190_000_000

MOST_RESULT_BYTES = 1 << 31  # of a file of results
FIRST_POLL_SECONDS, MAX_POLL_SECONDS = 1.0, 60.0
SETTLE_SECONDS = 2.0  # until a batch that may just have been made is in the server's list
SUBMISSIONS = 5  # attempts to make one batch
CLOCK_SECONDS = 3600  # by which the server's clock may differ from ours


class PendingRequest(Rejected):
    """A request that no batch has answered yet."""

    def __init__(self, key: str, body: dict[str, Any]) -> None:
        super().__init__(0, "no batch has answered it")
        self.key = key
        self.body = body
        self.line = request_line(key, body)


class Batches:
    """Context manager around the batches of one ledger.

    Args:
        endpoint: whose ledger and budget are used; entered.
        journal: the JSONL file of batches.
        price: of a model's calls in a batch.
        queue_tokens: most tokens of input that wait at once, of all our batches.
        log: told in a line about each batch.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        journal: Path,
        price: Callable[[str], Price | None],
        queue_tokens: int,
        log: Callable[[str], None],
    ) -> None:
        self._endpoint = endpoint
        self._price = price
        self._queue = queue_tokens
        self._log = log
        self._journal = Journal(journal)
        self._rows: dict[str, BatchRow] = {}
        self._unfinished: dict[str, int] = {}  # requests of each open batch without an answer
        self._held: dict[str, float] = {}  # dollars that this run has reserved for a batch
        self._rejected: dict[str, Rejected] = {}
        self._seen: set[str] = set()

    def __enter__(self) -> Self:
        self._journal.__enter__()
        try:
            self._rows = read_latest(self._journal.path, BatchRow)
            self._drop_inputs()
        except BaseException:
            self._journal.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._journal.close()

    async def chat(self, body: dict[str, Any], replicate: int = 0, *, final: bool = True) -> Reply:
        """The reply to a request, as `Endpoint.chat`, without sending anything.

        Raises:
            PendingRequest: it must be given to `collect`.
            Rejected: the endpoint has refused it.
        """
        key, reply = self._endpoint.recall(body, replicate)
        if reply is None:
            raise self._rejected.get(key) or PendingRequest(key, body)
        if key not in self._seen:
            self._seen.add(key)
            self._endpoint.spend.reused += 1
        return reply

    async def collect(self, owed: Iterable[PendingRequest], wait: bool = True) -> bool:
        """Put requests into batches and take in what is answered, also of the batches of former runs.

        Requests that expired, or failed in a way that may pass, are left without an answer.

        Args:
            owed: the requests.
            wait: until every batch has ended; else send what the queue allows, and leave.

        Returns:
            Whether every batch has ended.

        Raises:
            UserError: no Batch API there, a batch that the server refuses, or no budget for the rest.
        """
        todo = {one.key: one for one in owed}
        pause = FIRST_POLL_SECONDS
        while True:
            for row in self._open():
                await self._submit(row)
                await self._look_at(row)
            while todo and (shard := self._cut(todo)) is not None:
                for one in shard:
                    del todo[one.key]
                await self._submit(self._intend(shard), fresh=True)
                pause = FIRST_POLL_SECONDS
            self._endpoint.spend.waiting = sum(self._unfinished.get(row.id, row.requests) for row in self._open())
            if not self._open():
                if todo:
                    raise self._endpoint.budget.reached(self._worst(next(iter(todo.values()))))
                return True
            if not wait:
                if todo:
                    self._log(f"{len(todo):,} requests have no room in the queue or the budget; a later run sends them")
                return False
            await asyncio.sleep(pause)
            pause = min(MAX_POLL_SECONDS, 1.5 * pause)

    def _open(self) -> list[BatchRow]:
        return [row for row in self._rows.values() if not row.ended]

    def _worst(self, one: PendingRequest) -> float:
        return self._endpoint.budget.worst(one.body, len(one.line), self._price(one.body["model"]))

    def _cut(self, todo: dict[str, PendingRequest]) -> list[PendingRequest] | None:
        """The next requests of one model that fit into a file, the queue and the budget; None while they don't."""
        budget, waiting = self._endpoint.budget, sum(row.tokens for row in self._open())
        room = self._queue - waiting
        if waiting and room < self._queue / 2:
            return None  # rather later than many small ones
        shard: list[PendingRequest] = []
        size = tokens = 0
        usd = 0.0
        model = next(iter(todo.values())).body["model"]
        for one in todo.values():
            if one.body["model"] != model:
                continue
            length = len(one.line)
            size, tokens, usd = size + length, tokens + budget.tokens(length), usd + self._worst(one)
            full = len(shard) == MAX_REQUESTS or size > MAX_BYTES or tokens > room
            if (full and shard) or usd > budget.left:
                break
            shard.append(one)
        return shard or None

    def _intend(self, shard: list[PendingRequest]) -> BatchRow:
        """Write down a batch before anything of it is sent."""
        content = b"".join(one.line for one in shard)
        turn = 0  # the same requests again are another batch
        while (name := content_id(content.decode(), turn)) in self._rows:
            turn += 1
        row = BatchRow(
            id=name,
            requests=len(shard),
            tokens=sum(self._endpoint.budget.tokens(len(one.line)) for one in shard),
            model=shard[0].body["model"],
            created=int(time.time()),
        )
        write_file(self._input(row), content, private=True)
        self._write(row)
        self._held[row.id] = sum(map(self._worst, shard))
        self._endpoint.budget.hold(self._held[row.id])
        return row

    async def _submit(self, row: BatchRow, fresh: bool = False) -> None:
        """Upload a batch's input and create the batch, except what the server has done already.

        Args:
            row: the batch.
            fresh: nothing of it has been sent yet, so there is nothing to look for.

        Raises:
            UserError: the server does not say what it did.
        """
        if row.batch is not None:
            return
        for turn in range(SUBMISSIONS):
            if turn or not fresh:
                await asyncio.sleep(SETTLE_SECONDS)
                row.batch = await self._find("/batches", row, lambda item: (item.metadata or {}).get("input") == row.id)
                if row.batch is None and row.file is None:
                    row.file = await self._find("/files", row, lambda item: item.filename == row.file_name)
            try:
                if row.batch is None and row.file is None:
                    row.file = await self._make("/files", lambda: {"data": self._form(row)})
                    self._write(row)
                if row.batch is None:
                    creation = json_data(msgspec.json.encode(row.creation))
                    row.batch = await self._make("/batches", partial(dict, data=creation))
            except Retryable as fault:
                self._log(f"batch {row.id}: {fault}; looking whether it was made")
                continue
            self._write(row)
            self._log(f"batch {row.batch}: {row.requests:,} requests")
            return
        raise UserError(
            f"no batch made in {SUBMISSIONS} attempts",
            where=self._endpoint.url,
            code=Exit.FAILED,
            hint="everything is kept: run the same command again",
        )

    async def _make(self, path: str, content: Callable[[], dict[str, Any]]) -> str:
        """The id of what a POST makes."""
        return read_item(await self._call("POST", path, content)).id

    async def _find(self, path: str, row: BatchRow, fits: Callable[[Item], bool]) -> str | None:
        """The id of the newest thing in a list that fits; what is older than the batch is not looked at."""
        params = {"limit": "100"} | ({"purpose": "batch", "order": "desc"} if path == "/files" else {})
        while True:
            page = read_page(await self._call("GET", path, lambda: {"params": params}))
            for item in page.data:
                if fits(item):
                    return item.id
            if not page.has_more or not page.data or page.data[-1].created_at < row.created - CLOCK_SECONDS:
                return None
            params["after"] = page.data[-1].id

    async def _look_at(self, row: BatchRow) -> None:
        """Ask how a batch is, and take in its results if it has ended."""
        state = read_state(await self._call("GET", f"/batches/{row.batch}"))
        counts = state.request_counts or Counts()
        self._unfinished[row.id] = row.requests - counts.completed - counts.failed
        if state.status in ENDED:
            await self._take_in(row, state)

    async def _take_in(self, row: BatchRow, state: BatchState) -> None:
        """Bring the results of a batch that has ended into the ledger; if killed within, the next run does it again."""
        fatal: UserError | None = None
        before = self._endpoint.spend.calls, self._endpoint.spend.usd
        asked = self._requests(row)
        for file in filter(None, (state.output_file_id, state.error_file_id)):
            content = await self._call("GET", f"/files/{file}/content", lambda: {"limit": MOST_RESULT_BYTES})
            for line in content.splitlines():
                fatal = self._take(row, line, asked) or fatal
        answered = self._endpoint.spend.calls - before[0]
        paid = self._endpoint.spend.usd - before[1]
        if row.id in self._held:
            self._endpoint.budget.settle(self._held.pop(row.id), paid)
        row.ended = True
        self._write(row)
        with explained(self._input(row)):
            self._input(row).unlink(missing_ok=True)
        self._log(f"batch {row.batch}: {state.status}, {answered:,} of {row.requests:,} requests answered")
        if state.status == "failed":
            self._bear_with(row, state)
        if fatal is not None:
            raise fatal

    def _drop_inputs(self) -> None:
        """Remove the inputs of batches that were never written down, or that have ended, after a kill."""
        pattern = self._journal.path.with_suffix(".*.jsonl")
        clean_up(pattern)
        needed = {self._input(row) for row in self._rows.values() if not row.ended}
        with explained(pattern):
            for file in set(pattern.parent.glob(pattern.name)) - needed:
                file.unlink(missing_ok=True)

    def _requests(self, row: BatchRow) -> dict[str, tuple[int, int | None]]:
        """The bytes and the most output of each request of a batch, by key."""
        lines = self._input(row).read_bytes().splitlines() if self._input(row).exists() else []
        found = map(read_request, lines)
        return {one.custom_id: (len(line), output_cap(one.body)) for one, line in zip(found, lines, strict=True)}

    def _take(self, row: BatchRow, line: bytes, asked: dict[str, tuple[int, int | None]]) -> UserError | None:
        """Take in one line of results; returns what makes it useless to go on."""
        result = read_result(line)
        response = result.response
        if response is None:  # expired or cancelled
            return None
        if response.status_code != 200:
            fault = self._endpoint.connection.fault(CHAT, response.status_code, read_error(bytes(response.body)))
            return self._refuse(result.custom_id, fault)
        try:
            reply = self._endpoint.understand(bytes(response.body))
        except ValueError:
            return None
        except (Rejected, Retryable, UserError) as error:
            return self._refuse(result.custom_id, error)
        size, output = asked.get(result.custom_id, (MAX_BYTES, None))
        self._endpoint.price(reply, size, output, self._price(row.model))
        self._endpoint.record(result.custom_id, reply)
        self._seen.add(result.custom_id)
        if kind := reply.lacks():
            self._refuse(result.custom_id, Rejected(0, self._endpoint.kept(reply) if reply.unreadable else kind))
        return None

    def _refuse(self, key: str, fault: Exception) -> UserError | None:
        """Keep what became of a request that has no answer; returns what makes it useless to go on."""
        if isinstance(fault, Rejected):
            # Without a status: asking otherwise from here on would leave what is paid behind.
            self._rejected[key] = Rejected(0, str(fault), code=fault.code)
            self._endpoint.spend.failed += 1
        return fault if isinstance(fault, UserError) else None

    def _bear_with(self, row: BatchRow, state: BatchState) -> None:
        """Learn from a batch that was not accepted.

        Raises:
            UserError: nothing is to be learnt.
        """
        errors = state.errors.data if state.errors else []
        if any(error.code == "token_limit_exceeded" for error in errors):
            self._queue = max(1, min(self._queue, row.tokens) // 2)
            self._log(f"the queue takes fewer tokens; now {self._queue:,} at once")
            return
        said = "; ".join(f"{error.message}" for error in errors[:3]) or "the server does not say why"
        raise UserError(f"batch {row.batch} failed: {one_line(said)}", where=self._endpoint.url, code=Exit.FAILED)

    async def _call(self, method: str, path: str, content: Callable[[], dict[str, Any]] = lambda: {}) -> bytes:
        """A request that is sent until it is answered; but a POST that may have been obeyed is not sent again.

        Raises:
            Retryable: nobody knows whether a POST was obeyed.
            UserError: it is refused, or nobody answers for long.
        """
        end = time.monotonic() + RESTART_SECONDS
        pause = 0.5
        while True:
            try:
                return await self._endpoint.connection.send(method, path, **content())
            except Rejected as error:
                raise self._refusal(path, error) from None
            except (Unreachable, Retryable) as fault:
                after = None
                if isinstance(fault, Retryable):
                    after = fault.after
                    if method == "POST" and fault.status != 429:
                        raise
                if time.monotonic() > end:
                    raise UserError(
                        f"no answer: {fault}",
                        where=self._endpoint.url,
                        code=Exit.FAILED,
                        hint="everything is kept: run the same command again",
                    ) from None
                await asyncio.sleep(min(pause if after is None else after, MAX_WAIT_SECONDS))
                pause = min(MAX_POLL_SECONDS, 2 * pause)

    def _refusal(self, path: str, error: Rejected) -> UserError:
        if error.status in (404, 405) and path in ("/files", "/batches"):
            return UserError(f"no Batch API there ({error})", where=self._endpoint.url, hint="without --batch")
        return UserError(
            f"{path} is refused ({error})",
            where=self._endpoint.url,
            code=Exit.FAILED,
            hint=f"is it the key and the project that made the batch? {self._journal.path} has them all",
        )

    def _form(self, row: BatchRow) -> Any:
        import aiohttp

        form = aiohttp.FormData({"purpose": "batch"})
        form.add_field("file", self._input(row).read_bytes(), filename=row.file_name, content_type="application/jsonl")
        return form

    def _input(self, row: BatchRow) -> Path:
        return self._journal.path.with_name(f"{self._journal.path.stem}.{row.id}.jsonl")

    def _write(self, row: BatchRow) -> None:
        self._rows[row.id] = row
        self._journal.append(row)


def waiting(journal: Path) -> int:
    """How many requests are in batches whose results are not taken in."""
    return sum(row.requests for row in read_latest(journal, BatchRow).values() if not row.ended)
