r"""The matrix Riccati flow of two linear layers under the square loss."""

import dataclasses

import numpy as np
from jaxtyping import Real

from gflow.analysis.exact.square_loss import SquareLossFlow, Times, checked_times
from gflow.problem import settings
from gflow.problem.arguments import numbers_of

# Rows of the start that differ by less than this (relative) are taken as dependent.
_INDEPENDENT = 1e-9
_BALANCED = 1e-12
# Singular values of the target below this (relative) are round-off: modes with nothing to learn.
_RANK = 1e-15


@settings.own()
def two_layer_riccati(
    time: Times,
    *,
    target: Real[np.ndarray, "out in"],
    weights: tuple[Real[np.ndarray, "hidden in"], Real[np.ndarray, "out hidden"]],
) -> SquareLossFlow:
    r"""Two matrix layers, $\lambda$-balanced, loss $\tfrac12\lVert\Sigma - W_2W_1\rVert_F^2$.

    For $W_2^\top W_2 - W_1W_1^\top = \lambda I$ the Gram matrix $P = QQ^\top$ of
    $Q = (W_1^\top; W_2)$ obeys the Riccati equation $\dot P = FP + PF - P^2$ with
    $F = \begin{pmatrix}-\frac\lambda2 I & \Sigma^\top\\ \Sigma & \frac\lambda2 I\end{pmatrix}$:

    $$P(t) = e^{Ft}Q_0\,[I + \tfrac12Q_0^\top F^{-1}(e^{2Ft} - I)Q_0]^{-1}\,Q_0^\top e^{Ft},$$

    and $W_2W_1$ is its lower left block. It is evaluated in a form in which nothing overflows or
    cancels, at any time and also for singular $F$.

    Args:
        time: flow times, at least zero.
        target: $\Sigma$, the correlation of output and (whitened) input.
        weights: $(W_1, W_2)$.

    Raises:
        ValueError: for shapes that do not match, a start that is zero or not $\lambda$-balanced, or
            one that flows to a saddle (no component along enough growing modes).

    >>> start = np.eye(2), np.eye(2)
    >>> two_layer_riccati(100.0, target=np.diag([2.0, 3.0]), weights=start).end_to_end.round(12)
    array([[2., 0.],
           [0., 3.]])

    References:
        Braun, Dominé, Fitzgerald and Saxe, "Exact learning dynamics of deep linear networks with
        prior knowledge", NeurIPS 2022, for $\lambda = 0$; Dominé et al., "From lazy to rich",
        ICLR 2025, arXiv 2409.14623, for any $\lambda$.
    """
    times = checked_times(time)
    sigma = numbers_of("target", target)
    first, second = (numbers_of("weights", layer) for layer in weights)
    level = _check_layers(sigma, first, second)
    modes = _decompose(sigma, level, np.concatenate([first.T, second]))
    results = [modes.at(float(t)) for t in times.ravel()]
    products = np.asarray([product for product, _ in results])
    distances = np.asarray([log_distance for _, log_distance in results])
    return SquareLossFlow(
        times,
        (2.0 * distances - np.log(2.0)).reshape(times.shape),
        products.reshape(times.shape + sigma.shape),
    )


# Derivation. In the eigenbasis of F (rates f) the start is A = V^T Q_0, n x r after dropping null
# columns. Only its column space matters: pick r rows S, those of the largest rates that are
# independent, and let A A_S^{-1} = (I; C). With e_S = e^{-f_S t} taken out on both sides of the
# bracket, Phi = (e^{2ft} - 1)/f and Psi_S = (1 - e^{-2 f_S t})/f_S,
#
#     P = (I; Z) N^{-1} (I, Z^T),   Z = e^{f_r t} C e_S,
#     N = Psi_S / 2 + e_S (K^{-1} + C^T Phi_r C / 2) e_S,   K = A_S A_S^T,
#
# where every exponential decays, because f_S is at least as large as any f_r it competes with, and
# N is a sum of positive matrices. Since 1 - f_S Psi_S = e_S^2, the distance to the limit 2 f_S is
#
#     N^{-1} - 2 f_S = N^{-1} e_S [I - (2 K^{-1} + C^T Phi_r C) f_S] e_S,
#
# a product: it keeps its digits however small it is.


