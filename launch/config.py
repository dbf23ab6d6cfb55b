"""A launcher's flags: the fields of one frozen dataclass, read with absl and checked."""

import contextlib
import dataclasses
import difflib
import math
import sys
import textwrap
import typing
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from absl import flags

from poise.launch.errors import LaunchError

ROLES = ("run", "execution", "argument")
RESERVED = ("help", "flagfile", "undefok")

Config = TypeVar("Config")


class ConfigError(LaunchError, ValueError):
    """A flag, a configuration or a run's folder that cannot be used; the message is one sentence for the user."""


def field(
    default: Any,
    help: str,
    *,
    role: str = "run",
    minimum: float | int | None = None,
    maximum: float | int | None = None,
    exclusive_minimum: float | int | None = None,
    exclusive_maximum: float | int | None = None,
    choices: Sequence[Any] | None = None,
) -> Any:
    """One field of a launcher's configuration, which is one flag.

    Bounds and choices hold for every entry of a tuple.

    Args:
      default: the value without the flag: an int, float, bool, str, or tuple of ints.
      help: what the field means, with its unit; the flag's help text.
      role: ``"run"`` for what a resumed run must agree with, ``"execution"`` for what may change when a run is resumed
        (paths, devices, logging, the total number of steps), ``"argument"`` for the one field of type
        ``tuple[str, ...]``, which has no flag and takes what stands on the command line without one.
      minimum: the smallest value allowed.
      maximum: the largest value allowed.
      exclusive_minimum: the value must be larger than this number.
      exclusive_maximum: the value must be smaller than this number.
      choices: the only values allowed.

    Returns:
      A dataclass field with these as its metadata.

    Raises:
      ValueError: for an unknown role or an empty help text.
      TypeError: for a bound that is not a number.

    Example:
      >>> import dataclasses
      >>> from poise.launch.config import field
      >>> @dataclasses.dataclass(frozen=True)
      ... class Config:
      ...     batch_size: int = field(128, "images per step", minimum=1)
      ...     workdir: str = field("runs/digits", "the run's folder", role="execution")
      >>> Config()
      Config(batch_size=128, workdir='runs/digits')
    """
    if role not in ROLES:
        raise ValueError(f"role must be one of {', '.join(ROLES)}, got {role!r}")
    if not help:
        raise ValueError("help must say what the field means, got an empty text")
    bounds = dict(
        minimum=minimum, maximum=maximum, exclusive_minimum=exclusive_minimum, exclusive_maximum=exclusive_maximum
    )
    for name, bound in bounds.items():
        if isinstance(bound, bool) or not isinstance(bound, int | float | None):
            raise TypeError(f"{name} must be a number, got {bound!r}")
    metadata = dict(bounds, help=help, role=role, choices=None if choices is None else tuple(choices))
    return dataclasses.field(default=default, metadata={"poise": metadata})


def allowed(metadata: Mapping[str, Any]) -> str:
    """The values that a field admits, in words; empty where its type says all."""
    if metadata["choices"] is not None:
        return "one of " + ", ".join(str(choice) for choice in metadata["choices"])
    words = [
        ("at least", metadata["minimum"]),
        ("more than", metadata["exclusive_minimum"]),
        ("at most", metadata["maximum"]),
        ("less than", metadata["exclusive_maximum"]),
    ]
    return " and ".join(f"{word} {bound:g}" for word, bound in words if bound is not None)


def _within(value: Any, metadata: Mapping[str, Any]) -> bool:
    if metadata["choices"] is not None:
        return value in metadata["choices"]
    return not (
        (metadata["minimum"] is not None and value < metadata["minimum"])
        or (metadata["maximum"] is not None and value > metadata["maximum"])
        or (metadata["exclusive_minimum"] is not None and value <= metadata["exclusive_minimum"])
        or (metadata["exclusive_maximum"] is not None and value >= metadata["exclusive_maximum"])
    )


TYPES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
TUPLE = tuple[int, ...]
TEXTS = tuple[str, ...]


