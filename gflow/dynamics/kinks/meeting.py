r"""Where a flow goes from a place at which kinks of several layers meet, or kinks that repel.

Near such a place the risk is a piecewise linear function of how far the weights are from it. With
$\zeta_k$ what the pre-activation of unit k is changed by without the others of them,

$$z = \zeta + A\phi(z), \qquad \dot\zeta = p + G\nu, \qquad
\nu_k = \phi'(z_k)\tilde b_k, \quad \tilde b = b_0 + A^\top\nu,$$

A strictly lower triangular in the order of the layers, $p_k = \langle N_k, v_0\rangle$ and G the
Gram matrix of the normals. Where kinks attract and none is behind another the function is convex,
and the element of least norm of Clarke's subdifferential is where the flow goes (``decide.py``). In
general that element may be zero though the function has no minimum: a flow leaves such a place. If
normals are independent the function is

$$\langle\mu, \zeta\rangle - \langle b_0, \phi(z)\rangle
= \sum_k(\mu_kz_k - \tilde b_k\phi(z_k))\quad\text{with}\quad \tilde b = b_0 + A^\top\mu,$$

which has its minimum at zero where each $\mu_k/\tilde b_k \in [\kappa, 1]$ and $\tilde b_k < 0$:
all slide. Elsewhere the flow is that of the network with smoothed gates in the limit of sharp ones.
It is integrated from where the flow comes from, gates of later layers being sharper, until the
signs that it shows are those of a *piece*: where units that slide have gates in $[\kappa, 1]$ and a
force that attracts, and all others move to where they are.

**Not unique.** A flow whose start is disturbed may end in another piece: there the run ends, or
takes the branch that it is told. Descent, whose steps have a size, may besides stay where that flow
leaves: it passes the way out again and again, for steps however small, since the function is
homogeneous. Plain NumPy and SciPy, of a few units.
"""

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

STARTS = 3
"""Flows, and descents, from disturbed starts."""

AHEAD = 30.0
"""Widths from where a flow begins to the place."""

SHARPER = 1e-3
"""Widths of gates of each layer, in those of the one before."""

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

FAST, SEEN, MOST_STEPS, NEAR, ASTRAY, NOISE = 1e-2, 60.0, 5000, 4.0, 0.5, 15.0
"""Of the limits that are compared: a speed that is none of rest, widths and most steps by which a
descent is followed, twice, and widths ahead from which; parts and widths that it may be off by."""

SMOOTHED = "gates smoothed one way and another lead away from it differently"
DESCENDS = "descent by steps of any size leads away from it differently than smoothed gates do"

GONE = 100.0
"""Widths from a kink at which a unit has left it."""

OUTSIDE = 1e-6
"""Gates of slides may be outside their interval by so much: such a slide ends."""

DIVERGED = 1e6
"""Gates that are larger are none."""

RESTS = 1e-9
"""Speeds below this part of what forces and normals allow are zero."""


class Layers(NamedTuple):
    """What is known besides of units of several layers, k of them."""

    own: np.ndarray
    """Which have a kink of their own, (k,): others are at rest without those in front of them."""
    later: np.ndarray
    """A, shape (k, k)."""
    layer: np.ndarray
    """Shape (k,), as are the next two."""
    speed: np.ndarray
    """Of z as they come."""
    gates: np.ndarray
    """As they come."""


