"""Gaussian mixtures against official outputs, closed forms and each other."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from poise.fdistill import GaussianMixture, divergence, f_weight, matching_gradient


@pytest.mark.golden
@pytest.mark.golden_pattern("fdistill", "gmm_score*.npz")
def test_edm2_toy(golden_file):
    data = np.load(golden_file)
    with jax.enable_x64():
        gm = GaussianMixture(*(jnp.asarray(data[key]) for key in ("phi", "mu", "Sigma")))
        x, sigma = jnp.asarray(data["x"]), jnp.asarray(data["sigma"])
        np.testing.assert_allclose(gm.log_prob(x, sigma), data["logp"], rtol=1e-9)
        np.testing.assert_allclose(gm.score(x, sigma), data["score"], rtol=1e-9)
        np.testing.assert_allclose(gm.denoise(x, sigma), data["denoised"], rtol=1e-9)


@pytest.mark.golden
@pytest.mark.golden_pattern("fdistill", "fdistill_testbed*.npz")
def test_testbed(golden_file):
    data = np.load(golden_file)
    with jax.enable_x64():
        teacher, student = (
            GaussianMixture(*(jnp.asarray(data[f"{who}_{key}"]) for key in ("w", "mu", "std")))
            for who in ("teacher", "student")
        )
        z, eps, sigma = (jnp.asarray(data[key]) for key in ("z", "eps", "sigma"))
        component = jnp.asarray(data["comp"])
        x0 = student.means[component] + student.covs[component][:, None] * z
        xt = x0 + sigma[:, None] * eps
        np.testing.assert_allclose(x0, data["x0"], rtol=1e-8)
        np.testing.assert_allclose(xt, data["xt"], rtol=1e-8)
        log_p, log_q = teacher.log_prob(xt, sigma), student.log_prob(xt, sigma)
        score_p, score_q = teacher.score(xt, sigma), student.score(xt, sigma)
        real, fake = teacher.denoise(xt, sigma), student.denoise(xt, sigma)
        for value, key in [
            (log_p, "teacher_logp"),
            (log_q, "student_logp"),
            (log_p - log_q, "log_ratio"),
            (score_p, "teacher_score"),
            (score_q, "student_score"),
            (real, "teacher_denoised"),
            (fake, "student_denoised"),
        ]:
            np.testing.assert_allclose(value, data[key], rtol=1e-8, err_msg=key)
        for row, name in enumerate(data["names"]):
            h = f_weight(divergence(str(name)), log_p - log_q)
            np.testing.assert_allclose(h, data["h"][row], rtol=1e-8)
            np.testing.assert_allclose(-h[:, None] * (score_p - score_q), data["grad_score"][row], rtol=1e-8)
            np.testing.assert_allclose(
                matching_gradient(x0, real, fake, h), data["grad_dm"][row], rtol=1e-8, err_msg=str(name)
            )


WEIGHTS = [0.2, 0.5, 0.3]
MEANS = [[-1.0, 0.5], [2.0, 1.0], [0.0, -2.0]]


def _mixtures(dtype=jnp.float32):
    stds = jnp.array([0.3, 0.7, 1.1], dtype)
    isotropic = GaussianMixture(jnp.array(WEIGHTS, dtype), jnp.array(MEANS, dtype), stds)
    full = isotropic._replace(covs=stds[:, None, None] ** 2 * jnp.eye(2, dtype=dtype))
    skewed = full._replace(covs=full.covs + 0.3 * stds[:, None, None] ** 2 * jnp.array([[0.0, 1.0], [1.0, 0.0]], dtype))
    return {"isotropic": isotropic, "full": full, "skewed": skewed}


def _points(n=7, seed=0, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed))
    return 2 * jax.random.normal(keys[0], (n, 2), dtype), jnp.exp(jax.random.normal(keys[1], (n,), dtype))


@pytest.mark.parametrize("kind", ["isotropic", "full", "skewed"])
def test_score_is_the_gradient_and_denoiser_is_tweedie(kind):
    with jax.enable_x64():
        gm = _mixtures(jnp.float64)[kind]
        x, sigma = _points(dtype=jnp.float64)
        gradient = jax.vmap(jax.grad(gm.log_prob))(x, sigma)
        np.testing.assert_allclose(gm.score(x, sigma), gradient, rtol=1e-10)
        np.testing.assert_allclose(gm.denoise(x, sigma), x + sigma[:, None] ** 2 * gradient, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(gm.responsibilities(x, sigma).sum(axis=-1), 1.0, rtol=1e-12)
        # E over responsibilities of the means and shrunk offsets is the same posterior mean
        np.testing.assert_allclose(gm.denoise(x, 1e-9), x, atol=1e-12)
        np.testing.assert_allclose(gm.denoise(x, 1e9), np.broadcast_to(gm.weights @ gm.means, x.shape), atol=1e-6)


def test_isotropic_equals_full():
    with jax.enable_x64():
        both = _mixtures(jnp.float64)
        x, sigma = _points(dtype=jnp.float64)
        for method in ("log_prob", "score", "denoise", "responsibilities"):
            one, two = (getattr(both[kind], method)(x, sigma) for kind in ("isotropic", "full"))
            np.testing.assert_allclose(one, two, rtol=1e-11, atol=1e-13, err_msg=method)


@pytest.mark.parametrize("kind", ["isotropic", "skewed"])
@pytest.mark.parametrize("sigma", [0.0, 0.8])
def test_density_integrates_to_one_and_samples_follow_it(kind, sigma):
    gm = _mixtures()[kind]
    axis = jnp.linspace(-9.0, 9.0, 181)
    grid = jnp.stack(jnp.meshgrid(axis, axis), axis=-1)
    density = jnp.exp(gm.log_prob(grid, sigma))
    assert density.shape == (181, 181)
    np.testing.assert_allclose(density.sum() * 0.01, 1.0, rtol=1e-4)
    mean = jnp.einsum("xy,xyi->i", density, grid) * 0.01
    second = jnp.einsum("xy,xyi,xyj->ij", density, grid, grid) * 0.01
    x = gm.sample(jax.random.key(1), 40000, sigma)
    np.testing.assert_allclose(x.mean(axis=0), mean, atol=4 * 2 / 200)
    np.testing.assert_allclose(x.T @ x / 40000, second, atol=4 * 6 / 200)
    # the denoiser is the regression of the clean on the noised point, so its error is orthogonal to it
    clean = gm.sample(jax.random.key(2), 40000)
    noised = clean + (sigma + 0.5) * jax.random.normal(jax.random.key(3), clean.shape)
    error = clean - gm.denoise(noised, sigma + 0.5)
    np.testing.assert_allclose(error.mean(axis=0), 0.0, atol=4 * 1 / 200)
    np.testing.assert_allclose((error * noised).mean(axis=0), 0.0, atol=4 * 3 / 200)


@pytest.mark.parametrize("kind", ["isotropic", "full", "skewed"])
def test_extremes_are_finite(kind):
    gm = _mixtures()[kind]
    far = jnp.array([[55.0, -55.0], [0.0, 0.0], [-1.0, 0.5]])
    for sigma in (0.0, 0.002, 80.0, 1e4):
        for method in ("log_prob", "score", "responsibilities", "denoise"):
            assert np.all(np.isfinite(getattr(gm, method)(far, sigma))), (method, sigma)
    gradient = jax.grad(lambda gm: gm.log_prob(far, 0.1).sum())(gm)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))


def test_empty_components_and_deficient_covariances():
    gm = GaussianMixture(jnp.array([1.0, 0.0]), jnp.zeros((2, 2)), jnp.array([1.0, 2.0]))
    alone = GaussianMixture(jnp.array([1.0]), jnp.zeros((1, 2)), jnp.array([1.0]))
    x, sigma = _points()
    np.testing.assert_allclose(gm.log_prob(x, sigma), alone.log_prob(x, sigma), rtol=1e-6)
    gradient = jax.grad(lambda gm: gm.log_prob(x, sigma).sum())(gm)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))
    # a covariance estimated from fewer samples than dimensions: rank one in three
    thin = GaussianMixture(jnp.ones(1), jnp.zeros((1, 3)), jnp.ones((1, 3, 3)))
    points = thin.sample(jax.random.key(0), 50)
    np.testing.assert_allclose(points, np.broadcast_to(points[:, :1], points.shape), atol=1e-5)
    assert np.all(np.isfinite(thin.log_prob(points, 0.1)))
    np.testing.assert_allclose(thin.denoise(points, 1.0), points * (3 / 4), atol=1e-5)


def test_points_and_levels_of_any_shape():
    gm = _mixtures()["skewed"]
    x, sigma = _points(6)
    flat = gm.score(x, sigma)
    np.testing.assert_allclose(gm.score(x.reshape(2, 3, 2), sigma.reshape(2, 3)), flat.reshape(2, 3, 2), rtol=1e-5)
    np.testing.assert_allclose(gm.score(x[0], sigma[0]), flat[0], rtol=1e-5)
    np.testing.assert_allclose(gm.score(x, 0.7), gm.score(x, jnp.full(6, 0.7)), rtol=1e-5)
    np.testing.assert_allclose(jax.jit(lambda g, a, s: g.score(a, s))(gm, x, sigma), flat, rtol=1e-4, atol=1e-6)
    order = jnp.array([2, 0, 1])
    shuffled = GaussianMixture(*(leaf[order] for leaf in gm))
    np.testing.assert_allclose(shuffled.score(x, sigma), flat, rtol=1e-4, atol=1e-6)
    assert gm.log_prob(x.astype(jnp.bfloat16), 0.5).dtype == jnp.float32


def test_weights_that_shrink_where_scores_disagree():
    # the paper's Figures 2 and 5: at high noise the rank correlation of ratio and disagreement weakens
    scipy_stats = pytest.importorskip("scipy.stats")
    teacher = GaussianMixture(jnp.array([0.5, 0.5]), jnp.array([[-1.5, 0.0], [1.5, 0.0]]), jnp.array([0.4, 0.4]))
    student = GaussianMixture(jnp.ones(1), jnp.array([[0.3, 0.1]]), jnp.array([1.2]))
    for sigma, expected in [(0.05, -0.93), (0.2, -0.91), (0.5, -0.82), (1.0, -0.64)]:
        x = student.sample(jax.random.key(0), 6400, sigma)
        ratio = teacher.log_prob(x, sigma) - student.log_prob(x, sigma)
        gap = jnp.linalg.norm(teacher.score(x, sigma) - student.score(x, sigma), axis=1)
        rank = scipy_stats.spearmanr(np.asarray(ratio), np.asarray(gap)).statistic
        np.testing.assert_allclose(rank, expected, atol=0.03)


GM = GaussianMixture(jnp.array([0.5, 0.5]), jnp.zeros((2, 3)), jnp.ones(2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GM.log_prob(jnp.ones((4, 2))), "last axis of size 3"),
        (lambda: GM.log_prob(jnp.ones((4, 3)), -1.0), "sigma must lie"),
        (lambda: GM._replace(weights=jnp.ones(2)).log_prob(jnp.ones(3)), "weights must sum to 1"),
        (lambda: GM._replace(weights=jnp.array([1.5, -0.5])).log_prob(jnp.ones(3)), "weights must lie"),
        (lambda: GM._replace(weights=jnp.ones(1)).log_prob(jnp.ones(3)), "weights must have shape"),
        (lambda: GM._replace(covs=jnp.ones((2, 3))).score(jnp.ones(3)), "covs must have shape"),
        (lambda: GM._replace(covs=-jnp.ones(2)).denoise(jnp.ones(3), 1.0), r"covs \(standard deviations\) must lie"),
        (lambda: inspect.unwrap(GaussianMixture.sample)(GM, jax.random.key(0), -1), "num must be at least 0"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_one_gaussian_in_closed_form():
    gm = GaussianMixture(jnp.ones(1), jnp.array([[3.0]]), jnp.array([2.0]))
    x = jnp.array([[5.0]])
    np.testing.assert_allclose(gm.score(x, 1.0), [[-2 / 5]], rtol=1e-6)
    np.testing.assert_allclose(gm.denoise(x, 1.0), [[5 - 2 / 5]], rtol=1e-6)
    np.testing.assert_allclose(gm.log_prob(x, 1.0), [-0.5 * (4 / 5 + math.log(2 * math.pi * 5))], rtol=1e-6)
