"""Launchers as processes on one device, stopped on their way, and what two equal runs must share."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np

from poise.launch.checkpoint_tree import restore_tree

CACHE = tempfile.TemporaryDirectory()  # of compiled programs, which all runs of a test file share


def start(module, *flags):
    environment = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", f"poise.launch.{module}", f"--jax_cache_dir={CACHE.name}", *flags]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def launch(module, *flags):
    process = start(module, *flags)
    output, errors = process.communicate()
    assert process.returncode == 0, errors[-4000:]
    return output, errors


def stop_in_phase(phase, module, *flags, workdir):
    """Sends SIGTERM once two steps of the phase are on the disk; the run saves and ends with code 0."""
    process = start(module, *flags, f"--workdir={workdir}", "--save_every=1")
    while process.poll() is None and sum(row["phase"] == phase for row in rows(workdir)) < 2:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 0, errors[-4000:]
    assert f"of phase {phase!r}" in errors.splitlines()[-1], errors


def rows(workdir):
    path = pathlib.Path(workdir) / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def final_bits(workdir):
    """The bytes of the metrics, and every array of each phase's last checkpoint."""
    bits = {}
    for folder in sorted((workdir / "checkpoints").glob("[0-9]*_*")):  # "frozen" holds a part of theirs
        for path, leaf in jax.tree.leaves_with_path(restore_tree(folder)):
            data = jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
            bits[folder.name + jax.tree_util.keystr(path)] = np.asarray(data).tobytes()
    return (workdir / "metrics.jsonl").read_bytes(), bits
