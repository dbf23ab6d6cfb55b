"""The frame around a launcher: what each way of ending prints and returns."""

import dataclasses
import os
import pathlib
import signal

import pytest

from poise.launch.config import field
from poise.launch.errors import LaunchError
from poise.launch.main import launch
from poise.launch.signals import Interrupted


@dataclasses.dataclass(frozen=True)
class Config:
    """Two flags and those that every launcher has."""

    workdir: str = field("", "folder", role="execution")
    steps: int = field(3, "steps", minimum=1)
    jax_cache_dir: str = field("", "cache", role="execution")


def call(run, *flags):
    return launch(Config, {}, flags, run, prog="poise.launch.demo", description="A demonstration.")


def test_a_run_gets_its_settings_and_a_folder_with_them(tmp_path):
    seen = []
    code = call(lambda config, workdir: seen.append((config.steps, workdir)), f"--workdir={tmp_path}/run", "--steps=5")
    assert code == 0
    assert seen == [(5, tmp_path / "run")]
    assert (tmp_path / "run" / "config.json").is_file()


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (LaunchError("the disk is full"), 1, "the disk is full"),
        (Interrupted(signal.SIGINT, "stopped after step 3"), 130, "stopped after step 3; the same command goes on"),
        (Interrupted(signal.SIGTERM, "stopped after step 3"), 0, "the same command goes on"),
        (KeyboardInterrupt(), 130, "the same command goes on"),
        (
            OSError(28, "No space left on device", "r/report.json"),
            1,
            "r/report.json: No space left on device; the same",
        ),
    ],
)
def test_each_ending_has_a_sentence_and_a_code(error, code, words, tmp_path, capsys):
    def run(config, workdir):
        raise error

    assert call(run, f"--workdir={tmp_path}") == code
    printed = capsys.readouterr().err.strip()
    assert words in printed
    assert len(printed.splitlines()) == 1
    assert printed.startswith("poise.launch.demo: ")


def test_a_terminated_run_outside_of_the_loop_stops_at_once(tmp_path, capsys):
    def run(config, workdir):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal did not arrive")

    previous = signal.getsignal(signal.SIGTERM)
    assert call(run, f"--workdir={tmp_path}") == 0
    assert "the same command goes on" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == previous


def test_a_bug_keeps_its_traceback(tmp_path):
    def run(config, workdir):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        call(run, f"--workdir={tmp_path}")


def test_another_configuration_is_refused_and_the_folder_left_as_it_was(tmp_path, capsys):
    def nothing(config: Config, workdir: pathlib.Path):
        return None

    call(nothing, f"--workdir={tmp_path}")
    before = (tmp_path / "config.json").read_bytes()
    assert call(nothing, f"--workdir={tmp_path}", "--steps=4") == 2
    assert "steps was 3 and is now 4" in capsys.readouterr().err
    assert (tmp_path / "config.json").read_bytes() == before
