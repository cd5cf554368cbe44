r"""Figures of trajectories (public as ``gflow.plot``): one figure a function, axes returned.

Every function takes one record, a sequence of records, or a mapping from label to record, unless it
says otherwise. Flow is a line, descent is dashed with markers; colours are those of Okabe and Ito,
which colour-blind readers can tell apart. Sizes are those of one column of a paper.

Axes whose values run from about zero to $10^4$ or $10^{16}$ ($\log t$, $-\log R$, steps) are
linear up to one and logarithmic beyond.
"""

from gflow.report.plot.classes import decision_regions as decision_regions, spectra as spectra
from gflow.report.plot.dense import dense_layers as dense_layers
from gflow.report.plot.exactness import (
    asymptotes as asymptotes,
    certificate as certificate,
    orders as orders,
)
from gflow.report.plot.kinks import neurons as neurons, patterns as patterns
from gflow.report.plot.layers import modes as modes, singular_values as singular_values
from gflow.report.plot.many import ensemble as ensemble, gaps as gaps
from gflow.report.plot.plane import animation as animation, decision_lines as decision_lines
from gflow.report.plot.style import (
    COLORS as COLORS,
    COLUMN as COLUMN,
    save_figure as save_figure,
)
from gflow.report.plot.sweeps import phase_diagram as phase_diagram, swept as swept
from gflow.report.plot.trajectories import (
    alignment as alignment,
    direction_error as direction_error,
    margin as margin,
    norms as norms,
    rank_one as rank_one,
    risk as risk,
    summary as summary,
)
