"""Training speed of poise's DQN, one seed and several, beside a host-loop DQN in PyTorch; and HL-Gauss beside a port.

    python benchmarks/rl.py --seconds 5

The agents are alike: catch, 32 environments, perceptrons 256-128, one update of 64 transitions for every step of all
environments. Compilation is left out. Columns:

  steps/s    environment steps per second of the whole training loop, over all seeds;
  ratio      to one seed of poise.

PyTorch (``pip install torch``) takes part if it is installed, with environments and replay in NumPy, as is usual, and
so does hl-gauss-pytorch (``pip install hl-gauss-pytorch``) in the second table, of targets encoded and decoded.
"""

import argparse
import importlib.util
import json
import platform
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from poise.nets import ValueMLP
from poise.rl import DQNConfig, catch, dqn, hl_gauss, over_seeds

ROWS, COLUMNS, ENVS, BATCH, CAPACITY = 10, 5, 32, 64, 50_000
V_MIN, V_MAX, BINS = -1.5, 1.5, 51


def rate_of(run: Callable[[], int], seconds: float) -> float:
    """Steps per second: the median over rounds, after one round that is not counted."""
    run()
    rates, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(rates) < 3:
        start = time.perf_counter()
        steps = run()
        rates.append(steps / (time.perf_counter() - start))
    return statistics.median(rates)


def poise_agent(seeds: int) -> Callable[[], int]:
    transform = hl_gauss(V_MIN, V_MAX, BINS)
    config = DQNConfig(num_envs=ENVS, batch_size=BATCH, buffer_size=CAPACITY, iterations=100)
    net = ValueMLP(3, transform.num_outputs)
    agent = over_seeds(dqn(catch(ROWS, COLUMNS), net, transform, optax.adam(1e-3), config), seeds)
    step = jax.jit(agent.step, donate_argnums=0)
    held = [jax.jit(agent.init)(jax.random.key(0), ()), 0]

    def run() -> int:
        held[1] += 1
        held[0], metrics = step(held[0], (), jax.random.key(held[1]))
        jax.block_until_ready(metrics)
        return seeds * ENVS * config.iterations

    return run


def torch_agent() -> Callable[[], int]:
    """A DQN with HL-Gauss whose loop runs in Python."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    rng = np.random.default_rng(0)

    def network():
        layers = (nn.Linear(ROWS * COLUMNS, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 3 * BINS))
        return nn.Sequential(nn.Flatten(), *layers)

    online, target = network(), network()
    target.load_state_dict(online.state_dict())
    tx = torch.optim.Adam(online.parameters(), 1e-3)
    edges = torch.linspace(V_MIN, V_MAX, BINS + 1)
    centers, sigma = (edges[1:] + edges[:-1]) / 2, 0.75 * (V_MAX - V_MIN) / BINS
    ball, column, paddle = np.zeros(ENVS, int), rng.integers(COLUMNS, size=ENVS), np.full(ENVS, COLUMNS // 2)
    store = {
        "seen": np.zeros((CAPACITY, ROWS, COLUMNS), np.float32),
        "next": np.zeros((CAPACITY, ROWS, COLUMNS), np.float32),
        "action": np.zeros(CAPACITY, np.int64),
        "reward": np.zeros(CAPACITY, np.float32),
        "alive": np.zeros(CAPACITY, np.float32),
    }
    count = {"items": 0, "updates": 0}

    def draw():
        pictures = np.zeros((ENVS, ROWS, COLUMNS), np.float32)
        pictures[np.arange(ENVS), ball, column] = 1
        pictures[np.arange(ENVS), -1, paddle] = 1
        return pictures

    def values(net, pictures):
        return net(pictures).view(-1, 3, BINS).softmax(-1) @ centers

    def iterate():
        seen = draw()
        with torch.no_grad():
            action = values(online, torch.from_numpy(seen)).argmax(-1).numpy()
        action = np.where(rng.random(ENVS) < 0.1, rng.integers(3, size=ENVS), action)
        paddle[:] = np.clip(paddle + action - 1, 0, COLUMNS - 1)
        ball[:] += 1
        over = ball == ROWS - 1
        reward = np.where(over, np.where(paddle == column, 1, -1), 0)
        after = draw()
        place = (count["items"] + np.arange(ENVS)) % CAPACITY
        for name, item in (("seen", seen), ("next", after), ("action", action), ("reward", reward), ("alive", ~over)):
            store[name][place] = item
        count["items"] += ENVS
        column[over], ball[over], paddle[over] = rng.integers(COLUMNS, size=over.sum()), 0, COLUMNS // 2
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
        return 100 * ENVS

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--targets", type=int, default=100_000, help="values encoded and decoded at once")
    parser.add_argument("--json", help="a file for the results")
    args = parser.parse_args()
    has = {name: importlib.util.find_spec(name) is not None for name in ("torch", "hl_gauss_pytorch")}
    print(f"{platform.processor() or platform.machine()}, jax {jax.__version__} on {jax.devices()[0].device_kind}")
    training = {f"poise, {n} seed{'s' * (n > 1)}": rate_of(poise_agent(n), args.seconds) for n in args.seeds}
    if has["torch"]:
        training["PyTorch, host loop, 1 seed"] = rate_of(torch_agent(), args.seconds)
    first = next(iter(training.values()))
    print(f"{'training loop':32} {'steps/s':>10} {'ratio':>7}")
    for name, rate in training.items():
        print(f"{name:32} {rate:10.0f} {rate / first:7.2f}")
    transforms = {"poise": rate_of(poise_transform(args.targets), args.seconds)}
    if has["hl_gauss_pytorch"]:
        transforms["hl-gauss-pytorch"] = rate_of(torch_transform(args.targets), args.seconds)
    print(f"{'HL-Gauss, encode and decode':32} {'values/s':>10}")
    for name, rate in transforms.items():
        print(f"{name:32} {rate:10.3g}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"training": training, "transforms": transforms}, file, indent=1)


if __name__ == "__main__":
    main()
