"""Pictures and table are written whole, with what they should show."""

import json

import matplotlib.image
import numpy as np

from poise.launch.distill_results import table
from poise.launch.pictures import curves_picture, samples_picture

ROW = {
    "frechet": 0.15, "frechet_train": 0.04, "precision": 0.9, "recall": 0.9, "coverage": 0.9, "class_consistency": 0.99,
    "nfe": 35, "images_per_second": 1234.5,
}  # fmt: skip
REAL = dict.fromkeys(ROW) | {"frechet": 0.13}
REPORT = {"teacher": ROW, "student": ROW | {"nfe": 1}, "teacher_1step": ROW | {"frechet": 1.9}, "real": REAL}


def test_samples_show_every_class_in_a_row(tmp_path):
    rng = np.random.default_rng(0)
    groups = {name: rng.integers(0, 17, size=(10, 5, 8, 8, 1)) for name in ("real", "teacher", "student")}
    samples_picture(tmp_path / "samples.png", groups, [str(i) for i in range(10)], 16, "title")
    picture = matplotlib.image.imread(tmp_path / "samples.png")
    assert picture.shape[0] > 600
    assert picture.shape[1] > 800
    assert [path.name for path in tmp_path.iterdir()] == ["samples.png"]
    blank = {name: np.zeros_like(images) for name, images in groups.items()}
    samples_picture(tmp_path / "blank.png", blank, [str(i) for i in range(10)], 16, "title")
    assert (picture != matplotlib.image.imread(tmp_path / "blank.png")).mean() > 0.2


def test_colour_images_are_drawn_in_colour(tmp_path):
    red = np.zeros((2, 2, 8, 8, 3), np.uint8)
    red[..., 0] = 255
    samples_picture(tmp_path / "samples.png", {"red": red}, ["a", "b"], 255, "title")
    picture = matplotlib.image.imread(tmp_path / "samples.png")[..., :3]
    assert ((picture[..., 0] > 0.9) & (picture[..., 1] < 0.1)).mean() > 0.05


def test_curves_are_drawn_with_and_without_evaluations(tmp_path):
    rows = [{"phase": "teacher", "step": i, "loss": 1 / i} for i in range(1, 9)]
    rows += [{"phase": "distill", "step": i, "fake_loss": 0.5 / i, "effective_sample_size": 0.9} for i in range(1, 9)]
    rows += [{"phase": "distill", "step": 4, "eval/frechet": 0.3}]
    for name, kept in (("full", rows), ("fewer", rows[:-1])):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
        curves_picture(tmp_path / f"{name}.png", tmp_path / "metrics.jsonl", REPORT, "title")
    full, fewer = (matplotlib.image.imread(tmp_path / f"{name}.png") for name in ("full", "fewer"))
    assert full.shape == fewer.shape
    assert (full != fewer).any()


def test_table_has_a_row_each_and_dashes_where_nothing_applies():
    lines = table(REPORT).splitlines()
    assert [line.split("  ")[0] for line in lines[2:]] == ["real", "teacher", "teacher, 1 step", "student"]
    assert "1234" in lines[3]
    assert "0.150" in lines[3]
    assert lines[2].split()[2] == "-"
    assert len({len(line) for line in lines}) == 1
