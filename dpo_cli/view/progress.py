"""How far a stage is: a live panel in a terminal, plain lines elsewhere.

Both implement `progress.Progress` over one `Meter`. The counters that a stage reports decide what is shown. Rates are
taken over the recent past and over what this run did: what a former run finished makes no rate. `update` only
notes numbers, so a stage may call it for every token.
"""

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import IO, NamedTuple

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dpo_cli.progress import Progress
from dpo_cli.view.braille import sparkline
from dpo_cli.view.console import make_console
from dpo_cli.view.text import dollars, duration, number, percent, safe, safe_line

WINDOW_SECONDS = 60.0  # rates look this far back,
WINDOW_SAMPLES = 8  # and at least over so many samples, however slow the steps are
SAMPLE_SECONDS = 0.25
REFRESHES_PER_SECOND = 8
CURVE_POINTS = 1024
SPARK_WIDTH = 16


def make_progress() -> Progress:
    """The progress that fits where stderr goes: a live panel in a terminal, plain lines elsewhere."""
    console = make_console(sys.stderr)
    return RichProgress(console) if console.is_terminal else LineProgress(sys.stderr)


class Part(NamedTuple):
    """One thing that is shown, and how loudly."""

    text: str
    style: str = ""


class _Sample(NamedTuple):
    at: float
    done: int
    counters: dict[str, float]


