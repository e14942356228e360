"""How a language model is asked for verdicts on one prompt, and what is made of its replies."""

import json
import re
from collections.abc import Callable, Sequence

import msgspec

from dpo_cli.config.settings import Config
from dpo_cli.data.records import Judgment, Order, Usage
from dpo_cli.endpoint.batch import PendingRequest
from dpo_cli.endpoint.client import Endpoint
from dpo_cli.endpoint.dialect import Dialect
from dpo_cli.endpoint.http import Rejected
from dpo_cli.endpoint.prices import is_local
from dpo_cli.endpoint.responses import PASSING, Choice, Reply, one_line
from dpo_cli.errors import UserError
from dpo_cli.judges import _panel
from dpo_cli.judges._control_tokens import tokens_of
from dpo_cli.judges._forms import Form, Verdict
from dpo_cli.judges._orders import OrderVerdict, Vote, is_enough, order_verdict, plan_votes
from dpo_cli.judges._prompt import show
from dpo_cli.judges._request import request
from dpo_cli.judges._rubric import Criterion, read_criteria
from dpo_cli.judges._task import Task
from dpo_cli.judges._verdict import Quoted, read_verdict

REPEAT = 1000  # replicates of a request that each repeat of a vote may take up by asking again
SHOWN_CHARACTERS = 80  # of a reply that is no verdict
DIGITS = 9  # a weighted mean has noise below that, which must break no tie
_POLICY = ("content_filter", "content_policy_violation", "invalid_prompt")

# The words of a reply, and what they say.
Said = tuple[str, Verdict]


