"""The closed forms, against mpmath at 30 digits and against the layers integrated by SciPy.

Each reference is another expression of the same flow: special functions where gflow.exact has a
quadrature, Lambert's W where it has the Wright omega function, the published matrix formula where
it has a shifted one. Numbers written out are from those formulas at 30 digits.
"""

import mpmath as mp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

import gflow
from gflow.analysis import exact

EXPONENTIAL, LOGISTIC = gflow.Exponential(), gflow.Logistic()
LOSSES = pytest.mark.parametrize("loss", [EXPONENTIAL, LOGISTIC], ids=["exponential", "logistic"])
# Relative to max(1, |value|): a few roundings of a logarithm. Measured: 13 to 16 digits.
ROUND_OFF = 1e-13
# Of the independent integration of all layers at rtol 1e-12.
INTEGRATION = 1e-9


@pytest.fixture(autouse=True)
def thirty_digits():
    with mp.workdps(30):
        yield


def assert_close(value, reference, tolerance=ROUND_OFF):
    value = np.asarray(value, dtype=np.float64)
    reference = np.asarray(reference, dtype=object)
    assert value.shape == reference.shape
    for got, wanted in zip(value.ravel(), reference.ravel(), strict=True):
        assert abs(mp.mpf(float(got)) - wanted) <= tolerance * max(1, abs(wanted))


def bisect(function, target, high):
    """The root of an increasing function on (0, high), to all digits of mpmath."""
    low, high = mp.mpf(0), mp.mpf(high)
    for _ in range(2 * mp.mp.prec):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < target else (low, middle)
    return middle


def mp_log_risk(q, loss):
    return -q if loss is EXPONENTIAL else mp.log(mp.log1p(mp.exp(-q)))


# ---------------------------------------------------------------------------------------------
# One layer
# ---------------------------------------------------------------------------------------------

DATUM, START = [0.3, 0.4], [1.0, -3.0]
LOG_TIMES = [-30.0, -3.0, 0.0, 3.0, 30.0, 600.0, 1e3, 1e6]


@LOSSES
def test_one_datum_linear_solves_its_implicit_equation(loss):
    flow = exact.one_datum_linear(DATUM, START, log_time=np.array(LOG_TIMES), loss=loss)
    z2 = mp.mpf(DATUM[0]) ** 2 + mp.mpf(DATUM[1]) ** 2
    q0 = mp.mpf(DATUM[0]) - 3 * mp.mpf(DATUM[1])
    risks, vectors = [], []
    for log_time in LOG_TIMES:
        c = z2 * mp.exp(log_time) + mp.exp(q0)
        if loss is EXPONENTIAL:
            q = mp.log(c)
        elif log_time < 600:
            q = mp.log(mp.lambertw(mp.exp(c + q0))) if c < 1e3 else mp.log(c + q0 - mp.log(c))
            q = mp.findroot(lambda x, c=c: x + mp.exp(x) - c - q0, q)
        else:
            q = mp.log(c)
        risks.append(mp_log_risk(q, loss))
        vectors.append([w + z * (q - q0) / z2 for w, z in zip(START, DATUM, strict=True)])
    assert_close(flow.log_risk, risks)
    assert_close(flow.end_to_end, vectors)


@LOSSES
def test_time_and_risk_are_inverse_to_each_other(loss):
    log_risk = np.array([[-1.0, -10.0, -100.0], [-1e3, -1e6, -1e100]])
    for flow in (
        lambda **at: exact.one_datum_linear(DATUM, START, loss=loss, **at),
        lambda **at: exact.one_datum_balanced(DATUM, 1e-3, 4, loss=loss, **at),
        lambda **at: exact.two_layer_one_datum(DATUM, (0.3, -0.5), loss=loss, **at),
        lambda **at: exact.one_datum_diagonal(DATUM, scale=0.1, depth=3, loss=loss, **at),
        lambda **at: exact.one_datum_convolution(DATUM, DATUM, loss=loss, **at),
        lambda **at: exact.two_point_linear([0.8, 0.5], [3, 1], [0.3, -0.4], **at),
    ):
        there = flow(log_risk=log_risk)
        back = flow(log_time=there.log_time)
        # Digits are lost where time barely moves while the risk falls, off a plateau.
        np.testing.assert_allclose(back.log_risk, log_risk, rtol=1e-10)
        assert there.end_to_end.shape == (2, 3, 2)
        np.testing.assert_allclose(back.end_to_end, there.end_to_end, rtol=1e-10)
        assert np.all(np.diff(there.log_time.ravel()) > 0.0)


