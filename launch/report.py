"""Compares runs in one page that can be mailed: ``python -m poise.launch.report runs/a runs/b --output=report.html``.

The page has the settings that differ, the figures of the results, learning curves, pictures and times. It is one file
of HTML: it loads nothing, runs nothing, and is the same bytes for the same runs. Whatever is missing in a run, or
damaged, is told in the page.
"""

import dataclasses
import os
import pathlib
import sys
from collections.abc import Sequence

from poise.launch.config import ConfigError, field, validate
from poise.launch.main import run_tool
from poise.launch.object_store import checked_address, delivered, is_address, settled


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """The settings of a report; every field but the runs is a flag of the same name."""

    runs: tuple[str, ...] = field((), "folders of runs, finished or not", role="argument")
    output: str = field("report.html", "the file that is written")
    title: str = field("", "heading of the page; empty: the runs' names")
    smoothing: float = field(
        0.05, "share of a curve's points that its moving mean spans; 0: no smooth curves", minimum=0.0, maximum=0.5
    )

    def __post_init__(self):
        """Checks each field, and that the folders differ."""
        validate(self)
        if not self.runs:
            raise ConfigError("runs must name at least one folder, such as runs/digits; got none")
        seen: dict[str, str] = {}
        for run in self.runs:
            place = settled(run) if is_address(run) else os.path.realpath(pathlib.Path(run).expanduser())
            if place in seen:
                raise ConfigError(f"runs must be different folders, got {seen[place]} and {run}")
            seen[place] = run
        if not pathlib.PurePath(self.output).name:
            raise ConfigError(f"output must name a file, got {self.output!r}")
        if is_address(self.output):
            checked_address(self.output, "output")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code, see :func:`poise.launch.main.run_tool`."""
    arguments = sys.argv[1:] if argv is None else argv
    return run_tool(ReportConfig, {}, arguments, run, prog="poise.launch.report", description=__doc__ or "")


def run(config: ReportConfig) -> None:
    """Reads all runs, then writes the page."""
    from poise.launch.files import atomic_path
    from poise.launch.report_charts import MAX_RUNS
    from poise.launch.report_page import page
    from poise.launch.report_run import check_run, read_run

    if len(config.runs) > MAX_RUNS:
        raise ConfigError(f"runs must be at most {MAX_RUNS}, which can still be told apart, got {len(config.runs)}")
    output = config.output if is_address(config.output) else pathlib.Path(config.output).expanduser()
    if isinstance(output, pathlib.Path) and output.is_dir():
        raise ConfigError(f"output must name a file, got the folder {config.output}")
    for folder in config.runs:
        check_run(folder)
    records = [read_run(folder, name) for folder, name in zip(config.runs, run_names(config.runs), strict=True)]
    text = page(records, config.title, config.smoothing)
    with delivered(config.output) as path, atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    notes = sum(len(record.notes) for record in records)
    remarks = f", {notes} remark{'s' * (notes > 1)} in the page" if notes else ""
    print(f"{len(records)} run{'s' * (len(records) > 1)}: {output} ({len(text.encode()) / 1e3:,.0f} kB{remarks})")


def run_names(folders: Sequence[str]) -> list[str]:
    """What the runs are called: the ends of their paths, as long as they must be to differ.

    Example:
      >>> from poise.launch.report import run_names
      >>> run_names(["runs/digits", "runs/b/seed_0", "runs/a/seed_0/"])
      ['digits', 'b/seed_0', 'a/seed_0']
    """
    parts = [pathlib.PurePath(os.path.abspath(os.path.expanduser(folder))).parts for folder in folders]
    names = []
    for own in parts:
        length = 1
        while length < len(own) and sum(other[-length:] == own[-length:] for other in parts) > 1:
            length += 1
        names.append("/".join(own[-length:]))
    return names


if __name__ == "__main__":
    sys.exit(main())
