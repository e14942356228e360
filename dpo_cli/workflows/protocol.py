"""Topic by topic: SFT, a quiz, DPO where the facts are learnt and the voice is not, the quiz again; the better stays.

A TOML file names the topics; everything else is set where it always is (`--preset rank1` for adapters of rank 1). The
next topic is learnt on the base with the adapters before it folded in. At the end that model is what there is
(`adapters = "merge"`), or one adapter of the original base that holds all of them side by side (`"stack"`), which has
the ranks' sum and the same effect. Each topic has its own folder in `data`, runs `<topic>-sft` and `<topic>-dpo`, and
adapters of these names beside `model.dpo_adapter`. Every stage goes on where it was stopped. Sampling is in this
process: an endpoint has the adapters and bases of one moment only. Not covered: several GPUs.
"""

import difflib
import shutil
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct, field
from msgspec.structs import replace

from dpo_cli import judges
from dpo_cli.config.field_types import Share
from dpo_cli.config.settings import Config
from dpo_cli.data.files import sha256, write_json
from dpo_cli.data.reader import read_text
from dpo_cli.errors import Exit, UserError
from dpo_cli.progress import Progress
from dpo_cli.stages import generate, judge, train
from dpo_cli.stages.evaluate import quiz as evaluate_quiz
from dpo_cli.stages.evaluate import run as evaluate
from dpo_cli.stages.evaluate.quiz import read_questions
from dpo_cli.stages.pair import run as pair
from dpo_cli.training.inputs import read_inputs
from dpo_cli.training.plan import steps
from dpo_cli.training.run_folder import RunFolder, weights_file

AdapterSide = Literal["reference", "policy"]
FOLDED = "folded.json"  # beside the weights: which adapter is in them


class Topic(Struct, kw_only=True):
    """One topic: demonstrations, questions with answers, prompts that show the voice, and pairs for DPO.

    Files are found from the protocol's folder. Without `pairs` they are made of the `prompts`, by sampling and judging.
    """

    name: Annotated[str, Meta(pattern=r"^[\w-]+$")]
    content: str
    quiz: str
    prompts: str
    pairs: str | None = None


class Protocol(Struct, kw_only=True):
    """The topics in order, and the thresholds.

    `accuracy` is what the quiz must reach, `voice` what is good enough; voice is the mean rating of answers to the
    prompts, `scale` its least and its greatest value.
    """

    topics: Annotated[list[Topic], Meta(min_length=1)]
    adapters: Literal["merge", "stack"] = "merge"
    accuracy: Share = 0.70
    voice: Share = 0.75
    scale: tuple[float, float] = (1.0, 10.0)


class Mark(Struct):
    """How an adapter does: the share of the quiz that it answers rightly, and its voice from 0 to 1."""

    accuracy: float
    voice: float


class Learnt(Struct, kw_only=True):
    """One topic: both marks, which adapter was kept, and why. `dpo` None: it was not called for, or failed."""

    topic: str
    sft: Mark
    dpo: Mark | None = None
    kept: str
    why: str
    usd: float = 0.0
    ok: bool


class Followed(Struct, kw_only=True):
    """Every topic, and what came out: `model` is base and adapters in one, `adapter` (stacked) all adapters in one."""

    topics: list[Learnt]
    verdict: Literal["pass", "fail"]
    model: str
    adapter: str | None = field(default=None)


class TopicStep(Struct, kw_only=True):
    """One stage of one topic, as a dry run tells it; `state` is `perhaps` where it depends on what comes before."""

    topic: str
    stage: str
    state: Literal["done", "to do", "perhaps"]
    what: str


def read(path: Path) -> Protocol:
    """The protocol of a file, its paths made whole.

    Raises:
        UserError: no such file, an unknown key (with the nearest known one), a value that does not fit, or a file of a
            topic that is not there.
    """
    try:
        content = tomllib.loads(read_text(path))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"not TOML: {error}", where=str(path)) from None
    _known(content, Protocol.__struct_fields__, str(path))
    topics = content.get("topics")
    for number, topic in enumerate(topics if isinstance(topics, list) else [], 1):
        _known(topic if isinstance(topic, dict) else {}, Topic.__struct_fields__, f"{path}, topic {number}")
    try:
        protocol = msgspec.convert(content, Protocol)
    except msgspec.ValidationError as error:
        raise UserError(str(error), where=str(path)) from None
    names = [topic.name for topic in protocol.topics]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"two topics are named '{twice}'", where=str(path))
    if not protocol.scale[0] < protocol.scale[1]:
        raise UserError("scale is [least, greatest]", where=str(path))
    return replace(protocol, topics=[_whole(topic, path.parent, str(path)) for topic in protocol.topics])


