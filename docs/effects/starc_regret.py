"""How well distances between rewards follow regret: VAL and the minimal form beside EPIC, DARD and no canonical form.

    python docs/effects/starc_regret.py

writes starc_regret.json and starc_regret.png beside itself, and prints a table.
"""

import json
import pathlib
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from poise.rl import normalized_regret, optimal_policy, random_mdp, random_reward, starc_distance

FORMS = ("val", "minimal", "epic", "dard", "none")
MDPS, PAIRS, STEPS, SEEDS = 16, 8, 8, 3


def along_a_line(mdp, key):
    """Mean regret and all distances between a reward and those on the way to another one."""
    first, other = (random_reward(k, mdp) for k in jax.random.split(key))
    ways = jnp.linspace(1 / STEPS, 1, STEPS)[:, None, None, None]
    best = optimal_policy(mdp, first)

    def compare(second):
        losses = normalized_regret(mdp, first, optimal_policy(mdp, second)), normalized_regret(mdp, second, best)
        return sum(losses) / 2, jnp.stack([starc_distance(first, second, mdp, form) for form in FORMS])

    return jax.lax.map(compare, first + ways * (other - first))


@jax.jit
def environment(key):
    """All pairs of rewards of one random environment."""
    mdp = random_mdp(key, 32, 4, 0.95)
    return jax.lax.map(lambda k: along_a_line(mdp, k), jax.random.split(jax.random.fold_in(key, 1), PAIRS))


def main() -> None:
    """Runs it all and writes the results."""
    import matplotlib.pyplot as plt

    start, here = time.time(), pathlib.Path(__file__).parent
    pearson, spearman = [], []
    with jax.enable_x64():
        for seed in range(SEEDS):
            runs = [environment(key) for key in jax.random.split(jax.random.key(seed), MDPS)]
            regret = np.concatenate([np.ravel(r) for r, _ in runs])
            distance = np.concatenate([np.reshape(d, (-1, len(FORMS))) for _, d in runs])
            pearson.append([stats.pearsonr(regret, column)[0] for column in distance.T])
            spearman.append([stats.spearmanr(regret, column)[0] for column in distance.T])
    results = {
        "date": time.strftime("%Y-%m-%d"),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "seconds": round(time.time() - start),
        "environments": MDPS,
        "pairs": PAIRS,
        "steps": STEPS,
        "seeds": SEEDS,
        "pearson_by_seed": {form: [float(row[i]) for row in pearson] for i, form in enumerate(FORMS)},
        "spearman_by_seed": {form: [float(row[i]) for row in spearman] for i, form in enumerate(FORMS)},
    }
    (here / "starc_regret.json").write_text(json.dumps(results, indent=1) + "\n")
    figure, axes = plt.subplots(1, len(FORMS), figsize=(13, 2.9), layout="constrained", sharey=True)
    for axis, form, column in zip(axes, FORMS, distance.T, strict=True):
        axis.plot(column, regret, ".", ms=2, alpha=0.5)
        axis.set(title=f"{form}: r = {np.mean(results['pearson_by_seed'][form]):.2f}", xlabel="distance")
    axes[0].set_ylabel("mean normalized regret")
    figure.savefig(here / "starc_regret.png", dpi=100)
    for form in FORMS:
        print(form, np.round(results["pearson_by_seed"][form], 3), np.round(results["spearman_by_seed"][form], 3))


if __name__ == "__main__":
    main()