def _type_words(kind: Any) -> str:
    return {TUPLE: "whole numbers separated by commas", TEXTS: "texts"}.get(kind) or TYPES[kind]


def _has_type(value: Any, kind: Any) -> bool:
    if kind in (TUPLE, TEXTS):
        return isinstance(value, tuple) and all(_has_type(entry, typing.get_args(kind)[0]) for entry in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return type(value) is kind


def _problem(value: Any, kind: Any, metadata: Mapping[str, Any]) -> str | None:
    """What the value should have been, or None where it is fine."""
    if not _has_type(value, kind):
        return " ".join(filter(None, (_type_words(kind), allowed(metadata))))
    entries = value if kind in (TUPLE, TEXTS) else (value,)
    return None if all(_within(entry, metadata) for entry in entries) else allowed(metadata)


def config_fields(cls: type) -> dict[str, tuple[dataclasses.Field, Any, Mapping[str, Any]]]:
    """Name to (field, type, metadata) of a configuration dataclass, after checking its declaration."""
    if not dataclasses.is_dataclass(cls):
        raise TypeError(f"a configuration must be a dataclass, got {cls!r}")
    hints = typing.get_type_hints(cls)
    fields = {}
    for entry in dataclasses.fields(cls):
        if "poise" not in entry.metadata:
            raise TypeError(f"{cls.__name__}.{entry.name} must be declared with poise.launch.config.field")
        kind = hints[entry.name]
        if entry.metadata["poise"]["role"] == "argument":
            if kind != TEXTS or TEXTS in [other for _, other, _ in fields.values()]:
                raise TypeError(f"{cls.__name__}.{entry.name} must be a tuple[str, ...], and the only argument")
        elif kind not in TYPES and kind != TUPLE:
            raise TypeError(f"{cls.__name__}.{entry.name} must be an int, float, bool, str or tuple[int, ...]")
        if entry.name in RESERVED:
            raise TypeError(f"{cls.__name__}.{entry.name}: --{entry.name} is a flag of every launcher")
        fields[entry.name] = (entry, kind, entry.metadata["poise"])
    return fields


def validate(config: Any) -> None:
    """Checks every field of a configuration against its declared type, bounds and choices.

    Call it first in a configuration's ``__post_init__``, so that one made in Python is checked like one from flags.

    Args:
      config: a dataclass whose fields are declared with :func:`field`.

    Raises:
      ConfigError: naming the first field that is wrong, its value and what is allowed.

    Example:
      >>> import dataclasses
      >>> from poise.launch.config import field, validate
      >>> @dataclasses.dataclass(frozen=True)
      ... class Config:
      ...     batch_size: int = field(128, "images per step", minimum=1)
      >>> validate(Config(batch_size=0))
      Traceback (most recent call last):
      poise.launch.config.ConfigError: batch_size must be at least 1, got 0
    """
    for name, (_, kind, metadata) in config_fields(type(config)).items():
        problem = _problem(getattr(config, name), kind, metadata)
        if problem is not None:
            raise ConfigError(f"{name} must be {problem}, got {getattr(config, name)!r}")


_MARK = "\0"  # where the parsers' words begin in absl's message; the flag's own text may hold anything else


class _Parser(flags.ArgumentParser):
    """Reads one field's text; the error says what is allowed."""

    def __init__(self, kind: Any, metadata: Mapping[str, Any]):
        self._kind, self._metadata = kind, metadata
        self.syntactic_help = allowed(metadata)

    def parse(self, argument: Any) -> Any:
        """The value that a text stands for."""
        value = argument
        if isinstance(argument, str):
            try:
                if self._kind == TUPLE:
                    value = tuple(int(entry) for entry in argument.split(",")) if argument.strip() else ()
                elif self._kind in (int, float):
                    value = self._kind(argument)
            except ValueError:
                pass  # the text stays a text, which is the wrong type
        problem = _problem(value, self._kind, self._metadata)
        if problem is not None:
            raise ValueError(_MARK + problem)
        return value


class _BooleanParser(flags.BooleanParser):
    def parse(self, argument: Any) -> bool:
        try:
            return super().parse(argument)
        except (TypeError, ValueError):
            raise ValueError(_MARK + "true or false") from None


class _Serializer(flags.ArgumentSerializer):
    def serialize(self, value: Any) -> str:
        return _text(value)


def _text(value: Any) -> str:
    """A value as it is typed on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(str(entry) for entry in value) if isinstance(value, tuple) else str(value)


def _define(fields: Mapping[str, tuple[dataclasses.Field, Any, Mapping[str, Any]]], prog: str) -> flags.FlagValues:
    values = flags.FlagValues()
    for name, (_, kind, metadata) in fields.items():
        if kind == TEXTS:
            values.set_gnu_getopt(True)  # flags may stand behind arguments
            continue
        if kind is bool:
            flag = flags.BooleanFlag(name, None, metadata["help"])
            flag.parser = _BooleanParser()
        else:
            flag = flags.Flag(_Parser(kind, metadata), _Serializer(), name, None, metadata["help"])
        flags.DEFINE_flag(flag, flag_values=values, module_name=prog)
    if "recipe" not in fields:
        flags.DEFINE_string("recipe", None, "a named preset", flag_values=values)
    return values


def nearest(name: str, names: Sequence[str]) -> str:
    """`` (did you mean X?)`` for the closest of the names; empty where none is close."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def parse_names(flag: str, text: str, known: Sequence[str]) -> tuple[str, ...]:
    """The names in a text that is separated by commas.

    Args:
      flag: the field's name, for the message.
      text: what was given.
      known: the names there are.

    Raises:
      ConfigError: for no name, one that is unknown (with the nearest one) or given twice.

    Example:
      >>> from poise.launch.config import parse_names
      >>> parse_names("losses", "mse, c51", ("mse", "c51"))
      ('mse', 'c51')
    """
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if name not in known:
            raise ConfigError(f"{flag} must be among {', '.join(known)}, got {name!r}{nearest(name, known)}")
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"{flag} must hold one or more different names, got {text!r}")
    return names


