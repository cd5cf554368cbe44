r"""Networks: how weights turn a data point into a margin.

Conventions, said once: ``weights[k]`` has shape ``(widths[k + 1], widths[k])``, ``k = 0`` touches
the input and is the paper's $W_1$. For labels -1 and +1 there is one output, ``widths[-1] == 1``,
and the end-to-end vector of a deep linear network is $w = (W_L \cdots W_1)^\top$; for K classes
there are K outputs, and $W = W_L \cdots W_1$ has shape (K, d).

Every network offers *coordinates* $c(W) \in \mathbb R^m$ in which the margins are linear,
$q = A\,c(W)$ (``design.py``). For a deep linear network $c = w$, or the contrasts of $W$, so that
no per-example work is ever done; for any other network $c = q$ itself and $A$ is the identity.
Gradients are pulled back through $c$, and an implicit solver needs only the $m \times m$ matrices
that live in these coordinates.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, PyTree

from gflow.problem import settings
from gflow.problem.abstract_data import AbstractData
from gflow.problem.arguments import is_number, numbers_of, shown
from gflow.problem.array import Array as Array, as_array as as_array
from gflow.problem.convolutions import in_fast_layout
from gflow.problem.design import AbstractDesign
from gflow.problem.kinks import check_branch, holds, is_switch, replay, side_of, traced
from gflow.problem.module import Module
from gflow.problem.sharding import check_cut, placed

if TYPE_CHECKING:
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

Weights = PyTree[Array]
"""A tuple of layer matrices for a deep linear network, any pytree of arrays for another."""


class Factors(NamedTuple):
    """Vectors of weight space: vector j is ``lefts[k][j].T @ rights[k][j]`` in array k.

    Shapes (vectors, rank, rows) and (vectors, rank, columns), of one rank for all arrays.
    """

    lefts: list[Array]
    rights: list[Array]


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
    # network whose pullback has low rank in every array overrides both.

    def no_vectors(self, weights: Weights) -> Factors:
        """No vectors, in the form that :meth:`along` gives them; an array is a single row."""
        leaves = [jnp.asarray(leaf).reshape(1, -1) for leaf in jax.tree.leaves(weights)]
        nothing = [leaf[:0, None] for leaf in leaves]
        return Factors([leaf[..., :1] for leaf in nothing], nothing)

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
            $G^\top \bar c$, one vector a stage.
        """
        moved = jax.vmap(lambda row: move(weights, vectors, row))(coefficients)
        coordinates, vjp = jax.vjp(
            lambda at: jax.vmap(lambda each: self.coordinates(each, data))(at), moved
        )

        def pull(cotangents: Array) -> Factors:
            leaves = jax.tree.leaves(vjp(cotangents)[0])
            ones = jnp.ones_like(cotangents[:, None, :1])
            rights = [leaf.reshape(len(ones), 1, -1) for leaf in leaves]
            return Factors([ones] * len(leaves), rights)

        return coordinates, pull