@pytest.mark.parametrize("counts", [(3, 1), (1, 1), (2, 5)])
@pytest.mark.parametrize("datum", [(0.8, 0.5), (0.3, 0.9), (0.9, 0.1)])
def test_two_point_linear_is_the_hypergeometric_function(datum, counts):
    a, b = (mp.mpf(x) for x in datum)
    m1, m2 = (mp.mpf(x) for x in counts)
    start = [mp.mpf(0.3), mp.mpf(-0.4)]
    rho, kappa, centre = b**2 / a**2, 2 * mp.sqrt(m1 * m2) / (m1 + m2), mp.log(m1 / m2) / (2 * b)
    s0 = mp.sinh(b * (start[1] - centre))

    def antiderivative(x):
        return x * mp.hyp2f1(0.5, -1 / (2 * rho), 1 - 1 / (2 * rho), -(s0**2) * x ** (-2 * rho))

    log_times, risks, vectors = [], [], []
    for sigma in (mp.mpf("0.25"), mp.mpf(3), mp.mpf(40), mp.mpf(1000)):
        time = (
            mp.exp(a * start[0])
            / (a**2 * kappa)
            * (antiderivative(mp.exp(sigma)) - antiderivative(mp.mpf(1)))
        )
        w = [start[0] + sigma / a, centre + mp.asinh(s0 * mp.exp(-rho * sigma)) / b]
        log_times.append(float(mp.log(time)))
        risks.append(mp.log(kappa) - a * w[0] + mp.log(mp.cosh(b * (w[1] - centre))))
        vectors.append(w)
    flow = exact.two_point_linear(datum, counts, [0.3, -0.4], log_time=np.array(log_times))
    assert_close(flow.log_risk, risks)
    assert_close(flow.end_to_end, vectors)
    again = exact.two_point_linear(datum, counts, [0.3, -0.4], log_risk=flow.log_risk)
    assert_close(again.log_time, [mp.mpf(t) for t in log_times])


def test_two_point_linear_has_no_poles():
    # The hypergeometric form is singular at a^2 / b^2 = 2; there is an elementary one instead.
    a, b, start = mp.sqrt(2), mp.mpf(1), mp.mpf("-0.5")
    s0 = mp.sinh(b * start)

    def antiderivative(x):
        return mp.sqrt(x * (x + s0**2)) - s0**2 * mp.asinh(mp.sqrt(x) / abs(s0))

    time = (antiderivative(mp.exp(5)) - antiderivative(mp.mpf(1))) / a**2
    flow = exact.two_point_linear(
        [np.sqrt(2.0), 1.0], [1, 1], [0.0, -0.5], log_time=float(mp.log(time))
    )
    assert_close(flow.end_to_end[0], 5 / a)


def test_two_point_linear_reaches_the_times_of_the_theory():
    flow = exact.two_point_linear(
        [0.8, 0.5], [3, 1], [0.3, -0.4], log_time=np.log(10.0) * np.array([np.log10(20.0), 32, 430])
    )
    # From the closed form at 30 digits.
    np.testing.assert_allclose(
        flow.end_to_end[0], [3.249748297056030198094684, 0.4561896955951622385846284], rtol=1e-15
    )
    # The residual of the direction of maximum margin: (log(a^2 kappa)/a, log(m1/m2)/(2b)).
    residual = flow.end_to_end[1:] - flow.log_time[1:, None] * [1 / 0.8, 0.0]
    kappa = np.sqrt(3.0) / 2
    np.testing.assert_allclose(
        residual, [[np.log(0.64 * kappa) / 0.8, np.log(3.0)]] * 2, rtol=1e-12
    )


# ---------------------------------------------------------------------------------------------
# Deep, one datum
# ---------------------------------------------------------------------------------------------


