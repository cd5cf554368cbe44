"""Arrays of one problem on several devices, of one process or of several.

JAX keeps an array that is cut in parts as one, and XLA adds what programs need to send between
devices; what is here says only where the parts are.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gflow.problem.arguments import shown

AXIS = "devices"


def mesh_of(devices: Sequence[Any] | None) -> Mesh:
    """Devices in a row, by default all of this process.

    Raises:
        ValueError: when one is none.
    """
    devices = list(devices or jax.local_devices())
    for device in devices:
        if not isinstance(device, jax.Device):
            raise ValueError(
                f"`devices` holds {shown(device)}; expected devices, as `jax.devices()`."
            )
    return Mesh(np.array(devices), (AXIS,))


def by_rows(tree: Any, mesh: Mesh) -> Any:
    """Arrays cut along their first axis, which has to be a multiple of the devices."""
    rows = NamedSharding(mesh, PartitionSpec(AXIS))
    return jax.tree.map(lambda leaf: _put(np.asarray(leaf), rows), tree)


def cut(shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """Where the parts of a large array go: its longest axis, the first of several, is cut.

    Axes whose length is no multiple of the devices are not; an array without others, and a vector,
    is on all devices.
    """
    lengths = [n if n % mesh.size == 0 and len(shape) > 1 else 0 for n in shape]
    longest = int(np.argmax(lengths)) if any(lengths) else len(shape)
    return NamedSharding(mesh, PartitionSpec(*[None] * longest, *[AXIS] * any(lengths)))


def check_cut(weights: Sequence[Any], mesh: Mesh) -> None:
    """Refuse layers the largest of which cannot be cut.

    Raises:
        ValueError: that names it.
    """
    sizes = [np.size(layer) for layer in weights]
    k = int(np.argmax(sizes))
    shape = np.shape(weights[k])
    if cut(shape, mesh).is_fully_replicated and mesh.size > 1:
        raise ValueError(
            f"`weights[{k}]` has shape {shape} and there are {mesh.size} devices to share it; "
            "expected a width that is a multiple of them. Zero rows and columns stay zero along "
            "the flow: pad with them, or choose fewer devices."
        )


def placed(tree: Any, mesh: Mesh) -> Any:
    """Arrays on their devices, each cut as :func:`cut` says."""
    return jax.tree.map(lambda leaf: _put(leaf, cut(np.shape(leaf), mesh)), tree)


def _put(leaf: Any, where: NamedSharding) -> jax.Array:
    if isinstance(leaf, jax.Array):
        return jax.device_put(leaf, where)
    # Each process has all of it: nothing is sent, as ``device_put`` does to compare.
    return jax.make_array_from_callback(np.shape(leaf), where, lambda part: leaf[part])


def gathered(tree: Any) -> Any:
    """NumPy's arrays of all that other devices, and other processes, have."""
    from jax.experimental.multihost_utils import process_allgather

    def whole(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(whole, tree)
