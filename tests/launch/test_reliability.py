"""Every launcher, killed again and again at moments drawn at random: it ends bit for bit as one that nobody touched.

A launcher joins by a line in LAUNCHERS. The figures of a run stand in docs/guides/reliability.md; to see them:

    pytest -m effects -s tests/launch/test_reliability.py
"""

import importlib.util
import os
import pathlib
import random
import subprocess
import time

import pytest

spec = importlib.util.spec_from_file_location("tiny_launch", pathlib.Path(__file__).with_name("tiny_launch.py"))
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)

KILLS = 8  # of each launcher, 56 in all
# Module and flags of a run that takes seconds.
LAUNCHERS = {
    "distill, mixture": ("distill", "--recipe=mixture2d", "--warmup_steps=20", "--steps=20", "--batch_size=16",
                         "--fake_updates=1", "--eval_every=10"),
    "distill, digits": ("distill", "--recipe=smoke"),
    "lm": ("lm", "--recipe=smoke", "--steps=20", "--width=8", "--eval_tokens=128", "--sample_tokens=6"),
    "preference": ("preference", "--num_layers=1", "--width=4", "--num_pairs=12", "--num_held_out=10",
                   "--pretrain_steps=40", "--steps=40", "--batch_size=4", "--eval_every=20"),
    "ptq": ("ptq", "--recipe=smoke", "--float_steps=12"),
    "qat": ("qat", "--recipe=smoke", "--steps=12", "--cga_steps=8", "--float_steps=12", "--num_heads=2"),
    "value": ("value", "--num_seeds=2", "--updates=100", "--updates_per_step=2", "--num_envs=2", "--batch_size=4",
              "--buffer_size=20", "--min_history=4", "--hidden=4", "--eval_episodes=3"),
}  # fmt: skip


@pytest.mark.effects
@pytest.mark.parametrize("name", LAUNCHERS)
def test_killed_again_and_again_it_ends_the_same(name, tmp_path):
    module, *flags = LAUNCHERS[name]
    tiny.launch(module, *flags, f"--workdir={tmp_path}/compiles")  # what others find in the cache
    began = time.monotonic()
    tiny.launch(module, *flags, f"--workdir={tmp_path}/undisturbed")
    whole = time.monotonic() - began
    untouched = tiny.final_bits(tmp_path / "undisturbed")

    def assert_ends_the_same(workdir):
        _, errors = tiny.launch(module, *flags, f"--workdir={workdir}", "--save_every=3")
        assert "damaged" not in errors  # what a kill leaves is never taken for a checkpoint
        assert tiny.final_bits(workdir) == untouched

    seed = int.from_bytes(os.urandom(4))
    print(f"\n{name}: a whole run takes {whole:.1f} s, delays are drawn with seed {seed}")
    rng, runs, steps = random.Random(seed), 0, []
    for kill in range(KILLS):
        workdir = tmp_path / f"killed{runs}"
        process = tiny.start(module, *flags, f"--workdir={workdir}", "--save_every=3")
        delay = rng.uniform(0.2, 0.9) * whole
        print(f"  kill {kill} after {delay:.1f} s", end=", ")
        try:
            process.communicate(timeout=delay)
            print("which it had finished before")
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            rows = tiny.rows(workdir)
            steps.append((rows[-1]["phase"], rows[-1]["step"]) if rows else ("the beginning", 0))
            print("at {}, step {}".format(*steps[-1]))
        if process.returncode == 0 or len(steps) % 3 == 0:  # the next ones hit a run that is young again
            assert_ends_the_same(workdir)
            runs += 1
    assert_ends_the_same(tmp_path / f"killed{runs}")
    assert len(steps) >= KILLS // 2
