"""Training speed of poise's DQN, one seed and several, beside a host-loop DQN in PyTorch; and HL-Gauss beside a port.

    python -m benchmarks.rl --seconds 5

The agents are alike: catch, 32 environments, a perceptron, one update of 64 transitions for every step of all
environments. Compilation is left out. Columns:

  steps/s    environment steps per second of the whole training loop, over all seeds;
  speedup    to the first row.

PyTorch (``pip install torch``) takes part if it is installed, with environments and replay in NumPy, as is usual: with
the same 32 environments, and with one environment and one update every fourth step, as its agents are mostly run. So
does rejax (``pip install rejax``), whose agents run on the device as poise's do, in a table of its own: double DQN with
a squared error, rejax's on gymnax's catch. The last table is of targets encoded and decoded;
hl-gauss-pytorch (``pip install hl-gauss-pytorch``) takes part if it is installed.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.records import Row, Tables, run_suite, version_of
from poise.nets import ValueMLP
from poise.rl import DQNConfig, ValueTransform, catch, dqn, hl_gauss, over_seeds, scalar

ROWS, COLUMNS, ENVS, BATCH, CAPACITY = 10, 5, 32, 64, 50_000
V_MIN, V_MAX, BINS = -1.5, 1.5, 51


def rates_of(contestants: dict[str, Callable[[], int]], seconds: float) -> dict[str, float]:
    """Steps per second: medians over rounds in which all take turns, after one that is not counted."""
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for run in contestants.values():
        run()
    end = time.perf_counter() + seconds * len(contestants)
    while time.perf_counter() < end or len(next(iter(rates.values()))) < 3:
        for name, run in contestants.items():
            start = time.perf_counter()
            steps = run()
            rates[name].append(steps / (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in rates.items()}


def poise_agent(
    seeds: int, hidden: tuple[int, ...], transform: ValueTransform, double: bool = False
) -> Callable[[], int]:
    config = DQNConfig(double=double, num_envs=ENVS, batch_size=BATCH, buffer_size=CAPACITY, iterations=100)
    net = ValueMLP(3, transform.num_outputs, hidden)
    agent = over_seeds(dqn(catch(ROWS, COLUMNS), net, transform, optax.adam(1e-3), config), seeds)
    step = jax.jit(agent.step, donate_argnums=0)
    held = [jax.jit(agent.init)(jax.random.key(0), ()), 0]

    def run() -> int:
        held[1] += 1
        held[0], metrics = step(held[0], (), jax.random.key(held[1]))
        jax.block_until_ready(metrics)
        return seeds * ENVS * config.iterations

    return run


def rejax_agent(hidden: tuple[int, ...]) -> Callable[[], int]:
    """The double DQN of rejax, on gymnax's catch."""
    import gymnax
    from rejax import DQN

    class Joined:
        """An environment of gymnax 1.0 with the one flag for an episode's end that rejax expects."""

        def __init__(self, env):
            self._env = env

        def __getattr__(self, name):
            return getattr(self._env, name)

        def __deepcopy__(self, memo):
            return self

        def step(self, *arguments):
            observation, state, reward, terminated, truncated, more = self._env.step(*arguments)
            return observation, state, reward, terminated | truncated, more

    env, env_params = gymnax.make("Catch-bsuite")
    agent = DQN.create(
        env=Joined(env),
        env_params=env_params,
        num_envs=ENVS,
        batch_size=BATCH,
        buffer_size=CAPACITY,
        fill_buffer=ENVS,
        learning_rate=1e-3,
        total_timesteps=10**8,
        agent_kwargs={"activation": "relu"},
    )
    agent = agent.replace(agent=agent.agent.copy(hidden_layer_sizes=hidden))

    def iterations(state):
        return jax.lax.fori_loop(0, 100, lambda _, state: agent.train_iteration(state), state)

    several = jax.jit(iterations, donate_argnums=0)
    fresh = agent.init_state(jax.random.key(0))
    held = [jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), fresh)]  # no buffer twice, so that all can be donated

    def run() -> int:
        held[0] = jax.block_until_ready(several(held[0]))
        return 100 * ENVS

    return run


