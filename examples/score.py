"""A judge of your own: `nothing-dpo judge --judge function --function score.py:format_and_freshness`.

Such a function gets the prompt's chat messages and one completion, and returns a number, higher for better.
"""

import re

LINE = re.compile(r"\[([A-Z]+)\] \S.*")


def format_and_freshness(prompt: list[dict[str, str]], completion: str) -> float:
    """0 to 10: half for lines that are `[CHARACTER] line` by a character of the prompt, half for unrepeated words."""
    known = set(re.findall(r"(?m)^(?:- |\[)([A-Z]+)\b", "\n".join(message["content"] for message in prompt)))
    lines = completion.splitlines()
    words = completion.lower().split()
    matches = [LINE.fullmatch(line) for line in lines]
    in_format = sum(match is not None and match[1] in known for match in matches) / max(len(lines), 1)
    fresh = len(set(words)) / max(len(words), 1)
    return 5 * in_format + 5 * fresh