class Meter:
    """The numbers of one stage and their rates.

    Args:
        stage: its name.
        total: units in all, if known.
        done: units that a former run finished.
        clock: seconds, monotonic.
    """

    def __init__(
        self, stage: str, total: int | None, done: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.stage = stage
        self.total = total
        self.done = self.done_before = done
        self.clock = clock
        self.started = self.updated = clock()
        self.counters: dict[str, float] = {}
        self.curves: dict[str, list[float]] = {"loss": [], "margin": []}
        self._samples = deque([_Sample(self.started, done, {})])
        self._first = self._samples[0]

    def update(self, done: int, counters: dict[str, float]) -> None:
        """Note the numbers; rates and curves take a sample now and then."""
        now = self.clock()
        moved = done != self.done
        if not self.counters and self.done_before:
            # A resumed stage may count on from its former totals: these are where this run starts.
            self._samples[0] = self._first = _Sample(now, done, counters)
        self.done, self.updated = done, now
        self.counters = {**self.counters, **counters}
        if moved:
            self._extend_curves(counters)
        if now - self._samples[-1].at >= SAMPLE_SECONDS:
            self._samples.append(_Sample(now, done, self.counters))
            while len(self._samples) > WINDOW_SAMPLES and now - self._samples[0].at > WINDOW_SECONDS:
                self._samples.popleft()

    def rate(self, counter: str | None = None, whole_run: bool = False) -> float | None:
        """Units, or a counter, a second; None before anything was done."""
        first = self._first if whole_run else self._samples[0]
        seconds = self.updated - first.at
        # A step in progress is no stall; silence for longer than samples usually take is one.
        usual = seconds / max(1, len(self._samples) - 1)
        seconds += 0 if whole_run else max(0.0, self.clock() - self.updated - usual)
        gained = self.done - first.done if counter is None else self._gained(counter, first)
        return gained / seconds if seconds > 0 and gained > 0 else None

    def eta(self) -> float | None:
        """Seconds left, as far as known."""
        rate = self.rate()
        return None if rate is None or self.total is None else max(0, self.total - self.done) / rate

    def parts(self, whole_run: bool = False) -> list[Part]:
        """What the counters say, in a fixed order; over the whole run: as a closing word."""
        found = []
        for name in SHOWN:
            if name not in self.counters or (whole_run and name == "in_flight"):
                continue
            value = self.counters[name]
            text = SHOWN[name](self.rate(name, whole_run) if name in RATES else value)
            alarming = (name == "failed" and value > 0) or not math.isfinite(value)
            found.append(Part(text, "bold red" if alarming else "yellow" if name == "retries" and value > 0 else ""))
        return found

    @property
    def only_waits(self) -> bool:
        """Whether nothing is counted: no total is known, and nothing is reported."""
        return self.total is None and not self.done and not self.counters

    def position(self) -> str:
        """`123/344  36%`, or what is done where no total is known; nothing where only time passes."""
        if self.only_waits:
            return ""
        if self.total is None:
            return f"{self.done:,} done"
        return f"{self.done:,}/{self.total:,}  {math.floor(100 * self.done / self.total) if self.total else 100}%"

    def time_left(self) -> str:
        """`3 min 12 s left`, how long it has taken where only time passes, or nothing."""
        if self.only_waits:
            return duration(self.clock() - self.started)
        eta = self.eta()
        return "" if eta is None else f"{duration(eta)} left"

    def closing(self) -> str:
        """How long it took, and whether it came to its end."""
        word = "stopped after" if self.total is not None and self.done < self.total else "in"
        return f"{word} {duration(self.clock() - self.started)}"

    def _gained(self, counter: str, first: _Sample) -> float:
        return self.counters.get(counter, 0.0) - first.counters.get(counter, 0.0)

    def _extend_curves(self, counters: dict[str, float]) -> None:
        for name, curve in self.curves.items():
            if name in counters:
                curve.append(counters[name])
                if len(curve) > CURVE_POINTS:
                    curve[:] = curve[::2]


RATES = ("completions", "tokens", "megabytes")
# Order and form of the counters; those of RATES are given a second.
SHOWN: dict[str, Callable[[float | None], str]] = {
    "loss": lambda value: f"loss {number(value)}",
    "margin": lambda value: f"margin {number(value)}",
    "accuracy": lambda value: f"accuracy {percent(value)}",
    "kl": lambda value: f"kl {number(value)}",
    "completions": lambda value: f"{number(value)} completions/s",
    "tokens": lambda value: f"{number(value)} tokens/s",
    "megabytes": lambda value: f"{number(value)} MB/s",
    "memory_gb": lambda value: f"{value or 0:.1f} GB",
    "in_flight": lambda value: f"{value or 0:,.0f} in flight",
    "retries": lambda value: f"{value or 0:,.0f} retries",
    "failed": lambda value: f"{value or 0:,.0f} failed",
    "usd": lambda value: dollars(value or 0),
}


class RichProgress:
    """A live panel, drawn a few times a second by its own thread; log lines appear above it."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._meter: Meter | None = None
        self._live: Live | None = None

    def begin(self, stage: str, total: int | None, done: int = 0) -> None:
        """Start a stage, ending the one before."""
        self.end()
        self._meter = Meter(stage, total, done)
        self._draw(self._meter)

    def update(self, done: int, **counters: float) -> None:
        """Note the numbers; the panel shows them when it is next drawn."""
        if self._meter is not None:
            self._meter.update(done, counters)

    def log(self, text: str) -> None:
        """Print a line above the panel."""
        self.console.print(safe(text))  # in whole words, where the terminal would break them at its edge

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Take the panel off the screen, and bring it back with what was reported meanwhile."""
        live, meter = self._live, self._meter
        if live is None or meter is None:
            yield
            return
        live.transient = True
        live.stop()
        try:
            yield
        finally:
            self._draw(meter)

    def end(self) -> None:
        """Leave the last state on the screen, and the cursor as it was."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()
        self._meter = None

    def _draw(self, meter: Meter) -> None:
        self._live = Live(
            get_renderable=lambda: panel(meter, self.console.width, ended=self._live is None),
            console=self.console,
            refresh_per_second=REFRESHES_PER_SECOND,
            # A result that goes to a file must not be drawn into the panel instead.
            redirect_stdout=sys.stdout.isatty(),
        )
        self._live.start()


class LineProgress:
    """Plain lines for a log file or a pipe, one at most every few seconds.

    Args:
        stream: where they go.
        every: seconds between two lines.
        clock: seconds, monotonic.
    """

    def __init__(self, stream: IO[str], every: float = 5.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.stream = stream
        self.every = every
        self.clock = clock
        self._meter: Meter | None = None
        self._printed = 0.0

    def begin(self, stage: str, total: int | None, done: int = 0) -> None:
        """Start a stage, ending the one before."""
        self.end()
        self._meter = Meter(stage, total, done, self.clock)
        self._printed = self.clock()
        position = self._meter.position() + (f" ({done:,} from before)" if done else "")
        self._print(f"{stage}: {position}" if position else stage)

    def update(self, done: int, **counters: float) -> None:
        """Note the numbers; print them if it is time."""
        meter = self._meter
        if meter is None:
            return
        meter.update(done, counters)
        if meter.updated - self._printed >= self.every:
            self._printed = meter.updated
            self._print_state(meter, meter.time_left())

    def log(self, text: str) -> None:
        """Print a line."""
        self._print(text)

    def aside(self) -> AbstractContextManager[None]:
        """Lines go past by themselves."""
        return nullcontext()

    def end(self) -> None:
        """Print the last state."""
        meter, self._meter = self._meter, None
        if meter is not None:
            self._print_state(meter, meter.closing(), whole_run=True)

    def _print_state(self, meter: Meter, time_text: str, whole_run: bool = False) -> None:
        parts = [meter.position(), *(part.text for part in meter.parts(whole_run)), time_text]
        self._print(f"{meter.stage}: {' · '.join(part for part in parts if part)}")

    def _print(self, line: str) -> None:
        self.stream.write(safe_line(line).plain + "\n")
        self.stream.flush()


def panel(meter: Meter, width: int, ended: bool = False) -> RenderableType:
    """The live panel: a bar with position and time, and under it what the counters say."""
    head = Table.grid(padding=(0, 2, 0, 0), expand=True)
    head.add_column(no_wrap=True)
    head.add_column(ratio=1)
    head.add_column(no_wrap=True, justify="right")
    head.add_column(no_wrap=True, justify="right")
    waits = meter.only_waits and not ended
    bar = ProgressBar(
        total=None if waits else meter.total or 1,
        completed=meter.done,
        complete_style="cyan",
        finished_style="green",
        pulse_style="cyan",
    )
    head.add_row(
        safe_line(meter.stage, "bold"),
        bar if meter.total is not None or waits else "",
        Text(meter.position()),
        Text(meter.closing() if ended else meter.time_left(), "dim" if ended else "cyan"),
    )
    return Group(head, *_flow(_with_curves(meter, meter.parts(whole_run=ended)), width))


def _with_curves(meter: Meter, parts: list[Part]) -> list[Text]:
    texts = []
    for part in parts:
        text = Text(part.text, part.style)
        curve = meter.curves.get(part.text.partition(" ")[0], [])
        if len(curve) > 1:
            text.append(f" {sparkline(curve, SPARK_WIDTH)}", "magenta")
        texts.append(text)
    return texts


def _flow(texts: list[Text], width: int) -> list[Text]:
    """The texts on as few indented lines as they need; no text is broken unless it is wider than a line."""
    lines: list[Text] = []
    for text in texts:
        if lines and lines[-1].cell_len + len(" · ") + text.cell_len <= width:
            lines[-1].append(" · ", "dim").append_text(text)
        else:
            lines.append(Text("  ").append_text(text))
    return lines
