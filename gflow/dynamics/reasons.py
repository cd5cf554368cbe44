"""Why a run stopped: one list, from the compiled loop to the words in a record."""

import enum
from typing import NamedTuple


class Reason(enum.IntEnum):
    """Why the march, or a run as a whole, went no further.

    The first are between the device and the host, which goes on; the others end a run, and their
    ``status`` and ``message`` are what the record says. Messages are filled in by :meth:`end`.
    """

    RUNNING = 0
    ARRIVED = enum.auto()
    """On the last target that the march was given."""
    FULL = enum.auto()
    """The buffer of saved states is full."""
    CROSSED = enum.auto()
    """An event that is watched after each step has happened."""
    STIFF = enum.auto()
    """The step is limited by stability."""
    REFUSED_STEPS = enum.auto()
    """Shorter steps do not help."""
    OUT_OF_STEPS = enum.auto()
    """As many steps were tried as the run may."""

    REACHED = enum.auto()
    REACHED_AT_START = enum.auto()
    MAX_STEPS = enum.auto()
    MAX_ITERATES = enum.auto()
    SADDLE = enum.auto()
    SADDLE_AHEAD = enum.auto()
    NOT_SEPARABLE = enum.auto()
    REST_NOT_SEPARABLE = enum.auto()
    BELOW_ROUND_OFF = enum.auto()
    NO_MEANING = enum.auto()
    NO_DESCENT = enum.auto()
    AT_REST = enum.auto()
    SPLIT_ENDS = enum.auto()
    ROUND_OFF = enum.auto()
    TIME_IS_ROUND_OFF = enum.auto()
    RESTS_ON_RESIDUALS = enum.auto()
    OVERFLOW = enum.auto()
    UNCERTAIN_MARGINS = enum.auto()
    RISK_IS_ROUND_OFF = enum.auto()
    AT_LEAST_RISK = enum.auto()
    DIVERGED = enum.auto()
    INTERRUPTED = enum.auto()
    NOT_STARTED = enum.auto()
    REFUSED = enum.auto()
    FAILED = enum.auto()
    CHECKPOINT_FAILED = enum.auto()
    NOT_UNIQUE = enum.auto()
    HIDDEN_KINK = enum.auto()
    HIDDEN_KINKS_AND_MAX_STEPS = enum.auto()
    STUCK = enum.auto()

    @property
    def status(self) -> str:
        """The ``status`` of a record that ended for this reason."""
        return _WORDS[self][0]

    def end(self, **facts: object) -> "End":
        """The end of a run for this reason; ``facts`` complete the message."""
        return End(self.status, _WORDS[self][1].format(**facts))


class End(NamedTuple):
    """How a run ended: its status and its message, as the record has them."""

    status: str
    message: str


_TIME_CLOCK = "a time clock (`until=gflow.Time(...)`) shows the approach"
_SHORTER = "shorter steps did not help at log R = {log_risk:.6g}, with |grad log R| = {slope:.2g}"

_LOCATED = (
    "Write gflow.relu, gflow.leaky_relu or gflow.MLP: kinks that are known are located, and slides "
    "followed"
)

