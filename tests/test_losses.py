import math

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

from gflow import Exponential, Logistic, PolynomialTail

EPSILON = 2.0**-52

# "A few units in the last place", of a logarithm or of one: what two or three correctly rounded
# functions in a row give. Who reads a logarithm takes its exponential, which sees no more.
FEW_ULP = 6 * EPSILON
# log l'' and derivatives are a few operations longer, and condition numbers are not removed there.
NEAR = 1e-13
# Below this XLA flushes to zero.
SMALLEST = 2.3e-308

POWERS = (1.0, 1.0 + 1e-9, 1.5, 2.0, 40.0)
LOSSES = [Exponential(), Logistic(), *map(PolynomialTail, POWERS)]


def names(loss):
    return loss.name


def arcsinh(x):
    return mpmath.asinh(x) if x >= 0 else -mpmath.asinh(-x)


def softplus(x):
    """log(1 + exp(x)), which for |x| > 3000 is max(x, 0) to any number of digits used here."""
    if abs(x) > 3000:
        return x if x > 0 else mpmath.mpf(0)
    return mpmath.log1p(mpmath.exp(x))


def reference(loss, q):
    """log l, log(-l'), log l'' in 60 digits beyond any cancellation."""
    q = mpmath.mpf(float(q))
    if isinstance(loss, Exponential):
        return -q, -q, -q
    if isinstance(loss, Logistic):
        value = -q if q > 3000 else mpmath.log(softplus(-q))
        return value, -softplus(q), -softplus(q) - softplus(-q)
    digits = 60 + (2 * int(abs(mpmath.log10(abs(q)))) if q else 0)
    with mpmath.workdps(digits):
        p, s = mpmath.mpf(loss.power), mpmath.sqrt(q * q + 4)
        value = -p * arcsinh(q / 2)
        slope = mpmath.log(p) + value - mpmath.log(s)
        return value, slope, slope + mpmath.log(p + q / s) - mpmath.log(s)


def around(centre):
    """The nearest doubles and a few decades of distances, both sides."""
    near = np.nextafter(centre, np.inf) - centre
    steps = np.concatenate([np.arange(-5, 6) * near, 10.0 ** np.arange(-14, 0.0)])
    return np.concatenate([centre + steps, centre - steps])


def grid(loss, exponents=(-300, 300)):
    """Both signs, tiny to huge; zero; branch points and underflow points; the functions' zeros."""
    size = 10.0 ** np.linspace(*exponents, 61)
    middle = 10.0 ** np.linspace(-3, 3, 61)
    points = [size, -size, middle, -middle, [0.0, 1e300, -1e300, 700.0, -700.0, 746.0, -746.0]]
    points += [around(c) for c in (-2.0, 0.0, 0.25, 40.0, -40.0)]
    if isinstance(loss, Logistic):
        points.append(around(-math.log(math.e - 1)))
    elif isinstance(loss, PolynomialTail) and loss.power > 1:
        p = mpmath.mpf(loss.power)
        low, high = mpmath.mpf(-60), mpmath.log(p)
        while high - low > mpmath.mpf("1e-40"):
            a = (low + high) / 2
            above = mpmath.log(p) - p * a > mpmath.log(2 * mpmath.cosh(a))
            low, high = (a, high) if above else (low, a)
        root = low
        points.append(around(float(2 * mpmath.sinh(root))))
    return np.concatenate(points)


def error_of_logarithm(got, expected):
    """Relative to the logarithm, or to one if that is larger."""
    if not np.isfinite(got):
        return math.inf
    return float(abs(mpmath.mpf(float(got)) - expected) / max(1, abs(expected)))


@pytest.fixture(autouse=True)
def sixty_digits():
    with mpmath.workdps(60):
        yield


@pytest.mark.parametrize("loss", LOSSES, ids=names)
def test_logarithms_of_value_and_slope_are_exact_to_a_few_ulp_everywhere(loss):
    q = grid(loss)
    for function, index in ((loss.log_value, 0), (loss.log_slope, 1)):
        errors = [
            error_of_logarithm(got, reference(loss, x)[index])
            for x, got in zip(q, np.asarray(jax.jit(function)(q)), strict=True)
        ]
        worst = int(np.argmax(errors))
        assert errors[worst] <= FEW_ULP, (function, q[worst], errors[worst] / EPSILON)


