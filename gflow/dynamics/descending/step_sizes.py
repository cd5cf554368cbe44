r"""Step-size rules for descent, as optax gradient transformations.

Descent takes any optax optimiser. The rules here are those that optax lacks, for gradients too
small for float64: made by `on_log_risk`, whose optimiser never sees $R$ but $\log R$ and
$g = \nabla\log R = \nabla R/R$, so that a step $-\rho\,g$ is descent on $R$ with the step size
$\eta = \rho/R$. In this form the classical rules are Euler's method in the flow's clocks: a
loss-scaled step ($\rho$ constant) in log-loss time, Polyak's ($\rho = 1/\lVert g\rVert^2$) in the
clock $-\log R$. Each is an ``optax.GradientTransformationExtraArgs`` that works in an optax loop of
one's own as well.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from gflow.dynamics.descending.optimizers import (
    AroundOptimizer,
    OpenOptimizer,
    PlainOptimizer,
    describe,
    transformation,
    with_extra_arguments,
)
from gflow.problem.arguments import between, positive
from gflow.problem.array import Array
from gflow.problem.weights import inner_product

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
    return transformation(OnLogRisk(with_extra_arguments(optimizer)))


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
    steps = rate if callable(rate) else np.asarray(positive("rate", rate))
    power = between("power", power, 0, math.inf, "a finite number of at least 0", ends=True)
    return _on_log_risk(ScaledGradient(steps, float(power)))


def polyak(scaling: float = 1.0) -> optax.GradientTransformationExtraArgs:
    r"""Polyak's step size with the infimum zero, $\eta = \text{scaling}\,R/\lVert\nabla R\rVert^2$.

    In the log domain the update is $-\text{scaling}\,g/\lVert g\rVert^2$: to first order each step
    multiplies the risk by $e^{-\text{scaling}}$.
    """
    return _on_log_risk(PolyakStep(np.asarray(positive("scaling", scaling))))


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
    grow = between("grow", grow, 1, math.inf, "a finite number above 1")
    shrink = between("shrink", shrink, 0, 1, "a number between 0 and 1")
    return _on_log_risk(LossLineSearch(positive("rate", rate), float(grow), float(shrink)))


class OnLogRisk(AroundOptimizer):
    """The rule behind `on_log_risk`."""

    on_log_risk: ClassVar[bool] = True
    """Steps are in log R: divided by R they are those of the time."""

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
    along_gradient: ClassVar[bool] = True

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
    along_gradient: ClassVar[bool] = True

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
    along_gradient: ClassVar[bool] = True

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


def _log_of(value_fn: Callable) -> Callable:
    return lambda params: jnp.log(value_fn(params))


def _on_log_risk(rule: Any) -> optax.GradientTransformationExtraArgs:
    return on_log_risk(transformation(rule))
