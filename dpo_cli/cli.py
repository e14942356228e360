"""The whole command surface: every command, flag and exit code.

A command resolves the settings, calls one function and renders its result; no work is done here. Results go to
stdout, progress and errors to stderr. Flags take their names, help and defaults from `config.py`.
"""

import inspect as introspect
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping
from contextlib import closing
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec
import typer
from typer.core import TyperArgument, TyperCommand, TyperOption

from dpo_cli import __version__, engines, judges
from dpo_cli.config import resolve, settings
from dpo_cli.config.presets import PRESETS
from dpo_cli.config.resolve import Resolved
from dpo_cli.config.settings import Config
from dpo_cli.errors import Exit, UserError
from dpo_cli.jobs import backends
from dpo_cli.progress import Progress, Silent
from dpo_cli.safe_text import check_run_name, plain


def _read_plainly(kind: Any, value: Any, least: float | None = None) -> Any:
    """What was typed for a parameter as its kind; Ellipsis where that is typer's to read, or to refuse.

    typer reads each parameter by pydantic, also one that was not given, and so loads it: 80 ms a command.
    """
    if get_origin(kind) is list and isinstance(value, list | tuple):
        found = [_read_plainly(get_args(kind)[0], one) for one in value]
        return ... if ... in found else found
    if value is None:
        return () if get_origin(kind) is list else None
    if get_origin(kind) is Literal:
        return value if value in get_args(kind) else ...
    if kind in (int, float) and isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,15}(\.[0-9]+)?", value):
        value = int(value) if "." not in value and kind is int else float(value)
    if kind is Path and isinstance(value, str):
        value = Path(value)
    fits = isinstance(kind, type) and type(value) is (type(Path()) if kind is Path else kind)
    if not fits or (least is not None and value < least):
        return ...
    return ... if kind is Path and value.exists() and not os.access(value, os.R_OK) else value


class _Option(TyperOption):
    def process_value(self, ctx: Any, value: Any) -> Any:
        plain = _read_plainly(self.type_descriptor.annotation, value, self.min)
        return super().process_value(ctx, value) if plain is ... or self.callback or self.required else plain


class _Argument(TyperArgument):
    def process_value(self, ctx: Any, value: Any) -> Any:
        plain = _read_plainly(self.type_descriptor.annotation, value)
        return super().process_value(ctx, value) if plain is ... or (plain is None and self.required) else plain


class _Command(TyperCommand):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        for parameter in self.params:
            parameter.__class__ = _Option if isinstance(parameter, TyperOption) else _Argument


# Without this default typer loads pydantic to find that --help was not given.
HELP_NOT_GIVEN = {"default_map": {"help": False}}

app = typer.Typer(
    name="nothing-dpo",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # rich takes 0.4 s to load its help, and cuts long flags
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], **HELP_NOT_GIVEN},
    help="Direct Preference Optimization of a LoRA adapter on a budget.",
)
inspector = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, context_settings=HELP_NOT_GIVEN, help="Look at what a stage made."
)
app.add_typer(inspector, name="inspect")

CHOICES = {
    "generate.engine": engines.names(),
    "judge.judge": judges.names(),
    "pair.strategy": list(get_args(settings.Strategy)),
    "evaluate.match": list(get_args(settings.Match)),
}

# Flags whose name is not the setting's own.
FLAGS = {"model.name": "--model", "judge.model": "--model"}
RESUMABLE = ("generate", "judge", "train", "evaluate", "run", "push")  # the same command goes on where it ended
METAVARS = {"generate.extra_body": "JSON", "judge.extra_body": "JSON"}


def _help(key: str) -> str:
    """Description and default of a setting."""
    value = resolve.default(key)
    text = resolve.describe(key)
    return (
        text
        if value is None or value == {}
        else f"{text} [default: {str(value).lower() if value in (True, False) else value}]"
    )


