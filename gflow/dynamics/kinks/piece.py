"""The smooth piece of a flow that a run is in: its pattern, and decisions about units on kinks."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from gflow.dynamics.kinks.decide import PARALLEL, Alone, Block, Group, decide, decide_alone
from gflow.dynamics.kinks.meeting import Layers
from gflow.dynamics.kinks.patterns import Patterns, Slide
from gflow.dynamics.kinks.ways import BOTH_WAYS, TornError, decide_layers
from gflow.problem.array import Array, as_array
from gflow.problem.bends import (
    AbstractBends,
    Frozen,
    Sight,
    past_ends,
    past_kinks,
    scale_of,
    sight,
)
from gflow.problem.risk import Problem, has_few_margins
from gflow.problem.weights import Weights, size_of
from gflow.programs import by_size

AT_KINK = 1e-9
"""Units whose pre-activation is below this part of its scale are at their kinks, when one is."""

DEPENDENT = 1e-14
"""Normals below this part of the longest vanish."""

AWAY = 1e-9
"""Speeds of pre-activations below this part of the largest one are zero."""

QUIET = 4.0
"""Log risks above that of round-off below which forces of units are round-off too: what is left of
the flow is shorter than what counts as past a kink."""

ROUNDS = 20
"""Decisions about one place, each in the light of the last, before it is given up."""


class Seen(NamedTuple):
    """A place in a pattern, as the host looks at it: NumPy's arrays."""

    at: Any
    """Its ``Sight``."""
    past: Any
    """Which units are past their kinks, (n, U)."""
    ended: Any
    """Which slots are beyond the pattern, by theta or by pull, (2, C)."""
    near: Any
    """Which units are at their kinks, (n, U)."""


@by_size
def _seen(problem: Problem, weights: Weights) -> Seen:
    at = sight(problem, weights)
    near = jnp.abs(at.z) <= AT_KINK * scale_of(at.z)
    pattern = problem.network.pattern  # pyright: ignore
    return Seen(at, past_kinks(pattern, at) > 1, past_ends(pattern, at) > 1, near)


@by_size
def _met(bends: AbstractBends, weights: Weights, data: Any, gates: Array) -> Array:
    return bends.evaluate(weights, data, gates, None)[1]


@by_size
def _block(
    problem: Problem, weights: Weights, gates: Array, units: Array
) -> tuple[Weights, Array, Weights, Array]:
    """Of units with gates 0: the velocity and forces without them, their normals, and B."""
    frozen: Any = problem.network
    data = problem.data

    def at(weights: Weights, shifts: Array) -> tuple[Array, Array]:
        return frozen.bends.evaluate(weights, data, gates, shifts)

    (coordinates, z), vjp = jax.vjp(at, weights, jnp.zeros_like(gates))
    slopes = problem.loss.terms(problem.spread(coordinates)).slopes
    base, force = vjp((problem.gather(slopes), jnp.zeros_like(z)))

    def normal(unit: Array) -> tuple[Weights, Array]:
        cotangent = jnp.zeros((z.size,)).at[unit].set(1.0).reshape(z.shape)
        return vjp((jnp.zeros_like(coordinates), cotangent))

    normals, later = jax.vmap(normal)(units)
    return base, force, normals, later


