"""How many questions an adapter answers rightly: `evaluate --quiz FILE`.

Reads rows of `question` (or `prompt`, or `messages`) and `answer`, one right answer or a list of them; writes
quiz.answers.jsonl in `data`. Each adapter answers once, at temperature 0. An answer is right if it equals a right one
after normalisation, or, with `--match judge`, if the judge says so of those that do not. Not covered: answers that are
right in part, and multiple choice by likelihood.
"""

import re
import string
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from dpo_cli.config.settings import Config, EvaluateSection
from dpo_cli.data.bad_rows import BadRows
from dpo_cli.data.columns import Cells, read_conversation, read_mapping
from dpo_cli.data.jsonl import write_rows
from dpo_cli.data.reader import parse_rows
from dpo_cli.data.records import Completions, Message, Prompt, Tool, prompt_id
from dpo_cli.endpoint.costs import Receipt
from dpo_cli.endpoint.responses import ADVICE, after_thinking
from dpo_cli.errors import Exit, UserError
from dpo_cli.judges._task import Task
from dpo_cli.progress import Progress
from dpo_cli.stages.evaluate.judging import EvaluationJudge, reasons
from dpo_cli.stages.evaluate.sampling import POLICY, REFERENCE, RunBudget, make_side, sample
from dpo_cli.statistics import Interval, wilson

ROWS = "quiz.answers.jsonl"  # quiz.jsonl may be the questions
RIGHT = ("answer", "answers", "right_answers", "right", "target", "completion")
RIGHT_ANSWER = "right answer"  # the role under which a judge is shown it
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation + "’‘“”…–—")


class Question(Struct):
    """A prompt, and what answers it."""

    prompt: list[Message]
    answers: list[str]
    tools: list[Tool] | None = None


class Answered(Struct):
    """One line of quiz.answers.jsonl: what each adapter answered, and whether that is right."""

    id: str
    prompt: list[Message]
    right: list[str]
    answers: dict[str, str]
    correct: dict[str, bool]


class Quizzed(Struct, kw_only=True):
    """Accuracy of each adapter on `n` questions with its 95% Wilson interval; `match` says how it was found.

    Questions without an answer or a grade are left out: `failed` of them, for the reasons in `errors` (tried again by
    the next run) and `skipped`. `usd` and `receipt` are as in an evaluation.
    """

    accuracy: dict[str, Interval]
    match: str
    n: int
    failed: int
    skipped: dict[str, int]
    errors: dict[str, int]
    usd: float
    receipt: Receipt | None
    path: str


def quiz(
    config: Config, progress: Progress, file: Path, names: Sequence[str] = (REFERENCE, POLICY), limit: int | None = None
) -> Quizzed:
    """Ask the adapters every question.

    Args:
        config: every setting; the sampling is that of `[generate]`, at temperature 0 and without a penalty.
        progress: where to report.
        file: the questions.
        names: whom to ask: `reference`, `policy` or both.
        limit: only the first so many questions.

    Raises:
        UserError: no questions, a judge that grades no answers, the budget is reached, nothing was answered, or what
            the engine or the judge raises.
    """
    questions = read_questions(file, limit, config.evaluate)
    purse = RunBudget(config.evaluate.max_usd)
    greedy = replace(
        config,
        generate=replace(config.generate, temperature=0.0, frequency_penalty=0.0),
        evaluate=replace(config.evaluate, samples=1),
    )
    prompts = {key: Prompt(question.prompt, question.tools) for key, question in questions.items()}
    answers = {name: sample(make_side(name, greedy, progress), prompts, progress, purse) for name in names}
    texts = {
        name: {key: after_thinking(row.completions[0]) for key, row in found.rows.items()}
        for name, found in answers.items()
    }
    correct = {
        name: {key: is_exact(text, questions[key].answers) for key, text in own.items()} for name, own in texts.items()
    }
    heard = _grade(config, progress, purse, questions, texts, correct) if config.evaluate.match == "judge" else []
    asked = [key for key in questions if all(key in own for own in correct.values())]
    if not asked:
        why = next((reason for found in answers.values() for reason in found.failed), "none was graded")
        hint = ADVICE.get(why, "the same command tries again")
        raise UserError(f"no question was answered: {why}", hint=hint, code=Exit.FAILED)
    path = Path(config.data) / ROWS
    write_rows(
        path,
        [
            Answered(
                key,
                questions[key].prompt,
                questions[key].answers,
                {name: texts[name][key] for name in names},
                {name: correct[name][key] for name in names},
            )
            for key in asked
        ],
    )
    return Quizzed(
        accuracy={name: _accuracy([correct[name][key] for key in asked]) for name in names},
        match=config.evaluate.match,
        n=len(asked),
        failed=len(questions) - len(asked),
        skipped=reasons(one.skipped for one in heard),
        errors=reasons([one.error for one in heard] + [why for found in answers.values() for why in found.failed]),
        usd=sum(found.usd for found in answers.values()) + sum(one.usd for one in heard),
        receipt=purse.receipt,
        path=str(path),
    )


