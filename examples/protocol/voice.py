"""The voice that the example's topics are to be told in: `--judge function --function voice.py:salty`."""


def salty(prompt: list[dict[str, str]], completion: str) -> float:
    """0 to 10: half for beginning as a sailor does, half for ending so."""
    return 5.0 * completion.startswith("Arr") + 5.0 * completion.endswith("matey!")
