"""What is shown: a bar on a terminal, a line now and then elsewhere; and the timing file."""

import io
import itertools
import json

import pytest

from poise.launch.progress import Console, duration, headline
from poise.launch.timing import TimingLog
from poise.launch.writers import WriteError


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_lines_come_now_and_then():
    clock, stream = Clock(), io.StringIO()
    console = Console(stream, every_seconds=10, clock=clock)
    console.start("teacher", total=400, done=100)
    for step in range(101, 401):
        clock.now += 0.125
        console.update(step, {"grad_norm": 2.0, "loss": 0.125})
    console.finish("done")
    assert stream.getvalue().splitlines() == [
        "teacher: step 180 of 400, loss 0.125, 8 steps/s, 28 s left",
        "teacher: step 260 of 400, loss 0.125, 8 steps/s, 18 s left",
        "teacher: step 340 of 400, loss 0.125, 8 steps/s, 8 s left",
        "done",
    ]


def test_a_terminal_gets_a_bar_with_rate_and_loss():
    stream = Terminal()
    console = Console(stream)
    console.start("teacher", total=4, done=1)
    console.update(2, {"loss": 0.125})
    console.line("a sentence")
    console.update(4, {"loss": 0.0625})
    console.finish("done")
    shown = stream.getvalue()
    assert "teacher:  25%" in shown
    assert "a sentence\n" in shown
    assert "4/4" in shown
    assert "loss 0.0625" in shown
    assert "step" in shown
    assert shown.endswith("done\n")
    console.line("after")
    assert stream.getvalue().endswith("after\n")


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"a": 1.0, "loss": 2.0}, "loss 2"),
        ({"a": 1.0, "student_loss": 2.0}, "student_loss 2"),
        ({"a": 1.5}, "a 1.5"),
        ({"loss": [1.0, 3.0]}, "loss 2"),
        ({}, ""),
    ],
)
def test_headline(values, text):
    assert headline(values) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (3599, "59 min 59 s"), (3600, "1 h 0 min")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_timing_rows(tmp_path):
    clock = Clock()
    timing = TimingLog(tmp_path / "timing.jsonl", every_seconds=10, clock=clock)
    timing.start("teacher", before=5.0)
    for step in range(1, 31):
        clock.now += 1.0
        timing.row(step)
        if step == 12:
            timing.saved(step)
            assert timing.since_save == 0.0
    assert timing.seconds == 35.0
    assert timing.since_save == 18.0
    timing.close()
    rows = [json.loads(line) for line in (tmp_path / "timing.jsonl").read_text().splitlines()]
    assert [(row["step"], row["seconds"], row.get("event"), row.get("steps_per_second")) for row in rows] == [
        (1, 6.0, "first step", None),
        (11, 16.0, None, 1.0),
        (12, 17.0, "checkpoint", None),
        (21, 26.0, None, 1.0),
    ]
    assert all(row["phase"] == "teacher" and row["time"] > 0 for row in rows)


def test_a_clock_that_is_set_back_changes_no_duration(tmp_path, monkeypatch):
    now = [2e9]

    def set_back():
        now[0] -= 3600
        return now[0]

    monkeypatch.setattr("time.time", set_back)
    timing = TimingLog(tmp_path / "timing.jsonl", every_seconds=0)
    timing.start("teacher", before=5.0)
    for step in range(1, 5):
        timing.row(step)
    timing.saved(4)
    timing.close()
    rows = [json.loads(line) for line in (tmp_path / "timing.jsonl").read_text().splitlines()]
    assert all(later["time"] < row["time"] for row, later in itertools.pairwise(rows))
    seconds = [5.0, *(row["seconds"] for row in rows)]
    assert all(0 <= later - before < 60 for before, later in itertools.pairwise(seconds))
    assert timing.since_save >= 0


def test_timing_that_can_not_be_written_is_named(tmp_path):
    full = TimingLog("/dev/full")
    full.start("teacher", 0.0)
    for write in (full.row, full.saved):
        with pytest.raises(WriteError, match="/dev/full can't be written: No space left on device"):
            write(1)
    with pytest.raises(WriteError, match="/dev/full can't be written: No space left on device"):
        full.close()
    full.close()
    with pytest.raises(WriteError, match=f"{tmp_path} can't be written: Is a directory"):
        TimingLog(tmp_path).row(1)