def _answer(row: Completions) -> str:
    """What was answered, without the thinking before it."""
    return after_thinking(row.completions[0])


def read_questions(
    path: Path, limit: int | None = None, settings: EvaluateSection | None = None
) -> dict[str, Question]:
    """The questions of a file, by id; `settings` says what columns mean, and whether bad rows are left out.

    Raises:
        UserError: there are none, or a row that is none.
    """
    settings = settings or EvaluateSection()
    mapping, bad = read_mapping(settings.columns), BadRows(settings.skip_bad, offer=True)
    rows = parse_rows(path, lambda row: _read_question(Cells(row, mapping)), bad)
    found = {prompt_id(question.prompt, question.tools): question for _, question in rows}
    if not found:
        raise UserError("no questions in it", where=str(path), hint='rows of {"question": "…", "answer": "…"}')
    return dict(list(found.items())[:limit])


def is_exact(text: str, answers: Sequence[str]) -> bool:
    """Whether a text equals one of the answers after normalisation."""
    return normalised(text) in map(normalised, answers)


def normalised(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous white space (SQuAD, arXiv:1606.05250).

    A text of articles and punctuation alone stays as it is.
    """
    bare = _ARTICLES.sub(" ", text.casefold().translate(_NO_PUNCTUATION))
    return " ".join(bare.split()) or text.strip()


def _read_question(cells: Cells) -> Question:
    given = cells.take(*RIGHT)
    if isinstance(given, str) and given.lstrip().startswith(("[", "{")):  # a cell of a table
        with suppress(msgspec.DecodeError, RecursionError):
            given = msgspec.json.decode(given)
    if isinstance(given, dict):  # SQuAD's {"text": [...], "answer_start": [...]}
        given = given.get("text")
    answers = [given] if isinstance(given, str) else given
    if not isinstance(answers, list) or not answers or not all(isinstance(one, str) and one.strip() for one in answers):
        raise ValueError('"answer" is not a string or a list of strings')
    prompt = read_conversation(cells)
    cells.finish()
    return Question(prompt.messages, answers, prompt.tools)


def _grade(
    config: Config,
    progress: Progress,
    purse: RunBudget,
    questions: Mapping[str, Question],
    texts: Mapping[str, Mapping[str, str]],
    correct: Mapping[str, dict[str, bool]],
) -> list[Any]:
    """Have the judge grade what is not exactly right; takes out of `correct` what it gave no grade."""
    bench = EvaluationJudge(config, progress, purse)
    if not bench.can("grade"):
        raise UserError(f"--judge {config.judge.judge} grades no answers", where="evaluate.match", hint="--judge llm")
    tasks: dict[tuple[str, str], Task] = {}
    for name, own in texts.items():
        for key, text in own.items():
            if not correct[name][key]:
                shown: Message = {"role": RIGHT_ANSWER, "content": " / ".join(questions[key].answers)}
                tasks[name, key] = bench.task("grade", [*questions[key].prompt, shown], [text], questions[key].tools)
    verdicts = bench.ask("grade", list(tasks.values()))
    for (name, key), task in tasks.items():
        verdict = verdicts.get(task.id)
        if verdict is not None and verdict.scores:
            correct[name][key] = verdict.scores[0] > 0.5  # of a panel, by majority
        elif task.shown:
            del correct[name][key]
    return list(bench.heard.values())


def _accuracy(correct: Sequence[bool]) -> Interval:
    return Interval(sum(correct) / len(correct), *wilson(sum(correct), len(correct)))
