"""The page that compares runs: what is in it, that it is whole by itself, and that nothing in a folder is trusted."""

import base64
import hashlib
import html.parser
import importlib.util
import io
import json
import os
import pathlib
import re
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from poise.launch import report, report_page, report_run
from poise.launch.report_charts import MAX_RUNS, Line, chart
from poise.launch.report_curves import MAX_POINTS, Curve, smoothed
from poise.launch.report_run import read_run

spec = importlib.util.spec_from_file_location("tiny_run", pathlib.Path(__file__).with_name("tiny_run.py"))
tiny_run = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny_run)

EVIL = "\"><script>alert(1)</script>'&amp;\u202e\x00\ud800"
VOID = {"meta", "img", "input"}
TAGS = {
    *("html", "head", "meta", "title", "style", "body", "header", "main", "footer", "section", "nav", "div"),
    *("h1", "h2", "h3", "h4", "p", "pre", "b", "a", "span", "input", "label", "ul", "li", "dl", "dt", "dd"),
    *("details", "summary", "table", "thead", "tbody", "tr", "th", "td", "figure", "figcaption", "img"),
    *("svg", "g", "path", "text"),
}


class Page(html.parser.HTMLParser):
    """Checks that every element is closed in order and collects elements with their attributes and texts."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, len(self.texts)))

    def handle_endtag(self, tag):
        last, start = self.open.pop()
        assert last == tag
        for known, attributes in reversed(self.elements):
            if known == tag and "text" not in attributes:
                attributes["text"] = "".join(self.texts[start:])
                break

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(self.texts)

    def find(self, tag, cls=None):
        return [
            attributes
            for name, attributes in self.elements
            if name == tag and (cls is None or cls in (attributes.get("class") or "").split())
        ]

    def cells(self):
        """Rows of all tables, as texts."""
        rows = []
        for tag, attributes in self.elements:
            if tag == "tr":
                rows.append([])
            elif tag in ("th", "td"):
                rows[-1].append(attributes["text"])
        return rows


def png(size=(4, 4), kind="PNG"):
    file = io.BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(file, kind)
    return file.getvalue()


def make_run(folder, rows=(), config=None, timing=(), **files):
    """A run's folder by hand; files by name, an underscore for the dot, as objects or bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = {"metrics.jsonl": rows, "timing.jsonl": timing}
    for name, entries in lines.items():
        (folder / name).write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    contents = {"config_json": {"seed": 0} if config is None else config, "report_json": {}} | files
    for name, content in contents.items():
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / name.replace("_", ".")).write_bytes(data)
    return str(folder)


def losses(values, phase="train", **more):
    return [{"phase": phase, "step": step, "loss": value, **more} for step, value in enumerate(values, 1)]


def make_page(tmp_path, *runs, flags=()):
    output = tmp_path / "out" / "page.html"
    assert report.main([*runs, f"--output={output}", *flags]) == 0
    text = output.read_text(encoding="utf-8")
    assert [path.name for path in output.parent.iterdir()] == ["page.html"]
    return text, Page(text)


