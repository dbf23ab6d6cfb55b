"""The report as one page of HTML that fetches nothing and runs nothing."""

import base64
import hashlib
import importlib.metadata
from collections.abc import Iterable, Sequence
from typing import Any

from poise.launch.report_charts import Line, chart, run_class, swatch
from poise.launch.report_curves import MAX_POINTS
from poise.launch.report_markup import Markup, element
from poise.launch.report_run import REPORT_FILE, RunRecord
from poise.launch.report_style import style
from poise.launch.report_tables import Table, column_texts, plain, tables_of

_MAX_CHARTS, _MAX_PICTURE_BYTES = 150, 12 * 2**20
_FOLDER = "workdir"  # differs always, and stands at the top
_FEW = 10  # settings of some runs only that are told at once


def page(runs: Sequence[RunRecord], title: str, smoothing: float | int) -> str:
    """The page; the same bytes for the same records.

    Args:
      runs: at least one, at most :data:`poise.launch.report_charts.MAX_RUNS`.
      title: its heading; empty for the runs' names.
      smoothing: share of a curve's points that its moving mean spans; 0 for none.
    """
    heading = title or _listed([run.name for run in runs])
    sheet = style(len(runs))
    digest = base64.b64encode(hashlib.sha256(sheet.encode()).digest()).decode()
    # Nothing but this style and pictures that are in the page: no script, no font, no form, nothing from elsewhere.
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    sections = {
        "overview": ("Runs", _overview(runs)),
        "settings": ("Settings", _settings(runs)),
        "results": ("Results", _results(runs)),
        "curves": ("Curves", _curves(runs, smoothing)),
        "pictures": ("Pictures", _pictures(runs)),
        "texts": ("Texts", _texts(runs)),
        "time": ("Time", _time(runs)),
    }
    shown = {name: section for name, section in sections.items() if section[1]}
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="referrer", content="no-referrer"),
        element("title", heading),
        element("style", Markup(sheet)),
    )
    body = element(
        "body",
        *_inputs(len(runs), smoothing),
        element("header", element("h1", heading), element("p", _about(runs), cls="soft")),
        _bar(runs, {name: words for name, (words, _) in shown.items()}, smoothing),
        element(
            "main",
            *(element("section", element("h2", words), *parts, id=name) for name, (words, parts) in shown.items()),
        ),
        element("footer", f"Made by poise.launch.report of poise {importlib.metadata.version('poise')}. {_PRIVACY}"),
    )
    return "<!DOCTYPE html>\n" + element("html", head, body, lang="en") + "\n"


_PRIVACY = "Everything is in this file: it loads nothing, and no script is in it."


def _listed(names: Sequence[str]) -> str:
    if len(names) > 4:
        return f"{', '.join(names[:3])} and {len(names) - 3} more runs"
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _about(runs: Sequence[RunRecord]) -> str:
    number = f"{len(runs)} runs side by side" if len(runs) > 1 else "One run"
    curves = sum(curve.rows > 0 for run in runs for curves in run.curves.values() for curve in curves.values())
    return f"{number}, {curves} curves, {sum(len(run.pictures) for run in runs)} pictures"


def _inputs(num_runs: int, smoothing: float | int) -> list[Markup]:
    """What is switched on; they stand before everything that their states style."""
    found = [_input(f"run{run}", True, f"show run {run + 1}") for run in range(num_runs if num_runs > 1 else 0)]
    if smoothing:
        found.append(_input("smooth", True, "smooth curves"))
    return [*found, _input("log", False, "logarithmic scale")]


def _input(name: str, checked: bool, label: str) -> Markup:
    return element(
        "input", type="checkbox", id=name, cls="toggle", checked="checked" if checked else None, aria_label=label
    )


def _bar(runs: Sequence[RunRecord], sections: dict[str, str], smoothing: float | int) -> Markup:
    several = enumerate(runs) if len(runs) > 1 else ()
    labels = [
        element("label", swatch(i), element("span", run.name, cls="name"), label_for=f"run{i}") for i, run in several
    ]
    if smoothing:
        labels.append(element("label", "smooth", label_for="smooth", cls="switch"))
    labels.append(element("label", "log scale", label_for="log", cls="switch"))
    links = element("nav", *(element("a", words, href=f"#{name}") for name, words in sections.items()))
    return element("div", element("div", *labels, links), cls="bar")


def _overview(runs: Sequence[RunRecord]) -> list[Markup]:
    cards, notes = [], []
    for index, run in enumerate(runs):
        report = run.results.get(REPORT_FILE, {})
        versions = report.get("versions")
        facts = {
            "steps": " · ".join(f"{phase} {steps:,}" for phase, steps in run.steps.items()),
            "time": _duration(sum(run.seconds.values())) if run.seconds else "",
            "seed": plain(run.config.get("seed", report.get("seed", ""))),
            "devices": _devices(report.get("devices")),
            "made with": ", ".join(f"{name} {plain(versions[name])}" for name in ("poise", "jax") if name in versions)
            if isinstance(versions, dict)
            else "",
        }
        rows = [part for name, fact in facts.items() if fact for part in (element("dt", name), element("dd", fact))]
        cards.append(
            element(
                "div",
                element("h3", run.name),
                element("p", run.folder, cls="soft"),
                element("dl", *rows),
                cls=f"card {run_class(index)}",
            )
        )
        notes += [element("li", element("b", run.name), note, cls=f"r{index}") for note in run.notes]
    return [element("div", *cards, cls="cards"), *([element("ul", *notes, cls="notes")] if notes else [])]


