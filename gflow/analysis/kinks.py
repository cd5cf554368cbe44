"""The log of the kinks of a flow: what happened to which unit, and when."""

from typing import TYPE_CHECKING

import numpy as np

from gflow.problem.arguments import expect

if TYPE_CHECKING:
    import xarray as xr

EVENTS = ("crossed", "slid", "left", "stepped over")
"""What happened, by its number in a record."""

COLUMNS = ("log_time", "log_risk", "step", "layer", "neuron", "point")


def kinks(record: "xr.Dataset") -> "xr.Dataset":
    r"""What happened at the kinks of a flow, in order.

    A *unit* is a neuron at a point of the data, with its pre-activation $z$. It "crossed" its kink
    $z = 0$; began to slide along it ("slid"), $z$ staying zero; "left" a slide to either side; or
    was "stepped over": it crossed in a step that was not ended there but mended.

    Args:
        record: of ``gflow.gradient_flow`` for a network with kinks that gflow knows of.

    Returns:
        A Dataset with one dimension, ``kink``: ``log_time`` and ``log_risk`` where it happened,
        ``step`` (accepted solver steps before it), ``layer`` (from 1 at the input; in a network of
        one's own the number of the activation), ``neuron`` and ``point`` (from 0), and ``event``,
        a word.

    Raises:
        ValueError: when the record has no such log.
    """
    import xarray as xr

    expect("record", record, xr.Dataset, "a record, as `gflow.gradient_flow` returns")
    if "num_kinks" not in record:
        raise ValueError(
            "`record` has no log of kinks; expected a flow of a network whose kinks gflow knows: "
            "`gflow.MLP(slope)`, or a `gflow.Network` with `gflow.relu` or `gflow.leaky_relu`."
        )
    if "kink_event" not in record:  # there was none
        empty = {name: ("kink", np.zeros(0)) for name in COLUMNS}
        return xr.Dataset({**empty, "event": ("kink", np.zeros(0, dtype="<U12"))})
    found = {name: ("kink", record[f"kink_{name}"].values) for name in COLUMNS}
    words = np.array(EVENTS)[record["kink_event"].values]
    return xr.Dataset({**found, "event": ("kink", words)})