@LOSSES
@pytest.mark.parametrize("depth", [1, 2, 3, 8])
@pytest.mark.parametrize("start", [0.5, 1e-12])
def test_one_datum_balanced_is_the_confluent_hypergeometric_function(depth, start, loss):
    log_risk = np.array([-2.0, -10.0, -100.0, -1000.0])
    flow = exact.one_datum_balanced([0.0, 0.9], start, depth, log_risk=log_risk, loss=loss)
    a, p0 = mp.mpf(0.9), mp.mpf(start)
    s = mp.mpf(2) / depth - 1

    def antiderivative(x):
        value = mp.ei(a * x) if depth == 2 else x**s / s * mp.hyp1f1(s, s + 1, a * x)
        power = mp.log(x) if depth == 2 else x**s / s
        return value + (power if loss is LOGISTIC else 0)

    times, vectors = [], []
    with mp.workdps(60):  # the difference below loses up to 25 digits
        for value in log_risk:
            risk = mp.exp(mp.mpf(float(value)))
            q = -mp.log(mp.expm1(risk)) if loss is LOGISTIC else -mp.mpf(float(value))
            times.append(mp.log((antiderivative(q / a) - antiderivative(p0)) / (depth * a)))
            vectors.append([mp.mpf(0), q / a])
    assert_close(flow.log_time, times)
    assert_close(flow.end_to_end, vectors)


# p(10) from p(0) = 0.5 at a = 0.9, exponential loss, from the closed form at 30 digits.
@pytest.mark.parametrize(
    ("depth", "reference"),
    [
        (1, 2.5209486143519313029),
        (2, 4.3306240884508751863),
        (3, 5.6210007444895346331),
        (4, 6.5015212476832204929),
        (8, 8.33582593384359019),
    ],
)
def test_one_datum_balanced_gives_the_reference_numbers(depth, reference):
    flow = exact.one_datum_balanced([0.9], 0.5, depth, log_time=np.log(10.0))
    np.testing.assert_allclose(flow.end_to_end, [reference], rtol=1e-15)


def test_one_datum_balanced_follows_its_asymptotic_series_where_time_overflows():
    # t = e^q p^{-2+2/L} / (L a^2) sum_j (2 - 2/L)_j / q^j, exact to round-off from q = 1e3 on.
    log_risk = np.array([-1e3, -1e6, -1e12, -1e300])
    flow = exact.one_datum_balanced([0.9], 1e-6, 4, log_risk=log_risk)
    for q, log_time in zip(-log_risk, flow.log_time, strict=True):
        series, term = mp.mpf(0), mp.mpf(1)
        for j in range(20):
            series += term
            term *= (mp.mpf("1.5") + j) / mp.mpf(q)
        p = mp.mpf(q) / mp.mpf(0.9)
        reference = mp.mpf(q) - mp.mpf("1.5") * mp.log(p) - mp.log(4 * mp.mpf(0.9) ** 2)
        assert_close(log_time, reference + mp.log(series))


def test_plateau_has_the_length_of_the_theory():
    # p0^{-(1 - 2/L)} / ((L - 2) a), the blow-up time at unit slope.
    flow = exact.one_datum_balanced([0.5], 1e-16, 4, log_risk=-1.0)
    np.testing.assert_allclose(flow.log_time, np.log(1e8), atol=1e-7)


@LOSSES
@pytest.mark.parametrize("layers", [(1.0, 0.0), (0.2, -0.7), (0.5, 0.5 + 1e-9)])
def test_two_layer_one_datum_is_the_integral_over_its_hyperbola(layers, loss):
    flow = exact.two_layer_one_datum(
        [0.9], layers, log_risk=np.array([-2.0, -30.0, -1000.0]), loss=loss
    )
    a, (u, v) = mp.mpf(0.9), (mp.mpf(x) for x in layers)
    delta = u**2 - v**2
    for log_risk, log_time in zip(flow.log_risk, flow.log_time, strict=True):
        risk = mp.exp(mp.mpf(float(log_risk)))
        q = -mp.log(mp.expm1(risk)) if loss is LOGISTIC else -mp.mpf(float(log_risk))
        constant = 1 if loss is LOGISTIC else 0
        steps = [x for x in (0, 1, 3, 10, q / a - 100, q / a - 10, q / a - 3) if u * v < x < q / a]
        time = mp.quad(
            lambda x: (mp.exp(a * x) + constant) / (a * mp.sqrt(delta**2 + 4 * x**2)),  # noqa: B023
            sorted({u * v, *steps, q / a}),
        )
        assert_close(log_time, mp.log(time))


