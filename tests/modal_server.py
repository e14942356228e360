"""A Modal server of our own, from the client's public protocol (`modal_proto`), over loopback.

It is not Modal: it knows the calls that this project makes, and nothing of scheduling, images or GPUs. What it does
with them is real: volumes hold what was committed and nothing else, mounted files are those that the client uploaded,
and a container is the client's own container entry in a process of its own, with only those files on its path and
without this package's dist-info, as on Modal. Secrets that are not there and wrong tokens are refused.
"""

import asyncio
import hashlib
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from aiohttp import web
from google.protobuf.empty_pb2 import Empty
from grpclib import GRPCError, Status
from grpclib.server import Server
from modal.client import _Client
from modal_proto import api_grpc, api_pb2

TOKEN = ("ak-test", "as-test")
FAIL, OK = api_pb2.GenericResult.GENERIC_STATUS_FAILURE, api_pb2.GenericResult.GENERIC_STATUS_SUCCESS
BLOCK = 8 << 20
# In the container there is no dist-info of this package: its metadata can't be asked for.
NO_DIST_INFO = """
import importlib.metadata as metadata
_found = metadata.distribution
def _distribution(name):
    if name == "nothing-dpo":
        raise metadata.PackageNotFoundError(name)
    return _found(name)
metadata.distribution = _distribution
"""


class Call:
    """A function call: its input, attempts, log and result."""

    def __init__(self, identity: str, function: str, item: api_pb2.FunctionPutInputsItem) -> None:
        self.id = identity
        self.function = function
        self.item = item
        self.given = False
        self.attempts: list[int] = []  # exit codes
        self.log: list[api_pb2.TaskLogs] = []
        self.result: api_pb2.FunctionPutOutputsItem | None = None
        self.returned: api_pb2.FunctionPutOutputsItem | None = None
        self.cancelled = False
        self.process: asyncio.subprocess.Process | None = None