class DeepLinear(AbstractNetwork):
    r"""The deep linear network $x \mapsto W_L \cdots W_1 x$ of any widths.

    Its depth and widths are those of the weights it is given. One output for labels -1 and +1, K
    for K classes or K targets.
    """

    mesh: Mesh | None = eqx.field(static=True, default=None, repr=False)
    """Devices that share the weights: ``Problem.sharded``."""

    def placed(self, weights: Weights) -> Weights:
        return weights if self.mesh is None else placed(weights, self.mesh)

    def layers(self, weights: Weights) -> tuple[Array, ...]:
        return tuple(weights)

    def degree(self, weights: Weights) -> float:
        return float(len(weights))

    def design(self, data: AbstractData) -> AbstractDesign:
        return data.design()

    def coordinates(self, weights: Weights, data: AbstractData) -> Array:
        if data.rows is None:
            return left_products(weights)[0]
        return _chain(weights, as_array(data.rows))[0].reshape(-1)

    def pullback(
        self, weights: Weights, data: AbstractData
    ) -> tuple[Array, Callable[[Array], tuple[Weights, Array]]]:
        # With l_k = W_L ... W_{k+1} (a row) and r_k = W_{k-1} ... W_1 cbar (a column) the pullback
        # is the outer product l_k^T r_k^T, of squared norm |l_k|^2 |r_k|^2: vector times matrix
        # only, each matrix read twice and its gradient written once.
        if data.rows is not None:
            return self._pullback_of_rows(weights, data.rows)
        lefts = left_products(weights)

        def pull(cotangent: Array) -> tuple[Weights, Array]:
            right = cotangent
            gradient = []
            squared_norm = jnp.zeros((), cotangent.dtype)
            for left, matrix in zip(lefts[1:], weights, strict=True):
                gradient.append(jnp.outer(left, right))
                squared_norm = squared_norm + jnp.sum(left**2) * jnp.sum(right**2)
                right = matrix @ right
            return tuple(gradient), squared_norm

        return lefts[0], pull

    # The same with q rows P: l_k = P W_L ... W_{k+1}, r_k = Cbar (W_{k-1} ... W_1)^T, both as
    # rows, and the norm |l_k^T r_k|_F^2 = <l_k l_k^T, r_k r_k^T>.
    def _pullback_of_rows(
        self, weights: Weights, rows: np.ndarray
    ) -> tuple[Array, Callable[[Array], tuple[Weights, Array]]]:
        lefts = _chain(weights, as_array(rows))

        def pull(cotangent: Array) -> tuple[Weights, Array]:
            right = cotangent.reshape(lefts[0].shape)
            gradient = []
            squared_norm = jnp.zeros((), cotangent.dtype)
            for left, matrix in zip(lefts[1:], weights, strict=True):
                gradient.append(left.T @ right)
                squared_norm = squared_norm + jnp.sum((left @ left.T) * (right @ right.T))
                right = right @ matrix.T
            return tuple(gradient), squared_norm

        return lefts[0].reshape(-1), pull

    def no_vectors(self, weights: Weights) -> Factors:
        rank = max(1, jnp.shape(weights[-1])[0] - 1)
        layers = [jnp.asarray(matrix) for matrix in weights]
        none = [jnp.zeros((0, rank, 1), matrix.dtype) for matrix in layers]
        pairs = list(zip(none, layers, strict=True))
        return Factors(
            [jnp.repeat(each, matrix.shape[0], 2) for each, matrix in pairs],
            [jnp.repeat(each, matrix.shape[1], 2) for each, matrix in pairs],
        )

    # The pullback of v is (W_L ... W_{k+1})^T (W_{k-1} ... W_1 v)^T in layer k, an outer product;
    # with K outputs it is a sum of several, one a row that margins see. W_0 + sum_j c_j K_j with
    # such K_j is applied to vectors without being formed: all stages of a step share the products
    # with W_0, and the rest costs as little as the vectors.
    def along(
        self, weights: Weights, vectors: Factors, coefficients: Array, data: AbstractData
    ) -> tuple[Array, Callable[[Array], Factors]]:
        layers, stages = list(zip(weights, *vectors, strict=True)), coefficients.shape[0]
        first = np.ones((1, 1)) if data.rows is None else data.rows
        row, rows = (
            jnp.broadcast_to(jnp.asarray(first, coefficients.dtype), (stages, *first.shape)),
            [],
        )
        for matrix, left, right in reversed(layers):
            rows.append(row)
            row = row @ matrix + _combined(coefficients, row, left, right)
        shape = row.shape

        def pull(cotangents: Array) -> Factors:
            column, columns = cotangents.reshape(-1, *shape[1:]), []
            for matrix, left, right in layers:
                columns.append(column)
                column = column @ matrix.T + _combined(coefficients, column, right, left)
            return Factors(rows[::-1], columns)

        return row.reshape(stages, -1), pull

    def check(self, weights: Weights, data: AbstractData) -> Weights:
        weights = check_weights(weights, data.num_outputs, data.rows_in_words)
        if weights[0].shape[1] != data.dim:
            raise ValueError(
                f"`weights[0]` has shape {weights[0].shape}; expected {data.dim} columns, the "
                "dimension of the data's inputs. Weights are ordered from input to output."
            )
        if self.mesh is not None:
            check_cut(weights, self.mesh)
        return weights


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
        return jax.vmap(lambda x: self.apply(weights, x))(points)

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


