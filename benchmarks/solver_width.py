"""Is the cost per weight of GaussNewton flat in the width, and of a field evaluation near memory's?

Three hidden layers of equal width, d = 20, n = 200, exponential loss, to log R = -1e6. A step reads
the weights twice in each Newton iteration and a few times more; a field evaluation reads them twice
and writes as much once. The floor is the time in which NumPy's dot product, on all cores, reads the
weights three times. Times are the least of several, since memory is shared with all that runs.

    python benchmarks/solver_width.py [--quick] [--tag TAG] [--out FOLDER]
"""

import functools

import common
import jax
import jax.numpy as jnp
import numpy as np

import gflow
from gflow.dynamics.radau import stages

WIDTHS = (64, 256, 1024, 2048)
GOAL, RTOL = -1e6, 1e-6


def evaluation(work, repeats):
    """Seconds of one field evaluation, and of reading the weights three times."""
    flat = np.concatenate([matrix.ravel() for matrix in work.weights])
    state = gflow.FlowState(jax.tree.map(jnp.asarray, work.weights), jnp.zeros(()))
    count = max(4, int(2e7 / flat.size))

    @functools.partial(jax.jit, static_argnums=0)
    def evaluations(evaluate, s, state):
        # In a loop, as a solver does it: results go to memory that is there already. The last layer
        # is changed a little, so that every turn has something to do.
        def turn(_, loop):
            last, _ = loop
            weights = (*state.weights[:-1], last)
            slope = evaluate(s, gflow.FlowState(weights, state.scaled_time))
            return last + 1e-30 * jnp.sum(jax.tree.leaves(slope)[-1]), slope

        first = jax.tree.map(jnp.zeros_like, jax.eval_shape(evaluate, s, state))
        return jax.lax.fori_loop(0, count, turn, (state.weights[-1], first))

    def in_factors(s, state):
        field, nothing = work.field, jnp.zeros((1, 0))
        margins = field.problem.margins(state.weights)
        offsets = (margins - margins.min())[None]
        vectors = field.no_vectors(state.weights)
        return stages.evaluate(field, state.weights, vectors, nothing, offsets, s[None]).derivatives

    def readings():
        for _ in range(3 * count):
            flat @ flat

    s = jnp.asarray(work.s_start)

    def written_out(s, state):
        return work.field(s, state)

    calls = {
        "field": lambda: evaluations(written_out, s, state),
        "factors": lambda: evaluations(in_factors, s, state),
        "reads": readings,
    }
    times, _ = common.timed(calls, repeats=repeats)
    found = {}
    for name, timing in times.items():
        found[f"{name}_us"] = 1e6 * timing.least / count
        found[f"{name}_median_us"] = 1e6 * timing.median / count
    return {
        **found,
        "field_over_reads": times["field"].least / times["reads"].least,
        "factors_over_reads": times["factors"].least / times["reads"].least,
    }


def measure(width, quick):
    work = common.task((20, width, width, width, 1), n=200)
    walk = functools.partial(common.walk, work, gflow.GaussNewton(), GOAL, RTOL)
    times, runs = common.timed({"walk": walk}, repeats=1 if quick else 5, budget=30)
    timing, run = times["walk"], runs["walk"]
    tried = run.num_steps + run.num_rejected
    return {
        "width": width,
        "weights": work.num_weights,
        "megabytes": 8e-6 * work.num_weights,
        "finished": run.finished,
        **timing._asdict(),
        "steps": tried,
        "newton": run.num_iterations,
        "step_ns_per_weight": 1e9 * timing.least / tried / work.num_weights,
        "iteration_ns_per_weight": 1e9 * timing.least / run.num_iterations / work.num_weights,
        **evaluation(work, 3 if quick else 15),
        "drift": None if quick or width > 256 else common.Observer(work).drift(run.state),
    }


def figure(rows):
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
    weights = [row["weights"] for row in rows]
    for key, label, color, marker in (
        ("step_ns_per_weight", "a step", "#0072B2", "o"),
        ("iteration_ns_per_weight", "a Newton iteration", "#D55E00", "s"),
    ):
        axes[0].loglog(weights, [r[key] for r in rows], color=color, marker=marker, label=label)
    axes[0].set_ylabel("nanoseconds per weight")
    for key, label, color, marker in (
        ("field_us", "one field evaluation, written out", "#0072B2", "o"),
        ("factors_us", "as outer products", "#D55E00", "s"),
        ("reads_us", "three readings of the weights", "#009E73", "^"),
    ):
        axes[1].loglog(weights, [r[key] for r in rows], color=color, marker=marker, label=label)
    axes[1].set_ylabel("microseconds")
    for ax in axes:
        ax.set_xlabel("weights")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    return fig


def main():
    options = common.begin(common.parser(__doc__))
    report = common.Report(__file__, options)
    rows = []
    for width in WIDTHS[:2] if options.quick else WIDTHS:
        rows.append(measure(width, options.quick))
        print(f"width {width}: {rows[-1]['median']:.3f} s", flush=True)
    columns = (
        "width:d weights:d megabytes:.2f median:.3f least:.3f cpu:.3f steps:d newton:d "
        "step_ns_per_weight:.1f iteration_ns_per_weight:.2f field_us:.1f "
        "factors_us:.1f reads_us:.1f field_over_reads:.2f factors_over_reads:.2f drift:.1e"
    )
    common.table(rows, columns)
    report.write(figure(rows), goal=GOAL, rtol=RTOL, rows=rows)


if __name__ == "__main__":
    main()
