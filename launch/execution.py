"""The flags that say how a run is executed: checkpoints, devices, cache; they may change when it is resumed."""

import dataclasses

from poise.launch.config import field


@dataclasses.dataclass(frozen=True)
class ExecutionConfig:
    """What launchers that train on several devices share; each hands these to :func:`poise.launch.fit`."""

    save_every: int = field(200, "steps between checkpoints; 0: by time alone", role="execution", minimum=0)
    save_every_seconds: float = field(
        60.0, "seconds between checkpoints; 0: by steps alone", role="execution", minimum=0.0
    )
    keep: int = field(2, "checkpoints kept per phase", role="execution", minimum=1)
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
    jax_cache_dir: str = field("", "folder of JAX's compilation cache; empty: none", role="execution")
