"""One or two rows of every dialect that `pair --import` reads, and what they say; from the tools' own documents."""

from typing import Any

SYSTEM = {"role": "system", "content": "You are a harbour pilot."}
ASKED = {"role": "user", "content": "Which tide is the highest?"}
GOOD = {"role": "assistant", "content": "The spring tide, at new and full moon."}
BAD = {"role": "assistant", "content": "No idea."}
TOOL = {"type": "function", "function": {"name": "tide", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "tide", "arguments": {"day": "mon"}}}
CALL_TEXT = '{"name":"tide","arguments":{"day":"mon"}}'
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "4.1 m"}
FIRST = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Ahoy."}]


def expected(
    prompt: list[Any], good: Any = None, bad: Any = None, tools: Any = None, scores: Any = None
) -> dict[str, Any]:
    """What a row says: a pair, without its id."""
    return {"prompt": prompt, "chosen": good or [GOOD], "rejected": bad or [BAD], "tools": tools, "scores": scores}


def text(message: dict[str, Any]) -> str:
    return message["content"]


def human(*messages: dict[str, Any]) -> list[dict[str, str]]:
    names = {"user": "human", "assistant": "gpt", "system": "system", "tool": "observation"}
    return [{"from": names[message["role"]], "value": message["content"]} for message in messages]


def hh(*messages: dict[str, Any]) -> str:
    names = {"user": "Human", "assistant": "Assistant"}
    return "".join(f"\n\n{names[message['role']]}: {message['content']}" for message in messages)


def raw(answer: dict[str, Any], ratings: list[str], overall: float) -> dict[str, Any]:
    notes = {str(index): {"Rating": rating, "Rationale": "…"} for index, rating in enumerate(ratings)}
    return {"model": "m", "response": answer["content"], "annotations": notes, "overall_score": overall}


Q, A, B = text(ASKED), text(GOOD), text(BAD)