def float_leaves(argument: str, weights: Weights) -> Weights:
    """Any pytree of weights as float64 NumPy arrays.

    Raises:
        ValueError: that names a leaf which is not to be trained: a function, a setting, an integer.
    """

    def converted(path: Any, leaf: Any) -> np.ndarray:
        where = argument + jax.tree_util.keystr(path)
        try:
            kind = np.asarray(leaf).dtype.kind
        except TypeError:  # a random key
            kind = "O"
        if kind in "fV":
            return numbers_of(where, leaf)
        outside = (
            "Keep the rest out of the weights: `arrays, rest = equinox.partition(model, "
            "equinox.is_inexact_array)`, with `equinox.combine(arrays, rest)` in the network."
        )
        if kind in "iub":
            raise ValueError(
                f"`{where}` is of the type {np.asarray(leaf).dtype}, {shown(leaf)}; expected real "
                f"numbers with a decimal point: every leaf is trained. {outside}"
            )
        raise ValueError(
            f"`{where}` is {shown(leaf)}; expected an array of real numbers: every leaf is "
            f"trained. {outside}"
        )

    return jax.tree_util.tree_map_with_path(converted, weights)


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


def left_products(weights: Weights) -> list[Array]:
    r"""The rows $l_k = W_L \cdots W_{k+1}$ for k = 0 … L; ``l_0`` is $w$, ``l_L`` is [1].

    Evaluated from the output, vector times matrix: 2P flops for P weights.
    """
    return _chain(weights, jnp.ones_like(jnp.asarray(weights[-1])[:, 0]))


def _chain(weights: Weights, first: Array) -> list[Array]:
    r"""The products ``first`` $W_L \cdots W_{k+1}$ for k = 0 … L."""
    rows = [jnp.asarray(first, jnp.result_type(*weights))]
    for matrix in reversed(weights):
        rows.append(rows[-1] @ matrix)
    return rows[::-1]


def _combined(coefficients: Array, rows: Array, first: Array, second: Array) -> Array:
    r"""``rows[i] @ sum_j`` $c_{ij}$ ``first[j].T @ second[j]`` for every stage i.

    Args:
        coefficients: shape (stages, J).
        rows: shape (stages, q, a).
        first: shape (J, r, a).
        second: shape (J, r, b).

    Returns:
        Shape (stages, q, b).
    """
    stages, q, _ = rows.shape
    num, rank, width = first.shape
    parts = rows.reshape(stages * q, width) @ first.reshape(num * rank, width).T
    weighted = coefficients[:, None, :, None] * parts.reshape(stages, q, num, rank)
    found = weighted.reshape(stages * q, num * rank) @ second.reshape(num * rank, second.shape[2])
    return found.reshape(stages, q, second.shape[2])


def end_to_end(weights: Weights) -> Float[Array, "..."]:
    r"""The end-to-end vector $w = (W_L \cdots W_1)^\top$, shape (d,), of a network of one output.

    Of K outputs the matrix $W_L \cdots W_1$, shape (K, d).

    >>> import numpy as np
    >>> end_to_end((np.array([[1.0, 2.0]]), np.array([[3.0]]))).tolist()
    [3.0, 6.0]
    """
    if jnp.shape(weights[-1])[0] == 1:
        return left_products(weights)[0]
    *before, last = weights
    return _chain(before, last)[0] if before else jnp.asarray(last)


def move(weights: Weights, vectors: Factors, coefficients: Array) -> Weights:
    """``weights + coefficients @ vectors``."""
    moves = [combined(coefficients, a, b) for a, b in zip(*vectors, strict=True)]
    return jax.tree.map(jnp.add, weights, shaped(moves, weights))


