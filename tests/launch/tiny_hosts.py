"""The tiny run as one of several processes, behind the frame that every launcher has."""

import dataclasses
import importlib.util
import os
import pathlib
import sys
import time

import numpy as np

from poise.launch.config import field
from poise.launch.execution import ExecutionConfig
from poise.launch.main import launch


@dataclasses.dataclass(frozen=True)
class Config(ExecutionConfig):
    """Those of a launcher, and what makes a run easy to disturb."""

    workdir: str = field("", "folder", role="execution")
    save_every: int = field(5, "steps between checkpoints", role="execution", minimum=0)
    save_every_seconds: float = field(0.0, "seconds between checkpoints", role="execution", minimum=0.0)
    slow: float = field(0.0, "seconds that each evaluation takes", role="execution", minimum=0.0)
    width: int = field(3, "numbers in an example", minimum=1)
    batch_size: int = field(8, "examples", minimum=1)
    differ: str = field("", "what is another in each process", role="execution", choices=("", "data", "start"))
    watch: str = field("", "says on stderr which files it opens to write", role="execution", choices=("", "writes"))


def tell(event, arguments):
    """Every file of the run that Python opens to write, every folder it makes and every name it gives."""
    name, flags = (str(arguments[0]), arguments[2]) if event == "open" else (str((*arguments, "")[0]), 0)
    writes = event in ("os.mkdir", "os.rename") or (flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    if writes and name.startswith(FOLDER):
        print(event, name, file=sys.stderr)


def own_data(batch_size, cycle=None, width=3):
    """Examples that no other process has."""
    from poise.launch.data import InMemory

    rng = np.random.default_rng(os.getpid())
    return InMemory({"x": rng.normal(size=(40, width)), "y": rng.normal(size=40)}, batch_size, 7, cycle)


def run(config, workdir):
    from poise.launch.agreement import is_main
    from poise.launch.loop import fit

    path = pathlib.Path(__file__).with_name("tiny_run.py")
    spec = importlib.util.spec_from_file_location("tiny_run", path)
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    if config.differ == "data":
        tiny.data = own_data
    result = fit(
        tiny.phases(batch_size=config.batch_size, width=config.width, after_evaluation=lambda: time.sleep(config.slow)),
        workdir=workdir,
        seed=3,
        start={"w": np.full(3, config.process_id)} if config.differ == "start" else None,
        **config.for_fit(),
    )
    print("restored", result.restored, "trained", result.steps_trained, "main", is_main(), flush=True)
    assert all(leaf.is_fully_addressable for leaf in __import__("jax").tree.leaves(result.state))


if __name__ == "__main__":
    FOLDER = next(word.partition("=")[2] for word in sys.argv if word.startswith("--workdir="))
    if "--watch=writes" in sys.argv:
        sys.addaudithook(tell)
    sys.exit(launch(Config, {}, sys.argv[1:], run, prog="tiny_hosts", description=__doc__))
