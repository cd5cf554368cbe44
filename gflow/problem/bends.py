r"""A network between its kinks: gates held fixed, and slides along kinks.

The pre-activations of a network at the points of a data set are numbers $z_{iu}$, of point i in
unit u; each has a *gate* $g_{iu}$, its activation being $g_{iu}z_{iu}$: 1 where $z > 0$, the lower
slope $\kappa_u$ where $z < 0$. With gates fixed a network is smooth, and so is its flow: a
:class:`Frozen` network is one like any other, for every solver, clock and loss.

**Slides.** Where both sides of a kink drive the flow into it, it goes along it, $z_{iu} = 0$ for
all pairs of a set S. The risk, restricted to where all these vanish, is smooth, and the flow is the
gradient flow of this restriction: with normals $N_k = \nabla_W z_k$

$$\dot W = -\nabla R + \sum_{k \in S}\mu_k N_k, \qquad \langle N_k, \dot W\rangle = 0,$$

the projection of the gradient, which gates in S do not matter for. It is the element of least norm
of Clarke's subdifferential as long as it is an element at all: as long as the gates

$$\lambda_k = g_k + \frac{\mu_k}{b_k}, \qquad
b_k = -\frac{\partial R}{\partial h_k},\quad h_k = g_kz_k,$$

that give this velocity are between $\kappa$ and 1 (a multiplier is a force put in at $z_k$, and
$\lambda_kb_k$ is all the force that there is; in $b_k$ the forces on later units count). A slide
ends where a gate leaves its interval, or where $b_k$ changes its sign: the kink then repels.

*Ties.* Units whose kinks are one and the same, as those of points x and -2x, slide together: with
$N_k = \alpha_kN_1$ they share one number $\theta \in [0, 1]$, from all gates as for $z_1 < 0$ to
all as for $z_1 > 0$, and $\theta = \theta_0 + \mu/\sum_k|\alpha_k|(1-\kappa_k)b_k$.

Shapes: n points, U units a point, C slots for slides, of which some are in use.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from gflow.problem.abstract_data import AbstractData
from gflow.problem.array import Array, as_array
from gflow.problem.module import Module
from gflow.problem.network import AbstractNetwork
from gflow.problem.weights import Factors, Weights, in_rows, move, squared_norm


class Place(NamedTuple):
    """Where the units of a network are, arrays of shape (U,)."""

    layer: np.ndarray
    """Numbered from 1 at the input; in a network of one's own the activations in their order."""
    neuron: np.ndarray
    lower: np.ndarray
    r"""The slope $\kappa$ where $z < 0$."""


class AbstractBends(Module):
    """The kinks of a network at the points of a data set."""

    @abstractmethod
    def place(self) -> Place:
        """Where the units are."""

    @abstractmethod
    def evaluate(
        self, weights: Weights, data: AbstractData, gates: Array, shifts: Array | None
    ) -> tuple[Array, Array]:
        """The coordinates, and the pre-activations (n, U), with activations g z + shift.

        Args:
            weights, data: as for ``AbstractNetwork.coordinates``.
            gates: shape (n, U).
            shifts: likewise; None for zero.
        """

    def rows(self, weights: Weights, data: AbstractData) -> np.ndarray | None:
        r"""If there is one hidden layer: the normal of a unit in its neuron's own weights.

        Row i, shape (n, d), is $\nabla_{w_u}z_{iu}$ for each neuron u; None for other networks.
        """
        return None

    def of_neurons(self, vector: Weights) -> Array:
        """The part of a vector of weight space that ``rows`` speak of, shape (U, d)."""
        raise NotImplementedError

    def with_neurons(self, vector: Weights, part: Array) -> Weights:
        """The vector with another such part."""
        raise NotImplementedError


# -------------------------------------------------------------------------------------------------
# The space that is tangent to the kinks in use
# -------------------------------------------------------------------------------------------------


class AbstractTangent(Module):
    """Where a flow goes that slides: projections across the normals of the slots in use."""

    units: Array
    """The unit i U + u of each slot, shape (C,); any one where the slot is not in use."""
    active: Array
    """Whether the slot is in use, shape (C,)."""

    @abstractmethod
    def summed(self, values: Array, slot: Array) -> Array:
        """Sums over the units of each slot, (C,).

        Args:
            values: of all units, zero where they do not slide, (n, U).
            slot: of each unit that slides, likewise.
        """

    def ties(
        self,
        pattern: "Pattern",
        normals: Callable[[Array], Weights],
        moved: Callable[[Weights], Array],
        bends: AbstractBends,
    ) -> Array:
        r"""$|\alpha|(1 - \kappa)$ of units that slide as it is now, (n, U).

        Args:
            pattern: as it was when the slides began.
            normals, bends: as for ``project``.
            moved: from a vector of weight space to how it moves the pre-activations, (n, U).
        """
        return pattern.tie

    layered: ClassVar[bool] = True
    """Whether a force put in at one unit may be felt at others."""

    @abstractmethod
    def project(
        self, normals: Callable[[Array], Weights], vector: Weights, bends: AbstractBends
    ) -> tuple[Weights, Array]:
        r"""The projection, and the multipliers $\mu$ of the normals that it adds, (C,).

        Args:
            normals: from cotangents of the pre-activations, (n U,), to weight space.
            vector: of weight space.
            bends: of the network.
        """


