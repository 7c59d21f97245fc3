import builtins
import collections
import io
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from unclip_jax.checkpoint import CheckpointError
from unclip_jax.checkpoint.pickles import MAGIC, open_pickle

BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
LAYOUTS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def bits(tensor: torch.Tensor) -> np.ndarray:
    size = tensor.element_size()
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else torch.zeros(0)
    return flat.numpy().view(BITS[size]).reshape(tensor.shape) if tensor.numel() else np.zeros(tensor.shape, BITS[size])


def tensors() -> dict[str, torch.Tensor]:
    base = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    return {
        "float32": base,
        "float16": base.half(),
        "bfloat16": base.bfloat16(),
        "float64": base.double(),
        "int64": torch.arange(-3, 4),
        "uint8": torch.arange(5, dtype=torch.uint8),
        "bool": base > 0,
        "scalar": torch.tensor(0.1),
        "empty": torch.zeros(0, 3),
        "transposed": base.t(),  # shares its storage with float32
        "column": base[1:, 2],
        "every_other": base[::2, ::3],
        "parameter": torch.nn.Parameter(base[0].clone()),
    }


def save(path: Path, content: Any, zipped: bool = True, **more: Any) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=zipped, **more)
    return path


def refuse(path: Path, words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        open_pickle(path)
    assert str(caught.value).count("\n") == 0 and len(str(caught.value)) < 600


@LAYOUTS
@pytest.mark.parametrize("protocol", [2, 4])
def test_every_tensor_is_read_bit_for_bit(tmp_path: Path, zipped: bool, protocol: int):
    written = tensors()
    read = open_pickle(save(tmp_path / "a.bin", written, zipped, pickle_protocol=protocol))
    assert set(read) == set(written)
    for name, tensor in written.items():
        assert read[name].dtype.name == str(tensor.dtype).removeprefix("torch.")
        assert read[name].shape == tuple(tensor.shape) and not read[name].flags.writeable
        raw = np.ascontiguousarray(read[name]).reshape(tensor.shape).view(BITS[tensor.element_size()])
        np.testing.assert_array_equal(raw, bits(tensor))


def test_dtypes_without_an_old_storage_class_are_read(tmp_path: Path):
    written = {"wide": torch.ones(3, dtype=torch.uint16), "narrow": torch.ones(2, 2).to(torch.float8_e4m3fn).t()}
    read = open_pickle(save(tmp_path / "a.pt", written))
    assert read["wide"].tolist() == [1, 1, 1] and read["wide"].dtype == np.uint16
    assert read["narrow"].dtype == ml_dtypes.float8_e4m3fn and read["narrow"].astype(float).tolist() == [[1, 1]] * 2


@LAYOUTS
def test_arrays_are_the_file_itself(tmp_path: Path, zipped: bool):
    path = save(tmp_path / "a.bin", {"x": torch.full((5,), 7.25)}, zipped)
    read = open_pickle(path)["x"]
    start = path.read_bytes().index(np.full(5, 7.25, np.float32).tobytes())
    with path.open("r+b") as file:
        file.seek(start)
        file.write(np.float32(-1).tobytes())
    assert read.tolist() == [-1, 7.25, 7.25, 7.25, 7.25]


@LAYOUTS
def test_names_join_the_keys_and_values_besides_tensors_are_left_out(tmp_path: Path, zipped: bool):
    network = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    plain = open_pickle(save(tmp_path / "plain.bin", network.state_dict(), zipped))
    assert set(plain) == set(network.state_dict())
    wrapped = {
        "state_dict": network.state_dict(),
        "optimizer": {"state": {0: {"moment": torch.ones(9)}}},
        "epoch": 3,
        "size": torch.Size([1]),
    }
    assert set(open_pickle(save(tmp_path / "wrapped.ckpt", wrapped, zipped))) == set(plain)
    nested = {"a": {"b": [torch.ones(1), {0: torch.zeros(2)}], ("odd", "key"): None}, "dtype": torch.float16}
    assert set(open_pickle(save(tmp_path / "nested.pt", nested, zipped))) == {"a.b.0", "a.b.1.0"}
    assert set(open_pickle(save(tmp_path / "stats.th", (torch.ones(1), torch.ones(2)), zipped))) == {"0", "1"}
    assert set(open_pickle(save(tmp_path / "lone.pt", torch.ones(3), zipped))) == {"0"}


class Payload:
    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        function, *arguments = self.call
        return function, tuple(arguments)


@LAYOUTS
@pytest.mark.parametrize(
    ("function", "argument", "name"),
    [
        (os.system, "touch TARGET", "(posix|nt).system"),
        (builtins.open, "TARGET", f"{builtins.open.__module__}.open"),
        (builtins.eval, "open('TARGET', 'w')", "(__builtin__|builtins).eval"),
    ],
)
def test_a_payload_is_refused_by_name_and_does_nothing(
    tmp_path: Path, zipped: bool, function: Any, argument: str, name: str
):
    target = tmp_path / "created"
    arguments = [argument.replace("TARGET", str(target)), *(["w"] if function is builtins.open else [])]
    path = save(tmp_path / "a.bin", {"weight": torch.ones(2), "harmless": Payload(function, *arguments)}, zipped)
    refuse(path, f"asks to run {name}, .*nothing of it was run")
    assert not target.exists()
    torch.load(path, weights_only=False)
    assert target.exists()  # the payload would have worked


@pytest.mark.parametrize(
    "pickled",
    [
        b"cos\nsystem\n(S'touch created'\ntR.",
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93.",
        b"(S'touch created'\nios\nsystem\n.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)\x81.",
        b"\x80\x02ctorch\nload\n.",
        b"\x80\x02ctorch.storage\n_load_from_bytes\n.",
        b"\x80\x02c__builtin__\ngetattr\n.",
        b"\x80\x02ctorch.storage\nFloatStorage.__init__\n.",
        b"\x80\x02ccollections\nnamedtuple\n.",
    ],
)
def test_pickles_written_by_hand_are_refused(tmp_path: Path, pickled: bytes):
    refuse(legacy(tmp_path / "a.bin", pickled), "asks to run|pickle opcode (INST|NEWOBJ)")


def legacy(path: Path, pickled: bytes) -> Path:
    machine = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    head = b"".join(pickle.dumps(value, 2) for value in (MAGIC, 1001, machine))
    path.write_bytes(head + pickled + pickle.dumps([], 2))
    return path


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x02}q\x00U\x01ah\x00s.",  # a dict that holds itself
        b"\x80\x02]q\x00h\x00a.",
        b"\x80\x02}" + b"".join(b"q%c}(U\x01ah%cU\x01bh%cu" % (i, i, i) for i in range(60)) + b".",  # doubles each time
        b"\x80\x02" + b"]" * 3000 + b"a" * 2999 + b".",
    ],
)
def test_values_nested_without_end_are_refused(tmp_path: Path, pickled: bytes):
    refuse(legacy(tmp_path / "a.bin", pickled), "nested without end|RecursionError")


