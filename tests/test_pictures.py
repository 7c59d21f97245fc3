"""Files as users have them, good and bad: each is read as its pixels are seen, or refused in one sentence."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from unclip_jax.pictures import MOST_PIXELS, open_picture, padded, read_picture, square

RED, BLUE = (220, 30, 40), (20, 60, 200)


@pytest.fixture
def halves():
    """Left red, right blue."""
    picture = np.empty((32, 48, 3), np.uint8)
    picture[:, :24], picture[:, 24:] = RED, BLUE
    return picture


def near(a, b, levels=0):
    assert a.shape == b.shape and a.dtype == b.dtype == np.uint8
    assert np.abs(a.astype(int) - b).max() <= levels


@pytest.mark.parametrize(
    ("name", "mode", "levels"),
    [
        ("a.png", "RGB", 0),
        ("a.png", "P", 2),
        ("a.webp", "RGB", 40),
        ("a.bmp", "RGB", 0),
        ("a.tif", "CMYK", 1),
        ("a.jpg", "CMYK", 3),
        ("a.JPEG", "RGB", 3),
        ("a.tif", "YCbCr", 3),
        ("wrong_ending.jpg.png", "RGB", 0),
    ],
)
def test_colour_models_and_formats(tmp_path, halves, name, mode, levels):
    image = Image.fromarray(halves)
    image = image.quantize(8) if mode == "P" else image.convert(mode)
    how = {"quality": 100, "subsampling": 0} if name.lower().endswith(("g", "jpeg")) else {}
    # Before Pillow 13 a YCbCr TIFF could not be read back unless it was compressed.
    image.save(tmp_path / name, **({"compression": "tiff_lzw"} if mode == "YCbCr" else how))
    near(read_picture(tmp_path / name)[:, 4:20], halves[:, 4:20], levels)
    assert open_picture(tmp_path / name).alpha is None


@pytest.mark.parametrize("mode", ["L", "1", "I;16"])
def test_grey_becomes_three_equal_channels(tmp_path, mode):
    ramp = np.repeat(np.arange(0, 256, dtype=np.uint8)[None], 4, 0)
    image = Image.fromarray(ramp.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(ramp).convert(mode)
    image.save(tmp_path / "grey.png")
    found = read_picture(tmp_path / "grey.png")
    near(found, np.repeat(np.asarray(image.convert("L") if mode != "I;16" else ramp)[..., None], 3, -1))


def test_deep_tiff_of_floats(tmp_path):
    Image.fromarray(np.array([[0, 0.5, 1, np.nan]], np.float32)).save(tmp_path / "deep.tif")
    assert read_picture(tmp_path / "deep.tif")[0, :, 0].tolist() == [0, 128, 255, 0]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_shows_white_and_stays_available(tmp_path, mode):
    picture = np.zeros((8, 8, 4), np.uint8)
    picture[:, 4:, 3] = 255
    image = Image.fromarray(picture)
    image = image.quantize(4) if mode == "P" else image.convert(mode)
    image.save(tmp_path / "hole.png")
    found = open_picture(tmp_path / "hole.png")
    assert found.alpha is not None and (found.alpha == picture[..., 3]).all()
    assert (found.rgb[:, :4] == 255).all() and (found.rgb[:, 4:] == 0).all()


def test_a_photo_stands_upright(tmp_path, halves):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right by a quarter
    Image.fromarray(halves).save(tmp_path / "turned.png", exif=exif)
    near(read_picture(tmp_path / "turned.png"), np.rot90(halves, -1))


@pytest.mark.parametrize("name", ["moves.gif", "moves.png", "moves.webp"])
def test_of_an_animation_the_first_frame_is_read_with_a_warning(tmp_path, name):
    first, second = (Image.new("RGB", (16, 16), colour) for colour in (RED, BLUE))
    first.save(tmp_path / name, save_all=True, append_images=[second], duration=50, lossless=True)
    found = open_picture(tmp_path / name)
    near(found.rgb, np.full((16, 16, 3), RED, np.uint8))
    assert len(found.warnings) == 1 and "only the first is read" in found.warnings[0]


def png_header(width, height):
    """A PNG that claims a size and has no pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def truncated(path, halves):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:4000])


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda path, _: None, "there is no picture"),
        (lambda path, _: path.mkdir(), "is not a file"),
        (lambda path, _: path.write_bytes(b""), "is not a picture"),
        (lambda path, _: path.write_text("a cat"), "is not a picture"),
        (lambda path, _: path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "is not a picture"),
        (truncated, "truncated or damaged"),
        (lambda path, _: path.write_bytes(png_header(64, 64)), "truncated or damaged"),
        (lambda path, _: path.write_bytes(png_header(30_000, 30_000)), "more than 67 million pixels"),
        (lambda path, _: path.write_bytes(png_header(1, MOST_PIXELS + 1)), "more than 67 million pixels"),
    ],
)
def test_what_is_no_picture_is_refused_in_one_sentence(tmp_path, halves, harm, said):
    path = tmp_path / "bad.png"
    harm(path, halves)
    with pytest.raises(ValueError, match=said) as refused:
        read_picture(path)
    assert "\n" not in str(refused.value) and str(path) in str(refused.value)


def test_square_pictures_keep_the_middle_and_the_rest_is_antialiased(halves):
    near(square(halves[:32, :32], 32), halves[:32, :32])
    cut = square(halves, 32)
    assert cut.shape == (32, 32, 3) and (cut[:, 0] == RED).all() and (cut[:, -1] == BLUE).all()
    checks = np.repeat((np.indices((640, 640)).sum(0) % 2 * 255).astype(np.uint8)[..., None], 3, -1)
    assert np.abs(square(checks, 64).astype(int) - 128).max() <= 2


def test_one_pixel_is_enough_and_none_is_not(tmp_path):
    Image.new("RGB", (1, 1), RED).save(tmp_path / "one.png")
    near(square(read_picture(tmp_path / "one.png"), 64), np.full((64, 64, 3), RED, np.uint8))
    with pytest.raises(ValueError, match="shows nothing"):
        square(np.zeros((0, 5, 3), np.uint8), 64)
    with pytest.raises(ValueError, match="too thin"):
        square(np.zeros((1, MOST_PIXELS, 3), np.uint8), 64)


def test_padding_keeps_everything_on_the_borders_colour():
    picture = np.full((10, 4, 3), BLUE, np.uint8)
    picture[4:6, 1:3] = RED
    whole = padded(picture)
    assert whole.shape == (10, 10, 3) and (whole[:, [0, 9]] == BLUE).all()
    near(whole[:, 3:7], picture)
    assert padded(np.zeros((1, 50_000, 3), np.uint8)).shape == (2048, 2048, 3)