def _devices(devices: Any) -> str:
    if not isinstance(devices, list) or not devices:
        return ""
    kinds = {plain(device): devices.count(device) for device in devices[:1000]}
    return ", ".join(f"{number} × {kind}" for kind, number in kinds.items())


def _settings(runs: Sequence[RunRecord]) -> list[Markup]:
    names = list(dict.fromkeys(name for run in runs for name in run.config))[:500]
    if not names:
        return []
    values = {name: [plain(run.config[name]) if name in run.config else None for run in runs] for name in names}
    known = [i for i, run in enumerate(runs) if run.config]
    differing = [name for name in names if len({values[name][i] for i in known}) > 1 and name != _FOLDER]
    common = [name for name in differing if all(values[name][i] is not None for i in known)]
    if len(differing) - len(common) <= _FEW:
        common = differing
    parts = []
    if len(runs) > 1 and common:
        parts.append(_settings_table(runs, {name: values[name] for name in common}))
    elif len(runs) > 1:
        what = "settings that all runs have" if differing else "settings"
        parts.append(element("p", f"All {what} are the same.", cls="soft"))
    if len(common) < len(differing):
        told = element("p", f"{len(differing) - len(common)} more are settings of some runs only.", cls="soft")
        parts.append(told)
    table = _settings_table(runs, values, differing)
    parts.append(element("details", element("summary", f"All {len(names)} settings"), table))
    return parts


def _settings_table(
    runs: Sequence[RunRecord], values: dict[str, list[str | None]], marked: Sequence[str] = ()
) -> Markup:
    rows = [
        element(
            "tr",
            element("th", name, scope="row"),
            *(
                element("td", "–" if value is None else value or "empty", cls=f"r{i}", title=value)
                for i, value in enumerate(cells)
            ),
            cls="differs" if name in marked else None,
        )
        for name, cells in values.items()
    ]
    return _wrapped(element("thead", _heads("", runs)), element("tbody", *rows), cls="settings")


def _heads(first: str, runs: Sequence[RunRecord]) -> Markup:
    cells = [
        element("th", swatch(i), element("span", run.name), cls=f"r{i}", scope="col") for i, run in enumerate(runs)
    ]
    return element("tr", element("th", first, scope="col"), *cells)


def _wrapped(*parts: Markup, cls: str | None = None) -> Markup:
    return element("div", element("table", *parts, cls=cls), cls="wrap", tabindex=0)


def _results(runs: Sequence[RunRecord]) -> list[Markup]:
    files = dict.fromkeys(name for run in runs for name in run.results)
    parts = []
    for name in files:
        tables = tables_of({i: run.results[name] for i, run in enumerate(runs) if name in run.results})
        if tables:
            parts += [element("h3", name), element("div", *(_result(runs, table) for table in tables), cls="tables")]
    return parts


def _result(runs: Sequence[RunRecord], table: Table) -> Markup:
    """A table under its title, with what was left out of it."""
    whole = list(table.records) == [""]
    title, left_out = table.title or ("whole run" if whole else ""), table.left_out
    return element(
        "div",
        element("h4", title) if title else None,
        _by_run(runs, table) if whole else _by_record(runs, table),
        element("p", f"{left_out:,} figures or rows were left out here.", cls="soft") if left_out else None,
    )


def _by_run(runs: Sequence[RunRecord], table: Table) -> Markup:
    """A row for each figure, a column for each run."""
    found, rows = table.records[""], []
    for name in table.figures:
        texts = column_texts([found.get(i, {}).get(name) for i in range(len(runs))])
        cells = [element("td", text, cls=f"r{i}") for i, text in enumerate(texts)]
        rows.append(element("tr", element("th", _spaced(name), scope="row"), *cells))
    return _wrapped(element("thead", _heads("", runs)), element("tbody", *rows))


def _by_record(runs: Sequence[RunRecord], table: Table) -> Markup:
    """A column for each figure; below a record's name a row for each run."""
    places = [(entry, i) for entry, by_run in table.records.items() for i in by_run]
    columns = [column_texts([table.records[entry][i].get(name) for entry, i in places]) for name in table.figures]
    cells = {place: [column[row] for column in columns] for row, place in enumerate(places)}
    only = places[0][1] if len({i for _, i in places}) == 1 else None
    who = [swatch(only), runs[only].name] if only is not None and len(runs) > 1 else []
    head = element("tr", element("th", *who), *(element("th", _spaced(name), scope="col") for name in table.figures))
    bodies = []
    for entry, by_run in table.records.items():
        rows = []
        if only is None:
            rows.append(element("tr", element("th", entry, cls="entry", colspan=len(table.figures) + 1)))
        for i in by_run:
            name = [swatch(i), runs[i].name] if only is None else [entry]
            own = [element("td", text) for text in cells[entry, i]]
            rows.append(element("tr", element("th", *name, scope="row"), *own, cls=f"r{i}"))
        bodies.append(element("tbody", *rows, cls="entry" if only is None else None))
    return _wrapped(element("thead", head), *bodies)