class NeuronTangent(AbstractTangent):
    """Of one hidden layer: each neuron has normals of its own, which never change.

    There are r slots a neuron, one after the other, for no more directions than are independent.
    """

    across: Array
    """Orthonormal bases of the normals, shape (U, r, d); zero where there are less."""
    dual: Array
    """From a vector across to its coefficients, shape (U, r, d)."""
    members: Array
    """The units of each slot, shape (C, most points on a ray); filled up with n U."""
    layered: ClassVar[bool] = False

    def summed(self, values: Array, slot: Array) -> Array:
        # Adding up by slot would cost more than the rest of a look at a wide network.
        flat = values.reshape(-1)
        return jnp.sum(flat.at[self.members].get(mode="fill", fill_value=0.0), 1)

    def across_removed(self, vector: Weights, bends: AbstractBends) -> Weights:
        """The part along all kinks: of weights, they themselves put on their kinks."""
        part = bends.of_neurons(vector)
        along = jnp.einsum("urd,ud->ur", self.across, part)
        return bends.with_neurons(vector, part - jnp.einsum("urd,ur->ud", self.across, along))

    def project(
        self, normals: Callable[[Array], Weights], vector: Weights, bends: AbstractBends
    ) -> tuple[Weights, Array]:
        multipliers = -jnp.einsum("urd,ud->ur", self.dual, bends.of_neurons(vector))
        return self.across_removed(vector, bends), multipliers.reshape(-1)


CUT = 1e-11
"""Eigenvalues of the Gram matrix of unit normals below this part are of dependent ones."""


class WeightTangent(AbstractTangent):
    """Of any network: normals depend on the weights, and all may have to do with all."""

    num_units: int = eqx.field(static=True)
    """Of all points together."""

    def summed(self, values: Array, slot: Array) -> Array:
        return jax.ops.segment_sum(values.reshape(-1), slot.reshape(-1), self.active.shape[0])

    def ties(
        self,
        pattern: "Pattern",
        normals: Callable[[Array], Weights],
        moved: Callable[[Weights], Array],
        bends: AbstractBends,
    ) -> Array:
        # Normals that are parallel stay so, but their lengths are those of activations in front.
        def now() -> Array:
            # What a unit behind another that slides has of the normal of that one is no part of it.
            each = self.of_slots(normals)
            flat = in_rows(each)
            coefficients = self._coefficients(flat)
            duals = jax.tree.map(lambda rows: jnp.tensordot(coefficients, rows, 1), each)
            products = jax.vmap(moved)(duals)
            own = jnp.abs(jnp.take_along_axis(products, pattern.slot[None], 0)[0])
            first = jnp.sum((coefficients @ flat) * flat, 1)
            alpha = own / jnp.where(first > 0, first, 1.0)[pattern.slot]
            tie = alpha * (1 - jnp.asarray(bends.place().lower)[None, :])
            return jnp.where(pattern.sliding & (tie > 0), tie, pattern.tie)

        tied = jnp.sum(pattern.sliding) > jnp.sum(self.active)
        return jax.lax.cond(tied, now, lambda: pattern.tie)

    def project(
        self, normals: Callable[[Array], Weights], vector: Weights, bends: AbstractBends
    ) -> tuple[Weights, Array]:
        size = self.active.shape[0]

        def projected() -> tuple[Weights, Array]:
            each = self.of_slots(normals)
            flat, ahead = in_rows(each), in_rows(jax.tree.map(lambda x: x[None], vector))[0]
            multipliers = -self._coefficients(flat) @ (flat @ ahead)
            moved = jax.tree.map(
                lambda x, rows: x + jnp.tensordot(multipliers, rows, 1), vector, each
            )
            return moved, multipliers

        return jax.lax.cond(jnp.any(self.active), projected, lambda: (vector, jnp.zeros((size,))))

    def _coefficients(self, flat: Array) -> Array:
        """Of normals in their dual vectors, which take a vector to its multipliers, (C, C)."""
        norms = jnp.sqrt(jnp.sum(flat**2, 1))
        scale = jnp.where(norms > 0, 1 / jnp.where(norms > 0, norms, 1.0), 0.0)
        unit = flat * scale[:, None]
        values, vectors = jnp.linalg.eigh(unit @ unit.T)
        kept = values > CUT * self.active.shape[0]
        inverse = jnp.where(kept, 1 / jnp.where(kept, values, 1.0), 0.0)
        return scale[:, None] * ((vectors * inverse[None, :]) @ vectors.T) * scale[None, :]

    def of_slots(self, normals: Callable[[Array], Weights]) -> Weights:
        """The normals, on a leading axis; zero of slots that are not in use."""

        def one(unit: Array, active: Array) -> Weights:
            cotangent = jnp.zeros((self.num_units,)).at[unit].set(jnp.where(active, 1.0, 0.0))
            return normals(cotangent)

        return jax.vmap(one)(self.units, self.active)