@dataclasses.dataclass(frozen=True)
class _Modes:
    sigma: np.ndarray
    rate: np.ndarray  # of the chosen modes, at least zero
    other: np.ndarray  # of the rest
    top: np.ndarray  # rows of the eigenvectors that belong to the inputs: chosen, then the rest
    bottom: np.ndarray
    inverse_start: np.ndarray  # K^{-1}
    ratio: np.ndarray  # C
    complete: bool  # all of the target is learnt in the end

    def at(self, t: float) -> tuple[np.ndarray, float]:
        """The product of the layers at one time, and the log of its distance to the target."""
        count = self.rate.size
        with np.errstate(under="ignore"):
            decay = np.exp(-self.rate * t)
            z = np.exp((self.other[:, None] - self.rate) * t) * self.ratio
            pull = self.inverse_start * (decay[:, None] * decay) + 0.5 * self._grown(t, 0.0)
            inverse = np.linalg.inv(np.diag(0.5 * _reach(self.rate, t)) + pull)
            inverse = 0.5 * (inverse + inverse.T)
            stacked = np.concatenate([np.eye(count), z])
            product = self.bottom @ (stacked @ inverse @ stacked.T) @ self.top.T
            if not self.complete:
                return product, _log_norm(self.sigma - product)
            # The slowest decay there is: of two chosen modes, or of a chosen one against the rest.
            slow = np.min(self.rate)
            kappa = min(2.0 * slow, *(slow - self.other)) if self.other.size else 2.0 * slow
            sums = self.rate[:, None] + self.rate - kappa
            bracket = np.eye(count) - 2.0 * self.inverse_start * self.rate
            inner = bracket * np.exp(-sums * t) - self._grown(t, kappa) * self.rate
            z_scaled = np.exp((self.other[:, None] - self.rate + kappa) * t) * self.ratio
            missing = np.block(
                [
                    [inverse @ inner, inverse @ z_scaled.T],
                    [z_scaled @ inverse, z_scaled @ inverse @ z.T],
                ]
            )
            return product, _log_norm(self.bottom @ missing @ self.top.T) - kappa * t

    def _grown(self, t: float, kappa: float) -> np.ndarray:
        """$e_S C^T Phi_r C e_S e^{kappa t}$."""
        up = np.maximum(self.other, 0.0)  # Phi_r = e^{2 up t} Psi_r
        weight = np.sqrt(_reach(self.other, t))[:, None] * self.ratio
        weight = weight * np.exp((up[:, None] - self.rate + 0.5 * kappa) * t)
        return weight.T @ weight


def _reach(rate: np.ndarray, t: float) -> np.ndarray:
    """$(1 - e^{-2|f|t}) / |f|$, which is $2t$ at zero."""
    size = np.abs(rate)
    return np.where(
        size > 0.0, -np.expm1(-2.0 * size * t) / np.where(size > 0.0, size, 1.0), 2.0 * t
    )


def _log_norm(matrix: np.ndarray) -> float:
    largest = float(np.max(np.abs(matrix)))  # taken out, for its square may underflow
    return float(np.log(largest) + np.log(np.linalg.norm(matrix / largest))) if largest else -np.inf


def _decompose(sigma: np.ndarray, level: float, stacked: np.ndarray) -> _Modes:
    rate, basis = _eigenbasis(sigma, level)
    left, size, _ = np.linalg.svd(basis.T @ stacked, full_matrices=False)
    rank = int(np.sum(size > _INDEPENDENT * size[0]))
    if size[0] == 0.0:
        raise ValueError("`weights` are zero: a saddle, which the flow never leaves")
    start = left[:, :rank] * size[:rank]
    chosen = _largest_independent(rate, start)
    if len(chosen) < rank:
        raise ValueError(
            "`weights` have no component along the modes that grow: the flow ends in a saddle"
        )
    others = [i for i in range(rate.size) if i not in chosen]
    inverse = np.linalg.inv(start[chosen])
    order = chosen + others
    inputs = sigma.shape[1]
    # The growing mode of every singular value that is not zero.
    learnt = set(range(0, 2 * np.linalg.matrix_rank(sigma, rtol=_RANK), 2))
    return _Modes(
        sigma=sigma,
        rate=rate[chosen],
        other=rate[others],
        top=basis[:inputs, order],
        bottom=basis[inputs:, order],
        inverse_start=inverse.T @ inverse,
        ratio=start[others] @ inverse,
        complete=learnt <= set(chosen),
    )


