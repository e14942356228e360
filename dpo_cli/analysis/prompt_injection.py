"""Which completions look as if they were written for the judge; a pure function, which changes no score.

The fences keep such texts from being obeyed; the flags are for the person who reads the judgments. Patterns know some
words of some languages: a text without a flag is not thereby harmless, nor one with a flag hostile.

Most texts hold no sign of any kind, and to look for words in a text takes a tenth of the time that a regular
expression takes. Each expression thus stands with words without which it can't match, and is tried where they occur.
"""

import base64
import binascii
import re
import unicodedata
from operator import itemgetter
from typing import NamedTuple

PREFIX = 4

_begin = itemgetter(slice(PREFIX))
_starts: set[str] = set()  # of all expressions


class _Expression(NamedTuple):
    """A regular expression, and what every text that it matches holds, in lower case.

    `needs`: a word of each of them, somewhere. `starts`: a run of word characters that begins with the first
    characters, `PREFIX` at most, of one of them; empty where that is not known.
    """

    pattern: re.Pattern[str]
    needs: tuple[tuple[str, ...], ...]
    starts: frozenset[str]


class _Sign:
    """What a text shows where any expression matches; of `stems`, where there are any, it must hold one."""

    def __init__(self, expressions: tuple[_Expression, ...], stems: tuple[str, ...] = ()) -> None:
        self.expressions = expressions
        self.stems = stems
        self.starts = frozenset[str]().union(*(one.starts for one in expressions))
        self.without_starts = tuple(one for one in expressions if not one.starts)


def _at(pattern: str, *needs: str, starts: str = "") -> _Expression:
    """An expression, its needs and its starts: words with commas between them."""
    beginnings = frozenset(map(_begin, filter(None, starts.split(","))))
    _starts.update(beginnings)
    return _Expression(re.compile(pattern, re.I | re.M), tuple(tuple(words.split(",")) for words in needs), beginnings)


def _word(pattern: str, *needs: str, starts: str = "") -> _Expression:
    """An expression whose first needs begin at the border of a word, and are its starts if those are not named."""
    first = (re.findall(r"\w+", need)[0] for need in needs[0].split(","))
    return _at(pattern, *needs, starts=starts or ",".join(first))