def _exit(prog: str, sentence: str) -> NoReturn:
    print(f"{prog}: {sentence}", file=sys.stderr)
    raise SystemExit(2)


def _help(fields, recipes: Mapping[str, Mapping[str, Any]], default_recipe: str | None, prog: str, about: str) -> str:
    arguments = [(name, meta["help"]) for name, (_, kind, meta) in fields.items() if kind == TEXTS]
    usage = "".join(f" {name.upper()} ..." for name, _ in arguments)
    lines = [f"usage: {prog}{usage} [--flag=value ...]", "", *textwrap.wrap(about, 110), ""]
    lines += [line for name, text in arguments for line in (f"  {name.upper()}  {text}", "")]
    if recipes:
        lines += ["--recipe=NAME picks a preset; flags override it:"]
        for name, overrides in recipes.items():
            settings = " ".join(f"--{key}={_text(value)}" for key, value in overrides.items()) or "the defaults below"
            mark = " (the default)" if name == default_recipe else ""
            lines += textwrap.wrap(f"{name}{mark}: {settings}", 110, initial_indent="  ", subsequent_indent="      ")
        lines.append("")
    titles = {
        "run": "What is run (a resumed run must agree):",
        "execution": "How it is run (may change when a run is resumed):",
    }
    for role, title in titles.items():
        rows = [(n, entry, kind, meta) for n, (entry, kind, meta) in fields.items() if meta["role"] == role]
        if rows:
            lines.append(title)
        for name, entry, kind, meta in rows:
            if name == "recipe":
                continue
            flag = f"--[no]{name}" if kind is bool else f"--{name}"
            facts = [f"default {_text(entry.default) or 'empty'}", allowed(meta)]
            text = f"{flag}  {meta['help']} ({'; '.join(filter(None, facts))})"
            lines += textwrap.wrap(text, 110, initial_indent="  ", subsequent_indent="      ")
        if rows:
            lines.append("")
    return "\n".join(lines)


