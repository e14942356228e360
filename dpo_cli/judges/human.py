"""A person as judge: `--judge human`, a session in the terminal.

The prompt stands above its candidates, which stand side by side where there is room. The session is blind: no model,
id or score is shown, and prompts and candidates come in an order that `judge.seed` shuffles, the same on every run. A
ranking is typed best first and delivered at once, so that what is done is kept whatever happens; what is undone is
taken back.

Scores are spaced evenly by rank from 10 (best) to 1, equals sharing the mean of their ranks: three candidates score
10, 5.5 and 1; of `1=2 3` the scores are 7.75, 7.75 and 1. `orders` keeps the order that was seen, and the ranking as
it was typed. At the end stands the agreement with the judgments of `judge.against`, over all that the person has
judged. Not covered: several persons in one file, and more than 35 candidates.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from dpo_cli.config.settings import Config
from dpo_cli.data.jsonl import read_latest
from dpo_cli.data.records import Judgment, Order, content_id, said
from dpo_cli.errors import UserError
from dpo_cli.judges._agreement import agree
from dpo_cli.judges._ranking import conclude, label_of
from dpo_cli.judges._task import Task
from dpo_cli.progress import Progress
from dpo_cli.safe_text import plain
from dpo_cli.terminal import GUTTER, Screen, cut, full_screen, side_by_side, width, wrap

# Places on the screen, best first in groups of equals, such as ((1,), (0, 2)).
Groups = tuple[tuple[int, ...], ...]

LABELS = "123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
BEST, WORST = 10.0, 1.0
NARROWEST = 28  # columns of a candidate; with less room they stand under each other
SKIPPED = "skipped by the person"
UNDONE = "the person took it back"
HELP = "digits best first · = tie · Enter rest last · u undo · s skip · q quit · ? keys"
ALL_KEYS = "↑ ↓ space b scroll · p whole prompt · = before a digit: as good as the one before"
FINISHED = "All done. Enter or q to finish, u to go back."
BOLD, DIM, REVERSE, LABEL, RANK, OFF = "\x1b[1m", "\x1b[2m", "\x1b[7m", "\x1b[1;36m", "\x1b[32m", "\x1b[0m"


def identity(config: Config) -> dict[str, Any]:
    """A person; the seed is no part of it, since it changes only in what order things are seen."""
    return {"judge": "human"}


def calls(shown: Iterable[int], config: Config) -> int:
    """None: the person is not paid by the call."""
    return 0


def judge(tasks: Sequence[Task], config: Config, deliver: Callable[[Judgment], None], progress: Progress) -> None:
    """Show the tasks until all are judged or the person quits.

    Raises:
        UserError: no terminal, no judgments at `judge.against`, or too many candidates.
    """
    seed, against = config.judge.seed, config.judge.against
    theirs = read_others(Path(against)) if against else {}
    for task in tasks:
        if len(task.shown) > len(LABELS):
            message = f"{len(task.shown)} candidates are more than a person can rank with {len(LABELS)} keys"
            raise UserError(message, where=f"prompt {task.id}", hint="--judge llm")
    if tasks:
        with progress.aside(), full_screen("--judge human") as screen:
            shuffled = sorted(tasks, key=lambda task: content_id(seed, task.id))
            session = _RankingSession(shuffled, seed, screen, deliver, progress)
            session.run()
        left = len(tasks) - session.number
        if left:
            progress.log(f"{left} of {len(tasks)} prompts left: the same command goes on")
    if theirs:
        ours = read_latest(Path(config.data) / "judgments.jsonl", Judgment)
        progress.log(f"agreement with {against}: {agree(ours, theirs)}")


def read_others(path: Path) -> dict[str, Judgment]:
    """The judgments of another judge.

    Raises:
        UserError: there are none.
    """
    theirs = read_latest(path, Judgment)
    if not theirs:
        raise UserError("no judgments to compare with", where=str(path), hint="--against data/other/judgments.jsonl")
    return theirs


def place(groups: Groups, candidate: int, tied: bool) -> Groups:
    """The ranking with one more candidate at its end; tied: as good as the last."""
    if tied and groups:
        return (*groups[:-1], (*groups[-1], candidate))
    return (*groups, (candidate,))


def score(groups: Groups) -> dict[int, float]:
    """Place on the screen -> score, of a whole ranking."""
    step = (BEST - WORST) / (sum(map(len, groups)) - 1)
    scores: dict[int, float] = {}
    for group in groups:
        ranks = range(len(scores), len(scores) + len(group))
        scores |= dict.fromkeys(group, BEST - step * fmean(ranks))
    return scores


def typed(groups: Groups) -> str:
    """A ranking as it is typed: `2 1=3`."""
    return " ".join("=".join(LABELS[candidate] for candidate in group) for group in groups)


class _RankingSession:
    """One session: `number` prompts are done, and `groups` is the ranking of the next one so far."""

    def __init__(
        self, tasks: list[Task], seed: int, screen: Screen, deliver: Callable[[Judgment], None], progress: Progress
    ) -> None:
        self.tasks = tasks
        self.seed = seed
        self.screen = screen
        self.deliver = deliver
        self.progress = progress
        self.number = 0
        self.groups: Groups = ()
        self.past: list[tuple[int, Groups]] = []
        self.tied = False
        self.top = 0
        self.whole = False
        self.message = ""

    def run(self) -> None:
        while True:
            height = self.draw()
            try:
                key = self.screen.read()
            except EOFError:
                return
            if key == "q" or (key == "enter" and self.number == len(self.tasks)):
                return
            if key is not None:
                self.message = ""
                self.obey(key, height)

    def obey(self, key: str, height: int) -> None:
        """Do what a key says; `height` is that of the whole text, in lines."""
        page = self.room - 1
        match key:
            case "u" | "backspace":
                self.undo()
            case " " | "page down":
                self.scroll(page, height)
            case "b" | "page up":
                self.scroll(-page, height)
            case "down":
                self.scroll(1, height)
            case "up":
                self.scroll(-1, height)
            case "p":
                self.whole, self.top = not self.whole, 0
            case _ if self.number < len(self.tasks):
                self.rank(key)
            case _:
                self.message = FINISHED

    def rank(self, key: str) -> None:
        """What only a prompt that is not done takes."""
        ranked = [candidate for group in self.groups for candidate in group]
        candidates = range(len(self.order))
        if key == "s":
            self.finish(None)
        elif key == "=":
            self.tied = bool(self.groups)
            self.message = "" if self.tied else "= comes after a digit"
        elif key == "enter" and self.groups:
            self.finish((*self.groups, tuple(other for other in candidates if other not in ranked)))
        elif (candidate := LABELS.find(key)) in candidates and candidate not in ranked:
            groups = place(self.groups, candidate, self.tied)
            if len(ranked) + 1 == len(self.order):
                self.finish(groups)
            else:
                self.past.append((self.number, self.groups))
                self.groups, self.tied = groups, False
        else:
            self.message = ALL_KEYS

    def finish(self, groups: Groups | None) -> None:
        """Deliver the ranking of the prompt, or that it is skipped, and go to the next."""
        self.deliver(self.skip() if groups is None else self.judgment(groups))
        self.past.append((self.number, self.groups))
        self.go(self.number + 1, ())

    def undo(self) -> None:
        """Undo the last key that ranked something, in the prompt before too."""
        if self.tied:
            self.tied = False
        elif not self.past:
            self.message = "nothing to undo"
        else:
            number, groups = self.past.pop()
            if number == self.number:
                self.groups = groups
                return
            self.go(number, groups)
            task = self.tasks[number]
            self.deliver(Judgment(id=task.id, completions_id=task.completions_id, error=UNDONE))

    def go(self, number: int, groups: Groups) -> None:
        self.number, self.groups = number, groups
        self.tied, self.top, self.whole = False, 0, False
        self.progress.update(number)

    @property
    def order(self) -> list[int]:
        """Indices of the completions as they stand on the screen."""
        task = self.tasks[self.number]
        return sorted(task.shown, key=lambda index: content_id(self.seed, task.id, index))

    def judgment(self, groups: Groups) -> Judgment:
        scores = score(groups)
        labelled = {label_of(candidate): scores[candidate] for candidate in sorted(scores)}
        seen = Order(self.order, labelled, typed(groups))
        by_index = {self.order[candidate]: scores[candidate] for candidate in scores}
        return conclude(self.tasks[self.number], by_index, orders=[seen])

    def skip(self) -> Judgment:
        task = self.tasks[self.number]
        return Judgment(id=task.id, completions_id=task.completions_id, skipped=SKIPPED)

    @property
    def room(self) -> int:
        """Lines above the status line."""
        return max(1, self.screen.size.lines - 1)

    def scroll(self, lines: int, height: int) -> None:
        self.top = max(0, min(self.top + lines, height - self.room))

    def draw(self) -> int:
        """Draw the screen; the number of lines that the whole text takes."""
        columns = self.screen.size.columns
        lines = self.text(columns) if self.number < len(self.tasks) else ["", FINISHED]
        self.scroll(0, len(lines))
        shown = lines[self.top : self.top + self.room]
        more = len(lines) - self.top - len(shown)
        where = f" {min(self.number + 1, len(self.tasks))} of {len(self.tasks)} "
        ranking = f" {typed(self.groups)}{'=' if self.tied else ''}"
        note = self.message or (f"{more} more lines: space" if more else "")
        rest = cut(f"{note} · {HELP}" if note else HELP, columns - width(where + ranking) - 2)
        bar = f"{REVERSE}{where}{OFF}{BOLD}{ranking}{OFF}{DIM}  {rest}"
        self.screen.draw([*shown, *[""] * (self.room - len(shown)), bar])
        return len(lines)

    def text(self, columns: int) -> list[str]:
        """Prompt and candidates as lines."""
        return [*self.prompt(columns), f"{DIM}{'─' * columns}", *self.candidates(columns)]

    def prompt(self, columns: int) -> list[str]:
        """The prompt's end, where prompts differ most, or with `p` all of it."""
        messages = self.tasks[self.number].prompt
        roles = [cut(plain(message["role"]).replace("\n", " "), columns // 4) for message in messages]
        indent = max(map(width, roles)) + 2
        lines = []
        for role, message in zip(roles, messages, strict=True):
            style = DIM if message["role"] == "system" else ""
            start = f"{LABEL}{role}{OFF}{' ' * (indent - width(role))}"
            for line in wrap(plain(said(message)), columns - indent):
                lines.append(f"{start}{style}{line}")
                start = " " * indent
        most = max(4, self.room // 3)
        if self.whole or len(lines) <= most:
            return lines
        hidden = len(lines) - most + 1
        return [f"{DIM}… {hidden} lines above: p{OFF}", *lines[hidden:]]

    def candidates(self, columns: int) -> list[str]:
        """The candidates in rows of as many as fit, each under its label and the rank that it was given."""
        count = len(self.order)
        fitting = max(1, (columns + len(GUTTER)) // (NARROWEST + len(GUTTER)))
        rows = -(-count // fitting)
        abreast = -(-count // rows)
        room = (columns - (abreast - 1) * len(GUTTER)) // abreast
        texts = [self.candidate(candidate, room) for candidate in range(count)]
        lines: list[str] = []
        for start in range(0, count, abreast):
            lines += [*side_by_side(texts[start : start + abreast], room), ""]
        return lines[:-1]

    def candidate(self, candidate: int, room: int) -> list[str]:
        rank = next((rank for rank, group in enumerate(self.groups, 1) if candidate in group), None)
        head = f"{LABEL}{LABELS[candidate]}{OFF}" + (f"  {RANK}rank {rank}{OFF}" if rank else "")
        text = self.tasks[self.number].completions[self.order[candidate]]
        return [head, *wrap(plain(text), room)]
