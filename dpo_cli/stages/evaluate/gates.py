"""`--gate 'win-rate>0.5'`: what the interval of a result must clear."""

import re
from collections.abc import Mapping, Sequence

from dpo_cli.errors import UserError
from dpo_cli.statistics import Interval
from dpo_cli.training.gates import Gate, compared

NAMES = ("win-rate", "length-controlled-win-rate")
_GATE = re.compile(r"\s*([\w-]+)\s*>\s*([0-9.]+)\s*")


def read_gates(texts: Sequence[str]) -> dict[str, float]:
    """Name -> limit.

    Raises:
        UserError: a text that is no gate.
    """
    gates = {}
    for text in texts:
        match = _GATE.fullmatch(text)
        try:
            name, limit = (match[1], float(match[2])) if match else ("", 0.0)
        except ValueError:
            name = ""
        if name not in NAMES or not 0 <= limit < 1:
            raise UserError(f"'{text}' is no gate", where="evaluate.gate", hint=f"--gate '{NAMES[0]}>0.5'; {NAMES[1]}")
        gates[name] = limit
    return gates


def check_gates(gates: Mapping[str, float], rates: Sequence[Interval], whole: bool) -> dict[str, Gate]:
    """Each gate against the rates, which are in the order of `NAMES`; none is passed before the result is whole."""
    found = {name: compared(rate, gates[name]) for name, rate in zip(NAMES, rates, strict=True) if name in gates}
    return found if whole else {name: Gate(gate.value, gate.limit, None, gate.interval) for name, gate in found.items()}


def refusals(gates: Mapping[str, Gate]) -> list[str]:
    """Gates that say no: each that fails, and each that was asked for and is not shown."""
    return [name for name, gate in gates.items() if gate.ok is False or (gate.ok is None and name in NAMES)]
