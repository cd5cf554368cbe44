r"""Steps along the flow in split coordinates: an additive Runge-Kutta pair with error control.

The bounded part b of the end-to-end vector and $u = tR$ are implicit, everything else explicit. The
explicit part converges in $\tau = \log s$, so that the steps grow to order one and a decade of
$-\log R$ costs a handful of them, at any horizon.
"""

import dataclasses
import math
from typing import NamedTuple

import numpy as np

from gflow.dynamics.march.control import ROUND_OFF, propose
from gflow.dynamics.split.field import Chain, Motion, Solved, SplitField, solve
from gflow.dynamics.split.state import Momentum, SplitState

TIME_SLACK = 100.0
r"""The tolerance of $u = tR$ in those of the rest: $\log t = \log u + s$ is of size s."""


class _Tableau(NamedTuple):
    explicit: np.ndarray
    implicit: np.ndarray
    nodes: np.ndarray
    weights: np.ndarray
    error: np.ndarray
    diagonal: float


def _tableau() -> _Tableau:
    import diffrax

    explicit, implicit = diffrax.KenCarp5.tableau.tableaus
    stages = len(explicit.b_sol)
    matrices = [np.zeros((stages, stages)), np.zeros((stages, stages))]
    for matrix, table in zip(matrices, (explicit, implicit), strict=True):
        for i, row in enumerate(table.a_lower, start=1):
            matrix[i, :i] = row
    diagonal = float(np.asarray(implicit.a_diagonal)[1])
    nodes = np.append(0.0, explicit.c)
    return _Tableau(matrices[0], matrices[1], nodes, explicit.b_sol, explicit.b_error, diagonal)


TABLEAU = _tableau()
ORDER, GROW = 5, 5.0


