r"""Where a flow goes from a kink: across it, along it, or back from it.

At a place where units k of a block have $z_k = 0$ the velocity is $v = v_0 + \sum_k\nu_kN_k$ with
$\nu_k = \lambda_kb_k$, gates $\lambda_k \in [\kappa_k, 1]$ and $v_0$ that of all other units. Units
whose normals are parallel have one kink and are one *group*. Seen along its normal N a group has
the force $\beta_-$ where $\langle N, w\rangle < 0$ and $\beta_+$ where it is positive.

* **$\beta_+ < \beta_-$: attracting.** The risk is convex across the kink. The flow is that of
  least $\lVert v\rVert$ over $\nu \in [\beta_+, \beta_-]$, a least-squares problem with bounds for
  all such groups of a block together: at a bound the flow leaves to that side, else it slides.
  With one group this is the test of one-sided speeds.
* **$\beta_+ > \beta_-$: repelling.** The speed grows as the kink is passed, so that what comes from
  one side crosses to the other. Where a group has nowhere to come from, as after a slide whose
  force has changed its sign, both sides may lead away from the kink: the flow is not unique.

Where kinks of several layers meet at a point of the data see ``meeting.py``. Plain NumPy, of a few
units.
"""

from typing import NamedTuple

import numpy as np

PARALLEL = 1e-12
"""Normals are parallel up to this part of their length."""

INTERIOR = 1e-10
"""A force closer to its bound, relatively, is at the bound."""

AWAY = 1e-11
"""Speeds below this part of what the normal and the velocities allow are zero."""


class Block(NamedTuple):
    """Units at their kinks that have to do with each other; k units, weights of dimension D."""

    units: np.ndarray
    """Their numbers, shape (k,)."""
    normals: np.ndarray
    """Shape (k, D)."""
    base: np.ndarray
    r"""$v_0$, shape (D,)."""
    force: np.ndarray
    """b, without what is behind other units of the block, shape (k,)."""
    lower: np.ndarray
    r"""$\kappa$, shape (k,)."""
    on: np.ndarray
    """On which side each is, or was before it came to its kink, shape (k,)."""
    free: np.ndarray
    """Units that come from neither side: those that slid, or begin on their kink, shape (k,)."""


class Group(NamedTuple):
    """Units of one kink, and where they go from it."""

    members: np.ndarray
    """Places in the block; the first is the one that speaks for all."""
    alpha: np.ndarray
    """Their normals in units of the first one's."""
    side: int
    """1 above, -1 below, 0 for a slide."""
    theta: float
    """Of a slide."""
    open: bool
    """Whether the flow is not unique here."""


def groups_of(block: Block) -> list[tuple[np.ndarray, np.ndarray]]:
    """The members of each group and their normals in units of the first one's."""
    sizes = np.linalg.norm(block.normals, axis=1)
    unit = block.normals / np.where(sizes > 0, sizes, 1.0)[:, None]
    cosines = unit @ unit.T
    left, found = [k for k in range(len(sizes)) if sizes[k] > 0], []
    while left:
        first = left[0]
        members = np.array([k for k in left if 1 - abs(cosines[first, k]) <= PARALLEL])
        alpha = np.sign(cosines[first, members]) * sizes[members] / sizes[first]
        found.append((members, alpha))
        left = [k for k in left if k not in set(members.tolist())]
    return found


def decide(block: Block, branch: int | None = None) -> list[Group]:
    """Where each group of a block goes.

    Args:
        block: units at their kinks.
        branch: the side, 1 or -1, that a group takes where the flow is not unique.
    """
    found = groups_of(block)
    if not found:
        return []
    return _solve(block, found, branch)


class Alone(NamedTuple):
    """Many blocks of one unit each, k of them."""

    normals: np.ndarray
    """Shape (k, d)."""
    base: np.ndarray
    """Likewise."""
    force: np.ndarray
    """Shape (k,), as are the others; see ``Block``."""
    lower: np.ndarray
    on: np.ndarray
    free: np.ndarray