def rays(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The number of the ray through zero that each row is on, and how many rows are on its ray."""
    sizes = np.linalg.norm(rows, axis=1)
    unit = rows / np.where(sizes > 0, sizes, 1.0)[:, None]
    key = np.abs(unit @ np.random.default_rng(0).normal(size=rows.shape[1]))
    order, ray = np.argsort(key, kind="stable"), np.zeros(len(rows), np.int64)
    for last, k in pairwise(order.tolist()):
        same = 1 - abs(unit[last] @ unit[k]) <= PARALLEL
        ray[k] = ray[last] + (0 if same else 1)
    return ray, np.bincount(ray, minlength=1)[ray]


class StuckError(Exception):
    """No way from a kink was found; the message says where."""


class NotUniqueError(Exception):
    """The flow can go on in more than one way; the message says where."""


class Piece:
    """A pattern, the problem frozen in it, and what is decided about units on their kinks.

    Args:
        problem: with a network that has kinks.
        bends: its kinks.
        weights: the start.
        branch: the side, 1 or -1, that a unit takes where the flow is not unique; None for none.

    Attributes:
        here: the problem in the pattern as it was frozen last.
    """

    def __init__(
        self, problem: Problem, bends: AbstractBends, weights: Weights, branch: int | None
    ):
        self.problem, self.bends, self.branch = problem, bends, branch
        self.few = has_few_margins(problem)
        self.place, self.rows = bends.place(), bends.rows(weights, problem.data)
        self.num_units = len(self.place.lower)
        none = np.zeros(0, np.int64)
        self.ray, self.num_on_ray = rays(self.rows) if self.rows is not None else (none, none)
        """Of one hidden layer: the number of each point's ray, and how many points are on it."""
        most = int(np.max(self.num_on_ray, initial=1))
        work = problem.data.num_points * size_of(weights)
        self.patterns = Patterns(self.place, self._start(weights) > 0, self.rows, most, work)
        self.quiet = np.float64(problem.loss.least_log_risk + QUIET)
        self.here = problem
        self.freeze()

    def _start(self, weights: Weights) -> np.ndarray:
        """Pre-activations, where the gates are those of their own signs."""
        lower = self.place.lower[None, :]
        shape = self.problem.data.num_points, self.num_units
        z, gates = np.ones(shape), np.ones(shape)
        for _ in range(len(set(self.place.layer.tolist())) + 1):
            z = np.asarray(
                _met(self.bends, weights, self.problem.data, as_array(gates), few=self.few)
            )
            new = np.where(z > 0, 1.0, lower)
            if np.array_equal(new, gates):
                break
            gates = new
        return z

    def freeze(self) -> None:
        """Let the problem be the one in the pattern as it is now."""
        network = self.problem.network.without_branch()
        network = Frozen(network, self.bends, self.patterns.frozen(), as_array(self.quiet))
        self.here = eqx.tree_at(lambda problem: problem.network, self.problem, network)

    def look(self, weights: Weights) -> Seen:
        """What is to be seen at a place."""
        return jax.device_get(_seen(self.here, weights, few=self.few))

    def joint(self) -> bool:
        """Whether units of several layers slide at one point."""
        if self.rows is not None:
            return False
        layers: dict[int, int] = {}
        for unit in self.patterns.units_in(None).tolist():
            point, u = divmod(unit, self.num_units)
            layer = int(self.place.layer[u])
            if layers.setdefault(point, layer) != layer:
                return True
        return False

    def ended(self, seen: Sight) -> np.ndarray:
        """Which units slide in slots that are to be decided about again, (n U,)."""
        pattern = self.patterns.pattern
        theta, pull = np.asarray(seen.theta), np.asarray(seen.pull)
        over = (theta < 0) | (theta > 1) | (pull >= 0) | ~np.isfinite(theta)
        over &= np.asarray(pattern.tangent.active)
        if not np.any(over):
            return np.zeros(seen.z.size, bool)
        return (np.asarray(pattern.sliding) & over[np.asarray(pattern.slot)]).reshape(-1)

    def settle(
        self, weights: Weights, units: np.ndarray, *, start: bool
    ) -> tuple[Weights, set[int]]:
        """Decide about units, and about those that this has to do with, until nothing changes."""
        touched: set[int] = set()
        free = set(units.tolist()) if start else set()
        seen = self.look(weights)
        for _ in range(ROUNDS):
            done, weights = self._decide(weights, seen, units, free)
            touched |= done
            self.freeze()
            seen = self.look(weights)
            units = self.inconsistent(seen, touched)
            if len(units) == 0:
                break
            free = set()
        return weights, touched

    def inconsistent(self, seen: Seen, touched: set[int]) -> np.ndarray:
        """Units that would at once move to the other side of their kinks, or leave their slides."""
        pattern, at = self.patterns.pattern, seen.at
        among = np.array(sorted(touched), np.int64)
        rows, columns = np.divmod(among, self.num_units)
        speed = np.where(np.asarray(pattern.on), -at.speed, at.speed)[rows, columns]
        away = speed > AWAY * np.max(np.abs(at.speed), initial=0.0)
        wrong = seen.near[rows, columns] & away & ~np.asarray(pattern.sliding)[rows, columns]
        if np.any(seen.ended):
            return np.union1d(among[wrong], np.nonzero(self.ended(at))[0])
        return among[wrong]

    def _decide(
        self, weights: Weights, seen: Seen, units: np.ndarray, free: set[int]
    ) -> tuple[set[int], Weights]:
        """One decision about some units, block by block."""
        if self.rows is None:
            return self._decide_block(weights, seen, units, free)
        force, slides = np.asarray(seen.at.force), self.patterns.of_neuron
        neurons, first, count = np.unique(
            units % self.num_units, return_index=True, return_counts=True
        )
        # Most neurons have one unit at its kink, or slide along one that has no other on its ray.
        single = count == 1
        for k in np.nonzero(single)[0].tolist():
            own = slides.get(int(neurons[k]))
            if own is not None:
                alike = len(own) == 1 and self.patterns.slides[own[0]].units.tolist()
                single[k] = alike == [int(units[first[k]])]
        touched = self._decide_alone(seen.at, units[first[single]], free)
        for neuron in neurons[~single].tolist():
            own = units[units % self.num_units == neuron]
            touched |= self.decide_neuron(force, neuron, own, free)
        return touched, self.put_on_kinks(weights, neurons.tolist())

    def _decide_alone(self, seen: Sight, units: np.ndarray, free: set[int]) -> set[int]:
        """Decide about units of different neurons, each of which has to do with no other."""
        if len(units) == 0:
            return set()
        rows, pattern, force = self.rows, self.patterns.pattern, np.asarray(seen.force)
        assert rows is not None
        points, neurons = np.divmod(units, self.num_units)
        slid = np.asarray(pattern.sliding)[points, neurons]
        delta = np.asarray(pattern.gates)[:, neurons] * force[:, neurons]
        delta[points, np.arange(len(units))] = 0.0
        pull, lower = force[points, neurons], self.place.lower[neurons]
        loose = slid | np.isin(units, list(free))
        on = np.asarray(pattern.on)[points, neurons]
        block = Alone(rows[points], delta.T @ rows, pull, lower, on, loose)
        side, theta, open_ = decide_alone(block, self.branch)
        if self.branch is None and np.any(open_):
            raise self._not_unique(int(units[np.argmax(open_)]))
        self.patterns.open(neurons[slid].tolist(), np.asarray(seen.theta))
        goes = side != 0
        self.patterns.gate(units[goes], side[goes] > 0)
        self.patterns.slide_singly(units[~goes], theta[~goes], pull[~goes])
        return set(units.tolist())

    # A neuron of one hidden layer has the velocity sum_i g_i b_i x_i.
    def decide_neuron(
        self, force: np.ndarray, neuron: int, units: np.ndarray, free: set[int]
    ) -> set[int]:
        """Decide about units of a neuron of one hidden layer, and about those of it that slide.

        Args:
            force: of all units b, (n, U).
            neuron, units: which, (k,).
            free: those of them that come from neither side of their kinks.

        Returns:
            All that were decided about.
        """
        rows = self.rows
        assert rows is not None
        slid = self.patterns.units_in([neuron])
        units = np.union1d(units, slid).astype(np.int64)
        points = units // self.num_units
        pulls = force[:, neuron]
        others = np.ones(len(rows), bool)
        others[points] = False
        delta = (np.asarray(self.patterns.pattern.gates)[:, neuron] * pulls)[others]
        block = self._as_block(units, rows[points], delta @ rows[others], pulls[points], slid, free)
        self._take(block, decide(block, self.branch), force, [neuron])
        return set(units.tolist())

    def put_on_kinks(self, weights: Weights, neurons: Sequence[int]) -> Weights:
        """Put neurons of one hidden layer on the kinks along which they slide."""
        across = np.asarray(self.patterns.pattern.tangent.across)[neurons]  # pyright: ignore
        if not np.any(across):
            return weights
        own = np.asarray(self.bends.of_neurons(weights)).copy()
        off = np.einsum("urd,ud->ur", across, own[neurons])
        own[neurons] -= np.einsum("urd,ur->ud", across, off)
        return jax.tree.map(np.asarray, self.bends.with_neurons(weights, as_array(own)))

    def _decide_block(
        self, weights: Weights, seen: Seen, units: np.ndarray, free: set[int]
    ) -> tuple[set[int], Weights]:
        """All units of another network, which have to do with each other."""
        slid = self.patterns.units_in(None)
        touched = np.union1d(units, slid).astype(np.int64)
        # Units that are at rest without the others, as behind a layer that is all off, have no
        # kink of their own, and go where the others put them.
        some = np.unique(touched // self.num_units)
        there = some[:, None] * self.num_units + np.arange(self.num_units)[None, :]
        units, flat, base, force, later = self._block(
            weights, np.union1d(touched, there[seen.near[some]])
        )
        sizes = np.linalg.norm(flat, axis=1)
        own = sizes > DEPENDENT * np.max(sizes, initial=0.0)
        known = np.isin(units, touched) & own
        kept = known | ~own & np.isin(units // self.num_units, units[known] // self.num_units)
        if not np.all(kept) and np.any(kept):
            units, flat, base, force, later = self._block(weights, units[kept])
            own = own[kept]
        block = self._as_block(units, flat, base, force, slid, free)
        layer = self.place.layer[units % self.num_units]
        speed, gates = (
            np.asarray(x).reshape(-1)[units] for x in (seen.at.speed, self.patterns.pattern.gates)
        )
        try:
            groups = decide_layers(block, Layers(own, later, layer, speed, gates), self.branch)
        except TornError as torn:
            raise self._not_unique(int(units[torn.args[0]]), torn.args[1]) from None
        if groups is None:
            points = ", ".join(str(i) for i in np.unique(units // self.num_units))
            raise StuckError(f"of several layers at points {points} none leads on by itself")
        self._take(block, groups, np.asarray(seen.at.force), None)
        stay = [int(group.members[0]) for group in groups if group.side == 0]
        if stay:
            n = block.normals[stay]
            off = np.asarray(seen.at.z).reshape(-1)[units[stay]]
            back = np.linalg.lstsq(n, -off, rcond=1e-12)[0]
            leaves, structure = jax.tree.flatten(weights)
            ends = np.cumsum([leaf.size for leaf in leaves])[:-1]
            moved = [
                np.asarray(leaf) + part.reshape(leaf.shape)
                for leaf, part in zip(leaves, np.split(back, ends), strict=True)
            ]
            weights = jax.tree.unflatten(structure, moved)
        return set(touched.tolist()), weights

    def _block(
        self, weights: Weights, units: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Units, their normals, v_0, their forces b_0 and B, with the gates of all of them zero."""
        count = 8
        while count < len(units):  # few sizes, each of which is a program
            count *= 4
        padded = np.concatenate([units, np.repeat(units[:1], count - len(units))])
        gates = np.asarray(self.patterns.pattern.gates).copy()
        gates.reshape(-1)[units] = 0.0
        base, force, normals, later = _block(
            self.here, weights, as_array(gates), as_array(padded), few=self.few
        )
        flat = [np.asarray(leaf).reshape(count, -1) for leaf in jax.tree.leaves(normals)]
        ahead = np.concatenate([np.asarray(leaf).reshape(-1) for leaf in jax.tree.leaves(base)])
        of_units = np.asarray(later).reshape(count, -1)[: len(units)][:, units]
        each = np.concatenate(flat, 1)[: len(units)]
        return units, each, ahead, np.asarray(force).reshape(-1)[units], of_units

    def _as_block(
        self,
        units: np.ndarray,
        normals: np.ndarray,
        base: np.ndarray,
        force: np.ndarray,
        slid: np.ndarray,
        free: set[int],
    ) -> Block:
        on = np.asarray(self.patterns.pattern.on).reshape(-1)[units]
        loose = np.isin(units, slid) | np.isin(units, list(free))
        lower = self.place.lower[units % self.num_units]
        return Block(units, normals, base, force, lower, on, loose)

    def _take(
        self,
        block: Block,
        groups: list[Group],
        force: np.ndarray,
        neurons: Sequence[int] | None,
    ) -> None:
        """Write down where groups go."""
        slides: dict[int, Slide] = {}
        for group in groups:
            members = block.units[group.members]
            if group.open and self.branch is None:
                raise self._not_unique(int(members[0]))
            if group.side == 0:
                slides[int(members[0])] = Slide(members, group.alpha, group.theta)
            else:
                above = (group.alpha > 0) == (group.side > 0)
                self.patterns.gate(members, above)
        self.patterns.replace(neurons, slides, force)

    def _not_unique(self, unit: int, why: str = BOTH_WAYS) -> NotUniqueError:
        point, u = divmod(unit, self.num_units)
        return NotUniqueError(
            f"the unit of neuron {self.place.neuron[u]} in layer {self.place.layer[u]} at "
            f"point {point} is on its kink, and {why}"
        )
