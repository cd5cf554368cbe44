"""The peers of `reach.py`, each a program of its own: ``python rivals.py NAME PROBLEM.npz``.

It prints a line of JSON for what it is (settings, seconds of the first call), then two for each
target: that it begins, and what it found. The one who started it stops it when a target takes too
long. Nothing here is gflow's but where a name says so; SciPy's and PyTorch's need neither gflow nor
JAX, so that an interpreter with PyTorch alone can run them.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

RTOL, ATOL = 1e-6, 1e-9
"""Of all error-controlled peers, on weights of order one."""

OFF_THE_PATH = 1e-2
"""An end whose direction differs by more from the flow's is not the flow's; descent need not be."""

DESCENTS = "Lyu and Li's descent", "optax descent"

TOO_LATE = "its time t is beyond float64"


class Unable(Exception):
    """Why a peer cannot reach a target at all."""


# -------------------------------------------------------------------------------------------------
# The flow, written once for NumPy, JAX and PyTorch
# -------------------------------------------------------------------------------------------------


def end_to_end(weights: Sequence[Any]) -> Any:
    """The row W_L … W_1."""
    row = weights[-1]
    for matrix in weights[-2::-1]:
        row = row @ matrix
    return row


SAVED = 100
"""Points that gflow's whole call saves and observes, its default; the others return final weights.
"""


def descent_direction(weights: Sequence[Any], z: Any, exp: Callable[[Any], Any]) -> list[Any]:
    """Minus the gradient of the mean exponential loss: one pass up, one down, no example alone."""
    rows = [None] * len(weights)
    row = None
    for k in range(len(weights) - 1, -1, -1):
        rows[k] = row
        row = weights[k] if row is None else row @ weights[k]
    pull = (exp(-(z @ row[0])) @ z)[None] / len(z)
    found = []
    for k, above in enumerate(rows):
        found.append(pull if above is None else above.T @ pull)
        pull = pull @ weights[k].T
    return found


class Flat:
    """Weights as one vector and back."""

    def __init__(self, weights: Sequence[np.ndarray]):
        self.shapes = [matrix.shape for matrix in weights]
        self.ends = np.cumsum([0, *(matrix.size for matrix in weights)]).tolist()
        self.start = np.concatenate([matrix.ravel() for matrix in weights])

    def split(self, y: Any) -> list[Any]:
        """The matrices of a vector."""
        parts = zip(self.ends[:-1], self.ends[1:], self.shapes, strict=True)
        return [y[a:b].reshape(shape) for a, b, shape in parts]


# -------------------------------------------------------------------------------------------------
# Peers: each takes the problem and returns (settings, run), run from a target to weights
# -------------------------------------------------------------------------------------------------


def scipy_physical(method: str) -> Callable[..., Any]:
    """SciPy in physical time: the field in NumPy, for the implicit ones its Jacobian compiled."""

    def peer(problem: SimpleNamespace) -> tuple[str, Callable[..., Any]]:
        import scipy.integrate

        flat, z = Flat(problem.weights), problem.z
        options: dict[str, Any] = {}
        if method != "DOP853":
            import jax
            import jax.numpy as jnp

            jax.config.update("jax_enable_x64", True)

            def field(y: Any) -> Any:
                pulls = descent_direction(flat.split(y), z, jnp.exp)
                return jnp.concatenate([each.ravel() for each in pulls])

            jacobian = jax.jit(jax.jacfwd(field))
            jacobian(flat.start)
            options["jac"] = lambda t, y: np.asarray(jacobian(y))

        def fun(t: float, y: np.ndarray) -> np.ndarray:
            pulls = descent_direction(flat.split(y), z, np.exp)
            return np.concatenate([each.ravel() for each in pulls])

        def run(target: SimpleNamespace) -> Any:
            solver = getattr(scipy.integrate, method)(
                fun, 0.0, flat.start, _time(target), rtol=RTOL, atol=ATOL, **options
            )
            while solver.status == "running":
                message = solver.step()
            if solver.status == "failed":
                raise Unable(f"the solver fails: {message}")
            return flat.split(solver.y)

        exact = ", exact compiled Jacobian" if options else ""
        return f"field in NumPy{exact}, rtol {RTOL:g}, atol {ATOL:g}", run

    return peer


def diffrax_physical(method: str) -> Callable[..., Any]:
    """Diffrax's `diffeqsolve` in physical time, compiled once for every end."""

    def peer(problem: SimpleNamespace) -> tuple[str, Callable[..., Any]]:
        import diffrax
        import jax
        import jax.numpy as jnp

        jax.config.update("jax_enable_x64", True)
        if method == "Kvaerno5":
            from peers import kvaerno5

            solver, how = kvaerno5(RTOL, fixed=True), ", its root finder corrected"
        else:
            solver, how = getattr(diffrax, method)(), ""
        control = diffrax.PIDController(RTOL, ATOL)
        told = f"`diffeqsolve`{how}, rtol {RTOL:g}, atol {ATOL:g}"
        z = jnp.asarray(problem.z)
        term = diffrax.ODETerm(
            lambda t, weights, args: tuple(descent_direction(weights, z, jnp.exp))
        )

        @jax.jit
        def solve(t_end: Any) -> Any:
            start = tuple(map(jnp.asarray, problem.weights))
            found = diffrax.diffeqsolve(
                term, solver, 0.0, t_end, None, start, stepsize_controller=control, max_steps=None
            )
            return jax.tree.map(lambda leaf: leaf[-1], found.ys)

        return told, lambda target: jax.block_until_ready(solve(_time(target)))

    return peer


