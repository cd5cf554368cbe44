r"""A problem is data × network × loss; its risk lives in the log domain.

With margins $q_i = y_i f(W; x_i)$ ($\langle w, z_i\rangle$ for a linear network) the
risk is the MEAN loss $R = \frac1n\sum_i \ell(q_i)$; with K classes there are K - 1 margins a point
(``design.py``) and $\ell$ is of all of a point's. It underflows within the first moments
of an interesting run, so neither it nor its gradient is ever formed:

$$\log R = \operatorname{LSE}_i \log\ell(q_i) - \log n, \qquad
g = \nabla\log R = -\sum_i s_i \nabla q_i, \qquad
s_i = \frac{-\ell'(q_i)}{\sum_j \ell(q_j)}.$$
"""

import functools
import math
import warnings
from collections.abc import Collection, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from gflow.problem import settings
from gflow.problem.abstract_data import AbstractData
from gflow.problem.arguments import expect, flag
from gflow.problem.array import Array
from gflow.problem.deep_linear import DeepLinear
from gflow.problem.design import AbstractDesign
from gflow.problem.losses import Logistic
from gflow.problem.memo import once_per_object
from gflow.problem.module import Module
from gflow.problem.network import AbstractNetwork
from gflow.problem.sharding import by_rows, mesh_of
from gflow.problem.soft_margin import CrossEntropy
from gflow.problem.squared import Squared
from gflow.problem.terms import AbstractJointLoss
from gflow.problem.weights import Weights
from gflow.programs import FEW, ONCE, by_size

ROUND_OFF = 1e-13
"""By how much the log risk of a zero product may differ from log l(0) without being above it."""

DEFAULTS: dict[str, AbstractJointLoss] = {
    "one output": Logistic(),
    "classes": CrossEntropy(),
    "targets": Squared(),
}
"""The loss for what data offer."""

OF_DATA = {
    "margins": "margins of labels",
    "one output": "one output",
    "classes": "several classes",
    "targets": "targets",
    "outputs": "classes or targets",
}
"""What may be asked of data, in words."""

OTHER = " Choose another rule, as LogRisk or Time."