ConfigFile = Annotated[Path | None, typer.Option("--config", help="Settings file, TOML or YAML.")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="One setting; repeatable.")]
Preset = Annotated[str | None, typer.Option(help=f"One of: {', '.join(PRESETS)}.")]
Data = Annotated[str | None, typer.Option(help=_help("data"))]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable result on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Limit = Annotated[int | None, typer.Option(min=1, help="At most so many rows.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]
BackendFlag = Annotated[str, typer.Option(metavar="|".join(backends.names()), help="Where it runs.")]
Detach = Annotated[bool, typer.Option("--detach", help="Submit it and return; nothing-dpo jobs finds it again.")]
NoFetch = Annotated[bool, typer.Option("--no-fetch", help="Leave the results where it ran.")]

COMMON = {"config_file": ConfigFile, "sets": Sets, "preset": Preset, "data": Data, "json": Json, "quiet": Quiet,
          "debug": Debug}  # fmt: skip


class Session:
    """What every command has at hand: settings, progress, and where its result goes."""

    def __init__(self, resolved: Resolved, json: bool, quiet: bool) -> None:
        self.resolved = resolved
        self.json = json
        self._quiet = quiet
        self._progress: Progress = Silent()

    @property
    def config(self) -> Config:
        """The resolved settings."""
        return self.resolved.config

    @property
    def data(self) -> Path:
        """The folder in which the stages meet."""
        return Path(self.config.data)

    def progress(self) -> Progress:
        """A live panel in a terminal, plain lines in a log, nothing with --quiet."""
        if not self._quiet:
            from dpo_cli.view.progress import make_progress

            self._progress = make_progress()
        return self._progress

    def close(self) -> None:
        """Give the terminal back, whatever happened."""
        self._progress.end()

    def show(self, result: Any, render: Callable[..., None], *arguments: Any) -> None:
        """Print a result: as JSON with --json, else by a function of `view`, paged if it is longer than the screen."""
        if self.json:
            typer.echo(msgspec.json.encode(result))
            return
        from dpo_cli.view.console import paged, stdout_console

        console = stdout_console()
        with paged(console):
            render(console, result, *arguments)

    def suggest(self, next_command: str) -> None:
        """Say on stderr what to type next."""
        if not (self.json or self._quiet):
            typer.echo(f"{typer.style(' next:', fg='green')} {next_command}", err=True)


def command(
    name: str, *settings: str, parent: typer.Typer = app, names: Mapping[str, str] = MappingProxyType({})
) -> Callable[[Callable[..., Exit | None]], Callable[..., Exit | None]]:
    """Register a command: its own parameters, a flag for each named setting, and the common options.

    `names` are those of flags that would otherwise have the same.
    """

    def register(function: Callable[..., Exit | None]) -> Callable[..., Exit | None]:
        own = list(introspect.signature(function).parameters.values())[1:]  # the first is the session
        keys = {key.replace(".", "_"): key for key in settings}
        extra = {variable: _flag(key, names.get(key)) for variable, key in keys.items()} | COMMON

        def run(**given: Any) -> None:
            from dpo_cli.data.files import finish_replacement

            flags = {_of_stage(key, given): given.pop(variable) for variable, key in keys.items()}
            flags["data"] = given.pop("data")
            debug = given.pop("debug")
            try:
                resolved = resolve.resolve(flags, given.pop("sets"), given.pop("config_file"), given.pop("preset"))
                _check_choices(resolved)
                session = Session(resolved, given.pop("json"), given.pop("quiet"))
                finish_replacement(session.data)
                with closing(session):
                    code = function(session, **given)
            except KeyboardInterrupt as error:
                if debug:
                    raise
                _say(UserError(str(error) or "interrupted", hint=_same_command(name)))
                code = Exit.INTERRUPTED
            except UserError as error:
                if debug:
                    raise
                _say(error)
                code = error.code
            except Exception as error:  # the one boundary: what nobody foresaw is a line as well
                if debug:
                    raise
                _say(UserError(f"unexpected {type(error).__name__}: {error}", hint="--debug shows where"))
                code = Exit.FAILED
            raise typer.Exit(code or Exit.OK)

        parameters = own + [
            introspect.Parameter(
                variable,
                introspect.Parameter.KEYWORD_ONLY,
                annotation=annotation,
                default=False if get_args(annotation)[0] is bool else None,
            )
            for variable, annotation in extra.items()
        ]
        run.__signature__ = introspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {}  # the signature says it all, and typer would resolve each of these a second time
        run.__doc__ = function.__doc__
        summary = (run.__doc__ or "").partition("\n")[0]
        parent.command(name, cls=_Command, context_settings=HELP_NOT_GIVEN, short_help=summary)(run)
        return function

    return register


@cache
def _flag(key: str, name: str | None = None) -> Any:
    """A typer option for one setting: name, type, help and default as `config.py` has them."""
    kind = resolve.plain_type(key)
    name = name or FLAGS.get(key, "--" + key.rpartition(".")[2].replace("_", "-"))
    names = (f"{name}/--no-{name[2:]}",) if kind is bool else (name,)
    choices = "|".join(CHOICES[key]) if key in CHOICES else "<str>" if kind == list[str] else METAVARS.get(key)
    if kind in (int, float) and resolve.takes_none(key) and resolve.default(key) is not None:
        kind, choices = str, {int: "INTEGER|none", float: "FLOAT|none"}[kind]
    return Annotated[kind | None, typer.Option(*names, help=_help(key), show_default=False, metavar=choices)]


def _of_stage(key: str, given: dict[str, Any]) -> str:
    """`train --stage sft --learning-rate` sets the SFT section's."""
    return key.replace("train.", "sft.") if given.get("stage") == "sft" else key


def _check_choices(resolved: Resolved) -> None:
    for key, choices in CHOICES.items():
        value = resolve.get(resolved.config, key)
        if value not in choices:
            raise UserError(f"{key} = '{value}' (from {resolved.sources[key]})", hint=f"one of: {', '.join(choices)}")


def _same_command(name: str) -> str | None:
    """What goes on with an interrupted command; None: it begins anew whatever is typed."""
    if name not in RESUMABLE:
        return None
    return (
        f"{shlex.join(['nothing-dpo', *(one for one in sys.argv[1:] if one != '--fresh')])}, which goes on from there"
    )


def _say(error: UserError) -> None:
    """One line of what failed and where, one of what to do; never a control character of anybody's text."""
    typer.echo(f"{typer.style('error:', fg='red')} {plain(str(error))}", err=True)
    if error.hint:
        typer.echo(f"{typer.style(' next:', fg='green')} {plain(error.hint)}", err=True)


def main() -> None:
    """Run the command that was typed."""
    app()


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Show the version.")
    ] = False,
) -> None:
    pass