def torch_physical(package: str, method: str) -> Callable[..., Any]:
    """Torchdiffeq or torchode in physical time, in eager PyTorch with the gradient by hand."""

    def peer(problem: SimpleNamespace) -> tuple[str, Callable[..., Any]]:
        import torch

        library = __import__(package)
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(1)
        flat = Flat(problem.weights)
        z = torch.tensor(problem.z)

        def field(t: Any, y: Any) -> Any:
            pulls = descent_direction(flat.split(y), z, torch.exp)
            return torch.cat([each.reshape(-1) for each in pulls])

        start = torch.tensor(flat.start)

        @torch.no_grad()
        def run(target: SimpleNamespace) -> Any:
            times = torch.tensor([0.0, _time(target)])
            if package == "torchdiffeq":
                y = library.odeint(field, start, times, rtol=RTOL, atol=ATOL, method=method)[-1]
            else:
                term = library.ODETerm(lambda t, y: field(t, y[0])[None])
                stepper = getattr(library, method)(term=term)
                control = library.IntegralController(atol=ATOL, rtol=RTOL, term=term)
                solver = library.AutoDiffAdjoint(stepper, control)
                start_value = library.InitialValueProblem(y0=start[None], t_eval=times[None])
                y = solver.solve(start_value).ys[0, -1]
            return flat.split(y.numpy())

        return f"eager, one thread, gradient by hand, rtol {RTOL:g}, atol {ATOL:g}", run

    return peer


def lent_clock(method: str) -> Callable[..., Any]:
    """A method on gflow's field, in logarithms and in gflow's clock of the risk."""

    def peer(problem: SimpleNamespace) -> tuple[str, Callable[..., Any]]:
        import common
        import diffrax
        import jax
        import peers

        jax.config.update("jax_enable_x64", True)
        import gflow

        work = common.task((), data=_data(problem), start=tuple(problem.weights))
        if method in ("LSODA", "Radau"):
            scipy_peer = peers.Peer(work)
            scipy_peer.compile()

            def run(target: SimpleNamespace) -> Any:
                found = scipy_peer.walk(
                    method, target.log_risk, RTOL, scaled_time=target.scaled_time, limit=math.inf
                )
                return found.state.weights

            return f"compiled field and exact Jacobian, rtol {RTOL:g}", run
        solvers = {
            "GaussNewton": gflow.GaussNewton,
            "Dopri8": diffrax.Dopri8,
            "Kvaerno5": lambda: peers.kvaerno5(RTOL, fixed=True),
        }
        solver = solvers[method]()
        return (
            f"gflow's loop, rtol {RTOL:g}, final weights only",
            lambda target: common.walk(work, solver, target.log_risk, RTOL).state.weights,
        )

    return peer


