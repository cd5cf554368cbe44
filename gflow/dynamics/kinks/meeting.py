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
It is integrated from where the flow comes from, until units that stay at their kinks are at rest
and the signs that it shows are those of a *piece*: where units that slide have gates in
$[\kappa, 1]$ and a force that attracts, and all others move to where they are. The velocity is that
of the piece.

**What a piece is held to.** While units slide the velocity is the projection of ``bends.py``
whatever their gates are, but when they end their slides is not; so a piece counts only

* if its gates are those at which the smoothed flow rests. It may rest where a piece cannot: with
  $h = \phi(z)$ of sliding units small but not zero, units of later layers are moved by Ah, which
  tells apart gates of units with one kink, and holds others between their ends where terms of Ah
  cancel;
* if descent goes there: $\zeta \leftarrow \zeta + p + G\nu$ with sharp gates. The function is
  homogeneous, so that steps of all sizes go the same way, up to where they begin. It may stay where
  the smoothed flow leaves, since its gates vary together: where a force repels only on average.

How much sharper gates of a later layer are matters too. Some are tried in turn until both hold.

**Not unique.** Where descent goes elsewhere, or a flow whose start is disturbed ends in another
piece, the run ends, or takes the branch that it is told. Where no piece is found it ends too. Plain
NumPy and SciPy, of a few units.
"""

from typing import NamedTuple

import numpy as np

from gflow.dynamics.kinks.decide import Block

STARTS = 3
"""Flows; all but the first from disturbed starts."""

GONE = 100.0
"""Widths from a kink at which a unit has left it."""

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
    passes: int
    """Layers from the first to the last: after so many passes a unit of that knows of all."""
    force: np.ndarray
    r"""$b_0$, shape (k,)."""
    lower: np.ndarray
    r"""$\kappa$, shape (k,)."""
    later: np.ndarray
    """A, shape (k, k)."""

    @classmethod
    def of(cls, block: Block, layers: Layers) -> "Meeting":
        """That of units."""
        normals = np.where(layers.own[:, None], block.normals, 0.0)
        size, passes = float(np.linalg.norm(block.base)), int(np.ptp(layers.layer))
        known = block.force, block.lower, layers.later
        return cls(block, layers, normals @ block.base, normals @ normals.T, size, passes, *known)

    @property
    def lengths(self) -> np.ndarray:
        """Of the normals, (k,)."""
        return np.sqrt(np.diagonal(self.gram))

    def activated(self, zeta: np.ndarray, width: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pre-activations, and their gates smoothed over some widths, all positive, (k,)."""
        z = zeta
        for _ in range(self.passes):
            soft = width * np.logaddexp(0.0, z / width)
            z = zeta + self.later @ (self.lower * z + (1 - self.lower) * soft)
        return z, self.lower + (1 - self.lower) * np.exp(-np.logaddexp(0.0, -z / width))

    def sharp(self, zeta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Likewise, with gates as they are."""
        z = zeta
        for _ in range(self.passes):
            z = zeta + self.later @ np.where(z > 0, z, self.lower * z)
        return z, np.where(z > 0, 1.0, self.lower)

    def nu(self, gates: np.ndarray) -> np.ndarray:
        r"""$\nu$ of gates, (k,)."""
        nu = gates * self.force
        for _ in range(self.passes):
            nu = gates * (self.force + nu @ self.later)
        return nu

    def slope(self, zeta: np.ndarray, width: np.ndarray) -> np.ndarray:
        r"""$\partial\dot\zeta/\partial\zeta$ with gates of some widths, all positive, (k, k).

        By $dz = (1 - A\,\mathrm{diag}\,g)^{-1}d\zeta$ and
        $d\nu = (1 - \mathrm{diag}(g)A^\top)^{-1}\,\mathrm{diag}(\tilde b)\,dg$.
        """
        gates = self.activated(zeta, width)[1]
        force = self.force + self.nu(gates) @ self.later
        steep = (gates - self.lower) * (1 - gates) / ((1 - self.lower) * width)
        through = np.linalg.inv(np.eye(len(gates)) - self.later * gates[None, :])
        return self.gram @ through.T @ ((force * steep)[:, None] * through)

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