@command(
    "generate", "generate.n", "generate.prompts", "generate.columns", "generate.skip_bad",
    "generate.engine", "generate.url", "model.name", "model.base",
    "model.adapter", "generate.temperature", "generate.top_p", "generate.max_tokens", "generate.frequency_penalty",
    "generate.seed", "generate.extra_body", "generate.keep_lines", "generate.concurrency", "generate.batch_size",
    "generate.price", "generate.max_usd",
    "generate.contrast", "generate.contrast_url", "generate.contrast_model",
)  # fmt: skip
def generate(
    session: Session,
    backend: BackendFlag = "local",
    detach: Detach = False,
    no_fetch: NoFetch = False,
    limit: Limit = None,
    dry_run: DryRun = False,
) -> Exit | None:
    """Prompts to completions: sample the SFT adapter until every prompt has n."""
    from dpo_cli.stages import generate as stage
    from dpo_cli.view import completions as view

    if backend != "local" or detach:
        from dpo_cli.jobs import launch

        spec = launch.spec(backend, session.config, "generate", limit=limit)
        return _launch(session, backend, spec, detach, no_fetch, dry_run)

    result = stage.run(session.config, session.progress(), limit=limit, dry_run=dry_run)
    session.show(result, view.generated)
    if result.failed:
        session.suggest("nothing-dpo generate, which tries the failed prompts again")
        return Exit.FAILED
    session.suggest("nothing-dpo generate" if dry_run else "nothing-dpo judge")
    return None


@command(
    "judge", "judge.judge", "judge.model", "judge.url", "judge.function", "judge.reward_model", "judge.batch_size",
    "judge.against", "judge.rubric", "judge.orders", "judge.votes", "judge.reasoning_effort", "judge.max_tokens",
    "judge.extra_body",
    "judge.price", "judge.max_usd", "judge.flex", "judge.batch", "judge.wait",
    "judge.concurrency", "judge.seed", "pair.min_gap", "pair.length_control",
)  # fmt: skip
def judge(
    session: Session,
    backend: BackendFlag = "local",
    detach: Detach = False,
    no_fetch: NoFetch = False,
    limit: Limit = None,
    dry_run: DryRun = False,
    gold: Annotated[
        Path | None,
        typer.Option(help="Pairs that a person ranked: measure each --model on them, and judge nothing else."),
    ] = None,
) -> Exit | None:
    """Completions to judgments to preference pairs."""
    from dpo_cli.stages import judge as stage
    from dpo_cli.view import judgments as view

    if gold is not None:
        return _measure_judges(session, gold, backend, limit, dry_run)
    if backend != "local" or detach:
        from dpo_cli.jobs import launch

        spec = launch.spec(backend, session.config, "judge", limit=limit)
        return _launch(session, backend, spec, detach, no_fetch, dry_run)

    result = stage.run(session.config, session.progress(), limit=limit, dry_run=dry_run)
    if dry_run:
        session.show(result, view.judged)
        return None
    if result.receipt is not None and result.receipt.waiting:
        session.show(result, view.judged)
        session.suggest("nothing-dpo judge --batch, which takes the results in; a batch ends within a day")
        return None
    from dpo_cli.stages.pair.run import run as make_pairs

    try:
        pairs = make_pairs(session.config, reuse=True)
    except UserError:
        session.show(result, view.judged)
        raise
    session.show({"judged": result, "paired": pairs}, view.judged_and_paired)
    if result.errors:
        session.suggest("nothing-dpo judge, which asks again where the judge failed")
        return Exit.FAILED
    session.suggest("nothing-dpo inspect pairs, then nothing-dpo train")
    return None


def _measure_judges(session: Session, gold: Path, backend: str, limit: int | None, dry_run: bool) -> Exit | None:
    from dpo_cli.stages import measure_judges
    from dpo_cli.view import gold as view

    if backend != "local":
        raise UserError("--gold runs on this machine", hint="without --backend")
    report = measure_judges.run(session.config, session.progress(), gold, limit, dry_run)
    session.show(report, view.gold)
    if any(one.errors for one in report.judges):
        session.suggest("the same command, which asks again where a judge failed")
        return Exit.FAILED
    if report.cheapest and len(report.judges) > 1:
        session.suggest(f"nothing-dpo judge --model {report.cheapest}")
    return None


