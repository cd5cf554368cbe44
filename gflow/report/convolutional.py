"""The networks of the paper's last experiment, scaled down: equinox models for pictures.

Ji and Telgarsky train an AlexNet on CIFAR-10, whose dense layers have the shapes (4096, 1024),
(4096, 4096) and (10, 4096). Here the widths are an eighth of these, 128, 512, 512 and the classes,
behind two convolutions.
"""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp

HIDDEN = (512, 512)
"""Widths of the dense layers but the last, an eighth of the paper's."""

FEATURES = 128
"""Inputs of the first dense layer, an eighth of the paper's, or a few less where pictures are not
8, 16 or 32 pixels wide."""

CHANNELS = 16
"""Of the first convolution."""

LARGE = 16
"""Pixels a side above which the first convolution takes every second place only, as AlexNet's takes
every fourth."""

Activation = Callable[[jax.Array], jax.Array]


class Convolutional(eqx.Module):
    """Two convolutions of 3 by 3, each with its pooling, and dense layers.

    Args:
        point_shape: of a picture, (channels, rows, columns).
        num_classes: the outputs.
        hidden: widths of the dense layers but the last.
        activation: elementwise, after every layer but the last.
        key: of JAX; the start is equinox's own, uniform with variance 1/(3 inputs), which is
            that of PyTorch too.
    """

    filters: list[eqx.nn.Conv2d]
    dense: list[eqx.nn.Linear]
    activation: Activation = eqx.field(static=True)

    def __init__(
        self,
        point_shape: Sequence[int],
        num_classes: int,
        *,
        hidden: Sequence[int] = HIDDEN,
        activation: Activation = jax.nn.relu,
        key: jax.Array,
    ):
        channels, rows, columns = point_shape
        if min(rows, columns) < 4:
            raise ValueError(
                f"`point_shape` is {tuple(point_shape)}; expected pictures of at least 4 by 4 "
                "pixels, (channels, rows, columns)."
            )
        stride = 2 if min(rows, columns) > LARGE else 1
        rows, columns = ((-(-size // stride) // 2) // 2 for size in (rows, columns))
        last = max(1, FEATURES // (rows * columns))
        widths = [last * rows * columns, *hidden, num_classes]
        keys = jax.random.split(key, 1 + len(widths))
        self.filters = [
            eqx.nn.Conv2d(channels, CHANNELS, 3, stride, padding=1, key=keys[0]),
            eqx.nn.Conv2d(CHANNELS, last, 3, padding=1, key=keys[1]),
        ]
        pairs = zip(widths[:-1], widths[1:], keys[2:], strict=True)
        self.dense = [eqx.nn.Linear(before, after, key=k) for before, after, k in pairs]
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        for convolution in self.filters:
            x = largest_of_four(self.activation(convolution(x)))
        x = x.reshape(-1)
        for layer in self.dense[:-1]:
            x = self.activation(layer(x))
        return self.dense[-1](x)


def largest_of_four(x: jax.Array) -> jax.Array:
    """Max-pooling of 2 by 2 without overlap, (channels, rows, columns); an odd edge is left out.

    By reshaping: the gradient of XLA's own window is slow on a CPU.
    """
    rows, columns = x.shape[1] // 2, x.shape[2] // 2
    cut = x[:, : 2 * rows, : 2 * columns].reshape(-1, rows, 2, columns, 2)
    return jnp.max(cut, axis=(2, 4))
