"""A real OpenAI-compatible server on loopback, with faults that tests and examples switch on.

It answers `/v1/chat/completions` and `/v1/models`. A model whose name starts with `judge` or `gpt-` judges (one JSON
object of scores and ranking, of one score, or of right and wrong); every other model writes a scene whose text follows
from the seed and the messages alone. Every call is counted by its content, so that what was paid twice can be measured.
Streaming is not covered.

In a test:      with Server(latency=0.05, fault=shares({"429:1": 0.1})) as server: ... server.url, server.paid
From a shell:   python tests/openai_server.py --port 8100 --fault 429=0.1 --fault drop=0.05

A fault is a string:
    429 | 429:SECONDS | 429:DATE   too many requests, without or with Retry-After in seconds or as an HTTP date
    500 | 503                      server errors
    401 | 403 | 404 | quota        faults that no retry mends
    400:PARAM                      PARAM is refused wherever it is sent; `400:n` only where n > 1
    400!TEXT                       refused with this message; any status, and a TEXT that is JSON is the whole reply
    hang                           accepted, paid, never answered
    drop                           accepted, paid, connection closed without an answer
    malformed                      accepted, paid, half a JSON body
    fewer                          one choice, however many were asked for
    same                           all choices alike
    empty                          choices without text
    refusal                        choices without text that carry a refusal
    cut                            choices cut at half their length, finish_reason "length"
    reply!TEXT                     choices with this text, whatever was asked
"""

import argparse
import asyncio
import hashlib
import json
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import formatdate
from typing import Any, Self

from aiohttp import web

NAMES = ("MABEL", "OTIS", "RUTH", "VIC")
CHATTER = """
well you see the soup was never mine and the ladder was only borrowed from a man who sells umbrellas in July
so naturally I said keep the change because nobody counts buttons on a Tuesday except my aunt
"""
WORDS = CHATTER.split()


@dataclass
class Call:
    """One request as it arrived: `number` counts all calls, `attempt` those of the same content; both start at 1."""

    body: dict[str, Any]
    key: str
    number: int
    attempt: int

    @property
    def text(self) -> str:
        return "\n".join(message["content"] for message in self.body["messages"])


Fault = Callable[[Call], str | None]
Quality = Callable[[str], float]


def shares(faults: dict[str, float]) -> Fault:
    """Each fault strikes its share of the calls, chosen by content and attempt, so the same ones on every run."""

    def strike(call: Call) -> str | None:
        point = random.Random(f"{call.key}/{call.attempt}").random()
        for fault, share in faults.items():
            point -= share
            if point < 0:
                return fault
        return None

    return strike


def first(attempts: int, fault: str) -> Fault:
    """The fault strikes the first attempts of every request."""
    return lambda call: fault if call.attempt <= attempts else None


def longest(text: str) -> float:
    """Quality rule: more words are better, up to 10."""
    return min(10, len(text.split()) / 8)