def parse_config(
    cls: type[Config],
    recipes: Mapping[str, Mapping[str, Any]],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
) -> Config:
    """Reads a launcher's command line into its configuration.

    Defaults come first, then the recipe's values, then the flags. If the dataclass has a field ``recipe``, its default
    names the recipe that holds without the flag. A mistake prints one sentence and leaves with code 2; ``--help``
    prints all flags with defaults and ranges and leaves with code 0. No global flag is defined or read.

    Args:
      cls: a frozen dataclass whose fields are declared with :func:`field`.
      recipes: the values that each named preset sets.
      argv: the arguments *without* the program's name, ``sys.argv[1:]``.
      prog: the launcher's name in messages, such as ``poise.launch.distill``.
      description: what the launcher does, for ``--help``.

    Returns:
      The checked configuration.

    Raises:
      SystemExit: with code 2 after a mistake, 0 after ``--help``.
      TypeError: if the dataclass is not declared as above.
      ValueError: if a recipe sets an unknown field or a bad value.

    Example:
      >>> import dataclasses
      >>> from poise.launch.config import field, parse_config
      >>> @dataclasses.dataclass(frozen=True)
      ... class Config:
      ...     batch_size: int = field(128, "images per step", minimum=1)
      ...     widths: tuple[int, ...] = field((16, 32), "channels of each level", minimum=1)
      >>> recipes = {"small": {"batch_size": 8}}
      >>> parse_config(Config, recipes, ["--recipe=small", "--widths=4,4"], prog="demo", description="A demo.")
      Config(batch_size=8, widths=(4, 4))
    """
    fields = config_fields(cls)
    for recipe, overrides in recipes.items():
        for name, value in overrides.items():
            if name not in fields:
                raise ValueError(f"recipe {recipe!r} sets {name!r}, which {cls.__name__} has not")
            problem = _problem(value, *fields[name][1:])
            if problem is not None:
                raise ValueError(f"recipe {recipe!r}: {name} must be {problem}, got {value!r}")
    default_recipe = str(fields["recipe"][0].default) if "recipe" in fields else None
    if any(argument in ("--help", "-help", "--h", "-h") for argument in argv):
        with contextlib.suppress(BrokenPipeError):  # `| head`
            print(_help(fields, recipes, default_recipe, prog, description), flush=True)
        raise SystemExit(0)

    values = _define(fields, prog)
    try:
        rest = values([prog, *argv])[1:]
    except flags.UnrecognizedFlagError as error:
        known = nearest(error.flagname, [*values, "help"])
        _exit(prog, f"unknown flag --{error.flagname}{known}; --help lists all flags")
    except flags.IllegalFlagValueError as error:
        _exit(prog, _illegal(error, fields))
    except flags.Error as error:
        _exit(prog, " ".join(str(error).split()))
    argument = next((name for name, (_, kind, _) in fields.items() if kind == TEXTS), None)
    if rest and argument is None:
        _exit(prog, f"unexpected argument {rest[0]!r}; a launcher takes only flags of the form --name=value")

    recipe = values["recipe"].value or default_recipe
    if recipe and recipe not in recipes:
        known = ", ".join(recipes) or "none (this launcher has no recipes)"
        _exit(prog, f"unknown recipe {recipe!r}{nearest(recipe, list(recipes))}; the recipes are {known}")
    settings = dict(recipes.get(recipe, {})) if recipe else {}
    settings |= {name: values[name].value for name in fields if name in values and values[name].present}
    if argument is not None and rest:
        settings[argument] = tuple(rest)
    for name, (_, kind, _) in fields.items():
        if kind is float and name in settings:
            settings[name] = float(settings[name])
    try:
        config = cls(**settings)
        validate(config)
    except ValueError as error:
        _exit(prog, str(error))
    return config


def _illegal(error: flags.IllegalFlagValueError, fields: Mapping[str, Any]) -> str:
    """Absl's ``flag --name=value: why`` as one sentence; the parsers above put what is allowed in its end."""
    head, _, problem = str(error).partition(f": {_MARK}")
    name, _, value = head.removeprefix("flag --").partition("=")
    if name not in fields:
        return " ".join(str(error).split())
    return f"--{name} must be {problem}, got {value!r}"
