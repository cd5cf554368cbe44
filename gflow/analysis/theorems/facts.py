r"""A record as the claims read it: assumptions met or not, and the constants of Lemma 2.

**Lemma 2 for descent.** Let $W_k^+ = W_k - \eta\,\partial_k R$ and
$D_k = W_{k+1}^\top W_{k+1} - W_k W_k^\top$. First orders cancel:
$D_k^+ - D_k = \eta^2(\partial_{k+1}R^\top \partial_{k+1}R - \partial_k R\,\partial_k R^\top)$. So
with $A_k = \sum_t \eta_t^2\lVert\partial_k R\rVert_F^2$ and $B = \sum_k A_k$

$$\lVert D_k(t) - D_k(0)\rVert_F \le A_k + A_{k+1} \le B, \qquad
\lVert D_k(t) - D_k(0)\rVert_2 \le \max(A_k, A_{k+1}).$$

The flow's proof of (i),
$\lVert W_k\rVert_F^2 - \lVert W_k\rVert_2^2 \le -\sum_{j\ge k}\operatorname{tr} D_j
+ \sum_{j\ge k}\lVert D_j\rVert_2$, then gives $D + 2B$ in place of D: the traces add $A_k - A_L$,
the norms at most $A_k + 2A_{k+1} + \dots + 2A_{L-1} + A_L$. That of (ii) gives $D + 3B$: (i) for
layer k+1, and $A_k + A_{k+1}$ from the two Rayleigh quotients. If every step satisfies the descent
inequality $R(W^+) \le R(W) - \frac\eta2\lVert\nabla R\rVert^2$, then
$B \le 2\sum_t \eta_t(R_t - R_{t+1})$, which is at most $2\eta R(W(0))$ for steps of at most $\eta$.
The record knows R and $\eta$ at saved points, so between two of them, p and p+1, B is taken to grow
by $2\min(\max\eta\,(R_p - R_{p+1}),\ \max(\eta R)\,(\log R_p - \log R_{p+1}))$ with the maxima over
the two ends: a bound for constant, monotone and loss-scaled steps, and an estimate for others.
"""

import math
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from gflow.problem.observables import lemma_constant, lemma_slacks

if TYPE_CHECKING:
    import xarray as xr

ROUND_OFF = 1e-10
"""Relative allowance for accumulated rounding."""

FLOW_DRIFT = 1e-6
"""Largest change of the conserved matrices, relative to the squared norms, that still counts as
conserved, and the allowance of Lemma 2 in the same unit; ten tolerances where that is more."""

LATE = 10.0
"""Laws in 1/s have corrections of relative size log(n)/s: up to this many log n a deviation from
them proves nothing."""