class LlmJudge:
    """One endpoint, and what has been learnt about it, for many tasks."""

    def __init__(self, endpoint: Endpoint, config: Config, log: Callable[[str], None], form: Form) -> None:
        self.endpoint = endpoint
        self.form = form
        self.settings = config.judge
        self.criteria = criteria_for(form, config.judge.rubric)
        self.log = log
        self.shown_reply = False  # one reply that is no verdict is shown, so that somebody sees what it was
        self.dialects = {
            model: Dialect(endpoint, model, log, config.judge.extra_body) for model in self.settings.models
        }
        here = is_local(self.settings.url)
        self.tokens = {model: tokens_of(model) if here else frozenset() for model in self.settings.models}

    async def judgment(self, task: Task) -> Judgment:
        """The judgment of one task: scored, skipped where the judge refuses, or an error where it can't be had."""
        paid: list[Reply] = []
        verdicts: list[OrderVerdict] = []
        judgment = Judgment(id=task.id, completions_id=task.completions_id)
        try:
            for model in self.settings.models:
                mine: list[OrderVerdict] = []
                for asked, vote in enumerate(plan_votes(task, self.settings)):
                    if is_enough(task, self.settings, asked, mine):
                        break
                    said = [await self._ask(task, vote, model, criterion, paid) for criterion in self.criteria]
                    mine.append(self._combine(vote, model, said))
                verdicts += mine
        except _Refused as refusal:
            judgment.skipped = f"the judge refused: {refusal}"
        except (_Invalid, Rejected) as error:
            judgment.error = str(error)
            judgment.failures = task.failures + 1
        else:
            judgment = _panel.decide(task, verdicts)
        judgment.usage = sum((reply.usage for reply in paid), Usage())
        judgment.usd = sum(reply.usd for reply in paid)
        return judgment

    async def owed(self, task: Task) -> list[PendingRequest]:
        """What a task would ask next, every vote and criterion, where `chat` sends nothing itself."""
        found: list[PendingRequest] = []
        for model in self.settings.models:
            mine: list[OrderVerdict] = []
            for asked, vote in enumerate(plan_votes(task, self.settings)):
                if is_enough(task, self.settings, asked, mine):
                    break
                said: list[Said] = []
                for criterion in self.criteria:
                    try:
                        said.append(await self._ask(task, vote, model, criterion, []))
                    except PendingRequest as pending:
                        found.append(pending)
                    except (_Refused, _Invalid, Rejected):
                        return found  # whatever the others say
                if len(said) == len(self.criteria):
                    mine.append(self._combine(vote, model, said))
        return found

    async def _ask(self, task: Task, vote: Vote, model: str, criterion: Criterion, paid: list[Reply]) -> Said:
        """A model's verdict on one order by one criterion.

        What was asked before is in the ledger and free, so each run may ask twice more than the failed ones before it.
        A verdict that stands in the material as well is asked for again, with the code of the request in it.

        Raises:
            _Refused: the judge declines, or only ever repeats a verdict from the material.
            _Invalid: no reply was a verdict.
            Rejected: the endpoint declines or does not answer.
        """
        form, cap, again = self.form, self.settings.max_tokens, 0
        while True:
            shown = show(task, vote.order, criterion.text, self.settings.seed, form, self.tokens[model])
            body = request(model, shown.message, shown.labels, cap, self.settings, form)
            choice = await self._send(model, body, vote.repeat * REPEAT + again, paid)
            if choice.refusal or choice.finish_reason == "content_filter":
                raise _Refused(choice.refusal or "content filter")
            code = shown.code if form.signed else None
            try:
                if lacks := choice.lacks():
                    raise ValueError(lacks)
                return choice.text, read_verdict(choice.text, shown.labels, shown.material, form, code)
            except ValueError as error:
                self._show(task, choice, error)
                cut = choice.finish_reason == "length"
                if isinstance(error, Quoted) and not form.signed:
                    form = msgspec.structs.replace(form, signed=True)
                elif cut and cap is not None and cap == self.settings.max_tokens:
                    cap *= 2
                elif again <= 2 * task.failures and (lacks is None or (lacks in PASSING and again == 0)):
                    again += 1
                elif isinstance(error, Quoted) and task.failures:
                    raise _Refused("its replies only repeat JSON that stands in the material") from None
                else:
                    raise _Invalid(f"no valid verdict: {'cut off by length' if cut and not lacks else error}") from None

    def _show(self, task: Task, choice: Choice, error: ValueError) -> None:
        if not self.shown_reply and choice.text.strip():
            self.shown_reply = True
            begins = one_line(choice.text[:SHOWN_CHARACTERS])
            self.log(f"prompt {task.id}: no valid verdict: {error}; the reply begins: {begins}")

    async def _send(self, model: str, body: dict[str, object], replicate: int, paid: list[Reply]) -> Choice:
        try:
            reply = await self.dialects[model].chat(body, replicate)
        except Rejected as rejected:
            if rejected.code in _POLICY:
                raise _Refused(rejected.message) from rejected
            if "service_tier" in body and re.search(r"service_tier|flex", rejected.param or rejected.message):
                what = f"no flex tier there ({rejected.message})"
                raise UserError(what, where=self.endpoint.url, hint="without --flex") from None
            raise
        paid.append(reply)
        return reply.choices[0]

    def _combine(self, vote: Vote, model: str, said: Sequence[Said]) -> OrderVerdict:
        """One vote: the weighted mean of its criteria's scores, which ranks by scores alone."""
        name = model if len(self.settings.models) > 1 else None
        if len(said) == 1:
            text, verdict = said[0]
            return order_verdict(Order(vote.order, verdict.scores, text, name), verdict)
        by_name = {one.name: verdict.scores for one, (_, verdict) in zip(self.criteria, said, strict=True)}
        whole = sum(one.weight for one in self.criteria)
        scores = {
            label: round(sum(one.weight * by_name[one.name][label] for one in self.criteria) / whole, DIGITS)
            for label in said[0][1].scores
        }
        raw = json.dumps({one.name: text for one, (text, _) in zip(self.criteria, said, strict=True)})
        return order_verdict(Order(vote.order, scores, raw, name, by_name), Verdict(scores, []))


def criteria_for(form: Form, rubric: str | None) -> list[Criterion]:
    """What is asked for a form, each in a request of its own: the rubric's criteria, or the form's own question."""
    return [Criterion("", form.rubric)] if form.rubric else read_criteria(rubric)


class _Refused(Exception):
    """The judge declines to judge this."""


class _Invalid(Exception):
    """The judge's replies are no verdicts."""
