"""What the host does while the device computes: a progress bar, and when to look."""

import math
import time
import warnings
from types import TracebackType
from typing import Any

DELAY = 2.0
"""Seconds before a bar appears."""

SECONDS_A_CALL = 0.25
"""How long the device runs between two looks of the host: progress moves and Ctrl-C answers."""

SECONDS_A_NUMBER = 1.2e-7
"""So much longer for each number of a state: that a call takes in and gives back states, and is
given memory for them, takes a fifth of that, half of the time at width 2048 without this."""


class Pace:
    """The size of the next call, in steps, so that calls take about ``SECONDS_A_CALL``.

    Args:
        size: of the first call, before the speed is known.
        numbers: in a state.
    """

    def __init__(self, size: int, numbers: int = 0):
        self.size, self.numbers = size, numbers

    def took(self, seconds: float, *, full: bool = True) -> None:
        """Learn from the last call.

        Args:
            seconds: that it took.
            full: whether it made all its steps; one that a saved point cut short says nothing of
                how long the next will take.
        """
        wanted = SECONDS_A_CALL + self.numbers * SECONDS_A_NUMBER
        if full and seconds < wanted / 2:
            self.size *= 2
        elif seconds > 2 * wanted:
            self.size = max(1, self.size // 2)


class ProgressBar:
    """Moves from the start's progress to the goal's; stays invisible for the first two seconds.

    Args:
        label: the text before the bar.
        begin, goal: the stopping rule's progress at the start and at the end.
        show: True or False; None shows it when standard error is a terminal or a notebook.
    """

    def __init__(self, label: str, begin: float, goal: float, show: bool | None):
        from tqdm import TqdmWarning

        with warnings.catch_warnings():
            # A notebook without ipywidgets is told to install them; it does without a bar.
            warnings.simplefilter("ignore", TqdmWarning)
            from tqdm.auto import tqdm

        self.begin, self.began = begin, time.monotonic()
        self.span = max(goal - begin, 1e-300)
        self.bar: Any = tqdm(
            total=100.0,
            desc=label,
            delay=DELAY,
            leave=False,
            disable=None if show is None else not show,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
        )

    @property
    def shown(self) -> bool:
        """Whether there is anything to see yet: what it would show may cost something."""
        return not self.bar.disable and time.monotonic() - self.began > DELAY

    def update(self, progress: float, note: str = "") -> None:
        """Move to ``progress`` and show ``note`` behind the bar."""
        if not (math.isfinite(self.span) and math.isfinite(progress)):
            return  # the start has no progress yet
        done = min(100.0, max(0.0, 100.0 * (progress - self.begin) / self.span))
        if done >= self.bar.n:  # never backwards
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(done - self.bar.n)

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.close()
