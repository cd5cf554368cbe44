"""The arrays of a pattern, from a host's list of slides."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gflow.problem.array import as_array
from gflow.problem.bends import (
    AbstractTangent,
    NeuronTangent,
    Pattern,
    Place,
    WeightTangent,
    blank_pattern,
)

INDEPENDENT = 1e-9
"""Singular values of unit normals below this are of dependent ones."""

NEURON_SLOTS = 4
"""Slots of a neuron of one hidden layer at first; when more are needed there are twice as many."""

NETWORK_SLOTS, GROW, LITTLE = (4, 32), 4, 2**20
"""Slots of any other network at first, least and most, and when more are needed so many times more:
programs of another number of slots take ten seconds to compile. Each slot in use, and with it each
other, costs a derivative of the whole network; so many products of numbers are little."""


class Slide(NamedTuple):
    """A group of units that slides: its members, their normals relative to the first, and theta."""

    units: np.ndarray
    alpha: np.ndarray
    theta: float


def gates_of_slide(slide: Slide, theta: float, lower: np.ndarray) -> np.ndarray:
    r"""The gates of its units, of slopes $\kappa$, at a $\theta$."""
    return lower + np.where(slide.alpha > 0, theta, 1 - theta) * (1 - lower)


def neuron_tangent(
    rows: np.ndarray, num_units: int, slots: int, alike: int, none: int
) -> NeuronTangent:
    """That of one hidden layer, with no slot in use.

    Args:
        rows: the normals, (n, d).
        num_units, slots: of a point, and of a neuron.
        alike: the most points on one ray.
        none: the number that stands for no unit.
    """
    shape = num_units, slots, rows.shape[1]
    return NeuronTangent(
        units=as_array(np.zeros(num_units * slots, np.int64)),
        active=as_array(np.zeros(num_units * slots, bool)),
        across=as_array(np.zeros(shape)),
        dual=as_array(np.zeros(shape)),
        members=as_array(np.full((num_units * slots, alike), none)),
    )


def weight_tangent(num_units: int, slots: int) -> WeightTangent:
    """That of any network, with no slot in use."""
    return WeightTangent(
        units=as_array(np.zeros(slots, np.int64)),
        active=as_array(np.zeros(slots, bool)),
        num_units=num_units,
    )


def across_of(normals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An orthonormal basis of normals (k, d), and the map to their coefficients (k, d)."""
    sizes = np.linalg.norm(normals, axis=1)
    left, values, right = np.linalg.svd(normals / sizes[:, None], full_matrices=False)
    kept = values > INDEPENDENT
    basis = right[kept]
    dual = (left[:, kept] / values[kept]) @ basis / sizes[:, None]
    return basis, dual


