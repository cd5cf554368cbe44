"""The kinks of a run: its pattern, what happened at each kink, and what it proves by that."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from gflow.dynamics.kinks.decide import Block, Group, decide
from gflow.dynamics.kinks.patterns import Patterns, Slide
from gflow.problem.array import Array, as_array
from gflow.problem.bends import (
    AbstractBends,
    Frozen,
    Sight,
    scale_of,
    sight,
    violations,
)
from gflow.problem.network import AbstractNetwork, Weights, squared_norm
from gflow.problem.risk import Problem

AT_KINK = 1e-9
"""Units whose pre-activation is below this part of its scale are at their kinks, when one is."""

DEPENDENT = 1e-14
"""Normals below this part of the longest vanish."""

AWAY = 1e-9
"""Speeds of pre-activations below this part of the largest one are zero."""

TURNS = 4
"""Rounds of stepping over: what mends one unit may put another one past its kink."""

ROUNDS = 20
"""Decisions about one place, each in the light of the last, before it is given up."""

CROSSED, SLID, LEFT, STEPPED_OVER = 0, 1, 2, 3
"""What happened to a unit at a kink: it crossed, began to slide, left a slide, or crossed one of
many kinks in a step."""

MANY = 8
"""When more units than these pass their kinks in a step they are stepped over."""

MENDED = 1e-3
"""But only where what it takes to mend the step is below this part of the weights; else the step is
made shorter."""


class Happened(NamedTuple):
    """One entry of the log of kinks."""

    log_time: float
    log_risk: float
    step: int
    layer: int
    neuron: int
    point: int
    event: int


class Seen(NamedTuple):
    """A place in a pattern, as the host looks at it: NumPy's arrays."""

    at: Any
    """Its ``Sight``."""
    beyond: Any
    """How far each unit, and each slot twice, is beyond the pattern; above 1 it is."""
    near: Any
    """Which units are at their kinks, (n, U)."""


@eqx.filter_jit
def _seen(problem: Problem, weights: Weights) -> Seen:
    at = sight(problem, weights)
    near = jnp.abs(at.z) <= AT_KINK * scale_of(at.z)
    return Seen(at, violations(problem.network.pattern, at), near)  # pyright: ignore


@eqx.filter_jit
def _met(bends: AbstractBends, weights: Weights, data: Any, gates: Array) -> Array:
    return bends.evaluate(weights, data, gates, None)[1]


@eqx.filter_jit
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


@eqx.filter_jit
def _balance_drift(network: AbstractNetwork, weights: Weights, start: Weights) -> Array:
    """The largest change of a balance in units of |W|^2, of each of a block of weights."""

    def one(at: Weights) -> Array:
        now, before = network.balances(at), network.balances(start)
        assert now is not None
        assert before is not None
        return jnp.max(jnp.abs(now - before)) / squared_norm(at)

    return jax.vmap(one)(weights)


SAME, STUCK = 1e-13, 50
"""So many kinks in a row within the first part of the clock's value are a circle."""


class NotUniqueError(Exception):
    """The flow can go on in more than one way; the message says where."""


class StuckError(Exception):
    """No way from a kink was found; the message says where."""