class Meeting(NamedTuple):
    """Units at their kinks, k of them, in the order of their layers at each point."""

    block: Block
    layers: Layers
    ahead: np.ndarray
    """p, shape (k,)."""
    gram: np.ndarray
    """G, shape (k, k); zero for units without a kink of their own."""
    size: float
    r"""$\lVert v_0\rVert$."""

    @property
    def force(self) -> np.ndarray:
        r"""$b_0$, shape (k,)."""
        return self.block.force

    @property
    def lower(self) -> np.ndarray:
        r"""$\kappa$, shape (k,)."""
        return self.block.lower

    @property
    def later(self) -> np.ndarray:
        """A, shape (k, k)."""
        return self.layers.later

    @property
    def lengths(self) -> np.ndarray:
        """Of the normals, (k,)."""
        return np.sqrt(np.diagonal(self.gram))

    def activated(self, zeta: np.ndarray, width: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pre-activations of rows of zeta, and their gates; sharp ones for widths of zero."""
        z, smooth = zeta, width > 0
        some = np.where(smooth, width, 1.0)
        for _ in range(len(self.force)):
            soft = some * np.logaddexp(0.0, z / some)
            h = self.lower * z + (1 - self.lower) * np.where(smooth, soft, np.maximum(z, 0.0))
            new = zeta + h @ self.later.T
            if np.array_equal(new, z):
                break
            z = new
        part = np.exp(-np.logaddexp(0.0, -z / some))
        return z, self.lower + (1 - self.lower) * np.where(smooth, part, z > 0)

    def nu(self, gates: np.ndarray) -> np.ndarray:
        r"""$\nu$ of rows of gates."""
        nu = gates * self.force
        for _ in range(len(self.force)):
            new = gates * (self.force + nu @ self.later)
            if np.array_equal(new, nu):
                break
            nu = new
        return nu

    def starts(self, width: np.ndarray, ahead: float) -> np.ndarray:
        """Where flows begin, rows of zeta, the first not disturbed.

        Args:
            width: of gates, (k,).
            ahead: widths from there to the kink of the unit that comes slowest.
        """
        side = np.where(self.block.on, 1.0, -1.0)
        comes = ~self.block.free & (side * self.layers.speed < -RESTS * width)
        comes &= self.layers.own
        ago = ahead / np.min(np.abs(self.layers.speed[comes]) / width[comes], initial=1.0)
        part = np.clip((self.layers.gates - self.lower) / (1 - self.lower), 1e-6, 1 - 1e-6)
        slides = width * np.log(part / (1 - part))
        z = np.where(comes, -ago * self.layers.speed, 2 * GONE * side * width)
        z = np.where(self.block.free, slides, z)
        sharp = np.where(z > 0, z, self.lower * z)
        # Units that rest on their side may yet be moved by those in front of them.
        own_speed = self.layers.speed - self.later @ (self.layers.gates * self.layers.speed)
        rests = ~self.block.free & (np.abs(own_speed) <= RESTS * width)
        zeta = np.where(rests, 2 * GONE * side * width, z - self.later @ sharp)
        zeta = np.where(self.layers.own, zeta, 0.0) / width
        scaled = self.gram / (width[:, None] * width[None, :])
        zeta = width * (scaled @ np.linalg.lstsq(scaled, zeta, rcond=1e-10)[0])
        by = np.random.default_rng(0).uniform(-1, 1, (STARTS, len(z)))
        by[0] = 0.0
        squares = np.where(self.lengths > 0, self.lengths**2, np.inf)
        return zeta[None, :] + by * (width / squares) @ self.gram


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
    normals = np.where(layers.own[:, None], block.normals, 0.0)
    size = float(np.linalg.norm(block.base))
    at = Meeting(block, layers, normals @ block.base, normals @ normals.T, size)
    return meet(at, branch)


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
    starts = at.starts(width, AHEAD)
    found: list[tuple[np.ndarray, _Way]] = []
    for zeta in starts:
        way = _way(at, zeta, width)
        if way is not None:
            sides = _sides(way.groups, len(width))
            if not any(np.array_equal(sides, known) for known, _ in found):
                found.append((sides, way))
    if not found:
        return None
    if len(found) > 1:  # a unit that goes more than one way is to choose
        unit = int(np.argmax(np.ptp(np.stack([sides for sides, _ in found]), axis=0) > 0))
        if branch is None:
            raise TornError(unit, "both ways lead away from it")
        for sides, way in found:
            if sides[unit] == branch:
                return way.groups
    elif branch is None:
        _agree(at, starts, width, *found[0])
    return found[0][1].groups


def _agree(
    at: Meeting, starts: np.ndarray, width: np.ndarray, sides: np.ndarray, way: "_Way"
) -> None:
    """Make sure that other limits lead into the same piece.

    Raises:
        TornError: if they do not.
    """
    own = at.layers.own
    for rest, still in _flow(at, starts[0], width, 1.0):
        if still:
            stays = own & (rest.side == 0)
            goes = own & (rest.side != 0)
            wrong = stays & (np.abs(way.speed) > FAST * width) | goes & (rest.side * sides < 0)
            wrong |= goes & (sides == 0) & (np.abs(way.speed) < STILL * width)
            if np.any(wrong):
                raise TornError(int(np.argmax(wrong)), SMOOTHED)
            break
    wrong = own & _strays(at, at.starts(width, NEAR)[-1], width, way.speed)
    if np.any(wrong):
        raise TornError(int(np.argmax(wrong)), DESCENDS)


def _strays(at: Meeting, zeta: np.ndarray, width: np.ndarray, speed: np.ndarray) -> np.ndarray:
    """Which units descent leads elsewhere than at some speed, (k,).

    Its steps are of one of time, and gates are sharp: the function is homogeneous, so that steps
    of other sizes go the same ways.
    """
    scaled = np.abs(speed) / width
    slow = np.min(scaled[scaled > STILL], initial=1.0)
    half = int(np.clip(SEEN / slow, 200, MOST_STEPS))
    lower, later, force, gram = at.lower, at.later, at.force, at.gram
    passes = int(np.ptp(at.layers.layer))
    seen = []
    for _ in range(2):
        for _ in range(half):
            z = zeta
            for _ in range(passes):
                z = zeta + later @ np.where(z > 0, z, lower * z)
            gates = np.where(z > 0, 1.0, lower)
            nu = gates * force
            for _ in range(passes):
                nu = gates * (force + nu @ later)
            zeta = zeta + at.ahead + gram @ nu
        seen.append(z)
    moved, expected = (seen[1] - seen[0]) / width, half * speed / width
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

    done, own = 0.0, zeta[moves] / width[moves]
    for upto in HORIZONS:
        try:
            run = solve_ivp(rhs, (done, upto), own, "LSODA", rtol=1e-6, atol=1e-6)
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


def _way(at: Meeting, zeta: np.ndarray, width: np.ndarray) -> "_Way | None":
    """The piece in which the flow of smoothed gates goes on."""
    for rest, still in _flow(at, zeta, width, SHARPER):
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
    sliding = (rest.side == 0) & (at.lengths > 0)
    ends = np.where(rest.sign > 0, 1.0, at.lower)
    through = np.linalg.inv(np.eye(len(ends)) - at.later * np.where(sliding, 0.0, ends)[None, :])
    found = _solved_piece(at, rest, width, through)
    if found is None:
        return None
    # The gates of the flow itself are not as sharp where little is in front of them.
    way, off = found[0], np.abs(found[1] - rest.gates)[found[2] & ~rest.clear]
    return way if np.max(off, initial=0.0) <= ALIKE else None


def _minimum(at: Meeting, width: np.ndarray) -> _Way | None:
    """The piece in which all units slide, if the function has its minimum there."""
    nothing = np.zeros(len(width))
    found = _solved_piece(at, _Rest(*3 * [nothing], nothing > 0), width, np.eye(len(width)))
    return None if found is None else found[0]


def _solved_piece(
    at: Meeting, rest: _Rest, width: np.ndarray, through: np.ndarray
) -> tuple[_Way, np.ndarray, np.ndarray] | None:
    """A piece, its gates, and which of these are to be those of the flow; None if there is none."""
    side, sign = rest.side, rest.sign
    k, own_kink = len(side), at.lengths > 0
    sliding = (side == 0) & own_kink
    gates = np.where(sign > 0, 1.0, at.lower)
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
    return _Way(groups, speed), gates, stays | behind


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
