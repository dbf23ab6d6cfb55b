"""The configuration of a run that is there: its file is required, and belongs to one launcher."""

import dataclasses
import json
import re

import jax.numpy as jnp
import pytest

from poise.launch.config import ConfigError, field, validate
from poise.launch.integer_classifier import load_classifier
from poise.launch.qat import QATConfig
from poise.launch.quantized_files import save_quantized
from poise.launch.runs import config_of
from poise.launch.workdir import settle_config
from poise.quant import QuantRule, export


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = field(10, "steps", minimum=1)
    hidden: tuple[int, ...] = field((64,), "widths")
    data: str = field("digits", "data")

    def __post_init__(self):
        validate(self)


def write(folder, content):
    (folder / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))


def test_a_configuration_comes_back(tmp_path):
    config = Config(steps=3, hidden=(4, 5))
    settle_config(config, tmp_path)
    assert config_of(Config, tmp_path) == config
    assert config_of(Config, str(tmp_path)) == config


def test_what_a_file_does_not_know_is_the_default(tmp_path):
    write(tmp_path, {"steps": 3})
    assert config_of(Config, tmp_path) == Config(steps=3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no run of {module} in {folder}: it has no config.json"),
        ({"stepz": 3, "other": 1}, "{folder}/config.json is of no run of {module}: it sets stepz, other (did you mean"),
        ({"steps": 0}, "{folder}/config.json is of no run of {module}: steps must be at least 1, got 0"),
        ({"hidden": 4}, "{folder}/config.json is of no run of {module}: hidden must be whole numbers"),
        ([1], "{folder}/config.json is damaged (it holds no JSON object)"),
        ("{", "{folder}/config.json cannot be read"),
    ],
)
def test_what_is_no_configuration_is_refused(tmp_path, content, message):
    if content is not None:
        write(tmp_path, content)
    with pytest.raises(ConfigError, match=re.escape(message.format(module=__name__, folder=tmp_path))):
        config_of(Config, tmp_path)


def test_a_classifier_needs_its_configuration(tmp_path):
    params = {"params": {"head": {"kernel": jnp.ones((4, 2)), "bias": jnp.zeros(2)}}}
    save_quantized(tmp_path / "model.safetensors", export(params, {}, [QuantRule("kernel", weight_bits=2)]))
    with pytest.raises(
        ConfigError, match=re.escape(f"no run of poise.launch.qat in {tmp_path}: it has no config.json")
    ):
        load_classifier(tmp_path)
    settle_config(QATConfig(), tmp_path)
    write(tmp_path, json.loads((tmp_path / "config.json").read_text()) | {"depth": 3})
    with pytest.raises(ConfigError, match=r"is of no run of poise.launch.qat: it sets depth"):
        load_classifier(tmp_path)
