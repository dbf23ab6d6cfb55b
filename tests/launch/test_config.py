"""Flags from dataclass fields: what is read, and what is refused and how."""

import dataclasses
import json
import math
import pathlib
import subprocess
import sys
import tempfile

import pytest
from absl import flags
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.launch.config import ConfigError, field, parse_config, validate
from poise.launch.workdir import settle_config

RECIPES = {"default": {}, "small": {"batch_size": 4, "widths": (1, 2)}}


@dataclasses.dataclass(frozen=True)
class Config:
    recipe: str = field("default", "the preset", role="execution")
    workdir: str = field("runs/demo", "the run's folder", role="execution")
    batch_size: int = field(32, "images per step", minimum=1, maximum=512)
    rate: float = field(1e-3, "learning rate", exclusive_minimum=0.0, exclusive_maximum=1.0)
    ema: bool = field(True, "average the parameters")
    widths: tuple[int, ...] = field((16, 32), "channels per level", minimum=1)
    loss: str = field("js", "the divergence", choices=("js", "kl"))

    def __post_init__(self):
        validate(self)
        if self.batch_size * len(self.widths) > 1000:
            raise ValueError(f"batch_size {self.batch_size} is too large for {len(self.widths)} widths")


def parse(*argv):
    return parse_config(Config, RECIPES, argv, prog="demo", description="A demonstration.")


def test_defaults_then_recipe_then_flags():
    assert parse() == Config()
    assert parse("--recipe=small") == Config(recipe="small", batch_size=4, widths=(1, 2))
    assert parse("--batch_size=8", "--recipe=small").batch_size == 8
    assert parse("--recipe", "small", "--widths=7", "--noema", "--loss=kl", "--rate=1e-2") == Config(
        recipe="small", batch_size=4, widths=(7,), ema=False, loss="kl", rate=0.01
    )
    assert parse("--ema=false").ema is False
    assert parse("--batch_size=3", "--batch_size=5").batch_size == 5
    assert parse("--widths=").widths == ()