def plan(protocol: Protocol, config: Config) -> list[TopicStep]:
    """What `run` would do, stage by stage; trains, samples and asks nothing, and writes nothing.

    Raises:
        UserError: as `run`, as far as it can be known.
    """
    _check(config)
    judges.load(config.judge.judge).identity(config)
    return [step for topic in protocol.topics for step in _steps(topic, protocol, of_topic(config, topic, ""))]


def _steps(topic: Topic, protocol: Protocol, config: Config) -> Iterator[TopicStep]:
    def step(stage: str, what: str, state: Literal["done", "to do", "perhaps"]) -> TopicStep:
        return TopicStep(topic=topic.name, stage=stage, state=state, what=what)

    def state(run: str, otherwise: Literal["to do", "perhaps"]) -> Literal["done", "to do", "perhaps"]:
        finished = RunFolder(Path(config.runs) / f"{topic.name}-{run}").report.exists()
        return "done" if finished else otherwise

    rows = read_inputs(config, "sft", Path(topic.content), None).rows
    questions, prompts = len(read_questions(Path(topic.quiz))), len(list(generate.read_prompts(config)))
    answers = prompts * config.evaluate.samples
    yield step("sft", f"{len(rows):,} demonstrations, {steps(config.sft, len(rows)):,} steps", state("sft", "to do"))
    yield step("quiz", f"{questions:,} questions; below {protocol.accuracy:g} right there is no DPO", "to do")
    yield step("voice", f"{answers:,} answers to {prompts:,} prompts; from {protocol.voice:g} on no DPO", "to do")
    if topic.pairs:
        pairs = len(read_inputs(config, "dpo", Path(topic.pairs), None).rows)
        what = f"{pairs:,} pairs, {steps(config.train, pairs):,} steps"
    else:
        what = f"pairs of {prompts * config.generate.n:,} completions of {prompts:,} prompts"
    yield step("dpo", f"{what}, then quiz and voice again", state("dpo", "perhaps"))
    yield step("fold", f"the better adapter, into {topic.name}-merged", "to do")


def _check(config: Config) -> None:
    if config.generate.engine == "endpoint" and config.generate.url:
        raise UserError("adapters change at every stage", where="generate.url", hint="--engine transformers")


def run(protocol: Protocol, config: Config, progress: Progress) -> Followed:
    """Learn every topic, or go on with them.

    Raises:
        UserError: what the stages raise.
    """
    _check(config)
    learnt, kept, base = [], [], config.model.base
    for topic in protocol.topics:
        progress.log(f"topic {topic.name}")
        mine = of_topic(config, topic, base)
        learnt.append(_learn(topic, protocol, mine, progress))
        kept.append(Path(learnt[-1].kept))
        base = str(_fold(topic, mine, kept[-1]))
    stacked = None
    if protocol.adapters == "stack":
        from dpo_cli.training.stack_adapters import stack

        stacked = config.model.dpo_adapter
        stack(kept, Path(stacked), config.model.base)
    ok = all(one.ok for one in learnt)
    return Followed(topics=learnt, verdict="pass" if ok else "fail", model=base, adapter=stacked)


def of_topic(config: Config, topic: Topic, base: str) -> Config:
    """The settings of one topic: its folders, its adapters, and the base that holds the topics before it."""
    adapters = Path(config.model.dpo_adapter).parent
    return replace(
        config,
        data=str(Path(config.data) / topic.name),
        model=replace(
            config.model,
            base=base,
            adapter=str(adapters / f"{topic.name}-sft"),
            dpo_adapter=str(adapters / f"{topic.name}-dpo"),
        ),
        generate=replace(config.generate, prompts=topic.prompts, engine="transformers"),
        evaluate=replace(config.evaluate, prompts=topic.prompts),
        train=replace(config.train, merge=False),
    )