def decide_alone(block: Alone, branch: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    r"""What ``decide`` says of blocks of one unit: sides, $\theta$ and whether it is open, (k,)."""
    squares = np.sum(block.normals**2, 1)
    some = np.where(squares > 0, squares, 1.0)
    rest = np.sum(block.normals * block.base, 1)
    above, below = block.force, block.force * block.lower
    side = np.where(block.on, 1, -1)
    repels = above >= below
    sizes = np.linalg.norm(block.base, axis=1), np.abs(np.where(side > 0, above, below))
    away = AWAY * np.sqrt(squares) * (sizes[0] + sizes[1] * np.sqrt(squares))
    slow, fast = rest + below * squares, rest + above * squares
    open_ = repels & block.free & (slow < -away) & (fast > away)
    turned = np.where(
        (side < 0) & (slow > away), 1, np.where((side > 0) & (fast < -away), -1, side)
    )
    turned = np.where(open_, side if branch is None else branch, turned)
    nu = np.minimum(np.maximum(-rest / some, above), below)
    theta = np.where(repels, (turned > 0) * 1.0, (below - nu) / np.where(repels, 1, below - above))
    slides = ~repels & (theta > INTERIOR) & (theta < 1 - INTERIOR)
    return (
        np.where(slides, 0, np.where(repels, turned, np.where(theta >= 0.5, 1, -1))),
        theta,
        open_,
    )


def _solve(
    block: Block, found: list[tuple[np.ndarray, np.ndarray]], branch: int | None
) -> list[Group]:
    """Where groups go, given their members and normals."""
    force = block.force
    normals = np.stack([block.normals[members[0]] for members, _ in found])
    below, above, sides = [], [], []
    for members, alpha in found:
        b, low = force[members], block.lower[members]
        above.append(np.sum(alpha * b * np.where(alpha > 0, 1.0, low)))
        below.append(np.sum(alpha * b * np.where(alpha > 0, low, 1.0)))
        sides.append(1 if block.on[members[0]] == (alpha[0] > 0) else -1)
    below, above, side = np.array(below), np.array(above), np.array(sides)
    open_ = np.zeros(len(found), bool)
    repels = above >= below
    nu = np.where(side > 0, above, below)
    theta = np.where(side > 0, 1.0, 0.0)
    squares = np.sum(normals**2, 1)
    scale = np.linalg.norm(normals, axis=1) * (
        np.linalg.norm(block.base) + np.sum(np.abs(nu) * np.sqrt(squares))
    )
    for _ in range(2 * len(found) + 2):
        held = block.base + nu[repels] @ normals[repels]
        if not np.all(repels):
            nu[~repels] = _bounded(normals[~repels], held, above[~repels], below[~repels])
        velocity = block.base + nu @ normals
        turned = False
        for g in np.nonzero(repels)[0]:
            rest = normals[g] @ velocity - nu[g] * squares[g]
            slow, fast = rest + below[g] * squares[g], rest + above[g] * squares[g]
            away = AWAY * scale[g]
            free = bool(np.any(block.free[found[g][0]]))
            open_[g] = free and slow < -away and fast > away
            new = side[g]
            if open_[g] and branch is not None:
                new = branch
            elif side[g] < 0 and slow > away:
                new = 1
            elif side[g] > 0 and fast < -away:
                new = -1
            if new != side[g]:
                side[g], nu[g], turned = new, above[g] if new > 0 else below[g], True
        if not turned:
            break
    width = np.where(repels, 1.0, below - above)
    theta = np.where(repels, theta, (below - nu) / width)
    slides = ~repels & (theta > INTERIOR) & (theta < 1 - INTERIOR)
    side = np.where(slides, 0, np.where(repels, side, np.where(theta >= 0.5, 1, -1)))
    return [
        Group(members, alpha, int(side[g]), float(theta[g]), bool(open_[g]))
        for g, (members, alpha) in enumerate(found)
    ]


def gates_of(group: Group, lower: np.ndarray) -> np.ndarray:
    """The gates of a group's members."""
    theta = group.theta if group.side == 0 else float(group.side > 0)
    low = lower[group.members]
    up = np.where(group.alpha > 0, theta, 1 - theta)
    return low + up * (1 - low)


def _bounded(
    normals: np.ndarray, base: np.ndarray, least: np.ndarray, most: np.ndarray
) -> np.ndarray:
    r"""The $\nu$ between bounds of least $\lVert v_0 + \sum_k\nu_kN_k\rVert$."""
    from scipy.optimize import lsq_linear

    if len(least) == 1:
        best = -(normals[0] @ base) / (normals[0] @ normals[0])
        return np.clip(np.array([best]), least, most)
    width = most - least  # theta in [0, 1] for all: scaled alike
    matrix, target = (normals * width[:, None]).T, -(base + least @ normals)
    size = np.linalg.norm(matrix, axis=0)
    scaled = matrix / size[None, :]
    result = lsq_linear(scaled, target, (np.zeros(len(size)), size), method="bvls", tol=1e-15)
    return np.clip(least + width * result.x / size, least, most)
