"""Metrics on disk: exact numbers, cut back to where a run goes on."""

import json
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.launch.writers import JsonLinesWriter, TensorBoardWriter, WriteError, Writer, truncate_jsonl

PHASES = ["b", "a"]  # in the order of the run, which isn't the alphabet's


def written(path, rows, restored=None):
    writer = JsonLinesWriter(path)
    writer.begin(PHASES, restored)
    for phase, step, values in rows:
        writer.write(phase, step, values)
    writer.flush()
    return writer


ROWS = [
    ("b", 1, {"loss": 1.0}),
    ("b", 2, {"loss": 0.5, "eval/gap": None}),
    ("b", 3, {"loss": 2.0}),
    ("a", 1, {"loss": [1.0, 2.0]}),
]


def test_rows_are_objects_in_order(tmp_path):
    path = tmp_path / "metrics.jsonl"
    written(path, ROWS).close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"phase": "b", "step": 1, "loss": 1.0},
        {"phase": "b", "step": 2, "loss": 0.5, "eval/gap": None},
        {"phase": "b", "step": 3, "loss": 2.0},
        {"phase": "a", "step": 1, "loss": [1.0, 2.0]},
    ]


@pytest.mark.parametrize(
    ("restored", "kept"), [(None, 0), (("b", 1), 1), (("b", 2), 2), (("b", 9), 3), (("a", 1), 4), (("a", 0), 3)]
)
@pytest.mark.parametrize(
    "tail", ["", '{"phase": "a", "st', '{"phase": "a", "step": 1, "loss": 1.0}', "\x00\x00\n", "7\n"]
)
def test_a_restored_run_drops_later_and_half_written_rows(tmp_path, restored, kept, tail):
    path = tmp_path / "metrics.jsonl"
    written(path, ROWS).close()
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines) + tail)
    assert truncate_jsonl(path, PHASES, restored) == kept
    assert path.read_text() == "".join(lines[:kept])


def test_the_writer_goes_on_after_the_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    written(path, ROWS).close()
    whole = path.read_text()
    written(path, ROWS[1:], restored=("b", 1)).close()
    assert path.read_text() == whole


def test_rows_are_on_disk_after_flush(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = written(path, ROWS)
    assert len(path.read_text().splitlines()) == len(ROWS)
    writer.close()


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
@settings(max_examples=25, deadline=None)
def test_numbers_come_back_to_the_bit(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("rows") / "metrics.jsonl"
    written(path, [("b", 1, {"loss": value})]).close()
    back = np.float32(json.loads(path.read_text())["loss"])
    assert back.tobytes() == np.float32(value).tobytes()


def test_what_json_can_not_say_is_refused(tmp_path):
    writer = written(tmp_path / "metrics.jsonl", [])
    with pytest.raises(ValueError, match="JSON"):
        writer.write("b", 1, {"loss": float("nan")})
    writer.close()


def test_a_folder_that_is_gone_is_named(tmp_path):
    with pytest.raises(WriteError, match=str(tmp_path / "none" / "metrics.jsonl")):
        JsonLinesWriter(tmp_path / "none" / "metrics.jsonl").begin(PHASES, None)


def test_a_full_disk_is_named(tmp_path):
    code = """
import resource, sys
from poise.launch.writers import JsonLinesWriter
resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
writer = JsonLinesWriter(sys.argv[1])
writer.begin(["b"], None)
for step in range(10):
    writer.write("b", step, {"loss": 0.125})
writer.flush()
"""
    path = tmp_path / "metrics.jsonl"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert f"WriteError: {path} can't be written" in done.stderr
    assert truncate_jsonl(path, ["b"], ("b", 100)) == 2


class Recorder:
    """Stands where tensorboardX's SummaryWriter is."""

    made: list = []  # noqa: RUF012

    def __init__(self, logdir, purge_step):
        self.calls = [("made", pathlib.Path(logdir).name, purge_step)]
        Recorder.made.append(self)

    def add_scalar(self, *arguments):
        self.calls.append(arguments)

    def add_image(self, name, image, step, dataformats):
        assert len(dataformats) == image.ndim
        self.calls.append((name, step, dataformats))

    def flush(self):
        self.calls.append("flush")

    def close(self):
        self.calls.append("close")


def test_tensorboard_gets_scalars_seeds_and_pictures(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=Recorder))
    monkeypatch.setattr(Recorder, "made", [])
    writer = TensorBoardWriter(tmp_path)
    writer.begin(PHASES, ("b", 1))
    for phase, step, values in ROWS[1:]:
        writer.write(phase, step, values)
    writer.images("a", 1, {"grid": np.zeros((2, 4, 4, 1), np.uint8), "one": np.zeros((4, 4))})
    writer.flush()
    writer.close()
    pictures = [("grid", 1, "NHWC"), ("one", 1, "HW")]
    assert [recorder.calls for recorder in Recorder.made] == [
        [("made", "b", 2), ("loss", 0.5, 2), ("loss", 2.0, 3), "flush", "close"],
        [("made", "a", 1), ("loss/0", 1.0, 1), ("loss/1", 2.0, 1), *pictures, "flush", "close"],
    ]
    assert isinstance(writer, Writer)
    assert isinstance(JsonLinesWriter(tmp_path / "x"), Writer)