def _spaced(name: str) -> str:
    return name.replace("_", " ")


def _curves(runs: Sequence[RunRecord], smoothing: float | int) -> list[Markup]:
    parts, drawn, left_out = [], 0, 0
    for phase in dict.fromkeys(phase for run in runs for phase in run.curves):
        metrics = dict.fromkeys(metric for run in runs for metric in run.curves.get(phase, ()))
        judged = {title: metric for metric in metrics if (title := metric.removeprefix("eval/")) != metric}
        trained = {metric: metric for metric in metrics if not metric.startswith("eval/")}
        phase_parts = []
        for words, chosen in (("Evaluations", judged), ("While training", trained)):
            charts = []
            for title, metric in chosen.items():
                lines = _lines(runs, phase, metric)
                if lines and drawn < _MAX_CHARTS:
                    charts.append(chart(title, lines, smoothing))
                    drawn += 1
                else:
                    left_out += bool(lines)
            if charts:
                phase_parts += [element("h4", words), element("div", *charts, cls="charts")]
        if phase_parts:
            parts += [element("h3", f"Phase {phase}"), *phase_parts]
    if not parts:
        return []
    if left_out:
        parts.append(element("p", f"{left_out:,} more metrics are not drawn.", cls="soft"))
    told = [
        f"Values by step; beside a run's name its last one. A curve has at most {MAX_POINTS} points: of a longer one "
        "each point is the mean of equally many rows. ",
        "Bands reach from the smallest to the largest value, of a point's rows and of a row's seeds. ",
        f"Smooth lines are centred moving means over {smoothing:.0%} of the points, raw ones lie pale behind them.",
    ]
    return [element("p", *told[: 3 if smoothing else 2], cls="soft"), *parts]


def _lines(runs: Sequence[RunRecord], phase: str, metric: str) -> list[Line]:
    curves = [run.curves.get(phase, {}).get(metric) for run in runs]
    return [Line(i, runs[i].name, curve) for i, curve in enumerate(curves) if curve is not None and curve.rows]


def _pictures(runs: Sequence[RunRecord]) -> list[Markup]:
    parts, size, left_out = [], 0, []
    for name in dict.fromkeys(name for run in runs for name in run.pictures):
        figures = []
        for i, run in enumerate(runs):
            if name not in run.pictures:
                continue
            picture = run.pictures[name]
            if size + len(picture.data) > _MAX_PICTURE_BYTES:
                left_out.append(f"{run.name}: {name}")
                continue
            size += len(picture.data)
            source = f"data:{picture.media_type};base64,{base64.b64encode(picture.data).decode()}"
            shown = element("img", src=source, alt=f"{name} of {run.name}", width=picture.width, height=picture.height)
            caption = element("figcaption", swatch(i), run.name)
            figures.append(element("figure", element("div", shown, cls="shown"), caption, cls=f"r{i}"))
        if figures:
            parts += [element("h3", name), element("div", *figures, cls="pictures")]
    if left_out:
        limit = f"Pictures of more than {_MAX_PICTURE_BYTES // 2**20} MB together are left out: "
        parts.append(element("p", limit + ", ".join(left_out), cls="soft"))
    return parts


def _texts(runs: Sequence[RunRecord]) -> list[Markup]:
    return [
        element(
            "details",
            element("summary", f"{name} of {run.name}"),
            element("pre", *_chunks(text)),
            cls=f"r{i}",
        )
        for i, run in enumerate(runs)
        for name, text in run.texts.items()
    ]


def _chunks(text: str) -> Iterable[str]:
    """Pieces that are short enough not to be cut."""
    return (text[start : start + 200] for start in range(0, len(text), 200))


def _time(runs: Sequence[RunRecord]) -> list[Markup]:
    phases = list(dict.fromkeys(phase for run in runs for phase in run.seconds))
    if not phases:
        return []
    rows = []
    for phase in phases:
        cells = []
        for i, run in enumerate(runs):
            rate = run.rates.get(phase)
            unit = element("span", f"{rate:.3g} steps/s", cls="unit") if rate else None
            there = _duration(run.seconds[phase]) if phase in run.seconds else "–"
            cells.append(element("td", there, unit, cls=f"r{i}"))
        rows.append(element("tr", element("th", phase, scope="row"), *cells))
    totals = [element("td", _duration(sum(run.seconds.values())), cls=f"r{i}") for i, run in enumerate(runs)]
    rows.append(element("tr", element("th", "together", scope="row"), *totals, cls="total"))
    told = element("p", "Wall-clock, compilation and evaluations included; rates as last measured.", cls="soft")
    return [told, _wrapped(element("thead", _heads("phase", runs)), element("tbody", *rows))]


def _duration(seconds: float | int) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
