"""Which way a flow takes from a place where kinks of several layers meet: see ``meeting.py``."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from gflow.dynamics.kinks.decide import (
    INTERIOR,
    PARALLEL,
    Block,
    Group,
    decide,
    gates_of,
)
from gflow.dynamics.kinks.meeting import GONE, RESTS, Layers, Meeting

AHEAD = 30.0
"""Widths from where a flow begins to the place."""

SHARPER = 1e-3, 0.1, 1.0
"""Widths of gates of each layer, in those of the one before, one tried after the other."""

HORIZONS = (1e3, 1e5, 1e8)
"""Times at which a piece is looked for; in one of time a unit moves by about a width."""

CALLS = 5000
"""Evaluations of a flow, before it is given up."""

STILL = 1e-4
"""Widths in one of time by which units that stay at their kinks may yet move."""

ALIKE = 0.05
"""Gates of a piece are those of the flow that led to it up to so much."""

CLEAR = 0.1
"""A sum below this part of its terms is small since they cancel."""

SEEN, FEWEST_STEPS, MOST_STEPS, NEAR, ASTRAY, NOISE = 30.0, 200, 5000, 2.0, 0.5, 2.0
"""Of descents: widths, and the fewest and most steps, over which their means are taken, and widths
ahead from which they begin; the part of the speed, and widths, that they may be off by."""

BOTH_WAYS = "both ways lead away from it"

DESCENDS = "descent by small steps leads elsewhere from it than smoothed gates do"

OUTSIDE = 1e-6
"""Gates of slides may be outside their interval by so much: such a slide ends."""

DIVERGED = 1e6
"""Gates that are larger are none."""


def decide_layers(block: Block, layers: Layers, branch: int | None) -> list[Group] | None:
    """Where units of any layers go, those without a kink of their own too.

    Args:
        block, layers: the units.
        branch: the side, 1 or -1, that a unit takes where the flow is not unique.

    Returns:
        None if no way on is found.
    """
    if np.all(layers.own) and not np.any(layers.later):
        groups = decide(block, branch)
        if len(groups) == 1 or np.all(block.force < 0) or _moves(block, layers.speed, groups):
            return groups
    if not np.any(layers.own):
        return []
    return meet(Meeting.of(block, layers), branch)


def _moves(block: Block, before: np.ndarray, groups: list[Group]) -> bool:
    """Whether groups that repel move from their kinks, or stay on the side where they rested."""
    nu = np.zeros(len(block.units))
    for group in groups:
        nu[group.members] = gates_of(group, block.lower) * block.force[group.members]
    speed = block.normals @ (block.base + nu @ block.normals)
    lengths = np.linalg.norm(block.normals, axis=1)
    tiny = RESTS * lengths * (np.linalg.norm(block.base) + np.sum(np.abs(nu) * lengths))
    for group in groups:
        unit = group.members[0]
        rested = abs(before[unit]) <= tiny[unit] and block.on[unit] == (group.side > 0)
        repels = group.side != 0 and bool(np.any(block.force[group.members] >= 0))
        if repels and not rested and group.side * speed[unit] <= tiny[unit]:
            return False
    return True


def meet(at: Meeting, branch: int | None) -> list[Group] | None:
    """Where units go, those without a kink of their own too; None if that is not found.

    Args:
        at: the place.
        branch: the side, 1 or -1, that a unit takes where the flow is not unique.

    Raises:
        TornError: where it is not, and there is no branch.
    """
    push = np.abs(at.force) + np.abs(at.force) @ np.abs(at.later)
    width = np.abs(at.gram) @ push + at.lengths * at.size
    for _ in range(int(np.max(at.layers.layer))):
        width = np.where(at.lengths > 0, width, np.abs(at.later) @ width)
    width = np.maximum(width, 1e-12 * np.max(width) + 1e-300)
    if np.all(at.layers.own) and np.linalg.matrix_rank(at.gram, 1e-9 * np.max(at.gram)) == len(
        width
    ):
        way = _minimum(at, width)
        if way is not None:
            return way.groups
    starts, torn = at.starts(width, AHEAD), None
    for sharper in SHARPER:
        found: list[tuple[np.ndarray, _Way]] = []
        for zeta in starts:
            way = _way(at, zeta, width, sharper)
            if way is not None:
                sides = _sides(way.groups, len(width))
                if not any(np.array_equal(sides, known) for known, _ in found):
                    found.append((sides, way))
        if len(found) > 1:  # a unit that goes more than one way is to choose
            unit = int(np.argmax(np.ptp(np.stack([sides for sides, _ in found]), axis=0) > 0))
            for sides, way in found:
                if sides[unit] == branch:
                    return way.groups
            torn = torn or TornError(unit, BOTH_WAYS)
        elif found:
            way = found[0][1]
            strays = at.layers.own & _strays(at, width, way.speed)
            if not np.any(strays) or branch is not None:
                return way.groups
            torn = torn or TornError(int(np.argmax(strays)), DESCENDS)
    if torn is not None:
        raise torn
    return None


def _strays(at: Meeting, width: np.ndarray, speed: np.ndarray) -> np.ndarray:
    """Which units descent leads elsewhere than at some speed, (k,).

    Its steps are of one of time, and gates are sharp: the function is homogeneous, so that steps
    of other sizes go the same ways. Means over many of them are compared, in which its zigzag of a
    width does not hide that a unit leaves slowly.
    """
    zeta, scaled = at.starts(width, NEAR)[-1], np.abs(speed) / width
    comes = np.abs(at.layers.speed) / width
    slow, late = (np.min(x[x > STILL], initial=1.0) for x in (scaled, comes))
    counts = (2 * NEAR / late, SEEN / slow)
    coming, half = (int(np.clip(x, FEWEST_STEPS, MOST_STEPS)) for x in counts)
    seen = []
    for steps in (coming + 2 * half, half, half):
        total = np.zeros(len(zeta))
        for _ in range(steps):
            z, gates = at.sharp(zeta)
            zeta = zeta + at.ahead + at.gram @ at.nu(gates)
            total = total + z
        seen.append(total / steps)
    moved, expected = (seen[2] - seen[1]) / width, half * speed / width
    return np.abs(moved - expected) > ASTRAY * np.max(np.abs(expected), initial=0.0) + NOISE


def _sides(groups: list[Group], count: int) -> np.ndarray:
    sides = np.zeros(count)
    for group in groups:
        sides[group.members] = np.sign(group.alpha) * group.side
    return sides


class _TiredError(Exception):
    """A flow has been followed for too long."""


class TornError(Exception):
    """The place of a unit in its block that may go several ways, and why."""


class _Rest(NamedTuple):
    """Where a flow of smoothed gates has come to, k units."""

    side: np.ndarray
    """1 or -1 of units that have left their kinks, 0 of those that stay, (k,), as are the next."""
    sign: np.ndarray
    """Of z."""
    gates: np.ndarray
    clear: np.ndarray
    """Which z, of units without a kink of their own, are no differences of larger numbers, (k,)."""


def _flow(
    at: Meeting, zeta: np.ndarray, width: np.ndarray, sharper: float
) -> Iterator[tuple[_Rest, bool]]:
    """Where the flow of smoothed gates is at some times, and whether what stays there is at rest.

    Args:
        at: the place.
        zeta, width: the start and the widths of gates of the first layer, (k,).
        sharper: widths of each layer in those of the one before.
    """
    from scipy.integrate import solve_ivp

    sharp = width * sharper ** (at.layers.layer - np.min(at.layers.layer))
    moves = at.lengths > 0
    calls = 0

    def spread(own: np.ndarray) -> np.ndarray:
        full = np.zeros(len(zeta))
        full[moves] = own * width[moves]
        return full

    def rhs(_: float, own: np.ndarray) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls > CALLS:
            raise _TiredError
        gates = at.activated(spread(own), sharp)[1]
        return ((at.ahead + at.gram @ at.nu(gates)) / width)[moves]

    def slope(_: float, own: np.ndarray) -> np.ndarray:
        scaled = at.slope(spread(own), sharp) * (width[None, :] / width[:, None])
        return scaled[moves][:, moves]

    done, own = 0.0, zeta[moves] / width[moves]
    for upto in HORIZONS:
        try:
            run = solve_ivp(rhs, (done, upto), own, "LSODA", jac=slope, rtol=1e-6, atol=1e-6)
        except _TiredError:
            return
        done, own = upto, run.y[:, -1]
        z, gates = at.activated(spread(own), sharp)
        side = np.where(np.abs(z) > GONE * width, np.sign(z), 0.0)
        sign = np.where(z == 0, np.where(at.block.on, 1, -1), np.sign(z))
        through = np.eye(len(z)) - at.later * gates[None, :]
        speed = np.linalg.solve(through, spread(rhs(0.0, own)))
        stays = side == 0
        still = bool(np.all(np.abs(speed[stays]) <= STILL * width[stays]))
        soft = sharp * np.logaddexp(0.0, z / sharp)
        terms = np.abs(at.later) @ np.abs(at.lower * z + (1 - at.lower) * soft)
        clear = ~moves & (np.abs(z) > CLEAR * terms)
        yield _Rest(side, sign, gates, clear), still


def _way(at: Meeting, zeta: np.ndarray, width: np.ndarray, sharper: float) -> "_Way | None":
    """The piece in which the flow of smoothed gates goes on."""
    for rest, still in _flow(at, zeta, width, sharper):
        if still:
            way = _piece(at, rest, width)
            if way is not None:
                return way
    return None


class _Way(NamedTuple):
    """A piece."""

    groups: list[Group]
    speed: np.ndarray
    """Of z of each unit, (k,)."""


def _piece(at: Meeting, rest: _Rest, width: np.ndarray) -> _Way | None:
    """The piece of some sides, and of signs of those that have none; None if there is none."""
    found = _solved_piece(at, rest, width)
    if found is None:
        return None
    # The gates of the flow itself are not as sharp where little is in front of them.
    way, off = found[0], np.abs(found[1] - rest.gates)[found[2] & ~rest.clear]
    return way if np.max(off, initial=0.0) <= ALIKE else None


def _minimum(at: Meeting, width: np.ndarray) -> _Way | None:
    """The piece in which all units slide, if the function has its minimum there."""
    nothing = np.zeros(len(width))
    found = _solved_piece(at, _Rest(nothing, nothing, nothing, nothing > 0), width)
    return None if found is None else found[0]


def _solved_piece(
    at: Meeting, rest: _Rest, width: np.ndarray
) -> tuple[_Way, np.ndarray, np.ndarray] | None:
    """A piece, its gates, and which of these are to be those of the flow; None if there is none."""
    side, sign = rest.side, rest.sign
    k, own_kink = len(side), at.lengths > 0
    sliding = (side == 0) & own_kink
    gates = np.where(sign > 0, 1.0, at.lower)
    through = np.linalg.inv(np.eye(k) - at.later * np.where(sliding, 0.0, gates)[None, :])
    products = through @ at.gram @ through.T  # of the normals that units that have left add to
    slides = _groups(products, np.nonzero(sliding)[0])
    theta, first = np.full(len(slides), 0.5), [own[0] for own, _ in slides]
    solved = not slides
    for _ in range(30):
        for (own, alpha), part in zip(slides, theta, strict=True):
            low = at.lower[own]
            gates[own] = low + np.where(alpha > 0, part, 1 - part) * (1 - low)
        nu = at.nu(gates)
        force = at.force + nu @ at.later
        speed = through @ (at.ahead + at.gram @ nu)
        if solved:
            break
        by = np.zeros((k, len(slides)))
        for g, (own, alpha) in enumerate(slides):
            by[own, g] = np.sign(alpha) * (1 - at.lower[own]) * force[own]
        matrix = products[first] @ by
        size = np.linalg.norm(matrix, axis=0)
        size = np.where(size > 0, size, 1.0)
        change = _solved(matrix / size, -speed[first], -theta * size, (1 - theta) * size) / size
        theta = theta + change
        if not np.all(np.abs(theta) < DIVERGED):
            return None
        solved = bool(np.max(np.abs(change)) < 1e-12)
    if not solved:
        return None
    pull = [np.sum(np.abs(alpha) * (1 - at.lower[own]) * force[own]) for own, alpha in slides]
    if np.any(np.array(pull) >= 0) or np.any(np.abs(theta - 0.5) > 0.5 + OUTSIDE):
        return None
    if np.any(np.abs(speed[first]) > 1e-6 * width[first]):
        return None
    ends = np.abs(theta - 0.5) > 0.5 - INTERIOR  # and is left with no speed
    # Units that stay where they were may be at rest.
    least = np.where(~at.block.free & (np.where(at.block.on, 1, -1) == sign), -RESTS, RESTS)
    if np.any(np.where(sliding | ~own_kink, np.inf, sign * speed) <= least * width):
        return None
    groups = [
        Group(own, alpha, (1 if part > 0.5 else -1) * end, float(part), open=False)
        for (own, alpha), part, end in zip(slides, theta.tolist(), ends.tolist(), strict=True)
    ]
    groups += [
        Group(np.array([unit]), np.ones(1), int(sign[unit]), 0.0, open=False)
        for unit in np.nonzero(~sliding)[0]
    ]
    stays = sliding.copy()
    for (own, _), end in zip(slides, ends.tolist(), strict=True):
        stays[own] = not end
    behind = ~own_kink & np.any(at.later[:, stays] != 0, axis=1)
    return _Way(groups, speed), gates, sliding | behind


def _solved(
    matrix: np.ndarray, target: np.ndarray, least: np.ndarray, most: np.ndarray
) -> np.ndarray:
    """A solution x of a system of k equations; where it has many one between bounds."""
    from scipy.optimize import lsq_linear

    found, _, rank, _ = np.linalg.lstsq(matrix, target, rcond=1e-10)
    if rank == len(target) or np.all((found >= least) & (found <= most)):
        return found
    bounds = least, np.maximum(most, np.nextafter(least, np.inf))
    return lsq_linear(matrix, target, bounds, method="bvls", tol=1e-15).x


def _groups(products: np.ndarray, units: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Units of one kink, and their normals in units of the first one's, from a Gram matrix."""
    lengths, left, found = np.sqrt(np.diagonal(products)), units, []
    while len(left):
        first = left[0]
        cosines = products[first, left] / (lengths[first] * lengths[left])
        same = 1 - np.abs(cosines) <= PARALLEL
        alpha = np.sign(cosines[same]) * lengths[left[same]] / lengths[first]
        found.append((left[same], alpha))
        left = left[~same]
    return found
