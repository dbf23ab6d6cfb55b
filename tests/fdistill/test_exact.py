"""The gradient theorem against quadrature, closed forms, sampling; and what the divergences do to a student."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from poise.fdistill import (
    DIVERGENCES,
    GaussianMixture,
    divergence,
    exact_divergence,
    exact_gradient,
    from_function,
    surrogate_loss,
    weight_moments,
)


@pytest.mark.golden
@pytest.mark.golden_pattern("fdistill", "fdiv_theorem_1d*.npz")
def test_theorem(golden_file):
    data = np.load(golden_file)
    with jax.enable_x64():
        teacher, student = (
            GaussianMixture(
                jnp.asarray(data[f"{who}_w"]), jnp.asarray(data[f"{who}_mu"])[:, None], jnp.asarray(data[f"{who}_std"])
            )
            for who in ("teacher", "student")
        )
        for row, name in enumerate(data["names"]):
            div = divergence(str(name))

            @jax.jit
            def everything(sigma, div=div):
                value, by_quadrature = jax.value_and_grad(
                    lambda student: exact_divergence(div, teacher, student, sigma)
                )(student)
                return (
                    value,
                    exact_gradient(div, teacher, student, sigma),
                    jnp.concatenate([by_quadrature.means[:, 0], by_quadrature.covs]),
                    weight_moments(div, teacher, student, sigma),
                )

            for column, sigma in enumerate(data["sigma"]):
                value, gradient, by_quadrature, moments = everything(sigma)
                gradient = jnp.concatenate(gradient)
                np.testing.assert_allclose(value, data["divergence"][row, column], rtol=1e-7, atol=1e-13)
                np.testing.assert_allclose(gradient, data["grad"][row, column], rtol=1e-6, atol=1e-12)
                np.testing.assert_allclose(by_quadrature, gradient, rtol=1e-8, atol=1e-13)  # the theorem
                np.testing.assert_allclose(gradient, data["grad_finite_diff"][row, column], rtol=1e-6, atol=1e-9)
                np.testing.assert_allclose(moments.mean, data["mean_h"][row, column], rtol=1e-7)
                np.testing.assert_allclose(moments.variance, data["var_h"][row, column], rtol=1e-7, atol=1e-9)


def _gaussian(mean, std, dtype=jnp.float64):
    return GaussianMixture(jnp.ones(1, dtype), jnp.array([[mean]], dtype), jnp.array([std], dtype))


def _two_modes(dtype=jnp.float64):
    return GaussianMixture(
        jnp.array([0.5, 0.5], dtype), jnp.array([[-2.0], [2.0]], dtype), jnp.array([0.5, 0.5], dtype)
    )


def test_theorem_with_a_student_of_several_components():
    with jax.enable_x64():
        teacher = GaussianMixture(jnp.array([0.3, 0.7]), jnp.array([[-1.0], [1.5]]), jnp.array([0.6, 0.9]))
        student = GaussianMixture(jnp.array([0.6, 0.4]), jnp.array([[-0.5], [1.0]]), jnp.array([0.8, 0.7]))
        for name in ["jensen_shannon", "pearson_chi2", "alpha(0.4)"]:
            div = divergence(name)
            both = jax.jit(
                lambda s, div=div: (
                    exact_gradient(div, teacher, s, 0.5),
                    jax.grad(lambda s: exact_divergence(div, teacher, s, 0.5))(s),
                )
            )
            theorem, brute = both(student)
            np.testing.assert_allclose(theorem.means, brute.means[:, 0], rtol=1e-8, err_msg=name)
            np.testing.assert_allclose(theorem.stds, brute.covs, rtol=1e-8, err_msg=name)


@pytest.mark.parametrize("name", ["reverse_kl", "jensen_shannon", "pearson_chi2", "triangular"])
def test_coincident_mixtures(name):
    with jax.enable_x64():
        div, gm = divergence(name), _two_modes()
        np.testing.assert_allclose(exact_divergence(div, gm, gm, 0.3), 0.0, atol=1e-12)
        np.testing.assert_allclose(jnp.concatenate(exact_gradient(div, gm, gm, 0.3)), 0.0, atol=1e-12)
        mean, variance = weight_moments(div, gm, gm, 0.3)
        np.testing.assert_allclose(mean, div.weight_at_one, rtol=1e-10)
        np.testing.assert_allclose(variance, 0.0, atol=1e-12)


def test_closed_forms_between_gaussians():
    with jax.enable_x64():
        p, q = _gaussian(0.7, 1.5), _gaussian(-0.2, 1.1)
        vp, vq, gap = 1.5**2, 1.1**2, 0.9
        forward = 0.5 * (math.log(vq / vp) + (vp + gap**2) / vq - 1)
        reverse = 0.5 * (math.log(vp / vq) + (vq + gap**2) / vp - 1)
        hellinger = 1 - math.sqrt(2 * 1.5 * 1.1 / (vp + vq)) * math.exp(-(gap**2) / (4 * (vp + vq)))
        pearson = (vq / math.sqrt(vp * (2 * vq - vp))) * math.exp(gap**2 / (2 * vq - vp)) - 1
        for name, value in [
            ("forward_kl", forward),
            ("reverse_kl", reverse),
            ("jeffreys", forward + reverse),
            ("squared_hellinger", hellinger),
            ("pearson_chi2", pearson),
        ]:
            np.testing.assert_allclose(exact_divergence(divergence(name), p, q), value, rtol=1e-10, err_msg=name)


@pytest.mark.parametrize(
    ("name", "teacher_std", "student_std", "finite"),
    [
        ("pearson_chi2", 1.40, 1.0, True),
        ("pearson_chi2", 1.42, 1.0, False),
        ("neyman_chi2", 1.0, 1.40, True),
        ("neyman_chi2", 1.0, 1.42, False),
        ("pearson_chi2", 1.0, 9.0, True),
        ("neyman_chi2", 9.0, 1.0, True),
        ("forward_kl", 9.0, 1.0, True),
        ("jensen_shannon", 9.0, 1.0, True),
        ("alpha(1.5)", 1.7, 1.0, True),
        ("alpha(1.5)", 1.75, 1.0, False),
    ],
)
def test_finiteness(name, teacher_std, student_std, finite):
    with jax.enable_x64():
        p, q = _gaussian(0.3, teacher_std), _gaussian(0.0, student_std)
        div = divergence(name)
        value, gradient = exact_divergence(div, p, q), jnp.concatenate(exact_gradient(div, p, q))
        assert math.isfinite(float(value)) == finite
        assert np.all(np.isfinite(gradient)) == finite
        assert not np.any(np.isnan(gradient))
        if finite:
            brute = jax.grad(lambda q: exact_divergence(div, p, q))(q)
            np.testing.assert_allclose(gradient, [brute.means[0, 0], brute.covs[0]], rtol=1e-8)
        if name == "pearson_chi2" and finite:  # nearly divergent integrals are still right
            vp, vq = teacher_std**2, student_std**2
            expected = (vq / math.sqrt(vp * (2 * vq - vp))) * math.exp(0.09 / (2 * vq - vp)) - 1
            np.testing.assert_allclose(value, expected, rtol=1e-9)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_far_apart_mixtures_give_no_nan(dtype):
    with jax.enable_x64(dtype == "float64"):
        p, q = _gaussian(50.0, 0.5, dtype), _gaussian(-50.0, 0.5, dtype)
        names = DIVERGENCES if dtype == "float32" else ("jensen_shannon", "pearson_chi2", "neyman_chi2")
        for name in names:
            div = divergence(name)
            value = exact_divergence(div, p, q)
            assert value.dtype == dtype
            assert not math.isnan(float(value)), name
            assert not np.any(np.isnan(jnp.concatenate(exact_gradient(div, p, q)))), name
            assert not np.any(np.isnan(jnp.stack(weight_moments(div, p, q)))), name
            if div.bounded:
                np.testing.assert_allclose(
                    value, {"jensen_shannon": 2 * math.log(2), "squared_hellinger": 1.0, "triangular": 2.0}[name],
                    rtol=1e-4,
                )  # fmt: skip


def test_forward_kl_is_stationary_exactly_at_moment_matching():
    with jax.enable_x64():
        teacher = GaussianMixture(jnp.array([0.3, 0.7]), jnp.array([[-2.0], [1.0]]), jnp.array([0.4, 0.8]))
        mean = 0.3 * -2.0 + 0.7
        variance = 0.3 * (0.16 + 4.0) + 0.7 * (0.64 + 1.0) - mean**2
        student = _gaussian(mean, math.sqrt(variance))
        for sigma in (0.0, 0.3, 1.0, 5.0):
            gradient = jnp.concatenate(exact_gradient(divergence("forward_kl"), teacher, student, sigma))
            np.testing.assert_allclose(gradient, 0.0, atol=1e-11)
        away = jnp.concatenate(exact_gradient(divergence("reverse_kl"), teacher, student, 0.3))
        assert np.max(np.abs(away)) > 1e-2


@pytest.mark.parametrize("gap", [0.5, 1.0, 2.0])
def test_normalised_variance_of_the_weights(gap):
    # the paper's Figure 4a: forward KL and Jeffreys explode with the gap, JS and Hellinger stay flat
    with jax.enable_x64():
        p, q = _gaussian(gap, 1.0), _gaussian(0.0, 1.0)

        def spread(name):
            mean, variance = weight_moments(divergence(name), p, q)
            return float(variance / mean**2)

        for name, value in [
            ("reverse_kl", 0.0),
            ("forward_kl", math.expm1(gap**2)),
            ("squared_hellinger", math.expm1(gap**2 / 4)),
            ("pearson_chi2", math.expm1(4 * gap**2)),
            ("neyman_chi2", math.expm1(gap**2)),
            ("jeffreys", math.expm1(gap**2) / 4),
        ]:
            np.testing.assert_allclose(spread(name), value, rtol=1e-8, atol=1e-12, err_msg=name)
        if gap == 2.0:
            for name, value in [("jensen_shannon", 1.2242), ("softened_reverse_kl", 0.10295), ("triangular", 1.5547)]:
                np.testing.assert_allclose(spread(name), value, rtol=5e-5)


def test_adding_a_multiple_of_r_minus_one_changes_no_gradient():
    with jax.enable_x64():
        teacher, student = _two_modes(), _gaussian(0.6, 1.7)
        shifted = from_function(lambda r: r * jnp.log(r) + 2.0 * (r - 1.0))
        plain = divergence("forward_kl")
        np.testing.assert_allclose(
            exact_divergence(shifted, teacher, student), exact_divergence(plain, teacher, student), rtol=1e-9
        )
        np.testing.assert_allclose(
            jnp.concatenate(exact_gradient(shifted, teacher, student)),
            jnp.concatenate(exact_gradient(plain, teacher, student)),
            rtol=1e-6,
        )


@pytest.mark.parametrize("name", ["jensen_shannon", "forward_kl"])
def test_sampled_gradient_with_exact_ratio_and_scores_is_the_exact_gradient_in_expectation(name):
    div, sigma, num = divergence(name), 0.7, 100_000
    teacher, student = _two_modes(jnp.float32), _gaussian(0.4, 1.3, jnp.float32)
    z, eps = jax.random.normal(jax.random.key(0), (2, num, 1))

    def per_sample(mean, std):
        x = mean + std * z
        xt = x + sigma * eps
        h = jnp.exp(div.log_weight(teacher.log_prob(xt, sigma) - student.log_prob(xt, sigma)))
        return x, h[:, None] * (student.denoise(xt, sigma) - teacher.denoise(xt, sigma)) / sigma**2

    grad = jax.jit(lambda: per_sample(0.4, 1.3)[1])()
    loss = jax.jit(jax.grad(lambda m, s: surrogate_loss(per_sample(m, s)[0], grad), argnums=(0, 1)))(0.4, 1.3)
    exact = jnp.concatenate(exact_gradient(div, teacher, student, sigma))
    error = 4 * jnp.stack([grad.std(), (grad * z).std()]) / math.sqrt(num)
    assert np.all(np.abs(jnp.stack(loss) - exact) < error), (loss, exact, error)
    assert np.any(np.abs(exact) > 10 * error)


def _descend(name, sigmas, weights, steps=1500, dtype=jnp.float32):
    """A Gaussian student from (0.6, 0.7) under the exact gradient of two modes at ±2."""
    teacher, div = _two_modes(dtype), divergence(name)
    optimizer = optax.adam(0.02)

    @jax.jit
    def run():
        def body(carry, _):
            params, opt_state = carry
            student = GaussianMixture(jnp.ones(1, dtype), params[:1, None], params[1:])
            grads = sum(
                w * jnp.concatenate(exact_gradient(div, teacher, student, s, num_nodes=301))
                for s, w in zip(sigmas, weights, strict=True)
            )
            updates, opt_state = optimizer.update(grads, opt_state)
            return (optax.apply_updates(params, updates), opt_state), None

        params = jnp.array([0.6, 0.7], dtype)
        (params, _), _ = jax.lax.scan(body, (params, optimizer.init(params)), None, length=steps)
        return params

    mean, std = run()
    return float(mean), abs(float(std))


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("reverse_kl", 1.998, 0.504),
        ("softened_reverse_kl", 1.999, 0.502),
        ("jensen_shannon", 0.0, 2.04),
        ("squared_hellinger", 0.0, 1.99),
        ("forward_kl", 0.0, 2.062),
        ("jeffreys", 0.0, 1.81),
    ],
)
def test_mode_seeking_divergences_collapse_where_the_others_cover(name, mean, std):
    found = _descend(name, [0.3], [1.0])
    np.testing.assert_allclose(found, (mean, std), atol=0.02)


def test_noise_alone_can_cure_the_collapse():
    mean, std = _descend("reverse_kl", [0.3, 1.0, 3.0], [0.09, 1.0, 9.0])
    np.testing.assert_allclose((mean, std), (0.0, 1.91), atol=0.03)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, two: exact_divergence(divergence("js"), two, p), "teacher must be one-dimensional"),
        (lambda p, two: exact_gradient(divergence("js"), p, two), "student must be one-dimensional"),
        (lambda p, two: exact_divergence(divergence("js"), p, p, jnp.ones(2)), "sigma must be one number"),
        (lambda p, two: weight_moments(divergence("js"), p, p, num_nodes=2), "num_nodes must be at least 3"),
    ],
)
def test_bad_arguments(call, message):
    two = GaussianMixture(jnp.ones(1), jnp.zeros((1, 2)), jnp.ones(1))
    with pytest.raises(ValueError, match=message):
        call(_gaussian(0.0, 1.0, jnp.float32), two)
