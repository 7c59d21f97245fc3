import json
import math
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from unclip_jax.checkpoint.schema import CheckpointError
from unclip_jax.checkpoint.sources import open_source
from unclip_jax.config import ClipConfig, TransformerConfig
from unclip_jax.interop import clip as table
from unclip_jax.interop.clip_pixels import channel_statistics, clip_pixels, preprocessor
from unclip_jax.interop.loading import load_params
from unclip_jax.models.clip import Clip, normalise

END = 40  # of the made-up vocabularies of 50 ids: by its number, larger ids may follow or come before


def tower(width: int, heads: int, hidden: int, act: str, **more) -> dict:
    sizes = {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": hidden}
    return {**sizes, "num_hidden_layers": 2, "hidden_act": act, **more}


def whole(dim: int, text: dict, vision: dict, end: int) -> dict:
    words = {"vocab_size": 50, "max_position_embeddings": 9, "eos_token_id": end, "bos_token_id": 0, "pad_token_id": 1}
    return {"model_type": "clip", "projection_dim": dim, "text_config": text | words, "vision_config": vision}


RAW = {
    "legacy end, quick_gelu": whole(
        24, tower(32, 4, 128, "quick_gelu"), tower(32, 4, 128, "quick_gelu", image_size=32, patch_size=8), 2
    ),
    "named end, gelu": whole(
        32, tower(48, 3, 96, "gelu"), tower(32, 2, 96, "gelu", image_size=28, patch_size=14, layer_norm_eps=1e-6), END
    ),
    # Widths whose ratio is no binary fraction and rounds to just below, and a border that no patch covers.
    "unlike towers": whole(
        20, tower(40, 5, 60, "gelu"), tower(56, 7, 488, "quick_gelu", image_size=34, patch_size=8), END
    ),
}


@pytest.fixture(scope="module", autouse=True)
def two_threads():
    torch.set_num_threads(2)


def perturbed(model):
    """The model with no tensor left at its initial value: biases, norms, class token and temperature are random."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) * 0.15
    return model.eval()


def read(folder: Path, entries, shapes, config: ClipConfig):
    source = open_source(folder / "model.safetensors")
    return load_params(entries(config), source, shapes(config), "float32", ignore=table.IGNORED)


def texts(end: int) -> np.ndarray:
    ids = np.random.default_rng(1).integers(3, 50 if end == END else END, (4, 9))
    ids[ids == END] = 4
    for row, place in enumerate((1, 5, 8, 3)):
        ids[row, place] = END
    ids[3, 6] = END  # only the first counts
    return ids


@pytest.fixture(scope="module", params=list(RAW))
def published(request, tmp_path_factory):
    """A folder as transformers writes it, its model, our config and the parameters that we read from it."""
    raw = RAW[request.param]
    folder = tmp_path_factory.mktemp("published")
    model = perturbed(transformers.CLIPModel(transformers.CLIPConfig(**raw)))
    model.save_pretrained(folder)
    config = table.clip_config(json.loads((folder / "config.json").read_text()))
    return folder, model, config, read(folder, table.entries, table.shapes, config)


def test_every_output_is_the_reference_s(published):
    _, model, config, params = published
    assert all(np.std(leaf) > 0.05 for leaf in jax.tree.leaves(params) if leaf.ndim)
    pixels = np.random.default_rng(0).normal(0, 1, (3, config.image_size, config.image_size, 3)).astype(np.float32)
    ids = texts(2 if config.eos_id is None else END)
    with torch.no_grad():
        reference = model(input_ids=torch.tensor(ids), pixel_values=torch.tensor(pixels.transpose(0, 3, 1, 2)))
    image, text, scale = jax.jit(Clip(config).apply)({"params": params}, pixels, jnp.asarray(ids))
    theirs = reference.vision_model_output.pooler_output.numpy()  # both are already projected
    embedding = reference.text_model_output.pooler_output.numpy()
    np.testing.assert_allclose(image, theirs, atol=1e-5)
    np.testing.assert_allclose(text.states, reference.text_model_output.last_hidden_state, atol=1e-5)
    np.testing.assert_allclose(text.embedding, embedding, atol=1e-5)
    assert np.std(theirs) > 0.3 and np.std(embedding) > 0.3  # so that the tolerance is a small one
    logits = np.asarray(scale) * np.asarray(normalise(image)) @ np.asarray(normalise(text.embedding)).T
    np.testing.assert_allclose(logits, reference.logits_per_image, atol=2e-5)  # 18 times a cosine


def test_a_tower_alone_is_the_same_tower(published, tmp_path):
    """From the files of CLIPTextModelWithProjection and CLIPVisionModelWithProjection, as Karlo ships them."""
    _, model, config, params = published
    for name, kind, theirs in (
        ("text", transformers.CLIPTextModelWithProjection, model.config.text_config),
        ("vision", transformers.CLIPVisionModelWithProjection, model.config.vision_config),
    ):
        theirs.projection_dim = config.embedding_dim
        alone = kind(theirs)
        alone.load_state_dict({k: v for k, v in model.state_dict().items() if k in alone.state_dict()})
        alone.save_pretrained(tmp_path / name)
    raws = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("vision", "text")]
    assert table.clip_config(*raws) == config
    assert table.clip_config(raws[1]).text == config.text

    text = read(tmp_path / "text", table.text_entries, table.text_shapes, config)
    vision = read(tmp_path / "vision", table.vision_entries, table.vision_shapes, config)
    assert {*text, *vision, "log_scale"} == {*params} and not {*text} & {*vision}
    jax.tree.map(np.testing.assert_array_equal, {**text, **vision, "log_scale": params["log_scale"]}, dict(params))


def test_export_and_import_are_inverses(published, tmp_path):
    folder, model, config, params = published
    table.clip_folder(params, config, tmp_path)
    again = transformers.CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(again[1].values())  # nothing missing, unexpected or mis-shaped
    ours, theirs = again[0].state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert table.clip_config(json.loads((tmp_path / "config.json").read_text())) == config
    back = read(tmp_path, table.entries, table.shapes, config)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    with torch.no_grad():
        ids = torch.tensor(texts(2 if config.eos_id is None else END))
        expected, found = (m.get_text_features(input_ids=ids) for m in (model, again[0].eval()))
    assert torch.equal(expected.pooler_output, found.pooler_output)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    # The weights are as readable as the config beside them, not the owner's alone.
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_a_temperature_beyond_our_cap_leaves_as_the_cap(tmp_path):
    config = table.clip_config(RAW["legacy end, quick_gelu"])
    blank = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), dict(table.shapes(config)))
    hot = {**blank, "log_scale": np.float32(6)}
    assert table.clip_tensors(hot, config)["logit_scale"] == 6
    assert math.isclose(np.exp(table.clip_tensors(hot, replace(config, max_logit_scale=100.0))["logit_scale"]), 100)


OPENAI_TEXT = {"eos_token_id": 2, "vocab_size": 49408, "max_position_embeddings": 77}


def sizes(dim: int, act: str, text: tuple[int, ...], vision: tuple[int, ...]) -> dict:
    """CLIPModel's config: (width, layers, heads, hidden) of both towers, then patch and image size."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size", "image_size")
    one, other = (dict(zip(names, values, strict=False)) | {"hidden_act": act} for values in (text, vision))
    return {
        "model_type": "clip",
        "projection_dim": dim,
        "text_config": one | OPENAI_TEXT,
        "vision_config": other,
    }


BASE, LARGE = (512, 12, 8, 2048), (768, 12, 12, 3072)
KNOWN = {  # counts: of all, of the text tower and of the image tower, where they are known
    "B/32": (sizes(512, "quick_gelu", BASE, (768, 12, 12, 3072, 32, 224)), 151_277_313, 63_428_096, 87_849_216),
    "B/16": (sizes(512, "quick_gelu", BASE, (768, 12, 12, 3072, 16, 224)), 149_620_737, 63_428_096, 86_192_640),
    "L/14": (sizes(768, "quick_gelu", LARGE, (1024, 24, 16, 4096, 14, 224)), 427_616_513, 123_650_304, 303_966_208),
    "L/14-336": (sizes(768, "quick_gelu", LARGE, (1024, 24, 16, 4096, 14, 336)), 427_944_193, 123_650_304, 304_293_888),
    "H/14": (sizes(1024, "gelu", (1024, 24, 16, 4096), (1280, 32, 16, 5120, 14, 224)), None, None, 632_076_800),
    "bigG/14": (
        sizes(1280, "gelu", (1280, 32, 20, 5120), (1664, 48, 16, 8192, 14, 224)),
        694_659_840 + 1_844_907_264 + 1,
        694_659_840,
        1_844_907_264,
    ),
}


@pytest.mark.parametrize("name", list(KNOWN))
def test_published_sizes(name):
    raw, *counts = KNOWN[name]
    config = table.clip_config(raw)
    for entries, expected in zip((table.entries, table.text_entries, table.vision_entries), counts, strict=True):
        assert expected in (None, sum(math.prod(entry.shape) for entry in entries(config)))


@pytest.mark.parametrize("name", ["B/32", "bigG/14"])
def test_the_table_fills_every_parameter_once(name):
    config = table.clip_config(KNOWN[name][0])
    if name == "bigG/14":
        config = replace(config, text=replace(config.text, layers=2), vision=replace(config.vision, layers=1))
    for entries, shapes in (
        (table.entries, table.shapes),
        (table.text_entries, table.text_shapes),
        (table.vision_entries, table.vision_shapes),
    ):
        ours = {entry.ours: math.prod(entry.shape) for entry in entries(config)}
        assert len(ours) == len(entries(config)) == len({entry.theirs for entry in entries(config)})
        leaves = jax.tree_util.tree_leaves_with_path(shapes(config))
        assert ours == {tuple(key.key for key in path): leaf.size for path, leaf in leaves}


def test_the_defaults_are_openai_s_large_one():
    assert replace(table.clip_config(KNOWN["L/14"][0]), max_logit_scale=100.0) == ClipConfig()


EARLY = {  # as OpenAI's repositories have it: text_config_dict repeats a part of text_config, and counts
    "model_type": "clip",
    "projection_dim": 768,
    "text_config": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "eos_token_id": 2},
    "text_config_dict": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
    "vision_config": {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096, "patch_size": 14},
    "vision_config_dict": None,
}