def check_self_contained(text, parsed):
    """Nothing is loaded or run, and what the policy allows is what there is."""
    assert {tag for tag, _ in parsed.elements} <= TAGS
    for tag, attributes in parsed.elements:
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert name not in ("style", "srcset", "action", "formaction", "poster", "data", "background", "xlink:href")
            if name == "src":
                assert tag == "img"
                assert re.match(r"data:image/(png|gif|jpeg);base64,[A-Za-z0-9+/=]+$", value)
            if name == "href":
                assert tag == "a"
                assert value.startswith("#")
                assert value[1:] in {attributes.get("id") for _, attributes in parsed.elements}
    (sheet,) = parsed.find("style")
    assert not re.search(r"url\(|@import|expression|\\", sheet["text"])
    digest = base64.b64encode(hashlib.sha256(sheet["text"].encode()).digest()).decode()
    (policy,) = [meta["content"] for meta in parsed.find("meta") if meta.get("http-equiv")]
    assert policy == (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    assert "http:" not in text
    assert "https:" not in text


def test_a_real_run_beside_a_longer_one(tmp_path):
    tiny_run.run(tmp_path / "short")
    make_run(tmp_path / "long", losses(range(1, 41), phase="teacher"))
    text, parsed = make_page(tmp_path, f"{tmp_path}/short", f"{tmp_path}/long")
    check_self_contained(text, parsed)
    assert [part["text"] for part in parsed.find("h3") if part["text"].startswith("Phase")] == [
        "Phase teacher", "Phase warmup", "Phase student",
    ]  # fmt: skip
    metrics = [part["text"] for part in parsed.find("span", "metric")]
    assert sorted(metrics) == sorted(
        ["grad_norm", "improving", "loss", "loss_0", "loss_1", "gap", "loss_0", "loss_1"]
    )  # `nothing` was None throughout
    assert "There is no config.json" in parsed.text
    rows = [json.loads(line) for line in (tmp_path / "short/metrics.jsonl").read_text().splitlines()]
    gap = [row["eval/gap"] for row in rows if "eval/gap" in row]
    lasts = [part["text"] for part in parsed.find("span", "last")]
    assert f"{gap[-1]:.3f}" in lasts
    dots = [part["d"].count("h0") for part in parsed.find("path", "dots")]
    # On both scales: the short run's three metrics of the teacher but one that is 0 at times, then the long one's loss.
    assert dots[:7] == [12, 12, 12, 12, 40, 12, 40]
    assert dots[-6:-4] == [len(gap)] * 2
    times = {row[0]: row[1:] for row in parsed.cells() if len(row) == 3}
    assert re.fullmatch(r"\d+\.\d s( *[\d.e+]+ steps/s)?", times["teacher"][0])
    assert times["teacher"][1] == "–"


def test_settings_that_differ_and_all_of_them(tmp_path):
    common = {"seed": 0, "workdir": "w", "widths": [1, 2]}
    a = make_run(tmp_path / "a", config=common | {"rate": 0.1}, data_json={"digest": "x"})
    b = make_run(tmp_path / "b", config=common | {"rate": 0.2, "workdir": "v"}, data_json={"digest": "y"})
    c = make_run(tmp_path / "c", config=common | {"extra": ""}, data_json={"digest": "y"})
    _, parsed = make_page(tmp_path, a, b, c)
    assert len(parsed.find("table", "settings")) == 2
    heads = ["", "a", "b", "c"]
    rows = parsed.cells()
    start = rows.index(heads)
    differences = [["rate", "0.1", "0.2", "–"], ["data.json: digest", "x", "y", "y"], ["extra", "–", "–", "empty"]]
    assert sorted(rows[start + 1 : start + 4]) == sorted(differences)
    assert rows[start + 4] == heads
    everything = rows[start + 5 : start + 11]
    assert sorted(everything) == sorted(
        [*differences, ["seed", "0", "0", "0"], ["widths", *3 * ["[1, 2]"]], ["workdir", "w", "v", "w"]]
    )
    marked = [part["text"] for part in parsed.find("tr", "differs")]
    assert len(marked) == 3  # the folder isn't one of them
    _, parsed = make_page(tmp_path, b)
    assert len(parsed.find("table", "settings")) == 1
    make_run(tmp_path / "d", config=common | {"rate": 0.2, "workdir": "u"}, data_json={"digest": "y"})
    assert "All settings are the same." in make_page(tmp_path, b, f"{tmp_path}/d")[1].text


def test_settings_of_some_runs_only_stand_aside_where_they_are_many(tmp_path):
    a = make_run(tmp_path / "a", config={"seed": 0, "rate": 1, **{f"a{i}": i for i in range(11)}})
    b = make_run(tmp_path / "b", config={"seed": 0, "rate": 2})
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "metrics.jsonl").write_text("")
    _, parsed = make_page(tmp_path, a, b, f"{tmp_path}/c")
    rows = parsed.cells()
    start = rows.index(["", "a", "b", "c"])
    assert rows[start + 1 : start + 3] == [["rate", "1", "2", "–"], ["", "a", "b", "c"]]
    assert "11 more are settings of some runs only." in parsed.text
    assert len(parsed.find("tr", "differs")) == 12


