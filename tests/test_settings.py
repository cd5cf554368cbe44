"""The caller's switches of JAX and NumPy are no business of gflow's own numbers."""

import contextvars
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gflow
from gflow.problem import settings

PROBLEM = gflow.Problem(gflow.datasets.separable(n=20, d=2, margin=0.1, seed=0))
START = gflow.init.zero_first((2, 3, 1), seed=0)


@pytest.fixture
def strict():
    """Everything that one may set to find a NaN, an infinity or a transfer of one's own."""
    with (
        jax.debug_nans(True),
        jax.debug_infs(True),
        jax.transfer_guard("disallow"),
        np.errstate(all="raise"),
        jax.numpy_rank_promotion("warn"),
    ):
        yield


def test_settings_are_ours_inside_and_the_callers_again_around_what_is_theirs(strict):
    before = settings.Settings.now()
    assert (
        before.debug_nans and before.to_device == "disallow" and before.floats["under"] == "raise"
    )
    with settings.own():
        assert settings.Settings.now()[:6] == settings.OWN[:6]
        with settings.own(), settings.callers():
            assert settings.Settings.now() == before
            with settings.own():  # a run within an observable
                assert settings.Settings.now()[:6] == settings.OWN[:6]
        told = []

        def elsewhere():
            with settings.own():
                assert jax.config.jax_numpy_rank_promotion == "warn"
                with settings.callers():
                    told.append(settings.Settings.now())

        thread = threading.Thread(target=contextvars.copy_context().run, args=(elsewhere,))
        thread.start()
        thread.join()
        assert told == [before]
    assert settings.Settings.now() == before


def test_runs_are_what_they_are_without_while_the_caller_looks_for_nans(strict):
    def shapes(problem, weights):
        return jnp.sum(weights[0])

    runs = {
        "flow": lambda: gflow.gradient_flow(
            PROBLEM, START, until=gflow.LogRisk(-20), save=4, observables={"total": shapes}
        ),
        "descent": lambda: gflow.gradient_descent(
            PROBLEM, START, optax.sgd(0.1), until=gflow.Steps(8), save=3
        ),
    }
    for name, run in runs.items():
        record = run()
        assert record.attrs["status"] == "reached", name
        assert np.isneginf(record.log_time[0]) and np.isfinite(record.log_time[-1])
    assert PROBLEM.data.max_margin().margin == pytest.approx(0.1, abs=1e-15)


def test_a_nan_of_the_callers_own_is_found_for_them():
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        gflow.gradient_flow(
            PROBLEM,
            START,
            until=gflow.LogRisk(-20),
            save=4,
            observables={"mine": lambda problem, weights: jnp.log(-jnp.sum(weights[1] ** 2))},
        )