def torch_agent(hidden: tuple[int, ...], envs: int = ENVS, every: int = 1) -> Callable[[], int]:
    """A DQN with HL-Gauss whose loop runs in Python."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    rng = np.random.default_rng(0)

    def network():
        widths = (ROWS * COLUMNS, *hidden)
        layers = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
        return nn.Sequential(nn.Flatten(), *layers, nn.Linear(widths[-1], 3 * BINS))

    online, target = network(), network()
    target.load_state_dict(online.state_dict())
    tx = torch.optim.Adam(online.parameters(), 1e-3)
    edges = torch.linspace(V_MIN, V_MAX, BINS + 1)
    centers, sigma = (edges[1:] + edges[:-1]) / 2, 0.75 * (V_MAX - V_MIN) / BINS
    ball, column, paddle = np.zeros(envs, int), rng.integers(COLUMNS, size=envs), np.full(envs, COLUMNS // 2)
    store = {
        "seen": np.zeros((CAPACITY, ROWS, COLUMNS), np.float32),
        "next": np.zeros((CAPACITY, ROWS, COLUMNS), np.float32),
        "action": np.zeros(CAPACITY, np.int64),
        "reward": np.zeros(CAPACITY, np.float32),
        "alive": np.zeros(CAPACITY, np.float32),
    }
    count = {"items": 0, "steps": 0, "updates": 0}

    def draw():
        pictures = np.zeros((envs, ROWS, COLUMNS), np.float32)
        pictures[np.arange(envs), ball, column] = 1
        pictures[np.arange(envs), -1, paddle] = 1
        return pictures

    def values(net, pictures):
        return net(pictures).view(-1, 3, BINS).softmax(-1) @ centers

    def iterate():
        seen = draw()
        with torch.no_grad():
            action = values(online, torch.from_numpy(seen)).argmax(-1).numpy()
        action = np.where(rng.random(envs) < 0.1, rng.integers(3, size=envs), action)
        paddle[:] = np.clip(paddle + action - 1, 0, COLUMNS - 1)
        ball[:] += 1
        over = ball == ROWS - 1
        reward = np.where(over, np.where(paddle == column, 1, -1), 0)
        after = draw()
        place = (count["items"] + np.arange(envs)) % CAPACITY
        for name, item in (("seen", seen), ("next", after), ("action", action), ("reward", reward), ("alive", ~over)):
            store[name][place] = item
        count["items"] += envs
        count["steps"] += 1
        column[over], ball[over], paddle[over] = rng.integers(COLUMNS, size=over.sum()), 0, COLUMNS // 2
        if count["steps"] % every:
            return
        index = rng.integers(min(count["items"], CAPACITY), size=BATCH)
        batch = {name: torch.from_numpy(data[index]) for name, data in store.items()}
        with torch.no_grad():
            y = batch["reward"] + 0.99 * batch["alive"] * values(target, batch["next"]).max(-1).values
            cdf = torch.erf((edges - y.clamp(V_MIN, V_MAX)[:, None]) / (2**0.5 * sigma))
            probs = (cdf[:, 1:] - cdf[:, :-1]) / (cdf[:, -1:] - cdf[:, :1])
        logits = online(batch["seen"]).view(-1, 3, BINS)[torch.arange(BATCH), batch["action"]]
        loss = -(probs * logits.log_softmax(-1)).sum(-1).mean()
        tx.zero_grad()
        loss.backward()
        tx.step()
        count["updates"] += 1
        if count["updates"] % 500 == 0:
            target.load_state_dict(online.state_dict())

    def run() -> int:
        for _ in range(100):
            iterate()
        return 100 * envs

    return run


def poise_transform(size: int) -> Callable[[], int]:
    transform = hl_gauss(-10.0, 10.0, BINS)
    y = jnp.asarray(np.random.default_rng(0).uniform(-10, 10, size), jnp.float32)
    both = jax.jit(lambda y: transform.decode(jnp.log(transform.encode(y) + 1e-9)))

    def run() -> int:
        both(y).block_until_ready()
        return size

    return run


def torch_transform(size: int) -> Callable[[], int]:
    import torch
    from hl_gauss_pytorch import HLGaussLoss

    loss = HLGaussLoss(-10.0, 10.0, BINS, sigma=0.75 * 20 / BINS, clamp_to_range=True)
    y = torch.from_numpy(np.random.default_rng(0).uniform(-10, 10, size).astype(np.float32))

    def run() -> int:
        with torch.no_grad():
            loss.transform_from_probs(loss.transform_to_probs(y))
        return size

    return run


def rows_of(rates: dict[str, float], what: str) -> list[Row]:
    first = next(iter(rates.values()))
    return [{"program": name, what: rate, "speedup": rate / first} for name, rate in rates.items()]


def tables(options: argparse.Namespace) -> Tables:
    hidden, gauss = tuple(options.hidden), hl_gauss(V_MIN, V_MAX, BINS)
    agents = {f"poise, {n} seed{'s' * (n > 1)}": poise_agent(n, hidden, gauss) for n in options.seeds}
    if version_of("torch"):
        agents["PyTorch, 32 environments"] = torch_agent(hidden)
        agents["PyTorch, 1 environment"] = torch_agent(hidden, envs=1, every=4)
    widths = "-".join(map(str, hidden))
    title = f"on catch, perceptron {widths}, the whole training loop"
    yield f"DQN with HL-Gauss {title}", rows_of(rates_of(agents, options.seconds), "steps/s")
    agents = {"poise": poise_agent(1, hidden, scalar(), double=True)}
    if version_of("rejax"):
        agents["rejax"] = rejax_agent(hidden)
    yield f"double DQN with a squared error {title}", rows_of(rates_of(agents, options.seconds), "steps/s")
    transforms = {"poise": poise_transform(options.targets)}
    if version_of("hl-gauss-pytorch"):
        transforms["hl-gauss-pytorch"] = torch_transform(options.targets)
    yield "HL-Gauss, targets encoded and decoded", rows_of(rates_of(transforms, options.seconds), "values/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--hidden", type=int, nargs="+", default=[64, 64], help="widths of the networks")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--targets", type=int, default=100_000, help="values encoded and decoded at once")
    run_suite("rl", parser, tables, peers=("torch", "rejax", "hl-gauss-pytorch"))


if __name__ == "__main__":
    main()
