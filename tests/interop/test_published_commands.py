"""What a published folder does beyond diffusers' pipelines: every command, parts that complete each other, dtypes."""

import json
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from unclip_jax import sample
from unclip_jax.cascade import Cascade, fastest_dtype, load_cascade
from unclip_jax.checkpoint import save_network
from unclip_jax.checkpoint.schema import CheckpointError
from unclip_jax.cli import main
from unclip_jax.config import DiffusionConfig, SampleConfig, TrainConfig, UNetConfig, UpsamplerConfig
from unclip_jax.edit import Basis, probe, variations
from unclip_jax.generate import check
from unclip_jax.inputs import Options
from unclip_jax.stages import build


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> Path:
    """An upsampler of ours from 32 to 128 px."""
    unet = UNetConfig(in_channels=6, channels=8, multipliers=(1,), depth=1, groups=4, patch=8)
    config = TrainConfig(
        "tiny_up128", UpsamplerConfig(unet, 32, 128), DiffusionConfig(prediction="v"), SampleConfig("ddim", 2)
    )
    path = tmp_path_factory.mktemp("stage") / "upsampler_128.safetensors"
    save_network(path, config, jax.jit(build(config).init)(jax.random.key(0)))
    return path


@pytest.fixture(scope="module")
def load():
    """load_cascade, which reads every cascade once."""
    return cache(load_cascade)