def test_figures_of_results_stand_side_by_side(tmp_path):
    def content(shift):
        return {
            "student": {"frechet": 0.25 + shift, "nfe": 1},
            "teacher": {"frechet": 0.125 + shift, "nfe": 35},
            "rows": [{"method": "rtn", "bits": 2, "error": 1.5}, {"method": "rtn", "bits": 4, "error": 0.5 + shift}],
            "updates": 400,
            "config": {"hidden_setting": 1},
            "versions": {"jax": "0.10.2", "poise": "0.1.0"},
        }

    a = make_run(tmp_path / "a", report_json=content(0.0))
    b = make_run(tmp_path / "b", report_json=content(0.5), evaluation_json={"recall": 0.5, "none": None})
    rows = make_page(tmp_path, a, b)[1].cells()
    start = rows.index(["", "frechet", "nfe"])
    assert rows[start + 1 : start + 7] == [
        ["student"], ["a", "0.250", "1"], ["b", "0.750", "1"], ["teacher"], ["a", "0.125", "35"], ["b", "0.625", "35"],
    ]  # fmt: skip
    start = rows.index(["", "bits", "error"])
    assert rows[start + 4 : start + 7] == [["rtn, bits 4"], ["a", "4", "0.500"], ["b", "4", "1.000"]]
    assert ["updates", "400", "400"] in rows
    assert ["recall", "–", "0.500"] in rows
    assert ["none", "–", "–"] in rows
    text, parsed = make_page(tmp_path, a)
    assert ["student", "0.250", "1"] in parsed.cells()
    assert "jax 0.10.2" in parsed.text
    assert "hidden_setting" not in text


@pytest.mark.parametrize("where", ["everywhere", "alone"])
def test_hostile_names_and_values_are_nothing_but_text(where, tmp_path):
    folder = tmp_path / "<img src=x onerror=alert(1)>"
    evil = {
        EVIL: EVIL,
        "nested": {EVIL: {EVIL: EVIL}, "b": {EVIL: [EVIL, [EVIL]]}},
        "rows": [{EVIL: EVIL}, {EVIL: 1}],
        "versions": {"jax": EVIL, "poise": [EVIL]},
        "devices": [EVIL, {EVIL: 1}],
        "seconds": EVIL,
    }
    rows = [
        {"phase": EVIL, "step": 1, EVIL: 1.0, f"eval/{EVIL}": [1, 2], "style": EVIL},
        {"phase": EVIL, "step": 2, EVIL: EVIL},
    ]
    timing = [{"phase": EVIL, "step": 1, "seconds": 1.0}, {"phase": "p", "step": 1, "seconds": EVIL}]
    run = make_run(folder, rows, {**evil, "seed": EVIL}, timing, report_json=evil, other_json=evil, data_json=evil)
    (folder / "<script>alert(1)<.png").write_bytes(png())
    (folder / "<script>alert(1)<.txt").write_text("</pre><script>alert(1)</script>")
    (folder / "javascript:alert(1).png").write_bytes(b"<svg onload='alert(1)'>")
    (folder / "\udcff.png").write_bytes(png())
    others = [make_run(tmp_path / "other")] if where == "everywhere" else []
    text, parsed = make_page(tmp_path, run, *others, flags=[f"--title={EVIL[:30]}"])
    check_self_contained(text, parsed)
    assert "<script" not in text
    assert "<img src=x" not in text
    assert parsed.text.count("<script>alert(1)</script>") > 10
    assert not re.search("[\u202e\x00]", text)
    assert r"\u202e\x00\ud800" in parsed.text
    assert len(parsed.find("img")) == 2