@pytest.mark.parametrize("loss", LOSSES, ids=names)
def test_logarithm_of_curvature_is_accurate_relative_to_one_or_to_itself(loss):
    q = grid(loss)
    for x, got in zip(q, np.asarray(jax.jit(loss.log_curvature)(q)), strict=True):
        expected = reference(loss, x)[2]
        assert abs(float(got) - expected) <= NEAR * max(1.0, abs(expected)), x


@pytest.mark.parametrize("loss", LOSSES, ids=names)
def test_slope_is_that_of_its_logarithm_and_vanishes_at_infinity(loss):
    q = np.linspace(-600.0, 600.0, 241)
    np.testing.assert_allclose(loss.slope(q), np.exp(loss.log_slope(q)), rtol=3e-13)
    assert float(loss.slope(np.inf)) == 0.0


@pytest.mark.parametrize("loss", LOSSES, ids=names)
def test_inverse_undoes_log_value(loss):
    q = np.concatenate([grid(loss, (-3, 5)), -(10.0 ** np.linspace(0, 2.5, 20))])
    log_value = np.asarray(jax.jit(loss.log_value)(q))
    back = np.asarray(jax.jit(loss.inverse)(log_value))
    # An ulp of log l moves q by an ulp of log l over its slope.
    slope = np.abs(np.asarray(jax.jit(jax.vmap(jax.grad(loss.log_value)))(q)))
    allowed = 8 * EPSILON * (np.abs(q) + np.abs(log_value) / slope)
    if isinstance(loss, PolynomialTail):
        allowed = allowed + 2e-15 * np.abs(q)  # XLA's sinh: 9 ulp
    assert (np.abs(back - q) <= allowed + SMALLEST).all()


def test_inverse_of_the_logistic_loss_is_exact_to_a_few_ulp():
    loss = Logistic()
    v = np.concatenate(
        [-(10.0 ** np.linspace(-6, 300, 60)), 10.0 ** np.linspace(-6, 2.8, 40), [0.0]]
    )
    v = np.concatenate([v, around(math.log(math.log(2.0))), around(-1.0), around(0.5), around(0.0)])
    for x, got in zip(v, np.asarray(jax.jit(loss.inverse)(v)), strict=True):
        value = mpmath.mpf(float(x))
        exact = -value
        if value > -300:
            value = mpmath.exp(value)
            exact = -value if value > 3000 else -mpmath.log(mpmath.expm1(value))
        assert error_of_logarithm(got, exact) <= FEW_ULP, x


def derivative_of_log(loss, q):
    """The derivatives of log l, log(-l'), log l''; the second derivatives of the first two."""
    q = mpmath.mpf(float(q))
    one = mpmath.mpf(1)
    if isinstance(loss, Exponential):
        return -one, -one, -one, 0 * one, 0 * one
    if isinstance(loss, Logistic):
        sigma = mpmath.exp(-softplus(-q)) if q < 0 else 1 / (1 + mpmath.exp(-min(q, 3000)))
        other = mpmath.exp(-softplus(q)) if q > -3000 else one
        value = mpmath.exp(-q) if q > 3000 else softplus(-q)
        ratio = -one if q > 3000 else -other / value
        return ratio, -sigma, other - sigma, ratio * (-sigma - ratio), -sigma * other
    p = mpmath.mpf(loss.power)
    with mpmath.workdps(60 + 3 * max(0, int(mpmath.log10(abs(q) + 1)))):
        s = mpmath.sqrt(q * q + 4)
        t, dt = q / s, 4 / s**3
        return (
            -p / s,
            -(p + t) / s,
            dt / (p + t) - (p + 2 * t) / s,
            p * t / s**2,
            -dt / s + (p + t) * t / s**2,
        )


@pytest.mark.parametrize("loss", LOSSES, ids=names)
def test_first_and_second_derivatives_are_finite_and_right_everywhere(loss):
    q = grid(loss)
    functions = [
        jax.grad(loss.log_value),
        jax.grad(loss.log_slope),
        jax.grad(loss.log_curvature),
        jax.grad(jax.grad(loss.log_value)),
        jax.grad(jax.grad(loss.log_slope)),
    ]
    found = np.stack([np.asarray(jax.jit(jax.vmap(f))(q)) for f in functions])
    assert np.isfinite(found).all()
    expected = [derivative_of_log(loss, x) for x in q]
    for row, (x, column) in enumerate(zip(q, expected, strict=True)):
        for k, exact in enumerate(column):
            # Of derivatives, the scale to which they are wanted is min(1, 1/|q|)^order.
            scale = max(1.0, abs(x)) ** (-2 if k > 2 else -1)
            if isinstance(loss, Logistic) and k != 0:
                scale = 1.0
            error = abs(float(found[k, row]) - exact)
            assert error <= 5 * NEAR * max(scale, abs(exact)) + SMALLEST, (k, x, found[k, row])