class Server:
    """The server in a thread of its own; a context manager.

    Args:
        port: 0 takes a free one.
        latency: seconds that an answer takes.
        capacity: calls in flight above which the rest get 429; unset: no limit.
        fault: which fault, if any, strikes a call.
        quality: what the judge scores by: candidate text -> score, cut to 1..10.
        models: names that exist; unset: every name does.
        api_key: the key that is asked for; unset: none.
        log_probs: model -> log-probability of each of its tokens, given as vLLM gives them; unset: none are given.

    `calls` counts requests and `paid` those that were accepted for an answer, by content; `bodies`, `arrivals`
    (monotonic seconds) and `keys` are what came; `highest` is the most that were in flight at once.
    """

    def __init__(
        self,
        *,
        port: int = 0,
        latency: float = 0.0,
        capacity: int | None = None,
        fault: Fault | None = None,
        quality: Quality = longest,
        models: list[str] | None = None,
        api_key: str | None = None,
        log_probs: dict[str, float] | None = None,
    ) -> None:
        self.port = port
        self.latency = latency
        self.capacity = capacity
        self.fault = fault
        self.quality = quality
        self.models = models
        self.api_key = api_key
        self.log_probs = log_probs
        self.calls: Counter[str] = Counter()
        self.paid: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.tokens = 0  # billed
        self.arrivals: list[float] = []
        self.keys: set[str] = set()
        self.in_flight = 0
        self.highest = 0
        self._started = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def paid_twice(self) -> int:
        """Calls that were paid for again after a first time."""
        return sum(count - 1 for count in self.paid.values())

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        if not self._started.wait(30):
            raise RuntimeError("the server did not start")
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Close the port and every connection; safe to call twice."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(10)

    def routes(self, app: web.Application) -> None:
        """What is served where."""
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_get("/v1/models", self._models)
        if self.log_probs is not None:
            app.router.add_post("/v1/completions", self._score)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        app = web.Application(client_max_size=1 << 26)
        self.routes(app)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", self.port, backlog=4096, reuse_address=True)
        await site.start()
        self.port = runner.addresses[0][1]
        self._started.set()
        try:
            await self._stop.wait()
        finally:
            await runner.cleanup()

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": name} for name in self.models or ["writer"]]})

    async def _score(self, request: web.Request) -> web.Response:
        """How likely the model finds each token of a prompt but the first."""
        body = await request.json()
        self.bodies.append(body)
        likely = {"logprob": (self.log_probs or {})[body["model"]]}
        scored = [None, *({str(token): likely} for token in body["prompt"][1:])]
        choice = {"index": 0, "text": "x", "finish_reason": "length", "prompt_logprobs": scored}
        return web.json_response({"choices": [choice], "model": body["model"]})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        self.arrivals.append(time.monotonic())
        raw = await request.read()
        body = json.loads(raw)
        key = hashlib.sha256(raw).hexdigest()[:16]
        self.calls[key] += 1
        self.bodies.append(body)
        call = Call(body, key, len(self.bodies), self.calls[key])
        self.in_flight += 1
        self.highest = max(self.highest, self.in_flight)
        try:
            return await self._respond(call, request)
        finally:
            self.in_flight -= 1

    async def _respond(self, call: Call, request: web.Request) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        self.keys.add(given)
        if self.api_key and given != self.api_key:
            return _error(401, f"Incorrect API key provided: {given}", code="invalid_api_key")
        if self.models and call.body["model"] not in self.models:
            return _error(404, f"The model `{call.body['model']}` does not exist.", param="model")
        if self.capacity and self.in_flight > self.capacity:
            return _error(429, "Rate limit reached")
        fault = self.fault(call) if self.fault else None
        refused = _refuse(fault, call.body) if fault else None
        if refused is not None:
            return refused
        self.paid[call.key] += 1
        if fault == "hang":
            await self._stop.wait()
        await asyncio.sleep(self.latency)
        if fault == "drop" and request.transport is not None:  # None: the client has hung up before
            request.transport.close()
        content = json.dumps(self._answer(call, fault)).encode()
        if fault == "malformed":
            content = content[: len(content) // 2]
        return web.Response(body=content, content_type="application/json")

    def _answer(self, call: Call, fault: str | None) -> dict[str, Any]:
        body = call.body
        count = 1 if fault == "fewer" else body.get("n", 1)
        judged = body["model"].startswith(("judge", "gpt-"))
        choices = []
        for index in range(count):
            if judged:
                text, reason = verdict(body, self.quality), "stop"
            else:
                text, reason = scene(body, 0 if fault == "same" else index)
            if fault in ("empty", "refusal"):
                text = ""
            elif fault == "cut":
                text, reason = text[: len(text) // 2], "length"
            elif fault and fault.startswith("reply!"):
                text = fault.removeprefix("reply!")
            message = {"role": "assistant", "content": text}
            beside: dict[str, Any] = {}
            if self.log_probs is not None and body.get("logprobs"):
                likely = {"logprob": self.log_probs[body["model"]]}
                beside = {
                    "token_ids": list(range(len(text.split()))),
                    "logprobs": {"content": [likely] * len(text.split())},
                }
            if fault == "refusal":
                message |= {"content": None, "refusal": "I can't help with that."}
            choices.append({"index": index, "message": message, "finish_reason": reason, **beside})
        output = sum(len((choice["message"]["content"] or "").split()) for choice in choices)
        usage = {"prompt_tokens": len(call.text) // 4, "completion_tokens": output}
        self.tokens += sum(usage.values())
        return {
            "id": f"chatcmpl-{call.number}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": body["model"],
            "choices": choices,
            **({"prompt_token_ids": [7, 8, 9]} if body.get("return_token_ids") and self.log_probs else {}),
            "usage": usage | {"total_tokens": sum(usage.values())},
        }


def scene(body: dict[str, Any], index: int) -> tuple[str, str]:
    """Text and finish reason of choice `index`: the one that seed + index gives with n = 1, as vLLM does it."""
    seed = body.get("seed", 0) + index if body.get("temperature", 1) else 0
    rng = random.Random(f"{seed}/{json.dumps(body['messages'])}")
    lines = [f"[{rng.choice(NAMES)}] {' '.join(rng.choices(WORDS, k=rng.randint(4, 14)))}." for _ in range(3)]
    words = "\n".join(lines).split(" ")
    most = body.get("max_tokens") or body.get("max_completion_tokens") or 256
    return " ".join(words[:most]), "length" if len(words) > most else "stop"


def verdict(body: dict[str, Any], quality: Quality) -> str:
    """The judge's JSON reply for the candidates, or the one answer, that the last user message shows."""
    texts = candidates(body["messages"][-1]["content"])
    scores = {label: round(max(1, min(10, quality(text)))) for label, text in texts.items()}
    asked = json.dumps(body).replace("\\", "")
    if '"correct"' in asked:
        return json.dumps({"rationale": "As the rule says.", "correct": max(scores.values(), default=1) > 5})
    if '"ranking"' not in asked:
        return json.dumps({"rationale": "As the rule says.", "score": max(scores.values(), default=1)})
    ranking = sorted(scores, key=lambda label: -quality(texts[label]))
    return json.dumps({"rationale": "As the rule says.", "scores": scores, "ranking": ranking})


def candidates(message: str) -> dict[str, str]:
    """Label -> text of the fenced candidates.

    A fence is a line that holds the message's nonce; a candidate stands between a fence that holds its label (a single
    capital letter) and the next fence.
    """
    marks = Counter(re.findall(r"\b(?=[0-9a-f]*\d)[0-9a-f]{8,}\b", message))
    if not marks:
        return {}
    nonce = marks.most_common(1)[0][0]
    found: dict[str, str] = {}
    label, lines = None, []
    for line in message.split("\n"):
        if nonce not in line:
            lines.append(line)
            continue
        if label is not None:
            found.setdefault(label, "\n".join(lines))
        opened = re.search(r"(?<![A-Za-z])[A-Z](?![A-Za-z])", line.replace(nonce, ""))
        label, lines = (opened.group() if opened else None), []
    return {label: text for label, text in found.items() if text.strip()}


def _refuse(fault: str, body: dict[str, Any]) -> web.Response | None:
    name, _, detail = fault.partition(":")
    if name in ("429", "500", "503"):
        wait = formatdate(time.time() + 2, usegmt=True) if detail == "DATE" else detail
        return _error(int(name), "Try again later", headers={"Retry-After": wait} if wait else None)
    if name in ("401", "403", "404"):
        return _error(int(name), {"401": "Incorrect API key provided", "403": "Forbidden"}.get(name, "Not Found"))
    if name == "quota":
        return _error(429, "You exceeded your current quota", code="insufficient_quota")
    if name == "400" and detail in body and (detail != "n" or body["n"] > 1):
        return _error(400, f"Unsupported parameter: '{detail}'", param=detail, code="unsupported_parameter")
    if refused := re.fullmatch(r"([45]\d\d)!(.*)", fault, re.S):
        status, text = int(refused[1]), refused[2]
        if text[:1] in ("{", "["):
            return web.Response(status=status, text=text, content_type="application/json")
        return _error(status, text)
    return None


def _error(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: dict[str, str] | None = None,
) -> web.Response:
    error = {"message": message, "type": "error", "param": param, "code": code or status}
    return web.json_response({"error": error}, status=status, headers=headers)


def main() -> None:
    parser = argparse.ArgumentParser(description="OpenAI-compatible server for tests, with faults.")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one; the URL is printed")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds an answer takes")
    parser.add_argument("--capacity", type=int, help="calls in flight above which the rest get 429")
    parser.add_argument("--model", action="append", help="a name that exists; without any, every name does")
    parser.add_argument("--fault", action="append", default=[], metavar="FAULT=SHARE", help="see the top of this file")
    options = parser.parse_args()
    faults = {name: float(share) for name, _, share in (text.rpartition("=") for text in options.fault)}
    server = Server(
        port=options.port,
        latency=options.latency,
        capacity=options.capacity,
        models=options.model,
        fault=shares(faults) if faults else None,
    )
    with server:
        print(server.url, flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print(f"{server.calls.total()} calls, {server.paid.total()} paid, {server.paid_twice} of them again")


if __name__ == "__main__":
    main()
