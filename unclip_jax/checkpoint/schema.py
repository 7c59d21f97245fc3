"""Configs as JSON and back, strictly: what a checkpoint says of the network that it holds."""

from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from unclip_jax import config as configs

SCHEMA_VERSION = 1


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; its text is one sentence that says what is wrong and what to do."""


def to_json(config: Any) -> dict[str, Any]:
    """A config dataclass as JSON values: every dataclass with its name under "type", and the schema version on top."""
    return {"schema_version": SCHEMA_VERSION, **_encode(config)}


def from_json(data: Any) -> Any:
    """The config that to_json gave; CheckpointError naming whatever is unknown, missing or of another type."""
    if not isinstance(data, dict) or "schema_version" not in data:
        raise CheckpointError("the checkpoint's config has no schema_version: it was not written by unclip_jax")
    data = dict(data)
    version = data.pop("schema_version")
    if version != SCHEMA_VERSION:
        raise CheckpointError(
            f"the checkpoint's config has schema version {version}, and this unclip_jax reads {SCHEMA_VERSION}: "
            "use the release that wrote it"
        )
    return _dataclass(_type_named(data.get("type"), "config"), data, "config")


def _type_named(name: Any, path: str) -> type:
    match name:
        case "TransformerConfig":
            return configs.TransformerConfig
        case "ClipConfig":
            return configs.ClipConfig
        case "PriorConfig":
            return configs.PriorConfig
        case "ArPriorConfig":
            return configs.ArPriorConfig
        case "UNetConfig":
            return configs.UNetConfig
        case "DecoderConfig":
            return configs.DecoderConfig
        case "UpsamplerConfig":
            return configs.UpsamplerConfig
        case "DiffusionConfig":
            return configs.DiffusionConfig
        case "SampleConfig":
            return configs.SampleConfig
        case "OptimConfig":
            return configs.OptimConfig
        case "DataConfig":
            return configs.DataConfig
        case "TrainConfig":
            return configs.TrainConfig
    raise CheckpointError(f"{path} has the unknown type {name!r}: a newer unclip_jax may know it")


def _encode(value: Any) -> Any:
    match value:
        case value if is_dataclass(value):
            return {"type": type(value).__name__} | {
                entry.name: _encode(getattr(value, entry.name)) for entry in fields(value)
            }
        case tuple():
            return [_encode(item) for item in value]
        case dict():
            return {str(key): _encode(item) for key, item in value.items()}
        case bool() | int() | float() | str() | None:
            return value
    raise TypeError(f"a config holds {type(value).__name__}, which has no JSON form")


def _dataclass(kind: type, data: dict[str, Any], path: str) -> Any:
    hints = get_type_hints(kind)
    names = {entry.name for entry in fields(kind)}
    # A field that came later than the file may be absent if it has a default, which must mean the old behaviour.
    needed = {e.name for e in fields(kind) if e.default is MISSING and e.default_factory is MISSING}
    given = set(data) - {"type"}
    for problem, keys in (("unknown", given - names), ("missing", needed - given)):
        if keys:
            raise CheckpointError(
                f"{path} ({kind.__name__}) has {problem} {', '.join(sorted(keys))}: "
                "it was written by another version of unclip_jax"
            )
    return kind(**{name: _decode(hints[name], data[name], f"{path}.{name}") for name in sorted(names & given)})


def _decode(hint: Any, value: Any, path: str) -> Any:
    """Value of a field from its JSON under its annotation."""
    arguments = get_args(hint)
    kind: Any = get_origin(hint) or hint
    if kind in (Union, UnionType):
        return _union(arguments, value, path)
    if is_dataclass(kind) and isinstance(value, dict):
        named = _type_named(value.get("type"), path)
        if named is kind:
            return _dataclass(named, value, path)
    if kind is Literal and value in arguments:
        return value
    if kind is tuple and isinstance(value, list):
        hints = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(hints) == len(value):
            return tuple(_decode(inner, item, path) for inner, item in zip(hints, value, strict=True))
    if kind is dict and isinstance(value, dict):
        return {key: _decode(arguments[1], item, path) for key, item in value.items()}
    if kind is float and type(value) in (int, float):
        return value
    if kind in (int, bool, str, NoneType) and type(value) is kind:
        return value
    shown = value.get("type") if isinstance(value, dict) else value
    raise CheckpointError(f"{path} is {shown!r}, expected {getattr(hint, '__name__', hint)}: the checkpoint is damaged")


def _union(hints: tuple[Any, ...], value: Any, path: str) -> Any:
    """A dataclass by its type name, anything else by the first alternative that takes it."""
    if isinstance(value, dict):
        kind = _type_named(value.get("type"), path)
        if kind in hints:
            return _dataclass(kind, value, path)
    else:
        for hint in hints:
            try:
                return _decode(hint, value, path)
            except CheckpointError:
                continue
    expected = " or ".join(getattr(hint, "__name__", str(hint)) for hint in hints)
    shown = value.get("type") if isinstance(value, dict) else value
    raise CheckpointError(f"{path} is {shown!r}, expected {expected}: the checkpoint is damaged")
