"""Runs over several processes: how they find each other, and how all of them end when one does."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import sys
import threading
from typing import Any

from poise.launch.agreement import HostError, exchange, several
from poise.launch.config import ConfigError

HEARTBEAT_SECONDS = 60  # after so long without a sign of life a process counts as lost, and the others end
FINISH_SECONDS = 7 * 24 * 3600  # process 0 may judge and draw for long after the last step, the others wait
_FLAGS = ("coordinator_address", "num_processes", "process_id")
_OF_A_HOST = {*_FLAGS, "initialization_timeout", "workdir", "data_dir", "jax_cache_dir"}  # may differ between hosts
# What jax and orbax say when another process is gone or fell out of step.
_LOST = (
    "Gloo", "NCCL", "closed by peer", "Connection re", "heartbeat", "coordination", "Barrier", "barrier", "UNAVAILABLE",
    "DEADLINE_EXCEEDED", "CANCELLED", "ABORTED",
)  # fmt: skip


def join_hosts(config: Any) -> bool:
    """Joins the run's processes, before anything touches a device; a run of one process is left alone.

    Flags come first, then what a cluster says in the environment (SLURM and Open MPI with several tasks, a TPU pod,
    multislice, an indexed Kubernetes job with jax's extra ``k8s``), which ``jax.distributed.initialize()`` reads.
    jax's own preemption service is turned off: it would take SIGTERM from :func:`poise.launch.fit`, which agrees on
    the step to stop after by itself.

    Args:
      config: a launcher's settings; without those of :class:`poise.launch.execution.HostsConfig` nothing is joined.

    Returns:
      Whether there are several processes now.

    Raises:
      ConfigError: naming the flag that is missing, bad or contradicts another.
      HostError: if the others can't be reached in time.
    """
    if not hasattr(config, "coordinator_address"):
        return several()
    flags = _given(config)
    found = "" if flags or config.num_processes == 1 else _cluster()
    if not (flags or found):
        return several()
    import jax

    if jax.distributed.is_initialized():
        return several()
    jax.config.update("jax_enable_preemption_service", False)
    method = "deactivate" if flags else found if found in ("slurm", "ompi") else None  # jax looks for the others itself
    where = f"at coordinator_address={config.coordinator_address}" if flags else f"of {found}"
    sentence = (
        f"the run's processes {where} were not joined within initialization_timeout={config.initialization_timeout} "
        "seconds; num_processes=1 makes this a run of its own"
    )
    # jax would abort the process, with a stack trace, when its own time is over.
    clock = threading.Timer(config.initialization_timeout, _leave, (sentence,))
    clock.daemon = True
    clock.start()
    try:
        jax.distributed.initialize(
            **flags,
            cluster_detection_method=method,
            initialization_timeout=config.initialization_timeout + 30,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=FINISH_SECONDS,
        )
    except Exception as error:
        if found == "gcetpu" and isinstance(error, ValueError):  # a TPU of its own
            return several()
        raise HostError(f"{sentence} ({' '.join(str(error).split())[:300]})") from error
    finally:
        clock.cancel()
    return several()


def _leave(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)
    os._exit(1)


def _given(config: Any) -> dict[str, Any]:
    """The flags that say who this process is, all of them or none.

    Raises:
      ConfigError: naming the flag.
    """
    values = {
        "coordinator_address": config.coordinator_address or None,
        "num_processes": config.num_processes or None,
        "process_id": config.process_id if config.process_id >= 0 else None,
    }
    given = {name: value for name, value in values.items() if value is not None}
    if config.num_processes == 1 and config.process_id <= 0:
        return {}
    if not given:
        return {}
    for name in _FLAGS:
        if name not in given:
            raise ConfigError(f"{name} must be given, since {' and '.join(given)} {'is' if len(given) == 1 else 'are'}")
    host, _, port = config.coordinator_address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ConfigError(f"coordinator_address must be HOST:PORT, got {config.coordinator_address!r}")
    if config.process_id >= config.num_processes:
        raise ConfigError(
            f"process_id must be below num_processes={config.num_processes}, since it counts from 0, got "
            f"{config.process_id}"
        )
    return given


def _cluster() -> str:
    """The environment of several tasks that this process was started in, in jax's words; empty for none."""
    env = os.environ
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if _number("OMPI_COMM_WORLD_SIZE") > 1:
        if "OMPI_MCA_orte_hnp_uri" not in env:
            raise ConfigError(
                f"{', '.join(_FLAGS)} must be given: Open MPI started {env['OMPI_COMM_WORLD_SIZE']} processes without "
                "saying where the first one is, as it does from version 5 on; num_processes=1 makes runs of their own"
            )
        return "ompi"
    if all(name in env for name in slurm) and _number("SLURM_NTASKS") > 1:
        return "slurm"
    if "tpu" in env.get("JAX_PLATFORMS", "") or (not env.get("JAX_PLATFORMS") and _has_tpu()):
        workers = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES")
        if _number("MEGASCALE_NUM_SLICES") > 1 or (workers and "," in workers):
            return "gketpu"
        if workers is None and "COLAB_RELEASE_TAG" not in env:
            return "gcetpu"  # or no cluster at all: its metadata server knows
    if {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= set(env) and importlib.util.find_spec("kubernetes"):
        return "k8s"
    return ""


def _has_tpu() -> bool:
    chips = (*pathlib.Path("/dev").glob("accel[0-9]*"), *pathlib.Path("/dev/vfio").glob("[0-9]*"))
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def _number(name: str) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else 0


def same_everywhere(config: Any) -> None:
    """Makes sure that all processes were started with the same flags, but for those that belong to a host.

    Raises:
      ConfigError: naming the flags that differ, with both values.
    """
    if not several():
        return
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in _OF_A_HOST}
    first, *others = (json.loads(text) for text in exchange(json.dumps(settings)))
    for process, other in enumerate(others, 1):
        differences = [
            f"{name} is {json.dumps(value)} in process 0 and {json.dumps(other.get(name))} in process {process}"
            for name, value in first.items()
            if other.get(name) != value
        ]
        if differences:
            raise ConfigError(
                f"all processes must have the same flags: {'; '.join(differences)} (num_processes=1 makes each of them "
                "a run of its own)"
            )


def lost(error: BaseException) -> HostError | None:
    """What a failure says of another process that is gone, or None if it says nothing of the kind."""
    if not several():
        return None
    from jax.errors import JaxRuntimeError

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, HostError):
            return cause
        if isinstance(cause, JaxRuntimeError) and any(word in str(cause) for word in _LOST):
            words = " ".join(str(cause).split())[:200]
            return HostError(
                f"another process of the run ended or can't be reached; what it printed says why ({words}); the last "
                "checkpoint is whole"
            )
        cause = cause.__cause__ or cause.__context__
    return None


def end(prog: str, code: int, alone: bool) -> int:
    """Ends this process's part of a run of several processes; with one it gives the exit code back.

    Where all processes came to the end, or stopped after the same step, they wait for each other. A process that ends
    alone leaves at once, without a word to the others: that is how they notice.

    Args:
      prog: the module's name, for messages.
      code: the exit code.
      alone: whether the other processes may still be at work.

    Returns:
      The exit code.
    """
    if not several():
        return code
    import jax

    if not alone:
        try:
            jax.distributed.shutdown()
            return code
        except Exception as error:
            print(f"{prog}: another process failed at the end: {' '.join(str(error).split())[:200]}", file=sys.stderr)
            code = code or 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
