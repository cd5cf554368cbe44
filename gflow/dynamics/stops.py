"""Stopping rules, the same for flow and descent: ``until=LogRisk(-1e6) | Time(1e9)``.

A rule watches one coordinate of the trajectory. To compare and to space saved points every rule
maps its coordinate to a *progress* that increases along the run and in which an even grid is a
sensible one (roughly the logarithm of the coordinate).
"""

import math
import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from gflow.dynamics.clocks import AbstractClock
from gflow.problem import observables
from gflow.problem.abstract_targets import targets_of
from gflow.problem.arguments import is_number, numbers_of, shown, whole
from gflow.problem.array import Array, as_array
from gflow.problem.deep_linear import end_to_end
from gflow.problem.logarithms import log_expm1
from gflow.problem.module import Module
from gflow.problem.risk import Problem
from gflow.problem.target_observables import Modes, padded_targets
from gflow.problem.weights import Weights
from gflow.quantities import quantity

LARGE = 10.0
"""A log risk to fall to that is likely to have the wrong sign."""

LEAST = 1e-300
"""A variable that tends to zero is followed down to this."""


class Coordinates(NamedTuple):
    """Where a trajectory stands: what stopping rules look at."""

    log_risk: Array
    log_time: Array
    num_steps: Array
    small: Mapping[str, Array]
    """The variables that rules watch beside these, by name."""


class AbstractRule(Module):
    """One stopping condition; join several with ``|``: whichever comes first."""

    value: eqx.AbstractVar[float]
    variable: ClassVar[str | None] = None
    """The variable of the record that the rule watches, if it is one."""

    def __or__(self, other: "AbstractRule | AnyOf") -> "AnyOf":
        return AnyOf((self,)) | other

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.value:.12g})"

    @abstractmethod
    def progress(self, at: Coordinates) -> Array:
        """The rule's increasing coordinate at a point of the trajectory; pure JAX."""

    @abstractmethod
    def progress_of(self, value: np.ndarray) -> np.ndarray:
        """The increasing coordinate of values given in the rule's own coordinate."""

    def on(self, problem: Problem) -> "AbstractRule":
        """The rule with all that it needs to know of a problem."""
        return self

    def in_steps(self, steps_an_epoch: int | None) -> "AbstractRule":
        """The rule, told how many steps of descent an epoch has; a flow has none.

        Raises:
            ValueError: when it counts epochs and there are none.
        """
        return self

    def measure(self, problem: Problem, weights: Weights) -> Array:
        """The ``variable`` at given weights, the worst of several; pure JAX."""
        raise NotImplementedError(f"{type(self).__name__} watches no variable")

    def rounded(self, progress: np.ndarray) -> np.ndarray:
        """The progress nearest to each that a run can stop at."""
        return progress

    @property
    def doubt(self) -> str | None:
        """Why this is hardly what was meant, if there is a reason to think so."""
        return None

    @property
    def goal(self) -> float:
        """The progress at which the rule is met."""
        return float(self.progress_of(np.array([self.value], dtype=np.float64))[0])

    def clock_value(self, progress: np.ndarray, clock: AbstractClock) -> np.ndarray | None:
        """The clock's value at given values of the progress; None if it cannot know it."""
        return None

    def steps_at(self, progress: np.ndarray) -> np.ndarray | None:
        """The numbers of steps at given values of the progress, for a rule that counts them."""
        return None

    @property
    def of_time(self) -> bool:
        """Whether the rule's coordinate is a time."""
        return False

    @property
    def of_risk(self) -> bool:
        """Whether the rule's coordinate is the risk."""
        return False


class LogRisk(AbstractRule):
    r"""Stop when $\log R$ has fallen to ``value`` (natural logarithm of the mean loss)."""

    value: float

    def __init__(self, value: float):
        self.value = _finite("LogRisk", value)

    @property
    def doubt(self) -> str | None:
        if self.value < LARGE:
            return None
        return (
            f"hardly any run begins above the risk exp({self.value:g}). Small risks have negative "
            f"logarithms: is it LogRisk({-self.value:g})?"
        )

    def progress(self, at: Coordinates) -> Array:
        return jnp.arcsinh(-at.log_risk)

    def progress_of(self, value: np.ndarray) -> np.ndarray:
        return np.arcsinh(-value)

    def clock_value(self, progress: np.ndarray, clock: AbstractClock) -> np.ndarray | None:
        return clock.at_log_risk(-np.sinh(progress))

    @property
    def of_risk(self) -> bool:
        return True


