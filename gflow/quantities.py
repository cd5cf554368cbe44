r"""The variables of a record, one declared row each.

Whoever asks what a variable *is* reads its row: the record its dimensions and meaning, the
certificate how its error is measured and what round-off does to it, the headline below which size
it is zero, figures its symbol and its axis, `compare` whether the two records are held against each
other in it. To add an observable write its function in ``problem/observables.py`` and its row here.
"""

import dataclasses
import enum
from typing import Literal

import numpy as np

DIMENSIONS = {
    "member": 0,
    "point": 0,
    "layer": 1,
    "pair": 1,
    "value": 1,
    "output": 0,
    "coordinate": 0,
    "kink": 0,
    "leaf": 1,
}
"""The dimensions of records, each with the number of its first entry. Layers count from 1 at the
input, the pair of layers (k, k+1) is number k."""

Needs = Literal[
    "layers",
    "reference",
    "homogeneity",
    "one output",
    "classes",
    "margins",
    "targets",
    "outputs",
]
"""What a variable may ask of a problem: a network that is a product of matrices, the
maximum-margin direction, a degree of homogeneity, labels -1 and +1, classes, either of these two
("margins"), targets, or classes or targets ("outputs")."""


class Kind(enum.Enum):
    """How large an error of a variable is, and what round-off leaves of the variable."""

    PLAIN = "relative to its size"
    LOG = "relative to its size, or to one if that is larger"
    VECTOR = "each component relative to the norm over the last axis"
    ANGLE = "relative to its size; round-off of float64 vectors is absolute"
    ANGLE_SQUARED = "as ANGLE: half the square of an angle"


@dataclasses.dataclass(frozen=True)
class Quantity:
    r"""What there is to know about one variable of a record.

    Attributes:
        dims: its dimensions.
        meaning: the formula or the contract, in plain text.
        symbol: how the paper writes it, for figures; None where its name does.
        kind: how its error is measured.
        zero: the size below which it is zero to the record's resolution, as misalignment is for
            balanced layers; 0 for what does not tend to zero. For what is linear in an angle the
            solver's tolerance; a solver's error of 1e-9 in an angle makes half its square about
            1e-18, and imbalance that drifts by 1e-8 about 1e-16.
        certified: whether a certified flow holds its estimated error, as ``NAME_error``.
        compared: whether `gflow.compare` takes the difference of two records.
        decades: whether it is positive and drawn on a logarithmic axis.
        needs: what it asks of a problem.
        of_classes: its dimensions where the data have classes, if they are others.
        of_data: whether it belongs to the data, and not to a member of an ensemble.
        unit: all are dimensionless, in the time of $\dot W = -\nabla R$.
    """

    dims: tuple[str, ...]
    meaning: str
    _: dataclasses.KW_ONLY
    symbol: str | None = None
    kind: Kind = Kind.PLAIN
    zero: float = 0.0
    certified: bool = False
    compared: bool = False
    decades: bool = True
    needs: tuple[Needs, ...] = ()
    of_classes: tuple[str, ...] | None = None
    of_data: bool = False
    unit: str = "1"

    def dims_of(self, rank: int) -> tuple[str, ...]:
        """The dimensions of an array of so many axes."""
        if self.of_classes is not None and len(self.of_classes) == rank:
            return self.of_classes
        return self.dims

    def size(self, values: np.ndarray) -> np.ndarray:
        """The size that errors of ``values`` are relative to, in the same shape."""
        if self.kind is Kind.VECTOR:
            norms = np.linalg.norm(values, axis=-1, keepdims=True)
            return np.broadcast_to(norms, np.shape(values))
        return np.maximum(np.abs(values), 1.0 if self.kind is Kind.LOG else 0.0)


POINT, LAYER, PAIR = ("point",), ("point", "layer"), ("point", "pair")
KINK = ("kink",)

