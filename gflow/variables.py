"""The variables of a record: their dimensions and what they mean."""

_POINT, _LAYER, _PAIR = ("point",), ("point", "layer"), ("point", "pair")

VARIABLES: dict[str, tuple[tuple[str, ...], str]] = {
    "log_risk": (_POINT, "log R, natural logarithm of the mean loss"),
    "log_time": (_POINT, "log t, natural logarithm of the time of dW/dt = -grad R"),
    "num_steps": (_POINT, "accepted solver steps, or descent iterations, so far"),
    "log_step_size": (_POINT, "logarithm of descent's latest step size"),
    "margin": (_POINT, "normalised margin min_i q_i / |w|"),
    "margin_gap": (_POINT, "max margin minus normalised margin, absolute error 1e-16"),
    "layer_margin": (_POINT, "min_i q_i / prod_k |W_k|_F"),
    "smoothed_margin": (_POINT, "l^-1(sum_i l(q_i)) / prod_k |W_k|_F"),
    "min_margin": (_POINT, "unnormalised margin min_i q_i"),
    "norm": (_POINT, "Euclidean norm of all weights"),
    "kkt_residual": (_POINT, "Lyu and Li's epsilon: |W~ - sum_i lambda_i grad q_i(W~)|"),
    "kkt_slackness": (_POINT, "Lyu and Li's delta: max_i lambda_i (q_i(W~) - 1)"),
    "perpendicular_cosine": (_POINT, "cosine between w off the max-margin direction and grad R(w)"),
    "direction_error": (_POINT, "| w/|w| - max-margin direction |"),
    "direction_alignment": (_POINT, "| <w / prod_k |W_k|_F, v_1> |"),
    "alignment": (_PAIR, "|<v_{k+1}, u_k>| of neighbouring layers"),
    "misalignment": (_PAIR, "1 - |<v_{k+1}, u_k>|, free of cancellation"),
    "frobenius_norm": (_LAYER, "|W_k|_F"),
    "spectral_norm": (_LAYER, "|W_k|_2"),
    "rank_one_residual": (_LAYER, "| W_k/|W_k|_F - u_k v_k^T |_F"),
    "rank_one_gap": (_LAYER, "1 - |W_k|_2/|W_k|_F, free of cancellation"),
    "imbalance_drift": (_POINT, "largest change of a conserved matrix / largest |W_k|_F^2"),
    "clock_value": (_POINT, "s, the coordinate that the solver steps in"),
    "clock_error": (
        _POINT,
        "energy identity R(0) - R(t) = int |grad R|^2 dt: |-log R minus its value by the clock| / "
        "max(1, |log R|), in a time clock the same of log t",
    ),
    "digits_left": (_POINT, "decimal digits that float64 leaves of differences of margins"),
    "rank_one_slack": (_LAYER, "Lemma 2 (i): D minus |W_k|_F^2 - |W_k|_2^2"),
    "alignment_slack": (
        _PAIR,
        "Lemma 2 (ii): D + |W_{k+1}(0)|_2^2 + |W_k(0)|_2^2 minus "
        "(1 - <v_{k+1}, u_k>^2) |W_{k+1}|_2^2",
    ),
    "beyond_hand_over": (_POINT, "1 where the run continues in split coordinates, else 0"),
    "end_to_end": (("point", "coordinate"), "w = (W_L ... W_1)^T"),
}
"""Name: (dimensions, meaning). All quantities are dimensionless."""

CERTIFIED = (
    "log_time",
    "margin",
    "margin_gap",
    "layer_margin",
    "smoothed_margin",
    "kkt_residual",
    "kkt_slackness",
    "min_margin",
    "norm",
    "direction_error",
    "direction_alignment",
    "alignment",
    "misalignment",
    "frobenius_norm",
    "spectral_norm",
    "rank_one_residual",
    "rank_one_gap",
    "end_to_end",
)
"""Variables NAME for which a certified flow holds an error estimate, under ``NAME_error``."""

VARIABLES |= {
    f"{name}_error": (VARIABLES[name][0], f"estimated absolute error of {name}")
    for name in CERTIFIED
}
