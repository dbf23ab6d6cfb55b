"""DPO beside token-level DPO and SparsePO where one token decides what is preferred: who leaves the rest alone?

    python docs/effects/sparse_po_trigger.py

writes sparse_po_trigger.json and sparse_po_trigger.png beside itself, and prints a table.
"""

import functools
import json
import pathlib
import platform
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from poise.launch.trigger_task import GOOD, TRIGGER, VOCAB, trigger_source, trigger_texts
from poise.nets import SparseTokenMask
from poise.rl import dpo_loss, mapo_mask, mask_sparsity, sparse_po_loss, tdpo_loss, token_forward_kl, token_logprobs

LENGTH, PAIRS, STEPS, BETA = 17, 1000, 400, 0.5
METHODS = ("dpo", "tdpo1", "mapo", "sparse_common", "sparse_independent", "sparse_common_l1")


class LanguageModel(nn.Module):
    """Two residual blocks on the embedding of the last token; the source is a bigram, so that no more is needed."""

    @nn.compact
    def __call__(self, tokens):
        """Logits and the layers' hidden states."""
        h = nn.Embed(VOCAB, 32)(tokens)
        layers = []
        for _ in range(2):
            h = h + nn.Dense(32)(nn.gelu(nn.Dense(64)(nn.LayerNorm()(h))))
            layers.append(h)
        return nn.Dense(VOCAB)(nn.LayerNorm()(h)), jnp.stack(layers)


def descend(loss, params, steps, rate, key):
    """Adam on a loss of parameters and a key."""
    tx = optax.adam(rate)

    def step(carry, key):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params, key), state)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), jax.random.split(key, steps))[0][0]


@functools.partial(jax.jit, static_argnames="method")
def experiment(seed, method):
    """Pretrains, trains on preferences by one method, and measures on new texts."""
    keys = jax.random.split(jax.random.key(seed), 9)
    source = trigger_source(keys[0])
    texts = functools.partial(trigger_texts, source=source, length=LENGTH)
    model = LanguageModel()
    corpus = texts(keys[1], 2000, good_share=0.5)

    def pretraining(params, key):
        batch = corpus[jax.random.randint(key, (64,), 0, len(corpus))]
        return -token_logprobs(model.apply(params, batch[:, :-1])[0], batch[:, 1:]).mean()

    ref = descend(pretraining, model.init(keys[2], corpus[:1]), 1500, 3e-3, keys[3])
    chosen, rejected = (texts(k, PAIRS, good_share=share) for k, share in ((keys[4], 1.0), (keys[5], 0.0)))
    net = SparseTokenMask(2)
    mask_params = [net.init(k, jnp.zeros((2, 1, 1, 32))) for k in jax.random.split(keys[6])]

    def look(params, tokens):
        logits, _ = model.apply(params, tokens[:, :-1])
        base, hidden = model.apply(ref, tokens[:, :-1])
        labels = tokens[:, 1:]
        return token_logprobs(logits, labels), token_logprobs(base, labels), token_forward_kl(logits, base), hidden

    def preference(params, key):
        policy, masks = params
        index = jax.random.randint(key, (64,), 0, PAIRS)
        good, bad = look(policy, chosen[index]), look(policy, rejected[index])
        count = jnp.ones(good[0].shape, bool)
        ordered = (good[0], bad[0], good[1], bad[1])
        if method == "dpo":
            return dpo_loss(*ordered, count, count, beta=BETA).mean()
        if method == "tdpo1":
            return tdpo_loss(*ordered, good[2], bad[2], count, count, beta=BETA, version=1).mean()
        if method == "mapo":
            rewards = divergences = tuple(mapo_mask(side[3], count) for side in (good, bad))
        else:
            rewards = tuple(net.apply(masks[0], side[3]) for side in (good, bad))
            second = masks[1] if method == "sparse_independent" else masks[0]
            divergences = tuple(net.apply(second, side[3]) for side in (good, bad))
        weight = 1e-3 if method.endswith("l1") else 0.0
        options = {"reward_mask": rewards, "kl_mask": divergences, "l1_reward": weight, "l1_kl": weight}
        return sparse_po_loss(*ordered, good[2], bad[2], count, count, beta=BETA, **options).mean()

    policy, masks = descend(preference, (ref, mask_params), STEPS, 1e-3, keys[7])
    tokens = texts(keys[8], 500, good_share=0.5)
    at_trigger = tokens[:, :-1] == TRIGGER
    _, _, kl, hidden = look(policy, tokens)
    probs = jax.nn.softmax(model.apply(policy, tokens[:, :-1])[0])
    weights = net.apply(masks[0], hidden)

    def mean(values, where):
        return jnp.sum(jnp.where(where, values, 0)) / jnp.sum(where)

    return {
        "good_after_trigger": mean(probs[..., jnp.array(GOOD)].sum(-1), at_trigger),
        "kl_elsewhere": mean(kl, ~at_trigger),
        "kl_at_trigger": mean(kl, at_trigger),
        "mask_at_trigger": mean(weights, at_trigger),
        "mask_elsewhere": mean(weights, ~at_trigger),
        "mask_zeros": mask_sparsity(weights, jnp.ones(weights.shape, bool)).mean(),
    }


def main() -> None:
    """Runs it all and writes the results."""
    start, here, seeds = time.time(), pathlib.Path(__file__).parent, range(3)
    runs = {}
    for method in METHODS:
        seen = [jax.tree.map(float, experiment(seed, method)) for seed in seeds]
        runs[method] = {name: [run[name] for run in seen] for name in seen[0]}
        if "sparse" not in method:
            runs[method] = {name: values for name, values in runs[method].items() if "mask" not in name}
        print(method, {name: round(float(np.mean(values)), 4) for name, values in runs[method].items()}, flush=True)
    results = {
        "date": time.strftime("%Y-%m-%d"),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "seconds": round(time.time() - start),
        "seeds": list(seeds),
        "beta": BETA,
        "runs": runs,
    }
    (here / "sparse_po_trigger.json").write_text(json.dumps(results, indent=1) + "\n")
    picture(runs, here / "sparse_po_trigger.png")


def picture(runs: dict[str, dict[str, list[float]]], path: pathlib.Path) -> None:
    """Draws each method's seeds and their mean."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 2.8), layout="constrained")
    for row, figures in enumerate(runs.values()):
        values = figures["kl_elsewhere"]
        axis.scatter(values, [row] * len(values), s=18, alpha=0.6)
        axis.plot([np.mean(values)] * 2, [row - 0.3, row + 0.3], color="black", lw=1.5)
    axis.set_yticks(range(len(runs)), [method.replace("_", " ") for method in runs])
    axis.invert_yaxis()
    axis.set_xlim(left=0)
    axis.grid(axis="x", alpha=0.3)
    axis.set_xlabel("KL to the reference off the trigger, each seed and the mean")
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
