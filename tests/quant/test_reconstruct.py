import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from poise.quant import (
    LRQ,
    AdaRound,
    FlexRound,
    Nupes,
    apply_quantizers,
    dequantize_tensor,
    qdrop,
    reconstruct,
    reconstruct_blocks,
    reconstruction_loss,
)


def draw(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def layer(params, x):
    return jnp.tanh(x @ params["kernel"] + params["bias"])


def block(seed=0, width=8):
    return {"kernel": draw((width, width), seed), "bias": 0.1 * draw(width, seed + 50)}


@functools.cache
def problem():
    params, x = block(), draw((48, 3), 1) @ draw((3, 8), 2) + 0.2 * draw((48, 8), 3)
    return params, x, layer(params, x)


RUN = {"steps": 60, "optimizer": optax.adam(optax.cosine_decay_schedule(1e-2, 60))}
QUANTIZERS = {
    "adaround": AdaRound(bits=3, search=False),
    "flexround": FlexRound(bits=3, axis=None),
    "lrq": LRQ(bits=3, rank=2),
    "nupes": Nupes(bits=3, exponent=0.7, learn_scale=True),
}


@pytest.mark.golden
@pytest.mark.golden_pattern("quant", "flexround_block*.npz")
def test_a_block_of_the_official_code(golden_file):
    z = np.load(golden_file)
    steps, bits = int(z["iters"]), int(z["bits"])
    params = {"l1": {"kernel": z["w1"].T, "bias": z["b1"]}, "l2": {"kernel": z["w2"].T}}
    params = jax.tree.map(jnp.asarray, params)
    x, target = jnp.asarray(z["x"]), jnp.asarray(z["target"])

    def apply(params, x):
        hidden = nn.gelu(x @ params["l1"]["kernel"] + params["l1"]["bias"], approximate=False)
        return hidden @ params["l2"]["kernel"]

    np.testing.assert_allclose(apply(params, x), target, atol=1e-5)
    quantizer = FlexRound(bits=bits, axis="channel" if z["channel_wise"] else None)
    optimizer = optax.adam(optax.cosine_decay_schedule(float(z["lr"]), steps))
    qparams, losses = reconstruct(
        apply, params, x, target, quantizer=quantizer, optimizer=optimizer, steps=steps, key=jax.random.key(0)
    )
    # on the way, a weight may stand within rounding of a tie for a step
    off = np.abs(losses / z["losses"] - 1)
    assert (off > 1e-5).sum() <= 0.02 * steps
    assert off.max() < 0.02
    for number in (1, 2):
        found = qparams[f"l{number}/kernel"]
        start = quantizer.init(params[f"l{number}"]["kernel"], jax.random.key(0))
        np.testing.assert_array_equal(np.ravel(found["zero_point"]), np.ravel(z[f"l{number}_zero_point"]))
        for name in ("log_s1", "log_s2", "log_s3"):
            expected, first = (np.atleast_2d(z[f"l{number}_{name}{end}"]).T for end in ("", "_init"))
            np.testing.assert_allclose(found[name], expected, rtol=0, atol=5e-6, err_msg=f"l{number} {name}")
            np.testing.assert_allclose(start[name], first, rtol=0, atol=1e-6)
    quantized = apply_quantizers(params, qparams, quantizer)
    np.testing.assert_allclose(quantized["l1"]["kernel"], z["w1_hat"].T, rtol=0, atol=1e-6)
    np.testing.assert_allclose(quantized["l2"]["kernel"], z["w2_hat"].T, rtol=0, atol=1e-6)
    final = reconstruction_loss(apply(quantized, x), target)
    np.testing.assert_allclose(final, z["final_loss"], rtol=1e-5)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_quantizer_ends_better_than_it_would_be_rounded_at_once(name):
    params, x, target = problem()
    quantizer = QUANTIZERS[name]
    start = {"kernel": quantizer.init(params["kernel"], jax.random.key(0))}
    qparams, losses = reconstruct(layer, params, x, target, quantizer=quantizer, key=jax.random.key(0), **RUN)

    def error(qparams):
        return float(reconstruction_loss(layer(apply_quantizers(params, qparams, quantizer), x), target))

    assert losses.shape == (60,)
    assert error(qparams) < 0.9 * error(start)
    if name in ("flexround", "lrq"):
        np.testing.assert_allclose(losses[0], error(start), rtol=1e-5)
    # what is not learned stays as it was
    for field in qparams["kernel"].keys() - set(quantizer.learned):
        np.testing.assert_array_equal(qparams["kernel"][field], start["kernel"][field])
    assert any((qparams["kernel"][field] != start["kernel"][field]).any() for field in quantizer.learned)
    # and the integers are the weights
    tensor = quantizer.store(params["kernel"], qparams["kernel"])
    np.testing.assert_array_equal(dequantize_tensor(tensor), quantizer.hard(params["kernel"], qparams["kernel"]))


def test_batches_are_drawn_from_the_key_and_drop_mixes_the_streams():
    params, x, target = problem()
    run = functools.partial(reconstruct, layer, params, x, target, quantizer=QUANTIZERS["flexround"], **RUN)
    first, again, other = (run(key=jax.random.key(seed), batch_size=16)[1] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    noisy = x + 0.3 * draw(x.shape, 9)
    mixed = run(key=jax.random.key(0), x_float=noisy, drop=0.5)[1]
    plain = run(key=jax.random.key(0))[1]
    np.testing.assert_array_equal(run(key=jax.random.key(0), x_float=noisy, drop=1.0)[1], plain)
    assert (mixed != plain).any()


def test_two_streams_make_up_for_earlier_errors():
    params = [block(seed) for seed in range(3)]
    x = draw((64, 8), 7)
    quantizer = FlexRound(bits=2, axis=None)
    options = {"quantizer": quantizer, "key": jax.random.key(0), **RUN}
    qparams, losses = reconstruct_blocks([layer] * 3, params, x, **options)
    assert [loss.shape for loss in losses] == [(60,)] * 3

    def run(qparams):
        out = x
        for weights, q in zip(params, qparams, strict=True):
            out = layer(apply_quantizers(weights, q, quantizer), out)
        return out

    out = x
    for weights in params:
        out = layer(weights, out)
    apart, x_float = [], x
    for weights in params:  # each block by itself, on the float network's inputs
        target = layer(weights, x_float)
        apart.append(reconstruct(layer, weights, x_float, target, quantizer=quantizer, key=jax.random.key(0), **RUN)[0])
        x_float = target
    assert reconstruction_loss(run(qparams), out) < reconstruction_loss(run(apart), out)
    # the second block's first loss is that of the quantized stream
    seen = layer(apply_quantizers(params[0], qparams[0], quantizer), x)
    start = {"kernel": quantizer.init(params[1]["kernel"], jax.random.key(0))}
    first = layer(apply_quantizers(params[1], start, quantizer), seen)
    np.testing.assert_allclose(
        losses[1][0], reconstruction_loss(first, layer(params[1], layer(params[0], x))), rtol=1e-4
    )


def test_only_named_weights_are_quantized():
    params = {"a": block(), "b": block(3)}
    x = draw((16, 8))
    apply = lambda params, x: layer(params["b"], layer(params["a"], x))  # noqa: E731
    quantizer = {"b/kernel": FlexRound(bits=2)}
    options = {"optimizer": optax.adam(1e-3), "steps": 2, "key": jax.random.key(0)}
    qparams, _ = reconstruct(apply, params, x, apply(params, x), quantizer=quantizer, **options)
    assert list(qparams) == ["b/kernel"]
    quantized = apply_quantizers(params, qparams, quantizer)
    np.testing.assert_array_equal(quantized["a"]["kernel"], params["a"]["kernel"])
    assert len(np.unique(quantized["b"]["kernel"][:, 0])) <= 4


def test_bad_input_is_refused():
    params, x, target = problem()
    options = {"quantizer": FlexRound(bits=3), "optimizer": optax.adam(1e-3), "steps": 2, "key": jax.random.key(0)}
    run = lambda apply=layer, params=params, x=x, target=target, **other: reconstruct(  # noqa: E731
        apply, params, x, target, **{**options, **other}
    )
    for message, call in {
        "steps must be at least 1": lambda: run(steps=0),
        "x must have at least one example": lambda: run(x=x[:0], target=target[:0]),
        "target must have the 48 examples of x": lambda: run(target=target[:3]),
        "target must have the shape of the block's output": lambda: run(target=target[:, :3]),
        "x_float must have the shape of x": lambda: run(x_float=x[:3]),
        r"batch_size must be in \[1, 48\]": lambda: run(batch_size=49),
        "quantizer must name weights of the block, got nothing": lambda: run(quantizer={"nothing": FlexRound(bits=3)}),
        "quantizer must be for at least one weight": lambda: run(quantizer={}),
        "the loss of fc7 became nan at step 0": lambda: run(target=target * jnp.nan, name="fc7"),
        "qparams must hold every quantized weight": lambda: apply_quantizers(params, {}, FlexRound(bits=3)),
        r"bits must be in \[2, 8\]": lambda: FlexRound(bits=1),
        "axis must be one of channel": lambda: AdaRound(bits=3, axis="row"),
        "rank must be at least 1": lambda: LRQ(bits=3, rank=0),
        "exponent must lie in": lambda: Nupes(bits=3, exponent=0.0),
        "params must have one entry for each of 2 blocks": lambda: reconstruct_blocks(
            [layer] * 2, [params], x, **options
        ),
        "p must lie in": lambda: qdrop(jax.random.key(0), x, x, 1.5),
        "x_quant must have the shape of x": lambda: qdrop(jax.random.key(0), x, x[:2]),
        "target must have the shape": lambda: reconstruction_loss(x, x[:2]),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_qdrop_takes_each_entry_from_one_side():
    x, x_quant = jnp.zeros((100, 40)), jnp.ones((100, 40))
    mixed = jax.jit(qdrop)(jax.random.key(0), x, x_quant, 0.3)
    assert set(np.unique(mixed)) == {0.0, 1.0}
    assert abs(float(mixed.mean()) - 0.3) < 0.03
    np.testing.assert_array_equal(qdrop(jax.random.key(0), x, x_quant, 0.0), x)
    np.testing.assert_array_equal(qdrop(jax.random.key(0), x, x_quant, 1.0), x_quant)
