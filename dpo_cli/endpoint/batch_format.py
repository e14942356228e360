"""What goes into the Batch API and what comes out: lines of its files, its lists, the state of a batch."""

from typing import Any

import msgspec
from msgspec import Raw, Struct

from dpo_cli.endpoint.http import CHAT

ENDED = ("completed", "expired", "cancelled", "failed")


class BatchRow(Struct, omit_defaults=True):
    """A line of our journal: a batch that is intended, then has its `file`, then its `batch`, then has `ended`.

    `id` is the hash of its input, `created` a Unix time, `tokens` an estimate of its input.
    """

    id: str
    requests: int
    tokens: int
    model: str
    created: int
    file: str | None = None
    batch: str | None = None
    ended: bool = False

    @property
    def file_name(self) -> str:
        """By which the server's list of files is searched."""
        return f"nothing-dpo-{self.id}.jsonl"

    @property
    def creation(self) -> dict[str, Any]:
        """The request that makes the batch; its metadata is by which the server's list of batches is searched."""
        return {
            "input_file_id": self.file,
            "endpoint": f"/v1{CHAT}",
            "completion_window": "24h",
            "metadata": {"input": self.id, "made_by": "nothing-dpo"},
        }


class Item(Struct):
    """A file or a batch in one of the server's lists."""

    id: str
    created_at: int = 0
    filename: str | None = None
    metadata: dict[str, str] | None = None


class _Page(Struct):
    data: list[Item]
    has_more: bool = False


class Counts(Struct):
    """Requests of a batch."""

    completed: int = 0
    failed: int = 0


class _Fault(Struct):
    message: str | None = None
    code: str | None = None


class _Faults(Struct):
    data: list[_Fault] = []


class BatchState(Struct):
    """What the server says of a batch."""

    status: str
    output_file_id: str | None = None
    error_file_id: str | None = None
    request_counts: Counts | None = None
    errors: _Faults | None = None


class _Response(Struct):
    status_code: int
    body: Raw


class _Result(Struct):
    """One line of results; without a response, the batch ended before its turn came."""

    custom_id: str
    response: _Response | None = None


class _Request(Struct):
    """One line of a batch's input."""

    custom_id: str
    body: dict[str, Any]


read_item = msgspec.json.Decoder(Item).decode
read_page = msgspec.json.Decoder(_Page).decode
read_state = msgspec.json.Decoder(BatchState).decode
read_request = msgspec.json.Decoder(_Request).decode
read_result = msgspec.json.Decoder(_Result).decode


def request_line(key: str, body: dict[str, Any]) -> bytes:
    """One line of a batch's input."""
    return msgspec.json.encode({"custom_id": key, "method": "POST", "url": f"/v1{CHAT}", "body": body}) + b"\n"
