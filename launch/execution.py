"""The flags that say how a run is executed: checkpoints, devices, cache; they may change when it is resumed."""

import dataclasses
from typing import Any

from poise.launch.config import field


@dataclasses.dataclass(frozen=True)
class HostsConfig:
    """How the processes of a run find each other; see :func:`poise.launch.hosts.join_hosts`."""

    coordinator_address: str = field(
        "", "HOST:PORT of process 0, in a run of several; empty: what the cluster says", role="execution"
    )
    num_processes: int = field(
        0, "processes of the run; 0: what the cluster says; 1: this one alone", role="execution", minimum=0
    )
    process_id: int = field(-1, "this process, from 0; -1: what the cluster says", role="execution", minimum=-1)
    initialization_timeout: int = field(
        300, "seconds to wait for the other processes at the start", role="execution", minimum=1
    )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(HostsConfig):
    """When a run is saved."""

    save_every: int = field(200, "steps between checkpoints; 0: by time alone", role="execution", minimum=0)
    save_every_seconds: float = field(
        60.0, "seconds between checkpoints; 0: by steps alone", role="execution", minimum=0.0
    )
    keep: int = field(2, "checkpoints kept per phase", role="execution", minimum=1)
    check_every: int = field(
        10,
        "steps between looks at the whole state for NaN; 1 tells where one began",
        role="execution",
        minimum=1,
    )
    profile_steps: tuple[int, ...] = field(
        (), "first and last step to profile, such as 10,15; empty: none", role="execution", minimum=1
    )
    jax_cache_dir: str = field("", "folder of JAX's compilation cache; empty: none", role="execution")

    def for_fit(self) -> dict[str, Any]:
        """Those of these settings that :func:`poise.launch.fit` takes, by its names for them."""
        names = ("save_every", "save_every_seconds", "keep", "check_every", "profile_steps")
        return {name: getattr(self, name) for name in names}


@dataclasses.dataclass(frozen=True)
class ExecutionConfig(CheckpointConfig):
    """And how it is spread over devices."""

    parallel: str = field(
        "jit",
        "jit: one program over all devices; pmap: the same on each",
        role="execution",
        choices=("jit", "pmap"),
    )
    mesh: str = field("", "axes of the devices, such as data:4,fsdp:2; empty: all on data", role="execution")
    sharding: str = field(
        "", "layout of parameters, rules REGEX=AXIS,AXIS;...; empty: over fsdp by size", role="execution"
    )

    def for_fit(self) -> dict[str, Any]:
        """Likewise, with mesh and rules."""
        return super().for_fit() | {name: getattr(self, name) for name in ("parallel", "mesh", "sharding")}


@dataclasses.dataclass(frozen=True)
class BatchConfig(ExecutionConfig):
    """And how many examples of a batch are in memory at once."""

    microbatches: int = field(
        1,
        "parts of a batch that networks take one after the other: less memory, a third more arithmetic, other dropout",
        role="execution",
        minimum=1,
    )
