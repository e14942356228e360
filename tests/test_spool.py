"""Rows that are put aside come back as they were, from memory and from a temporary file."""

import pytest

from dpo_cli.data import spool
from dpo_cli.data.records import Preference


@pytest.mark.parametrize("in_memory", [0, 300, 1 << 20])
def test_rows_come_back_in_their_order_and_by_number(monkeypatch, in_memory):
    monkeypatch.setattr(spool, "IN_MEMORY", in_memory)
    call = {
        "type": "function",
        "function": {"name": "f", "arguments": {"a": 1.5, "b": None, "c": [1, "é\n"]}},
        "id": "7",
    }
    asked = [{"role": "user", "content": "Würde\u2028es regnen?"}]
    rows = [
        Preference(
            id=str(number),
            prompt=asked,
            chosen=[{"role": "assistant", "content": "x" * number, "tool_calls": [call], "reasoning_content": "r"}],
            rejected=[{"role": "assistant", "content": "no", "name": "n"}],
            chosen_score=float(number),
            tools=[{"type": "function", "function": {"name": "f", "strict": True, "parameters": {"$defs": {}}}}],
        )
        for number in range(300)
    ]
    put = spool.Spool(Preference)
    put.extend(rows)
    assert len(put) == 300
    assert list(put) == rows
    assert [put[place] for place in (299, 0, 150)] == [rows[299], rows[0], rows[150]]
    looked_at = [(row, put[0]) for row in put]  # which moves the place in the file
    assert [row for row, _ in looked_at] == rows
    assert list(spool.Spool(Preference)) == []