def gflow_itself(problem: SimpleNamespace) -> tuple[str, Callable[..., Any]]:
    """The whole call at its defaults."""
    import gflow

    posed = gflow.Problem(_data(problem), loss=gflow.Exponential())

    def run(target: SimpleNamespace) -> Any:
        found = gflow.gradient_flow(
            posed,
            tuple(problem.weights),
            until=gflow.LogRisk(target.log_risk),
            save=SAVED,
            progress=False,
        )
        return [found[f"final_weights_{k + 1}"].values for k in range(len(problem.weights))]

    return f"`gradient_flow`, rtol 1e-9, {SAVED} points with all observables", run


def _data(problem: SimpleNamespace) -> Any:
    import gflow

    return gflow.Dataset(problem.z, np.ones(len(problem.z)))


def lyu_li(problem: SimpleNamespace) -> tuple[str, Callable[..., Any]]:
    """Lyu and Li's descent with loss-based steps and line search, on log R, in eager PyTorch.

    Theirs is eager-like TensorFlow 1, which installs nowhere today; this is their rule (arXiv
    1906.05890, appendix K) with the gradient by hand.
    """
    import torch

    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    z = torch.tensor(problem.z)

    def log_risk(weights: Sequence[Any]) -> float:
        return float(torch.logsumexp(-(z @ end_to_end(weights)[0]), 0)) - math.log(len(z))

    @torch.no_grad()
    def run(target: SimpleNamespace) -> Any:
        weights = [torch.tensor(matrix) for matrix in problem.weights]
        rate, here, shifted = 0.1, log_risk(weights), None
        while here > target.log_risk:
            if shifted is None:
                shifted = descent_direction(weights, z, lambda q, r=here: torch.exp(q - r))
            tried = [w + rate * pull for w, pull in zip(weights, shifted, strict=True)]
            there = log_risk(tried)
            if there < here:
                weights, here, shifted, rate = tried, there, None, rate * 2**0.2
            else:
                rate *= 2**-0.1
        return [matrix.numpy() for matrix in weights]

    return "their line search on log R, eager PyTorch, one thread, gradient by hand", run


def plain_descent(problem: SimpleNamespace) -> tuple[str, Callable[..., Any]]:
    """A jitted loop around `optax.sgd`, at the best of ten step sizes."""
    import jax
    import jax.numpy as jnp
    import optax

    jax.config.update("jax_enable_x64", True)
    z = jnp.asarray(problem.z)

    @jax.jit
    def descend(rate: Any, log_risk: Any, most: Any) -> Any:
        optimizer = optax.sgd(rate)
        start = tuple(map(jnp.asarray, problem.weights))

        def risk(weights: Any) -> Any:
            return jnp.mean(jnp.exp(-(z @ end_to_end(weights)[0])))

        def step(carry: Any) -> Any:
            weights, state, _, count = carry
            value, slope = jax.value_and_grad(risk)(weights)
            updates, state = optimizer.update(slope, state, weights)
            return optax.apply_updates(weights, updates), state, value, count + 1

        def go_on(carry: Any) -> Any:
            _, _, value, count = carry
            return (value > jnp.exp(log_risk)) & (count < most) & jnp.isfinite(value)

        carry = (start, optimizer.init(start), jnp.asarray(jnp.inf), 0)
        carry = jax.lax.while_loop(lambda c: (c[3] == 0) | go_on(c), step, carry)
        return carry[0], carry[2], carry[3]

    rates = [float(rate) for rate in 0.1 * 2.0 ** np.arange(10)]
    taken = {}
    for rate in rates:
        _, value, count = descend(rate, -4.0, 100_000)
        if float(value) <= math.exp(-4.0):
            taken[rate] = int(count)
    best = min(taken, key=taken.__getitem__)

    def run(target: SimpleNamespace) -> Any:
        if target.log_risk < math.log(sys.float_info.min):
            raise Unable("the risk itself is below float64")
        return jax.block_until_ready(descend(best, target.log_risk, 10**15))[0]

    return f"jitted loop, step size {best:g}, the best of ten from 0.1 to 51", run


