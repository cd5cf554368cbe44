"""The implicit solver that makes the cost of a flow nearly independent of its horizon."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.scipy.sparse.linalg import gmres

from gflow.dynamics.field import AbstractField, FlowState
from gflow.dynamics.march.method import AbstractMethod, Step
from gflow.dynamics.radau import ending, jacobian, newton
from gflow.dynamics.radau.part import Part
from gflow.dynamics.radau.stages import Attempt, Balance, Solution, Stages, evaluate
from gflow.dynamics.radau.tableau import legendre_values, radau
from gflow.problem.arguments import between, positive_count
from gflow.problem.array import Array
from gflow.problem.risk import Problem
from gflow.problem.weights import Factors, Weights, move


class Collocation(diffrax.AbstractLocalInterpolation):
    """The collocation polynomial of a step."""

    t0: Any
    t1: Any
    state: FlowState
    derivatives: Factors
    time_slopes: Any

    def evaluate(self, t0: Any, t1: Any = None, left: bool = True) -> FlowState:
        if t1 is not None:
            return jax.tree.map(jnp.subtract, self.evaluate(t1), self.evaluate(t0))
        step, p = self.t1 - self.t0, self.time_slopes.size
        # The integral of the k-th Legendre polynomial is a difference of its neighbours.
        values = legendre_values((t0 - self.t0) / step, p + 1)
        integrals = [(values[1] + 1) / 2]
        integrals += [(values[k + 1] - values[k - 1]) / (4 * k + 2) for k in range(1, p)]
        coefficients = step * jnp.stack(integrals) @ radau(p).legendre
        return FlowState(
            move(self.state.weights, self.derivatives, coefficients),
            self.state.scaled_time + coefficients @ self.time_slopes,
        )


WIDE = 2**20
"""Weights from which on a network with factors for vectors and one output is served by eight stages
and not by six: its iterations read the weights, which takes as long for any number of stages.
(2, 4096, 4096, 1) to log R = -10 takes 27 s of processor with eight, 32 with six, and more with
five; with five outputs at width 1024 eight take 1.07 of the time."""


class GaussNewton(diffrax.AbstractAdaptiveSolver, AbstractMethod):
    """Radau IIA with a matrix-free Newton iteration made for gradient flow.

    For ``gradient_flow(..., solver=GaussNewton())``, or for ``diffrax.diffeqsolve`` with the term
    ``ODETerm(FlowField(problem, clock))`` and a ``FlowState``: problem and clock are read there.
    Works for all clocks, losses and networks, under ``vmap``, ``jvp`` and ``grad``. The equations
    are in ``newton.py``.

    Args:
        stages: the number p >= 3 of stages; the order is 2p - 1. With six, runs with few saved
            points take 0.6 to 0.9 of the time that they take with five, whatever the network, and
            about as long where a hundred points have to be landed on. Seven are as fast at small
            widths, and slower where systems are large, as with ten digits.
        tolerance: error of the Newton iteration, relative to each layer, at which a step counts as
            solved. Far below the step tolerance: what is lost here, the conserved matrices lose.
        max_iterations: a step that needs more is rejected.
        many: whether other members may be beside one, under ``vmap``; it decides which way the
            linear systems are solved, and gflow's own loop sets it.

    Raises:
        ValueError: when one of these numbers cannot be.
    """

    stages: int = eqx.field(
        static=True, default=6, converter=lambda p: positive_count("stages", p, 3)
    )
    tolerance: float = eqx.field(
        static=True,
        default=1e-12,
        converter=lambda x: between("tolerance", x, 0, 1, "a number between 0 and 1"),
    )
    max_iterations: int = eqx.field(
        static=True, default=12, converter=lambda n: positive_count("max_iterations", n, 2)
    )
    many: bool = eqx.field(static=True, default=True)

    term_structure: ClassVar = diffrax.ODETerm
    interpolation_cls: ClassVar = Collocation

    @classmethod
    def suited(cls, problem: Problem, weights: Weights) -> "GaussNewton":
        """The solver with the number of stages that serves a problem and its weights."""
        one_output = problem.design is not None and problem.data.rows is None
        size = sum(leaf.size for leaf in jax.tree.leaves(weights))
        return cls(stages=8) if one_output and size >= WIDE else cls()

    def order(self, terms: Any) -> int:
        return 2 * self.stages - 1

    def error_order(self, terms: Any) -> float:
        return 2.0 * self.stages - 1.0

    # ---------------------------------------------------------------------------------------------
    # What diffrax calls
    # ---------------------------------------------------------------------------------------------

    def func(self, terms: Any, t0: Any, y0: FlowState, args: Any) -> FlowState:
        return terms.vf(t0, y0, args)

    def init(self, terms: Any, t0: Any, t1: Any, y0: FlowState, args: Any) -> Solution:
        t0 = eqx.error_if(
            t0,
            getattr(terms, "direction", 1) < 0,
            "`GaussNewton` was asked to integrate backwards; expected `t1` larger than `t0`.",
        )
        return self.start(_flow_field(terms), jnp.asarray(t0), y0, t1 - t0)

    def step(
        self,
        terms: Any,
        t0: Any,
        t1: Any,
        y0: FlowState,
        args: Any,
        solver_state: Solution,
        made_jump: Any,
    ) -> tuple[FlowState, FlowState, dict, Solution, diffrax.RESULTS]:
        field, h = _flow_field(terms), t1 - t0
        (derivatives, offsets), (count, newton_error, log_risk, error) = _solve_stages(
            self, field, y0.weights, t0, h, solver_state
        )
        found = Solution(
            step=h,
            behind=jnp.ones_like(h),
            derivatives=derivatives,
            offsets=offsets,
            num_iterations=solver_state.num_iterations + count,
            num_evaluations=solver_state.num_evaluations + self.stages * (count + 1),
            newton_error=newton_error,
        )
        evaluate = self._evaluate(field, y0.weights, t0, h)
        at = evaluate(h * radau(self.stages).matrix, derivatives, offsets)
        end = ending.end(self.stages, self.tolerance, h, y0, log_risk, found, error, at)
        dense = {"state": y0, "derivatives": derivatives, "time_slopes": end.time_slopes}
        return end.state, end.error, dense, found, diffrax.RESULTS.successful

    # ---------------------------------------------------------------------------------------------
    # What gflow's own loop calls
    # ---------------------------------------------------------------------------------------------

    @property
    def exponent(self) -> float:
        return 1 / (2.0 * self.stages - 1.0)

    @property
    def noise(self) -> float:
        return self.tolerance

    def among(self, many: bool) -> "GaussNewton":
        return dataclasses.replace(self, many=many)

    def start(self, field: AbstractField, s: Array, state: FlowState, h: Array) -> Solution:
        return newton.at_rest(field, self.stages, s, state.weights, h)

    def begin(
        self,
        field: AbstractField,
        s: Array,
        h: Array,
        state: FlowState,
        before: Solution,
        last: Attempt | None = None,
    ) -> Attempt:
        return newton.begin(field, self.stages, s, h, state.weights, before, self.many, last)

    def again(self, made: Solution, before: Solution) -> Solution:
        """The polynomial of the last attempt, if it was solved: interpolated, not extrapolated.

        Ten digits and random classes take 5 to 10 % fewer corrections with it.
        """
        useful = ~newton.failed(made.newton_error, self.tolerance)
        from_the_beginning = made._replace(
            behind=jnp.zeros_like(made.behind),
            num_iterations=before.num_iterations,
            num_evaluations=before.num_evaluations,
        )
        return jax.tree.map(lambda a, b: jnp.where(useful, a, b), from_the_beginning, before)

    def solved(self, attempt: Attempt) -> Array:
        return newton.solved(attempt, self.tolerance, self.max_iterations)

    def look(
        self, field: AbstractField, s: Array, h: Array, state: FlowState, attempt: Attempt
    ) -> Stages:
        evaluate = self._evaluate(field, state.weights, s, h)
        return evaluate(attempt.coefficients, attempt.derivatives, attempt.offsets)

    def correct(self, field: AbstractField, h: Array, attempt: Attempt, seen: Stages) -> Attempt:
        attempt = jacobian.up_to_date(field, self.stages, h, attempt, seen)
        return newton.correct(field, self.stages, h, attempt, seen)

    def work(
        self, field: AbstractField, s: Array, h: Array, state: FlowState, attempt: Attempt
    ) -> tuple[Attempt, Balance]:
        part = Part.of(field, attempt.frame.log_risk, attempt.offsets)
        everything = self._corrections(field, s, h, state, 0.0)
        if part is None:
            return everything(attempt, jnp.array(True))
        some = part.field(field), s, h, state, part.log_share(field.problem)
        own = attempt._replace(offsets=attempt.offsets[:, part.margins])
        found, among = self._corrections(*some)(own, part.enough)

        def margins() -> Array:
            coordinates, _ = field.along(state.weights, found.derivatives, found.coefficients)
            every = field.problem.spread(coordinates)
            distance = every[:, part.margins] - found.offsets
            level = jax.vmap(field.problem.loss.level)(found.offsets, distance)
            return (every - level[:, None]).at[:, part.margins].set(found.offsets)

        offsets = jax.lax.cond(part.enough, margins, lambda: attempt.offsets)
        # One that fails among the part is refused as it is; the next is shorter.
        failed = newton.failed(newton.remaining(found.size, found.contraction), self.tolerance)
        done = part.enough & (failed | part.proven(offsets))
        # The frame is the same, and the stiffness is made anew: these are what takes space.
        again = attempt._replace(frame=found.frame, stiffness=found.stiffness)
        either = lambda a, b: jnp.where(done, a, b)  # noqa: E731
        attempt, every = everything(
            jax.tree.map(either, found._replace(offsets=offsets), again), ~done
        )
        return attempt, jax.tree.map(either, among, every)

    def _corrections(
        self, field: AbstractField, s: Array, h: Array, state: FlowState, log_share: float
    ) -> Callable[[Attempt, Array], tuple[Attempt, Balance]]:
        """Corrections of an attempt until it is solved, and the field there, if there is to be one.

        The same as looks and ``correct`` in turn, in a loop for each decomposition: what a
        condition gives is copied.
        """
        evaluate = self._evaluate(field, state.weights, s, h, log_share)

        def look(at: Attempt) -> Stages:
            return evaluate(at.coefficients, at.derivatives, at.offsets)

        def once(loop: tuple[Attempt, Stages, Array]) -> tuple[Attempt, Stages, Array]:
            at = newton.correct(field, self.stages, h, *loop[:2])
            return at, look(at), jnp.array(False)

        def unfinished(loop: tuple[Attempt, Stages, Array]) -> Array:
            at, _, first = loop
            stale = jacobian.decomposes(at) & jacobian.stale(at)
            return ~self.solved(at) & (first | ~stale)

        def through(loop: tuple[Attempt, Balance]) -> tuple[Attempt, Balance]:
            seen = look(loop[0])
            at = jacobian.decomposed(field, self.stages, h, loop[0], seen)
            at, seen, _ = jax.lax.while_loop(unfinished, once, (at, seen, jnp.array(True)))
            return at, seen.balance

        def all_of_them(attempt: Attempt, wanted: Array) -> tuple[Attempt, Balance]:
            unknown = Balance(*(jnp.zeros((self.stages,), h.dtype) for _ in Balance._fields))
            going = lambda loop: wanted & ~self.solved(loop[0])  # noqa: E731
            return jax.lax.while_loop(going, through, (attempt, unknown))

        return all_of_them

    def end(
        self,
        field: AbstractField,
        s: Array,
        h: Array,
        state: FlowState,
        attempt: Attempt,
        seen: Stages | Balance,
        before: Solution,
    ) -> Step:
        found = Solution(
            step=h,
            behind=jnp.ones_like(h),
            derivatives=attempt.derivatives,
            offsets=attempt.offsets,
            num_iterations=before.num_iterations + attempt.count,
            num_evaluations=before.num_evaluations + self.stages * (attempt.count + 1),
            newton_error=newton.remaining(attempt.size, attempt.contraction),
        )
        error = ending.error_of_weights(self.stages, h, attempt)
        log_risk = attempt.frame.log_risk
        end = ending.end(self.stages, self.tolerance, h, state, log_risk, found, error, seen)
        return Step(end.state, end.error, found, end.round_off)

    def tally(self, memory: Solution) -> tuple[Array, Array]:
        return memory.num_evaluations, memory.num_iterations

    def counts(self, tally: tuple[Array, Array], num_steps: int) -> tuple[int, int]:
        evaluations, iterations = tally
        return int(evaluations), int(iterations)

    def _evaluate(
        self, field: AbstractField, weights: Weights, s: Array, h: Array, log_share: float = 0.0
    ) -> Callable[[Array, Factors, Array], Stages]:
        """The field at all stages of a step, as a function of the unknowns."""
        nodes = s + h * radau(self.stages).nodes
        return lambda coefficients, derivatives, offsets: evaluate(
            field, weights, derivatives, coefficients, offsets, nodes, log_share
        )


# Derivatives of the solution follow from the equations by the implicit function theorem, however
# it is found; their tracing, which takes as long as the rest, is left until they are asked for.
@eqx.filter_custom_jvp
def _solve_stages(
    solver: GaussNewton,
    field: AbstractField,
    weights: Weights,
    t0: Array,
    h: Array,
    before: Solution,
) -> tuple[tuple[Factors, Array], tuple[Array, Array, Array, Any]]:
    """Derivatives and offsets at the stages; Newton's count and error, log R, the step's error."""
    last, _ = solver.solve(field, t0, h, FlowState(weights, jnp.zeros_like(h)), before)
    error = ending.error_of_weights(solver.stages, h, last)
    left = newton.remaining(last.size, last.contraction)
    return (last.derivatives, last.offsets), (last.count, left, last.frame.log_risk, error)


@_solve_stages.def_jvp
def _implicit_jvp(primals: tuple, tangents: tuple) -> tuple:
    solution, rest = _solve_stages(*primals)

    def residual(unknown: tuple, *at: Any) -> tuple[Factors, Array]:
        solver, field, weights, t0, h, _ = at
        derivatives, offsets = unknown
        matrix = h * radau(solver.stages).matrix
        stages = solver._evaluate(field, weights, t0, h)(matrix, derivatives, offsets)
        loss, margins = field.problem.loss, stages.gap + offsets
        level = jax.vmap(loss.level)(jax.lax.stop_gradient(offsets), margins)
        margins = margins - level[:, None]
        return jax.tree.map(jnp.subtract, unknown, (stages.derivatives, margins))

    def linear(change: tuple) -> tuple:
        return jax.jvp(lambda unknown: residual(unknown, *primals), (solution,), (change,))[1]

    value, moved = eqx.filter_jvp(lambda *at: residual(solution, *at), primals, tangents)
    rhs = jax.tree.map(
        lambda change, x: jnp.zeros_like(x) if change is None else -change,
        moved,
        value,
        is_leaf=lambda change: change is None,
    )
    change = _solve_linear(linear, rhs)
    still = jax.tree.map(lambda x: jnp.zeros_like(x) if eqx.is_inexact_array(x) else None, rest)
    return (solution, rest), (change, still)


def _solve_linear(linear: Callable, rhs: Any) -> Any:
    """The root's derivative, from the linearised equations."""
    flat, unravel = ravel_pytree(rhs)
    matvec = lambda v: ravel_pytree(linear(unravel(v)))[0]  # noqa: E731
    solve = lambda apply, b: gmres(apply, b, tol=1e-11, restart=100, maxiter=10)[0]  # noqa: E731
    return unravel(jax.lax.custom_linear_solve(matvec, flat, solve, transpose_solve=solve))


def _flow_field(terms: Any) -> AbstractField:
    terms = getattr(terms, "term", terms)  # diffeqsolve wraps it, to integrate backwards
    field = getattr(terms, "vector_field", None)
    if not isinstance(field, AbstractField):
        raise ValueError(
            f"`GaussNewton` got the vector field {field!r}; expected a `FlowField`, from which it "
            "reads problem and clock: diffrax.ODETerm(FlowField(problem, clock))."
        )
    return field