def test_the_same_runs_give_the_same_bytes(tmp_path):
    rng = np.random.default_rng(0)
    runs = [
        make_run(tmp_path / name, losses(rng.normal(size=700).tolist()), {"b": 1, "a": name}, x_png=png())
        for name in ("a", "b")
    ]
    first, _ = make_page(tmp_path, *runs)
    for name in ("a", "b"):  # another order in the folders
        data = (tmp_path / name / "config.json").read_bytes()
        (tmp_path / name / "config.json").unlink()
        (tmp_path / name / "config.json").write_bytes(data)
    assert make_page(tmp_path, *runs)[0] == first


def test_a_long_run_is_drawn_in_few_points_and_keeps_its_extremes(tmp_path):
    values = np.sin(np.arange(20_000) / 500) + 3
    values[12_345] = 40.0
    run = make_run(tmp_path / "a", losses(values.tolist()))
    curve = read_run(run, "a").curves["train"]["loss"]
    points = curve.points()
    assert curve.rows == 20_000
    assert MAX_POINTS // 2 <= len(points.steps) <= MAX_POINTS
    assert points.highs.max() == 40.0
    assert np.average(points.means, weights=np.diff(points.steps, append=20_000)) == pytest.approx(values.mean(), 1e-3)
    text, parsed = make_page(tmp_path, run)
    assert len(text) < 100_000
    assert f"at most {MAX_POINTS} points" in parsed.text
    for part in parsed.find("path", "raw"):
        assert part["d"].count("l") == len(points.steps) - 1
    assert len(parsed.find("path", "band")) == 2


@given(
    st.lists(
        st.one_of(
            st.floats(allow_nan=True, allow_infinity=True),
            st.integers(-(10**400), 10**400),
            st.booleans(),
            st.none(),
            st.text(max_size=2),
            st.lists(st.one_of(st.floats(), st.none(), st.text(max_size=1)), max_size=4),
        ),
        max_size=40,
    ),
    st.sampled_from([1, 2, 30]),
)
@settings(max_examples=40, deadline=None)
def test_any_rows_make_a_curve_that_can_be_drawn(values, times):
    curve, kept = Curve(), []
    for step, value in enumerate(values * times, 1):
        curve.add(step, value)
        for entry in value if isinstance(value, list) else [value]:
            if isinstance(entry, int | float) and abs(entry) <= 1e300:
                kept.append(float(entry) if abs(entry) >= 1e-300 else 0.0)
    if not kept:
        assert curve.rows == 0
        return
    points = curve.points()
    assert len(points.steps) <= MAX_POINTS
    assert (points.lows.min(), points.highs.max()) == (min(kept), max(kept))
    assert (np.diff(points.steps) > 0).all()
    slack = 1e-9 * max(abs(points.highs).max(), abs(points.lows).max())
    assert (points.lows - slack <= points.means).all()
    assert (points.means <= points.highs + slack).all()
    drawing = Page(chart("loss", [Line(0, "a", curve)], 0.1))
    for tag, attributes in drawing.elements:
        for number in re.findall(r"-?[\d.]+(?:e[-+]?\d+)?|nan|inf", attributes.get("d", "") if tag == "path" else ""):
            assert abs(float(number)) < 1000


JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(10**400), 10**400),
        st.floats(),
        st.sampled_from(["", "a", "b", EVIL, "seconds", "versions", "rows"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.sampled_from(["", "a", "b", EVIL, "seed"]), inner, max_size=4)
    ),
    max_leaves=25,
)
NAMES = st.sampled_from(["a", "b", "config", "devices", "seconds", "seed", "versions", EVIL])


