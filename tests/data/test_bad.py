"""Files as they are found: what can be used is, what cannot is named and replaced, and nothing else stops."""

import io
import struct
import tarfile
import zlib
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unclip_jax.check_command import BROKEN
from unclip_jax.cli import main
from unclip_jax.config import DataConfig
from unclip_jax.data.loader import batches
from unclip_jax.data.records import Broken, DataError, open_source

from .conftest import add, jpeg

PLAIN = np.repeat(np.repeat(np.random.default_rng(1).integers(0, 256, (4, 6, 3), np.uint8), 16, 0), 16, 1)


def png(picture: np.ndarray | Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG of a few hundred bytes that claims 50,000 x 50,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header, data = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0), zlib.compress(bytes(100_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def cmyk() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PLAIN).convert("CMYK").save(buffer, "JPEG")
    return buffer.getvalue()


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return jpeg(np.rot90(PLAIN).copy(), exif=exif)


def animated() -> bytes:
    buffer = io.BytesIO()
    frames = [Image.fromarray(PLAIN), Image.new("RGB", (96, 64), "red")]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


USABLE = {  # file name -> bytes; all of them show PLAIN
    "wrong_ending.jpg": png(PLAIN),
    "cmyk.jpg": cmyk(),
    "deep.png": png(Image.fromarray(PLAIN[..., 0].astype(np.uint16) * 257)),
    "animated.gif": animated(),
    "turned.jpg": turned(),
}
UNUSABLE = {  # file name -> bytes, caption, what is said
    "truncated.jpg": (jpeg(PLAIN)[: len(jpeg(PLAIN)) // 2], b"a caption", "'truncated.jpg' is truncated or damaged"),
    "zero.jpg": (b"", b"a caption", "'zero.jpg' is empty"),
    "bomb.png": (bomb(), b"a caption", "'bomb.png' has more than 67 million pixels"),
    "no_picture.png": (b"<html>404</html>", b"a caption", "'no_picture.png' is not a picture"),
    "silent.jpg": (jpeg(PLAIN), None, "'silent.jpg' has no caption"),
    "blank.jpg": (jpeg(PLAIN), b" \n\n", "'blank.jpg' has no caption"),
    "latin1.jpg": (jpeg(PLAIN), "un café".encode("latin-1"), "the caption of 'latin1.jpg' is not UTF-8"),
}


def write(place: Path, name: str, data: bytes, caption: bytes | None) -> None:
    (place / name).write_bytes(data)
    if caption is not None:
        (place / name).with_suffix(".txt").write_bytes(caption)


@pytest.fixture(scope="module")
def bad(folder, tmp_path_factory) -> Path:
    """Twelve good pictures and all bad ones."""
    import shutil

    place = tmp_path_factory.mktemp("bad") / "pictures"
    shutil.copytree(folder, place)
    for name, (data, caption, _) in UNUSABLE.items():
        write(place, name, data, caption)
    return place


@pytest.mark.parametrize("name", USABLE)
def test_usable_pictures_are_used(name, tmp_path):
    write(tmp_path, name, USABLE[name], b"a caption")
    config = DataConfig(source=f"folder:{tmp_path}", size=64, batch_size=1, context_length=8, workers=0)
    picture = next(batches(config)).image[0]
    shown = np.repeat(PLAIN[..., :1], 3, 2) if name == "deep.png" else PLAIN
    assert np.abs(picture.astype(int) - shown[:, 16:80]).mean() < (12 if name in ("cmyk.jpg", "turned.jpg") else 6)


def test_a_caption_of_a_megabyte_is_cut(tmp_path):
    write(tmp_path, "a.jpg", jpeg(PLAIN), ("é" * 2**19).encode())
    (caption,) = open_source(f"folder:{tmp_path}")[0].captions
    assert caption == "é" * 10_001  # one more than is read, so that cutting it is said


@pytest.mark.filterwarnings("ignore:.*another record takes its place")
def test_broken_records_are_named_and_replaced_the_same_by_everyone(bad):
    config = DataConfig(source=f"folder:{bad}", size=16, batch_size=4, context_length=8, workers=0, max_broken=1.0)
    with pytest.warns(UserWarning) as told:
        run = list(islice(batches(config), 12))
    said = {str(warning.message).split(": another record takes its place")[0] for warning in told}
    assert all(any(text in line for line in said) for _, _, text in UNUSABLE.values())
    again = list(islice(batches(config, start=5, rows=np.asarray([1, 3])), 7))
    for batch, part in zip(run[5:], again, strict=True):
        assert np.array_equal(batch.image[[1, 3]], part.image) and np.array_equal(batch.tokens[[1, 3]], part.tokens)


@pytest.mark.filterwarnings("ignore:.*another record takes its place")
def test_too_many_broken_records_stop(bad, monkeypatch, tmp_path):
    monkeypatch.setattr("unclip_jax.data.reader.FIRST", 16)
    config = DataConfig(source=f"folder:{bad}", size=16, batch_size=4, context_length=8, workers=0)
    with pytest.raises(
        DataError, match="broken records in .* rows are more than --data.max-broken 0.01 allows; .*--fix"
    ):
        list(islice(batches(config), 20))
    write(tmp_path, "zero.jpg", b"", b"a caption")
    with pytest.raises(DataError, match="16 broken records one after another: 'zero.jpg' is empty"):
        next(batches(DataConfig(source=f"folder:{tmp_path}", size=16, batch_size=1, context_length=8, workers=0)))


def test_check_names_what_is_broken_and_lists_it(bad, tmp_path, capsys):
    before = {path: path.read_bytes() for path in bad.iterdir()}
    write(bad, "z_copy.jpg", (bad / "000.jpg").read_bytes(), (bad / "000.txt").read_bytes())
    skip, sheet = tmp_path / "skip.txt", tmp_path / "sheet.png"
    assert main(["data", "check", f"folder:{bad}", "--fix", str(skip), "--sheet", str(sheet)]) == BROKEN
    said = capsys.readouterr().out
    assert all(text in said for _, _, text in UNUSABLE.values())
    assert "20 records, all read, 13 fine" in said and "1 pictures are copies, 1 with their captions" in said
    assert "Latin 100.0%" in said and "3 to 4 (median 4) tokens" not in said
    keys = [line.split("\t")[0] for line in skip.read_text().splitlines() if not line.startswith("#")]
    assert sorted(keys) == sorted([*UNUSABLE, "z_copy.jpg"])
    assert Image.open(sheet).size[0] > 900
    assert main(["data", "check", f"folder:{bad}", "--skip", str(skip), "--sample", "5"]) == 0
    assert "12 records, 5 of them read, 5 fine" in capsys.readouterr().out
    assert all(path.read_bytes() == data for path, data in before.items())


def test_sheets_show_what_tokens_say():
    from unclip_jax.data.sheets import said
    from unclip_jax.data.tokenizer import ClipTokenizer

    for text in ("a cat on a red chair", "кошка", "猫 and é!"):
        assert said(ClipTokenizer(32).encode([text]).ids[0]).replace(" !", "!") == text
    assert said(ClipTokenizer(4).encode(["a cat on a chair"]).ids[0]) == "a cat"


def tar_of(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            add(tar, name, data)
    return path


def test_tars_cut_in_the_middle_keep_what_is_whole(tmp_path):
    members = [(f"{n}.{end}", data) for n in range(4) for end, data in (("jpg", jpeg(PLAIN)), ("txt", b"a caption"))]
    path = tar_of(tmp_path / "a.tar", members)
    with tarfile.open(path) as tar:
        within = tar.getmember("2.jpg").offset_data + 100
    path.write_bytes(path.read_bytes()[:within])
    source = open_source(f"tar:{path}")
    assert len(source) == 2 and source[1].captions == ("a caption",)
    assert source.problems == (f"'a.tar' is cut at byte {within:,}, within '2.jpg', which is left out",)
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(DataError, match="holds no pictures; 'a.tar' is cut at byte 600"):
        open_source(f"tar:{path}")
    path.write_bytes(b"\x1f\x8b" + bytes(2000))
    with pytest.raises(DataError, match="unpack it first"):
        open_source(f"tar:{path}")


def test_tar_members_that_point_elsewhere_are_left_out(tmp_path):
    outside = ("/etc/passwd.jpg", "../up.jpg", "a/../../b.jpg", "..\\up.jpg", "C:\\x.jpg")
    path = tar_of(tmp_path / "a.tar", [("good.jpg", jpeg(PLAIN)), *((name, jpeg(PLAIN)) for name in outside)])
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    source = open_source(f"tar:{path}")
    assert [source.key(index) for index in range(len(source))] == ["a/good"]
    assert len(source.problems) == 5 and all("points out of its tar" in problem for problem in source.problems)


def test_two_records_of_one_key(tmp_path):
    path = tar_of(
        tmp_path / "a.tar",
        [("x.jpg", jpeg(PLAIN)), ("x.txt", b"first"), ("y.jpg", jpeg(PLAIN)), ("x.jpg", b"other"), ("x.txt", b"no")],
    )
    source = open_source(f"tar:{path}")
    assert [source.key(index) for index in range(len(source))] == ["a/x", "a/y"] and source[0].captions == ("first",)
    assert source.problems == ("'x' is in 'a.tar' twice: the second is left out",)
    (tmp_path / "t.csv").write_text("image,caption\na.jpg,one\nb.jpg,two\na.jpg,three\n")
    table = open_source(f"table:{tmp_path}/t.csv")
    assert len(table) == 2 and "has the key 'a.jpg' of a row before it" in table.problems[0]


def test_tables_with_bad_rows(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg(PLAIN))
    rows = [
        b'{"image": "a.jpg", "caption": "fine"}', b"not json", b'{"image": "b.jpg", "caption": "gone"}',
        b'{"image": "c.jpg", "caption": "caf\xe9"}', b'{"image": null, "caption": "none", "key": 3}',
        b'{"image": "http://x/y.jpg", "caption": "far"}', b'{"image": "d\\u0000.jpg", "caption": "nul"}',
    ]  # fmt: skip
    (tmp_path / "t.jsonl").write_bytes(b"\n".join(rows))
    source = open_source(f"table:{tmp_path}/t.jsonl")
    assert source.problems == (f"line 2 of '{tmp_path}/t.jsonl' is no JSON object",)
    assert source[0].captions == ("fine",)
    said = []
    for index in range(1, len(source)):
        with pytest.raises(Broken) as broken:
            source[index]
        said.append(str(broken.value))
    for text in ("there is no file", "the caption of 'c.jpg' is not UTF-8", "names no picture", "download it first"):
        assert any(text in line for line in said)
    (tmp_path / "long.csv").write_text("image,caption\na.jpg," + "word " * 210_000)
    assert len(open_source(f"table:{tmp_path}/long.csv")[0].captions[0]) == 10_001


def test_a_full_disk_is_said(folder, cache, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("unclip_jax.data.listing._write", full)
    with pytest.raises(DataError, match="its disk is full; free space there, or set UNCLIP_CACHE_DIR"):
        open_source(f"folder:{folder}", cache=tmp_path)
    monkeypatch.undo()
    monkeypatch.setenv("UNCLIP_CACHE_DIR", str(cache))
    open_source(f"folder:{folder}")
    monkeypatch.setattr("pathlib.Path.write_text", full)
    assert main(["data", "check", f"folder:{folder}", "--fix", str(tmp_path / "list")]) == 1
    assert "the disk is full" in capsys.readouterr().err and not (tmp_path / "list").exists()


def test_tars_of_the_same_name_in_two_folders_keep_their_keys_apart(tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        tar_of(tmp_path / folder / "00000.tar", [("1.jpg", jpeg(PLAIN)), ("1.txt", folder.encode())])
    source = open_source(f"tar:{tmp_path}/*/00000.tar")
    assert len({source.key(0), source.key(1)}) == 2 and {source[0].captions, source[1].captions} == {("a",), ("b",)}


def test_a_missing_file_of_a_range_is_named(tmp_path):
    tar_of(tmp_path / "00000.tar", [("1.jpg", jpeg(PLAIN)), ("1.txt", b"a")])
    with pytest.raises(DataError, match=r"no file '.*00001.tar' of '.*\{00000..00001\}.tar'"):
        open_source(f"tar:{tmp_path}/{{00000..00001}}.tar")


def test_rows_without_the_key_or_with_a_broken_path_are_named_or_numbered(tmp_path):
    (tmp_path / "1.jpg").write_bytes(jpeg(PLAIN))
    lines = '{"id": "x", "file_name": "1.jpg", "text": "a"}\n{"file_name": "1.jpg", "text": "b"}\n'
    (tmp_path / "t.jsonl").write_text(lines)
    source = open_source(f"table:{tmp_path}/t.jsonl?key=id")
    assert [source.key(0), source.key(1)] == ["x", "1.jpg"]
    (tmp_path / "l.csv").write_bytes(b"file_name,text\n1.jpg,a\ncaf\xe9.jpg,b\n")
    table = open_source(f"table:{tmp_path}/l.csv")
    assert len(table) == 1 and "not UTF-8" in " ".join(table.problems)


def test_a_first_line_without_a_field_takes_it_from_no_other(tmp_path):
    lines = ('{"file_name": "a.png"}', '{"file_name": "b.png", "text": "a thing"}', '{"text": "lost", "key": "c"}')
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    source = open_source(f"table:{tmp_path}/t.jsonl")
    assert [source.key(index) for index in range(len(source))] == ["a.png", "b.png", "c"]
    rows = [source.listing.row(index) for index in range(3)]
    assert [row["captions"] for row in rows] == [[], ["a thing"], ["lost"]]
    assert [row["problem"] for row in rows] == [None, None, "'c' names no picture"]
    with pytest.raises(DataError, match="has no column 'words'; it has file_name, text, key"):
        open_source(f"table:{tmp_path}/t.jsonl?caption=words")
    (tmp_path / "u.jsonl").write_text('{"a": 1}\n{"b": 2}')
    with pytest.raises(DataError, match="has the columns a, b: say which holds the pictures"):
        open_source(f"table:{tmp_path}/u.jsonl")
