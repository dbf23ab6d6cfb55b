"""A run's folder remembers the configuration of its run."""

import dataclasses
import json
import pathlib

import pytest

from poise.launch.config import ConfigError, field, validate
from poise.launch.workdir import prepare_workdir, settle_config


@dataclasses.dataclass(frozen=True)
class Config:
    workdir: str = field("runs/demo", "the run's folder", role="execution")
    batch_size: int = field(32, "images per step", minimum=1, maximum=512)
    widths: tuple[int, ...] = field((16, 32), "channels per level", minimum=1)
    loss: str = field("js", "the divergence", choices=("js", "kl"))

    def __post_init__(self):
        validate(self)


def test_a_folder_remembers_its_run(tmp_path):
    workdir = tmp_path / "a" / "b"
    settle_config(Config(), workdir)
    settle_config(Config(workdir="elsewhere"), workdir)
    assert json.loads((workdir / "config.json").read_text())["workdir"] == "elsewhere"
    before = (workdir / "config.json").read_bytes()
    with pytest.raises(ConfigError, match=r"batch_size was 32 and is now 8; widths was \[16, 32\] and is now \[4\]"):
        settle_config(Config(batch_size=8, widths=(4,)), workdir)
    assert (workdir / "config.json").read_bytes() == before
    assert [path.name for path in workdir.iterdir()] == ["config.json"]


def test_fields_that_came_and_went(tmp_path):
    settle_config(Config(), tmp_path)
    path = tmp_path / "config.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in stored.items() if k != "loss"}))
    with pytest.raises(ConfigError, match='loss was "js" and is now "kl"'):
        settle_config(Config(loss="kl"), tmp_path)
    settle_config(Config(), tmp_path)
    path.write_text(json.dumps(stored | {"depth": 3}))
    with pytest.raises(ConfigError, match="depth"):
        settle_config(Config(), tmp_path)


@pytest.mark.parametrize("damage", ["", '{"batch_size": 3', "[1]", "\x00\x00"])
def test_a_damaged_configuration_says_so(tmp_path, damage):
    (tmp_path / "config.json").write_text(damage)
    with pytest.raises(ConfigError, match=r"config\.json is damaged"):
        settle_config(Config(), tmp_path)
    assert (tmp_path / "config.json").read_text() == damage


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for workdir in (tmp_path / "file", tmp_path / "file" / "run", pathlib.Path("/proc/poise")):
        with pytest.raises(ConfigError, match=str(workdir)):
            settle_config(Config(), workdir)
    with pytest.raises(ConfigError, match="empty"):
        settle_config(Config(), "")


def test_an_address_has_a_folder_on_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("POISE_SCRATCH", str(tmp_path / "scratch"))
    path = prepare_workdir("gs://bucket/runs/digits/")
    assert path == prepare_workdir("gs://bucket/runs/digits")
    assert path != prepare_workdir("gs://bucket/other/digits")
    assert path.parent.parent == tmp_path / "scratch"
    assert path.name.startswith("digits-")
    assert path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("http://host/run", "gs://, s3://, az://, got 'http://host/run'"),
        ("file:///run", "begins with one of"),
        ("gs://bucket", "must name a folder in a bucket"),
        ("gs://bucket/../run", "must name a folder in a bucket"),
        ("gs://bucket//run", "must name a folder in a bucket"),
        ("gs://", "begins with one of|must name a folder in a bucket"),
    ],
)
def test_an_address_that_cannot_be_one_is_named(address, words):
    with pytest.raises(ConfigError, match=words):
        prepare_workdir(address)
