r"""Fully connected networks with a kink between their layers.

$$f(x) = W_L\,\phi(\cdots\phi(W_2\,\phi(W_1x + b_1) + b_2)\cdots) + b_L, \qquad
\phi(z) = \max(z, \kappa z).$$

Conventions for weights are those of ``deep_linear.py``; a layer with a bias is a pair of its matrix
and its bias. Without biases the network is homogeneous of degree L.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from gflow.problem.abstract_data import AbstractData
from gflow.problem.arguments import numbers_of
from gflow.problem.array import Array
from gflow.problem.bends import AbstractBends, Place
from gflow.problem.data import labelled
from gflow.problem.deep_linear import check_weights
from gflow.problem.dense import leaves_of
from gflow.problem.kinks import check_branch, checked_slope, leaky_relu, side_of
from gflow.problem.network import AbstractNetwork, pullback_by_vjp
from gflow.problem.small_start import SmallStart, of_two_layers
from gflow.problem.weights import Weights

if TYPE_CHECKING:
    import xarray as xr


class MLP(AbstractNetwork):
    r"""Dense layers with $\phi(z) = \max(z, \kappa z)$ between them, of any depth and widths.

    Its kinks are known to a flow, which lands on each and crosses it or slides along it. Weights
    are those of a deep linear network, as ``gflow.init`` makes them, for one output, K classes or
    K targets; instead of a matrix a layer may be a pair (matrix, bias).

    Args:
        slope: $\kappa < 1$, that of the activation where z < 0: 0 for ReLU, 0.1 for a leaky one, -1
            for the absolute value.
        branch: "on" or "off", the side of a kink where the flow goes if both lead away from it, so
            that it is not unique; by default a run ends there with the status "not_unique".

    Raises:
        ValueError: when the slope is no number below 1, or the branch none of these.
    """

    slope: float = eqx.field(static=True, default=0.0, converter=checked_slope)
    branch: str | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        check_branch(self.branch)

    def branch_side(self) -> int | None:
        return side_of(self.branch)

    def without_branch(self) -> "MLP":
        return MLP(self.slope)

    def design(self, data: AbstractData) -> None:
        return None

    def degree(self, weights: Weights) -> float | None:
        return float(len(weights)) if all(bias is None for _, bias in parts(weights)) else None

    def weights_of(self, record: "xr.Dataset", which: str = "final") -> Weights:
        """The "initial" or "final" weights of a record.

        Raises:
            ValueError: when the record has none.
        """
        layers: list[Any] = []
        for leaf in leaves_of(record, which):
            if leaf.ndim == 1:
                layers[-1] = (layers[-1], leaf)
            else:
                layers.append(leaf)
        return tuple(layers)

    def dense_layers(self, weights: Weights) -> tuple[Array, ...]:
        return tuple(matrix for matrix, _ in parts(weights))

    def coordinates(self, weights: Weights, data: AbstractData) -> Array:
        h = jnp.asarray(data.inputs)
        *hidden, last = parts(weights)
        for layer in hidden:
            h = leaky_relu(_affine(layer, h), self.slope)
        return data.margins_of(_outputs(last, h, data))

    def pullback(self, weights: Weights, data: AbstractData) -> Any:
        return pullback_by_vjp(self, weights, data)

    def kinks(self, weights: Weights, data: AbstractData) -> "MLPBends | None":
        widths = tuple(np.shape(matrix)[0] for matrix, _ in parts(weights)[:-1])
        return MLPBends(self.slope, widths) if widths else None

    def balances(self, weights: Weights) -> Array:
        return balances(weights)

    def small_start(self, weights: Weights, data: AbstractData) -> SmallStart | None:
        layers = parts(weights)
        if len(layers) != 2 or any(bias is not None for _, bias in layers):
            return None
        if "one output" not in data.offers:
            return None
        inner, outer = (np.asarray(matrix) for matrix, _ in layers)
        return of_two_layers(labelled(data), self.slope, inner, outer[0])

    def check(self, weights: Weights, data: AbstractData) -> Weights:
        if isinstance(weights, np.ndarray | jax.Array) or not isinstance(weights, Sequence):
            matrices, biases = (), [None]  # which is refused as it is
            check_weights(weights)  # pyright: ignore[reportArgumentType]
        else:
            pairs = [layer if _is_pair(layer) else (layer, None) for layer in weights]
            matrices, biases = tuple(m for m, _ in pairs), [b for _, b in pairs]
        checked = check_weights(matrices, data.num_outputs, data.rows_in_words)
        if checked[0].shape[1] != data.dim:
            raise ValueError(
                f"`weights[0]` has shape {checked[0].shape}; expected {data.dim} columns, the "
                "dimension of the data's inputs. Weights are ordered from input to output."
            )
        found = []
        for k, (matrix, bias) in enumerate(zip(checked, biases, strict=True)):
            if bias is None:
                found.append(matrix)
                continue
            vector = numbers_of(f"weights[{k}][1]", bias)
            if vector.shape != matrix.shape[:1] or not np.all(np.isfinite(vector)):
                raise ValueError(
                    f"`weights[{k}][1]`, a bias, has shape {vector.shape}; expected finite numbers "
                    f"of shape {matrix.shape[:1]}, the rows of its matrix."
                )
            found.append((matrix, vector))
        return tuple(found)


def _is_pair(layer: Any) -> bool:
    return isinstance(layer, tuple | list) and len(layer) == 2 and np.ndim(layer[0]) == 2


def parts(weights: Weights) -> list[tuple[Array, Array | None]]:
    """Each layer as a matrix and a bias, None where it has none."""
    return [layer if isinstance(layer, tuple) else (layer, None) for layer in weights]


def balances(weights: Weights) -> Array:
    r"""$\lVert W_k[j, :]\rVert^2 + b_{k,j}^2 - \lVert W_{k+1}[:, j]\rVert^2$ of each hidden neuron.

    Conserved by the flow through kinks and along them (Du, Hu and Lee, arXiv 1806.00900, theorem
    2.1), since $\phi(z) = \phi'(z)z$. Layers one after the other.
    """
    layers = parts(weights)
    found = []
    for (matrix, bias), (after, _) in pairwise(layers):
        into = jnp.sum(jnp.asarray(matrix) ** 2, 1)
        into = into if bias is None else into + jnp.asarray(bias) ** 2
        found.append(into - jnp.sum(jnp.asarray(after) ** 2, 0))
    return jnp.concatenate(found) if found else jnp.zeros((0,))


def _affine(layer: tuple[Array, Array | None], h: Array) -> Array:
    matrix, bias = layer
    product = h @ matrix.T
    return product if bias is None else product + bias[None, :]


def _outputs(layer: tuple[Array, Array | None], h: Array, data: AbstractData) -> Array:
    return _affine(layer, h).reshape(h.shape[0], *data.output_shape)


class MLPBends(AbstractBends):
    """The kinks of an :class:`MLP`: the units of a point are all hidden neurons, layer by layer."""

    slope: float = eqx.field(static=True)
    widths: tuple[int, ...] = eqx.field(static=True)
    """Of the hidden layers."""

    def place(self) -> Place:
        layer = np.repeat(np.arange(1, len(self.widths) + 1), self.widths)
        neuron = np.concatenate([np.arange(width) for width in self.widths])
        return Place(layer, neuron, np.full(len(layer), self.slope))

    def evaluate(
        self, weights: Weights, data: AbstractData, gates: Array, shifts: Array | None
    ) -> tuple[Array, Array]:
        h, met, first = jnp.asarray(data.inputs), [], 0
        *hidden, last = parts(weights)
        for layer, width in zip(hidden, self.widths, strict=True):
            z = _affine(layer, h)
            met.append(z)
            h = gates[:, first : first + width] * z
            if shifts is not None:
                h = h + shifts[:, first : first + width]
            first += width
        return data.margins_of(_outputs(last, h, data)), jnp.concatenate(met, 1)

    def rows(self, weights: Weights, data: AbstractData) -> np.ndarray | None:
        if len(self.widths) > 1:
            return None
        inputs = np.asarray(data.inputs)
        if parts(weights)[0][1] is None:
            return inputs
        return np.concatenate([inputs, np.ones((len(inputs), 1))], 1)

    def of_neurons(self, vector: Weights) -> Array:
        matrix, bias = parts(vector)[0]
        return matrix if bias is None else jnp.concatenate([matrix, bias[:, None]], 1)

    def with_neurons(self, vector: Weights, part: Array) -> Weights:
        first, *others = vector
        new = (part[:, :-1], part[:, -1]) if isinstance(first, tuple) else part
        return (new, *others)
