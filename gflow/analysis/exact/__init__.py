r"""Closed forms of gradient flow: the oracles that solvers are held against.

Each function returns the exact flow of one problem (public as `gflow.exact`), in NumPy and float64,
with errors of round-off only, and in logarithms wherever risk or time leaves the range of float64.

| function | network | data and loss |
|---|---|---|
| `one_datum_linear` | one layer | one datum; exponential, logistic |
| `two_point_linear` | one layer | two weighted points; exponential |
| `one_datum_balanced` | any depth, balanced | one datum; exponential, logistic |
| `two_layer_one_datum` | two layers, unbalanced | one datum; exponential, logistic |
| `one_datum_diagonal` | diagonal, depth 2 and above | one datum; exponential, logistic |
| `diagonal_network` | the same | any data and loss, given the accumulated slopes |
| `one_datum_convolution` | two circular convolutions | one datum; exponential, logistic |
| `square_loss_mode` | any depth, one mode | square loss |
| `saddle_times` | any depth, modes | square loss: when each is half learnt |
| `two_layer_square_loss` | two layers of width one, unbalanced | square loss |
| `two_layer_riccati` | two layers, $\lambda$-balanced | square loss, whitened data |
| `simplex_modes` | any depth, balanced | one point a class; cross-entropy, pairwise exponential |
| `hadamard_modes` | any depth, balanced | one point a class, K = 2^m; cross-entropy |
| `early_alignment` | two layers, ReLU or leaky, tiny start | any: where neurons turn, and when |
| `small_start_margin` | two layers, ReLU or leaky, small start | labels: the margin's limit |
| `risk_clock` | any | any |
| `limits` | any depth, any start | separable; exponential tail: asymptotic, with constants |

Flow time is that of $\dot W_k = -\partial R/\partial W_k$ with the MEAN loss as the risk $R$.
"""

from gflow.analysis.exact._path import ExactFlow as ExactFlow
from gflow.analysis.exact.classes import (
    ExactClassFlow as ExactClassFlow,
    hadamard_modes as hadamard_modes,
    simplex_modes as simplex_modes,
)
from gflow.analysis.exact.diagonal import (
    diagonal_network as diagonal_network,
    one_datum_diagonal as one_datum_diagonal,
)
from gflow.analysis.exact.early_alignment import (
    EarlyAlignment as EarlyAlignment,
    early_alignment as early_alignment,
)
from gflow.analysis.exact.one_datum import (
    one_datum_balanced as one_datum_balanced,
    one_datum_convolution as one_datum_convolution,
    one_datum_linear as one_datum_linear,
    two_layer_one_datum as two_layer_one_datum,
)
from gflow.analysis.exact.riccati import two_layer_riccati as two_layer_riccati
from gflow.analysis.exact.square_loss import (
    SquareLossFlow as SquareLossFlow,
    saddle_times as saddle_times,
    square_loss_mode as square_loss_mode,
    two_layer_square_loss as two_layer_square_loss,
)
from gflow.analysis.exact.two_points import (
    risk_clock as risk_clock,
    two_point_linear as two_point_linear,
)
from gflow.analysis.law_constants import limits as limits
from gflow.analysis.laws import Limits as Limits
from gflow.problem.small_start import small_start_margin as small_start_margin

__all__ = [
    "EarlyAlignment",
    "ExactClassFlow",
    "ExactFlow",
    "Limits",
    "SquareLossFlow",
    "diagonal_network",
    "early_alignment",
    "hadamard_modes",
    "limits",
    "one_datum_balanced",
    "one_datum_convolution",
    "one_datum_diagonal",
    "one_datum_linear",
    "risk_clock",
    "saddle_times",
    "simplex_modes",
    "small_start_margin",
    "square_loss_mode",
    "two_layer_one_datum",
    "two_layer_riccati",
    "two_layer_square_loss",
    "two_point_linear",
]
