r"""The linear systems of a large step by one symmetric eigendecomposition.

With one Jacobian for all stages a Newton correction solves $(I + hA \otimes GS)\,y = r$, of order
pm, where $A$ is the tableau, $G$ the Gram matrix of the pullbacks and $S$ the curvature in the
coordinates, both symmetric and of order m. With $G = LL^\top$ and $L^\top S L = Q\Lambda Q^\top$

$$y = LQ\,(I + hA \otimes \Lambda)^{-1}\,Q^\top L^{-1}r, \qquad
S\,LQ = L^{-\top}Q\,\Lambda, \qquad LQ = G\,L^{-\top}Q,$$

m systems of order p. The decomposition knows nothing of h and is real, so that it serves all
corrections of a step, and the error estimate. At order 576 it takes half the time of the three
complex factorisations of one correction.

**Few margins** carry the curvature once the risk is small: those of the support vectors and of what
is close to them. With these rows $B$ of the matrix from coordinates to margins and their curvature
$H$, $S = B^\top HB$ up to what is neglected, which costs corrections but no digits, and

$$u = By, \qquad (I + hA \otimes BGB^\top H)\,u = Br, \qquad y = r - hA \otimes G B^\top H u :$$

the same system, of as many unknowns as there are rows (Woodbury's identity).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from gflow.dynamics.radau.gram import Gram
from gflow.dynamics.radau.tableau import Radau
from gflow.problem.array import Array
from gflow.problem.design import Products

RIDGE = 1e-13
"""Added to a Gram matrix, relative to its largest entry: pullbacks may be dependent. It changes how
fast corrections converge, not what they converge to."""

SINGLE, SINGLE_RIDGE = 160, 1e-6
"""Above this order systems may be decomposed in single precision, which takes less than half the
time, and with more of a ridge."""

SINGLE_TRACE = 1e6
"""As long as the trace of $hGS$ is below this: round-off of its largest eigenvalues is an error of
all, and corrections are to shrink by more than that."""

SMALLEST = 1e-20
"""And above this: what is neglected beside such a number is below the range of single precision."""

LARGE = {False: 60, True: 150}
"""Above this order the systems are solved by it: of one member, and of one of many, since lanes
decompose in every correction. At order 90 one run takes three fifths of the time with it, four side
by side 1.4 times as long."""

FEW = 3 / 8, 7 / 16, 1 / 2
"""Margins up to these parts of the order serve in the place of the coordinates, as many as there
are in the smallest that holds them: ten digits have 236 support vectors, 252 and 288 are parts of
576. Up to the order of ``SINGLE`` the last is enough."""

NEGLIGIBLE = 1e-4
"""Slopes of margins that are left out, relative to the largest. To log R = -1e4 ten digits take
1018 corrections with 1e-4, 1020 with 1e-6 and with all margins, 1049 with 1e-3."""


def in_precision(tree: Any, dtype: jnp.dtype) -> Any:
    """The tree with its numbers, but for whole ones, in a precision."""

    def within(x: Any) -> Any:
        inexact = eqx.is_array_like(x) and jnp.issubdtype(jnp.result_type(x), jnp.inexact)
        return jnp.asarray(x, dtype) if inexact else x

    return jax.tree.map(within, tree)


def few(order: int) -> list[int]:
    """How many margins may serve in the place of so many coordinates, the most last."""
    return [max(1, int(part * order)) for part in (FEW if order > SINGLE else FEW[-1:])]


class Spectral(NamedTuple):
    """A decomposition: all of it, since what a loop carries along may be copied in each trip."""

    into: Array
    r"""$Q^\top L^{-1}$, shape (m, m)."""
    turned: Array
    """Its transpose, kept: to turn a matrix takes longer than a few rows times it."""
    values: Array

    @classmethod
    def of(
        cls,
        gram: Callable[[jnp.dtype], Array],
        stiffness: Callable[[jnp.dtype], Array],
        size: Array,
        scale: Array,
        h: Array,
        order: int,
    ) -> "Spectral":
        """That of G = ``size`` U and S = ``scale`` T.

        Args:
            gram, stiffness: give U, whose entries are at most of order one, and T in a precision.
            size, scale: in which single precision may have no such numbers.
            h: the step.
            order: of the matrices.
        """
        full, single = size.dtype, jnp.dtype(jnp.float32)

        def exactly() -> Spectral:
            return cls._of(gram(full), stiffness(full), RIDGE)

        if order <= SINGLE or full == single:
            found = exactly()
        else:
            low, known = gram(single), stiffness(single)
            trace = jnp.sum(low * known).astype(full)
            blank = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), cls.blank(order, single))
            found = jax.lax.cond(
                (trace > SMALLEST) & (h * scale * size * trace < SINGLE_TRACE),
                lambda: cls._of(low, known, SINGLE_RIDGE),
                lambda: blank,
            )
            found = jax.tree.map(lambda x: x.astype(full), found)
            found = jax.lax.cond(jnp.all(jnp.isfinite(found.values)), lambda: found, exactly)
        return cls.scaled(found.turned, found.values * scale, size)

    @classmethod
    def _of(cls, gram: Array, stiffness: Array, ridge: float) -> "Spectral":
        """That of two matrices, in their precision; not numbers where G is singular in it."""
        size = jnp.max(jnp.diag(gram))  # the ridge is relative to it
        ridged = gram / size + ridge * jnp.eye(len(gram), dtype=gram.dtype)
        root = jnp.linalg.cholesky(ridged)
        # Turned once: a product with a matrix that is turned on the left takes twice as long.
        turned = jax.lax.optimization_barrier(root.T)
        values, vectors = jnp.linalg.eigh((turned @ stiffness) @ turned.T)
        found = jax.scipy.linalg.solve_triangular(root, vectors, lower=True, trans="T")
        return cls.scaled(found, values, size)

    @classmethod
    def scaled(cls, found: Array, values: Array, size: Array) -> "Spectral":
        """That of a G that is ``size`` times the one decomposed, from that one."""
        turned = found / jnp.sqrt(size)
        return cls(turned.T, turned, values * size)

    @classmethod
    def blank(cls, order: int, dtype: jnp.dtype) -> "Spectral":
        """Arrays of the same shapes."""
        nothing = jnp.zeros((order, order), dtype)
        return cls(nothing, nothing, nothing[0])

    def solve(self, tableau: Radau, h: Array, rhs: Array) -> Array:
        r"""$w = (LQ)^{-1}y$ of $y = (I + hA \otimes GS)^{-1}r$, shape (p, m)."""
        inner = rhs @ self.turned
        inner = tableau.dual @ jax.lax.complex(inner, jnp.zeros_like(inner))
        scaled = jax.lax.complex(h * self.values, jnp.zeros_like(self.values))
        shifted = 1 + tableau.eigenvalues[:, None] * scaled[None, :]
        return jnp.real(tableau.vectors @ (inner / shifted))

    def forces(self, found: Array) -> Array:
        """$S y$ times the growth of G since, from what :meth:`solve` found."""
        return (found * self.values[None]) @ self.into

    def damped(self, factor: Array, rhs: Array) -> Array:
        r"""$(I + c\,SG)^{-1}S r = S(I + c\,GS)^{-1}r$, shape (m,)."""
        return (self.values * (self.into @ rhs) / (1 + factor * self.values)) @ self.into


class Systems(NamedTuple):
    """The systems of a step: of all coordinates, or of the few margins that carry S."""

    whole: Spectral
    active: Spectral
    rows: Products
    """$B$, shape (r, m); zero rows fill it up."""
    few: Array
    """Whether ``active`` is the one."""
    size: Array
    """The largest entry of G."""
    scale: Array
    """Of S."""
    grown: Array
    """How many times as large as when it was decomposed G is."""

    def decomposed(
        self,
        gram: Gram,
        slopes: Array,
        allowed: bool | Array,
        whole: Callable[[jnp.dtype], Array],
        among: Callable[[Array], tuple[Products, Array]],
        scale: Array,
        h: Array,
    ) -> "Systems":
        """Those of G and S = ``scale`` T, for a step of length h, in the place of these.

        Args:
            gram: G.
            slopes: of all margins, whose size tells which of them carry S.
            allowed: whether some may be left out.
            whole: gives T in a precision.
            among: for some margins, by their numbers, the rows B and what of H is in T.
            scale: of S.
            h: the step.
        """
        sizes, largest = np.array(few(gram.order)), gram.largest
        unit = gram.unit(largest)
        carries = jnp.abs(slopes) > NEGLIGIBLE * jnp.max(jnp.abs(slopes))
        count = jnp.sum(carries)

        def active(size: int) -> "Systems":
            (chosen,) = jnp.nonzero(carries, size=size, fill_value=0)
            used = jnp.where(jnp.arange(size) < count, 1.0, 0.0)
            rows, curvature = among(chosen)
            rows = rows.scaled(used)
            curvature = used[:, None] * curvature * used[None, :]
            reach = jnp.max(rows.squares)
            own = rows.scaled(1 / jnp.sqrt(reach))
            found = Spectral.of(
                lambda dtype: in_precision(unit, dtype).among(in_precision(own, dtype)),
                curvature.astype,
                largest * reach,
                scale,
                h,
                size,
            )
            found, rows = jax.tree.map(_filled, (found, rows), (self.active, self.rows))
            return self._replace(active=found, rows=rows, few=jnp.ones((), bool))

        def all_of_them() -> "Systems":
            found = Spectral.of(
                lambda dtype: in_precision(unit, dtype).matrix, whole, largest, scale, h, gram.order
            )
            return self._replace(whole=found, few=jnp.zeros((), bool))

        ways = [*(functools.partial(active, int(size)) for size in sizes), all_of_them]
        which = jnp.where(allowed, jnp.sum(count > sizes), len(sizes))
        found = jax.lax.switch(which, ways)
        return found._replace(size=largest, scale=scale, grown=jnp.ones_like(scale))

    def rescaled(self, gram: Gram, scale: Array) -> "Systems":
        """Those of G and S of another step, as if they had changed in size alone."""
        size = gram.largest
        grown = size / self.size
        more = grown * (scale / self.scale)
        return self._replace(
            whole=self.whole._replace(values=more * self.whole.values),
            active=self.active._replace(values=more * self.active.values),
            size=size,
            scale=scale,
            grown=grown * self.grown,
        )

    @classmethod
    def blank(cls, gram: Gram, rows: Products) -> "Systems":
        """Arrays of the same shapes, for rows of these."""
        dtype = gram.inputs.dtype
        return cls(
            Spectral.blank(gram.order, dtype),
            Spectral.blank(len(rows.left), dtype),
            rows,
            jnp.zeros((), bool),
            *jnp.ones((3,), dtype),
        )

    def solve(self, tableau: Radau, h: Array, gram: Gram, rhs: Array) -> tuple[Array, Array]:
        r"""$y = (I + hA \otimes GS)^{-1}r$ and $S y$, both of shape (p, m)."""

        def active() -> tuple[Array, Array]:
            found = self.active.solve(tableau, h, self.rows.spread(rhs))
            forces = self.rows.gather(self.active.forces(found / self.grown))
            return rhs - h * tableau.matrix @ gram.times(forces), forces

        def whole() -> tuple[Array, Array]:
            found = self.whole.solve(tableau, h, rhs) / self.grown
            return gram.times(found @ self.whole.into), self.whole.forces(found)

        return jax.lax.cond(self.few, active, whole)

    def damped(self, factor: Array, rhs: Array) -> Array:
        r"""$S(I + c\,GS)^{-1}r$, shape (m,)."""
        found = jax.lax.cond(
            self.few,
            lambda: self.rows.gather(self.active.damped(factor, self.rows.spread(rhs))),
            lambda: self.whole.damped(factor, rhs),
        )
        return found / self.grown


def _filled(array: Array, like: Array) -> Array:
    """The array in a corner of zeros, of the shape of another."""
    return jnp.pad(array, [(0, b - a) for a, b in zip(array.shape, like.shape, strict=True)])
