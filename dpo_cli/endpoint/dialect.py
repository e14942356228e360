"""In which form an endpoint takes requests for a model: what it refuses is found out once, and left out from then on.

A refused request is sent again without its optional fields, one by one, those first that the refusal names or that
servers refuse most often. Words decide only where to begin: what counts is the form that is taken. It is remembered for
the endpoint and the model as long as the process lives. Refusals cost nothing. What a user adds to a request by hand
(`extra_body`: `top_k`, `stop`) is never left out.
"""

import asyncio
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import combinations
from typing import Any, Protocol, TypeAlias

from msgspec import Struct, field

from dpo_cli.endpoint.client import Endpoint
from dpo_cli.endpoint.http import Rejected
from dpo_cli.endpoint.responses import Reply
from dpo_cli.errors import UserError

# The form in which a reply is asked for; an endpoint that refuses one is asked for the next.
FORMATS = ("strict json_schema", "json_schema", "json_object", "plain text")

LIMITS = ("max_tokens", "max_completion_tokens")
OUTPUT_LIMIT, SYSTEM = "output limit", "system role"  # what is changed that is no field

# What a request can do without, most often refused first, with the number of its other forms. A form of 0 is as asked.
FORMS = {
    "chat_template_kwargs": 1,
    "n": 2,  # 1, then absent
    "seed": 1,
    "frequency_penalty": 1,
    "top_p": 1,
    "temperature": 1,
    "response_format": len(FORMATS) - 1,
    "reasoning_effort": 1,
    "prompt_cache_options": 1,
    OUTPUT_LIMIT: 2,  # by the field's other name, then absent
    SYSTEM: 1,  # as the beginning of the first user message
}

# How a refusal names what it is about; every other field goes by its own name.
_NAMES = {
    "n": re.compile(r"(?<![\w\\])n(?!\w)"),
    "response_format": re.compile(r"response_format|json_schema|json_object|structured.?output|guided|grammar", re.I),
    "reasoning_effort": re.compile(r"\breasoning_effort\b|\breasoning\.effort\b"),
    OUTPUT_LIMIT: re.compile(r"\bmax_(completion_)?tokens\b"),
    SYSTEM: re.compile(r"system.{0,20}(role|message|prompt|instruction)|developer instruction", re.I),
}
_NEVER_LEFT_OUT = {"service_tier": re.compile(r"\bservice_tier\b|\bflex\b")}
_POLICY = ("content_filter", "content_policy_violation", "invalid_prompt")
# These are about this one request, not about its fields.
_TOO_LONG = re.compile(r"context.?(length|size|window)|maximum context|too (large|long)", re.I)
_NO_SUCH_MODEL = re.compile(
    r"model.{0,80}(not found|(not|n't) exist|unknown)|(no such|unknown|invalid|not a valid) model(?! ?(param|arg|opt))",
    re.I,
)

GATE_SECONDS = 10.0  # a refusal comes at once; an answer that takes longer is no refusal
MOST_SEARCHES = 3  # searches without a result; then only fields that a refusal names are left out


_Shape: TypeAlias = tuple[Any, ...]


class Send(Protocol):
    """What sends a request: `Endpoint.chat`, or what stands for it."""

    async def __call__(self, body: dict[str, Any], replicate: int = 0, *, final: bool = True) -> Reply:
        """The reply; with `final` false, a server error that may be a refusal is raised as `Rejected`."""


class _Known(Struct):
    """What is known of an endpoint and a model: field -> form, the (field, form) that were taken, lost searches.

    `shapes` are those of requests that were taken in these forms.
    """

    forms: dict[str, int] = field(default_factory=dict)
    taken: set[tuple[str, int]] = field(default_factory=set)
    shapes: set[_Shape] = field(default_factory=set)
    searches: int = 0


_known: dict[tuple[str, str], _Known] = {}


def forget() -> None:
    """Forget every endpoint."""
    _known.clear()