_WORDS: dict[Reason, tuple[str, str]] = {
    Reason.REACHED: ("reached", "{rule!r} after {steps} steps"),
    Reason.REACHED_AT_START: ("reached", "{rule!r} is met at the start; no step was made"),
    Reason.MAX_STEPS: (
        "max_steps",
        "{steps} steps were tried before {rule!r} was reached; raise `max_steps`, or loosen "
        "`rtol`; on a plateau `clock=gflow.clocks.LogTime()` takes fewer",
    ),
    Reason.MAX_ITERATES: (
        "max_steps",
        "{steps} steps were made before {rule!r} was reached; raise `max_steps`, or take longer "
        "steps",
    ),
    Reason.SADDLE: (
        "stalled",
        "the flow comes to rest at R = R(0), with |grad log R| = {slope:.2g}: it runs into a "
        f"saddle, as it may from a start with R(W(0)) > R(0); {_TIME_CLOCK}",
    ),
    Reason.SADDLE_AHEAD: (
        "stalled",
        f"{_SHORTER} after {{first:.2g}} at the start, and R is not below that of zero weights: "
        "the flow is running into a saddle, which it may from a start with R(W(0)) > R(0); "
        f"{_TIME_CLOCK}",
    ),
    Reason.NOT_SEPARABLE: ("stalled", f"{_SHORTER}: {{verdict}}; {_TIME_CLOCK}"),
    Reason.REST_NOT_SEPARABLE: (
        "stalled",
        "the flow comes to rest at R = R(0), with |grad log R| = {slope:.2g}: {verdict}; "
        f"{_TIME_CLOCK}",
    ),
    Reason.BELOW_ROUND_OFF: (
        "precision_lost",
        f"{_SHORTER}: with weights up to {{weights:.1g}} and inputs up to {{inputs:.1g}} the "
        "margins are below float64's round-off beside R(0), so that a clock that follows the risk "
        "stands still; start from larger weights, scale the data (`data.scaled()`), or ask for a "
        "time (`until=gflow.LogTime(...)`), whose clock does not",
    ),
    Reason.NO_MEANING: ("stalled", "{why}"),
    Reason.NO_DESCENT: (
        "stalled",
        "none of {steps} steps went downhill, so that no time has passed: the learning rate is "
        "zero or negative",
    ),
    Reason.AT_REST: ("stalled", "no weight changed in the last {steps} steps{why}"),
    Reason.SPLIT_ENDS: ("stalled", "split coordinates end at log R = {log_risk:.6g}"),
    Reason.ROUND_OFF: (
        "precision_lost",
        f"{_SHORTER}: the error estimate does not fall with the step, round-off exceeds the "
        "tolerance{why}; try a larger `rtol` than {rtol:.0e}",
    ),
    Reason.TIME_IS_ROUND_OFF: (
        "precision_lost",
        f"{_SHORTER}: the flow changes in less time than float64 can tell beside the time that has "
        "passed, as after a long plateau of three layers or more, or round-off exceeds the "
        "tolerance; over a first saddle `clock=gflow.clocks.PathLength(scale)` knows the way, "
        "with the size of the start as `scale`, else start from larger weights, or try a larger "
        "`rtol` than {rtol:.0e}",
    ),
    Reason.RESTS_ON_RESIDUALS: (
        "stalled",
        f"{_SHORTER} after {{first:.2g}} at the start: the flow stands still where residuals do "
        "not vanish, near a saddle or at the least risk that the widths of the layers allow, and "
        "the implicit solver's steps are no longer than elsewhere; an earlier time shows the "
        "approach",
    ),
    Reason.OVERFLOW: (
        "precision_lost",
        "at log R = {log_risk:.6g} margins have grown to {margin:.0e}, and their squares leave "
        "float64's range: a flow with a polynomial tail ends here",
    ),
    Reason.UNCERTAIN_MARGINS: (
        "precision_lost",
        "at log R = {log_risk:.2g} the margins of float64 weights are uncertain by one; {way}",
    ),
    Reason.RISK_IS_ROUND_OFF: (
        "precision_lost",
        "at log R = {log_risk:.6g} residuals are the round-off of float64 outputs: no smaller risk "
        "can be shown; a time (`until=gflow.LogTime(...)`) can go on from there",
    ),
    Reason.AT_LEAST_RISK: (
        "stalled",
        "log R = {log_risk:.9g} is the least of all linear maps of rank {rank} or less, which the "
        "flow does not leave: no smaller risk can be reached; a time (`until=gflow.LogTime(...)`) "
        "shows what follows",
    ),
    Reason.DIVERGED: ("diverged", "{why}"),
    Reason.INTERRUPTED: (
        "interrupted",
        "stopped by the keyboard; what was computed is in the record",
    ),
    Reason.NOT_STARTED: ("interrupted", "stopped by the keyboard before it was done"),
    Reason.REFUSED: ("refused", "{why}"),
    Reason.FAILED: ("failed", "{why}"),
    Reason.CHECKPOINT_FAILED: ("checkpoint_failed", "{why}"),
    Reason.HIDDEN_KINK: (
        "precision_lost",
        f"{_SHORTER}: the network has a kink of which gflow does not know (as jax.nn.relu has), at "
        f"which the field jumps; the flow slides along it, and no step is short enough. {_LOCATED}",
    ),
    Reason.HIDDEN_KINKS_AND_MAX_STEPS: (
        "max_steps",
        "{steps} steps were tried before {rule!r} was reached: the network has kinks of which "
        "gflow does not know (as jax.nn.relu has), at which the field jumps, and where a flow "
        f"slides along one its steps become ever shorter. {_LOCATED}",
    ),
    Reason.NOT_UNIQUE: (
        "not_unique",
        "the flow can go on in two ways: {why}; choose one with the network's `branch`",
    ),
    Reason.STUCK: (
        "precision_lost",
        "at log R = {log_risk:.6g} no way on from a kink was found: {why}",
    ),
}