class Facts:
    """A record as the claims read it."""

    def __init__(self, record: "xr.Dataset"):
        attrs = record.attrs
        self.record = record
        self.is_descent = attrs["kind"] == "descent"
        self.deep_linear = "imbalance_drift" in record
        self.of_classes = "num_classes" in attrs
        self.of_targets = "num_targets" in attrs
        self.log_risk = self["log_risk"]
        self.log_risk_at_zero = float(attrs.get("log_risk_at_zero", math.nan))
        self.depth = record.sizes.get("layer", 0)
        self.exponential_tail = bool(attrs.get("exponential_tail", False))
        self.separable = bool(attrs.get("separable", True))
        self.classes_alike = bool(attrs.get("classes_alike", False))
        self.max_margin = float(attrs.get("max_margin", math.nan))
        self.loss = str(attrs.get("loss", "unknown loss"))
        self.slope_bound = float(attrs.get("slope_bound", math.inf))
        self.smoothness = float(attrs.get("smoothness", math.inf))
        self.pull_radius = float(attrs.get("pull_radius", math.nan))
        self.rtol = float(attrs.get("rtol", 0.0))
        self.flow_drift = max(FLOW_DRIFT, 10 * self.rtol)
        with np.errstate(divide="ignore", invalid="ignore"):
            self.s = -self.log_risk
            self.log_s = np.where(self.s > 0, np.log(np.abs(self.s)), np.nan)

    def __getitem__(self, name: str) -> np.ndarray:
        return np.asarray(self.record[name].values, dtype=np.float64)

    @property
    def direction(self) -> np.ndarray:
        """The maximum-margin direction."""
        return self["max_margin_direction"]

    @property
    def title(self) -> str:
        """What was run, and how far it went."""
        attrs = self.record.attrs
        widths = "-".join(str(int(width)) for width in np.ravel(attrs.get("widths", [])))
        shape = f"widths {widths}, " if widths else ""
        status = attrs.get("status", "unknown status")
        return (
            f"{attrs['kind']} on {attrs.get('dataset', 'data')}, {shape}{self.loss}, "
            f"{status} at log R = {self.log_risk[-1]:.6g}; s = -log R"
        )

    @cached_property
    def step_obstacles(self) -> list[str]:
        """Why descent's statements do not cover the steps of this record."""
        if not self.is_descent:
            return []
        found = []
        attrs = self.record.attrs
        if not attrs.get("along_gradient", False):
            found.append(
                f"the optimiser, {attrs.get('optimizer', 'unknown')}, is not known to step along "
                "the gradient"
            )
        if "batch_size" in attrs:
            found.append("the gradients are those of mini-batches")
        return found

    @cached_property
    def obstacles(self) -> list[str]:
        """Assumptions of the convergence theorems that fail."""
        found = list(self.step_obstacles)
        if not self.separable:
            found.append("the data are not linearly separable, or not known to be")
        if np.nanmin(self.log_risk) > self.log_risk_at_zero + ROUND_OFF:
            found.append("R > R(0) at every saved point, so that it may end at a saddle")
        if self.is_descent and not math.isfinite(self.slope_bound + self.smoothness):
            found.append(
                "for descent slope and curvature of the loss have to be bounded; those of "
                f"{self.loss} are not known to be"
            )
        return found

    @cached_property
    def tail_obstacles(self) -> list[str]:
        """Assumptions of the statements about the direction that fail."""
        if self.exponential_tail:
            return self.obstacles
        return [*self.obstacles, f"{self.loss} has no exponential tail"]

    @property
    def log_total(self) -> np.ndarray:
        """The logarithm of the summed loss."""
        return self.log_risk + math.log(int(self.record.attrs["num_points"]))

    @property
    def before_separation(self) -> str | None:
        """Why limits cannot be denied yet: not every margin is known to be positive."""
        if self.log_total[-1] < self.log_risk_at_zero:
            return None
        return "the summed loss is still above l(0), so that it is too early to tell"

    @property
    def before_alignment(self) -> str | None:
        """Why rank one and alignment cannot be denied yet: Lemma 2 says nothing so far."""
        smallest = float(np.min(self["frobenius_norm"][-1])) ** 2
        if self.depth == 1 or self.constant <= smallest:
            return self.before_separation
        return (
            f"it is too early to tell: D = {self.constant:.2g} of Lemma 2 is above the smallest "
            f"|W_k|_F^2 = {smallest:.2g}"
        )

    @property
    def before_asymptotics(self) -> str | None:
        r"""Why laws in $1/s$ cannot be denied yet: their corrections are $O(\log n/s)$."""
        late = LATE * max(1.0, math.log(int(self.record.attrs["num_points"])))
        if self.s[-1] >= late:
            return None
        return f"it is too early to tell: s = {self.s[-1]:.4g} is below {late:.4g}, {LATE:g} log n"

    @property
    def one_layer(self) -> list[str]:
        """The reason why statements about several layers say nothing about one."""
        return ["there is one layer, for which this is trivial"] if self.depth == 1 else []

    @cached_property
    def start(self) -> list[np.ndarray]:
        """The initial weights."""
        return [
            np.asarray(self.record[f"initial_weights_{k}"].values, dtype=np.float64)
            for k in range(1, self.depth + 1)
        ]

    @cached_property
    def constant(self) -> float:
        r"""The paper's $D$, from the start."""
        return lemma_constant(self.start)

    @cached_property
    def slacks(self) -> tuple[np.ndarray, np.ndarray]:
        """What Lemma 2 leaves with that constant: (point, layer) and (point, pair).

        A flow's record holds it; of descent, which may break the lemma, it is worked out here.
        """
        if "rank_one_slack" in self.record:
            return self["rank_one_slack"], self["alignment_slack"]
        names = ("frobenius_norm", "spectral_norm", "rank_one_gap", "misalignment")
        return lemma_slacks(self.start, *(self[name] for name in names))

    @cached_property
    def largest_square(self) -> np.ndarray:
        r"""$\max_k\lVert W_k\rVert_F^2$ at every saved point."""
        return np.max(self["frobenius_norm"], axis=1) ** 2

    @cached_property
    def allowance(self) -> np.ndarray:
        """How far exact statements may be off at every saved point, in squared weights."""
        return (ROUND_OFF if self.is_descent else self.flow_drift) * self.largest_square

    @cached_property
    def budget(self) -> np.ndarray:
        """The bound on B at every saved point for descent, zero for the flow."""
        if not self.is_descent or "log_step_size" not in self.record:
            return np.zeros(len(self.log_risk))
        log_step, log_risk = self["log_step_size"], self.log_risk
        # The start has no last step; the one that led to the next point stands for it.
        log_step = np.where(np.isfinite(log_step), log_step, -np.inf)
        with np.errstate(over="ignore", invalid="ignore"):
            risk = np.exp(log_risk)
            steps = np.exp(np.maximum(log_step[:-1], log_step[1:]))
            relative = np.maximum((log_step + log_risk)[:-1], (log_step + log_risk)[1:])
            by_step = np.where(risk[:-1] > risk[1:], steps * (risk[:-1] - risk[1:]), 0.0)
            by_ratio = np.exp(relative) * np.maximum(log_risk[:-1] - log_risk[1:], 0.0)
        return np.concatenate([[0.0], np.cumsum(2 * np.fmin(by_step, by_ratio))])

    @property
    def varying_steps(self) -> bool:
        """Whether descent's step size is not known between saved points, which its budget asks for.

        Neither it nor its product with the risk is the same at neighbours that several steps join.
        """
        if not self.is_descent or "log_step_size" not in self.record:
            return False
        size = self["log_step_size"]
        size = np.where(np.isfinite(size), size, np.nan)
        change = np.fmin(np.abs(np.diff(size)), np.abs(np.diff(size + self.log_risk)))
        return bool(np.any((change > math.log(2)) & (np.diff(self["num_steps"]) > 1)))

    @property
    def budget_obstacles(self) -> list[str]:
        """Why the error budget of descent cannot be read off this record."""
        if self.is_descent and not self.step_obstacles:
            if "log_step_size" not in self.record:
                return ["the record has no step sizes"]
            if np.any(np.diff(self.log_risk) > ROUND_OFF):
                return [
                    "the risk rises between saved points, so steps break the descent inequality"
                ]
            if self["num_steps"][0] > 0:
                return ["the record does not begin at the start of the run"]
        return self.step_obstacles