@pytest.mark.parametrize("raw", [EARLY, {"model_type": "clip"}, RAW["unlike towers"], KNOWN["bigG/14"][0]])
def test_a_value_left_out_means_what_it_means_to_transformers(raw):
    spelled_out = transformers.CLIPConfig(**{k: v for k, v in raw.items() if k != "model_type"}).to_dict()
    assert table.clip_config(raw) == table.clip_config(json.loads(json.dumps(spelled_out)))


def altered(tower: str, **values) -> dict:
    return {"model_type": "clip", f"{tower}_config": values}


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"model_type": "siglip"}, "siglip"),
        ({"model_type": "xlm-roberta", "hidden_size": 1024}, "xlm-roberta"),
        ({"_class_name": "PriorTransformer"}, "None"),
        ([], "None"),
        (altered("text", hidden_act="gelu_new"), "gelu_new"),
        (altered("text", hidden_size=100), "not a multiple"),
        (altered("text", eos_token_id=[1, 2]), "eos_token_id"),
        (altered("text", num_hidden_layers=10**9), "num_hidden_layers"),
        (altered("text", layer_norm_eps=0.0), "layer_norm_eps"),
        (altered("text", layer_norm_eps="1e-5"), "layer_norm_eps"),
        (altered("vision", hidden_size="768"), "hidden_size"),
        (altered("vision", num_channels=4), "num_channels"),
        (altered("vision", image_size=[224, 224]), "image_size"),
        (altered("vision", patch_size=None), "patch_size"),
        ({"model_type": "clip", "text_config": 3}, "text_config"),
        ({"model_type": "clip", "projection_dim": True}, "projection_dim"),
    ],
)
def test_what_we_cannot_express_is_refused_by_name(raw, said):
    with pytest.raises(CheckpointError, match=said) as error:
        table.clip_config(raw)
    assert "\n" not in str(error.value) and len(str(error.value)) < 250