def test_two_layer_one_datum_tends_to_the_balanced_form():
    at = {"log_risk": np.array([-3.0, -50.0])}
    balanced = exact.two_layer_one_datum([1.0], (0.5, 0.5), **at)
    nearly = exact.two_layer_one_datum([1.0], (0.5 + 1e-15, 0.5), **at)
    np.testing.assert_allclose(nearly.log_time, balanced.log_time, rtol=1e-13)


# ---------------------------------------------------------------------------------------------
# Diagonal and convolutional
# ---------------------------------------------------------------------------------------------

Z = np.array([1.0, -0.9, 0.3])


def test_direction_of_a_diagonal_network_turns_as_slowly_as_the_theory_says():
    # |w_1| / ||w||_1 at log R = -10, -100, -1e4, -1e6; 0.455 is the kernel regime, 1 the limit.
    for scale, shares in (
        (1.0, [0.493, 0.584, 0.708, 0.796]),
        (1e-2, [0.755, 0.796, 0.862, 0.908]),
        (1e-6, [0.952, 0.962, 0.975, 0.984]),
    ):
        flow = exact.one_datum_diagonal(
            Z, scale=scale, log_risk=np.array([-10.0, -100.0, -1e4, -1e6])
        )
        w = np.abs(flow.end_to_end)
        np.testing.assert_allclose(w[:, 0] / w.sum(axis=1), shares, atol=5.001e-4)


@LOSSES
@pytest.mark.parametrize(("depth", "scale"), [(2, 0.7), (3, 0.4), (5, 1.1)])
def test_one_datum_diagonal_is_the_potential_at_the_integrated_slope(depth, scale, loss):
    flow = exact.one_datum_diagonal(
        Z, scale=scale, depth=depth, log_risk=np.array([-2.0, -100.0]), loss=loss
    )
    alpha, z = mp.mpf(scale), [mp.mpf(float(x)) for x in Z]
    bound = mp.inf if depth == 2 else 1 / (alpha ** (depth - 2) * depth * (depth - 2))

    def weights(s):
        if depth == 2:
            return [2 * alpha**2 * mp.sinh(4 * x * s) for x in z]
        power = -mp.mpf(depth) / (depth - 2)
        parts = [(x * s / bound) for x in z]
        return [alpha**depth * ((1 - x) ** power - (1 + x) ** power) for x in parts]

    def margin(s):
        return mp.fdot(z, weights(s))

    for log_time, log_risk, w in zip(*flow, strict=True):
        risk = mp.exp(mp.mpf(float(log_risk)))
        q = -mp.log(mp.expm1(risk)) if loss is LOGISTIC else -mp.mpf(float(log_risk))
        s = bisect(margin, q, mp.log(q / alpha**2 + 10) if depth == 2 else bound)
        assert_close(w, weights(s))
        constant = 1 if loss is LOGISTIC else 0
        # The integrand grows like e^margin: the last part in fine pieces, to 20 digits.
        cuts = [s * (1 - mp.mpf(4) ** -j) for j in range(7)]
        with mp.workdps(20):
            time = mp.quad(lambda x: constant + mp.exp(margin(x)), [*cuts, s])  # noqa: B023
        assert_close(log_time, mp.log(time))