@given(st.lists(st.dictionaries(NAMES, JSON, max_size=5), min_size=1, max_size=3))
@settings(max_examples=100, deadline=None)
def test_any_json_makes_a_page(contents):
    runs = [
        report_run.RunRecord("folder", f"run {i}", content, {"report.json": content})
        for i, content in enumerate(contents)
    ]
    text = report_page.page(runs, "", 0.05)
    check_self_contained(text, Page(text))


def test_rows_of_several_seeds_are_a_mean_in_a_band(tmp_path):
    rows = [{"phase": "p", "step": i, "return": [i, 2 * i, None, 3 * i], "one": i} for i in (1, 2, 3)]
    run = make_run(tmp_path / "a", rows)
    curve = read_run(run, "a").curves["p"]["return"]
    np.testing.assert_array_equal(curve.points(), [[1, 2, 3], [2, 4, 6], [1, 2, 3], [3, 6, 9]])
    assert (curve.seeds, curve.last, curve.unusable) == (3, 6.0, 0)
    _, parsed = make_page(tmp_path, run)
    assert [part["text"] for part in parsed.find("span", "seeds")] == ["mean of 3"]
    assert len(parsed.find("path", "band")) == 2  # of one curve, linear and logarithmic
    assert len(parsed.find("path", "raw")) == 4


def test_the_smooth_line_is_a_centred_mean():
    values = np.random.default_rng(0).normal(size=50)
    for share in (0.0, 0.1, 0.33, 1.0):
        half = round(share * 50) // 2
        expected = [values[max(0, i - half) : i + half + 1].mean() for i in range(50)]
        np.testing.assert_allclose(smoothed(values, share), expected, rtol=1e-12, atol=1e-14)


def test_smooth_lines_stand_beside_raw_ones_unless_they_are_not_wanted(tmp_path):
    run = make_run(tmp_path / "a", losses(range(1, 101)))
    _, parsed = make_page(tmp_path, run)
    assert len(parsed.find("path", "raw")) == len(parsed.find("path", "smooth")) == 2
    _, parsed = make_page(tmp_path, run, flags=["--smoothing=0"])
    assert len(parsed.find("path", "raw")) == 2
    assert not parsed.find("path", "smooth")
    assert [part["id"] for part in parsed.find("input")] == ["log"]


def test_the_logarithmic_scale_is_for_curves_above_zero(tmp_path):
    rows = [{"phase": "p", "step": i, "positive": 10.0**-i, "signed": i - 2.0, "zero": 0.0} for i in (1, 2, 3)]
    _, parsed = make_page(tmp_path, make_run(tmp_path / "a", rows))
    assert len(parsed.find("g", "log")) == len(parsed.find("g", "linear")) == 1
    assert len(parsed.find("span", "only-log")) == 2
    assert {"0.1", "0.01", "0.001"} <= {part["text"] for part in parsed.find("text")}
    ys = [float(y) for y in re.findall(r"M[\d.]+ ([\d.]+)h0", parsed.find("path", "dots")[1]["d"])]
    assert ys[1] - ys[0] == pytest.approx(ys[2] - ys[1], abs=0.2)  # equal factors, equal distances


def test_runs_scale_and_smoothing_are_switched_without_a_script(tmp_path):
    runs = [make_run(tmp_path / name, losses(range(30))) for name in ("a", "b")]
    text, parsed = make_page(tmp_path, *runs)
    inputs, labels = parsed.find("input"), parsed.find("label")
    assert [part["id"] for part in inputs] == ["run0", "run1", "smooth", "log"]
    assert [part["for"] for part in labels] == [part["id"] for part in inputs]
    assert ["checked" in part for part in inputs] == [True, True, True, False]
    assert all(part["type"] == "checkbox" and part["aria-label"] for part in inputs)
    sheet = parsed.find("style")[0]["text"]
    for name in ("run0", "run1"):
        assert f"#{name}:not(:checked)~main .r{name[-1]}" in sheet
    assert text.rindex("<input") < text.index("<header") < text.index("<main")  # `~` finds what follows
    assert len(parsed.find("li", "r1")) == 1


