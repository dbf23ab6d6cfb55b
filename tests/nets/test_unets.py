"""Both U-Nets: against the official networks' arrays, and what must hold for either."""

import functools
import json
import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from poise.nets import EDMPrecond, edm_coefficients, from_state_dict

RTOL, ATOL = 1e-5, 2e-5


def nhwc(array):
    return np.transpose(array, (0, 2, 3, 1))


def optional(arrays, name):
    return jnp.asarray(arrays[name]) if name in arrays else None


def compute_all(path, quick_jit):
    """Everything that the file of an official network has, computed by poise in one program."""
    arrays = dict(np.load(path))
    config = json.loads(str(arrays["config"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of blocks too narrow for a head
        prefix = "state_dict/"
        state_dict = {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
        module, variables = from_state_dict(state_dict, config)
        x, sigma = jnp.asarray(nhwc(arrays["x"])), jnp.asarray(arrays["sigma"])
        labels, augment = optional(arrays, "class_labels"), optional(arrays, "augment_labels")
        levels = tuple(range(len(config["channel_mult"])))

        def compute(variables, x, cotangent):
            def full(x):
                out, state = module.apply(
                    variables, x, sigma, labels, augment, feature_levels=levels, capture_intermediates=True
                )
                return out[0], (out[1], state["intermediates"]["model"])

            denoised, pullback, (features, intermediates) = jax.vjp(full, x, has_aux=True)
            results = {"D": denoised, "grad_x": pullback(cotangent)[0], "intermediates": intermediates}
            results |= {f"feature_{level}": feature for level, feature in enumerate(features)}
            if "D_no_labels" in arrays:
                results["D_no_labels"] = module.apply(variables, x, sigma, None, augment)
            if "D_no_augment" in arrays:
                results["D_no_augment"] = module.apply(variables, x, sigma, labels, None)
            if "D_sigma_scalar" in arrays:
                results["D_sigma_scalar"] = module.apply(variables, x, arrays["sigma_scalar"].item(), labels, augment)
            for name in ("vp", "ve"):
                if f"D_{name}" in arrays:
                    other = EDMPrecond(module.model, preconditioning=name)
                    results[f"D_{name}"] = other.apply(variables, x, sigma, labels, augment)
            return results

        with jax.default_matmul_precision("highest"):
            results = quick_jit(compute)(variables, x, nhwc(arrays["cotangent"]))
    return SimpleNamespace(arrays=arrays, config=config, **results)


@pytest.fixture(scope="session")
def run(quick_jit):
    """`compute_all`, once for each file."""
    return functools.cache(functools.partial(compute_all, quick_jit=quick_jit))


def close(actual, expected, scale=1.0):
    expected = nhwc(expected) if expected.ndim == 4 else expected
    np.testing.assert_allclose(actual, expected, rtol=RTOL, atol=ATOL * scale)


class OfficialNetwork:
    """What holds for every file of an official network."""

    def test_denoised(self, golden_file, run):
        golden = run(golden_file)
        close(golden.D, golden.arrays["D"])

    def test_raw_output_and_noise_label(self, golden_file, run):
        golden = run(golden_file)
        raw, _ = golden.intermediates["__call__"][0]
        close(raw, golden.arrays["F"])
        c = edm_coefficients(jnp.asarray(golden.arrays["sigma"]), golden.config["sigma_data"])
        np.testing.assert_allclose(c.c_noise, golden.arrays["c_noise"], rtol=1e-6, atol=1e-7)

    def test_embeddings(self, golden_file, run):
        golden = run(golden_file)
        close(golden.intermediates["map_noise"]["__call__"][0], golden.arrays["noise_embedding"])
        close(golden.intermediates["emb"][0], golden.arrays["emb"])

    def test_features(self, golden_file, run):
        golden = run(golden_file)
        names = [name for name in golden.arrays if name.startswith("feature_")]
        assert len(names) == len(golden.config["channel_mult"])
        for name in names:
            close(getattr(golden, name), golden.arrays[name])

    def test_input_gradient(self, golden_file, run):
        golden = run(golden_file)
        close(golden.grad_x, golden.arrays["grad_x"], scale=np.abs(golden.arrays["grad_x"]).max())

    def test_without_labels_or_with_one_level(self, golden_file, run):
        golden = run(golden_file)
        for name in ("D_no_labels", "D_no_augment", "D_sigma_scalar"):
            if name in golden.arrays:
                close(getattr(golden, name), golden.arrays[name])

    def test_other_preconditionings(self, golden_file, run):
        golden = run(golden_file)
        for name in ("D_vp", "D_ve"):
            if name in golden.arrays:
                close(getattr(golden, name), golden.arrays[name], scale=np.abs(golden.arrays[name]).max())

    def test_activations_of_every_layer(self, golden_file, run):
        golden = run(golden_file)
        for name in golden.arrays:
            if name.startswith("act/"):
                node = golden.intermediates
                for part in name.removeprefix("act/").split("."):
                    node = node[part]
                close(node["__call__"][0], golden.arrays[name])


@pytest.mark.golden
@pytest.mark.golden_pattern("nets", "ddpmpp_*.npz")
class TestOfficialDDPMPP(OfficialNetwork):
    """DDPM++."""


@pytest.mark.golden
@pytest.mark.golden_pattern("nets", "ncsnpp_*.npz")
class TestOfficialNCSNPP(OfficialNetwork):
    """NCSN++."""


@pytest.mark.golden
@pytest.mark.golden_pattern("nets", "skip_*.npz")
class TestOfficialSkip(OfficialNetwork):
    """SongUNet with the skip encoder and decoder."""


@pytest.mark.golden
@pytest.mark.golden_pattern("nets", "adm_*.npz")
class TestOfficialADM(OfficialNetwork):
    """ADM."""


def one_level(module):
    """The same network with fewer blocks, where compilation would cost more than it shows."""
    return module.clone(model=module.model.clone(channel_mult=(1,), attn_resolutions=()))


def test_samples_do_not_see_each_other(small, small_apply, batch):
    _, variables = small
    x, sigma, labels, augment = batch
    denoised, features = small_apply(variables, x, sigma, labels, augment)
    changed = (x.at[1:].multiply(-3), sigma.at[1:].set(1.0), labels.at[1:].set(0), augment.at[1:].set(0.5))
    other, other_features = small_apply(variables, *changed)
    np.testing.assert_allclose(other[0], denoised[0], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(other_features[1][0], features[1][0], rtol=1e-6, atol=1e-6)
    assert np.abs(other[1] - denoised[1]).max() > 0.1


def test_one_level_for_all_is_that_level_repeated(small, small_apply, batch, quick_jit):
    module, variables = small
    x, _, labels, augment = batch
    repeated, _ = small_apply(variables, x, jnp.full(3, 0.3), labels, augment)
    scalar = quick_jit(lambda v, x, sigma: module.apply(v, x, sigma, labels, augment))(variables, x, jnp.array(0.3))
    np.testing.assert_allclose(scalar, repeated, rtol=1e-5, atol=1e-6)


def test_no_labels_are_zero_labels(small, small_apply, batch, quick_jit):
    module, variables = small
    x, sigma, _, _ = batch
    outside = jnp.full(3, -1)  # an index outside of the classes is no label
    zeros, _ = small_apply(variables, x, sigma, outside, jnp.zeros((3, 4)))
    none = quick_jit(lambda v, x: module.apply(v, x, sigma))(variables, x)
    np.testing.assert_allclose(none, zeros, rtol=1e-5, atol=1e-6)


def test_indices_are_one_hot_vectors(small, small_apply, batch):
    _, variables = small
    x, sigma, labels, augment = batch
    by_index, _ = small_apply(variables, x, sigma, labels, augment)
    by_vector, _ = small_apply(variables, x, sigma, jax.nn.one_hot(labels, 3), augment)
    np.testing.assert_array_equal(by_index, by_vector)
    other, _ = small_apply(variables, x, sigma, (labels + 1) % 3, augment)
    assert np.abs(other - by_index).max() > 1e-3


def test_features_alone_equal_those_of_the_full_call(small, small_apply, batch, quick_jit):
    module, variables = small
    x = batch[0]
    _, features = small_apply(variables, *batch)
    alone = quick_jit(lambda v, *a: module.apply(v, *a, feature_levels=(1, 0), features_only=True))(variables, *batch)
    assert [f.shape for f in alone] == [(3, 8, 8, 8), (3, 4, 4, 16)]
    for one, other in zip(alone, features, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)

    def energy(x):
        (deepest,) = module.apply(variables, x, *batch[1:], feature_levels=(1,), features_only=True)
        return jnp.sum(deepest**2)

    assert np.abs(quick_jit(jax.grad(energy))(x)).min(axis=(1, 2, 3)).max() > 0


@pytest.mark.slow
def test_remat_gives_the_same_gradients_and_variables(small, batch, random_variables, quick_jit):
    module = one_level(small[0])
    variables = random_variables(module, *batch)
    again = module.clone(model=module.model.clone(remat=True))

    def loss(module, variables):
        return jnp.mean(module.apply(variables, *batch, train=True, rngs={"dropout": jax.random.key(0)}) ** 2)

    grads = quick_jit(jax.grad(functools.partial(loss, module)))(variables)
    same = quick_jit(jax.grad(functools.partial(loss, again)))(variables)
    assert jax.tree.structure(grads) == jax.tree.structure(same)
    for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(same), strict=True):
        assert np.abs(one).max() > 0
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6 * max(1.0, np.abs(one).max()))


@pytest.mark.slow
def test_ensembles_and_sharded_batches_equal_single_calls(small, small_apply, batch, quick_jit):
    module, variables = small
    ensemble = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.5 * leaf]), variables)
    outputs = quick_jit(jax.vmap(lambda v: module.apply(v, *batch)))(ensemble)
    for member in (0, 1):
        single, _ = small_apply(jax.tree.map(lambda leaf: leaf[member], ensemble), *batch)
        np.testing.assert_allclose(outputs[member], single, rtol=1e-5, atol=1e-5)

    axis_types = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((3,), ("data",), axis_types=axis_types, devices=jax.devices()[:3])
    spread = jax.NamedSharding(mesh, jax.P("data"))
    everywhere = jax.NamedSharding(mesh, jax.P())
    sharded, _ = small_apply(jax.device_put(variables, everywhere), *jax.device_put(batch, spread))
    single, _ = small_apply(variables, *batch)
    np.testing.assert_allclose(sharded, single, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_dropout(small, small_apply, batch, quick_jit):
    module, variables = small
    none = module.clone(model=module.model.clone(dropout=0.0))
    evaluated, _ = small_apply(variables, *batch)
    trained = quick_jit(lambda v: none.apply(v, *batch, train=True))(variables)
    np.testing.assert_allclose(trained, evaluated, rtol=1e-5, atol=1e-6)

    drop = quick_jit(lambda v, key: module.apply(v, *batch, train=True, rngs={"dropout": key}))
    first, second = drop(variables, jax.random.key(0)), drop(variables, jax.random.key(1))
    assert np.abs(first - second).max() > 1e-3
    np.testing.assert_array_equal(first, drop(variables, jax.random.key(0)))


def test_label_dropout_drops_the_label_vector(small, small_apply, batch, quick_jit):
    module, variables = small
    module = module.clone(model=module.model.clone(dropout=0.0, label_dropout=0.5))
    x, sigma, labels, augment = batch
    x, sigma, augment = x.at[:].set(x[0]), sigma.at[:].set(0.5), augment.at[:].set(augment[0])
    labels = labels.at[:].set(1)
    train = quick_jit(
        lambda v, key: module.apply(v, x, sigma, labels, augment, train=True, rngs={"label_dropout": key})
    )
    kept, _ = small_apply(variables, x, sigma, labels, augment)
    dropped, _ = small_apply(variables, x, sigma, -jnp.ones(3, jnp.int32), augment)
    seen = set()
    for seed in range(6):
        for sample in train(variables, jax.random.key(seed)):
            was_kept = np.allclose(sample, kept[0], rtol=1e-4, atol=1e-5)
            assert was_kept or np.allclose(sample, dropped[0], rtol=1e-4, atol=1e-5)
            seen.add(was_kept)
    assert seen == {True, False}


def test_fresh_network_returns_next_to_nothing(small, batch, quick_jit):
    module = one_level(small[0])
    x, sigma = batch[:2]
    variables = quick_jit(module.init)(jax.random.key(0), *batch)
    denoised = quick_jit(lambda v: module.apply(v, *batch))(variables)
    shrunk = edm_coefficients(sigma).c_skip[:, None, None, None] * x
    if type(module.model).__name__ == "DhariwalUNet":
        np.testing.assert_array_equal(denoised, shrunk)
    else:
        np.testing.assert_allclose(denoised, shrunk, atol=5e-4)
        assert np.abs(denoised - shrunk).max() > 0


def test_float64_stays_float64(small, small_apply, batch, quick_jit):
    module, variables = small
    expected, _ = small_apply(variables, *batch)
    with jax.enable_x64():
        wide = [jnp.asarray(np.asarray(a), jnp.float64) if a.dtype == jnp.float32 else a for a in batch]
        run = lambda v, *a: module.apply(v, *a, feature_levels=(1,))  # noqa: E731
        denoised, (feature,) = quick_jit(run)(variables, *wide)
    assert denoised.dtype == feature.dtype == np.float64
    np.testing.assert_allclose(denoised, expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_network_in_float32_frame(small, small_apply, batch, quick_jit):
    module, variables = small
    expected, features = small_apply(variables, *batch)
    half = module.clone(model=module.model.clone(dtype=jnp.bfloat16))
    denoised, (feature,) = quick_jit(lambda v, *a: half.apply(v, *a, feature_levels=(1,)))(variables, *batch)
    assert denoised.dtype == jnp.float32
    assert feature.dtype == jnp.bfloat16
    error = np.abs(feature.astype(jnp.float32) - features[1])
    assert 1e-4 < error.max() / np.abs(features[1]).max() < 3e-2
    c_out = edm_coefficients(batch[1]).c_out[:, None, None, None]
    raw = (expected - denoised) / c_out
    assert 1e-4 < np.abs(raw).max() / np.abs(expected / c_out).max() < 3e-2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": (3, 8, 9, 2)}, r"x must have shape \[batch, 8, 8, channels\]"),
        ({"x": (3, 8, 8, 4)}, "x must have 2 channels"),
        ({"sigma": (2,)}, "sigma must be a scalar or of shape"),
        ({"class_labels": (3, 5)}, r"class_labels must have shape \[batch, 3\]"),
        ({"class_labels": (3,)}, r"class_labels must have shape \[batch, 3\]"),
        ({"augment_labels": (3, 2)}, r"augment_labels must have shape \[batch, 4\]"),
        ({"feature_levels": (0, 2)}, "feature_levels must be in -2, ..., 1"),
        ({"feature_levels": (-3,)}, "feature_levels must be in -2, ..., 1"),
        ({"features_only": True}, "feature_levels must name at least one level"),
        ({"train": True}, "rngs must hold 'dropout'"),
        ({"model": {"num_blocks": 0}}, "num_blocks must be at least 1"),
        ({"model": {"model_channels": 9}}, "model_channels must be even"),
        ({"model": {"model_channels": 18}}, "num_channels must be at least 4 and divisible"),
        ({"model": {"model_channels": 2}}, r"num_channels must be (even and )?at least 4"),
        ({"model": {"channel_mult": (1, 1, 1, 1, 1)}}, "img_resolution must be a multiple of 16"),
        ({"model": {"channel_mult": ()}}, "channel_mult must have at least one entry"),
        ({"model": {"augment_dim": 0}}, "augment_labels must be None when augment_dim is 0"),
        ({"model": {"dropout": 1.5}}, r"dropout must be in \[0, 1\)"),
        ({"model": {"label_dim": 0}, "module": {"label_dim": 0}}, "class_labels must be None when label_dim is 0"),
        ({"module": {"label_dim": 7}}, "label_dim must be that of the model, 3, got 7"),
        ({"module": {"preconditioning": "ddim"}}, "preconditioning must be one of"),
        ({"module": {"preconditioning": "iddpm"}}, "needs a model with an output of 4 channels"),
        ({"module": {"sigma_data": 0.0}}, "sigma_data must be positive"),
    ],
)
def test_bad_input_names_the_argument(small, changes, message):
    module, _ = small
    shapes = {"x": (3, 8, 8, 2), "sigma": (3,), "class_labels": (3, 3), "augment_labels": (3, 4)}
    arrays = {name: jnp.ones(changes.get(name, shape)) for name, shape in shapes.items()}
    keywords = {key: changes[key] for key in ("feature_levels", "features_only", "train") if key in changes}
    model = module.model.clone(in_channels=2, **changes.get("model", {}))
    module = module.clone(model=model, **changes.get("module", {}))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda key: module.init(key, **arrays, **keywords), jax.random.key(0))


def test_wrong_label_type(small, batch):
    module, _ = small
    x, sigma, labels, _ = batch
    with pytest.raises(TypeError, match="class_labels must be integers or floats, got bool"):
        jax.eval_shape(lambda key: module.init(key, x, sigma, labels > 0), jax.random.key(0))