# -------------------------------------------------------------------------------------------------
# The network
# -------------------------------------------------------------------------------------------------


class Pattern(Module):
    """The gates of a network and its slides: arrays only, so that all share their programs."""

    gates: Array
    r"""Shape (n, U); of units that slide $\lambda$ as it was when last solved for."""
    on: Array
    """Whether the unit is above its kink, (n, U); nothing is meant where it slides."""
    slot: Array
    """The slot of each unit that slides, (n, U)."""
    tie: Array
    r"""$|\alpha|(1 - \kappa)$ of units that slide, zero of others, (n, U)."""
    theta: Array
    r"""$\theta_0$ of each slot, (C,)."""
    pull: Array
    r"""$\sum_k|\alpha_k|(1-\kappa_k)b_k$ of each slot when the slide began, (C,)."""
    tangent: AbstractTangent

    @property
    def sliding(self) -> Array:
        """Which units slide, (n, U)."""
        return self.tie > 0


class Frozen(AbstractNetwork):
    """A network in a pattern: its gates are held, and it moves along its slides only."""

    network: AbstractNetwork
    bends: AbstractBends
    pattern: Pattern
    quiet: Array
    """The log risk below which residuals are round-off, and no kinks are looked for."""

    def design(self, data: AbstractData) -> None:
        return None

    def check(self, weights: Weights, data: AbstractData) -> Weights:
        return self.network.check(weights, data)

    def degree(self, weights: Weights) -> float | None:
        return self.network.degree(weights)

    def dense_layers(self, weights: Weights) -> Any:
        return self.network.dense_layers(weights)

    def coordinates(self, weights: Weights, data: AbstractData) -> Array:
        return self.bends.evaluate(weights, data, self.pattern.gates, None)[0]

    def pullback(
        self, weights: Weights, data: AbstractData
    ) -> tuple[Array, Callable[[Array], tuple[Weights, Array]]]:
        coordinates, pull = self._pulled(weights, data)

        def pull_one(cotangent: Array) -> tuple[Weights, Array]:
            vector = pull(cotangent)[0]
            return vector, squared_norm(vector)

        return coordinates, pull_one

    def along(
        self, weights: Weights, vectors: Factors, coefficients: Array, data: AbstractData
    ) -> tuple[Array, Callable[[Array], Factors]]:
        moved = jax.vmap(lambda row: move(weights, vectors, row))(coefficients)

        def at(weights: Weights) -> Array:
            return self._pulled(weights, data)[0]

        def pull(cotangents: Array) -> Factors:
            pulled = jax.vmap(lambda w, c: self._pulled(w, data)[1](c)[0])(moved, cotangents)
            return Factors.whole(in_rows(pulled))

        return jax.vmap(at)(moved), pull

    def _pulled(
        self, weights: Weights, data: AbstractData
    ) -> tuple[Array, Callable[[Array], tuple[Weights, Array]]]:
        """The coordinates; and from a cotangent to its pullback, projected, and multipliers."""
        gates = self.pattern.gates
        (coordinates, z), vjp = jax.vjp(
            lambda at: self.bends.evaluate(at, data, gates, None), weights
        )

        def normals(cotangent: Array) -> Weights:
            return vjp((jnp.zeros_like(coordinates), cotangent.reshape(z.shape)))[0]

        def pull(cotangent: Array) -> tuple[Weights, Array]:
            vector = vjp((cotangent, jnp.zeros_like(z)))[0]
            return self.pattern.tangent.project(normals, vector, self.bends)

        return coordinates, pull


# -------------------------------------------------------------------------------------------------
# What an event is looked for in
# -------------------------------------------------------------------------------------------------


class Sight(NamedTuple):
    """A flow at a place in a pattern."""

    z: Array
    """Pre-activations, (n, U)."""
    force: Array
    r"""$b = -\partial\log R/\partial h$, (n, U)."""
    velocity: Weights
    r"""$-\nabla\log R$ along the slides."""
    speed: Array
    """Of the pre-activations along it, (n, U)."""
    theta: Array
    """Of each slot, (C,)."""
    pull: Array
    r"""$\sum_k|\alpha_k|(1-\kappa_k)b_k$ of each slot, (C,)."""
    log_risk: Array