@pytest.fixture
def unclip(load, tiny_karlo, tmp_path, capsys, monkeypatch):
    """Runs a command in a folder with three pictures; gives exit code, lines of output and lines of errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "load_cascade", load)
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(name)
    Image.fromarray(rng.integers(0, 256, (45, 32, 3), np.uint8)).save("high.png")
    capsys.readouterr()

    def run(*arguments: str, folders: tuple[Path, ...] = (tiny_karlo.text, tiny_karlo.picture)):
        weights = [word for folder in folders for word in ("--weights", str(folder))]
        code = main([*arguments, *weights])
        said = capsys.readouterr()
        return code, said.out.splitlines(), said.err.splitlines()

    return run


@pytest.mark.parametrize(
    ("arguments", "sides"),
    [
        (["sample", "a red house", "--steps", "2", "--prior-steps", "2"], [32]),
        (["sample", "two dogs", "--rank-from", "2", "--steps", "2", "--prior-steps", "2", "--size", "16"], [16]),
        (["inpaint", "a.png", "a dog", "--box", "4,4,9,9", "--steps", "2", "--resamples", "1", "--size", "16"], [16]),
        (["variations", "a.png", "--n", "2", "--steps", "2", "--size", "16"], [16, 16, 48]),
        (["interpolate", "a.png", "b.png", "--frames", "2", "--steps", "2", "--size", "16"], [16, 16, 32]),
        (["interpolate", "--prompts", "a", "b", "--frames", "2", "--steps", "2", "--size", "16"], [16, 16, 32]),
        (["diff", "a.png", "a cat", "a dog", "--frames", "2", "--steps", "2", "--size", "16"], [16, 16, 32]),
    ],
    ids=lambda value: "-".join(word for word in value[:2] if isinstance(word, str)) or None,
)
def test_every_command_runs_on_a_published_folder(unclip, arguments, sides):
    code, out, err = unclip(*arguments)
    assert code == 0, err
    pictures = [Image.open(path) for path in out]
    assert [picture.width for picture in pictures] == sides
    assert all(np.asarray(picture).std() > 10 for picture in pictures)
    assert not any("never saw" in line for line in err)


def test_settings_of_variations_are_the_decoder_s_own(unclip, load, tiny_karlo):
    assert unclip("variations", "high.png", "--n", "2", "--size", "16", "--preset", "fast")[0] == 0
    about = json.loads(Image.open("unclip.png").text["settings"])
    assert (about["steps"], about["guidance"]) == (25, 8.0)
    picture = np.asarray(Image.open("high.png"))
    cascade = load(tiny_karlo.picture)
    drawn = variations(cascade, picture, 2, options=Options(size=16))
    assert np.abs(drawn[0].astype(int) - np.asarray(Image.open("unclip.png"))).max() <= 1
    assert np.abs(drawn[0].astype(int) - drawn[1]).max() > 20
    # At eta 0 the noise is the picture's too, and not the seeds'.
    near = variations(cascade, picture, 2, 0.0, options=Options(size=16, steps=4))
    assert np.abs(near[0].astype(int) - near[1]).max() <= 1


@pytest.mark.parametrize(
    ("parts", "arguments", "said"),
    [
        (["text"], ["variations", "a.png"], "no image tower"),
        (["text"], ["interpolate", "a.png", "b.png"], "no image tower"),
        (["text"], ["diff", "a.png", "a", "b"], "no image tower"),
        (["text"], ["sample", "a dog", "--rank-from", "2"], "no image tower"),
        (["text"], ["sample", "a dog", "--clip-guidance", "1"], "no image tower"),
        (["picture"], ["sample", "a dog"], "no diffusion prior"),
        (["picture"], ["inpaint", "a.png", "a dog", "--box", "4,4,9,9"], "no diffusion prior"),
        (["picture"], ["interpolate", "--prompts", "a", "b"], "no diffusion prior"),
        (["text"], ["sample", "a dog", "--size", "64"], "16, 32 px, not 64"),
        (["text"], ["sample", "a dog", "--preset", "fast", "--steps", "3"], "leave out --steps"),
        (["text"], ["sample", "a dog", "--upsampler", "none.safetensors"], "no weights file"),
        (["nowhere"], ["sample", "a dog"], "no folder of weights"),
    ],
)
def test_what_a_part_cannot_do_is_refused_in_one_sentence(unclip, tiny_karlo, parts, arguments, said):
    known = {"text": tiny_karlo.text, "picture": tiny_karlo.picture, "nowhere": Path("nowhere")}
    code, out, err = unclip(*arguments, folders=tuple(known[part] for part in parts))
    err = [line for line in err if not line.endswith("...")]
    assert (code, out, len(err)) == (1, [], 1) and said in err[0]


def test_parts_complete_each_other_in_any_order_and_form(load, tiny_karlo):
    text, picture = load(tiny_karlo.text), load(tiny_karlo.picture)
    assert text.prior is not None and "image_projection" not in text.clip.params
    assert picture.prior is None and "image_projection" in picture.clip.params
    both = load_cascade([tiny_karlo.text, tiny_karlo.picture])
    turned = load_cascade(f"{tiny_karlo.picture},{tiny_karlo.text}")
    assert both.prior is not None and "image_projection" in both.clip.params
    assert both.digest == turned.digest and len({text.digest, picture.digest, both.digest}) == 3
    assert both.sizes == (16, 32) and both.tokenizer.context_length == 11
    assert both.decoder.config.sample == SampleConfig("ddpm", 25, 8.0)
    whitening = both.prior.constants["whitening"]
    stored = load_file(tiny_karlo.text / "prior" / "diffusion_pytorch_model.safetensors")
    np.testing.assert_array_equal(whitening["std"], stored["clip_std"][0])
    with pytest.raises(CheckpointError, match="only published cascades come in parts"):
        load_cascade(["one", "another"])


def damaged(folder: Path, what: str) -> None:
    """One thing of a folder that must be noticed."""
    match what:
        case "another_clip":
            path = folder / "text_encoder" / "model.safetensors"
            tensors = load_file(path)
            tensors["text_projection.weight"] = tensors["text_projection.weight"][::-1].copy()
            save_file(tensors, path)
        case "missing":
            shutil.rmtree(folder / "text_proj")
        case "extra_tensor":
            path = folder / "decoder" / "diffusion_pytorch_model.safetensors"
            save_file(load_file(path) | {"conv_more.weight": np.zeros(3, np.float32)}, path)
        case "shape":
            path = folder / "super_res_last" / "diffusion_pytorch_model.safetensors"
            save_file(load_file(path) | {"conv_in.bias": np.zeros(3, np.float32)}, path)
        case "truncated":
            path = folder / "decoder" / "diffusion_pytorch_model.safetensors"
            path.write_bytes(path.read_bytes()[:-100])
        case "no_statistics":
            path = folder / "prior" / "diffusion_pytorch_model.safetensors"
            save_file({key: value for key, value in load_file(path).items() if key != "clip_std"}, path)
        case "width":
            path = folder / "text_proj" / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"clip_embeddings_dim": 32}))
        case _:
            (folder / "decoder" / "config.json").write_text("{" if what == "json" else "[]")


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("another_clip", "parts are of two CLIPs"),
        ("missing", "has no text_proj"),
        ("extra_tensor", "has the unknown conv_more.weight"),
        ("shape", "mis-shaped conv_in.bias"),
        ("truncated", "truncated"),
        ("no_statistics", "clip_mean and clip_std"),
        ("width", "mis-shaped|different configs"),
        ("json", "cannot be read as JSON"),
        ("list", "is no table of settings"),
    ],
)
def test_damage_is_named_in_one_sentence(tiny_karlo, tmp_path, what, said):
    shutil.copytree(tiny_karlo.text, tmp_path / "copy")
    damaged(tmp_path / "copy", what)
    with pytest.raises(CheckpointError, match=said) as error:
        load_cascade([tiny_karlo.picture, tmp_path / "copy"] if what == "another_clip" else tmp_path / "copy")
    assert "\n" not in str(error.value)


def test_a_stage_of_ours_is_appended(unclip, tiny_karlo, tiny_cascade_folder, stage):
    arguments = ["sample", "a dog", "--steps", "2", "--prior-steps", "2", "--upsampler", str(stage)]
    code, out, err = unclip(*arguments, folders=(tiny_karlo.text,))
    assert code == 0, err
    assert Image.open(out[0]).size == (128, 128) and "upsampler 128 px" in err[-1]
    with pytest.raises(CheckpointError, match="enlarges 32 px, not 1024"):
        load_cascade(tiny_cascade_folder, upsampler=stage)


def test_asking_for_1024_px_offers_the_stage_that_ships(tiny_cascade_folder, tmp_path):
    for path in tiny_cascade_folder.glob("*.safetensors"):
        if path.stem != "upsampler_1024":
            shutil.copy(path, tmp_path)
    shorter = load_cascade(tmp_path)
    with pytest.raises(ValueError, match=r"64, 256 px, not 1024: --upsampler '.*upsampler_1024\.safetensors'.*256 px"):
        check(shorter, Options(size=1024))
    with pytest.raises(ValueError, match="not 512$"):
        check(shorter, Options(size=512))
    longer = load_cascade(tmp_path, upsampler=tiny_cascade_folder / "upsampler_1024.safetensors")
    assert longer.sizes == (64, 256, 1024) == load_cascade(tiny_cascade_folder).sizes


def leaves(cascade: Cascade) -> list[Any]:
    networks = (cascade.clip, cascade.prior, cascade.decoder, *cascade.upsamplers)
    return jax.tree.leaves([network.params for network in networks if network is not None])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_parameters_and_compute_are_in_the_dtype(tiny_karlo, tiny_cascade_folder, dtype):
    cascade = load_cascade(tiny_karlo.text, dtype)
    log_scale = cascade.clip.params["log_scale"]
    assert {leaf.dtype.name for leaf in leaves(cascade) if leaf is not log_scale} == {dtype}
    assert cascade.decoder.config.network.unet.dtype == cascade.prior.config.network.transformer.dtype == dtype
    assert cascade.upsamplers[0].config.network.unet.dtype == cascade.clip.config.network.text.dtype == dtype
    ours = load_cascade(tiny_cascade_folder, dtype)  # explicit, so weights of ours follow it
    assert {leaf.dtype.name for leaf in leaves(ours)} == {dtype} and ours.clip.config.network.vision.dtype == dtype
    assert load_cascade(tiny_cascade_folder).decoder.config.network.unet.dtype == "float32"


@pytest.mark.parametrize(
    ("platform", "capability", "dtype"),
    [
        ("cpu", None, "float32"),
        ("tpu", None, "bfloat16"),
        ("gpu", "7.5", "float16"),
        ("gpu", "8.0", "bfloat16"),
        ("gpu", "12.0", "bfloat16"),
        ("gpu", "gfx90a", "bfloat16"),
    ],
)
def test_auto_is_what_the_device_is_fast_in(monkeypatch, platform, capability, dtype):
    class Device:
        pass

    device: Any = Device()
    device.platform, device.compute_capability = platform, capability
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert fastest_dtype() == dtype


def test_a_probe_keeps_the_length_of_embeddings(load, tiny_karlo):
    cascade = load(tiny_karlo.picture)
    axes = np.linalg.qr(np.random.default_rng(0).normal(size=(24, 24)))[0].astype(np.float32)
    picture = np.random.default_rng(1).integers(0, 256, (32, 32, 3), np.uint8)
    small = Options(size=16, steps=2, guidance=1.0)
    whole = probe(cascade, picture, [24], Basis(np.zeros(24, np.float32), axes), 3, small)
    other = probe(cascade, picture, [24], Basis(np.ones(24, np.float32), axes[:, ::-1].copy()), 3, small)
    assert np.abs(whole.astype(int) - other).max() <= 1


def test_the_shipped_cascade_imports_nothing_of_the_hub(tiny_cascade_folder, tmp_path):
    heavy = "transformers huggingface_hub torch unclip_jax.interop.folder"
    program = (
        "import sys; from unclip_jax.cli import main; "
        f"code = main(['sample', 'a cat', '--size', '64', '--steps', '1', '--weights', {str(tiny_cascade_folder)!r}]); "
        f"sys.exit(code or ', '.join(name for name in {heavy.split()} if name in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