class LogTime(AbstractRule):
    r"""Stop when $\log t$ has reached ``value``; descent's time is the sum of its steps."""

    value: float

    def __init__(self, value: float):
        self.value = _finite("LogTime", value)

    def progress(self, at: Coordinates) -> Array:
        return jnp.logaddexp(0.0, at.log_time)

    def progress_of(self, value: np.ndarray) -> np.ndarray:
        return np.logaddexp(0.0, value)

    def clock_value(self, progress: np.ndarray, clock: AbstractClock) -> np.ndarray | None:
        return clock.at_log_time(log_expm1(np.maximum(progress, 0.0)))

    @property
    def of_time(self) -> bool:
        return True


class Time(AbstractRule):
    r"""Stop when the time $t$ of $\dot W = -\nabla R$ has reached ``value`` > 0."""

    value: float

    def __init__(self, value: float):
        self.value = _finite("Time", value)
        if self.value <= 0:
            raise ValueError(f"`Time({value})`: expected a positive time; the run starts at 0.")

    def progress(self, at: Coordinates) -> Array:
        return jnp.logaddexp(0.0, at.log_time)

    def progress_of(self, value: np.ndarray) -> np.ndarray:
        return np.log1p(value)

    def clock_value(self, progress: np.ndarray, clock: AbstractClock) -> np.ndarray | None:
        return clock.at_log_time(log_expm1(np.maximum(progress, 0.0)))

    @property
    def of_time(self) -> bool:
        return True


class Steps(AbstractRule):
    """Stop after ``value`` steps: descent's iterations, the flow's accepted solver steps."""

    value: int

    def __init__(self, value: int):
        if not whole(value) or value < 1:
            raise ValueError(f"`Steps({shown(value)})`: expected a positive whole number of steps.")
        self.value = int(value)

    def progress(self, at: Coordinates) -> Array:
        return jnp.log1p(jnp.astype(at.num_steps, at.log_risk.dtype))

    def progress_of(self, value: np.ndarray) -> np.ndarray:
        return np.log1p(value)

    def rounded(self, progress: np.ndarray) -> np.ndarray:
        return np.log1p(np.rint(np.expm1(progress)))

    def steps_at(self, progress: np.ndarray) -> np.ndarray:
        counts = np.ceil(np.expm1(progress) * (1 - 1e-12) - 1e-9)
        return np.minimum(counts, self.value).astype(np.int64)


class Epochs(AbstractRule):
    r"""Stop after ``value`` epochs of descent; half of one is 0.5.

    An epoch is one pass through the mini-batches, $\lfloor n/\text{batch size}\rfloor$ steps;
    without mini-batches it is one step. Saved points are evenly spaced in epochs.

    Args:
        value: positive.
        steps_an_epoch: is told by the run.
    """

    value: float
    steps_an_epoch: int | None = eqx.field(static=True)

    def __init__(self, value: float, steps_an_epoch: int | None = None):
        self.value, self.steps_an_epoch = _positive("Epochs", value), steps_an_epoch

    def in_steps(self, steps_an_epoch: int | None) -> "Epochs":
        if steps_an_epoch is None:
            raise ValueError(
                f"`until` holds {self!r}, and a flow has no epochs; expected another rule, as "
                "Time(t): a step of descent takes as much time as it is long."
            )
        return Epochs(self.value, steps_an_epoch)

    def progress(self, at: Coordinates) -> Array:
        return jnp.astype(at.num_steps, at.log_risk.dtype) / self._steps

    def progress_of(self, value: np.ndarray) -> np.ndarray:
        return np.asarray(value, dtype=np.float64)

    def rounded(self, progress: np.ndarray) -> np.ndarray:
        return np.rint(progress * self._steps) / self._steps

    def steps_at(self, progress: np.ndarray) -> np.ndarray:
        last = max(1, math.ceil(self.value * self._steps * (1 - 1e-12)))
        counts = np.ceil(progress * self._steps * (1 - 1e-12))
        return np.clip(counts, 1, last).astype(np.int64)

    @property
    def _steps(self) -> int:
        assert self.steps_an_epoch is not None  # a rule of a run has been told
        return self.steps_an_epoch


class AbstractVanishing(AbstractRule):
    """Stop when a variable that tends to zero is at most ``value``.

    While the variable is undefined, as misalignment is in a tie, there is no progress.
    """

    variable: ClassVar[str]

    def progress(self, at: Coordinates) -> Array:
        found = at.small[self.variable]
        return jnp.where(jnp.isnan(found), -jnp.inf, -jnp.log(jnp.maximum(found, LEAST)))

    def progress_of(self, value: np.ndarray) -> np.ndarray:
        return -np.log(value)


class Misalignment(AbstractVanishing):
    r"""Stop when $1 - |\langle v_{k+1}, u_k\rangle|$ is at most ``value`` for every pair."""

    value: float
    variable = "misalignment"

    def __init__(self, value: float):
        self.value = _finite("Misalignment", value)
        if not 0 < self.value < 1:
            raise ValueError(f"`Misalignment({value})`: expected a number between 0 and 1.")

    def measure(self, problem: Problem, weights: Weights) -> Array:
        return observables.largest_misalignment(weights)


