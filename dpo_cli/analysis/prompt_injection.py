"""Which completions look as if they were written for the judge; a pure function, which changes no score.

The fences keep such texts from being obeyed; the flags are for the person who reads the judgments. Patterns know some
words of some languages: a text without a flag is not thereby harmless, nor one with a flag hostile.
"""

import base64
import binascii
import re
import unicodedata

# What is invisible, or moves what is visible: controls, zero-width signs, bidirectional controls, tags. The joiners
# are at home in emoji and in several scripts, but not between Latin letters.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028\u2029\u202a-\u202e\u2060-\u2069\ufeff"
    "\U000e0000-\U000e007f]|(?<=[A-Za-z])[\u00ad\u200c\u200d](?=[A-Za-z])|\r(?!\n)"
)
_FENCE = re.compile(r"^\s*(<<<|>>>|={5,}|-{5,}\s*(begin|end))|<<<[^<>\n]*>>>|\bcode of this request\b", re.I | re.M)
_VERDICT = re.compile(r"""["'](scores?|ranking|rationale|verdict)["']\s*:""", re.I)
_ROLE = re.compile(
    r"<\|?/?(im_start|im_end|eot_id|start_header_id|end_header_id|endoftext|end_of_turn|start_of_turn|system|assistant"
    r"|user|think|candidate|material)\|?>|\[/?(INST|SYSTEM|ASSISTANT)\]|<</?SYS>>|</s>"
    r"|^\W*(system|assistant|developer)\W*(message|prompt|notice)?\s*:",
    re.I | re.M,
)
_ADDRESS = re.compile(
    r"\b(this|current) (candidate|response|completion|submission)\b|\bcandidate [A-Z]\b"
    r"|\b(ignore|disregard|forget|override)\b.{0,40}\b(instructions?|rules|rubric|criteria|prompts?)\b"
    r"|\b(ignore|disregard)\b.{0,15}\babove\b|\brank\b.{0,20}\b(?-i:[A-H])\W{1,3}(as |the )?(first|best|highest|top)\b"
    r"|\b(rank|rate|score|grade)\b.{0,30}\b(me|this|it|answer|mine)\W{1,3}(\w+\W{1,3}){0,3}(first|best|highest|10|ten|top)\b"
    r"|\b(dear|attention|note to( the)?) (ai |llm )?(judge|grader|evaluator|rater)s?\b"
    r"|\bas (an? |the )?(ai |llm )?(judge|grader|evaluator)\b.{0,20}\byou\b"
    r"|\bsystem prompt\b|\bnew (rubric|criteria|instructions)\b"
    r"|\bignorier\w*.{0,40}\b(anweisung|regel)|\b(diese[mnrs]?|der|dem) kandidat"
    r"|\bals (richter|gutachter|bewerter)"
    r"|\bignor(ez?|a|e|ar|are)\b.{0,50}\b(instruc|istruzion|instruç|consign)"
    r"|忽略.{0,20}(指示|指令|说明)|(候选|这个)(答案|回答).{0,10}分|(無視|評価者)|(игнорир|проигнорир)\w*|оценк\w+ 10"
    r"|تجاهل|अनदेखा|무시하",
    re.I,
)
# Only a text with one of these can match; looking for them first takes a hundredth of the time.
_STEMS = (
    "candidate", "response", "completion", "submission", "ignor", "disregard", "forget", "override", "rank", "rate",
    "score", "grade", "judge", "evaluator", "system prompt", "new ", "kandidat", "richter", "gutachter",
    "bewerter", "忽略", "候选", "这个", "無視",
    "評価者", "оценк", "игнорир", "تجاهل", "अनदेखा", "무시하",
)  # fmt: skip
_ENCODED = re.compile(r"[A-Za-z0-9+/]{20,}={0,2}")
_WORD = re.compile(r"[^\W\d_]{2,}")
_ALPHABETS = ("LATIN", "CYRILLIC", "GREEK", "ARMENIAN", "CHEROKEE")


def suspicious(text: str) -> list[str]:
    """What is odd about a completion, in words; empty if nothing is.

    Letters in another width or style are read as what they look like, and hidden signs are passed over, so that
    neither hides a word.
    """
    bare = _HIDDEN.sub(lambda found: "\n" if found[0] in "\r\u2028\u2029" else "", text)
    plain = unicodedata.normalize("NFKC", bare)
    lowered = plain.lower()
    found = {
        "addresses the judge": any(stem in lowered for stem in _STEMS) and _ADDRESS.search(plain),
        "looks like a verdict": _VERDICT.search(plain),
        "looks like a fence": _FENCE.search(plain),
        "holds role tokens": _ROLE.search(plain),
        "holds hidden characters": _HIDDEN.search(text),
        "mixes alphabets in a word": not plain.isascii() and any(map(_is_mixed, _WORD.findall(plain))),
        "holds encoded text": any(map(_is_encoded, _ENCODED.findall(plain))),
    }
    return [reason for reason, hit in found.items() if hit]


def _is_mixed(word: str) -> bool:
    """Whether letters that look alike come from several alphabets."""
    names = {unicodedata.name(letter, "").partition(" ")[0] for letter in word}
    return len(names.intersection(_ALPHABETS)) > 1


def _is_encoded(word: str) -> bool:
    """Whether it is base64 of plain words."""
    try:
        said = base64.b64decode(word + "=" * (-len(word) % 4), validate=True).decode("ascii")
    except (binascii.Error, ValueError):
        return False
    return said.isprintable() and " " in said