class Problem(Module):
    """What is to be learnt: ``Problem(data, network=DeepLinear(), loss=Logistic())``.

    For several classes the loss is ``CrossEntropy()`` by default, for targets ``Squared()``.

    All methods are pure JAX functions of the weights: ``jit``, ``vmap`` and ``grad`` them freely.
    They compute in the precision of their input; the accuracy that gflow states holds in float64
    (run them inside ``jax.enable_x64(True)``, as the two verbs do for themselves).
    """

    data: AbstractData
    network: AbstractNetwork
    loss: AbstractJointLoss
    design: AbstractDesign | None

    def __init__(
        self,
        data: AbstractData,
        network: AbstractNetwork | None = None,
        loss: AbstractJointLoss | None = None,
    ):
        expect("data", data, AbstractData, "a gflow Dataset, as `gflow.Dataset(inputs, labels)`")
        self.data = data
        self.network = DeepLinear() if network is None else network
        expect("network", self.network, AbstractNetwork, "a network, as `gflow.DeepLinear()`")
        self.network = self.network.on(data)
        if loss is None:
            loss = next(found for offer, found in DEFAULTS.items() if offer in data.offers)
        expect("loss", loss, AbstractJointLoss, "a loss, as `gflow.Logistic()`")
        self.loss = loss.on(data)
        self.design = self.network.design(self.data)

    def sharded(
        self,
        devices: Sequence[Any] | None = None,
        *,
        points: bool = True,
        weights: bool = False,
    ) -> "Problem":
        """The same problem with points, weights or both spread over devices.

        Points: margins, losses and sums over points are computed where the points are, and what
        they give, a vector as long as an input, is added up. Weights: each layer is cut along its
        longer axis, the rows if both are alike, and so is all that a solver keeps of it; products
        of a layer with a vector are computed in parts. Results are those of one device up to the
        order in which sums are taken.

        Args:
            devices: by default all of this process; or those of several processes that make the
                same calls (``jax.devices()`` after ``jax.distributed.initialize``).
            points: whether to spread the points.
            weights: whether to spread the weights, of flows.

        Raises:
            ValueError: when the devices cannot have equally many points each, the network is not
                deep linear, or nothing is to be spread. For weights that cannot be spread the flow
                raises it.
        """
        flag("points", points)
        flag("weights", weights)
        mesh = mesh_of(devices)
        if not (points or weights):
            raise ValueError("`points` and `weights` are false; expected one of them at least.")
        spread = self.network.over(mesh) if weights else self.network
        if self.design is None or spread is None:
            raise ValueError(
                f"`problem` has a {type(self.network).__name__}; expected a DeepLinear network: "
                "only its points and weights can be spread over devices."
            )
        if points and self.data.num_points % mesh.size:
            raise ValueError(
                f"`devices` are {mesh.size} and there are {self.data.num_points} points; expected "
                "equally many on each. Choose fewer devices, leave points out, or spread only the "
                "weights: `points=False, weights=True`."
            )
        shared = self
        if points:
            with settings.own():  # every array of a design has the points on its first axis
                shared = eqx.tree_at(lambda p: p.design, shared, by_rows(self.design, mesh))
        return eqx.tree_at(lambda p: p.network, shared, spread)

    def in_precision(self, precision: str) -> "Problem":
        """The same problem with all its numbers of a type, "float64" or "float32".

        What it is asked at weights of that type it computes in that type.
        """

        def converted(leaf: Any) -> Any:
            return leaf.astype(precision) if eqx.is_inexact_array(leaf) else leaf

        return self if self.precision == precision else jax.tree.map(converted, self)

    @property
    def precision(self) -> str:
        """The type of the problem's numbers: "float64" unless it was made another."""
        return str(self.data.inputs.dtype)

    def margins(self, weights: Weights) -> Array:
        """The unnormalised margins $q_i = y_i f(W; x_i)$, shape (points,).

        Of K classes $f_{y_i} - f_k$, shape (points · (K - 1),): of each point those against the
        other classes in order. Of targets the outputs, shape (points · K,).
        """
        return self.spread(self.network.coordinates(weights, self.data))

    def log_risk(self, weights: Weights) -> Array:
        r"""$\log R(W)$, natural logarithm of the mean loss."""
        return self.loss.terms(self.margins(weights)).log_risk

    def log_risk_and_gradient(self, weights: Weights) -> tuple[Array, Weights]:
        r"""$\log R$ and $g = \nabla \log R$, the latter shaped as the weights."""
        log_risk, gradient, _ = self.log_risk_gradient_and_norm(weights)
        return log_risk, gradient

    def log_risk_gradient_and_norm(self, weights: Weights) -> tuple[Array, Weights, Array]:
        r"""$\log R$, $g = \nabla\log R$ and $\lVert g\rVert^2$."""
        coordinates, pull = self.network.pullback(weights, self.data)
        log_risk, slopes, _ = self.loss.terms(self.spread(coordinates))
        gradient, squared_norm = pull(-self.gather(slopes))
        return log_risk, gradient, squared_norm

    def expect_needs(self, where: str, needs: Collection[str], weights: Weights) -> None:
        """Refuse what asks for more than this problem has, as a variable of a record may.

        Args:
            where: what asks, in words.
            needs: some of "layers" (a network that is a product of matrices), "reference" (a
                maximum-margin direction), "homogeneity" (of a known degree), "one output" (labels
                -1 and +1), "classes", "margins" (either of these two), "targets" and "outputs"
                (classes or targets).
            weights: of the network.

        Raises:
            ValueError: that says what is missing.
        """
        kind, data = type(self.network).__name__, self.data
        for need, words in OF_DATA.items():
            if need in needs and need not in data.offers:
                raise ValueError(f"{where}, which is of {words}; the data have {data.kind}.{OTHER}")
        if "layers" in needs and self.network.layers(weights) is None:
            raise ValueError(
                f"{where}, which looks at the layers of a product of matrices; `problem` has a "
                f"{kind}, which is none. Choose another rule, or a DeepLinear network."
            )
        if "homogeneity" in needs and self.network.degree(weights) is None:
            raise ValueError(
                f"{where}, which needs a homogeneous network; `problem` has a {kind} of no known "
                "degree. Say it: Network(apply, homogeneity=L)."
            )
        if "reference" in needs and not (solution := self.data.max_margin()).separable:
            raise ValueError(
                f"{where}, but {solution.verdict}: there is no maximum margin to approach. Choose "
                "another rule."
            )

    def log_risk_at_zero(self) -> Array:
        r"""$\log R(0) = \log\ell(0)$, the level of the paper's assumption on the start."""
        return self.loss.log_risk_at_zero(self.data.num_points)

    @property
    def num_margins(self) -> int:
        """The number of margins: the points, times K - 1 for K classes or K for K targets."""
        return self.data.num_margins

    @property
    def num_coordinates(self) -> int:
        """The number m of coordinates that the implicit solver works in."""
        if self.design is None:
            return self.num_margins
        margins, coordinates = self.design.shape
        return min(margins, coordinates)

    def spread(self, coordinates: Array) -> Array:
        """$A c$: from the network's coordinates to the margins, along the last axis."""
        return coordinates if self.design is None else self.design.spread(coordinates)

    def gather(self, slopes: Array) -> Array:
        r"""$A^\top s$: from covectors on the margins to those on the coordinates, likewise."""
        return slopes if self.design is None else self.design.gather(slopes)

    def _largest_slope(self, weights: Weights) -> float:
        """The largest entry of the gradient of log R."""
        _, gradient = self.log_risk_and_gradient(weights)
        return max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(gradient))

    def check(self, weights: Weights) -> Weights:
        """``weights`` in the problem's precision, validated.

        Warns where the paper's assumption fails.

        Raises:
            ValueError: when the weights do not fit the data or the gradient vanishes there.
        """
        weights = self.network.check(weights, self.data)
        weights = jax.tree.map(lambda leaf: leaf.astype(self.precision), weights)
        with settings.own():
            log_risk, norm = (float(value) for value in risk_and_slope(self, weights))
            at_zero = level_at_zero(self)
            largest = self._largest_slope(weights) if norm == 0.0 else math.inf
        if log_risk == -math.inf:
            raise ValueError(
                "`weights` give R = 0: every output is its target, and there is nothing to follow. "
                "Start from other weights."
            )
        if not np.isfinite(log_risk):
            raise ValueError(
                f"`weights` give log R = {log_risk}; expected a finite risk. The margins overflow: "
                "start from smaller weights."
            )
        if norm == 0.0 and not (self.loss.attained and largest > 0.0):
            if largest > 0.0:
                raise ValueError(
                    f"`weights` have a gradient of log R of size {largest:.2g}, whose square "
                    "is below the range of float64; start from larger weights, or scale the data "
                    "(`data.scaled()`)."
                )
            raise ValueError(
                "`weights` have zero gradient: the start is a saddle of the risk and gradient flow "
                "stays there for ever. Start from weights whose product or gradient is not zero "
                "(at most one layer may vanish)."
            )
        # Of a network without a degree zero weights need not give zero margins, of one with kinks
        # the paper says nothing, and of degree one there is no saddle.
        special = not self.loss.attained and self.network.degree(weights) not in (None, 1)
        special = special and self.network.kinks(weights, self.data) is None
        if special and log_risk > at_zero + ROUND_OFF:
            warnings.warn(
                f"R(W(0)) = exp({log_risk:.6g}) exceeds R(0) = exp({at_zero:.6g}), so the "
                "assumption of Ji and Telgarsky on the start fails: the flow may end at a saddle "
                "instead of reaching zero risk. `gflow.init.admissible` repairs a start.",
                UserWarning,
                stacklevel=3,
            )
        return weights


@once_per_object  # an ensemble asks for every member
def level_at_zero(problem: Problem) -> float:
    r"""$\log R(0)$ as a number."""
    with settings.own():
        return float(problem.log_risk_at_zero())


def risk_and_slope(problem: Problem, weights: Weights) -> tuple[Array, Array]:
    r"""$\log R$ and $\lVert\nabla\log R\rVert^2$, compiled."""
    few = is_small(problem, weights)
    return _risk_and_slope(problem, problem.network.placed(weights), few=few)


def has_few_margins(problem: Problem) -> bool:
    """Whether the margins are no more than ``FEW``."""
    return problem.data.num_margins <= FEW


def is_small(problem: Problem, weights: Weights) -> bool:
    """Whether neither the margins nor the entries of any array of weights are more than ``FEW``."""
    return max(problem.num_margins, *map(np.size, jax.tree.leaves(weights))) <= FEW


@functools.partial(by_size, options=ONCE)
def _risk_and_slope(problem: Problem, weights: Weights) -> tuple[Array, Array]:
    log_risk, _, squared_norm = problem.log_risk_gradient_and_norm(weights)
    return log_risk, squared_norm