def test_no_flag_becomes_global():
    before = set(flags.FLAGS)
    parse("--batch_size=8")
    assert set(flags.FLAGS) == before


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--btach_size=8", ["--btach_size", "batch_size?", "--help"]),
        ("--zzz", ["unknown flag --zzz"]),
        ("--recipe=smal", ["'smal'", "small?", "default, small"]),
        ("train", ["'train'", "--name=value"]),
        ("--batch_size=0", ["--batch_size", "'0'", "at least 1 and at most 512"]),
        ("--batch_size=513", ["--batch_size", "'513'", "at least 1 and at most 512"]),
        ("--batch_size=2.5", ["--batch_size", "'2.5'", "a whole number"]),
        ("--batch_size=many", ["--batch_size", "'many'", "a whole number"]),
        ("--batch_size=", ["--batch_size", "a whole number"]),
        ("--rate=0", ["--rate", "'0'", "more than 0 and less than 1"]),
        ("--rate=nan", ["--rate", "'nan'", "a number more than 0"]),
        ("--rate=inf", ["--rate", "'inf'", "a number more than 0"]),
        ("--rate=a: b", ["--rate", "'a: b'", "a number"]),
        ("--ema=perhaps", ["--ema", "'perhaps'", "true or false"]),
        ("--widths=4,0", ["--widths", "'4,0'", "at least 1"]),
        ("--widths=4,x", ["--widths", "'4,x'", "whole numbers separated by commas"]),
        ("--loss=hinge", ["--loss", "'hinge'", "one of js, kl"]),
        ("--batch_size", ["batch_size"]),
        ("--flagfile=/nowhere/at/all", ["/nowhere/at/all"]),
        ("--batch_size=501", ["501", "2 widths"]),
    ],
)
def test_a_mistake_is_one_sentence_and_code_2(argument, words, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse(argument)
    out, err = capsys.readouterr()
    assert exit_.value.code == 2
    assert out == ""
    assert err.startswith("demo: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err.replace("\n", "")


def test_help_names_every_flag_with_its_range(capsys):
    with pytest.raises(SystemExit) as exit_:
        parse("--batch_size=8", "--help", "--zzz")
    out = capsys.readouterr().out
    assert exit_.value.code == 0
    run, execution = out.index("What is run"), out.index("How it is run")
    assert run < out.index("--batch_size  images per step (default 32; at least 1 and at most 512)") < execution
    assert execution < out.index("--workdir  the run's folder (default runs/demo)")
    assert "--[no]ema" in out
    assert "--widths  channels per level (default 16,32; at least 1)" in out
    assert "small: --batch_size=4 --widths=1,2" in out
    assert "default (the default)" in out


@given(
    batch_size=st.integers(1, 100),
    rate=st.floats(1e-9, 1.0, exclude_max=True),
    ema=st.booleans(),
    widths=st.lists(st.integers(1, 10**6), max_size=4).map(tuple),
    loss=st.sampled_from(["js", "kl"]),
)
@settings(max_examples=25, deadline=None)
def test_every_value_survives_the_command_line_and_the_file(batch_size, rate, ema, widths, loss):
    config = Config(batch_size=batch_size, rate=rate, ema=ema, widths=widths, loss=loss)
    shown = {"widths": ",".join(map(str, widths)), "ema": str(ema).lower()}
    given_ = [f"--{name}={shown.get(name, value)}" for name, value in dataclasses.asdict(config).items()]
    assert parse(*given_) == config
    with tempfile.TemporaryDirectory() as workdir:
        settle_config(config, workdir)
        stored = json.loads((pathlib.Path(workdir) / "config.json").read_text())
        assert Config(**stored | {"widths": tuple(stored["widths"])}) == config
        settle_config(config, workdir)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(batch_size=True),
        dict(batch_size=1.0),
        dict(rate=math.nan),
        dict(rate=1.0),
        dict(widths=[1]),
        dict(widths=(1.0,)),
        dict(loss="hinge"),
        dict(ema=1),
    ],
)
def test_a_configuration_made_in_python_is_checked_too(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Config(**wrong)


def test_declaration_mistakes():
    with pytest.raises(ValueError, match="role"):
        field(1, "x", role="other")
    with pytest.raises(ValueError, match="help"):
        field(1, "")
    with pytest.raises(TypeError, match="exclusive_minimum"):
        field(1, "x", exclusive_minimum=True)
    with pytest.raises(ValueError, match="'smaller' sets 'depth'"):
        parse_config(Config, {"smaller": {"depth": 1}}, [], prog="demo", description="")
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        parse_config(Config, {"default": {"batch_size": 0}}, [], prog="demo", description="")

    @dataclasses.dataclass(frozen=True)
    class Undeclared:
        depth: int = 1

    strange = dataclasses.make_dataclass("Strange", [("depth", list, field(None, "x"))], frozen=True)
    reserved = dataclasses.make_dataclass("Reserved", [("help", str, field("", "x"))], frozen=True)
    for cls, word in [(Undeclared, "declared with"), (strange, "must be an int"), (reserved, "flag of every launcher")]:
        with pytest.raises(TypeError, match=word):
            parse_config(cls, {}, [], prog="demo", description="")


@dataclasses.dataclass(frozen=True)
class Tool:
    folders: tuple[str, ...] = field((), "folders of runs", role="argument")
    output: str = field("out", "the file")

    def __post_init__(self):
        validate(self)


def parse_tool(*argv):
    return parse_config(Tool, {}, argv, prog="tool", description="A tool.")


@pytest.mark.parametrize(
    "argv",
    [
        ("a", "b,c", "--output=x"),
        ("--output=x", "a", "b,c"),
        ("a", "--output", "x", "b,c"),
        ("--output=x", "--", "a", "b,c"),
    ],
)
def test_arguments_stand_anywhere_between_the_flags(argv):
    assert parse_tool(*argv) == Tool(("a", "b,c"), "x")


def test_arguments_may_be_missing_and_may_look_like_flags_behind_two_dashes():
    assert parse_tool() == Tool()
    assert parse_tool("--output=x", "--", "--output=y") == Tool(("--output=y",), "x")


@pytest.mark.parametrize(
    ("argv", "words"),
    [(["a", "--folders=b"], "unknown flag --folders;"), (["a", "--ouput=b"], "did you mean output?")],
)
def test_an_argument_has_no_flag(argv, words, capsys):
    with pytest.raises(SystemExit):
        parse_tool(*argv)
    assert words in capsys.readouterr().err


def test_help_shows_the_arguments(capsys):
    with pytest.raises(SystemExit):
        parse_tool("--help")
    out = capsys.readouterr().out
    assert out.startswith("usage: tool FOLDERS ... [--flag=value ...]")
    assert "FOLDERS  folders of runs" in out
    assert "--folders" not in out


def test_only_one_field_takes_the_arguments_and_it_holds_texts():
    with pytest.raises(ConfigError, match="folders must be texts"):
        Tool(folders=("a", 1))  # pyright: ignore[reportArgumentType]
    number = dataclasses.make_dataclass("Number", [("n", int, field(1, "x", role="argument"))], frozen=True)
    flag = dataclasses.make_dataclass("Flag", [("n", tuple[str, ...], field((), "x"))], frozen=True)
    two = [(name, tuple[str, ...], field((), "x", role="argument")) for name in "ab"]
    for cls in (number, flag, dataclasses.make_dataclass("Two", two, frozen=True)):
        with pytest.raises(TypeError, match="must be a"):
            parse_config(cls, {}, [], prog="demo", description="")


def test_neither_jax_nor_anything_heavy_is_imported():
    code = (
        "import sys, poise.launch, poise.launch.config; "
        "heavy = {'jax', 'numpy', 'orbax', 'tensorflow_datasets', 'matplotlib', 'tqdm'} & set(sys.modules); "
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
