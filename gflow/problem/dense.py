r"""The dense layers of a network that is more than a chain of them: where they are in its weights.

A convolutional network ends in dense layers, and has biases and filters beside them. A network says
which matrices are its chain by a function of the weights (``AbstractNetwork.dense_layers``) that
chooses, transposes or cuts out entries and does nothing else. Applied to the *numbers* of the
entries in their place it tells where each comes from: so the chain can be put back, changed, and
the rest is known.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from gflow.problem.network import AbstractNetwork
from gflow.problem.weights import Weights

if TYPE_CHECKING:
    import xarray as xr


def places(network: AbstractNetwork, weights: Weights) -> tuple[np.ndarray, ...] | None:
    """The numbers of the entries of each dense layer, counted through all leaves of the weights.

    None for a network without such layers.

    Raises:
        ValueError: when the layers are no matrices that fit each other, or are not made of entries
            of the weights.
    """
    leaves, structure = jax.tree.flatten(weights)
    sizes = [int(np.size(leaf)) for leaf in leaves]
    begins = np.cumsum([0, *sizes])
    numbers = [
        np.arange(begin, begin + size).reshape(np.shape(leaf))
        for leaf, begin, size in zip(leaves, begins, sizes, strict=False)
    ]
    order = np.random.default_rng(0).permutation(begins[-1])
    with jax.ensure_compile_time_eval():  # inside a program too
        chain = network.dense_layers(jax.tree.unflatten(structure, numbers))
        if chain is None:
            return None
        found = tuple(np.asarray(matrix) for matrix in chain)
        shuffled = network.dense_layers(
            jax.tree.unflatten(structure, [order[each] for each in numbers])
        )
    if not found:
        raise ValueError("`layers` gives no matrix; expected at least one, or leave it out.")
    for k, matrix in enumerate(found):
        if matrix.ndim != 2:
            raise ValueError(
                f"`layers` gives an array of shape {matrix.shape} as number {k + 1}; expected a "
                "matrix, of shape (outputs, inputs)."
            )
        if k and matrix.shape[1] != found[k - 1].shape[0]:
            raise ValueError(
                f"`layers` gives a matrix of shape {matrix.shape} after one of shape "
                f"{found[k - 1].shape}; expected {found[k - 1].shape[0]} columns: matrices have "
                "the shape (outputs, inputs) and come from input to output. Transpose what is kept "
                "the other way round, as kernels of flax are."
            )
    every = np.concatenate([matrix.reshape(-1) for matrix in found])
    known = every.dtype.kind == "i" and bool(np.all((every >= 0) & (every < begins[-1])))
    # What is chosen among other numbers are those in the same places; what is computed is not.
    pairs = zip(found, shuffled or (), strict=True)
    if (
        not known
        or len(np.unique(every)) < len(every)
        or not all(np.array_equal(order[one], other) for one, other in pairs)
    ):
        raise ValueError(
            "`layers` gives numbers that are not entries of the weights, each at most once; "
            "expected matrices chosen among them, transposed or cut out, and not computed."
        )
    return found


def beside(network: AbstractNetwork, weights: Weights) -> list[int]:
    """The numbers of the leaves that have no entry in a dense layer; all where there are none."""
    leaves = jax.tree.leaves(weights)
    found = places(network, weights)
    if found is None:
        return list(range(len(leaves)))
    taken = np.concatenate([matrix.reshape(-1) for matrix in found])
    begins = np.cumsum([0, *(int(np.size(leaf)) for leaf in leaves)])
    inside = np.unique(np.searchsorted(begins, taken, "right") - 1)
    return [k for k in range(len(leaves)) if k not in inside]


def names(network: AbstractNetwork, weights: Weights) -> tuple[list[str], list[str]]:
    """The paths of the dense layers and of the other leaves within the weights."""
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(weights)]
    begins = np.cumsum([0, *(int(np.size(leaf)) for leaf in jax.tree.leaves(weights))])
    first = [matrix.flat[0] for matrix in places(network, weights) or ()]
    layers = [paths[k] for k in np.searchsorted(begins, first, "right") - 1]
    return layers, [paths[k] for k in beside(network, weights)]


def replaced(network: AbstractNetwork, weights: Weights, matrices: Sequence[np.ndarray]) -> Weights:
    """The weights with other dense layers, on the host; types and all other entries stay.

    Args:
        network: that has dense layers.
        weights: all of its weights.
        matrices: of the shapes of its dense layers.
    """
    leaves, structure = jax.tree.flatten(weights)
    flat = np.concatenate([np.asarray(leaf, dtype=np.float64).reshape(-1) for leaf in leaves])
    for place, matrix in zip(places(network, weights) or (), matrices, strict=True):
        flat[place] = matrix
    ends = np.cumsum([int(np.size(leaf)) for leaf in leaves])[:-1]
    parts = [
        part.reshape(np.shape(leaf)).astype(np.asarray(leaf).dtype)
        for part, leaf in zip(np.split(flat, ends), leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, parts)


def leaves_of(record: "xr.Dataset", which: str, count: int | None = None) -> list[np.ndarray]:
    """The arrays of the "initial" or "final" weights of a record.

    Args:
        record: of a run.
        which: "initial" or "final".
        count: how many there are to be; None for all.

    Raises:
        ValueError: when the record has none, or fewer.
    """
    prefix = f"{which}_weights_"
    found = sorted(
        int(number)
        for name in record.variables
        if (number := str(name).removeprefix(prefix)) != str(name) and number.isdigit()
    )
    wanted = range(1, (count or max(found, default=1)) + 1)
    missing = [f"{prefix}{k}" for k in wanted if k not in found]
    if missing:
        raise ValueError(
            f"`record` has no {missing[0]!r}; expected a record of a run of this network."
        )
    return [record[f"{prefix}{k}"].values for k in wanted]
