import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
from diffusers.pipelines.deprecated import unclip

from unclip_jax.cascade import Cascade, load_cascade
from unclip_jax.checkpoint import CheckpointError
from unclip_jax.checkpoint.sources import find_weights, open_source
from unclip_jax.checkpoint.writing import Tensor, new_folder, save_file
from unclip_jax.data.tokenizer import ClipTokenizer
from unclip_jax.interop import exporting
from unclip_jax.interop.exporting import export_cascade
from unclip_jax.interop.folder import load_folders
from unclip_jax.interop.hub import COMPONENTS


def networks(cascade: Cascade) -> dict[str, Any]:
    return {"clip": cascade.clip, "prior": cascade.prior, "decoder": cascade.decoder, "up": cascade.upsamplers[0]}


def same(a: Any, b: Any) -> bool:
    """Whether two trees have the same structure, dtypes and bits."""
    a, b = (jax.tree.map(np.asarray, dict(tree)) for tree in (a, b))
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.fixture(scope="module")
def cascade(tiny_karlo) -> Cascade:
    return load_folders([tiny_karlo.text, tiny_karlo.picture])


@pytest.fixture(scope="module")
def exported(cascade, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "karlo"
    export_cascade(cascade, out)
    return out


def test_every_file_is_the_one_that_was_read(tiny_karlo, exported):
    for component, stem in COMPONENTS.items():
        published = (tiny_karlo.picture if component in ("image_encoder", "feature_extractor") else tiny_karlo.text) / (
            component
        )
        if stem is not None:
            ours, theirs = (
                open_source(find_weights(folder, stem)).arrays for folder in (exported / component, published)
            )
            assert ours.keys() == theirs.keys()
            assert all(same({"": ours[name]}, {"": theirs[name]}) for name in theirs)
    index, theirs = (json.loads((folder / "model_index.json").read_text()) for folder in (exported, tiny_karlo.text))
    assert index == {name: value for name, value in theirs.items() if name != "_diffusers_version"}


def test_diffusers_loads_it_and_draws_the_same_picture(tiny_karlo, exported):
    ours, theirs = unclip.UnCLIPPipeline.from_pretrained(exported), tiny_karlo.text_pipeline
    for name in ("text_encoder", "prior", "text_proj", "decoder", "super_res_first", "super_res_last"):
        found, wanted = (getattr(pipeline, name).state_dict() for pipeline in (ours, theirs))
        assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
    ours.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {"prompt": "a red apple", "output_type": "np"}
    call |= dict.fromkeys(
        ("prior_num_inference_steps", "decoder_num_inference_steps", "super_res_num_inference_steps"), 2
    )
    pictures = [pipeline(**call, generator=torch.manual_seed(1)).images for pipeline in (ours, theirs)]
    assert np.array_equal(*pictures) and np.std(pictures[0]) > 0.05


def test_what_is_exported_comes_back(cascade, exported):
    back = load_folders([exported])
    for name, network in networks(back).items():
        wanted = networks(cascade)[name]
        assert same(network.params, wanted.params) and same(network.constants, wanted.constants)
        assert network.config == wanted.config
    assert back.tokenizer.encode(["a cat!"]).ids.tolist() == cascade.tokenizer.encode(["a cat!"]).ids.tolist()


def test_one_upsampler_for_all_steps_is_written_as_both_and_dtypes_are_kept(cascade, tmp_path):
    up = cascade.upsamplers[0]
    config = replace(up.config, network=replace(up.config.network, last_step=False))
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), {"unet": up.params["unet"]})
    export_cascade(cascade._replace(upsamplers=(up._replace(config=config, params=half),)), tmp_path / "out")
    files = [open_source(find_weights(tmp_path / "out" / f"super_res_{which}")).arrays for which in ("first", "last")]
    assert same(*files) and {array.dtype for array in files[0].values()} == {np.dtype(jnp.bfloat16)}
    back = load_folders([tmp_path / "out"], "bfloat16").upsamplers[0].params
    assert same(back["unet"], half["unet"]) and same(back["unet_last"], half["unet"])