@pytest.mark.parametrize("loss", [Logistic(), PolynomialTail(1.0), PolynomialTail(1.5)], ids=names)
def test_reverse_forward_and_batched_derivatives_agree(loss):
    q = np.array([-30.0, -0.5, 0.0, 0.2, 3.0, 1e5])
    value = jax.jit(lambda q: jax.vmap(jax.jacfwd(loss.log_value))(q))(q)
    np.testing.assert_array_equal(value, jax.jit(jax.vmap(jax.grad(loss.log_value)))(q))
    hessian = jax.jit(jax.hessian(lambda x: jnp.sum(loss.log_slope(x))))(q)
    second = jax.jit(jax.vmap(jax.grad(jax.grad(loss.log_slope))))(q)
    np.testing.assert_allclose(hessian, np.diag(second), rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    "loss", [Logistic(), *map(PolynomialTail, (1.0, 1.3, 1.7, 2.0))], ids=names
)
def test_slope_bound_and_smoothness_are_the_suprema(loss):
    q = np.concatenate([-(10.0 ** np.linspace(12, -3, 4001)), 10.0 ** np.linspace(-3, 3, 4001)])
    slope = float(np.exp(np.asarray(jax.jit(loss.log_slope)(q)).max()))
    curvature = float(np.exp(np.asarray(jax.jit(loss.log_curvature)(q)).max()))
    assert curvature <= loss.smoothness * (1 + 1e-9)
    assert curvature >= loss.smoothness * (1 - 1e-5)
    if math.isfinite(loss.slope_bound):
        assert slope <= loss.slope_bound * (1 + 1e-9)
        assert slope >= loss.slope_bound * (1 - 1e-5)
    else:
        assert slope > 1e3
    decay = np.exp(np.asarray(jax.jit(lambda q: loss.log_slope(q) - loss.log_value(q))(q)).max())
    assert 1 - 1e-5 <= float(decay) / loss.decay_bound <= 1 + 1e-9


def test_unbounded_slopes_and_curvatures_are_reported_as_infinite():
    assert Exponential().slope_bound == Exponential().smoothness == math.inf
    assert PolynomialTail(2.5).smoothness == PolynomialTail(1.5).slope_bound == math.inf


def test_polynomial_tail_of_power_one_is_the_algebraic_function():
    q = np.linspace(-3.0, 3.0, 13)
    expected = (np.sqrt(q**2 + 4) - q) / 2
    np.testing.assert_allclose(np.exp(PolynomialTail().log_value(q)), expected, rtol=1e-14)


def test_tails_are_what_the_flag_says():
    q = np.float64(1e3)
    for loss in (Exponential(), Logistic()):
        assert loss.exponential_tail
        assert float(jax.jit(loss.log_value)(q)) == -q
    polynomial = PolynomialTail(3.0)
    assert not polynomial.exponential_tail
    assert float(jax.jit(polynomial.log_value)(q)) == pytest.approx(-3 * math.log(q), rel=1e-6)


def test_integers_and_single_precision_are_taken_as_they_are():
    loss = Logistic()
    assert loss.log_slope(2).dtype == jnp.float64
    q = np.array([-3.0, 0.0, 50.0])
    single = jax.jit(loss.log_value)(q.astype(np.float32))
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, jax.jit(loss.log_value)(q), rtol=1e-6)
    slope = jax.jit(PolynomialTail(1.5).log_slope)
    assert slope(q.astype(np.float32)).dtype == jnp.float32


@pytest.mark.parametrize("power", [0.99, 0.0, -1.0, math.inf, math.nan])
def test_a_power_below_one_is_refused(power):
    with pytest.raises(ValueError, match=r"`power` is .*; expected a finite number of at least 1"):
        PolynomialTail(power)


def test_losses_of_one_kind_are_one_static_value():
    assert PolynomialTail(2) == PolynomialTail(2.0) != PolynomialTail(3.0)
    assert hash(Logistic()) == hash(Logistic())
    assert jax.tree.leaves(PolynomialTail(2.0)) == []