# name -> (rows, the pairs that they are)
DIALECTS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {
    "trl-conversational": (
        [
            {"prompt": [SYSTEM, ASKED], "chosen": [GOOD], "rejected": [BAD]},
            {"prompt": [ASKED, CALLING, RESULT], "chosen": [{**GOOD, "reasoning_content": "Moon."}], "rejected": [BAD],
             "tools": [TOOL]},
            {"prompt": [ASKED], "chosen": [CALLING, RESULT, GOOD], "rejected": [BAD]},
        ],
        [
            expected([SYSTEM, ASKED]),
            expected([ASKED, CALLING, RESULT], [{**GOOD, "reasoning_content": "Moon."}], tools=[TOOL]),
            expected([ASKED], [CALLING, RESULT, GOOD]),
        ],
    ),
    "trl-plain": ([{"prompt": Q, "chosen": A, "rejected": B}], [expected([ASKED])]),
    "trl-implicit-prompt": (
        [{"chosen": [SYSTEM, ASKED, GOOD], "rejected": [SYSTEM, ASKED, BAD]}], [expected([SYSTEM, ASKED])]
    ),
    "trl-implicit-prompt-plain": (
        [{"chosen": "The sky is blue.", "rejected": "The sky is green."}],
        [expected([{"role": "user", "content": "The sky is"}], [{"role": "assistant", "content": " blue."}],
                  [{"role": "assistant", "content": " green."}])],
    ),
    "ultrafeedback": (
        [{"prompt": Q, "prompt_id": "x", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD], "messages": [ASKED, GOOD],
          "score_chosen": 8.5, "score_rejected": 3.0}],
        [expected([ASKED], scores=(8.5, 3.0))],
    ),
    "ultrafeedback-raw": (
        [{"source": "sharegpt", "instruction": Q, "models": ["m", "m"],
          "completions": [raw(BAD, ["1", "2"], 10.0), raw(GOOD, ["5", "4"], 7.5)]}],
        [expected([ASKED], [BAD], [GOOD], scores=(10.0, 7.5))],
    ),
    "hh": ([{"chosen": hh(*FIRST, ASKED, GOOD), "rejected": hh(*FIRST, ASKED, BAD)}], [expected([*FIRST, ASKED])]),
    "openai": (
        [{"input": {"messages": [SYSTEM, ASKED], "tools": [TOOL], "parallel_tool_calls": True},
          "preferred_output": [GOOD], "non_preferred_output": [BAD]}],
        [expected([SYSTEM, ASKED], tools=[TOOL])],
    ),
    "llama-factory-alpaca": (
        [{"instruction": "Translate.", "input": "The tide.", "system": text(SYSTEM),
          "history": [["Hello.", "Ahoy."]], "chosen": A, "rejected": B}],
        [expected([SYSTEM, *FIRST, {"role": "user", "content": "Translate.\nThe tide."}])],
    ),
    "llama-factory-sharegpt": (
        [{"conversations": [*human(ASKED), {"from": "function_call", "value": CALL_TEXT}, *human(RESULT)],
          "chosen": human(GOOD)[0], "rejected": human(BAD)[0], "system": text(SYSTEM),
          "tools": '[{"type":"function","function":{"name":"tide"}}]'}],
        [expected([SYSTEM, ASKED, CALLING, RESULT], tools=[{"type": "function", "function": {"name": "tide"}}])],
    ),
    "axolotl-chat-template": (
        [{"messages": [SYSTEM, ASKED], "chosen": GOOD, "rejected": BAD}], [expected([SYSTEM, ASKED])]
    ),
    "axolotl-intel": (
        [{"system": text(SYSTEM), "question": Q, "chosen": A, "rejected": B}, {"system": "", "question": "And now?",
          "chosen": A, "rejected": B}],
        [expected([SYSTEM, ASKED]), expected([{"role": "user", "content": "And now?"}])],
    ),
    "ms-swift": (
        [
            {"messages": [SYSTEM, ASKED, GOOD], "rejected_response": B},
            {"query": "And now?", "response": A, "rejected_response": B, "history": [["Hello.", "Ahoy."]]},
            {"messages": [ASKED, {"role": "tool_call", "content": CALL_TEXT},
                          {"role": "tool_response", "content": "4.1 m"}, GOOD],
             "rejected_messages": [ASKED, BAD], "tools": '[{"type":"function","function":{"name":"tide"}}]'},
        ],
        [
            expected([SYSTEM, ASKED]),
            expected([*FIRST, {"role": "user", "content": "And now?"}]),
            expected([ASKED], [CALLING, RESULT, GOOD], tools=[{"type": "function", "function": {"name": "tide"}}]),
        ],
    ),
    "distilabel": (
        [{"instruction": Q, "generations": [B, A, "Hm."], "ratings": [1.0, 5.0, None],
          "generation_models": ["a", "b", "c"], "distilabel_metadata": {}}],
        [expected([ASKED], scores=(5.0, 1.0))],
    ),
    "nemo-rl": (
        [{"context": [SYSTEM, ASKED],
          "completions": [{"rank": 1, "completion": [BAD]}, {"rank": 0, "completion": [GOOD]}]}],
        [expected([SYSTEM, ASKED])],
    ),
    "kto": (
        [{"prompt": Q, "completion": A, "label": True}, {"prompt": Q, "completion": B, "label": False},
         {"prompt": "Alone?", "completion": A, "label": True}],
        [expected([ASKED], scores=(1.0, 0.0))],
    ),
    "two-answers": (
        [
            {"prompt": Q, "response_0": B, "response_1": A, "better_response_id": 1, "id": "x"},
            {"prompt": [SYSTEM, ASKED], "response_a": A, "response_b": B, "winner": "model_a", "language": "English"},
            {"conversation_a": [*FIRST, ASKED, BAD], "conversation_b": [*FIRST, ASKED, GOOD], "winner": "model_b"},
            {"prompt": Q, "response_a": B, "response_b": A, "winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0},
            {"instruction": Q, "input": "", "output_1": B, "output_2": A, "preference": 2.0},
            {"context": [SYSTEM, ASKED], "response1": A, "response2": B, "overall_preference": -2},
            {"question": Q, "answer_0": B, "answer_1": A, "score_0": "-0.5", "score_1": "0.5"},
        ],
        [
            expected([ASKED]),
            expected([SYSTEM, ASKED]),
            expected([*FIRST, ASKED]),
            expected([ASKED]),
            expected([ASKED]),
            expected([SYSTEM, ASKED]),
            expected([ASKED], scores=(0.5, -0.5)),
        ],
    ),
    "prompt-good-bad": ([{"question": Q, "good": A, "bad": B}], [expected([ASKED])]),
}  # fmt: skip
