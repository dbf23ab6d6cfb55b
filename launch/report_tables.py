"""The figures of results files as tables of several runs: records that share their names become one table."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

Record = Mapping[str, Any]

# Told elsewhere in the page.
_ELSEWHERE = ("config", "versions", "seconds", "devices", "seed")
_MAX_DEPTH, _MAX_FIGURES, _MAX_RECORDS, _MAX_NAMES = 4, 60, 200, 200
_SHOWN_ENTRIES = 2


class Table(NamedTuple):
    """Figures of records, such as a teacher's and its student's, in several runs.

    Attributes:
      title: what the records have in common; empty for several without a common name, and for the whole run.
      figures: the columns.
      records: by name of the record (empty where it is the only one) and number of the run, its values by figure.
      left_out: how many figures and records were too many.
    """

    title: str
    figures: tuple[str, ...]
    records: Mapping[str, Mapping[int, Record]]
    left_out: int


def tables_of(contents: Mapping[int, Record]) -> list[Table]:
    """Arranges what several runs wrote into files of one name.

    An object whose values are all objects, or a list of objects, is a table with a row for each. Of the other objects
    those that share half of their names or more are one table. What is left are figures of the whole run.

    Args:
      contents: the file's JSON object by number of the run.

    Example:
      >>> from poise.launch.report_tables import tables_of
      >>> content = {"teacher": {"frechet": 0.2}, "student": {"frechet": 0.3}, "updates": 5}
      >>> [(table.figures, list(table.records)) for table in tables_of({0: content})]
      [(('frechet',), ['teacher', 'student']), (('updates',), [''])]
    """
    whole: dict[int, dict[str, Any]] = {}
    titled: dict[str, dict[str, dict[int, Record]]] = {}
    single: dict[str, dict[int, Record]] = {}
    names = [name for name in _union(contents.values()) if name not in _ELSEWHERE]
    for run, content in contents.items():
        for name in names[:_MAX_NAMES]:
            if name not in content:
                continue
            value = content[name]
            entries = _entries(value)
            if entries is not None:
                for entry, record in entries.items():
                    titled.setdefault(name, {}).setdefault(entry, {})[run] = _flat(record)
            elif isinstance(value, dict) and value:
                single.setdefault(name, {})[run] = _flat(value)
            else:
                whole.setdefault(run, {})[name] = value
    groups: list[tuple[set[str], dict[str, dict[int, Record]]]] = []
    for name, records in single.items():
        own = set(_union(records.values()))
        for others, group in groups:
            shared = len(own & others)
            if 2 * shared >= len(own) + len(others) - shared:
                group[name] = records
                break
        else:
            groups.append((own, {name: records}))
    tables = [_table("", group) for _, group in groups if len(group) > 1]
    tables += [_table(title, records) for title, records in titled.items()]
    tables += [_table(title, {"": group[title]}) for _, group in groups if len(group) == 1 for title in group]
    if len(names) > _MAX_NAMES or whole:
        tables.append(_table("", {"": whole}, len(names[_MAX_NAMES:])))
    return [table for table in tables if table.figures or table.left_out]


def _table(title: str, records: Mapping[str, Mapping[int, Record]], left_out: int = 0) -> Table:
    rows = [record for by_run in records.values() for record in by_run.values()]
    lists = {name for row in rows for name, value in row.items() if isinstance(value, list)}
    figures = tuple(sorted(_union(rows), key=lists.__contains__))  # single numbers first
    shown = dict(list(records.items())[:_MAX_RECORDS])
    left_out += max(0, len(figures) - _MAX_FIGURES) + len(records) - len(shown)
    return Table(title, figures[:_MAX_FIGURES], shown, left_out)


def _entries(value: Any) -> dict[str, Record] | None:
    """The records by name, if there are several in a value."""
    if isinstance(value, dict) and value and all(isinstance(entry, dict) for entry in value.values()):
        return value
    if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
        labels = _labels(value)
        if len(set(labels)) < len(value):
            return {str(index + 1): row for index, row in enumerate(value)}
        rows = [{name: entry for name, entry in row.items() if not isinstance(entry, str)} for row in value]
        return dict(zip(labels, rows, strict=True))
    return None


def _labels(rows: Sequence[Record]) -> list[str]:
    """Names of the records of a list: their texts, with as many of their whole numbers as make them differ."""
    labels = [[value for value in row.values() if isinstance(value, str)] for row in rows]
    numbers = [key for key, value in rows[0].items() if type(value) is int][:3]
    for key in numbers:
        if len({tuple(label) for label in labels}) == len(rows):
            break
        labels = [[*label, f"{key} {row.get(key)}"] for label, row in zip(labels, rows, strict=True)]
    return [", ".join(label) for label in labels]


def _flat(record: Record, before: str = "", depth: int = 1) -> dict[str, Any]:
    """Objects within objects as names with a dot between them."""
    found: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, dict) and depth < _MAX_DEPTH:
            found |= _flat(value, f"{before}{name} · ", depth + 1)
        else:
            found[before + name] = value
    return found


def _union(records: Iterable[Record]) -> tuple[str, ...]:
    """All names, in the order in which they come."""
    return tuple(dict.fromkeys(name for record in records for name in record))


def column_texts(values: Sequence[Any]) -> list[str]:
    """Values of one figure as texts that can be compared: numbers get equally many decimals.

    Args:
      values: as JSON has them; a dash stands for None.

    Example:
      >>> from poise.launch.report_tables import column_texts
      >>> column_texts([0.16312, 12.5, None]), column_texts([1797, 64]), column_texts([[0.25, 0.5], "mse"])
      (['0.163', '12.500', '–'], ['1,797', '64'], ['0.250, 0.500', 'mse'])
    """
    floats = [abs(number) for value in values for number in _floats(value) if number]
    decimals, scientific = 0, False
    if floats:
        smallest, largest = min(floats), max(floats)
        decimals = min(6, max(0, 2 - math.floor(math.log10(smallest)))) if largest < 1e5 else 0
        scientific = largest >= 1e7 or largest < 1e-4 or (largest / smallest > 1e5 and smallest < 1e-3)
    return [_text(value, decimals, scientific) for value in values]


def _floats(value: Any) -> list[float]:
    entries = value if isinstance(value, list) else [value]
    return [entry for entry in entries if isinstance(entry, float) and math.isfinite(entry)]


def _text(value: Any, decimals: int, scientific: bool) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) < 10**15 else f"{value:.3e}" if abs(value) < 10**300 else "a huge number"
    if isinstance(value, float):
        if not math.isfinite(value):
            return str(value)
        return f"{value:.3e}" if scientific and value else f"{value:,.{decimals}f}"
    if isinstance(value, list) and len(value) > _SHOWN_ENTRIES and all(type(v) in (int, float) for v in value):
        low, high = _text(min(value), decimals, scientific), _text(max(value), decimals, scientific)
        return f"{len(value)} from {low} to {high}"
    if isinstance(value, list):
        if any(isinstance(entry, list | dict) for entry in value):
            return f"{len(value)} entries"
        return ", ".join(_text(entry, decimals, scientific) for entry in value) or "–"
    return plain(value)


def plain(value: Any) -> str:
    """A value of JSON as a text: texts as they are, all else as in the file, cut where it is long.

    Example:
      >>> from poise.launch.report_tables import plain
      >>> plain("digits"), plain([1, 2]), plain(0.001), plain(False)
      ('digits', '[1, 2]', '0.001', 'false')
    """
    if isinstance(value, str):
        return value
    try:
        text = json.dumps(value)
    except (RecursionError, ValueError):  # too deep, or a number too long to write
        return "…"
    return text if len(text) <= 200 else text[:199] + "…"