@pytest.mark.parametrize(
    "pickled",
    [
        b"",
        b"\x80\x02",
        b".",
        b"0.",
        b"R.",
        b"\x80\x02u.",
        b"h\x07.",
        b"N(NNu.",
        b"Na.",
        b"U\x01aQ.",
        b"\x80\x02ccollections\nOrderedDict\nU\x01a\x85R.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
        b"\x8a\xff1.",
        b"\x8d" + b"\xff" * 7 + b"\x7f.",  # a text of 2^63 bytes
        b"X\xff\xff\xff\x7f.",
        b"r\xff\xff\xff\x7f.",  # a memo of 2^31 entries
        b"\x96" + b"\xff" * 7 + b"\x7f.",
        b"c" + b"a" * 1000,
        b"\xff",
    ],
)
def test_damaged_pickles_are_refused(tmp_path: Path, pickled: bytes):
    refuse(legacy(tmp_path / "a.bin", pickled), "is not a whole file of torch.save|pickle opcode")


@LAYOUTS
def test_truncated_files_are_refused(tmp_path: Path, zipped: bool):
    path = save(tmp_path / "a.bin", {"x": torch.ones(100), "y": torch.ones(50)}, zipped)
    whole = path.read_bytes()
    for kept in range(1, len(whole), 61):
        path.write_bytes(whole[:kept])
        refuse(path, "is not a whole file|cannot be read")
    path.write_bytes(b"")
    refuse(path, "cannot be read")


