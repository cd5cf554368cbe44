"""Where a run is asked to stop next, in the terms of its clock."""

import math
from typing import NamedTuple

import numpy as np

from gflow.dynamics.checkpoint import End
from gflow.dynamics.clocks import AbstractClock
from gflow.dynamics.until import AbstractRule, LogRisk, LogTime, Steps
from gflow.problem.network import as_array

NO_STEP_COUNT = int(np.iinfo(np.int64).max)


class Target(NamedTuple):
    """One rule at one value of its progress."""

    rule: AbstractRule
    progress: float
    clock: float
    """The clock's value there, infinite when the clock cannot know it."""
    steps: int

    @classmethod
    def of(cls, rule: AbstractRule, progress: float, clock: AbstractClock) -> "Target":
        """Where ``rule`` has made this ``progress``."""
        if isinstance(rule, Steps):
            return cls(rule, progress, math.inf, round(math.expm1(progress)))
        value = rule.clock_value(progress, clock)
        return cls(rule, progress, math.inf if value is None else value, NO_STEP_COUNT)

    @classmethod
    def at(cls, clock_value: float, clock: AbstractClock) -> "Target":
        """Where the clock has this value."""
        s = as_array(np.float64(clock_value))
        log_risk, log_time = clock.log_risk_at(s), clock.log_time_at(s)
        rule = LogRisk(float(log_risk)) if log_risk is not None else None
        if rule is None:
            assert log_time is not None  # a clock follows the one or the other
            rule = LogTime(float(log_time))
        return cls(rule, rule.goal, float(s), NO_STEP_COUNT)

    @property
    def watched(self) -> bool:
        """Whether only looking after each step can tell that the rule is met."""
        return math.isinf(self.clock) and self.steps == NO_STEP_COUNT


def out_of_steps(max_steps: int, rule: AbstractRule) -> End:
    """The budget of steps is used."""
    return End(
        "max_steps",
        f"{max_steps} steps were tried before {rule!r} was reached; raise `max_steps`, or loosen "
        "`rtol`",
    )
