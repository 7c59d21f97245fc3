"""Tensors of torch's pickled files, read without torch and without executing anything.

The pickle is interpreted here, over the few opcodes and globals that a file of tensors needs. A global is only a name:
nothing is imported, called or set, so a payload is an error like any other unknown name. Sources: the description of
opcodes in Python's `pickletools`; the two layouts of torch.save (a zip since torch 1.6, consecutive pickles before).
"""

import math
import pickletools
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, cast

import ml_dtypes
import numpy as np

from unclip_jax.checkpoint.mapped import MAX_READ, MappedFile, map_file, view
from unclip_jax.checkpoint.schema import CheckpointError

MAGIC = 0x1950A86A20F9469CFC6C  # the first of the legacy layout's pickles
MAX_NODES = 2**18  # values in the pickled object: shared dicts must not multiply without end
MAX_NAME = 1000  # characters in a tensor's name, which bounds the depth too

STORAGES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
    "UntypedStorage": np.dtype(np.uint8),
}
DTYPES = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "int64": np.dtype(np.int64),
    "int32": np.dtype(np.int32),
    "int16": np.dtype(np.int16),
    "int8": np.dtype(np.int8),
    "uint64": np.dtype(np.uint64),
    "uint32": np.dtype(np.uint32),
    "uint16": np.dtype(np.uint16),
    "uint8": np.dtype(np.uint8),
    "bool": np.dtype(np.bool_),
}


class _Global(NamedTuple):
    """A global's name, which stands for what torch would import."""

    module: str
    name: str


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    size: int  # bytes


class _Tensor(NamedTuple):
    """Offset and strides in elements."""

    storage: _Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Mark:
    """Where the arguments of an opcode begin on the stack."""


class _Opaque:
    """A value that is no part of any tensor."""


def open_pickle(path: str | Path) -> dict[str, np.ndarray]:
    """Every tensor of a file that torch.save wrote, as a memory-mapped, read-only array in the dtype of the file.

    Names are the keys on the way to a tensor joined by dots, the numbers of a list or tuple's items among them (a lone
    tensor is named 0); where the outermost dict has a `state_dict`, that alone is read and is not part of the names.
    Values that are no tensors are left out. Raises CheckpointError for whatever is not such a file.
    """
    path = Path(path)
    mapping = map_file(path)
    try:
        tensors, offsets = _read_zip(mapping) if mapping[:4] == b"PK\x03\x04" else _read_legacy(mapping)
        return {name: _array(mapping, tensor, offsets[tensor.storage.key]) for name, tensor in tensors.items()}
    except CheckpointError as error:
        raise CheckpointError(f"'{path}' {error}") from error
    except (
        *(ValueError, TypeError, KeyError, IndexError, OverflowError, OSError, EOFError, RecursionError),
        *(struct.error, zipfile.BadZipFile, NotImplementedError),
    ) as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        raise CheckpointError(
            f"'{path}' is not a whole file of torch.save ({reason}): it is truncated, damaged or of another kind, "
            "fetch it again"
        ) from error


def _array(mapping: MappedFile, tensor: _Tensor, offset: int) -> np.ndarray:
    item = tensor.dtype.itemsize
    strides = tuple(stride * item for stride in tensor.strides)
    return view(mapping, tensor.dtype, tensor.shape, offset + tensor.offset * item, strides)