def integrate(rate, layers, time):
    """All layers by SciPy, from `layers` for `time`."""
    result = solve_ivp(
        lambda t, y: rate(y), (0.0, time), layers, method="DOP853", rtol=1e-12, atol=1e-14
    )
    return result.y[:, -1]


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_diagonal_layers_integrated_in_time_arrive_at_the_closed_form(depth):
    scale, time = 0.8, 7.0

    def rate(y):
        up, down, slope = y[:3], y[3:6], np.exp(-Z @ (y[:3] ** depth - y[3:6] ** depth))
        step = depth * slope * Z
        return np.concatenate([step * up ** (depth - 1), -step * down ** (depth - 1), [slope]])

    end = integrate(rate, np.array([scale] * 6 + [0.0]), time)
    w = end[:3] ** depth - end[3:6] ** depth
    flow = exact.one_datum_diagonal(Z, scale=scale, depth=depth, log_time=np.log(time))
    np.testing.assert_allclose(flow.end_to_end, w, rtol=INTEGRATION)
    np.testing.assert_allclose(
        exact.diagonal_network(end[6] * Z, scale=scale, depth=depth), w, rtol=INTEGRATION
    )


@LOSSES
def test_convolutional_layers_integrated_in_time_arrive_at_the_closed_form(loss):
    rng = np.random.default_rng(0)
    z, time = rng.normal(size=5), 3.0
    modes = np.fft.fft(z)
    sizes = np.array([0.3, 0.5, 0.2, 0.2, 0.5])  # of the modes of both layers; real vectors
    first = np.fft.ifft(sizes).real
    second = np.fft.ifft(sizes * modes / np.abs(modes)).real

    def end_to_end(y):
        return np.fft.ifft(np.fft.fft(y[:5]) * np.fft.fft(y[5:])).real

    def rate(y):
        q = z @ end_to_end(y)
        slope = np.exp(-q) if loss is EXPONENTIAL else 1 / (1 + np.exp(q))
        parts = [modes * np.conj(np.fft.fft(half)) for half in (y[5:], y[:5])]
        return slope * np.concatenate([np.fft.ifft(part).real for part in parts])

    layers = np.concatenate([first, second])
    flow = exact.one_datum_convolution(z, end_to_end(layers), log_time=np.log(time), loss=loss)
    np.testing.assert_allclose(
        flow.end_to_end, end_to_end(integrate(rate, layers, time)), rtol=INTEGRATION
    )


def test_convolution_reaches_its_limit_in_the_fourier_domain():
    z = np.array([1.0, 0.5, 0.2, -0.3])
    flow = exact.one_datum_convolution(z, z, log_risk=np.array([-10.0, -1e3, -1e300]))
    np.testing.assert_allclose(flow.end_to_end @ z, [10.0, 1e3, 1e300], rtol=1e-12)
    sizes = [abs(mp.mpc(mode)) for mode in np.fft.fft(z)]
    s = bisect(lambda s: mp.fsum(c**2 / 4 * mp.exp(2 * c * s) for c in sizes), 1000, 10)
    assert_close(np.abs(np.fft.fft(flow.end_to_end[1])), [m * mp.exp(2 * m * s) for m in sizes])


# ---------------------------------------------------------------------------------------------
# Square loss
# ---------------------------------------------------------------------------------------------


# u(2) from u(0) = 0.05 at s = 1.7, from the closed form at 30 digits.
@pytest.mark.parametrize(
    ("depth", "reference"),
    [
        (1, 1.4766967826595890584),
        (2, 1.6397323271999500947),
        (3, 1.6869370446385968892),
        (4, 1.6984982893941209995),
        (5, 1.699909769490427834),
    ],
)
def test_square_loss_mode_gives_the_reference_numbers(depth, reference):
    flow = exact.square_loss_mode(2.0, target=1.7, start=0.05, depth=depth)
    np.testing.assert_allclose(flow.end_to_end, reference, rtol=1e-15)