class Dialect:
    """Sends requests for one model in the form that its endpoint takes.

    Args:
        endpoint: that is asked.
        model: every request's.
        log: told in a line about each thing that is refused.
        kept: fields that are sent whatever happens.

    `send` is what sends a request.
    """

    def __init__(self, endpoint: Endpoint, model: str, log: Callable[[str], None], kept: Collection[str] = ()) -> None:
        self.send: Send = endpoint.chat
        self._endpoint = endpoint
        self._model = model
        self._log = log
        self._kept = kept
        self._known = _known.setdefault((endpoint.url, model), _Known())
        self._gate = asyncio.Lock()

    async def chat(self, body: dict[str, Any], replicate: int = 0) -> Reply:
        """The reply to a request, in the form that is taken.

        A form that was never taken is tried by one request at a time; the others wait for it.

        Args:
            body: the request as it is meant.
            replicate: as for `Endpoint.chat`.

        Raises:
            Rejected: the request is refused in every form, or not answered.
            UserError: no such model, or what `Endpoint.chat` raises.
        """
        shape = _shape(body)
        if shape not in self._known.shapes:
            return await self._negotiate(body, shape, replicate)
        sent = transform(body, self._known.forms)
        try:
            return await self.send(sent, replicate)
        except Rejected as refusal:
            if not is_about_fields(refusal, sent):
                raise await self._explain(refusal) from None
            self._endpoint.spend.failed -= 1  # not yet
            return await self._negotiate(body, shape, replicate, refusal)

    def changes(self, body: dict[str, Any]) -> dict[str, Any]:
        """What of a request is sent otherwise than it was meant: field -> what is sent, None if it is left out."""
        if not self._known.forms:
            return {}
        sent = transform(body, self._known.forms)
        found = {name: sent.get(name) for name in FORMS if name in body and sent.get(name) != body[name]}
        if sent["messages"] != body["messages"]:
            found[SYSTEM] = None
        if any(name in body for name in LIMITS) and not any(name in sent for name in LIMITS):
            found["max_tokens"] = None
        return found

    async def _negotiate(
        self, body: dict[str, Any], shape: _Shape, replicate: int, refusal: Rejected | None = None
    ) -> Reply:
        """Send a request whose form was never taken, or was refused just now."""
        held = await self._enter(refusal is not None)
        if refusal is None and shape in self._known.shapes:  # found out by the one that was waited for
            if held:
                self._gate.release()
            return await self.chat(body, replicate)
        sent = transform(body, self._known.forms)
        try:
            if refusal is None:
                try:
                    reply = await self.send(sent, replicate, final=not self._is_new(sent))
                except Rejected as error:
                    if not is_about_fields(error, sent):
                        raise
                    held = held or await self._enter(forever=True)
                    reply = await self._search(body, sent, replicate, error)
                else:
                    self._took(sent, reply)
            else:
                reply = await self._search(body, sent, replicate, refusal)
        except Rejected as error:
            self._endpoint.spend.failed += error.status > 0
            raise await self._explain(error) from None
        finally:
            if held:
                self._gate.release()
        self._known.shapes.add(shape)
        return reply

    async def _enter(self, forever: bool) -> bool:
        """Wait for whoever tries a new form; not for a server that is slow to answer."""
        try:
            async with asyncio.timeout(None if forever else GATE_SECONDS):
                return await self._gate.acquire()
        except TimeoutError:
            return False

    def _is_new(self, sent: dict[str, Any]) -> bool:
        return not _features(sent, self._known.forms) <= self._known.taken

    def _took(self, sent: dict[str, Any], reply: Reply) -> Reply:
        self._known.taken |= _features(sent, self._known.forms)
        return reply

    async def _search(self, body: dict[str, Any], sent: dict[str, Any], replicate: int, refusal: Rejected) -> Reply:
        """Find a form that is taken, remember it and say so.

        A refusal for another reason than the one before means that what was left out last was one of the culprits.
        """
        forms = self._known.forms
        if transform(body, forms) != sent:  # another request has learnt something meanwhile
            sent = transform(body, forms)
            try:
                return self._took(sent, await self.send(sent, replicate, final=False))
            except Rejected as error:
                if not is_about_fields(error, sent):
                    raise
                refusal = error
        last, heard, left = refusal, {_gist(refusal)}, True
        while left:
            left = False
            for other in self._others(body, forms, last):
                sent = transform(body, other)
                try:
                    reply = await self.send(sent, replicate, final=False)
                except Rejected as error:
                    if not is_about_fields(error, sent):
                        raise
                    changed = {name for name in other if other[name] != forms.get(name, 0)}
                    if _gist(error) in heard or any(_place(name, error) >= 0 for name in changed):
                        continue
                    heard.add(_gist(error))
                    forms, last, left = other, error, True
                    break
                else:
                    if refusal.status >= 500 and (passed := await self._again(body, replicate)) is not None:
                        return passed
                    self._learn(other, refusal)
                    return self._took(sent, reply)
        self._known.searches += sent != transform(body, self._known.forms)
        if refusal.status >= 500:  # no refusal, then, but an error like any other
            sent = transform(body, self._known.forms)
            return self._took(sent, await self.send(sent, replicate, final=True))
        raise refusal

    async def _again(self, body: dict[str, Any], replicate: int) -> Reply | None:
        """The reply to a request as it was first, if its server error has passed; else it was a refusal indeed."""
        sent = transform(body, self._known.forms)
        try:
            return self._took(sent, await self.send(sent, replicate, final=False))
        except Rejected:
            return None

    def _others(self, body: dict[str, Any], forms: Mapping[str, int], refusal: Rejected) -> Iterator[dict[str, int]]:
        """Forms to try, nearest first: one thing otherwise, then two, then ever more.

        What was taken before is left as it is, unless the refusal names it.
        """
        sent = transform(body, forms)
        new = {name for name, form in _features(sent, forms) - self._known.taken}
        named = _named(refusal, sent)
        named = [name for name in named if name not in self._kept]
        unnamed = [name for name in FORMS if name in new and name not in named and name not in self._kept]
        if self._known.searches >= MOST_SEARCHES:
            unnamed = []
        deepest = []
        for name in named + unnamed:
            for form in range(forms.get(name, 0) + 1, FORMS[name] + 1):
                other = {**forms, name: form}
                if transform(body, other) != sent:
                    yield other
            deepest.append((name, FORMS[name]))
        for pair in combinations(deepest, 2):
            yield {**forms, **dict(pair)}
        for count in range(3, len(deepest) + 1):
            yield {**forms, **dict(deepest[:count])}

    def _learn(self, forms: dict[str, int], refusal: Rejected) -> None:
        before = self._known.forms
        self._known.forms = forms
        self._known.shapes.clear()
        for name, form in forms.items():
            if form != before.get(name, 0):
                self._log(f"{self._model} at {self._endpoint.url} {_say(name, form)} ({refusal.message})")

    async def _explain(self, refusal: Rejected) -> Exception:
        """A refusal as it stands, or what is to be done if the model does not exist."""
        if refusal.status != 404 and not _is_about_model(refusal):
            return refusal
        names = ", ".join(await self._endpoint.models())
        hint = f"--model NAME; it serves: {names}" if names else "--model NAME, as the server was told to serve it"
        return UserError(f"no model '{self._model}' there ({refusal.message})", where=self._endpoint.url, hint=hint)


