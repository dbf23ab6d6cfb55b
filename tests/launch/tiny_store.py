"""The tiny run with an object store for its workdir: ``tiny_store.py STORE SCRATCH KILL_AFTER ARGUMENTS...``.

STORE is the folder that ``gs://`` leads to, or ``gcsfs`` for the real thing. SIGKILL comes instead of the change after
KILL_AFTER many; changes of names with REFUSE in them, from the environment, are refused.
"""

import importlib.util
import os
import pathlib
import sys

from poise.launch import lease


def load(name):
    spec = importlib.util.spec_from_file_location(name, pathlib.Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    store, os.environ["POISE_SCRATCH"], kill_after, *sys.argv[1:] = sys.argv[1:]
    if store != "gcsfs":
        load("local_store").use(store, kill_after=int(kill_after), refuse=os.environ.get("REFUSE", ""))
    lease.EXPIRES_SECONDS = 0.5  # of the killed one, which nobody waits for here
    if "--num_processes=2" in sys.argv:
        hosts = load("tiny_hosts")
        sys.exit(hosts.launch(hosts.Config, {}, sys.argv[1:], hosts.run, prog="tiny_hosts", description=""))
    sys.exit(load("tiny_run").main())