def test_damage_is_told_and_the_rest_is_shown(tmp_path):
    run = make_run(tmp_path / "a", losses([3.0, 2.0]), report_json=b'{"half": ', other_json=b"[1]", third_json={"x": 7})
    path = tmp_path / "a" / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 3}\n\n{"phase": "train", "step": 4, "loss": NaN}\n{"phase": "tr')
    (tmp_path / "a" / "timing.jsonl").unlink()
    (tmp_path / "a" / "config.json").write_bytes(b"\xff")
    (tmp_path / "a" / "deep.json").write_text("[" * 100_000 + "]" * 100_000)
    (tmp_path / "a" / "large.json").write_text('{"x": 1' + "0" * 5000 + "}")
    record = read_run(run, "a")
    assert "The last line of metrics.jsonl, 6, is half written and left out." in record.notes
    assert "2 damaged lines of metrics.jsonl left out: 3, 4." in record.notes
    assert "There is no timing.jsonl." in record.notes
    for name in ("report.json", "config.json", "deep.json", "large.json"):
        assert sum(note.startswith(f"{name} is damaged: ") for note in record.notes) == 1
    assert "other.json is damaged: it holds no JSON object." in record.notes
    assert len(record.notes) == 8
    curve = record.curves["train"]["loss"]
    assert (curve.rows, curve.last, curve.unusable) == (2, 2.0, 1)
    _, parsed = make_page(tmp_path, run)
    assert [part["text"] for part in parsed.find("ul", "notes")] == ["".join(f"a{note}" for note in record.notes)]
    assert ["x", "7"] in parsed.cells()
    assert "1 rows without a finite number" in parsed.find("li", "r0")[-1]["title"]


def test_a_folder_with_metrics_alone_is_a_run_and_so_is_one_that_has_only_begun(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "metrics.jsonl").write_text("")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.json").write_text("{}")
    text, parsed = make_page(tmp_path, f"{tmp_path}/a", f"{tmp_path}/b")
    check_self_contained(text, parsed)
    assert "There is no metrics.jsonl." in parsed.text
    assert [part["id"] for part in parsed.find("section")] == ["overview"]


def test_what_is_no_run_is_named_before_anything_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("run")
    for arguments, words in [
        (["run", "empty"], "empty is no run: it has neither config.json nor metrics.jsonl nor report.json"),
        (["run", "missing"], "missing is no run: there is no such folder"),
        (["run/config.json"], "run/config.json is no run: there is no such folder"),
        (["run", run], "runs must be different folders, got run and"),
        (["run", "link"], "runs must be different folders, got run and link"),
        (["run", "--output=."], "output must name a file"),
        (["run", "--output=empty"], "output must name a file, got the folder empty"),
        (["run", "--smoothing=0.7"], "at most 0.5"),
        ([], "runs must name at least one folder"),
        ([f"r{i}" for i in range(MAX_RUNS + 1)], f"at most {MAX_RUNS}"),
    ]:
        try:
            code = report.main([*arguments, *([] if "--output" in str(arguments) else ["--output=new/page.html"])])
        except SystemExit as stopped:
            code = stopped.code
        assert code == 2
        err = capsys.readouterr().err
        assert words in err
        assert err.count("\n") == 1
    assert not (tmp_path / "new").exists()
    assert list((tmp_path / "empty").iterdir()) == []


def test_only_pictures_that_decode_and_lie_in_the_folder_are_taken(tmp_path, monkeypatch):
    run = make_run(tmp_path / "a")
    folder, outside = tmp_path / "a", tmp_path / "outside.png"
    outside.write_bytes(png())
    (folder / "good.png").write_bytes(png())
    (folder / "good.gif").write_bytes(png(kind="GIF"))
    (folder / "named.png").write_bytes(png(kind="JPEG"))
    (folder / "inner.PNG").symlink_to("good.png")
    (folder / "bmp.png").write_bytes(png(kind="BMP"))
    (folder / "cut.png").write_bytes(png((64, 64))[:-40])
    (folder / "text.png").write_text("<script>")
    (folder / "outer.png").symlink_to(outside)
    (folder / "up.png").symlink_to("../outside.png")
    (folder / "circle.png").symlink_to("circle.png")
    (folder / "gone.png").symlink_to("nowhere.png")
    (folder / "sub.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    (folder / "ignored.svg").write_text("<svg onload='x'/>")
    monkeypatch.setattr(report_run, "_MAX_PICTURES", 40)
    record = read_run(run, "a")
    types = {name: picture.media_type for name, picture in record.pictures.items()}
    assert types == {
        "good.gif": "image/gif", "good.png": "image/png", "inner.PNG": "image/png", "named.png": "image/jpeg",
    }  # fmt: skip
    for name in ("bmp", "cut", "text"):
        assert f"{name}.png is left out: it is no picture that can be decoded as PNG, GIF or JPEG." in record.notes
    for name in ("outer", "up"):
        assert f"{name}.png is left out: it is a link out of the run's folder." in record.notes
    assert "pipe.png is left out: it is no regular file." in record.notes
    for name in ("circle", "gone", "sub"):
        assert sum(note.startswith(f"{name}.png ") for note in record.notes) == 1
    _, parsed = make_page(tmp_path, run)
    sources = {part["alt"]: part["src"] for part in parsed.find("img")}
    assert sources["good.png of a"] == f"data:image/png;base64,{base64.b64encode(png()).decode()}"
    assert sources["named.png of a"].startswith("data:image/jpeg;")
    assert len(sources) == 4


def test_no_file_of_a_folder_is_read_behind_a_link_out_of_it(tmp_path):
    word = "classified"
    secret = make_run(tmp_path / "secret", losses([5.0]), {"key": word}, x_txt=word.encode(), report_json={word: 1})
    folder = tmp_path / "a"
    folder.mkdir()
    for name in os.listdir(secret):
        (folder / name).symlink_to(f"../secret/{name}")
    text, parsed = make_page(tmp_path, str(folder))
    assert word not in text
    assert parsed.text.count("is a link out of the run's folder") == 5
    assert not parsed.find("figure")


def test_what_is_too_large_or_too_much_is_left_out_with_a_sentence(tmp_path, monkeypatch):
    many = [{"phase": "p", "step": 1, **{f"m{i:03}": 1.0 for i in range(250)}}]
    run = make_run(tmp_path / "a", many, x_txt=b"y" * 30_000, big_json={"x": "y" * 5_000_000})
    (tmp_path / "a" / "big.png").write_bytes(png() + bytes(4_000_000))
    (tmp_path / "a" / "bomb.png").write_bytes(png((9000, 9000)))
    header = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    claim = png()[:12] + header + struct.pack(">I", zlib.crc32(header)) + png()[33:]
    (tmp_path / "a" / "claim.png").write_bytes(claim)
    for i in range(14):
        (tmp_path / "a" / f"{i:02}.gif").write_bytes(png(kind="GIF"))
    record = read_run(run, "a")
    assert set(record.notes) >= {
        "Only its first 200 curves are drawn.",
        "Of x.txt only the first 20,000 characters are shown.",
        "big.json is left out: it is larger than 4 MB.",
        "Only the first 12 of its 17 pictures are shown.",
    }
    assert len(record.curves["p"]) == 200
    for i in range(14):
        (tmp_path / "a" / f"{i:02}.gif").unlink()
    assert set(read_run(run, "a").notes) >= {
        "big.png is left out: it is larger than 3 MB.",
        "bomb.png is left out: it has more than 40 million pixels.",
        "claim.png is left out: it has more than 40 million pixels.",
    }
    monkeypatch.setattr(report_run, "_MAX_LINES_BYTES", 100)
    assert "Of metrics.jsonl only the first 0 MB were read." in read_run(run, "a").notes
    other = make_run(tmp_path / "b", many, small_png=png(), tiny_gif=png(kind="GIF"))
    monkeypatch.undo()
    monkeypatch.setattr(report_page, "_MAX_PICTURE_BYTES", len(png()))
    monkeypatch.setattr(report_page, "_MAX_CHARTS", 3)
    _, parsed = make_page(tmp_path, other)
    assert len(parsed.find("img")) == 1
    assert "together are left out: b: tiny.gif" in parsed.text
    assert len(parsed.find("figure", "chart")) == 3
    assert "197 more metrics are not drawn." in parsed.text
    (tmp_path / "b" / "metrics.jsonl").write_text("x\n" * 5000)
    assert "metrics.jsonl is not read to its end: 1,000 lines are damaged." in read_run(other, "b").notes


def test_seconds_come_from_the_report_where_the_file_of_times_is_missing(tmp_path):
    run = make_run(tmp_path / "a", report_json={"seconds": {"train": 61.0, "none": None}})
    assert ["train", "1 min 01 s"] in make_page(tmp_path, run)[1].cells()


def test_large_results_are_cut(tmp_path):
    rows = [{"name": "x", **{f"k{j}": 0 for j in range(50)}} for _ in range(300)]
    content = {"rows": rows, "wide": {f"w{i}": 1.5 for i in range(100)}, **{f"z{i}": {f"{i}": 1} for i in range(400)}}
    _, parsed = make_page(tmp_path, make_run(tmp_path / "a", report_json=content))
    left_out = [int(words) for words in re.findall(r"(\d+) figures or rows were left out", parsed.text)]
    assert left_out == [100, 40, 202]
    assert len(parsed.find("table")) < 210


def test_many_notes_end(tmp_path):
    run = make_run(tmp_path / "a", **{f"x{i:02}_json": b"{" for i in range(12)})
    for i in range(40):
        (tmp_path / "a" / f"y{i}.png").mkdir()
    record = read_run(run, "a")
    for _ in range(50):
        record.note("Again.")
    assert len(record.notes) == 31
    assert record.notes[-1].startswith("More was left out")


def test_runs_are_told_apart(tmp_path):
    for name in ("x/run", "y/run", "z"):
        make_run(tmp_path / name)
    runs = [f"{tmp_path}/x/run", f"{tmp_path}/y/run/", f"{tmp_path}/z"]
    _, parsed = make_page(tmp_path, *runs)
    assert [part["text"] for part in parsed.find("h1")] == ["x/run, y/run and z"]
    assert [part["text"] for part in parsed.find("label")[:3]] == ["x/run", "y/run", "z"]
    _, parsed = make_page(tmp_path, *runs, flags=["--title=Three"])
    assert parsed.find("title")[0]["text"] == parsed.find("h1")[0]["text"] == "Three"


def test_a_page_that_cannot_be_made_leaves_the_old_one(tmp_path, monkeypatch):
    run = make_run(tmp_path / "a")
    before, _ = make_page(tmp_path, run)

    def fail(*arguments):
        raise RuntimeError("no page")

    monkeypatch.setattr(report_page, "page", fail)
    with pytest.raises(RuntimeError, match="no page"):
        report.main([run, f"--output={tmp_path}/out/page.html"])
    assert (tmp_path / "out" / "page.html").read_text() == before


def test_neither_jax_nor_matplotlib_is_loaded(tmp_path):
    run = make_run(tmp_path / "a", losses([1.0, 2.0]), x_png=png())
    code = (
        "import sys; from poise.launch.report import main; assert main(sys.argv[1:]) == 0; "
        "assert not {'jax', 'matplotlib', 'orbax', 'scipy'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, run, f"--output={tmp_path}/page.html"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"1 run: .*page\.html \(\d+ kB\)\n", done.stdout)