@command(
    "pair", "pair.strategy", "pair.min_gap", "pair.max_pairs_per_prompt", "pair.max_pairs", "pair.high", "pair.low",
    "pair.require_consistent", "pair.length_control", "pair.margin_column", "pair.val_share", "pair.seed",
    "pair.columns", "pair.skip_bad",
)  # fmt: skip
def pair(
    session: Session,
    rollouts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Pair scored NeMo Gym rollouts: same-prompt or stratified.")
    ] = None,
    other: Annotated[
        list[Path] | None,
        typer.Option(
            "--import", metavar="FILE", help="Take in the pairs of another tool's file or folder; repeatable."
        ),
    ] = None,
    to: Annotated[
        Literal["trl", "parquet", "nemo-rl", "llama-factory", "axolotl", "ms-swift", "openai"] | None,
        typer.Option(help="Make no pairs, but export those that there are for another trainer."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the export. [default: of its name, in the data]")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Judgments to pairs again, by other rules: free."""
    from dpo_cli.stages.pair import run as stage
    from dpo_cli.view import pairs as view

    if sum(bool(given) for given in (rollouts, other, to)) > 1:
        raise UserError("--rollouts, --import and --to are different commands", hint="one after the other")
    if to:
        from dpo_cli.data.formats.export import export_split

        session.show(export_split(session.data, to, out, session.config, dry_run=dry_run), view.exported)
        return
    if rollouts:
        result = stage.run_rollouts(rollouts, session.config, dry_run=dry_run)
    elif other:
        result = stage.run_import(other, session.config, dry_run=dry_run)
    else:
        result = stage.run(session.config, dry_run=dry_run)
    session.show(result, view.paired)
    session.suggest("nothing-dpo inspect pairs --lint")


@command(
    "train", "model.base", "model.adapter", "model.dpo_adapter", "train.columns", "train.learning_rate", "train.beta",
    "train.loss_type", "train.num_train_epochs", "train.max_steps", "train.per_device_train_batch_size",
    "train.gradient_accumulation_steps", "train.tokens_per_batch", "train.max_length", "train.warmup_steps",
    "train.seed", "train.curriculum", "train.merge", "train.allow_cpu", "gate.adaptive_beta", "gate.kl_limit",
    "plan.max_usd", "plan.max_hours",
)  # fmt: skip
def train(
    session: Session,
    stage: Annotated[Literal["dpo", "sft"], typer.Option(help="dpo, or sft to make what it starts from.")] = "dpo",
    backend: BackendFlag = "local",
    gpu: Annotated[str | None, typer.Option(metavar="TYPE", help="Card. [default: the backend's]")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="Cards in each machine.")] = 1,
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    detach: Detach = False,
    no_fetch: NoFetch = False,
    name: Annotated[str | None, typer.Option(help="Name of the run. [default: the stage]")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start the run over instead of resuming it.")] = False,
    sweep: Annotated[str | None, typer.Option(metavar="beta=V,V", help="A run each; or learning_rate, r.")] = None,
    auto: Annotated[bool, typer.Option("--auto", help="Find the learning rate, at most 2.5 times a run.")] = False,
    limit: Limit = None,
    dry_run: DryRun = False,
) -> Exit | None:
    """Preference pairs to the DPO adapter, against the frozen SFT adapter."""
    from dpo_cli.stages import train as entry
    from dpo_cli.training.leave_out import leave_out
    from dpo_cli.view import training as view

    given = session.data if session.resolved.sources["data"] == "flag" else None
    if name is not None:
        check_run_name(name)
    if auto:
        return _search(session, (stage, sweep, backend), name or stage, given, fresh, limit, dry_run)
    if sweep is not None:
        from dpo_cli import html as report
        from dpo_cli.view.workflows import swept as show_swept
        from dpo_cli.workflows import sweep as several

        swept = several.run(
            session.config,
            session.progress(),
            sweep,
            name or stage,
            data=given,
            fresh=fresh,
            limit=limit,
            backend=backend,
        )
        session.show(swept, show_swept)
        _write_page(session, several.page_path(swept), report.sweep(swept, several.runs_of(swept)))
        return Exit.GATE if swept.best is None else None
    if backend != "local" or detach or gpu or gpus * nodes > 1:
        from dpo_cli.jobs import launch

        spec = launch.spec(
            backend,
            session.config,
            "train",
            gpu,
            stage=stage,
            name=name,
            data=given,
            limit=limit,
            fresh=fresh,
            gpus=gpus,
            nodes=nodes,
        )
        return _launch(session, backend, spec, detach, no_fetch, dry_run)
    leave_out(session.config, stage)
    result = entry.run(
        session.config,
        session.progress(),
        stage=stage,
        name=name or stage,
        data=given,
        fresh=fresh,
        limit=limit,
        dry_run=dry_run,
    )
    session.show(result, view.trained)
    session.suggest("nothing-dpo generate" if stage == "sft" else f"nothing-dpo inspect run {name or stage}")
    return Exit.GATE if result.verdict in ("fail", "not shown") else None


def _search(
    session: Session,
    asked: tuple[str, str | None, str],
    name: str,
    data: Path | None,
    fresh: bool,
    limit: int | None,
    dry_run: bool,
) -> Exit | None:
    from dpo_cli import html as report
    from dpo_cli.stages import train as entry
    from dpo_cli.view import workflows as view
    from dpo_cli.workflows import auto, sweep

    if asked != ("dpo", None, "local"):
        raise UserError("--auto is for DPO on this machine", hint="leave out --stage, --sweep and --backend")
    if dry_run:
        rows = entry.run(session.config, session.progress(), name=name, data=data, limit=limit, dry_run=True).rows
        session.show(auto.planned(session.config, rows), view.search)
        return None
    found = auto.run(session.config, session.progress(), name, data, fresh, limit)
    session.show(found, view.swept)
    _write_page(session, auto.page_path(session.config, name), report.sweep(found, sweep.runs_of(found)))
    passed = any(point.value == found.best and point.verdict == "pass" for point in found.points)
    return None if passed else Exit.GATE


def _launch(session: Session, backend: str, spec: Any, detach: bool, no_fetch: bool, dry_run: bool) -> Exit | None:
    """Run a command elsewhere, or show what would be submitted."""
    from dpo_cli.jobs import launch

    if spec.command == "train" and backend != "local":
        typer.echo(launch.expected(backend, spec, session.config), err=True)
    if dry_run:
        typer.echo(launch.render(backend, spec, session.config))
        return None
    progress = session.progress()
    return _show_launched(session, launch.run(backend, spec, session.config, progress, detach, not no_fetch))


def _show_launched(session: Session, launched: Any) -> Exit | None:
    """What became of a job, or how to come back to it."""
    from dpo_cli.view import jobs as view

    session.show(launched, view.launched)
    if not launched.status.ended:
        session.suggest(f"nothing-dpo jobs attach {launched.job.id}")
        return None if launched.detached else Exit.INTERRUPTED
    if launched.hint:
        session.suggest(launched.hint)
    code = launched.status.exit_code
    return Exit.FAILED if code is None else Exit(code)


@command("jobs")
def jobs(
    session: Session,
    action: Annotated[
        Literal["list", "attach", "logs", "cancel", "pause", "resume"], typer.Argument(help="What to do with it.")
    ] = "list",
    identity: Annotated[str, typer.Argument(metavar="[ID]", help="Id of the job, or the beginning of it.")] = "",
    no_fetch: NoFetch = False,
) -> Exit | None:
    """What was launched elsewhere: follow it, read its log, end it."""
    from dpo_cli.jobs import backends, launch, registry
    from dpo_cli.view import jobs as view

    if action == "list":
        session.show(launch.listed(session.config, lambda text: typer.echo(plain(text), err=True)), view.jobs)
        return None
    found = registry.get(identity, session.config)
    if action == "attach":
        return _show_launched(session, launch.attach(found, session.config, session.progress(), not no_fetch))
    if action == "logs":
        for line in backends.load(found.backend).logs(found, session.config, follow=False):
            typer.echo(plain(line))
        return None
    if action == "cancel":
        session.show(launch.cancel(found, session.config), view.launched)
        return None
    session.show(launch.suspend(found, session.config, action == "pause"), view.launched)
    session.suggest(f"nothing-dpo jobs {'resume' if action == 'pause' else 'attach'} {found.id}")
    return None


@command(
    "evaluate", "evaluate.prompts", "evaluate.columns", "evaluate.skip_bad",
    "evaluate.samples", "evaluate.gate", "evaluate.rate", "evaluate.max_usd",
    "evaluate.match", "evaluate.seed", "judge.judge", "judge.model", "judge.url", "judge.function",
    "judge.reward_model", "judge.rubric", "judge.votes", "judge.price", "judge.flex", "judge.batch", "judge.wait",
    "generate.engine", "generate.url", "model.base", "model.adapter", "model.dpo_adapter", "model.name",
    "model.dpo_name", "generate.temperature", "generate.max_tokens", "generate.extra_body", "judge.extra_body",
    names={"judge.model": "--judge-model", "judge.url": "--judge-url", "judge.extra_body": "--judge-extra-body"},
)  # fmt: skip
def evaluate(
    session: Session,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Sample both anew: a served adapter was changed under its name.")
    ] = False,
    quiz: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Instead, ask the questions of this file, and count.")
    ] = None,
    harness: Annotated[
        str | None, typer.Option(metavar="TASKS", help="Instead, tasks of lm-evaluation-harness, or their YAML files.")
    ] = None,
    of: Annotated[Literal["reference", "policy", "both"], typer.Option(help="Who takes the quiz.")] = "both",
    scales: Annotated[
        str | None, typer.Option(metavar="0.5,1,2", help="Instead, points on the line through both adapters; 1 is DPO.")
    ] = None,
    pick: Annotated[
        bool, typer.Option("--pick", help="Keep the best scale that clears gate and KL limit, as an adapter.")
    ] = False,
    limit: Limit = None,
    dry_run: DryRun = False,
) -> Exit | None:
    """Is the DPO adapter better than the SFT adapter? Both answer held-out prompts, a judge compares them blind."""
    from dpo_cli.stages.evaluate import harness as harness_tasks
    from dpo_cli.stages.evaluate import quiz as questions
    from dpo_cli.stages.evaluate import run as stage
    from dpo_cli.stages.evaluate.gates import refusals
    from dpo_cli.view import evaluation as view

    if sum((dry_run, quiz is not None, harness is not None, scales is not None)) > 1:
        message = "--dry-run is of the comparison, --quiz, --harness and --scales are in its place"
        raise UserError(message, hint="one of them")
    if pick and scales is None:
        raise UserError("--pick picks one of several scales", hint="--scales 0.5,1,1.5,2 --pick")
    if scales is not None:
        from dpo_cli.stages.evaluate import scales as line
        from dpo_cli.view.scales import scaled

        points = line.run(session.config, session.progress(), line.read_scales(scales), pick, limit)
        session.show(points, scaled)
        return Exit.GATE if points.verdict in ("fail", "not shown") else None
    if harness is not None:
        measured = harness_tasks.harness(session.config, session.progress(), harness.split(","), limit)
        session.show(measured, view.harnessed)
        return None
    if quiz is not None:
        names = ("reference", "policy") if of == "both" else (of,)
        quizzed = questions.quiz(session.config, session.progress(), quiz, names, limit)
        session.show(quizzed, view.quizzed)
        return Exit.FAILED if quizzed.errors else None
    if dry_run:
        session.show(stage.plan(session.config, session.progress(), limit), view.planned)
        return None
    result = stage.run(session.config, session.progress(), limit=limit, fresh=fresh)
    session.show(result, view.evaluated)
    if result.waiting:
        session.suggest("nothing-dpo evaluate --batch, which takes the results in; a batch ends within a day")
    elif result.errors:
        session.suggest("nothing-dpo evaluate, which asks again where somebody failed")
        return Exit.FAILED
    else:
        session.suggest("nothing-dpo inspect evaluation --browse")
    return Exit.GATE if refusals(result.gates) else None


