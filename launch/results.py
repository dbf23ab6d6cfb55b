"""What launchers share in telling results: tables of text, ``report.json``, a run's rows of metrics."""

import importlib.metadata
import json
import pathlib
import platform
from collections.abc import Mapping, Sequence
from typing import Any

from poise.launch.files import atomic_path


def text_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of text under their heads; the first column is set to the left, the others to the right.

    Args:
      heads: of the columns.
      rows: as many cells each.

    Example:
      >>> from poise.launch.results import text_table
      >>> print(text_table(["loss", "score"], [["mse", "0.5"], ["hl_gauss", "10.0"]]))
      loss      score
      ---------------
      mse         0.5
      hl_gauss   10.0
    """
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = []
    for row in (heads, *rows):
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip())
    lines.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
    return "\n".join(lines)


def cell(value: float | int | None) -> str:
    """A figure for a table; a dash where it doesn't apply."""
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def write_report(path: pathlib.Path, content: Mapping[str, Any], packages: Sequence[str]) -> None:
    """Writes ``report.json``, whole or not at all, with the versions of what it was made with.

    Args:
      path: the file.
      content: plain values by name.
      packages: whose versions are noted.
    """
    versions = {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}
    text = json.dumps({**content, "versions": versions}, indent=2, sort_keys=True)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_rows(workdir: pathlib.Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of a run's ``metrics.jsonl``, by phase and in order."""
    phases: dict[str, list[dict[str, Any]]] = {}
    for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        phases.setdefault(row["phase"], []).append(row)
    return phases


def phase_folder(workdir: pathlib.Path, index: int, name: str) -> pathlib.Path:
    """Where the checkpoints of a run's phase are."""
    return workdir / "checkpoints" / f"{index:02d}_{name}"
