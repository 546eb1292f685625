"""How long an analysis takes: said after its first steps, shown while it runs, and bounded where a bound is asked for.

A loop that may take minutes goes over `paced(items, ...)`, or calls `Pace.step`. Both see the bound of `time_bound`, which
the command line sets, and divide what is left of it by the loops still to come (`one_of`).
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, TypeVar

from sae_italian.base.errors import UsageError

T = TypeVar("T")
PIPED_SECONDS = 30  # between two lines of a bar that nobody watches move
PROBE_STEPS, PROBE_SECONDS = 3, 10.0  # after which of them, the first to come, the rest is foreseen
WORTH_SAYING = 30.0  # seconds


class _Lines:
    """What a pipe or a log file gets of a bar: whole lines, without what moves the cursor."""

    def write(self, text: str) -> None:
        if line := text.strip("\r\n "):
            sys.stderr.write(line + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress(
    what: str, items: Iterable[Any] | None = None, *, unit: str = "tok", hidden: bool = False, **more: Any
) -> Any:
    """Return a `tqdm` bar with its rate, over items where they are given; `more`: its `total`, `initial` or `leave`.

    On a terminal it moves, elsewhere it is a line every PIPED_SECONDS, or hidden.
    """
    from tqdm import tqdm

    if not sys.stderr.isatty():
        more |= {"mininterval": PIPED_SECONDS, "delay": PIPED_SECONDS, "maxinterval": 2 * PIPED_SECONDS}
        more["file"] = _Lines()
    return tqdm(items, desc=what, unit=unit, unit_scale=True, disable=hidden, **more)


@dataclass
class _Work:
    """What the running analysis may take, and what of it was cut short."""

    ends: float = float("inf")  # on the monotonic clock
    parts: int = 1  # loops of this kind still to come, this one counted
    cut: list[str] = field(default_factory=list)


_work: ContextVar[_Work] = ContextVar("work", default=_Work())  # noqa: B039  # unbound, nothing is ever cut short


@contextmanager
def time_bound(minutes: float = float("inf")) -> Iterator[list[str]]:
    """End the paced loops of the block when the minutes are over; the list given says, afterwards, what was cut short.

    Every loop does its first step, so there is always a result. Raises: UsageError for minutes that are not above 0.
    """
    if not minutes > 0:
        raise UsageError(f"minutes is {minutes:g}; a number above 0 was expected.")
    work = _Work(monotonic() + 60 * minutes)
    token = _work.set(work)
    try:
        yield work.cut
    finally:
        _work.reset(token)


@contextmanager
def one_of(parts: int, *, alike: bool = True) -> Iterator[None]:
    """Give the loops of the block one of so many equal parts of the time that is left; `alike`: the others are as long."""
    work, now = _work.get(), monotonic()
    token = _work.set(_Work(now + (work.ends - now) / parts, work.parts * parts if alike else work.parts, work.cut))
    try:
        yield
    finally:
        _work.reset(token)


def is_bounded() -> bool:
    """Return whether the running work has a time bound."""
    return _work.get().ends < float("inf")


def cut_short() -> list[str]:
    """Return what the time bound has cut short so far, a sentence each."""
    return _work.get().cut


class Pace:
    """The steps of one loop: a bar, a forecast after the first of them, and whether the time is over."""

    def __init__(self, what: str, total: int, unit: str = "step", roughly: str = "about"):
        self.what, self.total, self.unit, self.roughly = what, total, unit, roughly
        self.bar = progress(what, total=total, unit=unit)
        self.work, self.began = _work.get(), monotonic()
        self.n_steps = self.done = 0
        self.foreseen = False

    def step(self, n: int = 1) -> bool:
        """Count a step that did `n` of the total; return whether the loop must end now."""
        self.bar.update(n)
        self.n_steps, self.done = self.n_steps + 1, self.done + n
        now, progressed = monotonic(), f"{self.done:,} of {self.total:,} {self.unit}s"
        if not self.foreseen and (self.n_steps >= PROBE_STEPS or now - self.began > PROBE_SECONDS):
            self.foreseen = True
            self._foresee((now - self.began) / max(self.done, 1) * (self.total - self.done), progressed)
        if now < self.work.ends or self.done >= self.total:
            return False
        self.work.cut.append(f"{self.what}: stopped by the time bound at {progressed}")
        return True

    def skip(self, done: int) -> None:
        """Count what need not be done: so much of the total is behind now."""
        self.bar.update(done - self.done)
        self.done = done

    def _foresee(self, seconds: float, progressed: str) -> None:
        more = self.work.parts - 1
        if seconds * (1 + more) > WORTH_SAYING:
            after = f", then as much for each of {more} more" if more else ""
            left = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
            self.bar.clear()
            sys.stderr.write(f"{self.what}: {progressed} done, {self.roughly} {left} to go{after}\n")


def paced(
    items: Iterable[T], what: str, total: int, unit: str = "step", *, size: Callable[[T], int] = lambda _: 1
) -> Iterator[T]:
    """Yield the items, at least the first, until the time is over; `size` says how much of the total one of them is."""
    pace = Pace(what, total, unit)
    with pace.bar:
        for item in items:
            yield item
            if pace.step(size(item)):
                return
