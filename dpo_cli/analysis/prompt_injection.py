"""Which completions look as if they were written for the judge; a pure function, which changes no score.

The fences keep such texts from being obeyed; the flags are for the person who reads the judgments. Patterns know some
words of some languages: a text without a flag is not thereby harmless, nor one with a flag hostile.
"""

import base64
import binascii
import re
import unicodedata
from collections.abc import Sequence

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
    r"|\b(rate|score|grade)\b.{0,40}\b(as high as possible|full marks|top marks|the maximum)\b",
    re.I,
)
# "Ignore the instructions", "as the judge" and "the highest score", as far as a language says them in few words.
_ADDRESS_ELSEWHERE = re.compile(
    r"\b(ignorier|vergiss|vergess)\w*.{0,40}\b(anweisung|regel)|\b(diese[mnrs]?|der|dem) kandidat"
    r"|\bals (richter|gutachter|bewerter)|\b(höchst|best)e[nr]? (note|punktzahl|bewertung)"
    r"|\b(ignor(ez?|a|e|ar|are)|olvida|esqueça|dimentica|oublie[zr]?|desconsidere)\w*\b.{0,50}"
    r"\b(instruc|istruzion|instruç|instruções|consign|regl|règle|regol|regra)"
    r"|\b(como|en tant que|come) (juez|evaluador|juiz|avaliador|juge|évaluateur|giudice|valutatore)\b"
    r"|\b(puntuación|nota|calificación|punteggio|note) (máxima|más alta|massim[oa]|più alt[oa]|maximale)\b"
    r"|\b(negeer|vergeet)\b.{0,40}\b(instructie|regel)|\bals beoordelaar\b|\bhoogste score\b"
    r"|\b(z?ignoruj|zapomnij|zapomeň)\w*\b.{0,40}\b(instrukcj|polece|zasad|instrukce|pokyn|pravid)"
    r"|\bnajwyższ\w+ ocen|\btalimat\w*.{0,30}(yok ?say|unut|görmezden)|\ben yüksek puan"
    r"|\b(ignorer|glöm|glem)\w*\b.{0,40}\b(instruktion|instruks|regl)|\bhögsta (poäng|betyg)"
    r"|bỏ qua.{0,40}(hướng dẫn|chỉ dẫn|quy tắc)|điểm (cao nhất|tối đa)"
    r"|\babaikan\b.{0,40}\b(instruksi|perintah|aturan)|\bnilai (tertinggi|maksimal)"
    r"|(忽略|无视|忘记).{0,20}(指示|指令|说明|规则)|(候选|这个)(答案|回答).{0,10}分|打.{0,4}(满分|最高分)"
    r"|(無視|評価者|最高点|満点)|(무시하|최고 ?점수|만점)"
    r"|игнорир|ігнору|забуд\w*.{0,40}(инструкц|правил|інструкц)|(высш|максимальн)\w+ (оценк|балл)|оценк\w+ 10"
    r"|تجاهل|أعلى (درجة|تقييم)|نادیده بگیر|התעלם|αγνόησ|अनदेखा|उपेक्षा|উপেক্ষা|เพิกเฉย|ละเว้น|คะแนนสูงสุด",
    re.I,
)
_JUDGING = r"(judge|grader|evaluator|rater|reviewer|language model|\bllm|\bai\b|admin(istrator)?|developer)"
_ROLE_PLAY = re.compile(
    rf"\b(you are|you're|you will be|act|behave|respond|answer) (now |from now on )?(as |like )?"
    rf"(an? |the |my )?([a-z-]+ ){{0,3}}{_JUDGING}\b.{{0,60}}"
    r"\b(who|that|which|always|never|only|without|must|give|prefer)"
    rf"|\b(pretend|imagine|suppose|role-?play|simulate)\b.{{0,60}}{_JUDGING}.{{0,80}}"
    r"\b(scor|rat|rank|grad|prefer|winner|10)"
    r"|\b(game|story|role-?play|exercise|hypothetical)\b.{0,60}\b(judge|grader|evaluator)s?\b.{0,60}"
    r"\b(always|must|has to|have to|gives?|ranks?|rates?|scores?)\b"
    r"|\b(developer|debug|maintenance|god|dan) mode\b|\bdo anything now\b|\bfrom now on,? you\b",
    re.I,
)
_TOOL_RESULT = re.compile(
    r"</?(tool|function)_(response|result|results|output|call)s?>|\[/?TOOL_(RESULTS|CALLS|CONTENT)\]"
    r"|[\"']role[\"']\s*:\s*[\"'](tool|function|system|developer)[\"']|\btool_call_id\b"
    r"|^\W*(tool|function|api|plugin|search)[ _-]?(call )?(result|output|response|return)s?\b[^\n]{0,40}[:=]"
    r"|^\W*observation\s*:|```(tool|function)_?\w*"
    r"|\b(scoring|grading|evaluation|rating|fact.?check\w*|verification) (tool|api|script|service|system)\b.{0,40}"
    r"\b(return|report|result|confirm|say|said|says|gave|output|found)",
    re.I | re.M,
)
_SCORE_TABLE = re.compile(
    r"^\s*\|?\s*\**(candidate|response|answer|option|model)?\s*[A-H]\**\s*\|.*\b\d{1,3}\b"
    r"|^\s*\|.*\b(score|rating|rank|grade)\b.*\|\s*$"
    r"|(^\W*((candidate|response|answer|option) )?[A-H]\W{1,4}(\d{1,2}([.,]\d)?)(\s*(/|out of)\s*10)?\W*$\n?){2,}"
    r"|\b(score|rating|grade|mark|verdict)s?\W{1,4}(is |of )?(10|ten)\s*(/|out of)\s*(10|ten)\b",
    re.I | re.M,
)
# Only a text with one of these can match; looking for them first takes a hundredth of the time.
_STEMS = (
    "candidate", "response", "completion", "submission", "ignor", "disregard", "forget", "override", "rank", "rate",
    "score", "grade", "judge", "evaluator", "system prompt", "new ",
)  # fmt: skip
_STEMS_ELSEWHERE = (
    "ignor", "vergiss", "vergess", "kandidat", "richter", "gutachter", "bewerte", "note", "punktzahl", "olvida",
    "esque", "dimentica", "oublie", "desconsidere", "juez", "evaluador", "juiz", "avaliador", "juge", "évaluateur",
    "giudice", "valutatore", "puntuaci", "nota", "calificaci", "punteggio", "negeer", "vergeet", "beoordelaar",
    "hoogste", "zapom", "ocen", "talimat", "puan", "glöm", "glem", "högsta", "bỏ qua", "điểm", "abaikan", "nilai",
    "忽略", "无视", "忘记", "候选", "这个", "满分", "最高", "無視", "評価者", "満点", "무시하", "최고", "만점",
    "игнорир", "ігнору", "забуд", "оценк", "балл", "تجاهل", "أعلى", "نادیده", "התעלם", "αγνόησ", "अनदेखा", "उपेक्षा",
    "উপেক্ষা", "เพิกเฉย", "ละเว้น", "คะแนน",
)  # fmt: skip
_STEMS_ROLE_PLAY = (
    "judge", "grader", "evaluator", "rater", "reviewer", "language model", "llm", " ai ", "admin", "developer", " mode",
    "anything now", "from now on",
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
    found = {
        "addresses the judge": _has(plain, _STEMS, _ADDRESS) or _has(plain, _STEMS_ELSEWHERE, _ADDRESS_ELSEWHERE),
        "gives the judge a role": _has(plain, _STEMS_ROLE_PLAY, _ROLE_PLAY),
        "looks like a tool's result": _TOOL_RESULT.search(plain),
        "looks like a table of scores": _SCORE_TABLE.search(plain),
        "looks like a verdict": _VERDICT.search(plain),
        "looks like a fence": _FENCE.search(plain),
        "holds role tokens": _ROLE.search(plain),
        "holds hidden characters": _HIDDEN.search(text),
        "mixes alphabets in a word": not plain.isascii() and any(map(_is_mixed, _WORD.findall(plain))),
        "holds encoded text": any(map(_is_encoded, _ENCODED.findall(plain))),
    }
    return [reason for reason, hit in found.items() if hit]


def _has(text: str, stems: Sequence[str], pattern: re.Pattern[str]) -> bool:
    lowered = text.lower()
    return any(stem in lowered for stem in stems) and pattern.search(text) is not None


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