def sight(problem: Any, weights: Weights) -> Sight:
    """A problem whose network is frozen, at some weights; pure JAX."""
    frozen: Frozen = problem.network
    bends, pattern, data = frozen.bends, frozen.pattern, problem.data

    def at(weights: Weights, shifts: Array) -> tuple[Array, Array]:
        return bends.evaluate(weights, data, pattern.gates, shifts)

    (coordinates, z), vjp = jax.vjp(at, weights, jnp.zeros_like(pattern.gates))
    terms = problem.loss.terms(problem.spread(coordinates))
    cotangent = problem.gather(terms.slopes)
    nothing = jnp.zeros_like(coordinates)

    def normals(cotangent: Array) -> Weights:
        return vjp((nothing, cotangent.reshape(z.shape)))[0]

    raw, force = vjp((cotangent, jnp.zeros_like(z)))
    velocity, multipliers = pattern.tangent.project(normals, raw, bends)
    if pattern.tangent.layered:
        put_in = (
            jnp.zeros((z.size,))
            .at[pattern.tangent.units]
            .add(jnp.where(pattern.tangent.active, multipliers, 0.0))
        )
        force = vjp((cotangent, put_in.reshape(z.shape)))[1]

    def moved(vector: Weights) -> Array:
        return jax.jvp(lambda w: at(w, jnp.zeros_like(z))[1], (weights,), (vector,))[1]

    speed = moved(velocity)
    tie = pattern.tangent.ties(pattern, normals, moved, bends)
    pull = pattern.tangent.summed(tie * force, pattern.slot)
    theta = pattern.theta + multipliers / jnp.where(pull == 0, 1.0, pull)
    return Sight(z, force, velocity, speed, theta, pull, terms.log_risk)


ON_KINK, OFF_GATE, TURNED = 1e-12, 1e-9, 1e-9
"""A kink has been passed when a pre-activation is beyond it by the first part of its scale; a slide
has ended when its theta is outside [0, 1] by the second, or its pull has changed sign by the third
part of what it was."""

FLOOR = 1e-6
"""The scale of a unit's pre-activations is the largest of them, or so much of that of all."""


def scale_of(z: Array) -> Array:
    """The scale that a unit's pre-activations are measured by, shape (1, U)."""
    largest = jnp.max(jnp.abs(z), axis=0, keepdims=True)
    return jnp.maximum(largest, FLOOR * jnp.max(largest)) + jnp.finfo(z.dtype).tiny


def past_kinks(pattern: Pattern, at: Sight) -> Array:
    """How far units are on the wrong side of their kinks, above 1 if they are, (n, U)."""
    return _past(pattern, at.z) / (ON_KINK * scale_of(at.z))


def _past(pattern: Pattern, z: Array) -> Array:
    """How far on the wrong side, in units of z; a unit that slides is on neither."""
    return jnp.where(pattern.sliding, -jnp.inf, jnp.where(pattern.on, -z, z))


def past_ends(pattern: Pattern, at: Sight) -> Array:
    """How far theta of slots is outside [0, 1], and their pull turned round, likewise, (2, C)."""
    beyond = jnp.maximum(-at.theta, at.theta - 1) / OFF_GATE
    turned = at.pull / (TURNED * jnp.abs(pattern.pull))
    return jnp.where(pattern.tangent.active, jnp.stack([beyond, turned]), -jnp.inf)


def violations(pattern: Pattern, at: Sight) -> Array:
    """How far a state is beyond its pattern, in units of what counts: above 1 it is, (n U + 2 C,).

    Of units the wrong side of the kink, of slots theta outside [0, 1] and the pull turned round.
    """
    past, ended = past_kinks(pattern, at), past_ends(pattern, at)
    return jnp.concatenate([past.reshape(-1), ended.reshape(-1)])


def largest_violation(pattern: Pattern, at: Sight) -> Array:
    """The largest of them."""
    # Divided by the scale of each unit once, not at every point: at each step this is looked at.
    most = jnp.max(_past(pattern, at.z), axis=0) / (ON_KINK * scale_of(at.z)[0])
    return jnp.maximum(jnp.max(most), jnp.max(past_ends(pattern, at), initial=-jnp.inf))


def blank_pattern(on: np.ndarray, lower: np.ndarray, tangent: AbstractTangent) -> Pattern:
    """A pattern without slides, of units above and below their kinks, (n, U)."""
    nothing = np.zeros(on.shape)
    count = np.shape(tangent.active)[0]
    return Pattern(
        gates=as_array(np.where(on, 1.0, lower[None, :])),
        on=as_array(on),
        slot=as_array(np.zeros(on.shape, np.int64)),
        tie=as_array(nothing),
        theta=as_array(np.zeros(count)),
        pull=as_array(-np.ones(count)),
        tangent=tangent,
    )