@pytest.mark.parametrize("depth", [1, 2, 3, 7])
@pytest.mark.parametrize("start", [1e-6, 0.05, 2.5])
def test_square_loss_mode_is_the_hypergeometric_function(depth, start):
    s, u0, k = mp.mpf(1.7), mp.mpf(start), 2 - mp.mpf(2) / depth
    times, risks, strengths = [], [], []
    with mp.workdps(80):

        def antiderivative(x):
            if depth == 2:
                return mp.log(x / abs(s - x)) / s
            tail = mp.re(mp.hyp2f1(1, 1 - k, 2 - k, x / s))
            return x ** (1 - k) / (s * (1 - k)) * tail

        for distance in (mp.mpf("0.25"), mp.mpf("1e-5"), mp.mpf("1e-50")):
            u = s - distance if u0 < s else s + distance
            times.append(float((antiderivative(u) - antiderivative(u0)) / depth))
            risks.append(2 * mp.log(distance) - mp.log(2))
            strengths.append(u)
    flow = exact.square_loss_mode(np.array(times), target=1.7, start=start, depth=depth)
    # The times are rounded, and time is multiplied by the rate: 1e-16 of it is up to 1e-12 here.
    loss_of_digits = 4 * depth * 1.7**k * np.array(times)
    for got, wanted, lost in zip(flow.log_risk, risks, loss_of_digits, strict=True):
        assert_close(got, wanted, 1e-15 * max(100.0, float(lost)))
    plateau = start < 1e-3 and depth > 2  # time says little about the place on it
    assert_close(flow.end_to_end, strengths, 1e-9 if plateau else ROUND_OFF)


def test_square_loss_mode_keeps_its_digits_below_float64():
    # Depth 2 is the sigmoid: s - u = s (s - u0) / (u0 (e^{2st} - 1) + s).
    times = np.array([0.0, 1.0, 1e3, 1e6])
    for flow in (
        exact.square_loss_mode(times, target=1.7, start=0.05, depth=2),
        exact.two_layer_square_loss(times, target=-1.7, start=(np.sqrt(0.05), -np.sqrt(0.05))),
    ):
        s, u0 = mp.mpf(1.7), mp.mpf(0.05)
        residuals = [s * (s - u0) / (u0 * mp.expm1(2 * s * mp.mpf(float(t))) + s) for t in times]
        assert_close(flow.log_risk, [2 * mp.log(r) - mp.log(2) for r in residuals])
        assert_close(np.abs(flow.end_to_end), [s - r for r in residuals])


@pytest.mark.parametrize("layers", [(0.9, 0.1), (0.1, 0.9), (1.5, 0.0), (0.3, -1.2), (-2.0, -1.4)])
def test_two_layer_square_loss_is_the_published_form(layers):
    # x = (u + v)^2 / delta = (x+ - x- C) / (1 - C), p = (delta / 4)(x - 1/x).
    times = np.array([0.0, 0.3, 2.0, 20.0])
    flow = exact.two_layer_square_loss(times, target=1.3, start=layers)
    s, (u, v) = mp.mpf(1.3), (mp.mpf(x) for x in layers)
    if abs(v) > abs(u):
        u, v = v, u
    delta, risks, products = u**2 - v**2, [], []
    with mp.workdps(80):
        speed = mp.sqrt(4 * s**2 + delta**2)
        plus, minus = (2 * s + speed) / delta, (2 * s - speed) / delta
        for t in times:
            x0 = (u + v) ** 2 / delta
            c = (x0 - plus) / (x0 - minus) * mp.exp(-speed * mp.mpf(float(t)))
            x = (plus - minus * c) / (1 - c)
            products.append(delta / 4 * (x - 1 / x))
            risks.append(2 * mp.log(abs(s - products[-1])) - mp.log(2))
    assert_close(flow.log_risk, risks)
    assert_close(flow.end_to_end, products)