class MarginGap(AbstractVanishing):
    r"""Stop when $\gamma - \min_i q_i/\lVert w\rVert$ is at most ``value``.

    On weights the gap is known to about 1e-16; in split coordinates, beyond log R = -1e6, to its
    own size.
    """

    value: float
    reference: observables.Reference | None
    variable = "margin_gap"

    def __init__(self, value: float):
        self.value, self.reference = _positive("MarginGap", value), None

    def on(self, problem: Problem) -> "MarginGap":
        reference = observables.Reference.of(problem.data.max_margin(), problem, ())
        return eqx.tree_at(
            lambda rule: rule.reference, self, reference, is_leaf=lambda leaf: leaf is None
        )

    def measure(self, problem: Problem, weights: Weights) -> Array:
        assert self.reference is not None
        return observables.margin_gap(problem, weights, self.reference)


class KKT(AbstractVanishing):
    r"""Stop when Lyu and Li's residual $\varepsilon$ of the KKT conditions is at most ``value``.

    See ``gflow.observables.kkt_residual``.
    """

    value: float
    variable = "kkt_residual"

    def __init__(self, value: float):
        self.value = _positive("KKT", value)

    def measure(self, problem: Problem, weights: Weights) -> Array:
        return observables.kkt_residual(problem, weights)


class Saddle(AbstractRule):
    r"""Stop when the flow has passed its n-th saddle: when mode n has half of what it tends to.

    From a small start a deep linear network learns the modes of the square loss one after the other
    and stands still near a saddle before each; the first is the origin. Modes are the singular
    values of the end-to-end matrix as the data see it (``mode_values``), and half of their targets
    (``mode_targets``) is where Saxe's sigmoids are steepest. Of measurements, whose solution is not
    known before, the matrix of least norm says what counts: see ``modes_learnt``.

    With ``save=[1, 2, 3]`` a run lands on every saddle's end; an even grid (``save=100``) is one in
    the logarithm of the mode that is growing, so that there are no points on plateaus.

    References:
        Saxe, McClelland and Ganguli, arXiv 1312.6120; Jacot, Ged, Simsek, Hongler and Gabriel,
        "Saddle-to-saddle dynamics in deep linear networks", arXiv 2106.15933.
    """

    value: float
    modes: Modes | None
    variable: ClassVar[str] = "modes_learnt"

    def __init__(self, value: int):
        if not whole(value) or value < 1:
            raise ValueError(f"`Saddle({shown(value)})`: expected a whole number from 1 on.")
        self.value, self.modes = float(value), None

    def on(self, problem: Problem) -> "Saddle":
        targets = padded_targets(targets_of(problem.data))
        rank = int(np.count_nonzero(targets))
        if self.value > rank:
            raise ValueError(
                f"`until` holds {self!r}, and the data have {rank} mode{'s' * (rank != 1)} to "
                f"learn; expected at most Saddle({rank})."
            )
        modes = Modes.of(targets_of(problem.data))
        return eqx.tree_at(lambda rule: rule.modes, self, modes, is_leaf=lambda leaf: leaf is None)

    def measure(self, problem: Problem, weights: Weights) -> Array:
        assert self.modes is not None
        matrix = end_to_end(problem.network.layers(weights))  # pyright: ignore
        shape = self.modes.targets.shape[0], self.modes.through.shape[1]
        return self.modes.learnt(self.modes.strengths(jnp.reshape(matrix, shape)))

    def progress(self, at: Coordinates) -> Array:
        return at.small[self.variable]

    def progress_of(self, value: np.ndarray) -> np.ndarray:
        return np.asarray(value, dtype=np.float64)


class AnyOf(Module):
    """Several rules, of which the first that is met stops the run. Built with ``|``.

    The first rule written is the leading one: saved points are spaced in its coordinate.
    """

    rules: tuple[AbstractRule, ...]

    def __or__(self, other: "AbstractRule | AnyOf") -> "AnyOf":
        if not isinstance(other, AbstractRule | AnyOf):
            return NotImplemented
        return AnyOf(self.rules + (other.rules if isinstance(other, AnyOf) else (other,)))


def as_rules(until: AbstractRule | AnyOf) -> tuple[AbstractRule, ...]:
    """The rules joined in ``until``, the leading one first."""
    if isinstance(until, AbstractRule | AnyOf):
        rules = until.rules if isinstance(until, AnyOf) else (until,)
        for rule in rules:
            if rule.doubt:
                warnings.warn(f"`until` holds {rule!r}: {rule.doubt}", UserWarning, stacklevel=3)
        return rules
    raise ValueError(
        f"`until` is {until!r}; expected a stopping rule: gflow.LogRisk(v), Time(t), LogTime(v), "
        "Steps(k), Epochs(e), Misalignment(v), MarginGap(v), KKT(v) or Saddle(n), joined with | if "
        "there are several."
    )


