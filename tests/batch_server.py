"""The test server with a Batch API: files, batches, their results in any order, and what goes wrong with them.

A batch is worked off when it is first looked at after `seconds`: each line is paid and answered as a live call would
be, by the same faults. A fault `expire` leaves a line unanswered and its batch expired; `cancel` the same, cancelled;
`400!TEXT`, `500` and the like go to the error file; `garbage` is an answer that is no chat completion.

`stall` names a moment at which the server stops talking to whoever reaches it, once, and sets `stalled`:
    upload, uploaded       before and after a file is stored
    create, created        before and after a batch is made
    poll                   a batch is looked at
    results, errors        the output or the error file of a batch is fetched
"""

import hashlib
import json
import random
import threading
from functools import partial
from typing import Any

from aiohttp import web
from openai_server import Call, Server, _error, _refuse

LINE = {"expire": "batch_expired", "cancel": "batch_cancelled"}


class BatchServer(Server):
    """`Server` with `/v1/files` and `/v1/batches`.

    Args:
        seconds: how long a batch takes at least.
        stall: see the top of this file.
        queue_bytes: bytes of input above which a batch fails with `token_limit_exceeded`; unset: no limit.
        page: most items of a list.

    `files` and `batches` hold what was made, by id; `uploads` are the files that clients made.
    """

    def __init__(
        self,
        *,
        seconds: float = 0.0,
        stall: str | None = None,
        queue_bytes: int | None = None,
        page: int = 2,
        **more: Any,
    ) -> None:
        super().__init__(**more)
        self.seconds = seconds
        self.stall = stall
        self.queue_bytes = queue_bytes
        self.page = page
        self.stalled = threading.Event()
        self.files: dict[str, dict[str, Any]] = {}
        self.batches: dict[str, dict[str, Any]] = {}

    def routes(self, app: web.Application) -> None:
        super().routes(app)
        app.router.add_post("/v1/files", self._upload)
        app.router.add_get("/v1/files", partial(self._list, self.files))
        app.router.add_get("/v1/files/{id}/content", self._content)
        app.router.add_post("/v1/batches", self._create)
        app.router.add_get("/v1/batches", partial(self._list, self.batches))
        app.router.add_get("/v1/batches/{id}", self._poll)

    @property
    def uploads(self) -> list[dict[str, Any]]:
        return [file for file in self.files.values() if file["purpose"] == "batch"]

    async def _halt(self, moment: str) -> None:
        if self.stall == moment:
            self.stall = None
            self.stalled.set()
            await self._stop.wait()

    def _store(self, content: bytes, filename: str, purpose: str) -> dict[str, Any]:
        file = {
            "id": f"file-{len(self.files)}", "object": "file", "filename": filename, "purpose": purpose,
            "bytes": len(content), "created_at": int(self._loop.time()) + 10**9, "content": content,
        }  # fmt: skip
        self.files[file["id"]] = file
        return file

    async def _upload(self, request: web.Request) -> web.Response:
        form = await request.post()
        await self._halt("upload")
        field = form["file"]
        file = self._store(field.file.read(), field.filename, str(form["purpose"]))
        await self._halt("uploaded")
        return _json(file)

    async def _create(self, request: web.Request) -> web.Response:
        body = await request.json()
        await self._halt("create")
        if body["input_file_id"] not in self.files or body["endpoint"] != "/v1/chat/completions":
            return _error(400, "No such file")
        lines = [json.loads(line) for line in self.files[body["input_file_id"]]["content"].splitlines()]
        batch = body | {
            "id": f"batch_{len(self.batches)}", "object": "batch", "status": "validating", "errors": None,
            "created_at": int(self._loop.time()) + 10**9, "due": self._loop.time() + self.seconds, "lines": lines,
            "request_counts": {"total": len(lines), "completed": 0, "failed": 0},
        }  # fmt: skip
        self.batches[batch["id"]] = batch
        await self._halt("created")
        return _json(batch)

    async def _list(self, things: dict[str, dict[str, Any]], request: web.Request) -> web.Response:
        newest = list(reversed(things.values()))
        after = request.query.get("after")
        start = next((place + 1 for place, thing in enumerate(newest) if thing["id"] == after), 0)
        page = newest[start : start + self.page]
        listing = {"object": "list", "data": list(map(_shown, page)), "has_more": start + self.page < len(newest)}
        return web.json_response(listing)

    async def _poll(self, request: web.Request) -> web.Response:
        await self._halt("poll")
        batch = self.batches.get(request.match_info["id"])
        if batch is None:
            return _error(404, "No such batch")
        if batch["status"] == "validating":
            batch["status"] = "in_progress"
            size = self.files[batch["input_file_id"]]["bytes"]
            if self.queue_bytes is not None and size > self.queue_bytes:
                fault = {"code": "token_limit_exceeded", "message": "Enqueued token limit reached"}
                batch |= {"status": "failed", "errors": {"data": [fault]}}
        if batch["status"] == "in_progress" and self._loop.time() >= batch["due"]:
            self._work_off(batch)
        return _json(batch)

    async def _content(self, request: web.Request) -> web.Response:
        file = self.files[request.match_info["id"]]
        await self._halt({"batch_output": "results", "batch_errors": "errors"}.get(file["purpose"], ""))
        return web.Response(body=file["content"])

    def _work_off(self, batch: dict[str, Any]) -> None:
        outputs, errors, status = [], [], "completed"
        for line in batch["lines"]:
            key = line["custom_id"]
            self.calls[key] += 1
            self.bodies.append(line["body"])
            content = hashlib.sha256(
                json.dumps(line["body"]).encode()
            ).hexdigest()  # ours names the port, which is luck
            call = Call(line["body"], content, len(self.bodies), self.calls[key])
            fault = self.fault(call) if self.fault else None
            refused = _refuse(fault, call.body) if fault else None
            if fault in LINE:
                status = {"expire": "expired", "cancel": "cancelled"}[fault]
                errors.append({"custom_id": key, "response": None, "error": {"code": LINE[fault], "message": fault}})
            elif refused is not None:
                response = {"status_code": refused.status, "body": json.loads(refused.body)}
                errors.append({"custom_id": key, "response": response, "error": None})
            else:
                self.paid[key] += 1
                body = {"sorry": True} if fault == "garbage" else self._answer(call, fault)
                outputs.append({"custom_id": key, "response": {"status_code": 200, "body": body}, "error": None})
        for name, lines in (("output", outputs), ("error", errors)):
            if lines:
                random.Random(name).shuffle(lines)
                content = "".join(json.dumps(line) + "\n" for line in lines).encode()
                purpose = "batch_output" if name == "output" else "batch_errors"
                batch[f"{name}_file_id"] = self._store(content, f"{batch['id']}_{name}.jsonl", purpose)["id"]
        counts = {"total": len(batch["lines"]), "completed": len(outputs), "failed": len(errors)}
        batch |= {"status": status, "request_counts": counts}


def _shown(thing: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in thing.items() if name not in ("content", "lines", "due")}


def _json(thing: dict[str, Any]) -> web.Response:
    return web.json_response(_shown(thing))
