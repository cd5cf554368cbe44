r"""Networks: how weights turn a data point into a margin.

Every network offers *coordinates* $c(W) \in \mathbb R^m$ in which the margins are linear,
$q = A\,c(W)$ (``design.py``). For a deep linear network $c = w$, or the contrasts of $W$, so that
no per-example work is ever done; for any other network $c = q$ itself and $A$ is the identity.
Gradients are pulled back through $c$, and an implicit solver needs only the $m \times m$ matrices
that live in these coordinates.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from gflow.problem import settings
from gflow.problem.abstract_data import AbstractData
from gflow.problem.arguments import is_number, shown
from gflow.problem.array import Array
from gflow.problem.convolutions import in_fast_layout
from gflow.problem.design import AbstractDesign
from gflow.problem.kinks import check_branch, holds, is_switch, replay, side_of, traced
from gflow.problem.module import Module
from gflow.problem.weights import Factors, Weights, float_leaves, in_rows, move, squared_norm

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from gflow.problem.bends import AbstractBends
    from gflow.problem.small_start import SmallStart

FEW_POINTS = 8
"""Points on which the degree of a network is tried."""

OFF_DEGREE = 1e-2
"""Relative difference from it: networks may compute in low precision."""

AT_ONCE = 2**20
"""Numbers in the points that a network of any kind is evaluated on at once."""

SWITCHED = 64
"""Points at which it is looked on which side a network is of kinks that gflow does not know."""


class AbstractNetwork(Module):
    """A network, seen through the margins of a data set."""

    @abstractmethod
    def design(self, data: AbstractData) -> AbstractDesign | None:
        """The matrix $A$ (margins, m) with $q = A c$; None stands for the identity."""

    @abstractmethod
    def coordinates(self, weights: Weights, data: AbstractData) -> Array:
        """The coordinates $c(W)$, shape (m,)."""

    @abstractmethod
    def pullback(
        self, weights: Weights, data: AbstractData
    ) -> tuple[Array, Callable[[Array], tuple[Weights, Array]]]:
        r"""The coordinates, and the map from a cotangent to its pullback and squared norm.

        Returns:
            ``c`` and a function taking $\bar c$ (m,) to
            $(G^\top \bar c, \lVert G^\top \bar c\rVert^2)$, $G = \partial c/\partial W$.
        """

    @abstractmethod
    def check(self, weights: Weights, data: AbstractData) -> Weights:
        """``weights`` as float64 NumPy arrays; a ValueError says what does not fit ``data``."""

    def layers(self, weights: Weights) -> tuple[Array, ...] | None:
        """The matrices whose product the network is, from input to output; None if it is none."""
        return None

    def dense_layers(self, weights: Weights) -> tuple[Array, ...] | None:
        """The chain of matrices to be observed as layers, from input to output; None for none.

        What lies between them may be anything. They are entries of the weights and nothing else,
        so that ``dense.py`` can tell where each is kept.
        """
        return self.layers(weights)

    def on(self, data: AbstractData, /) -> "AbstractNetwork":
        """The network with all that it needs to know of a data set.

        Raises:
            ValueError: when it cannot be evaluated on its points.
        """
        return self

    @property
    def mesh(self) -> "Mesh | None":
        """The devices that share the weights, if several do."""
        return None

    def over(self, mesh: "Mesh") -> "AbstractNetwork | None":
        """The network with weights that these devices share; None if they cannot be cut."""
        return None

    def placed(self, weights: Weights) -> Weights:
        """Weights, or what has their shapes, on the devices that share them."""
        return weights

    def degree(self, weights: Weights) -> float | None:
        """The L with $f(aW; x) = a^L f(W; x)$ for a > 0; None where none is known."""
        return None

    def kinks(self, weights: Weights, data: AbstractData) -> "AbstractBends | None":
        """The kinks of the network that are known; None if there are none."""
        return None

    def hidden_kinks(self, weights: Weights, data: AbstractData) -> bool:
        """Whether the network has kinks of which gflow does not know where they are."""
        return False

    def switches(self, weights: Weights, data: AbstractData) -> Array:
        """On which side the network is of each of these, (switches,); pure JAX."""
        return jnp.zeros((0,), bool)

    def branch_side(self) -> int | None:
        """The side of a kink to take where the flow is not unique, 1 or -1; None for neither."""
        return None

    def without_branch(self) -> "AbstractNetwork":
        """The network without that choice, of which no program knows."""
        return self

    def balances(self, weights: Weights) -> Array | None:
        """What the flow conserves for each neuron, one number each; None where none is known."""
        return None

    def small_start(self, weights: Weights, data: AbstractData) -> "SmallStart | None":
        """The margin's limit from a small start; None where no theorem speaks of the network."""
        return None

    # An implicit solver moves along few vectors K_j at all its stages. What follows serves it; a
    # network whose pullback has low rank in every array overrides both, and moves along whole
    # vectors too.

    def no_vectors(self, weights: Weights) -> Factors:
        """No vectors, in the form that :meth:`along` gives them."""
        return Factors.whole(
            in_rows(jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], weights))[:0]
        )

    def along(
        self, weights: Weights, vectors: Factors, coefficients: Array, data: AbstractData
    ) -> tuple[Array, Callable[[Array], Factors]]:
        r"""The network at ``weights + coefficients[i] @ vectors``, one point a stage i.

        Args:
            weights: where the step begins.
            vectors: J vectors.
            coefficients: shape (stages, J).
            data: the points.

        Returns:
            The coordinates c (stages, m), and the map from cotangents (stages, m) to the pullbacks
            $G^\top \bar c$, one vector a stage, as factors if they have them.
        """
        moved = jax.vmap(lambda row: move(weights, vectors, row))(coefficients)
        coordinates, vjp = jax.vjp(
            lambda at: jax.vmap(lambda each: self.coordinates(each, data))(at), moved
        )

        def pull(cotangents: Array) -> Factors:
            return Factors.whole(in_rows(vjp(cotangents)[0]))

        return coordinates, pull