def test_without_a_prior_it_is_one_for_image_variations(cascade, tmp_path):
    export_cascade(cascade._replace(prior=None), tmp_path / "out")
    pipeline = unclip.UnCLIPImageVariationPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.feature_extractor.crop_size["height"] == 32
    assert load_folders([tmp_path / "out"]).prior is None


def refused(cascade: Cascade, folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        export_cascade(cascade, folder / "out")
    assert list(folder.iterdir()) == [] and "\n" not in str(caught.value)
    return str(caught.value)


def test_all_that_diffusers_lacks_is_named_at_once(tiny_cascade_folder, tmp_path):
    said = refused(load_cascade(tiny_cascade_folder), tmp_path)
    for lacking in (
        "UnCLIPPipeline has no third stage (here to 1024 px), no autoregressive prior, no CLIP embeddings of unit",
        "no vocabulary cut to",
        "PriorTransformer has no",
        "UNet2DConditionModel has no patch stem of 8 x 8 pixels",
        "no learned null text",
        "UNet2DModel has no patch stem",
        "UnCLIPScheduler has no v-prediction",
    ):
        assert lacking in said
    assert said.count("v-prediction") == 1


def test_what_diffusers_lacks_is_named_alone(cascade, tmp_path):
    up, decoder = cascade.upsamplers[0], cascade.decoder
    linear = replace(decoder.config, diffusion=replace(decoder.config.diffusion, schedule="linear"))
    assert "no linear schedule" in refused(cascade._replace(decoder=decoder._replace(config=linear)), tmp_path)
    residual = replace(up.config, network=replace(up.config.network, residual=True))
    assert "adds to the resized" in refused(cascade._replace(upsamplers=(up._replace(config=residual),)), tmp_path)
    assert "without an upsampler" in refused(cascade._replace(upsamplers=()), tmp_path)
    blind = {name: leaf for name, leaf in cascade.clip.params.items() if name != "image_projection"}
    clip = cascade.clip._replace(params=blind)
    assert "without a prior and an image tower" in refused(cascade._replace(prior=None, clip=clip), tmp_path)
    assert "cut to 3 words" in refused(cascade._replace(tokenizer=ClipTokenizer(11, (1, 2, 3))), tmp_path)
    assert "inpainting" in refused(cascade._replace(inpaint=decoder), tmp_path)


def test_a_full_disk_leaves_nothing(cascade, tmp_path, monkeypatch):
    def full(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "save_file", full)
    assert "the disk is full" in refused(cascade, tmp_path)


def test_a_folder_with_something_in_it_is_left_alone(cascade, tmp_path):
    (tmp_path / "mine").write_text("")
    with pytest.raises(CheckpointError, match="is there already"):
        export_cascade(cascade, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as folder:
        (folder / "file").write_text("")
    assert (tmp_path / "empty" / "file").is_file() and len(list(tmp_path.iterdir())) == 2


def test_files_are_those_of_the_safetensors_library(tmp_path):
    tensors = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "a": np.ones(3, jnp.bfloat16),
        "c": np.zeros((0, 2), np.float16),
        "ids": np.arange(3),
        "flag": np.asarray(True),
        "ä/b": np.float32(2),
    }
    save_file(tensors, tmp_path / "ours", {"format": "pt"})
    safetensors.numpy.save_file(
        {name: np.array(array, order="C") for name, array in tensors.items()}, tmp_path / "theirs", {"format": "pt"}
    )
    whole = [(tmp_path / name).read_bytes() for name in ("ours", "theirs")]
    bodies = [data[8 + int.from_bytes(data[:8], "little") :] for data in whole]
    assert bodies[0] == bodies[1]
    assert same(safetensors.numpy.load_file(tmp_path / "ours"), safetensors.numpy.load_file(tmp_path / "theirs"))


def test_one_tensor_at_a_time_is_in_memory(tmp_path):
    alive: list[weakref.ref] = []

    def read() -> np.ndarray:
        assert all(ref() is None for ref in alive)
        array = np.full((3, 4), len(alive), np.float32)
        alive.append(weakref.ref(array))
        return array

    tensors = {name: Tensor((3, 4), np.dtype(np.float32), read) for name in "abc"}
    save_file(tensors, tmp_path / "file")
    assert [array[0, 0] for array in safetensors.numpy.load_file(tmp_path / "file").values()] == [0, 1, 2]