def rules_on(
    problem: Problem,
    weights: Weights,
    until: AbstractRule | AnyOf,
    steps_an_epoch: int | None = None,
) -> tuple[AbstractRule, ...]:
    """The rules joined in ``until``, ready for a problem; the leading one first.

    Args:
        problem, weights: where the run begins.
        until: the rules.
        steps_an_epoch: of descent; None for a flow.

    Raises:
        ValueError: when one watches a variable that the problem does not have, or counts epochs of
            a flow.
    """
    rules = tuple(rule.in_steps(steps_an_epoch) for rule in as_rules(until))
    for rule in rules:
        if rule.variable is not None:
            needs = quantity(rule.variable).needs
            problem.expect_needs(f"`until` holds {rule!r}", needs, weights)
    return tuple(rule.on(problem) for rule in rules)


def watched(
    rules: tuple[AbstractRule, ...], problem: Problem, weights: Weights
) -> dict[str, Array]:
    """The variables that some rule watches; what no rule needs is not computed."""
    return {
        rule.variable: rule.measure(problem, weights) for rule in rules if rule.variable is not None
    }


def progress_of(
    rules: Sequence[AbstractRule],
    problem: Problem,
    weights: Weights,
    log_risk: Any,
    scaled_time: Any,
    steps: int,
) -> list[float]:
    """How far a run at weights, log R, u = tR and a count is in each rule's coordinate."""
    with np.errstate(divide="ignore"):
        log_time = np.log(np.asarray(scaled_time)) - np.asarray(log_risk)
    weights = problem.network.placed(weights)
    small = {
        rule.variable: _measured(anonymous(rule), problem, weights)
        for rule in rules
        if rule.variable
    }
    at = Coordinates(
        as_array(np.asarray(log_risk)), as_array(log_time), as_array(np.int64(steps)), small
    )
    return [float(rule.progress(at)) for rule in rules]


@eqx.filter_jit
def _measured(rule: AbstractRule, problem: Problem, weights: Weights) -> Array:
    return rule.measure(problem, weights)


def anonymous(rule: AbstractRule) -> AbstractRule:
    """The rule without its value, so that another value is not another program to compile."""
    return eqx.tree_at(lambda rule: rule.value, rule, 0.0)


def save_grid(
    rule: AbstractRule, start: float, save: int | Sequence[float] | np.ndarray
) -> np.ndarray:
    """The progress of the points to save after the start, increasing, the rule's goal last.

    Args:
        rule: the leading stopping rule.
        start: the progress at the start of the run.
        save: the number of points in all, both ends counted, spaced evenly in progress; or an
            array of values of the rule's own coordinate.
    """
    goal = rule.goal
    if np.ndim(save) == 0:
        count = int(save) if whole(save) else 0  # pyright: ignore
        if count < 2:
            raise ValueError(
                f"`save` is {save!r}; expected at least 2 points (both ends are always saved), or "
                "an array of values of the stopping rule's coordinate."
            )
        if not math.isfinite(start):
            start = goal - count  # the variable is undefined there
        grid = rule.rounded(np.linspace(start, goal, count))
        return np.append(np.unique(grid[(grid > start) & (grid < goal)]), goal)
    values = numbers_of("save", save)
    if values.ndim != 1 or not np.all(np.isfinite(values)):
        raise ValueError(
            f"`save` has shape {values.shape} or entries that are not finite; expected a 1-d "
            f"array of values of {type(rule).__name__}."
        )
    grid = rule.progress_of(values)
    if np.any(np.diff(grid) <= 0):
        raise ValueError(
            f"`save` is not strictly ordered along the run; expected values of "
            f"{type(rule).__name__} from the start towards {rule.value}."
        )
    inside = grid[(grid > start) & (grid < goal)]
    if np.any(grid > goal + 1e-12 * max(1.0, abs(goal))):
        raise ValueError(
            f"`save` goes beyond the stopping rule {type(rule).__name__}({rule.value}); expected "
            "values between the start and the end of the run."
        )
    return np.append(inside, goal)


def _finite(name: str, value: float) -> float:
    if not is_number(value) or not math.isfinite(value):
        raise ValueError(f"`{name}({shown(value)})`: expected a finite number.")
    return float(value)


def _positive(name: str, value: float) -> float:
    value = _finite(name, value)
    if not value > 0:
        raise ValueError(f"`{name}({value})`: expected a positive number.")
    return value