PEERS: dict[str, Callable[..., Any]] = {
    "gflow": gflow_itself,
    "gflow's solver alone": lent_clock("GaussNewton"),
    **{f"diffrax {m}": diffrax_physical(m) for m in ("Tsit5", "Dopri8", "Kvaerno5")},
    **{f"SciPy {m}": scipy_physical(m) for m in ("DOP853", "LSODA", "Radau")},
    **{f"torchdiffeq {m}": torch_physical("torchdiffeq", m) for m in ("dopri5", "dopri8")},
    "torchode Tsit5": torch_physical("torchode", "Tsit5"),
    "Lyu and Li's descent": lyu_li,
    "optax descent": plain_descent,
    **{f"{m}, gflow's clock": lent_clock(m) for m in ("Dopri8", "Kvaerno5", "LSODA", "Radau")},
}
"""Name: its maker. The last four are lent what gflow has and they have not."""


def _time(target: SimpleNamespace) -> float:
    if target.log_time > math.log(sys.float_info.max):
        raise Unable(TOO_LATE)
    return math.exp(target.log_time)


# -------------------------------------------------------------------------------------------------
# The program
# -------------------------------------------------------------------------------------------------


def read(path: str | Path) -> tuple[SimpleNamespace, list[SimpleNamespace]]:
    """The problem and its targets."""
    with np.load(path) as file:
        weights = [file[f"weights_{k}"] for k in range(int(file["depth"]))]
        problem = SimpleNamespace(weights=weights, z=file["signed_inputs"])
        columns = [file[name] for name in ("log_risks", "log_times", "scaled_times", "end_to_end")]
    targets = [
        SimpleNamespace(log_risk=float(r), log_time=float(t), scaled_time=float(u), w=w)
        for r, t, u, w in zip(*columns, strict=True)
    ]
    return problem, targets


def main() -> None:
    name, path = sys.argv[1:]
    problem, targets = read(path)
    began = time.perf_counter()
    try:
        settings, run = PEERS[name](problem)
        run(targets[0])
    except ImportError as error:
        return _tell(missing=f"not installed: {error.name}")
    _tell(settings=settings, first_call_s=time.perf_counter() - began)
    for target in targets:
        _tell(begins=target.log_risk)
        try:
            _tell(**measured(run, target, problem.z, follows=name not in DESCENTS))
        except Unable as error:
            return _tell(unable=str(error))
        except Exception as error:
            return _tell(unable=f"{type(error).__name__}: {str(error).splitlines()[0]}")
    return _tell(done=True)


def measured(
    run: Callable[..., Any], target: SimpleNamespace, z: np.ndarray, *, follows: bool = True
) -> dict[str, Any]:
    """The least time of up to five runs in about a second, and how right the end is."""
    took: list[float] = []
    while len(took) < 5 and sum(took) < 1.0:
        began = time.perf_counter()
        weights = run(target)
        took.append(time.perf_counter() - began)
    w = np.asarray(end_to_end([np.asarray(each) for each in weights])[0])
    margins = z @ w
    log_risk = -margins.min() + math.log(np.mean(np.exp(margins.min() - margins)))
    if not log_risk < 0.99 * target.log_risk:
        raise Unable(f"it ends at log R = {log_risk:.4g} instead of {target.log_risk:g}")
    gap = float(np.linalg.norm(w / np.linalg.norm(w) - target.w))
    if follows and not gap < OFF_THE_PATH:
        raise Unable(f"its direction at log R = {target.log_risk:g} is off by {gap:.1g}")
    return {
        "log_risk": target.log_risk,
        "seconds": min(took),
        "direction_gap": gap,
        "peak_mib": peak_memory(),
    }


def peak_memory() -> float | None:
    """MiB this process has held at most; `getrusage` would count its parent's too."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def _tell(**found: Any) -> None:
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