QUANTITIES: dict[str, Quantity] = {
    # Where the run stands.
    "log_risk": Quantity(
        POINT,
        "log R, natural logarithm of the mean loss",
        symbol=r"$\log\,R$",
        kind=Kind.LOG,
        decades=False,
        compared=True,
    ),
    "log_time": Quantity(
        POINT,
        "log t, natural logarithm of the time of dW/dt = -grad R",
        symbol=r"$\log\,t$",
        kind=Kind.LOG,
        decades=False,
        certified=True,
        compared=True,
    ),
    "num_steps": Quantity(POINT, "accepted solver steps, or descent iterations, so far"),
    "num_epochs": Quantity(
        POINT,
        "descent iterations so far over those in an epoch, a pass through the mini-batches",
        symbol="epoch",
        decades=False,
    ),
    "log_step_size": Quantity(
        POINT, "logarithm of descent's latest step size", kind=Kind.LOG, decades=False
    ),
    # Margins.
    "margin": Quantity(
        POINT,
        "normalised margin min_i q_i / |w|, of classes min m_ik / |W|_F",
        symbol=r"$\min_i q_i/\|w\|$",
        certified=True,
        compared=True,
        decades=False,
        needs=("margins", "homogeneity"),
    ),
    "margin_gap": Quantity(
        POINT,
        "max margin minus normalised margin, absolute error 1e-16",
        symbol=r"$\gamma - \min_i q_i/\|w\|$",
        kind=Kind.ANGLE,
        zero=1e-9,
        certified=True,
        needs=("layers", "reference", "one output"),
    ),
    "layer_margin": Quantity(
        POINT, "min_i q_i / prod_k |W_k|_F", certified=True, needs=("margins", "layers")
    ),
    "smoothed_margin": Quantity(
        POINT,
        "l^-1(sum_i l(q_i)) / prod_k |W_k|_F",
        certified=True,
        needs=("margins", "homogeneity"),
    ),
    "min_margin": Quantity(
        POINT, "unnormalised margin min_i q_i", certified=True, needs=("margins",)
    ),
    "norm": Quantity(POINT, "Euclidean norm of all weights", certified=True),
    # How near the weights are to a maximum of the margin.
    "kkt_residual": Quantity(
        POINT,
        "Lyu and Li's epsilon: |W~ - sum_i lambda_i grad q_i(W~)|",
        certified=True,
        needs=("margins", "homogeneity"),
    ),
    "kkt_slackness": Quantity(
        POINT,
        "Lyu and Li's delta: max_i lambda_i (q_i(W~) - 1)",
        certified=True,
        needs=("margins", "homogeneity"),
    ),
    "perpendicular_cosine": Quantity(
        POINT,
        "cosine between w off the max-margin direction and grad R(w)",
        needs=("layers", "reference", "one output"),
    ),
    "direction_error": Quantity(
        POINT,
        "| w/|w| - max-margin direction |",
        symbol=r"$\|w/\|w\| - \bar u\|$",
        kind=Kind.ANGLE,
        zero=1e-9,
        certified=True,
        needs=("layers", "reference", "one output"),
    ),
    "direction_alignment": Quantity(
        POINT, "| <w / prod_k |W_k|_F, v_1> |", certified=True, needs=("layers", "one output")
    ),
    # Layers and their neighbours.
    "alignment": Quantity(
        PAIR,
        "|<v_{k+1}, u_k>| of neighbouring layers",
        certified=True,
        decades=False,
        needs=("layers", "one output"),
    ),
    "misalignment": Quantity(
        PAIR,
        "1 - |<v_{k+1}, u_k>|, free of cancellation",
        symbol=r"$1 - |\langle v_{k+1}, u_k\rangle|$",
        kind=Kind.ANGLE_SQUARED,
        zero=1e-14,
        certified=True,
        compared=True,
        needs=("layers", "one output"),
    ),
    "frobenius_norm": Quantity(
        LAYER,
        "|W_k|_F",
        symbol=r"$\|W_k\|_F$",
        certified=True,
        compared=True,
        needs=("layers",),
    ),
    "spectral_norm": Quantity(
        LAYER,
        "|W_k|_2",
        symbol=r"$\|W_k\|_2$",
        certified=True,
        compared=True,
        needs=("layers",),
    ),
    "rank_one_residual": Quantity(
        LAYER,
        "| W_k/|W_k|_F - u_k v_k^T |_F",
        kind=Kind.ANGLE,
        zero=1e-9,
        certified=True,
        needs=("layers", "one output"),
    ),
    "rank_one_gap": Quantity(
        LAYER,
        "1 - |W_k|_2/|W_k|_F, free of cancellation",
        symbol=r"$1 - \|W_k\|_2/\|W_k\|_F$",
        kind=Kind.ANGLE_SQUARED,
        zero=1e-14,
        certified=True,
        needs=("layers", "one output"),
    ),
    "leaf_norm": Quantity(
        ("point", "leaf"),
        "Euclidean norm of each array of the weights that is no dense layer",
    ),
    "least_ratio": Quantity(
        ("layer",),
        "1/sqrt(min(rows, columns)), the least that |W_k|_2/|W_k|_F can be",
        of_data=True,
    ),
    # Several classes.
    "margin_bound": Quantity(
        POINT,
        "|A(p)|_F of the run's own shares p, A(p) = sum p_ik (e_y - e_k) x_i^T: a bound of the "
        "largest margin in the Frobenius norm",
        certified=True,
        needs=("layers", "classes"),
    ),
    "nuclear_margin": Quantity(
        POINT,
        "min m_ik / |W|_*, in the nuclear norm",
        symbol=r"$\min m_{ik}/\|W\|_*$",
        certified=True,
        compared=True,
        decades=False,
        needs=("layers", "classes"),
    ),
    "nuclear_margin_bound": Quantity(
        POINT,
        "|A(p)|_2 of the run's own shares p: a bound of the largest margin in the nuclear norm",
        certified=True,
        needs=("layers", "classes"),
    ),
    "schatten_margin": Quantity(
        POINT,
        "min m_ik / (sum_i sigma_i(W)^(2/L))^(L/2), in the Schatten-2/L quasi-norm",
        symbol=r"$\min m_{ik}/\|W\|_{2/L}$",
        certified=True,
        compared=True,
        decades=False,
        needs=("layers", "classes"),
    ),
    "end_to_end_values": Quantity(
        ("point", "value"),
        "singular values of W_L ... W_1",
        kind=Kind.VECTOR,
        certified=True,
        needs=("layers", "outputs"),
    ),
    "singular_values": Quantity(
        ("point", "layer", "value"),
        "the K largest singular values of each layer; zero where it has fewer",
        symbol=r"$\sigma_i(W_k)$",
        kind=Kind.VECTOR,
        certified=True,
        needs=("layers", "outputs"),
    ),
    "rank_residual": Quantity(
        LAYER,
        "norm of the singular values of a layer beyond K - 1 / |W_k|_F",
        symbol=r"$\|(\sigma_i(W_k))_{i\geq K}\|/\|W_k\|_F$",
        kind=Kind.ANGLE,
        zero=1e-9,
        certified=True,
        needs=("layers", "classes"),
    ),
    "subspace_misalignment": Quantity(
        PAIR,
        "1 - cos of the largest angle between the leading K - 1 left vectors of layer k and right "
        "vectors of layer k+1, free of cancellation",
        symbol=r"$1 - \cos\theta_k$",
        kind=Kind.ANGLE_SQUARED,
        zero=1e-14,
        certified=True,
        compared=True,
        needs=("layers", "classes"),
    ),
    "collapse_variability": Quantity(
        POINT,
        "NC1, tr(Sigma_W Sigma_B^+)/K of the last hidden layer",
        certified=True,
        needs=("layers", "classes"),
    ),
    "collapse_simplex": Quantity(
        POINT,
        "NC2, distance of the normalised Gram matrix of the class means from the simplex's",
        kind=Kind.ANGLE,
        zero=1e-9,
        certified=True,
        needs=("layers", "classes"),
    ),
    "collapse_duality": Quantity(
        POINT,
        "NC3, | W_L/|W_L|_F - M^T/|M|_F |_F, M the centred class means",
        kind=Kind.ANGLE,
        zero=1e-9,
        certified=True,
        needs=("layers", "classes"),
    ),
    "collapse_classifier": Quantity(
        POINT,
        "NC4, part of the points that are not put into the class of the nearest mean",
        needs=("layers", "classes"),
    ),
    # Targets.
    "solution_distance": Quantity(
        POINT,
        "|W - W+|_F / |W+|_F, W+ the least-squares solution of least norm",
        symbol=r"$\|W - W^+\|_F/\|W^+\|_F$",
        kind=Kind.ANGLE,
        zero=1e-9,
        certified=True,
        compared=True,
        needs=("layers", "targets"),
    ),
    "mode_values": Quantity(
        ("point", "value"),
        "strengths of the modes: singular values of W B^T, of regression those of X W^T/sqrt(n)",
        kind=Kind.VECTOR,
        certified=True,
        needs=("layers", "targets"),
    ),
    "modes_learnt": Quantity(
        POINT,
        "how many modes, in their order, have half of what they tend to or more; in between with "
        "the logarithm of the next, from 1/200 of that",
        decades=False,
        needs=("layers", "targets"),
    ),
    "effective_rank": Quantity(
        POINT,
        "exp of the entropy of the shares of the singular values of W_L ... W_1 (Roy, Vetterli)",
        symbol=r"$\mathrm{erank}\,W$",
        certified=True,
        decades=False,
        needs=("layers", "targets"),
    ),
    "layer_effective_rank": Quantity(
        LAYER,
        "the same of each layer",
        decades=False,
        needs=("layers", "targets"),
    ),
    "gram_misalignment": Quantity(
        PAIR,
        "1 - cos of the angle between W_k W_k^T and W_{k+1}^T W_{k+1}, free of cancellation",
        kind=Kind.ANGLE_SQUARED,
        zero=1e-14,
        needs=("layers", "targets"),
    ),
    "nuclear_norm": Quantity(
        POINT,
        "sum of the singular values of W_L ... W_1",
        symbol=r"$\|W\|_*$",
        certified=True,
        needs=("layers", "targets"),
    ),
    "nuclear_distance": Quantity(
        POINT,
        "|W - W*|_F / |W*|_F, W* of least nuclear norm among those that meet the measurements",
        symbol=r"$\|W - W_*\|_F/\|W_*\|_F$",
        kind=Kind.ANGLE,
        zero=1e-9,
        needs=("layers", "targets"),
    ),
    # What a flow proves about itself.
    "imbalance_drift": Quantity(
        POINT, "largest change of a conserved matrix / largest |W_k|_F^2", needs=("layers",)
    ),
    "clock_value": Quantity(POINT, "s, the coordinate that the solver steps in"),
    "clock_error": Quantity(
        POINT,
        "energy identity R(0) - R(t) = int |grad R|^2 dt: |-log R minus its value by the clock| / "
        "max(1, |log R|), in a time clock the same of log t; of targets that of R / R(0)",
    ),
    "digits_left": Quantity(POINT, "decimal digits that float64 leaves of differences of margins"),
    "rank_one_slack": Quantity(
        LAYER, "Lemma 2 (i): D minus |W_k|_F^2 - |W_k|_2^2", needs=("layers", "one output")
    ),
    "alignment_slack": Quantity(
        PAIR,
        "Lemma 2 (ii): D + |W_{k+1}(0)|_2^2 + |W_k(0)|_2^2 minus "
        "(1 - <v_{k+1}, u_k>^2) |W_{k+1}|_2^2",
        needs=("layers", "one output"),
    ),
    "output_sum_drift": Quantity(
        POINT,
        "change of the conserved vector 1^T W_L / |W_L|_F",
        needs=("layers", "classes"),
    ),
    "rank_slack": Quantity(
        LAYER,
        "Lemma 2 for K outputs: |1^T W_L(0)|^2/K + sum_{j>=k} |D_j|_2 minus sigma_K(W_k)^2",
        needs=("layers", "classes"),
    ),
    "spectrum_slack": Quantity(
        PAIR,
        "Lemma 2 for K outputs: |D_k|_2 minus max_i |sigma_i(W_{k+1})^2 - sigma_i(W_k)^2|",
        needs=("layers", "classes"),
    ),
    "beyond_hand_over": Quantity(POINT, "1 where the run continues in split coordinates, else 0"),
    # Kinks.
    "num_kinks": Quantity(POINT, "kinks met so far: crossed, slid along or left", decades=False),
    "num_sliding": Quantity(POINT, "units that slide along their kinks here", decades=False),
    "balance_drift": Quantity(
        POINT,
        "largest change of |W_k[j,:]|^2 + b_kj^2 - |W_k+1[:,j]|^2 of a neuron / |W|^2",
    ),
    "kink_log_time": Quantity(KINK, "log t at the kink"),
    "kink_log_risk": Quantity(KINK, "log R at the kink"),
    "kink_step": Quantity(KINK, "accepted solver steps before the kink"),
    "kink_layer": Quantity(KINK, "layer of the unit, or number of the activation, from 1"),
    "kink_neuron": Quantity(KINK, "neuron of the unit, from 0"),
    "kink_point": Quantity(KINK, "point of the unit, from 0"),
    "kink_event": Quantity(KINK, "0 crossed, 1 began to slide, 2 left a slide, 3 stepped over"),
    # The function that the network computes.
    "end_to_end": Quantity(
        ("point", "coordinate"),
        "w = (W_L ... W_1)^T, of several outputs W_L ... W_1",
        of_classes=("point", "output", "coordinate"),
        kind=Kind.VECTOR,
        certified=True,
        needs=("layers",),
    ),
    # The data.
    "mode_targets": Quantity(
        ("value",),
        "what the strengths of the modes tend to; of measurements those of the matrix of least "
        "norm, a scale",
        of_data=True,
        needs=("layers", "targets"),
    ),
    "least_norm_solution": Quantity(
        ("coordinate",),
        "W+, the least-squares solution of least norm",
        of_classes=("output", "coordinate"),
        of_data=True,
        needs=("layers", "targets"),
    ),
    "max_margin_direction": Quantity(
        ("coordinate",),
        "maximum-margin direction through the origin, of classes in the Frobenius norm",
        of_classes=("output", "coordinate"),
        of_data=True,
        needs=("layers", "reference"),
    ),
    "support": Quantity(
        ("support",),
        "numbers of the points on the margin",
        of_data=True,
        needs=("layers", "reference"),
    ),
    "support_margins": Quantity(
        ("support",),
        "numbers k of the other classes of the margins m_ik that are smallest",
        of_data=True,
        needs=("layers", "reference", "classes"),
    ),
    "support_vectors": Quantity(
        ("support", "coordinate"),
        "y_i x_i on the margin",
        of_data=True,
        needs=("layers", "reference", "one output"),
    ),
    "dual_weights": Quantity(
        ("support",),
        "weights p with sum_i p_i y_i x_i = margin u",
        of_data=True,
        needs=("layers", "reference"),
    ),
}


def of_kind(*kinds: Kind) -> list[str]:
    """The names of the declared variables of these kinds."""
    return [name for name, quantity in QUANTITIES.items() if quantity.kind in kinds]


def quantity(name: str) -> Quantity:
    """The row of a variable.

    Of one that the table does not list, such as an observable that the caller added, the size of
    errors is told by its name: ``log_...`` is a logarithm.
    """
    if name in QUANTITIES:
        return QUANTITIES[name]
    kind = Kind.LOG if name.startswith("log_") else Kind.PLAIN
    return Quantity(POINT, name.replace("_", " "), kind=kind)