def _largest_independent(rate: np.ndarray, start: np.ndarray) -> list[int]:
    """Rows of `start`, by falling rate and none that decays, that are linearly independent."""
    chosen: list[int] = []
    frame = np.zeros((0, start.shape[1]))
    scale = np.max(np.linalg.norm(start, axis=1))
    for i in np.argsort(-rate, kind="stable"):
        if rate[i] < 0.0 or len(chosen) == start.shape[1]:
            break
        row = start[i]
        for _ in range(2):  # Gram-Schmidt, twice
            row = row - (frame @ row) @ frame
        if np.linalg.norm(row) > _INDEPENDENT * scale:
            chosen.append(int(i))
            frame = np.vstack([frame, row / np.linalg.norm(row)])
    return chosen


def _eigenbasis(sigma: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues and eigenvectors of F from the SVD of the target: its zero blocks stay zero.

    First a growing and a decaying mode for each singular value, then the rest.
    """
    outputs, inputs = sigma.shape
    left, values, right = np.linalg.svd(sigma)
    values[values < _RANK * values[0]] = 0.0
    shared = min(outputs, inputs)
    rate = np.zeros(inputs + outputs)
    basis = np.zeros((inputs + outputs, inputs + outputs))
    for j in range(shared):
        root = np.hypot(values[j], 0.5 * level)
        # [[-l/2, s], [s, l/2]] is root [[-cos, sin], [sin, cos]]: eigenvectors by half the angle.
        half = 0.5 * np.arctan2(values[j], 0.5 * level)
        for column, top, bottom, sign in (
            (2 * j, np.sin(half), np.cos(half), 1.0),
            (2 * j + 1, np.cos(half), -np.sin(half), -1.0),
        ):
            rate[column] = sign * root
            basis[:inputs, column] = top * right[j]
            basis[inputs:, column] = bottom * left[:, j]
    for j in range(shared, inputs):
        column = shared + j
        rate[column], basis[:inputs, column] = -0.5 * level, right[j]
    for j in range(shared, outputs):
        column = shared + j
        rate[column], basis[inputs:, column] = 0.5 * level, left[:, j]
    return rate, basis


def _check_layers(sigma: np.ndarray, first: np.ndarray, second: np.ndarray) -> float:
    """Shapes, finiteness and balance; returns lambda."""
    if sigma.ndim != 2 or first.ndim != 2 or second.ndim != 2:
        raise ValueError("`target` and both `weights` must be matrices")
    hidden = first.shape[0]
    if second.shape != (sigma.shape[0], hidden) or first.shape[1] != sigma.shape[1]:
        raise ValueError(
            f"`weights` have shapes {first.shape} and {second.shape}; expected "
            f"(hidden, {sigma.shape[1]}) and ({sigma.shape[0]}, hidden) for a `target` of shape "
            f"{sigma.shape}"
        )
    for name, value in (("target", sigma), ("weights[0]", first), ("weights[1]", second)):
        if not np.all(np.isfinite(value)):
            raise ValueError(f"`{name}` must be finite")
    imbalance = second.T @ second - first @ first.T
    level = float(np.trace(imbalance) / hidden)
    size = np.sum(first**2) + np.sum(second**2)
    if np.max(np.abs(imbalance - level * np.eye(hidden))) > _BALANCED * size:
        raise ValueError(
            "`weights` are not balanced up to a multiple of the identity: expected "
            f"W2^T W2 - W1 W1^T = lambda I, got\n{imbalance}"
        )
    return 0.0 if abs(level) < _BALANCED * size else level