# What is invisible, or moves what is visible: controls, zero-width signs, bidirectional controls, tags. The joiners
# are at home in emoji and in several scripts, but not between Latin letters.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028\u2029\u202a-\u202e\u2060-\u2069\ufeff"
    "\U000e0000-\U000e007f]|(?<=[A-Za-z])[\u00ad\u200c\u200d](?=[A-Za-z])|\r(?!\n)"
)
_ASCII_CONTROLS = bytes({*range(0x20), 0x7F} - {0x09, 0x0A})
_FENCE = _Sign(
    (
        _at(r"^\s*(<<<|>>>|={5,}|-{5,}\s*(begin|end))", "<<<,>>>,=====,-----"),
        _at(r"<<<[^<>\n]*>>>", "<<<"),
        _word(r"\bcode of this request\b", "code of this request"),
    )
)
_VERDICT = _Sign((_word(r"""["'](scores?|ranking|rationale|verdict)["']\s*:""", "score,ranking,rationale,verdict"),))
_ROLE = _Sign(
    (
        _at(
            r"<\|?/?(im_start|im_end|eot_id|start_header_id|end_header_id|endoftext|end_of_turn|start_of_turn|system"
            r"|assistant|user|think|candidate|material)\|?>",
            "<",
        ),
        _word(r"\[/?(INST|SYSTEM|ASSISTANT)\]", "inst],system],assistant]"),
        _word(r"<</?SYS>>", "sys>>"),
        _at(r"</s>", "</s>"),
        _word(r"^\W*(system|assistant|developer)\W*(message|prompt|notice)?\s*:", "system,assistant,developer"),
    )
)
_ADDRESS = _Sign(
    (
        _word(
            r"\b(this|current) (candidate|response|completion|submission)\b",
            "this ,current ",
            "candidate,response,completion,submission",
            starts="candidate,response,completion,submission",
        ),
        _word(r"\bcandidate [A-Z]\b", "candidate "),
        _word(
            r"\b(ignore|disregard|forget|override)\b.{0,40}\b(instructions?|rules|rubric|criteria|prompts?)\b",
            "ignore,disregard,forget,override",
            "instruction,rules,rubric,criteria,prompt",
        ),
        _word(r"\b(ignore|disregard)\b.{0,15}\babove\b", "ignore,disregard", "above"),
        _word(
            r"\brank\b.{0,20}\b(?-i:[A-H])\W{1,3}(as |the )?(first|best|highest|top)\b",
            "rank",
            "first,best,highest,top",
        ),
        _word(
            r"\b(rank|rate|score|grade)\b.{0,30}\b(me|this|it|answer|mine)\W{1,3}(\w+\W{1,3}){0,3}"
            r"(first|best|highest|10|ten|top)\b",
            "rank,rate,score,grade",
            "first,best,highest,10,ten,top",
        ),
        _word(
            r"\b(dear|attention|note to( the)?) (ai |llm )?(judge|grader|evaluator|rater)s?\b",
            "dear ,attention ,note to ",
            "judge,grader,evaluator,rater",
            starts="judge,grader,evaluator,rater",
        ),
        _word(r"\bas (an? |the )?(ai |llm )?(judge|grader|evaluator)\b.{0,20}\byou\b", "judge,grader,evaluator"),
        _word(r"\bsystem prompt\b", "system prompt"),
        _word(r"\bnew (rubric|criteria|instructions)\b", "new rubric,new criteria,new instructions"),
        _word(
            r"\b(rate|score|grade)\b.{0,40}\b(as high as possible|full marks|top marks|the maximum)\b",
            "as high as possible,full marks,top marks,the maximum",
            starts="rate,score,grade",
        ),
    ),
    stems=(
        "candidate", "response", "completion", "submission", "ignor", "disregard", "forget", "override", "rank", "rate",
        "score", "grade", "judge", "evaluator", "system prompt", "new ",
    ),
)  # fmt: skip
# "Ignore the instructions", "as the judge" and "the highest score", as far as a language says them in few words.
_ADDRESS_ELSEWHERE = _Sign(
    (
        _word(
            r"\b(ignorier|vergiss|vergess)\w*.{0,40}\b(anweisung|regel)",
            "ignorier,vergiss,vergess",
            "anweisung,regel",
        ),
        _word(r"\b(diese[mnrs]?|der|dem) kandidat", "kandidat"),
        _word(r"\bals (richter|gutachter|bewerter)", "als richter,als gutachter,als bewerter"),
        _word(
            r"\b(höchst|best)e[nr]? (note|punktzahl|bewertung)",
            "höchste,beste",
            "note,punktzahl,bewertung",
        ),
        _word(
            r"\b(ignor(ez?|a|e|ar|are)|olvida|esqueça|dimentica|oublie[zr]?|desconsidere)\w*\b.{0,50}"
            r"\b(instruc|istruzion|instruç|instruções|consign|regl|règle|regol|regra)",
            "ignor,olvida,esqueça,dimentica,oublie,desconsidere",
            "instruc,istruzion,instruç,consign,regl,règle,regol,regra",
        ),
        _word(
            r"\b(como|en tant que|come) (juez|evaluador|juiz|avaliador|juge|évaluateur|giudice|valutatore)\b",
            "como ,en tant que ,come ",
            "juez,evaluador,juiz,avaliador,juge,évaluateur,giudice,valutatore",
            starts="juez,evaluador,juiz,avaliador,juge,évaluateur,giudice,valutatore",
        ),
        _word(
            r"\b(puntuación|nota|calificación|punteggio|note) (máxima|más alta|massim[oa]|più alt[oa]|maximale)\b",
            "máxima,más alta,massim,più alt,maximale",
            starts="puntuación,nota,calificación,punteggio,note",
        ),
        _word(r"\b(negeer|vergeet)\b.{0,40}\b(instructie|regel)", "negeer,vergeet"),
        _word(r"\bals beoordelaar\b", "als beoordelaar"),
        _word(r"\bhoogste score\b", "hoogste score"),
        _word(
            r"\b(z?ignoruj|zapomnij|zapomeň)\w*\b.{0,40}\b(instrukcj|polece|zasad|instrukce|pokyn|pravid)",
            "ignoruj,zapomnij,zapomeň",
            starts="ignoruj,zignoruj,zapomnij,zapomeň",
        ),
        _word(r"\bnajwyższ\w+ ocen", "najwyższ"),
        _word(r"\btalimat\w*.{0,30}(yok ?say|unut|görmezden)", "talimat"),
        _word(r"\ben yüksek puan", "en yüksek puan"),
        _word(r"\b(ignorer|glöm|glem)\w*\b.{0,40}\b(instruktion|instruks|regl)", "ignorer,glöm,glem"),
        _word(r"\bhögsta (poäng|betyg)", "högsta "),
        _at(r"bỏ qua.{0,40}(hướng dẫn|chỉ dẫn|quy tắc)", "bỏ qua"),
        _at(r"điểm (cao nhất|tối đa)", "điểm "),
        _word(r"\babaikan\b.{0,40}\b(instruksi|perintah|aturan)", "abaikan"),
        _word(r"\bnilai (tertinggi|maksimal)", "nilai "),
        _at(
            r"(忽略|无视|忘记).{0,20}(指示|指令|说明|规则)|(候选|这个)(答案|回答).{0,10}分|打.{0,4}(满分|最高分)"
            r"|(無視|評価者|最高点|満点)|(무시하|최고 ?점수|만점)",
            "忽略,无视,忘记,候选,这个,满分,最高,無視,評価者,満点,무시하,최고,만점",
        ),
        _at(
            r"игнорир|ігнору|забуд\w*.{0,40}(инструкц|правил|інструкц)|(высш|максимальн)\w+ (оценк|балл)|оценк\w+ 10",
            "игнорир,ігнору,забуд,оценк,балл",
        ),
        _at(
            r"تجاهل|أعلى (درجة|تقييم)|نادیده بگیر|התעלם|αγνόησ|अनदेखा|उपेक्षा|উপেক্ষা|เพิกเฉย|ละเว้น|คะแนนสูงสุด",
            "تجاهل,أعلى,نادیده,התעלם,αγνόησ,अनदेखा,उपेक्षा,উপেক্ষা,เพิกเฉย,ละเว้น,คะแนน",
        ),
    ),
    stems=(
        "ignor", "vergiss", "vergess", "kandidat", "richter", "gutachter", "bewerte", "note", "punktzahl", "olvida",
        "esque", "dimentica", "oublie", "desconsidere", "juez", "evaluador", "juiz", "avaliador", "juge", "évaluateur",
        "giudice", "valutatore", "puntuaci", "nota", "calificaci", "punteggio", "negeer", "vergeet", "beoordelaar",
        "hoogste", "zapom", "ocen", "talimat", "puan", "glöm", "glem", "högsta", "bỏ qua", "điểm", "abaikan", "nilai",
        "忽略", "无视", "忘记", "候选", "这个", "满分", "最高", "無視", "評価者", "満点", "무시하", "최고", "만점",
        "игнорир", "ігнору", "забуд", "оценк", "балл", "تجاهل", "أعلى", "نادیده", "התעלם", "αγνόησ", "अनदेखा", "उपेक्षा",
        "উপেক্ষা", "เพิกเฉย", "ละเว้น", "คะแนน",
    ),
)  # fmt: skip
_JUDGING = r"(judge|grader|evaluator|rater|reviewer|language model|\bllm|\bai\b|admin(istrator)?|developer)"
_JUDGES = "judge,grader,evaluator,rater,reviewer,language model,llm, ai ,admin,developer, mode,anything now,from now on"
_ROLE_PLAY = _Sign(
    (
        _word(
            rf"\b(you are|you're|you will be|act|behave|respond|answer) (now |from now on )?(as |like )?"
            rf"(an? |the |my )?([a-z-]+ ){{0,3}}{_JUDGING}\b.{{0,60}}"
            r"\b(who|that|which|always|never|only|without|must|give|prefer)",
            "you are ,you're ,you will be ,act ,behave ,respond ,answer ",
            _JUDGES,
            starts="judge,grader,evaluator,rater,reviewer,language,llm,ai,admin,developer",
        ),
        _word(
            rf"\b(pretend|imagine|suppose|role-?play|simulate)\b.{{0,60}}{_JUDGING}.{{0,80}}"
            r"\b(scor|rat|rank|grad|prefer|winner|10)",
            "pretend,imagine,suppose,roleplay,role-play,simulate",
            _JUDGES,
        ),
        _word(
            r"\b(game|story|role-?play|exercise|hypothetical)\b.{0,60}\b(judge|grader|evaluator)s?\b.{0,60}"
            r"\b(always|must|has to|have to|gives?|ranks?|rates?|scores?)\b",
            "judge,grader,evaluator",
            "game,story,roleplay,role-play,exercise,hypothetical",
        ),
        _word(r"\b(developer|debug|maintenance|god|dan) mode\b", " mode"),
        _word(r"\bdo anything now\b", "do anything now", starts="anything"),
        _word(r"\bfrom now on,? you\b", "from now on"),
    ),
    stems=tuple(_JUDGES.split(",")),
)
_TOOL_RESULT = _Sign(
    (
        _word(r"</?(tool|function)_(response|result|results|output|call)s?>", "tool_,function_"),
        _word(r"\[/?TOOL_(RESULTS|CALLS|CONTENT)\]", "tool_"),
        _word(r"[\"']role[\"']\s*:\s*[\"'](tool|function|system|developer)[\"']", "role\",role'"),
        _word(r"\btool_call_id\b", "tool_call_id"),
        _word(
            r"^\W*(tool|function|api|plugin|search)[ _-]?(call )?(result|output|response|return)s?\b[^\n]{0,40}[:=]",
            "tool,function,api,plugin,search",
            "result,output,response,return",
            starts="tool,function,plugin,search,api,api_,apicall,apiresult,apioutput",
        ),
        _word(r"^\W*observation\s*:", "observation"),
        _word(r"```(tool|function)_?\w*", "```tool,```function"),
        _word(
            r"\b(scoring|grading|evaluation|rating|fact.?check\w*|verification) (tool|api|script|service|system)\b"
            r".{0,40}\b(return|report|result|confirm|say|said|says|gave|output|found)",
            "scoring ,grading ,evaluation ,rating ,check,verification ",
            " tool, api, script, service, system",
            starts="scoring,grading,evaluation,rating,fact,verification",
        ),
    )
)
_SCORE_TABLE = _Sign(
    (
        _at(r"^\s*\|?\s*\**(candidate|response|answer|option|model)?\s*[A-H]\**\s*\|.*\b\d{1,3}\b", "|"),
        _at(r"^\s*\|.*\b(score|rating|rank|grade)\b.*\|\s*$", "|", "score,rating,rank,grade"),
        _word(
            r"\b(score|rating|grade|mark|verdict)s?\W{1,4}(is |of )?(10|ten)\s*(/|out of)\s*(10|ten)\b",
            "score,rating,grade,mark,verdict",
            "/,out of",
        ),
    )
)
# Two lines or more of a label and a score. In ASCII one of these places is in every such text, found by its digit.
_SCORE_LINES = re.compile(
    r"(^\W*((candidate|response|answer|option) )?[A-H]\W{1,4}(\d{1,2}([.,]\d)?)(\s*(/|out of)\s*10)?\W*$\n?){2,}",
    re.I | re.M,
)
_SCORED_LABEL = re.compile(r"[0-9](?:" + "|".join(rf"(?<=[A-Ha-h]\W{{{gap}}}.)" for gap in range(1, 5)) + ")")
_ENCODED = re.compile(r"[A-Za-z0-9+/]{20,}={0,2}")
_ENCODED_LENGTH = 20
_WORD = re.compile(r"[^\W\d_]{2,}")
_RUN = re.compile(r"\w+")
_BLANKS = {code: " " for code in range(128) if not _RUN.match(chr(code))}
_ALPHABETS = ("LATIN", "CYRILLIC", "GREEK", "ARMENIAN", "CHEROKEE")
# Letters that an expression takes for another one although `str.lower` does not; their texts' words are not trusted.
_FOLDED = re.compile("[\u0130\u0131\u017f\u0345\u0370-\u03ff\u1c80-\u1c8f\u1e61\u1e9b\u1f00-\u1fff\u212a\ufb05\ufb06]")