def _read_zip(mapping: MappedFile) -> tuple[dict[str, _Tensor], dict[str, int]]:
    """The tensors, and where in the file each storage begins: torch.save since 1.6."""
    with zipfile.ZipFile(mapping) as archive:  # type: ignore[arg-type]
        members = archive.infolist()
    by_name = {member.filename: member for member in members}
    if len(by_name) != len(members):
        raise CheckpointError("is a zip with two members of one name: fetch it again")
    for name in by_name:
        if name.startswith("/") or "\\" in name or ".." in name.split("/"):
            raise CheckpointError(f"is a zip whose member '{name[:80]}' leads out of it: do not trust it")
    roots = [name.removesuffix("data.pkl") for name in by_name if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(roots) != 1:
        raise CheckpointError("is a zip without one data.pkl, so no file of torch.save: check the path")
    root = roots[0]
    spans = {member.filename: _member_span(mapping, member) for member in members if not member.is_dir()}
    end = 0
    for start, stop in sorted(spans.values()):
        if start < end:
            raise CheckpointError("is a zip whose members overlap: do not trust it")
        end = stop
    if (order := spans.get(f"{root}byteorder")) and mapping[order[0] : order[1]] != b"little":
        raise CheckpointError("was saved by a big-endian machine: save it again on a little-endian one")

    start, stop = spans[f"{root}data.pkl"]
    pickled, end = _unpickle(mapping, start)
    if end != stop:
        raise ValueError("its pickle does not end where its member does")
    tensors = _flatten(pickled)
    storages = {tensor.storage for tensor in tensors.values()}
    for storage in storages:
        begin, stop = spans[f"{root}data/{storage.key}"]
        if stop - begin != storage.size:
            raise CheckpointError(
                f"holds {stop - begin} bytes in data/{storage.key[:80]} where its tensors need {storage.size}: "
                "it is damaged, fetch it again"
            )
    return tensors, {storage.key: spans[f"{root}data/{storage.key}"][0] for storage in storages}


def _member_span(mapping: MappedFile, member: zipfile.ZipInfo) -> tuple[int, int]:
    """Where a stored member's bytes begin and end."""
    if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size or member.flag_bits & 1:
        raise CheckpointError(
            f"holds the compressed or encrypted member '{member.filename[:80]}', which torch.save never writes: "
            "save it again with torch.save"
        )
    header = mapping[member.header_offset : member.header_offset + 30]
    signature, name_length, extra_length = struct.unpack("<4s22xHH", header)
    start = member.header_offset + 30 + name_length + extra_length
    if signature != b"PK\x03\x04" or start + member.file_size > len(mapping):
        raise ValueError(f"member '{member.filename[:80]}' lies outside of the file")
    return start, start + member.file_size


def _read_legacy(mapping: MappedFile) -> tuple[dict[str, _Tensor], dict[str, int]]:
    """The tensors, and where in the file each storage begins: torch.save before 1.6."""
    magic, end = _unpickle(mapping, 0)
    if magic != MAGIC:
        raise ValueError("it does not begin as one")
    _, end = _unpickle(mapping, end)
    machine, end = _unpickle(mapping, end)
    if not machine["little_endian"]:
        raise CheckpointError("was saved by a big-endian machine: save it again on a little-endian one")
    storages: dict[str, _Storage] = {}
    pickled, end = _unpickle(mapping, end, storages)
    keys, end = _unpickle(mapping, end)
    offsets: dict[str, int] = {}
    for key in keys:
        (count,) = struct.unpack("<Q", mapping[end : end + 8])
        if key not in storages or key in offsets:
            raise ValueError("its list of storages is not that of its pickle")
        storage = storages[key]
        if count * storage.dtype.itemsize != storage.size or end + 8 + storage.size > len(mapping):
            raise ValueError(f"storage {key[:80]} has {count} elements there and another number in the pickle")
        offsets[key] = end + 8
        end += 8 + storage.size
    return _flatten(pickled), offsets


def _flatten(pickled: Any) -> dict[str, _Tensor]:
    if isinstance(pickled, dict) and isinstance(pickled.get("state_dict"), dict):
        pickled = pickled["state_dict"]
    if isinstance(pickled, _Tensor):
        pickled = [pickled]
    tensors: dict[str, _Tensor] = {}
    waiting, count = [("", pickled)], 0
    while waiting:
        prefix, value = waiting.pop()
        match value:
            case dict():
                items = list(value.items())
            case list() | tuple():
                items = list(enumerate(value))
            case _:
                items = []
        count += len(items)
        for key, inner in items:
            name = f"{prefix}{key}"
            if count > MAX_NODES or len(name) > MAX_NAME:
                raise CheckpointError("holds values nested without end: do not trust it")
            if isinstance(inner, _Tensor):
                if name in tensors:
                    raise CheckpointError(f"holds two tensors of the name '{name[:80]}': fetch it again")
                tensors[name] = inner
            elif isinstance(inner, dict | list | tuple):
                waiting.append((f"{name}.", inner))
    return tensors


def _unpickle(mapping: MappedFile, start: int, storages: dict[str, _Storage] | None = None) -> tuple[Any, int]:
    """The value of the pickle that begins at `start`, and the position behind it; storages that it names are added."""
    mapping.seek(start)
    storages = {} if storages is None else storages
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    operations = cast(Iterable[tuple[Any, Any, Any]], pickletools.genops(mapping))  # type: ignore[arg-type]
    for opcode, argument, position in operations:
        if mapping.tell() - start > MAX_READ:
            raise ValueError("its pickle is too long for a list of tensors")
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop(), mapping.tell()
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "INT" | "LONG" | "LONG1" | "LONG4" | "FLOAT" | "BINFLOAT":
                stack.append(argument)
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8" | "UNICODE":
                stack.append(argument)
            case "STRING" | "BINSTRING" | "SHORT_BINSTRING" | "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8":
                stack.append(argument.decode("latin-1") if isinstance(argument, bytes) else argument)
            case "MARK":
                stack.append(_Mark())
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(_pop(stack, int(opcode.name[-1]))))
            case "TUPLE":
                stack.append(tuple(_pop_to_mark(stack)))
            case "EMPTY_LIST":
                stack.append([])
            case "LIST":
                stack.append(_pop_to_mark(stack))
            case "APPEND" | "APPENDS":
                items = _pop(stack, 1) if opcode.name == "APPEND" else _pop_to_mark(stack)
                if type(stack[-1]) is not list:
                    raise ValueError("it appends to what is no list")
                stack[-1].extend(items)
            case "EMPTY_DICT":
                stack.append({})
            case "DICT":
                items = _pop_to_mark(stack)
                stack.append({})
                _set_items(stack[-1], items)
            case "SETITEM" | "SETITEMS":
                items = _pop(stack, 2) if opcode.name == "SETITEM" else _pop_to_mark(stack)
                _set_items(stack[-1], items)
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET" | "GET":
                stack.append(memo[argument])
            case "POP":
                stack.pop()
            case "GLOBAL":
                stack.append(_check_global(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                stack.append(_check_global(*_pop(stack, 2)))
            case "BINPERSID":
                storage = _storage(stack.pop())
                if storages.setdefault(storage.key, storage) != storage:
                    raise ValueError(f"storage {storage.key[:80]} has two types or lengths")
                stack.append(storage)
            case "REDUCE":
                function, arguments = _pop(stack, 2)
                stack.append(_reduce(function, arguments))
            case "BUILD":
                stack.pop()  # attributes of an ordered dict: the versions of modules
            case _:
                raise CheckpointError(
                    f"holds the pickle opcode {opcode.name} at byte {position}, which no file of tensors needs: "
                    "nothing of it was run, do not trust it"
                )
    raise ValueError("its pickle has no end")


def _pop(stack: list[Any], count: int) -> list[Any]:
    if len(stack) < count:
        raise ValueError("its pickle takes more values than it has")
    items = stack[-count:]
    del stack[-count:]
    return items


def _pop_to_mark(stack: list[Any]) -> list[Any]:
    items: list[Any] = []
    while not isinstance(item := stack.pop(), _Mark):
        items.append(item)
    return items[::-1]


def _set_items(target: Any, items: list[Any]) -> None:
    if type(target) is not dict:
        raise ValueError("it sets items of what is no dict")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) not in (str, int):
            key = f"<{type(key).__name__} {len(target)}>"  # a key of no tensor, such as a tuple's
        target[key] = value


def _check_global(module: Any, name: Any) -> _Global:
    match module, name:
        case "torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2" | "_rebuild_tensor_v3" | "_rebuild_parameter":
            return _Global(module, name)
        case "torch" | "torch.cuda" | "torch.storage", str() if name in STORAGES:
            return _Global(module, name)
        case ("torch", str()) if name in DTYPES or name == "Size":
            return _Global(module, name)
        case "collections", "OrderedDict":
            return _Global(module, name)
    raise CheckpointError(
        f"asks to run {str(module)[:80]}.{str(name)[:80]}, which no file of tensors needs: nothing of it was run, "
        "do not trust it (if it is yours, save only its state_dict, or save it as safetensors)"
    )


def _storage(identity: Any) -> _Storage:
    """The storage of a persistent id: ("storage", type, key, location, elements), and None in old files."""
    match identity:
        case ("storage", _Global(_, name), str(key), _, int(count)) if name in STORAGES and count >= 0:
            pass
        case ("storage", _Global(_, name), str(key), _, int(count), None) if name in STORAGES and count >= 0:
            pass
        case _:
            raise ValueError("it names a storage in an unknown way")
    return _Storage(key, STORAGES[name], count * STORAGES[name].itemsize)


def _reduce(function: Any, arguments: Any) -> Any:
    match function, arguments:
        case _Global(_, "OrderedDict"), ():
            return {}
        case _Global(_, "OrderedDict"), (list(pairs),):
            result: dict[Any, Any] = {}
            _set_items(result, [item for key, value in pairs for item in (key, value)])
            return result
        case _Global(_, "Size"), _:
            return _Opaque()
        case _Global(_, "_rebuild_parameter"), (_Tensor() as tensor, *_):
            return tensor
        case _Global(_, "_rebuild_tensor_v3"), (_Storage() as storage, offset, shape, strides, _, _, dtype, *_):
            if isinstance(dtype, _Global) and dtype.name in DTYPES:
                return _tensor(storage, DTYPES[dtype.name], offset, shape, strides)
        case _Global(_, "_rebuild_tensor" | "_rebuild_tensor_v2"), (_Storage() as storage, offset, shape, strides, *_):
            return _tensor(storage, storage.dtype, offset, shape, strides)
    raise ValueError("it calls a function with unknown arguments")


def _tensor(storage: _Storage, dtype: np.dtype, offset: Any, shape: Any, strides: Any) -> _Tensor:
    numbers = (offset, *shape, *strides)
    if any(type(number) is not int or number < 0 for number in numbers) or len(shape) != len(strides):
        raise ValueError("it has a tensor of an impossible shape")
    last = sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True)) if math.prod(shape) else -1
    if (offset + last + 1) * dtype.itemsize > storage.size or math.prod(shape) * dtype.itemsize > storage.size:
        raise CheckpointError(
            f"has a tensor of shape {tuple(shape)}, more than the {storage.size} bytes that hold it: "
            "it is damaged, or a repeated view that must be saved as a contiguous tensor"
        )
    return _Tensor(storage, dtype, offset, tuple(shape), tuple(strides))