class Walk:
    """The integration itself: state, derivatives and step size between two steps."""

    def __init__(self, state: SplitState, rtol: float, longest: float = np.inf):
        self.begin, self.rtol, self.longest = state, rtol, longest
        self.field = field = SplitField(state)
        self.tau = float(np.log(state.minus_log_risk))
        self.slow, self.time = state.slow, state.scaled_time
        self.scaled = state.across / state.minus_log_risk**field.power
        self.along = state.along
        self.blocks = [part for part, _ in field.layout.slices.values()]
        self.num_steps = 0
        self.go_on = state.momentum or self._from_rest(state.minus_log_risk)

    def _from_rest(self, s: float) -> Momentum:
        chain = self.field.chain(self.slow, s)
        slope, motion, self.along = self.field.direct(chain, self.scaled, self.along)
        return Momentum(
            slope=slope,
            slow_slope=self.field.slow(chain, motion),
            time_slope=self._time_slope(chain, motion, self.time),
            step_size=min(1e-2, 100 / s),
            last_error=1.0,
        )

    def _time_slope(self, chain: Chain, motion: Motion, time: float) -> float:
        power = self.field.time_power
        return chain.s * (chain.s**power / motion.kappa - time) + power * time

    def _time(self, chain: Chain, motion: Motion, base: float, step: float) -> float:
        """The implicit stage of the scaled time, which is linear."""
        power, s = self.field.time_power, chain.s
        return (base + step * s ** (1 + power) / motion.kappa) / (1 + step * (s - power))

    def step(self, end: float) -> bool:
        """Try one step that does not pass ``end``; whether it was accepted."""
        table, field = TABLEAU, self.field
        go_on = self.go_on
        longest = min(go_on.step_size, self.longest)
        last = self.tau + longest >= end - 1e-13 * abs(end)
        size = end - self.tau if last else longest
        implicit = size * table.diagonal
        stages = len(table.nodes)
        slow = np.empty((stages, field.layout.size))
        slopes = np.empty((stages, len(self.scaled)))
        times = np.empty(stages)
        slow[0], slopes[0], times[0] = go_on.slow_slope, go_on.slope, go_on.time_slope
        along, s_before = self.along, np.exp(self.tau)
        for i in range(1, stages):
            s = float(np.exp(self.tau + table.nodes[i] * size))
            chain = field.chain(self.slow + (size * table.explicit[i, :i]) @ slow[:i], s)
            base = self.scaled + (size * table.implicit[i, :i]) @ slopes[:i]
            guess = base + implicit * slopes[i - 1]
            solved = field.solve(chain, base, implicit, guess, along * s / s_before)
            if solved is None:
                return self._reject(0.25 * size)
            along, s_before = solved.along, s
            slopes[i] = solved.slope
            slow[i] = field.slow(chain, solved.motion)
            time_base = self.time + size * float(table.implicit[i, :i] @ times[:i])
            time = self._time(chain, solved.motion, time_base, implicit)
            times[i] = (time - time_base) / implicit
        after = self.slow + size * (table.weights @ slow)
        error = self._error(size, after, slow, slopes, times, solved, s, time)
        accept, following = propose(
            size,
            error if math.isfinite(error) else np.inf,
            go_on.last_error,
            exponent=1 / ORDER,
            noise=ROUND_OFF / self.rtol,
            grow=GROW,
            xp=np,
        )
        if not accept:
            return self._reject(float(following))
        # The last stage again, at the end values of the slow variables: consistent slopes for the
        # next step. Where b is stiff it also gives the better b.
        chain = field.chain(after, s)
        again = field.solve(chain, base, implicit, solved.scaled, along)
        if again is None:
            return self._reject(0.25 * size)
        moved = again.scaled - solved.scaled
        if len(moved):
            moved = moved - solve(again.matrix, moved)
        self.slow, self.scaled, self.along = after, solved.scaled + moved, again.along
        self.time = self._time(chain, again.motion, time_base, implicit)
        self.tau = end if last else self.tau + size
        self.num_steps += 1
        proposed = float(following)
        self.go_on = Momentum(
            slope=again.slope,
            slow_slope=field.slow(chain, again.motion),
            time_slope=(self.time - time_base) / implicit,
            step_size=max(go_on.step_size, proposed) if last else proposed,
            last_error=max(error, 1e-4),
        )
        return True

    def _reject(self, step_size: float) -> bool:
        self.go_on = self.go_on._replace(step_size=step_size)
        return False

    def _error(
        self,
        size: float,
        after: np.ndarray,
        slow: np.ndarray,
        slopes: np.ndarray,
        times: np.ndarray,
        solved: Solved,
        s: float,
        time: float,
    ) -> float:
        """The largest error estimate of a block, in units of the tolerance."""
        table = TABLEAU
        error = size * (table.error @ slow)
        worst = 0.0
        for part in self.blocks:
            scale = max(float(np.linalg.norm(after[part])), 1e-12)
            if part.stop - part.start == 1:
                scale = max(scale, 1.0)
            worst = max(worst, float(np.linalg.norm(error[part])) / scale)
        if len(solved.scaled):
            across = solve(solved.matrix, size * (table.error @ slopes))
            scale = max(1.0, float(np.linalg.norm(solved.scaled)))
            worst = max(worst, float(np.max(np.abs(across))) / scale)
        elapsed = size * (table.error @ times) / (1 + size * table.diagonal * s)
        worst = max(worst, abs(float(elapsed)) / (TIME_SLACK * time))
        return worst / self.rtol

    def state(self, s: float | None = None) -> SplitState:
        """The state reached."""
        s = float(np.exp(self.tau)) if s is None else s
        across = self.scaled * s**self.field.power
        along = self.field.softmax(s, across, self.along).along
        return dataclasses.replace(
            self.begin,
            minus_log_risk=s,
            along=along,
            across=across,
            scaled_time=float(self.time),
            slow=self.slow,
            num_steps=self.begin.num_steps + self.num_steps,
            momentum=self.go_on,
        )