def transform(body: dict[str, Any], forms: Mapping[str, int]) -> dict[str, Any]:
    """A request with some of its fields in another form."""
    if not forms:
        return body
    sent = dict(body)
    for name, form in forms.items():
        if form == 0:
            continue
        if name == "n" and form == 1:
            sent |= {"n": 1} if "n" in sent else {}
        elif name == "response_format":
            _change_format(sent, form)
        elif name == OUTPUT_LIMIT:
            _change_limit(sent, form)
        elif name == SYSTEM:
            sent["messages"] = without_system(sent["messages"])
        else:
            sent.pop(name, None)
    return sent


def _change_format(sent: dict[str, Any], form: int) -> None:
    asked = sent.pop("response_format", None)
    if asked is None or FORMATS[form] == "plain text":
        return
    if FORMATS[form] == "json_object" or asked["type"] == "json_object":
        sent["response_format"] = {"type": "json_object"}
        return
    schema = {key: value for key, value in asked["json_schema"].items() if key != "strict"}
    sent["response_format"] = {**asked, "json_schema": schema}


def _change_limit(sent: dict[str, Any], form: int) -> None:
    given = next((name for name in LIMITS if name in sent), None)
    if given is not None:
        limit = sent.pop(given)
        if form == 1:
            sent[LIMITS[1 - LIMITS.index(given)]] = limit