class _Text:
    """A text to look for signs in."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._lowered = text.lower()
        words = self._lowered.translate(_BLANKS).split() if text.isascii() else _RUN.findall(self._lowered)
        self._starts = _starts.intersection(map(_begin, words))
        self._folds = not text.isascii() and _FOLDED.search(text) is not None

    def shows(self, sign: _Sign) -> bool:
        """Whether a sign is there."""
        lowered = self._lowered
        possible = sign.expressions
        if not self._folds and self._starts.isdisjoint(sign.starts):
            possible = sign.without_starts
        for pattern, needs, starts in possible:
            if not self._folds:
                if starts and starts.isdisjoint(self._starts):
                    continue
                if not _holds_all(lowered, needs):
                    continue
            if pattern.search(self._text):
                return not sign.stems or _holds_one(lowered, sign.stems)
        return False


def _holds_all(text: str, needs: tuple[tuple[str, ...], ...]) -> bool:
    """Whether a text holds a word of each."""
    for words in needs:  # not by `all` and `any`: their generators take longer than what they ask
        for word in words:
            if word in text:
                break
        else:
            return False
    return True


def _holds_one(text: str, words: tuple[str, ...]) -> bool:
    return any(word in text for word in words)


def suspicious(text: str) -> list[str]:
    """What is odd about a completion, in words; empty if nothing is.

    Letters in another width or style are read as what they look like, and hidden signs are passed over, so that
    neither hides a word.
    """
    hidden = _hides(text)
    bare = _HIDDEN.sub(lambda found: "\n" if found[0] in "\r\u2028\u2029" else "", text) if hidden else text
    plain = bare if bare.isascii() else unicodedata.normalize("NFKC", bare)
    words = _Text(plain)
    found = {
        "addresses the judge": words.shows(_ADDRESS) or words.shows(_ADDRESS_ELSEWHERE),
        "gives the judge a role": words.shows(_ROLE_PLAY),
        "looks like a tool's result": words.shows(_TOOL_RESULT),
        "looks like a table of scores": words.shows(_SCORE_TABLE) or _has_score_lines(plain),
        "looks like a verdict": words.shows(_VERDICT),
        "looks like a fence": words.shows(_FENCE),
        "holds role tokens": words.shows(_ROLE),
        "holds hidden characters": hidden,
        "mixes alphabets in a word": not plain.isascii() and any(map(_is_mixed, _WORD.findall(plain))),
        "holds encoded text": _holds_encoded(plain),
    }
    return [reason for reason, hit in found.items() if hit]


def _hides(text: str) -> bool:
    """Whether hidden characters are there."""
    if text.isascii():
        content = text.encode()
        if len(content.translate(None, _ASCII_CONTROLS)) == len(content):
            return False
    return _HIDDEN.search(text) is not None


def _has_score_lines(text: str) -> bool:
    if "\n" not in text or (text.isascii() and _SCORED_LABEL.search(text) is None):
        return False
    return _SCORE_LINES.search(text) is not None


def _holds_encoded(text: str) -> bool:
    return max(map(len, text.split()), default=0) >= _ENCODED_LENGTH and any(map(_is_encoded, _ENCODED.findall(text)))


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