class Kinked:
    """The kinks of one run.

    Args:
        problem: with a network that has kinks.
        bends: its kinks.
        weights: the start.
        branch: the side, 1 or -1, that a unit takes where the flow is not unique; None for none.
    """

    def __init__(
        self, problem: Problem, bends: AbstractBends, weights: Weights, branch: int | None
    ):
        self.problem, self.bends, self.branch, self.start = problem, bends, branch, weights
        self.place = bends.place()
        rows = bends.rows(weights, problem.data)
        self.rows = rows
        self.num_units = len(self.place.lower)
        z = self._start(weights)
        self.patterns = Patterns(self.place, z > 0, rows)
        self.here = problem
        self.log: list[Happened] = []
        self.num_kinks, self.num_patterns, self.num_stepped_over = 0, 1, 0
        self.num_joint = 0
        """Pieces on which units of several layers slide at one point."""
        self.last_s, self.repeated = -1e300, 0
        self._freeze()

    @classmethod
    def of(cls, problem: Problem, weights: Weights) -> "Kinked | None":
        """The kinks of a run at its start; None for a network that has none that gflow knows."""
        bends = problem.network.kinks(weights, problem.data)
        return (
            None if bends is None else cls(problem, bends, weights, problem.network.branch_side())
        )

    @property
    def num_sliding(self) -> int:
        """How many units slide."""
        return int(np.count_nonzero(self.patterns.pattern.tie))

    def facts(self) -> dict[str, Any]:
        """What a record says of the kinks."""
        over = self.num_stepped_over
        return {
            "kinks": "located" if over == 0 else "located, but where many fall into one step",
            "num_patterns": self.num_patterns,
            "num_stepped_over": over,
            "num_joint_slides": self.num_joint,
            "homogeneity": self.problem.network.degree(self.start),
        }

    def at_points(self, weights: Weights, count: int) -> dict[str, np.ndarray]:
        """What a record holds of the kinks at each of some points in this pattern."""
        found = {
            "num_kinks": np.full(count, self.num_kinks),
            "num_sliding": np.full(count, self.num_sliding),
        }
        if self.problem.network.balances(self.start) is not None:
            drift = _balance_drift(self.problem.network, weights, self.start)
            found["balance_drift"] = np.asarray(drift)[:count]
        return found

    def log_of_kinks(self) -> dict[str, np.ndarray]:
        """What happened at the kinks, as variables of a record."""
        if not self.log:
            return {}
        columns = zip(Happened._fields, zip(*self.log, strict=True), strict=True)
        return {f"kink_{name}": np.array(values) for name, values in columns}

    def snapshot(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a checkpoint holds of the kinks: facts, and states by name."""
        facts: dict[str, Any] = {name: getattr(self, name) for name in _FACTS}
        slides = self.patterns.slides.values()
        facts["slots"] = self.patterns.slots
        facts["slides"] = [
            [slide.units.tolist(), slide.alpha.tolist(), slide.theta] for slide in slides
        ]
        log = np.array([list(entry) for entry in self.log], np.float64)
        log = log.reshape(-1, len(Happened._fields))
        return facts, {"pattern": self.patterns.frozen(), "log_of_kinks": {"": log}}

    def restore(self, facts: dict[str, Any], read: Callable[[str, Any], Any]) -> None:
        """Stand where a snapshot was taken."""
        for name in _FACTS:
            setattr(self, name, facts[name])
        log = read("log_of_kinks", {"": np.zeros(0)})[""]
        self.log = [Happened(*row[:2], *map(int, row[2:])) for row in log.tolist()]
        slides = {
            units[0]: Slide(np.array(units), np.array(alpha), theta)
            for units, alpha, theta in facts["slides"]
        }
        self.patterns.restore(facts["slots"], slides, lambda like: read("pattern", like))
        self._freeze()

    def _start(self, weights: Weights) -> np.ndarray:
        """Pre-activations, where the gates are those of their own signs."""
        lower = self.place.lower[None, :]
        shape = self.problem.data.num_points, self.num_units
        z, gates = np.ones(shape), np.ones(shape)
        for _ in range(len(set(self.place.layer.tolist())) + 1):
            z = np.asarray(_met(self.bends, weights, self.problem.data, as_array(gates)))
            new = np.where(z > 0, 1.0, lower)
            if np.array_equal(new, gates):
                break
            gates = new
        return z

    def _freeze(self) -> None:
        """The problem in the pattern as it is now."""
        network = self.problem.network.without_branch()
        network = Frozen(network, self.bends, self.patterns.frozen())
        self.here = eqx.tree_at(lambda problem: problem.network, self.problem, network)

    # ---------------------------------------------------------------------------------------------
    # At a kink
    # ---------------------------------------------------------------------------------------------

    def begin(self, weights: Weights) -> Weights:
        """Decide about units that begin on their kinks."""
        free = self._look(weights).near
        if not np.any(free):
            return weights
        return self._settle(weights, np.nonzero(free.reshape(-1))[0], start=True)[0]

    def pass_(
        self, weights: Weights, s: float, log_time: float, log_risk: float, step: int
    ) -> Weights:
        """Go past the kink that the weights are at; where to go on from.

        Raises:
            NotUniqueError: where the flow is not unique.
            StuckError: where no way on is found.
        """
        before = np.asarray(self.patterns.pattern.sliding)
        over = self.crowd(weights) is not None
        on = np.asarray(self.patterns.pattern.on).copy()
        seen = self._look(weights)
        past = seen.beyond[: before.size] > 1
        met: set[int] = set()
        if over:
            weights, stuck, met = self._step_over(weights, seen)
            meant = np.union1d(stuck, np.nonzero(self._ended(seen.at))[0]).astype(np.int64)
        else:
            near = seen.near.reshape(-1) & ~before.reshape(-1)
            meant = np.nonzero(near | past | self._ended(seen.at))[0]
        weights, touched = self._settle(weights, meant, start=False)
        touched |= met
        after = np.asarray(self.patterns.pattern.sliding)
        now = np.asarray(self.patterns.pattern.on)
        for unit in touched:
            point, u = divmod(int(unit), self.num_units)
            if after[point, u] and not before[point, u]:
                event = SLID
            elif before[point, u] and not after[point, u]:
                event = LEFT
            elif not after[point, u] and now[point, u] != on[point, u]:
                event = STEPPED_OVER if over else CROSSED
            else:
                continue
            layer, neuron = int(self.place.layer[u]), int(self.place.neuron[u])
            self.log.append(Happened(log_time, log_risk, step, layer, neuron, point, event))
            self.num_kinks += 1
        self.num_patterns += 1
        self.num_joint += self._joint()
        self.repeated = self.repeated + 1 if s - self.last_s <= SAME * max(1.0, abs(s)) else 0
        self.last_s = s
        if self.repeated > STUCK:
            raise StuckError(f"{STUCK} kinks in a row at one place")
        return weights

    def crowd(self, weights: Weights) -> float | None:
        """If many kinks are in a step that ends at these weights, what stepping over them takes.

        That is the size of what mends the step, relative to the weights. None where kinks are few,
        and for several hidden layers, where every kink is landed on.
        """
        if self.rows is None:
            return None
        seen = self._look(weights)
        past = seen.beyond[: seen.at.z.size] > 1
        if np.count_nonzero(past) <= MANY:
            return None
        moves, _, _ = self._mended(seen, np.nonzero(past)[0])
        size = np.sqrt(sum(float(np.sum(np.square(leaf))) for leaf in jax.tree.leaves(weights)))
        return float(np.linalg.norm(moves)) / size

    # A unit that passed its kink |z|/|z'| ago with its old gate g has since had the velocity of its
    # neuron wrong by (g - g') b x, so that w is mended, to first order in the step, by
    # (g' - g) b x |z|/|z'|; where it would have come back, as both sides drive it to the kink, by
    # putting it on it along x, which is what the wrong force has pushed it along.
    def _mended(self, seen: Seen, units: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What mends the neurons of units that are past their kinks, and which of these cross.

        Returns:
            The change of neurons' weights, (k, d), each unit's by itself; the neurons, (k,); and
            which units cross, (k,).
        """
        assert self.rows is not None
        points, neurons = np.divmod(units, self.num_units)
        rows, at = self.rows[points], seen.at
        squares = np.sum(rows**2, 1)
        z, speed, force = (x[points, neurons] for x in (at.z, at.speed, at.force))
        on = np.asarray(self.patterns.pattern.on)[points, neurons]
        jump = np.where(on, -1.0, 1.0) * (1 - self.place.lower[neurons])
        other = speed + jump * force * squares
        away = np.sign(speed) == np.sign(z)
        crosses = ~away | (other * speed > 0)
        ago = np.where(away, np.abs(z) / np.where(away, np.abs(speed), 1.0), 0.0)
        part = np.where(crosses, jump * force * ago, -z / np.where(squares > 0, squares, 1.0))
        return part[:, None] * rows, neurons, crosses

    def _step_over(self, weights: Weights, seen: Seen) -> tuple[Weights, np.ndarray, set[int]]:
        """Put units that are past their kinks on the other side; mend what they did meanwhile.

        Returns:
            The weights; units that are to be decided about, on their kinks; all that were met.
        """
        met: set[int] = set()
        stuck: list[int] = []
        for turn in range(TURNS):
            past = np.nonzero(seen.beyond[: seen.at.z.size] > 1)[0]
            past = past[~np.isin(past, stuck)]
            if len(past) == 0:
                break
            moves, neurons, crosses = self._mended(seen, past)
            if turn == 0:
                own = np.asarray(self.bends.of_neurons(weights)).copy()
                np.add.at(own, neurons, moves)
                changed = self.bends.with_neurons(weights, as_array(own))
                weights = jax.tree.map(np.asarray, changed)
                stuck += past[~crosses].tolist()
                past = past[crosses]
            on = np.asarray(self.patterns.pattern.on).reshape(-1)[past]
            self.patterns.gate(past, ~on)
            self.num_stepped_over += len(past)
            met |= set(past.tolist())
            self._freeze()
            seen = self._look(weights)
        return weights, np.array(stuck, np.int64), met

    # Of units that slide at one point, one behind the other, the force on the first depends on
    # where the second is at each moment, and not on its mean gate alone: where it changes its sign
    # the gates that keep the slide may be outside [kappa, 1], and it is left too early here.
    def _joint(self) -> bool:
        """Whether units of several layers slide at one point."""
        if self.rows is not None:
            return False
        layers: dict[int, int] = {}
        for unit in self._sliding_units(None).tolist():
            point, u = divmod(unit, self.num_units)
            layer = int(self.place.layer[u])
            if layers.setdefault(point, layer) != layer:
                return True
        return False

    def _ended(self, seen: Sight) -> np.ndarray:
        """Which units slide in slots that are to be decided about again, (n U,)."""
        pattern = self.patterns.pattern
        theta, pull = np.asarray(seen.theta), np.asarray(seen.pull)
        over = (theta < 0) | (theta > 1) | (pull >= 0) | ~np.isfinite(theta)
        over &= np.asarray(pattern.tangent.active)
        if not np.any(over):
            return np.zeros(seen.z.size, bool)
        return (np.asarray(pattern.sliding) & over[np.asarray(pattern.slot)]).reshape(-1)

    def _look(self, weights: Weights) -> Seen:
        return jax.device_get(_seen(self.here, weights))

    def _settle(
        self, weights: Weights, units: np.ndarray, *, start: bool
    ) -> tuple[Weights, set[int]]:
        """Decide about units, and about those that this has to do with, until nothing changes."""
        touched: set[int] = set()
        free = set(units.tolist()) if start else set()
        seen = self._look(weights)
        for _ in range(ROUNDS):
            done, weights = self._decide(weights, seen.at, units, free)
            touched |= done
            self._freeze()
            seen = self._look(weights)
            units = self._inconsistent(seen, touched)
            if len(units) == 0:
                break
            free = set()
        return weights, touched

    def _inconsistent(self, seen: Seen, touched: set[int]) -> np.ndarray:
        """Units that would at once move to the other side of their kinks, or leave their slides."""
        pattern, at = self.patterns.pattern, seen.at
        among = np.array(sorted(touched), np.int64)
        rows, columns = np.divmod(among, self.num_units)
        speed = np.where(np.asarray(pattern.on), -at.speed, at.speed)[rows, columns]
        away = speed > AWAY * np.max(np.abs(at.speed), initial=0.0)
        wrong = seen.near[rows, columns] & away & ~np.asarray(pattern.sliding)[rows, columns]
        if np.any(seen.beyond[at.z.size :] > 1):
            return np.union1d(among[wrong], np.nonzero(self._ended(at))[0])
        return among[wrong]

    def _decide(
        self, weights: Weights, seen: Sight, units: np.ndarray, free: set[int]
    ) -> tuple[set[int], Weights]:
        """One decision about some units, block by block."""
        if self.rows is None:
            return self._decide_block(weights, seen, units, free)
        touched: set[int] = set()
        for neuron in sorted({int(unit) % self.num_units for unit in units}):
            own = units[units % self.num_units == neuron]
            done, weights = self._decide_neuron(weights, seen, neuron, own, free)
            touched |= done
        return touched, weights

    def _sliding_units(self, neurons: Sequence[int] | None) -> np.ndarray:
        slides = [self.patterns.slides[u].units for u in self.patterns.sliding_in(neurons)]
        return np.concatenate(slides) if slides else np.zeros(0, np.int64)

    def _decide_neuron(
        self, weights: Weights, seen: Sight, neuron: int, units: np.ndarray, free: set[int]
    ) -> tuple[set[int], Weights]:
        """A neuron of one hidden layer: its velocity is sum_i g_i b_i x_i."""
        rows, pattern = self.rows, self.patterns.pattern
        assert rows is not None
        slid = self._sliding_units([neuron])
        units = np.union1d(units, slid)
        points = units // self.num_units
        force = np.asarray(seen.force)[:, neuron]
        others = np.ones(len(rows), bool)
        others[points] = False
        delta = (np.asarray(pattern.gates)[:, neuron] * force)[others]
        block = self._as_block(
            units, rows[points], delta @ rows[others], force[points], None, slid, free
        )
        groups = decide(block, self.branch)
        self._take(block, groups, seen, [neuron])
        own = np.asarray(self.bends.of_neurons(weights)).copy()
        across = np.asarray(self.patterns.pattern.tangent.across)[neuron]  # pyright: ignore
        if np.any(across):
            own[neuron] = own[neuron] - across.T @ (across @ own[neuron])
            weights = jax.tree.map(np.asarray, self.bends.with_neurons(weights, as_array(own)))
        return set(units.tolist()), weights

    def _decide_block(
        self, weights: Weights, seen: Sight, units: np.ndarray, free: set[int]
    ) -> tuple[set[int], Weights]:
        """All units of another network, which have to do with each other."""
        slid = self._sliding_units(None)
        touched = np.union1d(units, slid).astype(np.int64)
        # Units that are at rest without the others, as behind a layer that is all off, have no
        # kink of their own: their gates stay, until the others have been decided about.
        units, flat, base, force, later = self._block(weights, touched)
        sizes = np.linalg.norm(flat, axis=1)
        own = sizes > DEPENDENT * np.max(sizes, initial=0.0)
        if not np.all(own) and np.any(own):
            units, flat, base, force, later = self._block(weights, touched[own])
        block = self._as_block(units, flat, base, force, later, slid, free)
        groups = decide(block, self.branch)
        self._take(block, groups, seen, None)
        stay = [int(group.members[0]) for group in groups if group.side == 0]
        if stay:
            n = block.normals[stay]
            off = np.asarray(seen.z).reshape(-1)[units[stay]]
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
        count = 1 << max(3, int(len(units) - 1).bit_length())
        padded = np.concatenate([units, np.repeat(units[:1], count - len(units))])
        gates = np.asarray(self.patterns.pattern.gates).copy()
        gates.reshape(-1)[units] = 0.0
        base, force, normals, later = _block(self.here, weights, as_array(gates), as_array(padded))
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
        later: np.ndarray | None,
        slid: np.ndarray,
        free: set[int],
    ) -> Block:
        on = np.asarray(self.patterns.pattern.on).reshape(-1)[units]
        loose = np.isin(units, slid) | np.isin(units, list(free))
        lower = self.place.lower[units % self.num_units]
        return Block(units, normals, base, force, later, lower, on, loose)

    def _take(
        self, block: Block, groups: list[Group], seen: Sight, neurons: Sequence[int] | None
    ) -> None:
        """Write down where groups go."""
        slides: dict[int, Slide] = {}
        force = np.asarray(seen.force).copy()
        for group in groups:
            members = block.units[group.members]
            if group.open and self.branch is None:
                point, u = divmod(int(members[0]), self.num_units)
                raise NotUniqueError(
                    f"the unit of neuron {self.place.neuron[u]} in layer {self.place.layer[u]} at "
                    f"point {point} is on its kink, and both ways lead away from it"
                )
            if group.side == 0:
                slides[int(members[0])] = Slide(members, group.alpha, group.theta)
            else:
                above = (group.alpha > 0) == (group.side > 0)
                self.patterns.gate(members, above)
        self.patterns.replace(neurons, slides, force)


_FACTS = ("num_joint", "num_kinks", "num_stepped_over", "num_patterns", "last_s", "repeated")