def without_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages without a system turn: what it says stands at the beginning of the first user message."""
    system = [message["content"] for message in messages if message["role"] == "system"]
    rest = [message for message in messages if message["role"] != "system"]
    if not system or not rest or rest[0]["role"] != "user":
        return messages
    return [{**rest[0], "content": "\n\n".join([*system, rest[0]["content"]])}, *rest[1:]]


def _is_in(name: str, sent: dict[str, Any]) -> bool:
    """Whether a request holds what a name stands for."""
    if name == OUTPUT_LIMIT:
        return any(limit in sent for limit in LIMITS)
    if name == SYSTEM:
        return any(message["role"] == "system" for message in sent.get("messages", ()))
    return name in sent


def _shape(body: dict[str, Any]) -> _Shape:
    """What tells apart requests of which one may be refused and the other not."""
    return (*body, body.get("n", 1) > 1, _is_in(SYSTEM, body))


def _features(sent: dict[str, Any], forms: Mapping[str, int]) -> set[tuple[str, int]]:
    """What of a request a server may refuse, each with its form; one choice is not several."""
    found = {(name, forms.get(name, 0)) for name in FORMS if _is_in(name, sent)}
    if "n" in sent:
        found = {one for one in found if one[0] != "n"} | {("n", 0 if sent["n"] > 1 else 1)}
    return found


def is_about_fields(refusal: Rejected, sent: dict[str, Any]) -> bool:
    """Whether a request that was refused may be taken in another form."""
    if refusal.status not in (400, 404, 422, 500) or refusal.code in _POLICY:
        return False
    if _TOO_LONG.search(f"{refusal.code} {refusal.message}"):
        return False
    if _is_about_model(refusal):
        return False
    if any(name in sent and words.search(_said(refusal)) for name, words in _NEVER_LEFT_OUT.items()):
        return False
    return _head(refusal) not in sent or bool(_named(refusal, sent))


def _is_about_model(refusal: Rejected) -> bool:
    """Whether there is no such model."""
    if refusal.status not in (400, 404, 422):
        return False
    return refusal.param == "model" or bool(_NO_SUCH_MODEL.search(refusal.message))


def _named(refusal: Rejected, sent: dict[str, Any]) -> list[str]:
    """What a refusal names of what was sent, in its order; `top_p` before the `temperature` that it stands beside."""
    places = {name: _place(name, refusal) for name in FORMS if _is_in(name, sent)}
    if "top_p" in places and "temperature" in places and places["top_p"] >= 0:
        places["top_p"] = min(places.values(), key=lambda place: (place < 0, place))
    return sorted((name for name in places if places[name] >= 0), key=places.__getitem__)


def _place(name: str, refusal: Rejected) -> int:
    """Where in its text a refusal names something; -1: it does not."""
    match = _NAMES.get(name, re.compile(rf"\b{name}\b")).search(_said(refusal))
    return match.start() if match else -1


def _said(refusal: Rejected) -> str:
    """The field that a refusal is about, or else its text."""
    known = (*FORMS, *LIMITS, *_NEVER_LEFT_OUT)
    return refusal.param if refusal.param and _head(refusal) in known else refusal.message


def _head(refusal: Rejected) -> str:
    return (refusal.param or "").partition(".")[0]


def _gist(refusal: Rejected) -> str:
    """What a refusal says, without what may be different each time: numbers and ids."""
    return f"{refusal.status} {refusal.param} {re.sub(r'[0-9a-f-]*[0-9][0-9a-f-]*', '#', refusal.message)}"


def _say(name: str, form: int) -> str:
    if name == "n":
        return f"refuses {'n' if form == 2 else 'n > 1'}, so each completion is a request of its own"
    if name == "response_format":
        return f"refuses {', '.join(FORMATS[:form])}; now {FORMATS[form]}"
    if name == OUTPUT_LIMIT:
        return "refuses max_tokens by this name, so it has its other one" if form == 1 else "takes no output limit"
    if name == SYSTEM:
        return "refuses the system role, so its text opens the first user message"
    return f"refuses {name}, so it is left out"
