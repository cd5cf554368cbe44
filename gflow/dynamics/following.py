"""From saved point to saved point: what flow and descent have in common on their way."""

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from gflow.dynamics import checkpoint
from gflow.dynamics.checkpoint import Checkpoint, CheckpointError, End
from gflow.dynamics.progress import ProgressBar
from gflow.dynamics.recorder import Recorder
from gflow.dynamics.until import AbstractRule, save_grid
from gflow.problem.arguments import file_path, flag


class Stop(NamedTuple):
    """A rule, and its progress at which the run is to stop."""

    rule: AbstractRule
    progress: float


class Run(checkpoint.Run, Protocol):
    """A flow or a descent on its way."""

    name: str

    @property
    def num_steps(self) -> int:
        """Steps so far."""
        ...

    def progress(self, rules: tuple[AbstractRule, ...]) -> list[float]:
        """How far the run is in the coordinate of each rule."""
        ...

    def tell(self, lead: AbstractRule) -> tuple[float, str]:
        """How far the run is in the coordinate of ``lead``, and what a bar says beside it."""
        ...

    def save(self, recorder: Recorder) -> None:
        """Record the point where the run stands."""
        ...

    def go(self, stops: Sequence[Stop], look: Callable[[], None]) -> AbstractRule | End:
        """Advance to the first of ``stops``: its rule, or why none was reached.

        Now and then ``look`` is called; the run may be stopped there and go on later.
        """
        ...

    def identity(
        self, recorder: Recorder, rules: tuple[AbstractRule, ...], grid: np.ndarray
    ) -> dict[str, str]:
        """What the run is, for its checkpoint."""
        ...


def follow(
    run: Run,
    recorder: Recorder,
    rules: tuple[AbstractRule, ...],
    *,
    save: int | Sequence[float] | np.ndarray,
    progress: bool | None,
    path: str | os.PathLike[str] | None,
) -> End:
    """Follow a run from its start to one of its rules, saving points; says how it ended.

    Args:
        run: at its start.
        recorder: takes the points.
        rules: the first is the leading one, in whose coordinate points are saved.
        save: how many, or where.
        progress: whether to show a bar.
        path: of the checkpoint, if there is to be one.
    """
    lead, *others = rules
    flag("progress", progress, none=True)
    file = None if path is None else file_path("checkpoint", path)
    run.save(recorder)
    standing = run.progress(rules)
    for rule, at in zip(rules, standing, strict=True):
        if at >= rule.goal:
            return End("reached", f"{rule!r} is met at the start; no step was made")
    grid = save_grid(lead, standing[0], save)
    ends = [Stop(rule, rule.goal) for rule in others]
    kept = Checkpoint(
        file,
        lambda: run.identity(recorder, rules, grid),
        run,
        recorder,
    )
    done, end = kept.resume()

    def save_point() -> None:
        if run.num_steps > recorder.num_steps:  # a long step passes several points
            run.save(recorder)

    with ProgressBar(run.name, standing[0], float(grid[-1]), progress) as bar:

        def look() -> None:
            if bar.shown:
                bar.update(*run.tell(lead))
            kept.look(done)

        try:
            while end is None:
                met = run.go([Stop(lead, float(grid[done])), *ends], look)
                if isinstance(met, End) and met.status == "max_steps":
                    kept.flush()  # without the point to come: a larger `max_steps` goes on
                save_point()
                done += 1
                if isinstance(met, End):
                    end = met
                elif met is not lead or done == len(grid):
                    end = End("reached", f"{met!r} after {run.num_steps} steps")
                if end is None:
                    look()
                elif end.status != "max_steps":
                    kept.close(done, end)
        except CheckpointError as error:
            end = End("checkpoint_failed", str(error))
        except KeyboardInterrupt:
            end = End("interrupted", "stopped by the keyboard; what was computed is in the record")
            with contextlib.suppress(CheckpointError):
                kept.flush()
        save_point()
    return end
