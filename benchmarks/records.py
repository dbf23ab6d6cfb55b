"""What the suites share: the machine that they ran on, tables to read, and a file that keeps both."""

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from poise.launch.files import atomic_path

Row = dict[str, Any]
Tables = Iterator[tuple[str, list[Row]]]
VERSIONS = ("poise", "jax", "jaxlib", "flax", "optax", "torch", "numpy", "adamp", "gymnax", "rejax", "hl-gauss-pytorch")


def version_of(package: str) -> str | None:
    """Its version, None where it isn't installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> Row:
    """What a number means nothing without."""
    versions = {name: version for name in VERSIONS if (version := version_of(name)) is not None}
    return {
        "device": jax.devices()[0].device_kind,
        "backend": jax.default_backend(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        **versions,
    }


def matrix_product_flops(dtype: str) -> float:
    """Operations per second of a large matrix product: the peak that shares are of."""
    size = 8192 if jax.default_backend() == "gpu" else 2048
    a = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul)
    product(a, a).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        product(a, a).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def cell(value: Any) -> str:
    """A number as it is read: three digits, thousands apart, a dash for what is unknown, quartiles from and to."""
    if value is None:
        return "-"
    if isinstance(value, list | tuple):
        return " to ".join(cell(entry) for entry in value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def text_table(rows: list[Row]) -> str:
    """Aligned columns."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, *([cell(row.get(name)) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    aligned = [[entry.rjust(width) for entry, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *row[1:]]) for line, row in zip(lines, aligned, strict=True))


def markdown_table(rows: list[Row]) -> str:
    """The same for a page."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(names) + " |", "|---" + "|---:" * (len(names) - 1) + "|"]
    lines += ["| " + " | ".join(cell(row.get(name)) for name in names) + " |" for row in rows]
    return "\n".join(lines)


def run_suite(
    suite: str,
    parser: argparse.ArgumentParser,
    tables: Callable[[argparse.Namespace], Tables],
    peers: Iterable[str] = (),
) -> None:
    """Reads the flags, shows every table as soon as it is there, and writes them where ``--output`` says.

    A row's ``speedup`` says how many times as fast it is as the first row of its table.

    Args:
      suite: its name.
      parser: of its flags.
      tables: from the flags to titles and rows.
      peers: packages that take part where they are installed; the file says which weren't.
    """
    parser.add_argument("--output", help="a JSON file for the numbers")
    options = parser.parse_args()
    record: Row = {
        "suite": suite,
        "machine": machine(),
        "missing": [name for name in peers if version_of(name) is None],
        "tables": [],
    }
    print(", ".join(f"{name} {value}" for name, value in record["machine"].items()))
    for name in record["missing"]:
        print(f"{name} is not installed and takes no part")
    for title, rows in tables(options):
        print(f"\n{title}\n{text_table(rows)}", flush=True)
        record["tables"].append({"title": title, "rows": rows})
    if options.output:
        path = pathlib.Path(options.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