def _learn(topic: Topic, protocol: Protocol, config: Config, progress: Progress) -> Learnt:
    """SFT, quiz, and DPO where it is called for."""
    train.run(config, progress, "sft", f"{topic.name}-sft", Path(topic.content))
    before, usd = _mark(topic, protocol, config, "reference", progress)
    result = Learnt(
        topic=topic.name,
        sft=before,
        kept=str(config.model.adapter),
        why="",
        usd=usd,
        ok=before.accuracy >= protocol.accuracy,
    )
    if before.accuracy < protocol.accuracy:
        result.why = f"the quiz is below {protocol.accuracy:g}: more SFT, not DPO"
        return result
    if before.voice >= protocol.voice:
        result.why = "the voice is good enough"
        return result
    result.usd += _pairs(topic, config, progress)
    trained = train.run(
        config, progress, "dpo", f"{topic.name}-dpo", Path(topic.pairs) if topic.pairs else Path(config.data)
    )
    if trained.verdict == "fail":
        result.why = f"DPO did not pass its gates: {'; '.join(trained.reasons)}"
        return result
    after, usd = _mark(topic, protocol, config, "policy", progress)
    result.dpo = after
    result.usd += usd
    if after.accuracy < protocol.accuracy:
        result.why = f"DPO's quiz is below {protocol.accuracy:g}"
    elif after.voice <= before.voice:
        result.why = "DPO did not better the voice"
    else:
        result.kept, result.why = config.model.dpo_adapter, "DPO bettered the voice"
    return result


def _mark(
    topic: Topic, protocol: Protocol, config: Config, side: AdapterSide, progress: Progress
) -> tuple[Mark, float]:
    """How an adapter does, and what finding out has cost."""
    asked = evaluate_quiz.quiz(config, progress, Path(topic.quiz), names=(side,))
    rated = evaluate.rate(config, progress, side)
    if asked.failed:
        raise UserError(
            f"{asked.failed} questions have no result",
            where=topic.quiz,
            hint="the same command asks again",
            code=Exit.FAILED,
        )
    low, high = protocol.scale
    return Mark(asked.accuracy[side].value, (rated.score - low) / (high - low)), asked.usd + rated.usd


def _pairs(topic: Topic, config: Config, progress: Progress) -> float:
    """Make the pairs of a topic that brings none, unless training on them has begun; dollars paid."""
    if topic.pairs or (Path(config.runs) / f"{topic.name}-dpo" / "config.json").exists():
        return 0.0
    sampled = generate.run(config, progress)
    judged = judge.run(config, progress)
    if sampled.failed or judged.errors:
        why = sampled.error or next(iter(judged.errors))
        raise UserError(f"no pairs yet: {why}", where=topic.name, hint="the same command tries again", code=Exit.FAILED)
    pair.run(config)
    return judged.usd


def _fold(topic: Topic, config: Config, adapter: Path) -> Path:
    """The base with the topic's adapter in it, made once."""
    from dpo_cli.training.inputs import download_base
    from dpo_cli.training.merge_adapter import merge

    folder = Path(config.model.dpo_adapter).with_name(f"{topic.name}-merged")
    wanted = {"adapter": str(adapter), "sha256": sha256(weights_file(adapter))}
    file = folder / FOLDED
    if file.exists() and msgspec.json.decode(file.read_bytes()) == wanted:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    texts = [question.prompt[-1]["content"] for question in read_questions(Path(topic.quiz), limit=4).values()]
    merge(download_base(config.model.base), adapter, folder, texts)
    write_json(file, wanted)
    return folder


def _whole(topic: Topic, folder: Path, where: str) -> Topic:
    """The topic with paths that hold from the working folder."""
    files = {key: getattr(topic, key) for key in ("content", "quiz", "prompts", "pairs")}
    whole = {key: str(folder / name) for key, name in files.items() if name is not None}
    for key, path in whole.items():
        if not Path(path).exists():
            raise UserError(f"topic {topic.name}: {key} is not there: {path}", where=where)
    return replace(topic, **whole)


def _known(content: dict[str, Any], known: Iterable[str], where: str) -> None:
    for key in content:
        if key not in known:
            close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
            hint = f"did you mean '{close[0]}'?" if close else f"one of: {', '.join(known)}"
            raise UserError(f"unknown key '{key}'", where=where, hint=hint)