def combined(coefficients: Array, left: Array, right: Array) -> Array:
    """``coefficients @ vectors`` of the factors in one array, shape (rows, columns)."""
    scaled = coefficients[:, None, None] * left
    return scaled.reshape(-1, left.shape[-1]).T @ right.reshape(-1, right.shape[-1])


def shaped(leaves: list[Array], weights: Weights) -> Weights:
    """The arrays in ``leaves`` as a tree of the weights' structure and shapes."""
    old, structure = jax.tree.flatten(weights)
    shaped = [new.reshape(jnp.shape(leaf)) for new, leaf in zip(leaves, old, strict=True)]
    return jax.tree.unflatten(structure, shaped)


def squared_norm(tree: PyTree[Array]) -> Array:
    """Sum of the squares of all entries of a pytree."""
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree))  # pyright: ignore


def inner_product(a: Weights, b: Weights) -> Array:
    r"""$\langle a, b\rangle$, summed over all arrays of two pytrees of one structure.

    Matrices are reduced by a vector times matrix product: XLA vectorises that on a CPU but not a
    plain sum, which would take longer than the rest of a step of descent.
    """

    def leaf(x: Array, y: Array) -> Array:
        product = x * y
        if product.ndim < 2:
            return jnp.sum(product)
        product = product.reshape(-1, product.shape[-1])
        return jnp.sum(jnp.ones((product.shape[0],), product.dtype) @ product)

    return sum(jax.tree.leaves(jax.tree.map(leaf, a, b)))  # pyright: ignore


def widths(weights: Weights) -> tuple[int, ...]:
    """The widths $(d_0, d_1, …, d_L)$ of a deep linear network; ``depth = len(widths) - 1``."""
    return (weights[0].shape[1], *(matrix.shape[0] for matrix in weights))


def check_weights(
    weights: Sequence[Any], num_outputs: int | None = 1, wanted: str = "one row, of one output"
) -> tuple[np.ndarray, ...]:
    """The layers of a deep linear network as float64 NumPy matrices, validated.

    Args:
        weights: from input to output.
        num_outputs: that they have to have; None for any number.
        wanted: how many rows the last layer has therefore, in words.

    Raises:
        ValueError: when there is no layer, a layer is not a finite matrix, neighbours do not fit,
            or there is another number of outputs.
    """
    if isinstance(weights, np.ndarray | jax.Array) or not isinstance(weights, Sequence):
        raise ValueError(
            f"`weights` is a {type(weights).__name__}; expected a tuple of matrices from input to "
            "output. For one layer write `(matrix,)`."
        )
    if len(weights) == 0:
        raise ValueError("`weights` is empty; expected at least one matrix, shape (1, d).")
    checked: list[np.ndarray] = []
    for k, layer in enumerate(weights):
        matrix = numbers_of(f"weights[{k}]", layer)
        if matrix.ndim != 2:
            raise ValueError(
                f"`weights[{k}]` has shape {matrix.shape}; expected a matrix, "
                "shape (width after the layer, width before it)."
            )
        if 0 in matrix.shape:
            raise ValueError(
                f"`weights[{k}]` has shape {matrix.shape}; expected widths of at least 1."
            )
        if not np.all(np.isfinite(matrix)):
            raise ValueError(
                f"`weights[{k}]` has NaN or infinite entries; expected finite numbers."
            )
        if checked and matrix.shape[1] != checked[-1].shape[0]:
            raise ValueError(
                f"`weights[{k}]` has shape {matrix.shape}; expected {checked[-1].shape[0]} "
                f"columns, the rows of `weights[{k - 1}]`. Weights are ordered from input to "
                "output."
            )
        checked.append(matrix)
    if num_outputs is not None and checked[-1].shape[0] != num_outputs:
        raise ValueError(
            f"`weights[{len(checked) - 1}]` has shape {checked[-1].shape}; expected {wanted}."
        )
    return tuple(checked)