@command(
    "run", "run.rounds", "run.old_pairs", "run.max_usd", "generate.prompts", "generate.n", "generate.engine",
    "generate.url", "generate.max_usd",
    "judge.judge", "judge.model", "judge.url", "judge.function", "judge.max_usd", "pair.min_gap", "model.base",
    "model.adapter", "model.dpo_adapter", "model.name", "model.dpo_name", "train.learning_rate", "train.beta",
    "evaluate.prompts", "evaluate.gate", "evaluate.max_usd", names={"judge.model": "--judge-model",
    "judge.url": "--judge-url", "generate.max_usd": "--generate-max-usd", "judge.max_usd": "--judge-max-usd",
    "evaluate.max_usd": "--evaluate-max-usd", "evaluate.prompts": "--held-out"},
)  # fmt: skip
def run(
    session: Session,
    backend: Annotated[str, typer.Option(metavar="|".join(backends.names()), help="Where training runs.")] = "local",
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="The rounds as a page with plots.")] = None,
    limit: Limit = None,
    dry_run: DryRun = False,
) -> Exit | None:
    """The whole chain, once or in rounds: generate, judge, pair, train, evaluate, and what serves the result."""
    from dpo_cli.view import workflows as view
    from dpo_cli.workflows import rounds

    if dry_run:
        session.show(rounds.plan(session.config, session.progress(), limit), view.steps)
        return None
    result = rounds.run(session.config, session.progress(), backend, limit)
    session.show(result, view.ran)
    if html:
        from dpo_cli import html as report

        _write_page(session, html, report.rounds(result))
    if result.verdict == "fail":
        return Exit.GATE
    session.suggest("nothing-dpo push adapter DEST, or nothing-dpo run --rounds N for more")
    return None


