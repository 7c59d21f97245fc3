"""PSNR, its bicubic baseline, and the report of an upsampler."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from unclip_jax.checkpoint.safetensors import Network
from unclip_jax.config import DataConfig, DiffusionConfig, SampleConfig, TrainConfig, UNetConfig, UpsamplerConfig
from unclip_jax.data.emoji import Scenes
from unclip_jax.evaluate import report, upsampling
from unclip_jax.stages import build


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def test_psnr_of_known_errors():
    a = np.full((2, 4, 4, 3), 100, np.uint8)
    b = a.copy()
    b[0] += 1
    b[1, 0, 0, 0] = 90
    expected = [20 * np.log10(255), 10 * np.log10(255**2 * 48 / 100)]
    np.testing.assert_allclose(upsampling.psnr(a, b), expected)
    assert np.isinf(upsampling.psnr(a[0], a[0]))


def test_psnr_is_symmetric_and_does_not_wrap():
    a, b = noise(0, 3, 8, 8, 3), noise(1, 3, 8, 8, 3)
    np.testing.assert_array_equal(upsampling.psnr(a, b), upsampling.psnr(b, a))
    assert upsampling.psnr(np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)) == 0


def test_bicubic_is_that_of_pillow_inside():
    """Pillow's filter is the same one (a = -0.5) and rounds between its two passes; borders differ by design."""
    low = np.asarray(Image.fromarray(noise(2, 4, 4, 3)).resize((16, 16), Image.Resampling.BICUBIC))
    ours = np.asarray(upsampling.bicubic(low[None], 64))[0].astype(int)
    theirs = np.asarray(Image.fromarray(low).resize((64, 64), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(ours - theirs)[12:-12, 12:-12].max() <= 2


def test_window_holds_a_quarter_of_the_object():
    for index in range(20):
        scene = Scenes(split="held_out")[index]
        x, y, side = upsampling.object_window(scene, 1024, 256)
        assert 0 <= x <= 1024 - side and 0 <= y <= 1024 - side
        item = scene.items[0]
        centre = (np.asarray([item.x, item.y]) + item.side / 4) * 16
        assert np.all((centre >= [x, y]) & (centre <= [x + side, y + side]))


@pytest.fixture(scope="module")
def tiny() -> upsampling.Report:
    """The report of an untrained upsampler by two, whose U-Net says zero: every picture ends grey."""
    unet = UNetConfig(in_channels=6, channels=8, multipliers=(1,), depth=1, groups=4, patch=2)
    config = TrainConfig(
        "up", UpsamplerConfig(unet, low_size=64, size=128, degradation="blur"),
        DiffusionConfig(prediction="x0"), SampleConfig("ddim", 2), DataConfig(size=128, low_size=64),
    )  # fmt: skip
    params = jax.jit(build(config).init)(jax.random.key(0))
    return upsampling.upsampler_report(Network(config, params, {}, None, "0" * 12, {}), count=3)


def test_report_compares_with_bicubic(tiny):
    ((name, row),) = tiny.figures.items()
    assert name == "64 to 128 px, blur"
    assert row["bicubic dB"] > 20 > row["upsampler dB"]
    assert row["gain dB"] == pytest.approx(row["upsampler dB"] - row["bicubic dB"])
    assert row["smallest gain dB"] <= row["gain dB"]


def test_rows_are_bicubic_upsampled_true(tiny):
    assert len(tiny.rows) == 3 and {row.shape for row in tiny.rows} == {(3, 128, 128, 3)}
    flat, drawn, true = tiny.rows[0]
    assert np.ptp(drawn.astype(int)) <= 1
    assert upsampling.psnr(flat, true) > upsampling.psnr(drawn, true)


def test_report_is_written(tiny, tmp_path):
    out, sheet = tmp_path / "deep" / "figures.json", tmp_path / "sheet.png"
    report.write(tiny, {"command": "unclip evaluate upsamplers"}, out, sheet)
    content = json.loads(out.read_text())
    assert content["figures"] == tiny.figures
    assert content["command"] == "unclip evaluate upsamplers" and "jax" in content["versions"]
    picture = np.asarray(Image.open(sheet))
    np.testing.assert_array_equal(picture[4:132, 4:132], tiny.rows[0][0])
    assert picture.shape == (3 * 132 + 4, 3 * 132 + 4, 3)


def test_table_is_aligned():
    lines = report.table({"a": {"x": 0.5}, "longer": {"x": 12.25, "y": 1.0}}).split("\n")
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split() == ["x", "y"] and lines[1].split() == ["a", "0.500"]
