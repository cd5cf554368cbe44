r"""The step sizes under which the paper proves its theorems for descent."""

import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gflow.dynamics.descending.optimizers import transformation
from gflow.problem import settings
from gflow.problem.arguments import A_PROBLEM, between, expect, shown, whole
from gflow.problem.array import Array
from gflow.problem.module import Module
from gflow.problem.risk import Problem
from gflow.problem.weights import inner_product


@settings.own()
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
    return transformation(PaperSteps(np.asarray(slope), np.asarray(curvature), bool(sharper)))


@settings.own()
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
    if not whole(depth) or depth < 1:
        raise ValueError(f"`depth` is {shown(depth)}; expected the number of layers.")
    radius = between("radius", radius, 1, math.inf, "at least 1, as lemma 5 does", ends=True)
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
    expect("problem", problem, Problem, A_PROBLEM)
    if problem.design is None:
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


class PaperStepsState(NamedTuple):
    """The radius $r_t$ of the ball and the step size taken last."""

    radius: Array
    step_size: Array


class PaperSteps(Module):
    """The rule behind `paper_steps`."""

    slope: np.ndarray
    curvature: np.ndarray
    sharper: bool
    along_gradient: ClassVar[bool] = True

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