class Network(AbstractNetwork):
    r"""Any network, given by its forward function.

    The margins are $q_i = y_i f(W; x_i)$, for K classes $f_{y_i}(W; x_i) - f_k(W; x_i)$ for all
    $k \ne y_i$, for targets the outputs; per-example gradients are vmapped.

    Args:
        apply: ``apply(weights, x)`` with ``x`` of shape (d,), or of the points' own shape,
            returning a scalar, for K classes or K targets the K outputs, shape (K,); pure JAX.
        homogeneity: the degree $L$ with $f(aW; x) = a^L f(W; x)$ for $a > 0$,
            if there is one; the normalised margin $\min_i q_i/\lVert W\rVert^L$ needs it. It is
            tried at the start.
        layers: ``layers(weights)``, the dense matrices to be observed, from input to output and of
            shape (outputs, inputs) each: entries of the weights, chosen, transposed or cut out.
        branch: where the flow goes from a kink of a ``gflow.relu`` in ``apply`` that is not unique;
            see ``gflow.MLP``.
    """

    apply: Callable[[Any, Array], Array] = eqx.field(static=True)
    homogeneity: float | None = eqx.field(static=True)
    chain: Callable[[Any], Sequence[Array]] | None = eqx.field(static=True)
    branch: str | None = eqx.field(static=True)

    called: ClassVar[str] = "`apply(weights, x)`"
    """What is called, in messages."""

    def __init__(
        self,
        apply: Callable[[Any, Array], Array],
        homogeneity: float | None = None,
        layers: Callable[[Any], Sequence[Array]] | None = None,
        branch: str | None = None,
    ):
        self.apply, self.homogeneity, self.chain = apply, homogeneity, layers
        check_branch(branch)
        self.branch = branch

    def __check_init__(self):
        if not callable(self.apply):
            raise ValueError(
                f"`apply` is {shown(self.apply)}; expected the function `apply(weights, x)`."
            )
        degree = self.homogeneity
        if degree is not None and not (is_number(degree) and 0 < degree < np.inf):
            raise ValueError(
                f"`homogeneity` is {shown(degree)}; expected the degree L > 0 with "
                "f(aW; x) = a^L f(W; x), or None if there is none."
            )
        if self.chain is not None and not callable(self.chain):
            raise ValueError(
                f"`layers` is {shown(self.chain)}; expected the function `layers(weights)` that "
                "gives the dense matrices, or None."
            )

    def design(self, data: AbstractData) -> None:
        return None

    def dense_layers(self, weights: Weights) -> tuple[Array, ...] | None:
        return None if self.chain is None else tuple(self.chain(weights))

    def degree(self, weights: Weights) -> float | None:
        return self.homogeneity

    def coordinates(self, weights: Weights, data: AbstractData) -> Array:
        return data.margins_of(self._outputs(weights, jnp.asarray(data.points)))

    def pullback(
        self, weights: Weights, data: AbstractData
    ) -> tuple[Array, Callable[[Array], tuple[Weights, Array]]]:
        points = jnp.asarray(data.points)
        if points.size <= AT_ONCE:
            outputs, vjp = in_fast_layout(
                lambda weights: jax.vjp(lambda at: self._at_once(at, points), weights)
            )(weights)
            back = in_fast_layout(lambda cotangent: vjp(cotangent)[0])
        else:
            outputs = self._outputs(weights, points)

            def back(cotangent: Array) -> Weights:
                return self._gradient_in_parts(weights, points, cotangent)

        margins, of_outputs = jax.vjp(data.margins_of, outputs)

        def pull(cotangent: Array) -> tuple[Weights, Array]:
            gradient = back(of_outputs(cotangent)[0])
            return gradient, squared_norm(gradient)

        return margins, pull

    def _at_once(self, weights: Weights, points: Array) -> Array:
        # In the type of the points, whatever the network computes in.
        return jax.vmap(lambda x: self.apply(weights, x))(points).astype(points.dtype)

    # What is inside a network may be a hundred times its inputs: of many points some at a time, and
    # in a gradient computed once more instead of kept.
    def _outputs(self, weights: Weights, points: Array) -> Array:
        """The outputs at the points, of many points some at a time."""
        outputs = in_fast_layout(lambda points: self._at_once(weights, points))
        if points.size <= AT_ONCE:
            return outputs(points)
        parts, rest = _in_parts(points)
        found = jax.lax.map(outputs, parts)
        return jnp.concatenate([found.reshape(-1, *found.shape[2:]), outputs(rest)])

    def _gradient_in_parts(self, weights: Weights, points: Array, cotangent: Array) -> Weights:
        """The gradient of the outputs along a cotangent, some points at a time."""

        def of_some(points: Array, cotangent: Array) -> Weights:
            return jax.vjp(lambda at: self._at_once(at, points), weights)[1](cotangent)[0]

        def add(total: Weights, part: tuple[Array, Array]) -> tuple[Weights, None]:
            return jax.tree.map(jnp.add, total, in_fast_layout(of_some)(*part)), None

        (parts, rest), (cotangents, of_rest) = _in_parts(points), _in_parts(cotangent, points)
        return jax.lax.scan(add, in_fast_layout(of_some)(rest, of_rest), (parts, cotangents))[0]

    def branch_side(self) -> int | None:
        return side_of(self.branch)

    def without_branch(self) -> "Network":
        return Network(self.apply, self.homogeneity, self.chain)

    def hidden_kinks(self, weights: Weights, data: AbstractData) -> bool:
        with settings.callers():
            return holds(traced(self.apply, weights, data.points[0]).jaxpr, is_switch)

    def kinks(self, weights: Weights, data: AbstractData) -> "AbstractBends | None":
        from gflow.problem.traced_bends import bends_of  # it builds on this module

        return bends_of(self.apply, weights, data)

    def switches(self, weights: Weights, data: AbstractData) -> Array:
        points = jnp.asarray(data.points)[:SWITCHED]
        program = traced(self.apply, weights, points[0])

        def one(x: Array) -> Array:
            met: list[Array] = []

            def meet(equation: Any, operands: list[Any]) -> Array:
                other = operands[1] if len(operands) == 2 else jnp.zeros_like(operands[0])
                found = equation.primitive.bind(*operands, **equation.params)
                met.append(jnp.broadcast_to(operands[0] > other, found.shape).reshape(-1))
                return found

            replay(program, [*jax.tree.leaves(weights), x], is_switch, meet, loops=False)
            return jnp.concatenate(met) if met else jnp.zeros((0,), bool)

        return jax.vmap(one)(points).reshape(-1)

    def check(self, weights: Weights, data: AbstractData) -> Weights:
        weights = float_leaves("weights", weights)
        for path, leaf in jax.tree_util.tree_leaves_with_path(weights):
            if not np.all(np.isfinite(leaf)):
                raise ValueError(
                    f"`weights{jax.tree_util.keystr(path)}` has NaN or infinite entries; "
                    "expected finite numbers."
                )
        weights = jax.tree.map(lambda leaf: leaf.astype(data.inputs.dtype), weights)
        try:
            out = jax.eval_shape(self.apply, weights, data.points[0])
        except Exception as error:  # whatever it is, it is the network's
            raise ValueError(
                f"{self.called} raises {type(error).__name__}: {str(error).rstrip('.')}. It is "
                f"given the weights and one point `x` of shape {data.points.shape[1:]}, and is "
                "traced by JAX."
            ) from error
        expected = data.output_shape
        if getattr(out, "shape", None) != expected:
            what = f"shape {out.shape}" if hasattr(out, "shape") else f"a {type(out).__name__}"
            way = (
                "one output, shape (), for labels -1 and +1: index or squeeze it. For "
                "several outputs the data have classes: Dataset(inputs, labels, num_classes=K)."
                if "one output" in data.offers
                else f"one output a class, shape {expected}."
                if "classes" in data.offers
                else f"as many outputs as a point has targets, shape {expected}."
            )
            raise ValueError(f"{self.called} returns {what}; expected {way}")
        if not jnp.issubdtype(out.dtype, jnp.floating):
            raise ValueError(
                f"{self.called} returns numbers of type {out.dtype}; expected real ones with a "
                "gradient, float64."
            )
        if self.homogeneity is not None:
            self._check_homogeneity(weights, data)
        return weights

    def _check_homogeneity(self, weights: Weights, data: AbstractData) -> None:
        """Raise where f(2W) = 2^L f(W) does not hold, on a few points."""
        assert self.homogeneity is not None
        few = jnp.asarray(data.points[:FEW_POINTS])
        double = jax.tree.map(lambda leaf: 2 * leaf, weights)
        one, two = (
            np.asarray(jax.vmap(lambda x, at=at: self.apply(at, x))(few), dtype=np.float64)
            for at in (weights, double)
        )
        expected = 2.0**self.homogeneity * one
        worst = np.unravel_index(np.argmax(np.abs(two - expected)), two.shape)
        if not np.all(np.abs(two - expected) <= OFF_DEGREE * (np.abs(two) + np.abs(expected))):
            raise ValueError(
                f"`homogeneity` is {self.homogeneity:g}, but with twice the weights the output is "
                f"{two[worst]:.6g} instead of 2^{self.homogeneity:g} times {one[worst]:.6g}; "
                "expected the degree of the network, or None if it has none, as with biases."
            )


def pullback_by_vjp(
    network: AbstractNetwork, weights: Weights, data: AbstractData
) -> tuple[Array, Callable[[Array], tuple[Weights, Array]]]:
    """What ``AbstractNetwork.pullback`` asks for, by reverse differentiation."""
    coordinates, vjp = jax.vjp(lambda at: network.coordinates(at, data), weights)

    def pull(cotangent: Array) -> tuple[Weights, Array]:
        (gradient,) = vjp(cotangent)
        return gradient, squared_norm(gradient)

    return coordinates, pull


def _in_parts(array: Array, points: Array | None = None) -> tuple[Array, Array]:
    """Parts of equal size, on a leading axis, and the rest of what has points on its first axis.

    Args:
        array: to be cut.
        points: whose size says how many fit into a part; the array itself unless given.
    """
    points = array if points is None else points
    some = max(1, AT_ONCE * len(points) // points.size)
    whole = len(points) // some * some
    return array[:whole].reshape(-1, some, *array.shape[1:]), array[whole:]