def test_towers_of_two_clips_are_refused():
    with pytest.raises(CheckpointError, match="768 .* 1024"):
        table.clip_config(
            {"model_type": "clip_text_model", "projection_dim": 768},
            {"model_type": "clip_vision_model", "projection_dim": 1024},
        )


@pytest.mark.parametrize(
    "config",
    [
        ClipConfig(eos_id=2),
        replace(ClipConfig(), text=TransformerConfig(768, 12, 12)),
        replace(ClipConfig(), vision=TransformerConfig(1024, 24, 16, causal=True)),
        replace(ClipConfig(), vision=TransformerConfig(1024, 24, 16, head_dim=32)),
    ],
)
def test_what_clip_model_cannot_be_is_not_exported(config, tmp_path):
    with pytest.raises(CheckpointError, match="CLIPModel cannot"):
        table.clip_folder({}, config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    config = table.clip_config(RAW["legacy end, quick_gelu"])
    blank = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), dict(table.shapes(config)))
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot save"):
        table.clip_folder(blank, config, tmp_path / "file")


def test_a_missing_an_unknown_and_a_mis_shaped_tensor_are_named(published, tmp_path):
    from safetensors.torch import save_file

    _, model, config, _ = published
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    tensors["text_model.embeddings.position_ids"] = torch.arange(9)[None]  # a buffer of old files
    save_file(tensors, tmp_path / "model.safetensors")
    read(tmp_path, table.entries, table.shapes, config)
    changed = {k: v for k, v in tensors.items() if k != "visual_projection.weight"} | {
        "text_model.extra": torch.zeros(2),
        "text_projection.weight": torch.zeros(3, 5),
    }
    save_file(changed, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="visual_projection.*text_model.extra.*text_projection"):
        read(tmp_path, table.entries, table.shapes, config)


