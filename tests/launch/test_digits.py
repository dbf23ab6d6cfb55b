"""The digits are scikit-learn's, prepared once without network or TensorFlow, and a damaged folder is mended."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits as sklearn_digits

from poise.launch.data import DataError
from poise.launch.digits import CLASS_NAMES, MAXIMUM, Digits, load_digits
from poise.launch.signals import Interrupted


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    return root, load_digits(root)


@pytest.fixture
def copy(prepared, tmp_path):
    shutil.copytree(prepared[0], tmp_path / "data")
    return tmp_path / "data"


def assert_same(left, right):
    for split in ("train", "test"):
        for name in ("image", "label"):
            np.testing.assert_array_equal(left[split][name], right[split][name])
            assert left[split][name].dtype == right[split][name].dtype


def test_together_the_splits_are_scikit_learns_digits(prepared):
    digits = prepared[1]
    assert {split: arrays["image"].shape for split, arrays in digits.items()} == {
        "train": (1297, 8, 8, 1),
        "test": (500, 8, 8, 1),
    }
    assert digits["train"]["image"].dtype == np.uint8
    assert max(arrays["image"].max() for arrays in digits.values()) == MAXIMUM
    original = sklearn_digits()
    rows = np.concatenate([original.images.reshape(-1, 64), original.target[:, None]], axis=1)
    ours = np.concatenate(
        [np.concatenate([a["image"].reshape(-1, 64), a["label"][:, None]], axis=1) for a in digits.values()]
    )
    np.testing.assert_array_equal(rows[np.lexsort(rows.T)], ours[np.lexsort(ours.T)])
    for arrays in digits.values():
        assert (np.bincount(arrays["label"], minlength=len(CLASS_NAMES)) > 0.07 * len(arrays["label"])).all()


def test_the_split_is_fixed_for_good(prepared):
    digits = prepared[1]
    assert digits["train"]["label"][:12].tolist() == [1, 0, 8, 2, 6, 7, 2, 0, 2, 7, 9, 2]
    assert digits["test"]["label"][:12].tolist() == [5, 1, 4, 0, 4, 7, 4, 8, 1, 5, 7, 5]


def test_the_second_use_reads_what_the_first_wrote(prepared, capfd):
    root, digits = prepared
    before = {path: path.stat().st_mtime_ns for path in (root / "digits").rglob("*")}
    assert_same(load_digits(root), digits)
    assert {path: path.stat().st_mtime_ns for path in (root / "digits").rglob("*")} == before
    assert "".join(capfd.readouterr()) == ""


def test_neither_network_nor_tensorflow_nor_noise(tmp_path):
    code = """
import socket, sys
def refuse(*args, **kwargs): raise SystemExit("the network was asked")
socket.socket.connect = socket.getaddrinfo = refuse
from poise.launch.digits import load_digits
load_digits(sys.argv[1])
sys.exit("TensorFlow was loaded" if "tensorflow" in sys.modules else 0)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".digits.lock", "digits"]


def damage_truncate(folder):
    record = next(folder.glob("*train.array_record*"))
    record.write_bytes(record.read_bytes()[:5000])


def damage_flip(folder):
    record = next(folder.glob("*test.array_record*"))
    content = bytearray(record.read_bytes())
    content[3000] ^= 4
    record.write_bytes(content)


def damage_remove(folder):
    next(folder.glob("*test.array_record*")).unlink()


def damage_metadata(folder):
    (folder / "dataset_info.json").write_text("{")


def damage_everything(folder):
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize("damage", [damage_truncate, damage_flip, damage_remove, damage_metadata, damage_everything])
def test_a_damaged_folder_is_put_aside_and_prepared_again(prepared, copy, capsys, damage):
    folder = copy / "digits" / str(Digits.VERSION)
    damage(folder)
    assert_same(load_digits(copy), prepared[1])
    err = capsys.readouterr().err
    assert str(folder) in err
    assert "damaged" in err
    assert folder.with_name("1.0.0.damaged").is_dir()
    assert_same(load_digits(copy), prepared[1])
    assert capsys.readouterr().err == ""


def test_what_a_killed_preparation_left_is_removed(prepared, tmp_path):
    leftover = tmp_path / "digits" / "incomplete.ABCDEF_1.0.0"
    leftover.mkdir(parents=True)
    (leftover / "digits-train.array_record-00000-of-00001").write_bytes(b"half")
    assert_same(load_digits(tmp_path), prepared[1])
    assert [path.name for path in (tmp_path / "digits").iterdir()] == ["1.0.0"]


def test_killed_while_preparing(prepared, tmp_path):
    code = """
import os, signal, sys
from poise.launch import digits
rows = digits.Digits._generate_examples
def dying(self, split):
    for position, row in rows(self, split):
        if split == "test" and position == 100:
            os.kill(os.getpid(), signal.SIGKILL)
        yield position, row
digits.Digits._generate_examples = dying
digits.load_digits(sys.argv[1])
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "digits" / "1.0.0").exists()
    assert len(list((tmp_path / "digits").iterdir())) == 1
    assert_same(load_digits(tmp_path), prepared[1])
    assert [path.name for path in (tmp_path / "digits").iterdir()] == ["1.0.0"]


@pytest.mark.slow
def test_two_processes_at_once(prepared, tmp_path):
    code = "import sys; from poise.launch.digits import load_digits; load_digits(sys.argv[1])"
    both = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [(process.communicate()[1], process.returncode) for process in both] == [("", 0), ("", 0)]
    assert_same(load_digits(tmp_path), prepared[1])


def test_a_folder_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", pathlib.Path("/proc/poise")):
        with pytest.raises(DataError, match=f"cannot be prepared in {root}{os.sep}digits"):
            load_digits(root)


@pytest.mark.parametrize("reading", [1, 2])
def test_a_stop_while_reading_leaves_the_set_alone(copy, monkeypatch, capsys, reading):
    """At the first reading, and at the second, which follows where another process was quicker."""
    as_data_source, readings = Digits.as_data_source, []

    def stopped(self, *arguments, **options):
        readings.append(arguments)
        if len(readings) == reading:
            os.kill(os.getpid(), signal.SIGTERM)
        elif len(readings) < reading:
            raise ValueError("not ready")
        return as_data_source(self, *arguments, **options)

    def stop(signum, frame):
        raise Interrupted(signum)

    before = sorted((path, path.stat().st_mtime_ns) for path in (copy / "digits").rglob("*"))
    monkeypatch.setattr(Digits, "as_data_source", stopped)
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        with pytest.raises(Interrupted, match="stopped"):
            load_digits(copy)
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert len(readings) == reading
    assert sorted((path, path.stat().st_mtime_ns) for path in (copy / "digits").rglob("*")) == before
    assert capsys.readouterr().err == ""
