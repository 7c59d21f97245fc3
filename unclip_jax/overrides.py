"""Configs by name, and typed command-line overrides of their fields."""

import difflib
import math
import runpy
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from unclip_jax.config import TrainConfig

Config = TypeVar("Config")


class UsageError(ValueError):
    """A command line that cannot be followed; its text is one sentence for the user."""


def apply(config: Config, arguments: Sequence[str]) -> Config:
    """Config with fields replaced, from `--group.field value` or `--group.field=value`; dashes equal underscores.

    The value's type is the field's annotation: tuples are separated by commas, `none` is None where that is allowed,
    and a boolean may stand without a value. Raises UsageError for an unknown option (naming the nearest) or a value of
    another type.
    """
    queue = list(arguments)
    while queue:
        option, equals, text = queue.pop(0).partition("=")
        if not option.startswith("--"):
            raise UsageError(f"expected an option such as --optim.learning-rate, not '{option}'")
        key = option.removeprefix("--").replace("-", "_")
        hint = _find(config, key)
        if not equals:
            if queue and not queue[0].startswith("--"):
                text = queue.pop(0)
            elif hint is bool:
                text = "true"
            else:
                raise UsageError(f"{_flag(key)} needs a value: {_describe(hint)}")
        config = _replace(config, key.split("."), _parse(hint, text, key))
    return config


def options(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every field that can be overridden, as dotted name -> annotated type."""
    hints = get_type_hints(type(config))
    found = {}
    for entry in fields(config):
        value = getattr(config, entry.name)
        name = prefix + entry.name
        if is_dataclass(value):
            found |= options(value, name + ".")
        else:
            found[name] = hints[entry.name]
    return found


def load_config(name_or_path: str | Path) -> TrainConfig:
    """The TrainConfig that a config's get_config() returns; a packaged name such as emoji_decoder, or a .py file.

    Raises UsageError where there is no such config, or it does not give a TrainConfig.
    """
    path = Path(name_or_path)
    if path.suffix != ".py":
        known = available_configs()
        name = str(name_or_path).replace("-", "_")
        if name not in known:
            raise UsageError(
                f"unknown config '{name_or_path}'{_suggest(name, known)} available: {', '.join(known) or 'none'}; "
                "or give the path of a .py file"
            )
        path = known[name]
    elif not path.is_file():
        raise UsageError(f"there is no config file '{path}'")
    try:
        config = runpy.run_path(str(path))["get_config"]()
    except KeyError as error:
        raise UsageError(f"config '{path}' does not work: no {error}; it needs a function get_config()") from error
    except Exception as error:
        raise UsageError(f"config '{path}' does not work: {type(error).__name__}: {error}") from error
    if not isinstance(config, TrainConfig):
        raise UsageError(f"get_config() of '{path}' gives a {type(config).__name__}, expected a TrainConfig")
    return config


def available_configs() -> dict[str, Path]:
    """Packaged configs by name: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).parent
    folders = [package / "_configs", package.parent / "configs"]
    folder = next((folder for folder in folders if folder.is_dir()), None)
    paths = sorted(folder.glob("[!_]*.py")) if folder else []
    return {path.stem: path for path in paths}


def _find(config: Any, key: str) -> Any:
    known = options(config)
    if key in known:
        return known[key]
    inside = [name for name in known if name.startswith(key + ".")]
    if inside:
        raise UsageError(f"{_flag(key)} is a group of options, such as {_flag(inside[0])}")
    raise UsageError(f"unknown option {_flag(key)}{_suggest(key, known, _flag)}".removesuffix(";"))


def _replace(config: Any, keys: list[str], value: Any) -> Any:
    head, *rest = keys
    return replace(config, **{head: _replace(getattr(config, head), rest, value) if rest else value})


def _parse(hint: Any, text: str, key: str) -> Any:
    try:
        return _value(hint, text.strip())
    except ValueError:
        raise UsageError(f"{_flag(key)} expects {_describe(hint)}, not '{text}'") from None


def _value(hint: Any, text: str) -> Any:
    """Value of a text under an annotation; ValueError where it is none."""
    arguments = get_args(hint)
    kind = get_origin(hint) or hint
    if kind is Literal:
        return _choice(arguments, text)
    if kind in (Union, UnionType):
        return _first(arguments, text)
    if kind is tuple:
        items = [item.strip() for item in text.strip("()").split(",") if item.strip()]
        hints = [arguments[0]] * len(items) if arguments[-1] is Ellipsis else arguments
        return tuple(_value(inner, item) for inner, item in zip(hints, items, strict=True))
    if kind is dict:
        pairs = [item.split("=", 1) for item in text.split(",") if item]
        return {name.strip(): _value(arguments[1], value) for name, value in pairs}
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(text)
        return text.lower() == "true"
    if kind is NoneType:
        if text.lower() != "none":
            raise ValueError(text)
        return None
    if kind is float:
        number = float(text)
        if math.isnan(number):
            raise ValueError(text)
        return number
    if kind in (int, str):
        return kind(text)
    raise ValueError(text)


def _choice(choices: tuple[Any, ...], text: str) -> Any:
    for choice in choices:
        if str(choice) == text:
            return choice
    raise ValueError(text)


def _first(hints: tuple[Any, ...], text: str) -> Any:
    # None goes first, since str would take the word as well.
    for hint in sorted(hints, key=lambda hint: hint is not NoneType):
        try:
            return _value(hint, text)
        except ValueError:
            continue
    raise ValueError(text)


def _describe(hint: Any) -> str:
    arguments = get_args(hint)
    kind = get_origin(hint) or hint
    if kind is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if kind in (Union, UnionType):
        return " or ".join(_describe(inner) for inner in arguments)
    if kind is tuple and arguments[-1] is Ellipsis:
        return f"values separated by commas, each {_describe(arguments[0])}"
    if kind is tuple:
        return f"{len(arguments)} values separated by commas, each {_describe(arguments[0])}"
    if kind is dict:
        return "name=value pairs separated by commas"
    if kind is bool:
        return "true or false"
    if kind is NoneType:
        return "none"
    if kind is int:
        return "an integer"
    if kind is float:
        return "a number"
    if kind is str:
        return "a text"
    return str(hint)


def _flag(key: str) -> str:
    return "--" + key.replace("_", "-")


def _suggest(name: str, known: Any, show: Any = str) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)
    return f"; did you mean {show(near[0])}?" if near else ";"