@command("protocol", "model.base", "model.dpo_adapter", "judge.judge", "judge.model", "judge.function")
def protocol(
    session: Session,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The topics, a TOML file.")],
    dry_run: DryRun = False,
) -> Exit | None:
    """Topic by topic: SFT, a quiz, DPO where the voice needs it, the quiz again; the better adapter stays."""
    from dpo_cli.view import workflows as view
    from dpo_cli.workflows import protocol as stage

    if dry_run:
        session.show(stage.plan(stage.read(file), session.config), view.topic_steps)
        return None
    result = stage.run(stage.read(file), session.config, session.progress())
    session.show(result, view.followed)
    return Exit.GATE if result.verdict == "fail" else None


@command("push", "model.base", "model.dpo_adapter")
def push(
    session: Session,
    what: Annotated[Literal["data", "adapter", "run"], typer.Argument(help="What to send.")],
    dest: Annotated[str, typer.Argument(help="modal://volume/path, gs://bucket/path, hf://owner/name, or a folder.")],
    name: Annotated[str | None, typer.Option(help="Run. [default: the one that made the adapter; of run: dpo]")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Send the base with the adapter folded in, checked.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Send an adapter that did not pass its gates.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Data, the adapter or a run to a Modal volume, Cloud Storage, the Hub or a folder: what is not there yet."""
    from dpo_cli.stages.push import run as stage
    from dpo_cli.view import serving as view

    result = stage.run(
        session.config, session.progress(), what, dest, name=name, merge=merge, force=force, dry_run=dry_run
    )
    session.show(result, view.pushed)


@command(
    "serve-config", "model.base", "model.adapter", "model.dpo_adapter", "model.name", "model.dpo_name", "serve.host",
    "serve.port", "serve.dtype", "serve.max_model_len", "serve.gpu_memory_utilization", "serve.runtime_loading",
)  # fmt: skip
def serve_config(
    session: Session,
    form: Annotated[
        Literal["cli", "json", "yaml", "k8s", "modal", "compose"], typer.Option("--format", help="What to write.")
    ] = "cli",
    run: Annotated[bool, typer.Option("--run", help="Write nothing, but start vLLM with it.")] = False,
    load: Annotated[str | None, typer.Option(metavar="URL", help="Load the adapters into a running server.")] = None,
    check: Annotated[
        str | None, typer.Option(metavar="URL", help="Does this server serve what is on disk? Exit code 3 if not.")
    ] = None,
) -> Exit | None:
    """The vLLM configuration that serves the SFT adapter, and the DPO adapter where there is one."""
    from dpo_cli.stages import serve_config as stage
    from dpo_cli.view import serving as view

    plan = stage.plan(session.config)
    for note in plan.notes:
        typer.echo(note, err=True)
    if run:
        from dpo_cli.stages.serve_config.server import start

        start(plan)
    if load:
        from dpo_cli.stages.serve_config.server import load as load_into

        typer.echo(f"loaded: {', '.join(load_into(plan, load))}", err=True)
    if check:
        from dpo_cli.stages.serve_config.check import check as compare

        result = compare(plan, session.config, check, session.progress())
        session.show(result, view.checked)
        return None if result.verdict == "pass" else Exit.GATE
    if not load:
        form = "json" if session.json else form
        typer.echo(stage.render(plan, session.config, form))
        for line in stage.how_to_try(plan, session.config, form):
            session.suggest(line)
    return None


@command("demo")
def demo(
    session: Session,
    base: Annotated[
        str | None, typer.Option(metavar="FOLDER|ID", help="On a small instruct model of yours. [default: a tiny one]")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Folder of its own. [default: demo, or demo- and the base's name]")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over.")] = False,
) -> Exit | None:
    """The whole pipeline on this machine: no key, no GPU, no network."""
    from dpo_cli.demo import run as stage
    from dpo_cli.view import workflows as view

    result = stage.run(folder, session.progress(), fresh=fresh, base=base)
    session.show(result, view.demonstrated)
    return Exit.GATE if result.verdict == "fail" else None


Identity = Annotated[str | None, typer.Argument(metavar="[ID]", help="Id of one row, or the beginning of it.")]
Page = Annotated[int, typer.Option("--limit", min=1, help="Rows a page. [default: 20]", show_default=False)]
Offset = Annotated[int, typer.Option(min=0, help="Rows to pass over. [default: 0]", show_default=False)]
Stats = Annotated[bool, typer.Option("--stats", help="Numbers over all rows.")]


@command("pairs", parent=inspector)
def inspect_pairs(
    session: Session,
    identity: Identity = None,
    stats: Stats = False,
    browse: Annotated[bool, typer.Option("--browse", help="One after the other, with keys.")] = False,
    side: Annotated[Literal["train", "val", "both"], typer.Option(help="Side of the split.")] = "both",
    limit: Page = 20,
    offset: Offset = 0,
    lint: Annotated[bool, typer.Option("--lint", help="What is wrong with them; exit code 3 on errors.")] = False,
    fix: Annotated[Path | None, typer.Option(metavar="DIR", help="Lint, and write a cleaned copy there.")] = None,
) -> Exit | None:
    """Preference pairs: a page of them, one side by side, their statistics, or what is wrong with them."""
    from dpo_cli.data import row_index
    from dpo_cli.data.records import Preference
    from dpo_cli.view import pairs as view

    if lint or fix:
        from dpo_cli.analysis.lint.run import run
        from dpo_cli.view.lint import lint as show_lint

        linted = run(session.config, fix)
        session.show(linted, show_lint)
        return Exit.GATE if linted.errors_left else None
    if session.data.is_file():
        files = [session.data]
    else:
        sides = ("train", "val") if side == "both" else (side,)
        files = [file for name in sides if (file := session.data / f"{name}.jsonl").exists()]
    if not files:
        raise UserError("no train.jsonl or val.jsonl there", where=str(session.data), hint="nothing-dpo judge")
    if stats:
        from dpo_cli.analysis import data_stats as numbers

        session.show(numbers.pair_stats({file.stem: row_index.read_pairs(file) for file in files}), view.pair_stats)
        return None
    with row_index.Rows.open(files) as rows:
        if identity:
            row, pair = row_index.find(rows, identity, Preference)
            session.show(pair, view.pair, rows.place(row))
        elif browse:
            from dpo_cli.view.browse import browse as go_through
            from dpo_cli.view.console import stdout_console

            go_through(stdout_console(), rows, offset)
        else:
            _show_page(session, rows, Preference, view.pair_list, offset, limit)
    return None


@command("completions", parent=inspector)
def inspect_completions(
    session: Session, identity: Identity = None, stats: Stats = False, limit: Page = 20, offset: Offset = 0
) -> None:
    """What the SFT adapter answered."""
    from dpo_cli.analysis import data_stats as numbers
    from dpo_cli.data import row_index
    from dpo_cli.data.jsonl import stream_latest
    from dpo_cli.data.records import Completions
    from dpo_cli.view import completions as view

    path = session.data / "completions.jsonl"
    if stats:
        session.show(numbers.completion_stats(stream_latest(path, Completions)), view.completion_stats)
        return
    with row_index.Rows.open([path]) as rows:
        if identity:
            row, found = row_index.find(rows, identity, Completions)
            session.show(found, view.completions, rows.place(row))
        else:
            _show_page(session, rows, Completions, view.completions_list, offset, limit)


@command("judgments", parent=inspector)
def inspect_judgments(
    session: Session,
    identity: Identity = None,
    stats: Stats = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="The numbers as a page with plots.")] = None,
    limit: Page = 20,
    offset: Offset = 0,
) -> None:
    """What the judge said, and whether to believe it."""
    from dpo_cli.data import row_index
    from dpo_cli.data.bulk import paused_collection
    from dpo_cli.data.jsonl import LatestRows
    from dpo_cli.data.records import Completions, Judgment
    from dpo_cli.view import judgments as view

    path, texts = session.data / "judgments.jsonl", session.data / "completions.jsonl"
    if stats or html:
        from dpo_cli.analysis import judge_audit
        from dpo_cli.view.audit import audit

        with (
            paused_collection(),
            LatestRows(path, Judgment) as judgments,
            LatestRows(texts, Completions) as judged,
        ):
            if not judgments:
                raise UserError("no judgments", where=str(path), hint="nothing-dpo judge")
            numbers = judge_audit.audit(judgments, judged)
        session.show(numbers, audit)
        if html:
            from dpo_cli import html as report

            _write_page(session, html, report.audit(numbers))
        return
    with row_index.Rows.open([path]) as rows:
        if identity:
            row, found = row_index.find(rows, identity, Judgment)
            with LatestRows(texts, Completions) as judged:
                session.show(found, view.judgment, judged.get(found.id), rows.place(row))
        else:
            _show_page(session, rows, Judgment, view.judgments_list, offset, limit)


@command("evaluation", parent=inspector)
def inspect_evaluation(
    session: Session,
    identity: Identity = None,
    browse: Annotated[bool, typer.Option("--browse", help="One after the other, with keys.")] = False,
    begin: Annotated[
        Literal["losses", "ties", "wins"], typer.Option("--from", help="Where to begin; the wins come last.")
    ] = "losses",
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="The result as a page with plots.")] = None,
    limit: Page = 20,
    offset: Offset = 0,
) -> None:
    """Wins and losses of the policy, side by side, and what the judge said of them."""
    from dpo_cli.data import row_index
    from dpo_cli.data.files import write_file
    from dpo_cli.data.jsonl import read_latest
    from dpo_cli.data.records import Compared
    from dpo_cli.stages.evaluate import run as stage
    from dpo_cli.view import evaluation as view

    path, result = session.data / stage.ROWS, stage.read_result(session.config)
    if html:
        from dpo_cli import html as report

        write_file(html, report.evaluation(result, list(read_latest(path, Compared).values())).encode(), private=True)
        session.show(result, view.evaluated)
        session.suggest(f"look at {html} in a browser")
        return
    offset += {"losses": 0, "ties": result.losses, "wins": result.losses + result.ties}[begin]
    with row_index.Rows.open([path]) as rows:
        if identity:
            row, found = row_index.find(rows, identity, Compared)
            session.show(found, view.comparison, rows.place(row))
        elif browse:
            from dpo_cli.view.browse import browse as go_through
            from dpo_cli.view.console import stdout_console

            go_through(stdout_console(), rows, offset, view.COMPARISONS)
        else:
            _show_page(session, rows, Compared, view.comparison_list, offset, limit)


@command("run", parent=inspector)
def inspect_run(
    session: Session,
    name: Annotated[str, typer.Argument(metavar="[NAME]", help="Name of the run.")] = "dpo",
    explain: Annotated[bool, typer.Option("--explain", help="What the guards found, and what mends it.")] = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="All of it as a page with plots.")] = None,
) -> None:
    """A training run: curves, guards, gates."""
    from dpo_cli.training import run_history
    from dpo_cli.view import training as view

    check_run_name(name)
    if explain:
        from dpo_cli.training import remedies
        from dpo_cli.view.plan import explain as show_remedies

        folder = Path(session.config.runs) / name
        events = run_history.read_run(folder).events if folder.is_dir() else []
        session.show(remedies.shown_by(events), show_remedies)
        return
    found = run_history.read_run(Path(session.config.runs) / name)
    session.show(found, view.run)
    if html:
        from dpo_cli import html as report

        _write_page(session, html, report.run(found))


@command(
    "plan", "model.base", "model.adapter", "train.per_device_train_batch_size", "train.max_length",
    "train.num_train_epochs", parent=inspector,
)  # fmt: skip
def inspect_plan(
    session: Session,
    limit: Limit = None,
    guide: Annotated[bool, typer.Option("--guide", help="Tables of rates, betas, batches, symptoms; no run.")] = False,
) -> None:
    """What a training run will need: steps, memory, hours, dollars."""
    from dpo_cli.training import preflight, remedies
    from dpo_cli.view import plan as view

    if guide:
        session.show({"guide": remedies.GUIDE, "remedies": remedies.REMEDIES}, view.guide)
        return
    given = session.data if session.resolved.sources["data"] == "flag" else None
    session.show(preflight.run(session.config, given, limit), view.plan)


@command("config", parent=inspector)
def inspect_config(
    session: Session,
    presets: Annotated[bool, typer.Option("--presets", help="What each preset sets and costs.")] = False,
) -> None:
    """Every setting, its value, and where that came from."""
    from dpo_cli.config import resolve
    from dpo_cli.view import plan as view

    if presets:
        from dpo_cli.training import preflight

        session.show(preflight.presets(session.config), view.presets)
        return
    session.show(resolve.settings(session.resolved), view.settings)


def _write_page(session: Session, path: Path, text: str) -> None:
    """A page for a browser, and where it is."""
    from dpo_cli.data.files import write_file

    write_file(path, text.encode(), private=True)
    session.suggest(f"look at {path} in a browser")


def _show_page(
    session: Session, rows: Any, kind: type[Any], render: Callable[..., None], offset: int, limit: int
) -> None:
    """A page of rows."""
    if session.json:
        typer.echo(msgspec.json.encode([rows.decode(row, kind) for row in rows.slice(offset, limit)]))
    else:
        session.show(rows, render, offset, limit)


if __name__ == "__main__":
    main()