def test_flipped_bytes_never_escape_as_another_error(tmp_path: Path):
    rng = np.random.default_rng(0)
    for zipped in (True, False):
        whole = save(tmp_path / "a.bin", {"x": torch.ones(4, 3).t(), "y": torch.ones(5)}, zipped).read_bytes()
        for _ in range(150):
            damaged = bytearray(whole)
            for place in rng.integers(len(whole), size=3):
                damaged[place] = rng.integers(256)
            (tmp_path / "b.bin").write_bytes(damaged)
            try:
                read = open_pickle(tmp_path / "b.bin")
            except CheckpointError as error:
                assert len(str(error)) < 800
            else:
                assert sum(array.nbytes for array in read.values()) <= 2 * len(whole)


def rewrite(path: Path, change: Any) -> Path:
    """The zip again with members as `change(name, content)` gives them: (name, content, compression), or None."""
    with zipfile.ZipFile(path) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members:
            if changed := change(name, content):
                archive.writestr(changed[0], changed[1], changed[2])
    path.write_bytes(buffer.getvalue())
    return path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda n, c: (n, c, zipfile.ZIP_DEFLATED), "compressed or encrypted member"),
        (lambda n, c: (n, c * 10**6 if "data/" in n else c, zipfile.ZIP_DEFLATED), "compressed or encrypted member"),
        (lambda n, c: (n, c * 9 if n.endswith("data/0") else c, 0), "216 bytes in data/0 where its tensors need 24"),
        (lambda n, c: (n, c[:8] if n.endswith("data/0") else c, 0), "8 bytes in data/0 where its tensors need 24"),
        (lambda n, c: (n.replace("data/0", "../../data/0"), c, 0), "leads out of it"),
        (lambda n, c: ("/" + n, c, 0), "leads out of it"),
        (lambda n, c: (n, b"big" if n.endswith("byteorder") else c, 0), "big-endian"),
        (lambda n, c: None if n.endswith("data/0") else (n, c, 0), "not a whole file.*data/0"),
        (lambda n, c: None if n.endswith("data.pkl") else (n, c, 0), "without one data.pkl"),
    ],
)
def test_zips_that_torch_does_not_write_are_refused(tmp_path: Path, change: Any, words: str):
    path = save(tmp_path / "a.bin", {"x": torch.arange(6.0)})
    assert open_pickle(rewrite(path, lambda n, c: (n, c, 0)))["x"].tolist() == [0, 1, 2, 3, 4, 5]
    refuse(rewrite(path, change), words)


def test_zips_with_overlapping_members_are_refused(tmp_path: Path):
    path = save(tmp_path / "a.bin", {"x": torch.ones(64), "y": torch.zeros(64)})
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        first, second = (next(i for i in archive.infolist() if i.filename.endswith(f"data/{n}")) for n in "01")
    one, two = (struct.pack("<I", info.header_offset) for info in (first, second))
    entry = whole.index(b"PK\x01\x02", whole.index(b"PK\x01\x02") + 1)
    while whole[entry + 42 : entry + 46] != two:
        entry = whole.index(b"PK\x01\x02", entry + 1)
    path.write_bytes(whole[: entry + 42] + one + whole[entry + 46 :])
    refuse(path, "overlap")


def test_tensors_larger_than_their_storage_are_refused(tmp_path: Path):
    path = save(tmp_path / "a.bin", {"x": torch.ones(1).expand(1000, 1000, 1000)})
    refuse(path, "shape .1000, 1000, 1000., more than the 4 bytes")
    legacy_path = save(tmp_path / "b.bin", {"x": torch.ones(3)}, zipped=False)
    whole = legacy_path.read_bytes()
    place = whole.rindex(struct.pack("<Q", 3))
    legacy_path.write_bytes(whole[:place] + struct.pack("<Q", 2**40) + whole[place + 8 :])
    refuse(legacy_path, "1099511627776 elements")


def test_two_tensors_of_one_name_are_refused(tmp_path: Path):
    content = collections.OrderedDict({"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}})
    refuse(save(tmp_path / "a.bin", content), "two tensors of the name 'a.b'")