def pictures() -> list:
    rng = np.random.default_rng(3)
    arrays = [rng.integers(0, 256, (h, w, 3), np.uint8) for h, w in ((37, 53), (301, 97), (29, 29), (5, 61), (28, 200))]
    grey = Image.fromarray(arrays[0][..., 0])
    coloured = Image.fromarray(arrays[1]).convert("P")
    clear = Image.fromarray(rng.integers(0, 256, (41, 30, 4), np.uint8))
    return [*arrays, Image.fromarray(arrays[1]), grey, coloured, clear]


@pytest.mark.parametrize("side", [28, 35])
def test_pixels_are_the_reference_s(side):
    config = replace(ClipConfig(), image_size=side, image_mean=(0.5, 0.4, 0.3), image_std=(0.2, 0.3, 0.4))
    reference = transformers.CLIPImageProcessorPil(**preprocessor(config))
    expected = np.concatenate([reference(picture, return_tensors="np").pixel_values for picture in pictures()])
    found = clip_pixels(config, pictures())
    assert found.dtype == jnp.float32 and found.shape == (9, side, side, 3)
    np.testing.assert_allclose(found, expected.transpose(0, 2, 3, 1), atol=1e-6)


def test_pictures_that_cannot_be_used_are_refused():
    with pytest.raises(ValueError, match="shows nothing"):
        clip_pixels(ClipConfig(), [np.zeros((0, 5, 3), np.uint8)])
    with pytest.raises(ValueError, match="too thin"):
        clip_pixels(ClipConfig(), [np.zeros((1, 5000, 3), np.uint8)])


def test_channel_statistics_come_from_the_preprocessor():
    config = replace(ClipConfig(), image_mean=(0.5, 0.4, 0.3), image_std=(0.2, 0.3, 0.4))
    raw = KNOWN["L/14"][0]
    assert table.clip_config(raw, pixels=preprocessor(config)).image_std == (0.2, 0.3, 0.4)
    old = {"crop_size": 224, "size": 224, "resample": 3, "do_center_crop": True}  # the form of 2021
    assert table.clip_config(raw, pixels=old) == table.clip_config(raw)
    for changed, said in (
        ({"do_center_crop": False}, "do_center_crop"),
        ({"resample": 2}, "resample"),
        ({"size": {"shortest_edge": 336}}, "size"),
        ({"crop_size": 336}, "crop_size"),
        ({"image_std": [0.1, 0.0, 0.1]}, "image_std"),
        ({"image_mean": [0.1, 0.2]}, "image_mean"),
    ):
        with pytest.raises(CheckpointError, match=said):
            channel_statistics(preprocessor(config) | changed, 224)