@pytest.mark.parametrize("level", [0.0, 0.7, -0.4])
@pytest.mark.parametrize("shape", [(2, 3), (3, 2)])
def test_two_layer_riccati_is_the_published_matrix_formula(level, shape):
    outputs, inputs = shape
    rng = np.random.default_rng(1)
    target = rng.normal(size=shape)
    # W2^T W2 = W1 W1^T + lambda I; for a negative lambda the layers change roles.
    wide, thin = (outputs, inputs) if level >= 0 else (inputs, outputs)
    small = 0.3 * rng.normal(size=(2, thin))
    values, vectors = np.linalg.eigh(small @ small.T + abs(level) * np.eye(2))
    frame = np.linalg.qr(rng.normal(size=(wide, 2)))[0]
    large = frame @ (vectors * np.sqrt(values)) @ vectors.T
    weights = (small, large) if level >= 0 else (large.T, small.T)
    times = np.array([0.0, 0.4, 3.0, 60.0])
    flow = exact.two_layer_riccati(times, target=target, weights=weights)

    with mp.workdps(200):
        sigma, (first, second) = mp.matrix(target), (mp.matrix(x) for x in weights)
        size = inputs + outputs
        # The published form needs an invertible F; a shift far below round-off makes it so.
        field = mp.eye(size) * mp.mpf(10) ** -60
        start = mp.zeros(size, 2)
        for i in range(size):
            field[i, i] += (1 if i >= inputs else -1) * mp.mpf(level) / 2
            for j in range(2):
                start[i, j] = first[j, i] if i < inputs else second[i - inputs, j]
        for i in range(outputs):
            for j in range(inputs):
                field[inputs + i, j] = field[j, inputs + i] = sigma[i, j]
        inverse = field**-1
        for index, t in enumerate(times):
            grown = mp.expm(field * mp.mpf(float(t)))
            bracket = start.T * (grown * inverse * grown - inverse) * start
            gram = grown * start * (mp.eye(2) + bracket / 2) ** -1 * start.T * grown
            product = gram[inputs:size, 0:inputs]
            assert_close(flow.end_to_end[index], product.tolist(), 1e-13)
            distance = mp.norm(sigma - product)
            # The last digits of a distance depend on those of the singular values times t.
            assert_close(flow.log_risk[index], 2 * mp.log(distance) - mp.log(2), 1e-12)


