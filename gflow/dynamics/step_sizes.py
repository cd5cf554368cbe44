r"""Step-size rules for descent, as optax gradient transformations.

Descent takes any optax optimiser. The rules here are those that optax lacks: they need the risk,
the loss's constants, or gradients too small for float64. Each is an
``optax.GradientTransformationExtraArgs`` that works in an optax loop of one's own as well.

Two families. `paper_steps` moves along $\nabla R$ like any optimiser. The others leave the
underflow range, because they are made by `on_log_risk`: the optimiser inside never sees $R$ but
$\log R$ and $g = \nabla\log R = \nabla R/R$, so a step $-\rho\,g$ is descent on $R$ with the step
size $\eta = \rho/R$. In this form the classical rules are Euler's method in the flow's clocks: a
loss-scaled step ($\rho$ constant) in log-loss time, Polyak's ($\rho = 1/\lVert g\rVert^2$) in the
clock $-\log R$.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from gflow.dynamics.closures import open_function
from gflow.problem.network import Array, DeepLinear, inner_product
from gflow.problem.risk import Problem

Schedule = Callable[[Any], Any]


def on_log_risk(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    r"""The optimiser, minimising $\log R$ instead of $R$: nothing underflows, at any horizon.

    ``gflow.on_log_risk(optax.sgd(0.1, momentum=0.9))`` is normalised descent with momentum,
    ``gflow.on_log_risk(optax.chain(optax.sgd(1.0),
    optax.scale_by_backtracking_linesearch(20)))`` an Armijo search on $\log R$.

    `gradient_descent` provides $\log R$ and its gradient. In a loop of your own pass the gradient
    of $R$ and ``value=`` $R$, which must not have underflowed. Within ``optax.chain`` it comes
    first: what stands before it is ignored by `gradient_descent`.

    Args:
        optimizer: any optax optimiser; one that needs ``value``, ``grad`` and ``value_fn`` is given
            those of $\log R$.
    """
    if not hasattr(optimizer, "init") or not hasattr(optimizer, "update"):
        raise ValueError(
            f"`optimizer` is a {type(optimizer).__name__}; expected an optax optimiser such as "
            "optax.sgd(0.1)."
        )
    return _transformation(OnLogRisk(with_extra_arguments(optimizer)))


def loss_scaled(
    rate: float | Schedule, *, power: float = 0.0
) -> optax.GradientTransformationExtraArgs:
    r"""Loss-scaled descent: $\eta_k = \text{rate}/((k+1)^{\text{power}} R)$ at steps 0, 1, ….

    With ``power=0`` it is the normalised descent of Ji and Telgarsky (arXiv 1906.04540) and the
    loss-based rate of Lyu and Li without its search; ``power=0.5`` is the rule
    $\eta_k \propto 1/(\sqrt k\,R)$ of Nacson et al. (arXiv 1803.01905).

    Args:
        rate: positive, or an optax schedule: a function of the step.
        power: of the decay, non-negative.
    """
    steps = rate if callable(rate) else np.asarray(_positive("rate", rate))
    if not 0 <= power < math.inf:
        raise ValueError(f"`power` is {power}; expected a finite number of at least 0.")
    return _on_log_risk(ScaledGradient(steps, float(power)))


def polyak(scaling: float = 1.0) -> optax.GradientTransformationExtraArgs:
    r"""Polyak's step size with the infimum zero, $\eta = \text{scaling}\,R/\lVert\nabla R\rVert^2$.

    In the log domain the update is $-\text{scaling}\,g/\lVert g\rVert^2$: to first order each step
    multiplies the risk by $e^{-\text{scaling}}$.
    """
    return _on_log_risk(PolyakStep(np.asarray(_positive("scaling", scaling))))


def loss_line_search(
    rate: float = 0.1, *, grow: float = 2**0.2, shrink: float = 2**-0.1
) -> optax.GradientTransformationExtraArgs:
    r"""The loss-based step size with line search of Lyu and Li (arXiv 1906.05890, appendix K).

    $\eta = \alpha/R$. A step that does not decrease the risk is not taken: $\alpha$ is multiplied
    by ``shrink`` and the step tried again; after one that does, it is multiplied by ``grow``.

    Args:
        rate: the first $\alpha$.
        grow: above one.
        shrink: between zero and one.
    """
    if not 1 < grow < math.inf:
        raise ValueError(f"`grow` is {grow}; expected a finite number above 1.")
    if not 0 < shrink < 1:
        raise ValueError(f"`shrink` is {shrink}; expected a number between 0 and 1.")
    return _on_log_risk(LossLineSearch(_positive("rate", rate), float(grow), float(shrink)))


def paper_steps(
    problem: Problem, *, sharper: bool = False
) -> optax.GradientTransformationExtraArgs:
    r"""The step sizes under which the paper proves its theorems for descent (its assumption 5).

    $\eta_t = \min\{1/\beta(r_t), 1\}$ with the smoothness $\beta(r)$ of the risk on the ball
    $B(r) = \{\max_k\lVert W_k\rVert_F \le r\}$ (`ball_smoothness`). The radius is the least that
    keeps every iterate at least one inside the ball and never shrinks,
    $r_t = \max\{r_{t-1}, 1 + \max_k\lVert W_k(t)\rVert_F\}$. A step moves no layer by more than
    one, so both its ends lie in $B(r_t)$ and it decreases the risk by at least
    $\frac{\eta_t}{2}\lVert\nabla R\rVert^2$.

    Args:
        problem: a deep linear network with a loss of bounded slope and curvature (logistic).
        sharper: use the sharper constant of `ball_smoothness`.

    Raises:
        ValueError: for exponential loss, which the paper's assumption 4 excludes, and for networks
            that are not deep linear.
    """
    slope, curvature = _constants(problem)
    return _transformation(PaperSteps(np.asarray(slope), np.asarray(curvature), bool(sharper)))


def ball_smoothness(problem: Problem, depth: int, radius: float, *, sharper: bool = False) -> float:
    r"""A Lipschitz constant of $\nabla R$ on the ball $\max_k\lVert W_k\rVert_F \le$ ``radius``.

    With $L$ layers, $\lvert\ell'\rvert \le G$ and $\ell'' \le \beta$ the paper's lemma 5 has

    $$\beta(r) = 2L^2 r^{2L-2}(\beta + G), \qquad r \ge 1.$$

    The sharper constant is $\beta L r^{2L-2} + G(L-1)r^{L-2}$. Inputs are taken to satisfy
    $\lVert x_i\rVert \le 1$; if the largest norm $\rho$ is more than one, $G\rho$ and
    $\beta\rho^2$ take the places of $G$ and $\beta$.

    The paper's constant step size on the ball of radius r is
    ``optax.sgd(1 / gflow.ball_smoothness(problem, depth, r))``.
    """
    if int(depth) != depth or depth < 1:
        raise ValueError(f"`depth` is {depth}; expected the number of layers.")
    if not 1 <= radius < math.inf:
        raise ValueError(f"`radius` is {radius}; expected at least 1, as lemma 5 does.")
    slope, curvature = _constants(problem)
    return float(_smoothness(slope, curvature, int(depth), radius, sharper))


# From the quadratic form of the Hessian in a direction (D_1, ..., D_L): with w the product of the
# layers, |Dw| <= r^(L-1) sum |D_k| <= sqrt(L) r^(L-1) |D| and
# |D^2 w| <= r^(L-2) sum_{j != k} |D_j| |D_k| <= (L-1) r^(L-2) |D|^2, so
# l'' <z, Dw>^2 + l' <z, D^2 w> <= (beta L r^(2L-2) + G (L-1) r^(L-2)) |D|^2.
def _smoothness(slope: Any, curvature: Any, depth: int, radius: Any, sharper: bool) -> Any:
    if not sharper:
        return 2 * depth**2 * radius ** (2 * depth - 2) * (curvature + slope)
    bent = slope * (depth - 1) * radius ** (depth - 2) if depth > 1 else 0.0
    return curvature * depth * radius ** (2 * depth - 2) + bent


def _constants(problem: Problem) -> tuple[float, float]:
    """Bounds of the first and second derivative of a point's loss along unit vectors."""
    if not isinstance(problem.network, DeepLinear):
        raise ValueError(
            f"`problem` has a {type(problem.network).__name__}; expected a DeepLinear network: the "
            "paper's smoothness constant holds for products of matrices."
        )
    loss = problem.loss
    if not (math.isfinite(loss.slope_bound) and math.isfinite(loss.smoothness)):
        raise ValueError(
            f"`problem` has the {loss.name} loss, with |l'| <= {loss.slope_bound} and l'' <= "
            f"{loss.smoothness}; expected finite bounds (the paper's assumption 4). Use "
            "gflow.Logistic(), or another step size such as gflow.loss_scaled(0.1)."
        )
    largest = max(1.0, float(np.linalg.norm(problem.data.inputs, axis=1).max()))
    return loss.slope_bound * largest, loss.smoothness * largest**2


