"""What every gradient transformation of poise.optim must do, whatever it computes.

A transformation joins by one line in CASES.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import poise.optim
from poise.optim import (
    adamp,
    apply_prox,
    average_gradients,
    kappas,
    lion_kappa,
    scale_by_adamp,
    scale_by_lion_kappa,
    scale_by_sgdp,
    sgdp,
)


class Case(NamedTuple):
    """A transformation and how the suite calls it.

    Attributes:
      factory: the public function.
      options: its keyword arguments, without the learning rate.
      rate: the learning rate for convergence, as the start of a decay to a thousandth over 10000 steps.
      takes_rate: whether the factory has a learning rate; if not, it stands before ``optax.scale_by_learning_rate``.
      static: arguments that ``optax.inject_hyperparams`` has to leave alone.
      needs_params: whether ``update`` can't do without the parameters.
      gathers: whether the direction of a leaf asks for all of it in one place, so that a spread one is gathered.
    """

    factory: Callable[..., Any]
    options: dict[str, Any] = {}  # noqa: RUF012
    rate: float = 0.05
    takes_rate: bool = True
    static: tuple[str, ...] = ()
    needs_params: bool = True
    gathers: bool = False

    def has(self, argument):
        return argument in inspect.signature(self.factory).parameters

    def having(self, **options):
        return self._replace(options=self.options | options)

    def make(self, learning_rate):
        if self.takes_rate:
            return self.factory(learning_rate=learning_rate, **self.options)
        return optax.chain(self.factory(**self.options), optax.scale_by_learning_rate(learning_rate))


def proximal_sgd(learning_rate):
    """Momentum, ending in the proximal map of a slight ridge."""

    def ridge(params, step_size):
        return jax.tree.map(lambda p: (p / (1 + 1e-4 * step_size)).astype(p.dtype), params)

    return optax.chain(sgdp(learning_rate, momentum=0.9), apply_prox(ridge, learning_rate))


NUCLEAR = kappas.nuclear(fallback=kappas.sign())
CASES = {
    "lion_kappa": Case(lion_kappa),
    "lion_kappa_huber": Case(lion_kappa, dict(kappa=kappas.huber(0.1), cautious_factor=0.5)),
    "lion_kappa_nuclear": Case(
        lion_kappa, dict(kappa=NUCLEAR, weight_decay=lambda count: jnp.float32(1e-3)), gathers=True
    ),
    "scale_by_lion_kappa": Case(scale_by_lion_kappa, dict(kappa=kappas.lp(1.5)), takes_rate=False, needs_params=False),
    "adamp": Case(adamp, dict(weight_decay=1e-3), rate=0.1),
    "scale_by_adamp": Case(scale_by_adamp, dict(nesterov=True), rate=0.1, takes_rate=False),
    "sgdp": Case(sgdp, dict(momentum=0.9, nesterov=True, weight_decay=1e-4), rate=2e-3),
    "apply_prox": Case(proximal_sgd, rate=2e-3),
    "average_gradients": Case(average_gradients, dict(beta=0.1), rate=2e-2, takes_rate=False, needs_params=False),
    "scale_by_sgdp": Case(scale_by_sgdp, dict(momentum=0.9, dampening=0.1), rate=2e-3, takes_rate=False),
}

# Transformations that stand inside of a case's own function.
INSIDE = (apply_prox,)

# Options that are refused when a transformation is made, not when it is used.
WRONG = {
    lion_kappa: [dict(learning_rate=-1.0), dict(b1=1.0), dict(b2=-0.1), dict(weight_decay=-1.0), dict(kappa="lion")],
    scale_by_lion_kappa: [dict(b1=1.0), dict(b2=1.5), dict(cautious_factor=2.0), dict(kappa="lion")],
    adamp: [dict(b1=1.0), dict(b2=-0.1), dict(delta=-1.0), dict(wd_ratio=1.1)],
    scale_by_adamp: [dict(b1=-0.1), dict(b2=1.0), dict(eps=-1e-8), dict(delta=-1.0), dict(weight_decay=-1.0)],
    sgdp: [dict(momentum=1.0), dict(eps=-1e-8), dict(delta=-1.0), dict(wd_ratio=-0.1)],
    scale_by_sgdp: [dict(momentum=1.0), dict(eps=-1e-8), dict(delta=-1.0), dict(weight_decay=-1.0)],
    average_gradients: [dict(beta=0.0), dict(beta=1.1)],
    apply_prox: [dict(prox=lambda params, step_size: params, learning_rate=-1.0)],
}

# The parts that the optimizers above are chained of wait for the slow tier.
every = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if case.takes_rate else pytest.mark.slow) for name, case in CASES.items()]
)
takes_weight_decay = pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.has("weight_decay")])
RATE = 0.03


def normal(seed, *shape, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


PARAMS = {"kernel": normal(0, 2, 3), "bias": normal(1, 3)}
GRADS = {"kernel": normal(2, 4, 2, 3), "bias": normal(3, 4, 3)}  # four steps


def at(tree, index):
    return jax.tree.map(lambda x: jnp.asarray(x[index]), tree)


def arrays(tree):
    return jax.tree.map(jnp.array, tree)


def assert_close(actual, expected, rtol=2e-5, atol=1e-6):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), actual, expected)


def types(tree):
    return jax.tree.map(lambda x: jax.typeof(x) if isinstance(x, jax.Array) else (x.shape, x.dtype), tree)


def step_of(optimizer):
    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


@functools.cache
def reference(name):
    """Parameters and states after each step of a jitted, donating step that must not compile twice."""
    optimizer = CASES[name].make(RATE)
    step = jax.jit(step_of(optimizer), donate_argnums=(0, 1))
    params = arrays(PARAMS)
    carry, out = (params, optimizer.init(params)), []
    for t in range(4):
        previous = carry
        carry = step(*carry, at(GRADS, t))
        if t == 0:
            donated = [leaf.is_deleted() for leaf in jax.tree.leaves(previous)]
        out.append(jax.tree.map(np.array, carry))
    return out, step._cache_size(), donated


@every
def test_the_step_compiles_once_and_gives_its_buffers_away(name):
    out, compilations, donated = reference(name)
    assert compilations == 1
    assert all(donated)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(out))


@every
def test_eager_steps_agree_with_jitted_ones(name):
    optimizer = CASES[name].make(RATE)
    params = arrays(PARAMS)
    state = optimizer.init(params)
    for t in range(2):
        params, state = step_of(optimizer)(params, state, at(GRADS, t))
        assert_close((params, state), reference(name)[0][t])


@every
def test_scan_cond_and_vmap(name):
    """Four steps in a scan, of which a cond skips some, for a stack of two problems."""
    optimizer = CASES[name].make(RATE)

    def four_steps(params, taken):
        def body(carry, inputs):
            grads, take = inputs
            carry = jax.lax.cond(take, lambda: step_of(optimizer)(*carry, grads), lambda: carry)
            return carry, None

        return jax.lax.scan(body, (params, optimizer.init(params)), (arrays(GRADS), taken))[0]

    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), PARAMS)
    taken = jnp.array([[True, True, True, True], [True, True, False, False]])
    out = jax.jit(jax.vmap(four_steps))(stacked, taken)
    assert_close(at(out, 0), reference(name)[0][3])
    assert_close(at(out, 1), reference(name)[0][1])


@every
def test_accumulating_two_gradients_steps_with_their_mean(name):
    optimizer = optax.MultiSteps(CASES[name].make(RATE), every_k_schedule=2)
    params = arrays(PARAMS)
    state = optimizer.init(params)
    half = jax.tree.map(lambda g: jnp.stack([0.5 * g[0], 1.5 * g[0]]), GRADS)
    updates, state = optimizer.update(at(half, 0), state, params)
    assert all((update == 0).all() for update in jax.tree.leaves(updates))
    updates, state = optimizer.update(at(half, 1), state, params)
    assert_close(optax.apply_updates(params, updates), reference(name)[0][0][0])


@every
def test_hyperparameters_can_be_injected(name):
    case = CASES[name]
    rate = {"learning_rate": RATE} if case.takes_rate else {}
    optimizer = optax.inject_hyperparams(case.factory, static_args=case.static)(**case.options, **rate)
    if not case.takes_rate:
        optimizer = optax.chain(optimizer, optax.scale_by_learning_rate(RATE))
    params = arrays(PARAMS)
    state = optimizer.init(params)
    step = jax.jit(step_of(optimizer))
    new_params, new_state = step(params, state, at(GRADS, 0))
    assert_close(new_params, reference(name)[0][0][0])
    assert types(state) == types(new_state)
    if case.takes_rate:  # What is written into the state counts from then on.
        new_state.hyperparams["learning_rate"] = jnp.zeros_like(state.hyperparams["learning_rate"])
        still, _ = step(new_params, new_state, at(GRADS, 1))
        assert_close(still, new_params, rtol=0, atol=0)
        assert step._cache_size() == 1


@every
@pytest.mark.parametrize("injected", [False, True], ids=["passed", "injected"])
def test_a_schedule_sets_the_learning_rate_of_each_step(name, injected):
    schedule = optax.piecewise_constant_schedule(RATE, {1: 0.5})
    case = CASES[name]
    if injected and case.takes_rate:
        case = case._replace(factory=optax.inject_hyperparams(case.factory))
    scheduled, constant = case.make(schedule), CASES[name].make(RATE)
    params = arrays(PARAMS)
    states = scheduled.init(params), constant.init(params)
    for t in range(2):
        updates, expected = [], []
        for optimizer, state, out in zip((scheduled, constant), states, (updates, expected), strict=True):
            out.extend(optimizer.update(at(GRADS, t), state, params))
        states = updates[1], expected[1]
        assert_close(updates[0], jax.tree.map(lambda u, t=t: u * 0.5**t, expected[0]))


@takes_weight_decay
def test_a_schedule_sets_the_weight_decay_of_each_step(name):
    schedule = lambda count: 0.1 * (1.0 + count)  # noqa: E731
    case = CASES[name]
    optimizers = [case.having(weight_decay=decay).make(RATE) for decay in (schedule, 0.1, 0.2)]
    params = arrays(PARAMS)
    states = [optimizer.init(params) for optimizer in optimizers]
    for t in range(2):
        outs = [opt.update(at(GRADS, t), state, params) for opt, state in zip(optimizers, states, strict=True)]
        updates, states = zip(*outs, strict=True)
        assert_close(updates[0], updates[1 + t])
        assert (updates[1]["kernel"] != updates[2]["kernel"]).all()


@every
def test_masked_and_partitioned_trees(name):
    """Leaves that another optimizer takes, or none, are ``MaskedNode`` or absent in every tree."""
    params, grads = arrays(PARAMS), at(GRADS, 0)
    expected = reference(name)[0][0][0]
    masked = optax.masked(CASES[name].make(RATE), {"kernel": True, "bias": False})
    updates, _ = masked.update(grads, masked.init(params), params)
    assert_close(optax.apply_updates(params, updates)["kernel"], expected["kernel"])
    assert_close(updates["bias"], grads["bias"])
    split = optax.partition(
        {"this": CASES[name].make(RATE), "that": optax.sgd(1.0)}, {"kernel": "that", "bias": "this"}
    )
    updates, state = split.update(grads, split.init(params), params)
    assert_close(optax.apply_updates(params, updates)["bias"], expected["bias"])
    assert_close(updates["kernel"], -grads["kernel"])
    split.update(grads, state, params)


@every
def test_chains_and_extra_arguments(name):
    optimizer = optax.chain(optax.clip_by_global_norm(1e6), CASES[name].make(RATE), optax.scale(0.5))
    params = arrays(PARAMS)
    updates, _ = optimizer.update(at(GRADS, 0), optimizer.init(params), params, value=1.0, loss_of_the_moon=2)
    change = jax.tree.map(lambda new, old: (new - old) / 2, reference(name)[0][0][0], PARAMS)
    assert_close(updates, change, atol=1e-5)
    alone = CASES[name].make(RATE)
    alone.update(at(GRADS, 0), alone.init(params), params, loss_of_the_moon=2)


@every
def test_absent_leaves(name):
    optimizer = CASES[name].make(RATE)
    params = arrays(PARAMS) | {"frozen": None, "elsewhere": optax.MaskedNode()}
    grads = at(GRADS, 0) | {"frozen": None, "elsewhere": optax.MaskedNode()}
    state = optimizer.init(params)
    updates, state = optimizer.update(grads, state, params)
    assert updates["frozen"] is None
    assert updates["elsewhere"] == optax.MaskedNode()
    expected = reference(name)[0][0][0]
    assert_close(optax.apply_updates(params, updates), params | expected)
    # A gradient that is missing leaves what belongs to its parameter alone.
    updates, new_state = optimizer.update(grads | {"bias": None}, state, params)
    assert updates["bias"] is None
    assert types(new_state) == types(state)
    for (path, old), (_, new) in zip(*map(jax.tree_util.tree_leaves_with_path, (state, new_state)), strict=True):
        if any(getattr(key, "key", None) == "bias" for key in path):
            np.testing.assert_array_equal(new, old)


@every
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_dtypes_of_updates_and_states_are_stable(name, dtype):
    """Also with a learning rate that is an array, where promotion lurks."""
    with jax.enable_x64(dtype == "float64"):
        params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), PARAMS)
        for rate in (RATE, lambda count: jnp.float32(RATE) / (1 + count)):
            optimizer = CASES[name].make(rate)
            state = jax.eval_shape(optimizer.init, params)
            updates, new_state = jax.eval_shape(optimizer.update, params, state, params)
            assert updates == params
            assert new_state == state
            jax.eval_shape(
                lambda params, state, optimizer=optimizer: jax.lax.cond(
                    state is None, lambda: (params, state), lambda: optimizer.update(params, state, params)
                ),
                params,
                state,
            )
        floats = [leaf.dtype for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        assert set(floats) <= {jnp.dtype(dtype)}


@pytest.mark.parametrize(
    ("name", "option"),
    [(n, option) for n, case in CASES.items() for option in ("mu_dtype", "accumulator_dtype") if case.has(option)],
)
def test_moments_are_kept_in_the_dtype_that_was_asked_for(name, option):
    """In float32 for bfloat16 weights, whose updates stay bfloat16; and rounded after they have been computed."""
    params, grads = arrays(PARAMS), at(GRADS, 0)
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, "bfloat16"), PARAMS)
    wide = CASES[name].having(**{option: "float32"}).make(RATE)
    state = jax.eval_shape(wide.init, half)
    updates, new_state = jax.eval_shape(wide.update, half, state, half)
    assert updates == half
    assert new_state == state
    assert jnp.dtype("float32") in {leaf.dtype for leaf in jax.tree.leaves(state)}
    plain, narrow = CASES[name].make(RATE), CASES[name].having(**{option: "bfloat16"}).make(RATE)
    expected = plain.update(grads, plain.init(params), params)
    updates, new_state = narrow.update(grads, narrow.init(params), params)
    assert_close(updates, expected[0], rtol=0.02, atol=1e-3)
    assert jnp.dtype("bfloat16") in {leaf.dtype for leaf in jax.tree.leaves(new_state)}
    for new, exact in zip(*map(jax.tree.leaves, (new_state, expected[1])), strict=True):
        np.testing.assert_array_equal(new, exact.astype(new.dtype))


@every
def test_half_precision_steps_are_near_float32_ones(name):
    params, grads = (jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), tree) for tree in (PARAMS, at(GRADS, 0)))
    optimizer = CASES[name].make(RATE)
    new, _ = step_of(optimizer)(params, optimizer.init(params), grads)
    assert_close(jax.tree.map(lambda x: x.astype(np.float32), new), reference(name)[0][0][0], rtol=0.02, atol=0.02)


@every
def test_shapes_alone_are_enough_to_initialize_and_states_map_over_parameters(name):
    optimizer = CASES[name].make(RATE)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), PARAMS)
    state = optimizer.init(abstract)
    assert types(state) == types(optimizer.init(arrays(PARAMS)))
    mapped = optax.tree.map_params(optimizer, lambda x: x + 1, state)
    changed = [(a != b).any() for a, b in zip(*map(jax.tree.leaves, (mapped, state)), strict=True)]
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(state)]
    assert [shape != () for shape in shapes] == changed


@every
def test_counts_stop_at_the_greatest_integer(name):
    """A run of more than 2^31 steps goes on with finite updates."""
    greatest = np.iinfo(np.int32).max
    optimizer = CASES[name].make(RATE)
    params = arrays(PARAMS)
    late = jax.tree.map(
        lambda x: jnp.full_like(x, greatest) if jnp.issubdtype(x.dtype, jnp.integer) else jnp.ones_like(x),
        optimizer.init(params),
    )
    updates, after = optimizer.update(at(GRADS, 0), late, params)
    counts = [leaf for leaf in jax.tree.leaves(after) if jnp.issubdtype(leaf.dtype, jnp.integer)]
    assert counts
    assert all(count.dtype == jnp.int32 and count == greatest for count in counts)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))


@every
def test_parameters_are_asked_for_where_they_are_needed(name):
    case = CASES[name]
    optimizer, params = case.make(RATE), arrays(PARAMS)
    state = optimizer.init(params)
    if case.needs_params:
        with pytest.raises(ValueError, match="params"):
            optimizer.update(at(GRADS, 0), state)
    else:
        assert_close(optimizer.update(at(GRADS, 0), state), optimizer.update(at(GRADS, 0), state, params), 0, 0)


@pytest.mark.parametrize("factory", WRONG, ids=lambda factory: factory.__name__)
def test_wrong_options_are_refused_at_once(factory):
    for options in WRONG[factory]:
        required = {"learning_rate": RATE} if "learning_rate" in inspect.signature(factory).parameters else {}
        with pytest.raises(ValueError, match=list(options)[-1]):
            factory(**required | options)


@every
def test_explicit_sharding(name):
    """States are spread like their parameters, before and after an update, and the numbers are those of one device.

    Nothing is copied whole to every device unless the method itself asks for that.
    """
    optimizer = CASES[name].make(RATE)
    params = {"kernel": normal(4, 8, 2), "bias": normal(5, 8)}
    grads = {"kernel": normal(6, 8, 2), "bias": normal(7, 8)}
    expected, _ = optimizer.update(arrays(grads), optimizer.init(params), arrays(params))
    with jax.set_mesh(jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))):
        sharding = jax.NamedSharding(jax.sharding.get_mesh(), jax.P("x"))
        params, grads = jax.device_put((params, grads), sharding)
        state = optimizer.init(params)
        update = jax.jit(optimizer.update).lower(grads, state, params).compile()
        assert ("all-gather" in update.as_text()) == CASES[name].gathers
        updates, new_state = update(grads, state, params)
        assert types(state) == types(new_state)
        assert types(updates) == types(params)
        for leaf in jax.tree.leaves(new_state):
            assert leaf.sharding.is_fully_replicated == (leaf.ndim == 0)
            assert leaf.ndim == 0 or leaf.sharding.spec[0] == "x"
        assert_close(jax.device_get(updates), expected)


@every
def test_a_checkpoint_restores_the_state(name, tmp_path):
    optimizer = CASES[name].make(RATE)
    params, state = arrays(reference(name)[0][1])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        abstract = jax.eval_shape(optimizer.init, params)
        restored = checkpointer.restore(tmp_path / "state", abstract)
    assert_close(restored, state, rtol=0, atol=0)
    assert_close(step_of(optimizer)(params, restored, at(GRADS, 2)), reference(name)[0][2])


@every
def test_nnx_optimizer(name):
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    model.kernel[...], model.bias[...] = PARAMS["kernel"], PARAMS["bias"]
    optimizer = nnx.Optimizer(model, CASES[name].make(RATE), wrt=nnx.Param)
    for t in range(2):
        grads = nnx.grad(lambda model, t=t: sum(jnp.vdot(GRADS[key][t], getattr(model, key)[...]) for key in GRADS))(
            model
        )
        optimizer.update(model, grads)
    assert_close({key: getattr(model, key)[...] for key in PARAMS}, reference(name)[0][1][0])


@every
def test_linen_train_state(name):
    model = nn.Dense(3)
    variables = model.init(jax.random.key(0), jnp.ones((1, 2)))
    assert types(variables["params"]) == types(arrays(PARAMS))
    state = TrainState.create(apply_fn=model.apply, params=arrays(PARAMS), tx=CASES[name].make(RATE))
    for t in range(2):
        state = state.apply_gradients(grads=at(GRADS, t))
    assert_close(state.params, reference(name)[0][1][0])
    assert state.apply_fn({"params": state.params}, jnp.ones((1, 2))).shape == (1, 3)


def test_every_transformation_takes_part():
    makers = {
        name
        for name in poise.optim.__all__
        if inspect.isfunction(maker := getattr(poise.optim, name))
        and "GradientTransformation" in str(inspect.signature(maker).return_annotation)
    }
    assert {"lion_kappa", "adamp", "apply_prox"} <= makers
    assert makers == {case.factory.__name__ for case in CASES.values() if case.factory is not proximal_sgd} | {
        maker.__name__ for maker in INSIDE
    }
    assert makers == {maker.__name__ for maker in WRONG}


def parabola(x):
    return jnp.sum((x - jnp.array([1.0, -1.0, 1.0])) ** 2)


def rosenbrock(x):
    return (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2


def matrix_parabola(x):
    return jnp.sum((x - jnp.array([[3.0, -2.0], [1.0, 4.0]])) ** 2)


def mixed(x):
    vector, matrix = x
    return jnp.sum((vector - jnp.array([1.0, -1.0, 2.0])) ** 2) + jnp.sum(
        (matrix - jnp.array([[1.0, 0.0], [-1.0, 1.0]])) ** 2
    )


# objective, start, solution
PROBLEMS = {
    "parabola": (parabola, np.float32([-1, 10, 1]), np.float32([1, -1, 1])),
    "rosenbrock": (rosenbrock, np.zeros(2, np.float32), np.ones(2, np.float32)),
    "matrix_parabola": (matrix_parabola, np.zeros((2, 2), np.float32), np.float32([[3, -2], [1, 4]])),
    "mixed": (
        mixed,
        (np.zeros(3, np.float32), np.zeros((2, 2), np.float32)),
        (np.float32([1, -1, 2]), np.float32([[1, 0], [-1, 1]])),
    ),
}


@every
def test_convergence_on_four_problems(name):
    """All four in one tree, each of whose leaves an optimizer sees by itself."""
    case = CASES[name]
    optimizer = case.make(optax.exponential_decay(case.rate, 10_000, 1e-3))

    def step(carry, _):
        params, state = carry
        grads = {key: jax.grad(PROBLEMS[key][0])(params[key]) for key in PROBLEMS}
        return step_of(optimizer)(params, state, grads), None

    start = {key: start for key, (_, start, _) in PROBLEMS.items()}
    solution = {key: solution for key, (_, _, solution) in PROBLEMS.items()}
    params, _ = jax.jit(lambda x: jax.lax.scan(step, (x, optimizer.init(x)), length=10_000)[0])(arrays(start))
    assert_close(params, solution, rtol=3e-2, atol=3e-2)