def test_two_layer_riccati_agrees_with_the_scalar_form():
    times = np.array([0.0, 1.0, 10.0, 1000.0])
    layers = (0.7, 0.2)
    scalar = exact.two_layer_square_loss(times, target=1.1, start=layers)
    matrix = exact.two_layer_riccati(
        times,
        target=np.array([[1.1]]),
        weights=(np.array([[layers[1]]]), np.array([[layers[0]]])),
    )
    np.testing.assert_allclose(matrix.log_risk, scalar.log_risk, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(matrix.end_to_end[:, 0, 0], scalar.end_to_end, rtol=1e-13)


def test_two_layer_riccati_crosses_a_long_plateau():
    tiny = 1e-6
    flow = exact.two_layer_riccati(
        np.array([0.0, 1.0, 6.0, 14.0, 40.0]),
        target=np.diag([3.0, 1.0]),
        weights=(tiny * np.eye(2), tiny * np.eye(2)),
    )
    for j, target in enumerate((3.0, 1.0)):
        mode = exact.square_loss_mode(flow.time, target=target, start=tiny**2, depth=2)
        np.testing.assert_allclose(flow.end_to_end[:, j, j], mode.end_to_end, rtol=1e-9, atol=1e-15)


def test_two_layer_riccati_takes_targets_of_low_rank():
    # A mode with nothing to learn obeys dp/dt = -2 p^2: it is 1 / (2t + 1) from p = 1.
    flow = exact.two_layer_riccati(
        np.array([0.0, 10.0]), target=np.zeros((2, 2)), weights=(np.eye(2), np.eye(2))
    )
    np.testing.assert_allclose(flow.end_to_end[1], np.eye(2) / 21.0, atol=1e-16)
    rank_one = exact.two_layer_riccati(
        np.array([0.0, 1e4]), target=np.ones((2, 2)), weights=(np.eye(2), np.eye(2))
    )
    np.testing.assert_allclose(rank_one.log_risk[1], 2 * np.log(1 / 20001) - np.log(2), rtol=1e-13)


@LOSSES
@pytest.mark.parametrize(
    "flow",
    [
        lambda **at: exact.one_datum_linear([1e-3, 2.0], [5.0, -400.0], **at),
        lambda **at: exact.one_datum_balanced([1.0], 1e-300, 2, **at),
        lambda **at: exact.one_datum_balanced([1.0], 1e-12, 32, **at),
        lambda **at: exact.two_layer_one_datum([1.0], (1e-8, -3.0), **at),
        lambda **at: exact.two_layer_one_datum([1.0], (0.0, 1e-150), **at),
        lambda **at: exact.one_datum_diagonal([1.0, -2.0, 0.0], scale=1e-8, **at),
        lambda **at: exact.one_datum_diagonal([1.0, -2.0], scale=1e-3, depth=8, **at),
        lambda **at: exact.one_datum_diagonal([1.0, -2.0], scale=1e3, depth=3, **at),
        lambda **at: exact.one_datum_convolution([1.0, -2.0], [1e-8, -2e-8], **at),
    ],
)
def test_extreme_starts_and_times_stay_finite_and_descend(flow, loss):
    log_time = np.array([-np.inf, -700.0, -1.0, 10.0, 800.0, 1e10, 1e300])
    log_time, log_risk, end_to_end = flow(log_time=log_time, loss=loss)
    assert np.all(np.isfinite(log_risk)) and np.all(np.isfinite(end_to_end))
    assert np.all(np.diff(log_risk) <= 1e-15 * np.abs(log_risk[1:]))
    np.testing.assert_allclose(log_risk[-2:], -log_time[-2:], rtol=1e-7)


def test_risk_clock_is_one_to_one_with_the_log_risk():
    np.testing.assert_array_equal(exact.risk_clock(np.array([0.0, 1e6]), -0.5), [-0.5, -1000000.5])


# ---------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: exact.one_datum_linear([0.0], [1.0], log_time=0.0), "`datum` is zero"),
        (lambda: exact.one_datum_linear([1.0], [1.0, 2.0], log_time=0.0), "`start` has shape"),
        (lambda: exact.one_datum_linear([1.0], [np.nan], log_time=0.0), "`start` must be finite"),
        (lambda: exact.one_datum_linear([1.0], [1.0]), "exactly one of"),
        (
            lambda: exact.one_datum_linear([1.0], [1.0], log_time=0.0, log_risk=-2.0),
            "exactly one of",
        ),
        (lambda: exact.one_datum_linear([1.0], [1.0], log_risk=-0.5), "only descends"),
        (lambda: exact.one_datum_linear([1.0], [1.0], log_risk=-np.inf), "must be finite"),
        (lambda: exact.one_datum_linear([1.0], [1.0], log_time=np.nan), "must be finite"),
        (
            lambda: exact.one_datum_linear([1.0], [1.0], log_time=0.0, loss=gflow.PolynomialTail()),
            "closed forms exist for",
        ),
        (
            lambda: exact.one_datum_balanced([1.0], 0.0, 2, log_time=0.0),
            "`start` is 0.0; expected a positive",
        ),
        (lambda: exact.one_datum_balanced([1.0], 1.0, 0, log_time=0.0), "`depth` must be a whole"),
        (lambda: exact.two_layer_one_datum([1.0], (1.0, -1.0), log_time=0.0), "saddle"),
        (
            lambda: exact.one_datum_diagonal([1.0], scale=-1.0, log_time=0.0),
            "`scale` is -1.0; expected a positive",
        ),
        (lambda: exact.one_datum_diagonal([1.0], scale=1.0, depth=1, log_time=0.0), "`depth`"),
        (
            lambda: exact.diagonal_network(np.array([2.0]), scale=1.0, depth=3),
            "infinite weights at 0.333",
        ),
        (lambda: exact.one_datum_convolution([1.0, 0.5], [-1.0, 0.5], log_time=0.0), "phase"),
        (lambda: exact.two_point_linear([1.0, 0.0], [1, 1], [0.0, 0.0], log_time=0.0), "datum"),
        (lambda: exact.square_loss_mode(-1.0, target=1.0, start=0.1, depth=2), "at least zero"),
        (lambda: exact.square_loss_mode(1.0, target=-1.0, start=0.1, depth=2), "`target`"),
        (lambda: exact.two_layer_square_loss(1.0, target=1.0, start=(1.0, -1.0)), "saddle"),
        (
            lambda: exact.two_layer_riccati(
                1.0, target=np.eye(2), weights=(np.eye(2), np.diag([1.0, 2.0]))
            ),
            "not balanced",
        ),
        (
            lambda: exact.two_layer_riccati(1.0, target=np.eye(2), weights=(np.eye(2), -np.eye(2))),
            "saddle",
        ),
        (
            lambda: exact.two_layer_riccati(
                1.0, target=np.eye(2), weights=(np.ones((1, 2)), np.ones((3, 1)))
            ),
            "expected .hidden, 2. and .2, hidden.",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input_says_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()
