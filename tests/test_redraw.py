"""Pictures that the cascade's decoder redraws: like the true ones, not the same, and made once."""

import shutil
from dataclasses import replace

import numpy as np
import pytest

from unclip_jax import redraw
from unclip_jax.cascade import SHIPPED
from unclip_jax.config import DataConfig
from unclip_jax.data.degrade import area_downsample
from unclip_jax.data.emoji import Renderer
from unclip_jax.data.loader import scenes_of

DATA = DataConfig(size=256, low_size=64, redrawn=16, seed=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cascade")
    for name in ("clip", "decoder"):
        shutil.copy(SHIPPED / f"{name}.safetensors", path)
    return path


def test_redrawn_pictures_show_what_was_there(folder, monkeypatch):
    pictures = redraw.redrawn(DATA, folder)
    scenes, renderer = scenes_of(DATA), Renderer()
    true = np.stack([area_downsample(renderer.render(scenes[i], 256), 4) for i in range(DATA.redrawn)])
    error = np.square(pictures.astype(float) - true).mean((1, 2, 3))
    others = np.square(pictures.astype(float) - np.roll(true, 1, 0)).mean((1, 2, 3))
    assert (error > 0).all() and (error < others / 3).all()
    monkeypatch.setattr(redraw, "_drawn", None)  # the second time there is nothing to draw
    np.testing.assert_array_equal(redraw.redrawn(DATA, folder), pictures)


def test_a_decoder_of_another_size_is_refused(folder):
    with pytest.raises(ValueError, match="draws 64 px, and this upsampler reads 32 px"):
        redraw.redrawn(replace(DATA, low_size=32), folder)