def with_extra_arguments(
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """The optimiser, taking extra arguments and ignoring them if it knows none.

    As ``optax.with_extra_args_support``, but equal for equal optimisers: nothing is compiled twice.
    """
    if isinstance(optimizer, optax.GradientTransformationExtraArgs):
        return optimizer
    return _transformation(PlainOptimizer(optimizer))


class PlainOptimizer(eqx.Module):
    """An optimiser that ignores extra arguments."""

    inner: optax.GradientTransformation

    def init(self, params: Any) -> Any:
        return self.inner.init(params)

    def update(self, updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        return self.inner.update(updates, state, params)

    def __repr__(self) -> str:
        return describe(self.inner)


def opened(
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """The optimiser with its numbers as arrays, equal for equal calls (see ``closures.py``).

    It cannot be traced if the optimiser decides by its numbers what to do.
    """
    rule = getattr(optimizer.update, "__self__", None)
    if isinstance(rule, OnLogRisk):
        return _transformation(OnLogRisk(opened(rule.inner)))
    if isinstance(rule, PlainOptimizer):
        return opened(rule.inner)
    if isinstance(rule, eqx.Module):  # one of ours
        return with_extra_arguments(optimizer)
    extra = isinstance(optimizer, optax.GradientTransformationExtraArgs)
    functions = open_function(optimizer.init), open_function(optimizer.update)
    return _transformation(OpenOptimizer(*functions, extra))


class OpenOptimizer(eqx.Module):
    """An optimiser whose numbers are leaves."""

    start: Callable
    move: Callable
    extra: bool = eqx.field(static=True)
    """Whether it takes extra arguments."""

    def init(self, params: Any) -> Any:
        return self.start(params)

    def update(self, updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        # Numbers that were weakly typed are not any more.
        with jax.numpy_dtype_promotion("standard"):
            return self.move(updates, state, params, **(extra if self.extra else {}))

    def __repr__(self) -> str:
        return _describe(getattr(self.move, "closed", lambda: self.move)())


class OnLogRisk(eqx.Module):
    """The rule behind `on_log_risk`."""

    inner: optax.GradientTransformationExtraArgs

    def init(self, params: Any) -> Any:
        return self.inner.init(params)

    def update(
        self,
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        value: Any = None,
        value_fn: Callable | None = None,
        log_risk: Any = None,
        log_gradient: Any = None,
        log_risk_fn: Callable | None = None,
        **extra: Any,
    ) -> tuple[Any, Any]:
        if log_gradient is None:
            if value is None:
                raise ValueError(
                    "`value` is missing: an optimiser on log R needs the risk, "
                    "`optimizer.update(gradient, state, weights, value=risk)`."
                )
            log_risk = jnp.log(value)
            log_gradient = jax.tree.map(lambda leaf: leaf / value, updates)
            if value_fn is not None:
                log_risk_fn = _log_of(value_fn)
        given = {"value": log_risk, "grad": log_gradient}
        if log_risk_fn is not None:
            given["value_fn"] = log_risk_fn
        return self.inner.update(log_gradient, state, params, **given)

    def __repr__(self) -> str:
        owner = getattr(self.inner.update, "__self__", None)
        own = owner is not None and not isinstance(owner, PlainOptimizer | OpenOptimizer)
        return repr(owner) if own else f"on_log_risk({describe(self.inner)})"


class ScaledGradient(eqx.Module):
    """Minus the gradient times a rate that may depend on the step: the rule in `loss_scaled`."""

    rate: np.ndarray | Schedule
    power: float

    def init(self, params: Any) -> Array:
        return jnp.zeros((), jnp.int32)

    def update(self, updates: Any, state: Array, params: Any = None, **extra: Any) -> Any:
        rate = self.rate(state) if callable(self.rate) else self.rate

        def scaled(leaf: Array) -> Array:
            factor = -jnp.asarray(rate, leaf.dtype)
            if self.power:
                factor = factor * jnp.asarray(state + 1, leaf.dtype) ** -self.power
            return factor * leaf

        return jax.tree.map(scaled, updates), state + 1

    def __repr__(self) -> str:
        rate = "schedule" if callable(self.rate) else f"{float(self.rate):g}"
        return f"loss_scaled({rate}, power={self.power:g})"


class PolyakStep(eqx.Module):
    r"""$-g/\lVert g\rVert^2$ times a number."""

    scaling: np.ndarray

    def init(self, params: Any) -> tuple[()]:
        return ()

    def update(self, updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        factor = self.scaling / inner_product(updates, updates)
        return jax.tree.map(lambda leaf: -factor * leaf, updates), state

    def __repr__(self) -> str:
        return f"polyak({float(self.scaling):g})"


class LossLineSearch(eqx.Module):
    """The rule in `loss_line_search`; its state is the rate to try first."""

    rate: float
    grow: float
    shrink: float

    def init(self, params: Any) -> Array:
        return jnp.asarray(self.rate, jax.tree.leaves(params)[0].dtype)

    def update(
        self,
        updates: Any,
        state: Array,
        params: Any,
        *,
        value: Array,
        value_fn: Callable,
        **extra: Any,
    ) -> Any:
        smallest = self.rate * 1e-30

        def after(rate: Array) -> Array:
            return value_fn(jax.tree.map(lambda w, g: w - rate * g, params, updates))

        # A risk that is not a number is no decrease either.
        rate, _ = jax.lax.while_loop(
            lambda trial: ~(trial[1] < value) & (trial[0] > smallest),
            lambda trial: (trial[0] * self.shrink, after(trial[0] * self.shrink)),
            (state, after(state)),
        )
        # Out of tries: stand still, and start the next search from the beginning.
        failed = rate <= smallest
        step = jnp.where(failed, 0.0, rate)
        following = jnp.where(failed, self.rate, rate * self.grow)
        return jax.tree.map(lambda leaf: -step * leaf, updates), following

    def __repr__(self) -> str:
        return f"loss_line_search({self.rate:g}, grow={self.grow:.6g}, shrink={self.shrink:.6g})"


class PaperStepsState(NamedTuple):
    """The radius $r_t$ of the ball and the step size taken last."""

    radius: Array
    step_size: Array


class PaperSteps(eqx.Module):
    """The rule behind `paper_steps`."""

    slope: np.ndarray
    curvature: np.ndarray
    sharper: bool

    def init(self, params: Any) -> PaperStepsState:
        zero = jnp.zeros((), jax.tree.leaves(params)[0].dtype)
        return PaperStepsState(zero, zero)

    def update(
        self, updates: Any, state: PaperStepsState, params: Any, **extra: Any
    ) -> tuple[Any, PaperStepsState]:
        layers = jax.tree.leaves(params)
        depth = len(layers)
        largest = jnp.max(jnp.stack([inner_product(layer, layer) for layer in layers]))
        radius = jnp.maximum(state.radius, 1 + jnp.sqrt(largest))
        smoothness = _smoothness(self.slope, self.curvature, depth, radius, self.sharper)
        # A layer's gradient is at most G r^(L-1): for no loss may a step be longer than one.
        smoothness = jnp.maximum(smoothness, self.slope * radius ** (depth - 1))
        step = jnp.minimum(1 / smoothness, 1.0)
        moved = jax.tree.map(lambda leaf: -step * leaf, updates)
        return moved, PaperStepsState(radius, step)

    def __repr__(self) -> str:
        return f"paper_steps(sharper={self.sharper})"


def describe(optimizer: optax.GradientTransformation) -> str:
    """What an optimiser is made of, as far as it can be seen from outside.

    >>> describe(optax.sgd(0.5, momentum=0.9))
    'chain(trace(decay=0.9, nesterov=False), scale(step_size=-0.5))'
    """
    return _describe(optimizer.update)


def _describe(update: Callable) -> str:
    owner = getattr(update, "__self__", None)
    if owner is not None:
        return repr(owner)
    # optax's transformations are closures: their settings and parts are what they close over.
    names: Any = getattr(getattr(update, "__code__", None), "co_freevars", ())
    cells: Any = getattr(update, "__closure__", None) or ()
    parts = []
    for name, cell in zip(names, cells, strict=False):
        value = cell.cell_contents
        if name == "update_fns":
            parts.extend(_describe(part) for part in value)
        elif isinstance(value, float):
            parts.append(f"{name}={value:g}")
        elif isinstance(value, bool | int):
            parts.append(f"{name}={value}")
        elif isinstance(value, optax.GradientTransformation):
            parts.append(describe(value))
        elif "step_size" in name and callable(value):
            parts.append(f"{name}={_head(value)}")
    head = _head(update)
    parts = [part for part in parts if part != "identity"] or parts
    if head in ("with_extra_args_support", "chain") and len(parts) == 1:
        return parts[0]
    return f"{head}({', '.join(parts)})" if parts else head


def _head(function: Callable) -> str:
    return getattr(function, "__qualname__", type(function).__name__).split(".")[0]


def _log_of(value_fn: Callable) -> Callable:
    return lambda params: jnp.log(value_fn(params))


def _on_log_risk(rule: Any) -> optax.GradientTransformationExtraArgs:
    return on_log_risk(_transformation(rule))


def _transformation(rule: Any) -> optax.GradientTransformationExtraArgs:
    # Bound methods of equinox modules are pytrees that compare by value: a rule built twice with
    # the same settings is compiled once, and so are those that differ in an array only.
    return optax.GradientTransformationExtraArgs(rule.init, rule.update)


def _positive(name: str, value: float) -> float:
    value = float(value)
    if not 0 < value < math.inf:
        raise ValueError(f"`{name}` is {value}; expected a positive finite number.")
    return value
