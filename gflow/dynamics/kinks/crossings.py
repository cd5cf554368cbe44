"""When units met their kinks in a step, and how long that is ago."""

from typing import Any, NamedTuple

import numpy as np


class Events(NamedTuple):
    """What happened first to each of k neurons in a step."""

    neuron: np.ndarray
    since: np.ndarray
    """How long before the end of the step."""
    unit: np.ndarray
    """The unit that crosses its kink, -1 where a slide ends."""
    speed: np.ndarray
    """Of its z there."""
    force: np.ndarray
    """b there."""
    side: np.ndarray
    """Where it goes, 1 or -1; for a slide that ends that of the gates."""
    ratio: np.ndarray
    """How much b and the speed change in that time, relatively."""
    turned: np.ndarray
    """Whether a slide ends since its kink begins to repel."""


def mean_ratio(events: Events, which: np.ndarray) -> float:
    """The root mean square of the ratios of some events, weighted by what is mended of them."""
    weight = np.where(which, events.since**2, 0.0)
    return np.sqrt(np.sum((weight * events.ratio) ** 2) / max(np.sum(weight**2), 1e-300))


def how_long_ago(z: Any, speed: Any, bend: Any, longest: Any) -> tuple[np.ndarray, np.ndarray]:
    """How long ago z was zero that bends like this, at most so long, and its speed there."""
    out, along = np.abs(z), speed * np.sign(z)
    bend = bend * np.sign(z)
    root = np.sqrt(np.maximum(along**2 - 2 * bend * out, 0.0))
    whole = along + root
    since = np.minimum(2 * out / np.where(whole > 0, whole, 1e-300), longest)
    return since, (along - bend * since) * np.sign(z)
