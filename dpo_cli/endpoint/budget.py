"""What a run may spend: the worst case of a call is reserved before it is sent, and settled from its usage after.

Tokens of input are estimated as a token for each 3.5 bytes of the request (characters, in English), or more if the
endpoint has counted more. Tokens of output are the request's own cap, reasoning included. Both are bounds, so the cap
holds, unless an endpoint exceeds its own `max_tokens` or charges for more than it reports. What an endpoint reports
is believed as long as it can be right.
"""

import asyncio
import math
from typing import Any

from dpo_cli.endpoint.costs import BYTES_A_TOKEN
from dpo_cli.endpoint.prices import Price
from dpo_cli.endpoint.responses import Reply
from dpo_cli.errors import Exit, UserError

_SLACK = 1e-9  # of a dollar: sums of floats
_TEMPLATE_TOKENS = 2000  # that a server may add to a prompt, or to an answer, of its own


class Budget:
    """Dollars of one run.

    Args:
        cap: most that this run may spend; None: no limit.

    `spent` is settled; `unseen` the worst case of calls that may have been paid although no answer came.
    """

    def __init__(self, cap: float | None = None) -> None:
        self.cap = cap
        self.spent = 0.0
        self.unseen = 0.0
        self._reserved = 0.0
        self._open = 0
        self._settled = asyncio.Event()
        self._tokens_a_byte = 1 / BYTES_A_TOKEN

    @property
    def left(self) -> float:
        """Dollars that are neither spent nor reserved; infinite without a cap."""
        return float("inf") if self.cap is None else self.cap - self.spent - self.unseen - self._reserved

    def tokens(self, size: int) -> int:
        """At most so many tokens are in a request of `size` bytes, as far as is known."""
        return int(size * self._tokens_a_byte) + 1

    def learn(self, size: int, tokens: int) -> None:
        """A request of `size` bytes had so many tokens: the estimate grows with what was seen, and never shrinks."""
        self._tokens_a_byte = max(self._tokens_a_byte, tokens / size)

    def worst(self, body: dict[str, Any], size: int, price: Price | None) -> float:
        """The most that a request can cost, in dollars; 0 where there is neither a price nor a cap.

        Raises:
            UserError: there is a cap, and no price or no bound on the output.
        """
        if price is None:
            if self.cap is None:
                return 0.0
            raise UserError(
                f"nobody knows what {body.get('model')} costs there, so --max-usd can't be kept",
                hint="--price IN,CACHED,OUT in dollars per million tokens, or no --max-usd",
            )
        output = output_cap(body)
        if output is None and price.output > 0:
            if self.cap is None:
                return 0.0
            raise UserError(
                "nothing limits the output (max_tokens is none, or refused there), so --max-usd can't be kept",
                hint="set max_tokens, or no --max-usd",
            )
        return (self.tokens(size) * max(price.input, price.cached) + (output or 0) * price.output) / 1e6

    async def reserve(self, worst: float) -> None:
        """Set `worst` dollars aside; waits for calls in flight, which may turn out cheaper.

        Raises:
            UserError: it does not fit, and nothing is in flight any more.
        """
        while worst > self.left + _SLACK:
            if not self._open:
                raise self.reached(worst)
            self._settled.clear()
            await self._settled.wait()
        self.hold(worst)

    def hold(self, worst: float) -> None:
        """Set `worst` dollars aside, which the caller knows to fit."""
        self._reserved += worst
        self._open += 1

    def settle(self, worst: float, paid: float = 0.0) -> None:
        """A call that was reserved with `worst` has cost `paid`."""
        self.spent += paid
        self._release(worst)

    def lose(self, worst: float) -> None:
        """The answer of a call is lost, and may have been paid."""
        self.unseen += worst
        self._release(worst)

    def reached(self, worst: float) -> UserError:
        """What to raise at the cap."""
        parts = [f"${self.spent:,.4f} of ${self.cap:,.4f} spent"]
        parts += [f"up to ${self.unseen:,.4f} for answers that were lost"] * (self.unseen > 0)
        return UserError(
            f"the budget is reached: {', '.join(parts)}, and the next step may cost up to ${worst:,.4f}",
            hint="everything paid is kept: the same command goes on, and --max-usd counts anew",
            code=Exit.BUDGET,
        )

    def _release(self, worst: float) -> None:
        self._reserved -= worst
        self._open -= 1
        self._settled.set()


def estimate_tokens(reply: Reply) -> int:
    """Tokens of output that a reply's texts, reasoning included, are likely to be."""
    said = sum(len(part.encode()) for one in reply.choices for part in (one.text, one.reasoning, one.refusal or ""))
    return math.ceil((said or len(reply.raw)) / BYTES_A_TOKEN)


def is_plausible(reply: Reply, size: int, output: int | None) -> bool:
    """Whether the tokens that an endpoint counted can be those of a request of `size` bytes and of its reply.

    A token is at least a byte, but for those that a chat template adds; a prompt has at least one, and so has a text.
    """
    most = 4 * max(output or 0, _said(reply)) + _TEMPLATE_TOKENS
    usage = reply.usage
    if not reply.counted or not 0 < usage.input <= size + _TEMPLATE_TOKENS:
        return False
    return usage.output <= most and (usage.output > 0 or not _said(reply))


def _said(reply: Reply) -> int:
    """Characters of a reply's texts; of all of it where none could be read."""
    said = sum(len(one.text) + len(one.reasoning) + len(one.refusal or "") for one in reply.choices)
    return said or len(reply.raw)


def output_cap(body: dict[str, Any]) -> int | None:
    """Most tokens that a request's choices can have together; None if it sets no limit."""
    cap = body.get("max_completion_tokens") or body.get("max_tokens")
    return None if cap is None else int(cap) * int(body.get("n", 1))