class Patterns:
    """The pattern of a run, changed unit by unit.

    Args:
        place: where the units are.
        on: which are above their kinks, (n, U).
        rows: the normals of one hidden layer, (n, d); None for other networks.
        alike: the most of them that are on one ray.
        work: products of numbers in the network's outputs for all points.
    """

    def __init__(
        self, place: Place, on: np.ndarray, rows: np.ndarray | None, alike: int, work: int
    ):
        self.place, self.rows, self.shape, self.alike = place, rows, on.shape, alike
        self.slides: dict[int, Slide] = {}
        """By the number of their first unit."""
        self.of_neuron: dict[int, list[int]] = {}
        """The first units of the slides of each neuron that slides, of one hidden layer."""
        self.shown = False
        """Whether others have the arrays of the pattern."""
        least, most = NETWORK_SLOTS
        few = min(max(least, LITTLE // work), most, on.size)
        self.slots = min(NEURON_SLOTS, *rows.shape) if rows is not None else few
        self.pattern = blank_pattern(on, place.lower, self._tangent())
        self._open()

    def _tangent(self) -> AbstractTangent:
        if self.rows is not None:
            none = self.shape[0] * self.shape[1]
            return neuron_tangent(self.rows, self.shape[1], self.slots, self.alike, none)
        return weight_tangent(int(np.prod(self.shape)), self.slots)

    def _open(self) -> None:
        """Arrays of our own, to write to."""
        import jax

        self.pattern, self.shown = jax.tree.map(np.array, self.pattern), False

    def _own(self) -> None:
        """Write to arrays that nobody else has."""
        if self.shown:
            self._open()

    def sliding_in(self, neurons: Sequence[int] | None) -> list[int]:
        """The first units of the slides of some neurons; of all for None."""
        if neurons is None:
            return list(self.slides)
        return [unit for neuron in neurons for unit in self.of_neuron.get(neuron, ())]

    def units_in(self, neurons: Sequence[int] | None) -> np.ndarray:
        """All units that slide in some neurons; in all for None."""
        slides = [self.slides[unit].units for unit in self.sliding_in(neurons)]
        return np.concatenate(slides) if slides else np.zeros(0, np.int64)

    def _index(self) -> None:
        """List slides by neuron."""
        self.of_neuron = {}
        for unit in self.slides:
            self.of_neuron.setdefault(unit % self.shape[1], []).append(unit)

    def frozen(self) -> Pattern:
        """The pattern as it is now, that no later change reaches."""
        import jax

        if not self.shown:  # once, instead of at each call of a program
            self.pattern = jax.device_put(self.pattern)
        self.shown = True
        return self.pattern

    def restore(
        self, slots: int, slides: dict[int, Slide], read: Callable[[Pattern], Pattern]
    ) -> None:
        """The pattern of a checkpoint, which ``read`` gives in the structure of its argument."""
        self.slots, self.slides = slots, slides
        on = np.asarray(self.pattern.on)
        self.pattern = read(blank_pattern(on, self.place.lower, self._tangent()))
        self._open()
        self._index()

    def kept(self) -> tuple[Any, ...]:
        """All of it, to come back to by ``put_back``."""
        return self.slots, dict(self.slides), dict(self.of_neuron), self.frozen()

    def put_back(self, kept: tuple[Any, ...]) -> None:
        """Be what it was when it was kept."""
        self.slots, self.slides, self.of_neuron, self.pattern = kept
        self.shown = True

    def gate(self, units: np.ndarray, above: np.ndarray) -> None:
        """Put units above or below their kinks."""
        self._own()
        rows, columns = np.divmod(units, self.shape[1])
        low = self.place.lower[columns]
        at = self.pattern
        np.asarray(at.on)[rows, columns] = above
        np.asarray(at.gates)[rows, columns] = np.where(above, 1.0, low)
        np.asarray(at.tie)[rows, columns] = 0.0

    def replace(
        self, neurons: Sequence[int] | None, slides: Mapping[int, Slide], pull: np.ndarray
    ) -> None:
        """Other slides for some neurons, or for all.

        Args:
            neurons: of one hidden layer; None for all slides of the network.
            slides: by their first unit, all that these have from now on.
            pull: of all units $b$, (n, U).
        """
        self._own()
        for unit in self.sliding_in(neurons):
            rows, columns = np.divmod(self.slides.pop(unit).units, self.shape[1])
            np.asarray(self.pattern.tie)[rows, columns] = 0.0
        for neuron in list(self.of_neuron) if neurons is None else neurons:
            self.of_neuron.pop(neuron, None)
        self.slides |= slides
        for unit in slides:
            self.of_neuron.setdefault(unit % self.shape[1], []).append(unit)
        most = self._most(neurons)
        if most > self.slots:
            grow = 2 if self.rows is not None else GROW
            slots = self.slots
            while slots < most:
                slots *= grow
            self.slots = min(slots, len(self.rows)) if self.rows is not None else slots
            self.pattern = dataclasses.replace(
                self.pattern,
                theta=as_array(np.zeros(0)),
                pull=as_array(np.zeros(0)),
                tangent=self._tangent(),
            )
            count = len(np.asarray(self.pattern.tangent.active))
            self.pattern = dataclasses.replace(
                self.pattern, theta=as_array(np.zeros(count)), pull=as_array(-np.ones(count))
            )
            self._open()
            neurons = None if self.rows is None else sorted(self.of_neuron)
        if self.rows is None:
            self._place(range(len(self.slides)), list(self.slides.values()), pull)
            np.asarray(self.pattern.tangent.active)[len(self.slides) :] = False
            return
        assert neurons is not None
        for neuron in neurons:
            own = [self.slides[unit] for unit in self.sliding_in([neuron])]
            self._place_neuron(neuron, own, pull)

    def _most(self, neurons: Sequence[int] | None) -> int:
        """The largest number of slides that share slots, in some neurons."""
        if self.rows is None or neurons is None:
            return len(self.slides)
        return max((len(self.of_neuron.get(neuron, ())) for neuron in neurons), default=0)

    # The same for many neurons of one hidden layer at once, of which each slides along one kink.

    def open(self, neurons: Sequence[int], theta: np.ndarray) -> None:
        """End the slides of neurons of one hidden layer, with the gates that ``theta`` says, (C,).

        The velocity stays what it is: these gates are those of the slides.
        """
        self._own()
        tangent = self.pattern.tangent
        assert isinstance(tangent, NeuronTangent)
        for neuron in neurons:
            first = neuron * self.slots
            for unit in self.of_neuron.pop(neuron, ()):
                slide = self.slides.pop(unit)
                rows, columns = np.divmod(slide.units, self.shape[1])
                slot = int(np.asarray(self.pattern.slot)[rows[0], columns[0]])
                gates = gates_of_slide(slide, float(theta[slot]), self.place.lower[columns])
                np.asarray(self.pattern.gates)[rows, columns] = gates
                np.asarray(self.pattern.tie)[rows, columns] = 0.0
            np.asarray(tangent.active)[first : first + self.slots] = False
            np.asarray(tangent.across)[neuron], np.asarray(tangent.dual)[neuron] = 0.0, 0.0

    def slide_singly(self, units: np.ndarray, theta: np.ndarray, force: np.ndarray) -> None:
        r"""Let units slide by themselves, of different neurons that do not slide.

        Args:
            units: shape (k,).
            theta, force: $\theta$ and b of each, likewise.
        """
        self._own()
        at, tangent = self.pattern, self.pattern.tangent
        assert isinstance(tangent, NeuronTangent)
        assert self.rows is not None
        points, neurons = np.divmod(units, self.shape[1])
        low, slots, normals = self.place.lower[neurons], neurons * self.slots, self.rows[points]
        sizes = np.linalg.norm(normals, axis=1)[:, None]
        np.asarray(at.gates)[points, neurons] = low + theta * (1 - low)
        np.asarray(at.slot)[points, neurons] = slots
        np.asarray(at.tie)[points, neurons] = 1 - low
        np.asarray(at.theta)[slots] = theta
        np.asarray(at.pull)[slots] = (1 - low) * force
        np.asarray(tangent.units)[slots] = units
        np.asarray(tangent.active)[slots] = True
        np.asarray(tangent.members)[slots, 0] = units
        np.asarray(tangent.members)[slots, 1:] = self.shape[0] * self.shape[1]
        np.asarray(tangent.across)[neurons, 0] = normals / sizes
        np.asarray(tangent.dual)[neurons, 0] = normals / sizes**2
        for unit, neuron, part in zip(
            units.tolist(), neurons.tolist(), theta.tolist(), strict=True
        ):
            self.slides[unit] = Slide(np.array([unit]), np.ones(1), part)
            self.of_neuron[neuron] = [unit]

    def _place_neuron(self, neuron: int, own: list[Slide], pull: np.ndarray) -> None:
        tangent, rows = self.pattern.tangent, self.rows
        assert isinstance(tangent, NeuronTangent)
        assert rows is not None
        first = neuron * self.slots
        np.asarray(tangent.active)[first : first + self.slots] = False
        across, dual = np.asarray(tangent.across)[neuron], np.asarray(tangent.dual)[neuron]
        across[:], dual[:] = 0.0, 0.0
        if own:
            normals = np.stack([rows[slide.units[0] // self.shape[1]] for slide in own])
            basis, back = across_of(normals)
            across[: len(basis)], dual[: len(back)] = basis, back
            members = np.asarray(tangent.members)[first : first + len(own)]
            members[:] = self.shape[0] * self.shape[1]
            for row, slide in zip(members, own, strict=True):
                row[: len(slide.units)] = slide.units
        self._place(range(first, first + len(own)), own, pull)

    def _place(self, slots: range, slides: list[Slide], pull: np.ndarray) -> None:
        """Put slides into slots."""
        at = self.pattern
        for slot, slide in zip(slots, slides, strict=True):
            rows, columns = np.divmod(slide.units, self.shape[1])
            low = self.place.lower[columns]
            tie = np.abs(slide.alpha) * (1 - low)
            gates = gates_of_slide(slide, slide.theta, low)
            np.asarray(at.gates)[rows, columns] = gates
            np.asarray(at.slot)[rows, columns] = slot
            np.asarray(at.tie)[rows, columns] = tie
            np.asarray(at.theta)[slot] = slide.theta
            np.asarray(at.pull)[slot] = np.sum(tie * pull[rows, columns])
            np.asarray(at.tangent.units)[slot] = slide.units[0]
            np.asarray(at.tangent.active)[slot] = True