class ModalServer(api_grpc.ModalClientBase):
    """The service; use as a context manager, which sets the environment that leads the client here.

    Args:
        folder: where volumes and containers live.
        mount: where the containers of this machine see the volume.
    """

    def __init__(self, folder: Path, mount: Path) -> None:
        self.folder = folder
        self.mount = mount
        self.secrets: dict[str, dict[str, str]] = {}
        self.blobs: dict[str, bytes] = {}
        self.mounts: dict[str, list[api_pb2.MountFile]] = {}
        self.functions: dict[str, api_pb2.Function] = {}
        self.calls: dict[str, Call] = {}
        self.apps: dict[str, api_pb2.AppCreateRequest] = {}
        self.images: list[api_pb2.Image] = []
        self.uploaded: list[str] = []
        self.stopped: list[str] = []
        self.lost_call = False  # calls are made, and their answers don't arrive
        self.commits = 0
        self.silent = False
        self.broken_image = False
        self.preempt: Callable[[Call, str], bool] = lambda call, line: False
        self._tasks: set[asyncio.Task[None]] = set()
        self._count = 0

    # --- its own life

    def __enter__(self) -> "ModalServer":
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.url = asyncio.run_coroutine_threadsafe(self._start(), self.loop).result()
        self._before = {name: os.environ.get(name) for name in self.environment}
        os.environ.update(self.environment)
        _Client._set_env_client(None)  # it would keep its connection to a server that is gone
        return self

    @property
    def environment(self) -> dict[str, str]:
        """What leads a client here."""
        return {"MODAL_SERVER_URL": self.url, "MODAL_TOKEN_ID": TOKEN[0], "MODAL_TOKEN_SECRET": TOKEN[1]}

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    def forget(self) -> None:
        """Everything that has happened."""
        shutil.rmtree(self.folder / "volumes", ignore_errors=True)
        for kept in (self.calls, self.apps, self.functions):
            kept.clear()
        self.uploaded.clear()
        self.stopped.clear()
        self.lost_call = False
        self.commits, self.silent, self.broken_image = 0, False, False
        self.preempt = lambda call, line: False

    async def _start(self) -> str:
        self.server, url = await self._listen()
        # Containers have a way of their own, which stays when a client's network is lost.
        self.inside, self.inside_url = await self._listen()
        application = web.Application()
        application.router.add_get("/block", self._block)
        application.router.add_put("/blob/{name}", self._put_blob)
        application.router.add_get("/blob/{name}", self._get_blob)
        self.runner = web.AppRunner(application)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", 0)
        await site.start()
        self.http = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"  # type: ignore[union-attr]
        return url

    async def _listen(self) -> tuple[Server, str]:
        server = Server([self], loop=None)
        await server.start("127.0.0.1", 0)
        return server, f"http://127.0.0.1:{server._server.sockets[0].getsockname()[1]}"  # type: ignore[union-attr]

    async def _stop(self) -> None:
        for call in self.calls.values():
            if call.process is not None and call.process.returncode is None:
                call.process.kill()
                await call.process.wait()
        for task in self._tasks:
            task.cancel()
        for server in (self.server, self.inside):
            server.close()
            await server.wait_closed()
        await self.runner.cleanup()

    def refuse_connections(self, seconds: float) -> None:
        """Break every connection of a client, and take none for so long."""
        asyncio.run_coroutine_threadsafe(self._refuse(seconds), self.loop)

    async def _refuse(self, seconds: float) -> None:
        port = self.server._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        handlers = list(self.server._handlers)
        self.server.close()
        for handler in handlers:
            handler.connection._transport.abort()  # type: ignore[union-attr]
        await asyncio.sleep(seconds)
        self.server = Server([self], loop=None)
        await self.server.start("127.0.0.1", port)

    def _next(self, prefix: str) -> str:
        self._count += 1
        return f"{prefix}-{self._count}"

    # --- sessions, apps, images, mounts, secrets

    async def ClientHello(self, stream: Any) -> None:
        await stream.recv_message()
        if self.silent:
            await asyncio.sleep(60)
        if (stream.metadata.get("x-modal-token-id"), stream.metadata.get("x-modal-token-secret")) != TOKEN:
            raise GRPCError(Status.UNAUTHENTICATED, "Token validation failed")
        await stream.send_message(api_pb2.ClientHelloResponse())

    async def EnvironmentGetOrCreate(self, stream: Any) -> None:
        await stream.recv_message()
        settings = api_pb2.EnvironmentSettings(image_builder_version="2025.06")
        metadata = api_pb2.EnvironmentMetadata(name="main", settings=settings)
        await stream.send_message(api_pb2.EnvironmentGetOrCreateResponse(environment_id="en-1", metadata=metadata))

    async def AppCreate(self, stream: Any) -> None:
        app = self._next("ap")
        self.apps[app] = await stream.recv_message()
        await stream.send_message(api_pb2.AppCreateResponse(app_id=app))

    async def AppGetOrCreate(self, stream: Any) -> None:
        name = (await stream.recv_message()).app_name
        if name not in self.apps:
            raise GRPCError(Status.NOT_FOUND, f"no app {name}")
        await stream.send_message(api_pb2.AppGetOrCreateResponse(app_id=name))

    async def AppList(self, stream: Any) -> None:
        await stream.recv_message()
        if self.silent:
            await asyncio.sleep(60)
        live = api_pb2.APP_STATE_DETACHED
        states = {app: api_pb2.APP_STATE_STOPPED if app in self.stopped else live for app in self.apps}
        items = [api_pb2.AppListResponse.AppListItem(app_id=app, state=state) for app, state in states.items()]
        await stream.send_message(api_pb2.AppListResponse(apps=items))

    async def AppStop(self, stream: Any) -> None:
        request = await stream.recv_message()
        if self.silent:
            await asyncio.sleep(60)
        self.stopped.append(request.app_id)
        for call in self.calls.values():
            await self._end(call)
        await stream.send_message(Empty())

    async def AppPublish(self, stream: Any) -> None:
        await stream.recv_message()
        await stream.send_message(api_pb2.AppPublishResponse())

    async def AppClientDisconnect(self, stream: Any) -> None:
        request = await stream.recv_message()
        if self.apps[request.app_id].app_state != api_pb2.APP_STATE_DETACHED:
            for call in self.calls.values():
                await self._end(call)
        await stream.send_message(Empty())

    async def AppHeartbeat(self, stream: Any) -> None:
        await stream.recv_message()
        await stream.send_message(Empty())

    async def ImageGetOrCreate(self, stream: Any) -> None:
        self.images.append((await stream.recv_message()).image)
        result = api_pb2.GenericResult(status=FAIL if self.broken_image else OK, exception="no such package")
        await stream.send_message(api_pb2.ImageGetOrCreateResponse(image_id=self._next("im"), result=result))

    async def MountPutFile(self, stream: Any) -> None:
        request = await stream.recv_message()
        if request.data or request.sha256_hex == hashlib.sha256(b"").hexdigest():
            assert hashlib.sha256(request.data).hexdigest() == request.sha256_hex
            self.blobs[request.sha256_hex] = request.data
        await stream.send_message(api_pb2.MountPutFileResponse(exists=request.sha256_hex in self.blobs))

    async def MountBatchedCheckExistence(self, stream: Any) -> None:
        request = await stream.recv_message()
        missing = [one for one in request.sha256_hex_hashes if one not in self.blobs]
        await stream.send_message(api_pb2.MountBatchedCheckExistenceResponse(missing_sha256_hex_hashes=missing))

    async def MountGetOrCreate(self, stream: Any) -> None:
        request = await stream.recv_message()
        mount = self._next("mo")
        self.mounts[mount] = list(request.files)
        await stream.send_message(
            api_pb2.MountGetOrCreateResponse(mount_id=mount, handle_metadata=api_pb2.MountHandleMetadata())
        )

    async def SecretGetOrCreate(self, stream: Any) -> None:
        request = await stream.recv_message()
        name = request.deployment_name
        if name and name not in self.secrets:
            raise GRPCError(Status.NOT_FOUND, f"Secret '{name}' not found in environment 'main'")
        await stream.send_message(api_pb2.SecretGetOrCreateResponse(secret_id=f"st-{name or 'empty'}"))

    # --- volumes

    def volume(self, name: str) -> Path:
        """What was committed to a volume."""
        return self.folder / "volumes" / name

    async def VolumeGetOrCreate(self, stream: Any) -> None:
        request = await stream.recv_message()
        name = request.deployment_name
        if request.object_creation_type == api_pb2.OBJECT_CREATION_TYPE_CREATE_IF_MISSING:
            self.volume(name).mkdir(parents=True, exist_ok=True)
        elif not self.volume(name).is_dir():
            raise GRPCError(Status.NOT_FOUND, f"Volume '{name}' not found in environment 'main'")
        version = api_pb2.VOLUME_FS_VERSION_V1
        metadata = api_pb2.VolumeMetadata(version=version, name=name)
        await stream.send_message(
            api_pb2.VolumeGetOrCreateResponse(volume_id=f"vo-{name}", version=version, metadata=metadata)
        )

    def _in_volume(self, request: Any, path: str) -> Path:
        return self.volume(request.volume_id.removeprefix("vo-")) / path.lstrip("/")

    async def VolumeListFiles(self, stream: Any) -> None:
        request = await stream.recv_message()
        top = self._in_volume(request, request.path)
        if not top.exists():
            raise GRPCError(Status.NOT_FOUND, f"no such file: {request.path}")
        found = [top] if top.is_file() else sorted(top.rglob("*") if request.recursive else top.iterdir())
        kinds = api_pb2.FileEntry.FileType
        entries = [
            api_pb2.FileEntry(
                path=str(file.relative_to(self._in_volume(request, ""))), size=file.stat().st_size,
                type=kinds.FILE if file.is_file() else kinds.DIRECTORY, mtime=int(file.stat().st_mtime),
            )
            for file in found
        ]  # fmt: skip
        await stream.send_message(api_pb2.VolumeListFilesResponse(entries=entries))

    async def VolumePutFiles(self, stream: Any) -> None:
        request = await stream.recv_message()
        for file in request.files:
            target = self._in_volume(request, file.filename)
            if target.exists() and request.disallow_overwrite_existing_files:
                raise GRPCError(Status.ALREADY_EXISTS, file.filename)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(self.blobs[file.sha256_hex])
            self.uploaded.append(file.filename)
        await stream.send_message(Empty())

    async def VolumeRemoveFile(self, stream: Any) -> None:
        request = await stream.recv_message()
        target = self._in_volume(request, request.path)
        if not target.exists():
            raise GRPCError(Status.NOT_FOUND, f"no such file: {request.path}")
        target.unlink()
        await stream.send_message(Empty())

    async def VolumeGetFile2(self, stream: Any) -> None:
        request = await stream.recv_message()
        file = self._in_volume(request, request.path)
        if not file.is_file():
            raise GRPCError(Status.NOT_FOUND, f"no such file: {request.path}")
        size = file.stat().st_size
        urls = [f"{self.http}/block?path={file}&start={start}" for start in range(0, size, BLOCK)]
        await stream.send_message(api_pb2.VolumeGetFile2Response(get_urls=urls, size=size, start=0, len=size))

    async def _block(self, request: web.Request) -> web.Response:
        with Path(request.query["path"]).open("rb") as file:
            file.seek(int(request.query["start"]))
            return web.Response(body=file.read(BLOCK))

    async def VolumeCommit(self, stream: Any) -> None:
        request = await stream.recv_message()
        if request.volume_id == f"vo-{self.mounted}":
            self.commits += 1
            replace(self.mount, self.volume(self.mounted))
        await stream.send_message(api_pb2.VolumeCommitResponse())

    async def VolumeReload(self, stream: Any) -> None:
        await stream.recv_message()
        await stream.send_message(Empty())

    # --- blobs: what is too large for a message, such as an input of more than 8 KiB

    async def BlobCreate(self, stream: Any) -> None:
        await stream.recv_message()
        name = self._next("bl")
        url = f"{self.http}/blob/{name}"
        urls = api_pb2.BlobCreateResponse.DESCRIPTOR.fields_by_name["upload_urls"].message_type._concrete_class
        await stream.send_message(api_pb2.BlobCreateResponse(blob_ids=[name], upload_urls=urls(items=[url])))

    async def BlobGet(self, stream: Any) -> None:
        request = await stream.recv_message()
        await stream.send_message(api_pb2.BlobGetResponse(download_url=f"{self.http}/blob/{request.blob_id}"))

    async def _put_blob(self, request: web.Request) -> web.Response:
        content = await request.read()
        self.blobs[request.match_info["name"]] = content
        return web.Response(headers={"ETag": f'"{hashlib.md5(content).hexdigest()}"'})

    async def _get_blob(self, request: web.Request) -> web.Response:
        return web.Response(body=self.blobs[request.match_info["name"]])

    # --- functions and calls

    async def FunctionPrecreate(self, stream: Any) -> None:
        request = await stream.recv_message()
        metadata = self._metadata(request.function_name)
        await stream.send_message(
            api_pb2.FunctionPrecreateResponse(function_id=self._next("fu"), handle_metadata=metadata)
        )

    async def FunctionCreate(self, stream: Any) -> None:
        request = await stream.recv_message()
        function, data = request.function, request.function_data
        if not request.HasField("function"):  # one with several cards to choose from
            function = data.ranked_functions[0].function
        else:
            data = api_pb2.FunctionData(
                ranked_functions=[api_pb2.FunctionData.RankedFunction(rank=0, function=function)]
            )
        self.functions[request.existing_function_id] = function
        await stream.send_message(
            api_pb2.FunctionCreateResponse(
                function_id=request.existing_function_id, function=function, function_data=data,
                handle_metadata=self._metadata(function.function_name),
            )
        )  # fmt: skip

    def _metadata(self, name: str) -> api_pb2.FunctionHandleMetadata:
        formats = [api_pb2.DATA_FORMAT_PICKLE, api_pb2.DATA_FORMAT_CBOR]
        return api_pb2.FunctionHandleMetadata(
            function_name=name, function_type=api_pb2.Function.FUNCTION_TYPE_FUNCTION, definition_id="de-1",
            supported_input_formats=formats, supported_output_formats=formats,
        )  # fmt: skip

    async def FunctionMap(self, stream: Any) -> None:
        request = await stream.recv_message()
        call = Call(self._next("fc"), request.function_id, request.pipelined_inputs[0])
        self.calls[call.id] = call
        task = asyncio.get_running_loop().create_task(self._attempts(call))
        self._tasks.add(task)
        if self.lost_call:
            raise GRPCError(Status.FAILED_PRECONDITION, "the answer is lost, but the call is made")
        item = api_pb2.FunctionPutInputsResponseItem(idx=0, input_id=f"in-{call.id}", input_jwt="jwt")
        await stream.send_message(
            api_pb2.FunctionMapResponse(function_call_id=call.id, pipelined_inputs=[item], function_call_jwt="jwt")
        )

    async def FunctionCallFromId(self, stream: Any) -> None:
        call = self._call((await stream.recv_message()).function_call_id)
        metadata = api_pb2.FunctionCallHandleMetadata(app_id=next(reversed(self.apps)), function_id=call.function)
        await stream.send_message(
            api_pb2.FunctionCallFromIdResponse(function_call_id=call.id, num_inputs=1, metadata=metadata)
        )

    def _call(self, identity: str) -> Call:
        if identity not in self.calls:
            raise GRPCError(Status.NOT_FOUND, f"no function call {identity}")
        return self.calls[identity]

    async def FunctionCallGetInfo(self, stream: Any) -> None:
        call = self._call((await stream.recv_message()).function_call_id)
        ended = api_pb2.InputCategoryInfo(total=int(call.result is not None))
        info = api_pb2.FunctionCallInfo(function_call_id=call.id, total_inputs=1, succeeded_inputs=ended)
        await stream.send_message(api_pb2.FunctionCallGetInfoResponse(info=info))

    async def FunctionGetOutputs(self, stream: Any) -> None:
        request = await stream.recv_message()
        call, until = self._call(request.function_call_id), time.monotonic() + request.timeout
        while call.result is None and time.monotonic() < until:
            await asyncio.sleep(0.02)
        outputs = []
        if call.result is not None:
            item = call.result
            outputs = [api_pb2.FunctionGetOutputsItem(result=item.result, data_format=item.data_format, idx=0)]
        unfinished = int(call.result is None)
        await stream.send_message(
            api_pb2.FunctionGetOutputsResponse(outputs=outputs, num_unfinished_inputs=unfinished, last_entry_id="1-0")
        )

    async def FunctionCallCancel(self, stream: Any) -> None:
        call = self._call((await stream.recv_message()).function_call_id)
        await self._end(call)
        await stream.send_message(Empty())

    async def _end(self, call: Call) -> None:
        call.cancelled = True
        if call.result is None:
            terminated = api_pb2.GenericResult(status=api_pb2.GenericResult.GENERIC_STATUS_TERMINATED)
            call.result = api_pb2.FunctionPutOutputsItem(result=terminated)
        if call.process is not None and call.process.returncode is None:
            call.process.kill()

    # --- logs

    async def AppGetLogs(self, stream: Any) -> None:
        request = await stream.recv_message()
        call = self._call(request.function_call_id)
        sent = int(request.last_entry_id or 0)
        until = time.monotonic() + request.timeout
        while time.monotonic() < until:
            if sent < len(call.log):
                items, sent = call.log[sent:], len(call.log)
                batch = api_pb2.TaskLogsBatch(items=items, entry_id=str(sent), task_id=items[-1].container_id)
                await stream.send_message(batch)
            await asyncio.sleep(0.05)

    def _logged(self, request: Any) -> list[api_pb2.TaskLogs]:
        since, until = request.since.ToNanoseconds(), request.until.ToNanoseconds()
        return [one for one in self._call(request.function_call_id).log if since <= one.timestamp_ns < until]

    async def AppCountLogs(self, stream: Any) -> None:
        request = await stream.recv_message()
        step, counts = request.bucket_secs * 1_000_000_000, dict[int, int]()
        for one in self._logged(request):
            counts[one.timestamp_ns // step] = counts.get(one.timestamp_ns // step, 0) + 1
        buckets = []
        for start, count in sorted(counts.items()):
            bucket = api_pb2.AppCountLogsResponse.LogBucket(stdout_logs=count)
            bucket.bucket_start_at.FromNanoseconds(start * step)
            buckets.append(bucket)
        await stream.send_message(api_pb2.AppCountLogsResponse(buckets=buckets))

    async def AppFetchLogs(self, stream: Any) -> None:
        items = self._logged(await stream.recv_message())
        batches = [api_pb2.TaskLogsBatch(items=items)] if items else []
        await stream.send_message(api_pb2.AppFetchLogsResponse(batches=batches))

    # --- containers

    async def _attempts(self, call: Call) -> None:
        """Run containers until one returns, or one fails too often; a preempted one does not count."""
        function = self.functions[call.function]
        failures = 0
        while call.result is None:
            call.given, call.returned = False, None
            call.attempts.append(await self._container(call, function, f"ta-{call.id}-{len(call.attempts)}"))
            if call.returned is None:
                continue
            failures += 1
            if call.returned.result.status == OK or failures > function.retry_policy.retries:
                call.result = call.returned

    async def _container(self, call: Call, function: api_pb2.Function, task: str) -> int:
        root = self.folder / task
        for mount in function.mount_ids:
            for file in self.mounts[mount]:
                target = root / file.filename.lstrip("/")
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(self.blobs[file.sha256_hex])
        (root / "root" / "sitecustomize.py").write_text(NO_DIST_INFO)
        self.mounted = next(
            one.volume_id.removeprefix("vo-") for one in function.volume_mounts if one.mount_path == str(self.mount)
        )
        replace(self.volume(self.mounted), self.mount)
        layout = api_pb2.AppLayout(function_ids={function.function_name: call.function})
        layout.objects.append(
            api_pb2.Object(object_id=call.function, function_handle_metadata=self._metadata(function.function_name))
        )
        for dependency in function.object_dependencies:
            layout.objects.append(api_pb2.Object(object_id=dependency.object_id))
        arguments = api_pb2.ContainerArguments(
            task_id=task, function_id=call.function, app_id="ap-1", function_def=function, app_layout=layout
        )
        (root / "arguments").write_bytes(arguments.SerializeToString())
        secrets = [self.secrets.get(one.removeprefix("st-"), {}) for one in function.secret_ids]
        environment = {
            **{key: value for key, value in os.environ.items() if key != "NOTHING_DPO_MODAL"},
            **self.environment, **{key: value for secret in secrets for key, value in secret.items()},
            "MODAL_CONTAINER_ARGUMENTS_PATH": str(root / "arguments"), "MODAL_TASK_ID": task,
            "PYTHONPATH": str(root / "root"), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1",
            "NOTHING_DPO_LEASE_SECONDS": "0", "MODAL_SERVER_URL": self.inside_url,
        }  # fmt: skip
        call.process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "modal._container_entrypoint", cwd=root / "root", env=environment,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, limit=1 << 24,
        )  # fmt: skip
        assert call.process.stdout is not None
        async for line in call.process.stdout:
            text = line.decode(errors="replace")
            # In two pieces: a log entry may end anywhere.
            for piece in (text[:10], text[10:]):
                call.log.append(
                    api_pb2.TaskLogs(
                        data=piece, timestamp_ns=time.time_ns(), file_descriptor=api_pb2.FILE_DESCRIPTOR_STDOUT,
                        function_call_id=call.id, input_id=f"in-{call.id}", container_id=task,
                    )
                )  # fmt: skip
            if self.preempt(call, text):
                with suppress(ProcessLookupError):
                    call.process.send_signal(signal.SIGINT)
        return await call.process.wait()

    def _of_container(self, stream: Any) -> Call:
        return next(call for call in self.calls.values() if call.process and call.process.returncode is None)

    async def ContainerHello(self, stream: Any) -> None:
        await stream.recv_message()
        await stream.send_message(Empty())

    async def ContainerHeartbeat(self, stream: Any) -> None:
        await stream.recv_message()
        await stream.send_message(api_pb2.ContainerHeartbeatResponse())

    async def FunctionGetInputs(self, stream: Any) -> None:
        await stream.recv_message()
        call = self._of_container(stream)
        given, call.given = call.given, True
        item = api_pb2.FunctionGetInputsItem(
            input_id=f"in-{call.id}", input=call.item.input, kill_switch=given, function_call_id=call.id
        )
        await stream.send_message(api_pb2.FunctionGetInputsResponse(inputs=[item]))

    async def FunctionPutOutputs(self, stream: Any) -> None:
        request = await stream.recv_message()
        self._of_container(stream).returned = request.outputs[0]
        await stream.send_message(Empty())

    async def TaskResult(self, stream: Any) -> None:
        await stream.recv_message()
        await stream.send_message(Empty())


def refuser(name: str) -> Callable[..., Any]:
    async def refuse(self: ModalServer, stream: Any) -> None:
        await stream.recv_message()
        raise GRPCError(Status.UNIMPLEMENTED, f"this server does not know {name}")

    return refuse


for name in api_grpc.ModalClientBase.__abstractmethods__ - vars(ModalServer).keys():
    setattr(ModalServer, name, refuser(name))
ModalServer.__abstractmethods__ = frozenset()  # type: ignore[attr-defined]


def replace(source: Path, target: Path) -> None:
    """Make a folder the copy of another."""
    staged = target.with_name(f".{target.name}.new")
    shutil.rmtree(staged, ignore_errors=True)
    if source.exists():
        shutil.copytree(source, staged)
    else:
        staged.mkdir(parents=True)
    shutil.rmtree(target, ignore_errors=True)
    staged.rename(target)
