import errno
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest
from PIL import Image

from unclip_jax import compile_cache, output, sample
from unclip_jax.cascade import load_cascade
from unclip_jax.checkpoint import load_network, save_network
from unclip_jax.cli import main

PROMPT = "a cat on a blue background"


@pytest.fixture
def unclip(tiny_cascade_folder, tmp_path, capsys, monkeypatch):
    """Runs `unclip sample` in an empty folder; gives exit code, lines of output and lines of errors."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str):
        weights = [] if "--weights" in arguments else ["--weights", str(tiny_cascade_folder)]
        code = main(["sample", *arguments, *weights])
        said = capsys.readouterr()
        return code, said.out.splitlines(), said.err.splitlines()

    return run


def names(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_prompt_becomes_a_picture_that_says_how_it_was_made(unclip, tmp_path, tiny_cascade_folder):
    code, out, err = unclip(PROMPT, "--seed", "5", "--steps", "4")
    assert (code, out, names(tmp_path)) == (0, ["unclip.png"], ["unclip.png"])
    assert err[-1].startswith("unclip: text ") and "upsampler 1024 px" in err[-1]
    with Image.open("unclip.png") as picture:
        assert (picture.size, picture.mode) == ((1024, 1024), "RGB")
        about = picture.text
    assert (about["prompt"], about["seed"]) == (PROMPT, "5")
    assert about["weights"] == load_cascade(tiny_cascade_folder).digest
    settings = json.loads(about["settings"])
    assert (settings["size"], settings["steps"], settings["guidance"], settings["prior_steps"]) == (1024, 4, 2.0, 3)


def test_the_prior_is_named_in_the_picture(unclip):
    assert unclip(PROMPT, "--size", "64", "--prior", "ar", "--prior-guidance", "3")[0] == 0
    settings = json.loads(Image.open("unclip.png").text["settings"])
    assert (settings["prior"], settings["prior_guidance"], settings["prior_temperature"]) == ("ar", 3.0, 1.0)
    assert "prior_steps" not in settings


def test_further_pictures_lie_beside_the_first_with_a_grid(unclip, tmp_path):
    code, out, _ = unclip(PROMPT, "--n", "3", "--size", "64", "--seed", "1", "--out", "new/deep/cat.png")
    expected = ["cat.png", "cat-1.png", "cat-2.png", "cat-grid.png"]
    assert code == 0 and out == [str(tmp_path.joinpath("new/deep", name).relative_to(tmp_path)) for name in expected]
    assert names(tmp_path / "new/deep") == sorted(expected)
    pictures = [np.asarray(Image.open(path)) for path in out]
    rows = np.concatenate([np.concatenate(pictures[:2], 1), np.concatenate([pictures[2], 0 * pictures[2] + 255], 1)])
    np.testing.assert_array_equal(pictures[3], rows)
    assert unclip(PROMPT, "--size", "64", "--seed", "3", "--out", "alone.png")[0] == 0
    difference = np.asarray(Image.open("alone.png")).astype(int) - pictures[2]
    assert np.abs(difference).max() <= 1


def test_a_folder_takes_pictures_named_by_prompt_and_seed(unclip, tmp_path):
    code, _, err = unclip("חתול 🐈 Cat!", "--n", "3", "--size", "64", "--out", "pictures")
    assert code == 0
    assert names(tmp_path / "pictures") == ["cat-0.png", "cat-1.png", "cat-2.png", "grid.png"]
    assert Image.open("pictures/cat-1.png").text["prompt"] == "חתול 🐈 Cat!"
    assert 'never saw "חתול", "🐈", "!"' in err[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--size", "100"], "64, 256, 1024 px, not 100"),
        (["--steps", "0"], "steps must lie"),
        (["--steps", "-3"], "steps must lie"),
        (["--guidance", "nan"], "guidance must be a number"),
        (["--prior-guidance", "-1"], "prior guidance must be a number"),
        (["--candidates", "0"], "candidates must lie"),
        (["--n", "0"], "--n must lie"),
        (["--n", "-2"], "--n must lie"),
        (["--seed", "-1"], "seeds must lie"),
        (["--seed", "4294967295", "--n", "2"], "not 4294967296"),
        (["--weights", "nowhere"], "no folder of weights 'nowhere'"),
        (["--out", "file/cat.png"], "cannot save 'file/cat.png'"),
        (["--out", "file"], "cannot save"),
        (["--out", "cat.jpg"], "must end in .png"),
        (["--out", "n" * 300 + ".png"], "too long"),
    ],
)
def test_refused_in_one_sentence(unclip, tmp_path, arguments, said):
    (tmp_path / "file").touch()
    code, out, err = unclip(PROMPT, *arguments)
    assert (code, out, len(err), names(tmp_path)) == (1, [], 1, ["file"])
    assert err[0].startswith("unclip: ") and said in err[0]


def test_an_unwritable_path_is_refused_before_anything_is_loaded(unclip, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "load_cascade", lambda folder: pytest.fail("loaded"))
    monkeypatch.setattr(
        output.tempfile, "TemporaryFile", lambda dir: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
    )
    code, _, err = unclip(PROMPT, "--out", "new/cat.png")
    assert code == 1 and err == ["unclip: cannot save 'new/cat.png': Permission denied; choose another --out"]


@pytest.mark.parametrize(
    "arguments", [["sample"], ["sample", "a cat", "--n", "x"], ["sample", "a cat", "--stepps", "3"], []]
)
def test_misuse_of_the_command_line_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2 and "Traceback" not in capsys.readouterr().err


def missing(folder):
    (folder / "decoder.safetensors").unlink()


def truncated(folder):
    path = folder / "prior.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def flipped(folder):
    path = folder / "upsampler_1024.safetensors"
    data = bytearray(path.read_bytes())
    data[-50] ^= 4
    path.write_bytes(data)


def another_network(folder):
    shutil.copy(folder / "prior.safetensors", folder / "decoder.safetensors")


def another_config(folder):
    path = folder / "decoder.safetensors"
    network = load_network(path)
    shorter = replace(network.config, network=replace(network.config.network, context_length=12))
    params = {**network.params, "null_text": network.params["null_text"][:12]}
    save_network(path, shorter, params, clip=network.clip)


def config_of_other_tensors(folder):
    path = folder / "upsampler_256.safetensors"
    network = load_network(path)
    wider = replace(network.config.network, unet=replace(network.config.network.unet, channels=16))
    save_network(path, replace(network.config, network=wider), network.params)


def another_clip(folder):
    path = folder / "clip.safetensors"
    network = load_network(path)
    params = jax.tree.map(lambda x: x * 2, network.params)
    save_network(path, network.config, params, extra=network.extra)


def another_tokenizer(folder):
    network = load_network(folder / "clip.safetensors")
    extra = {**network.extra, "kept_ids": network.extra["kept_ids"][:-1]}
    save_network(folder / "clip.safetensors", network.config, network.params, extra=extra)


def no_whitening(folder):
    network = load_network(folder / "prior.safetensors")
    save_network(folder / "prior.safetensors", network.config, network.params, clip=network.clip)


def no_quantiser(folder):
    network = load_network(folder / "ar_prior.safetensors")
    tables = {"quantiser": {**network.constants["quantiser"], "buckets": np.asarray(9, np.int32)}}
    save_network(folder / "ar_prior.safetensors", network.config, network.params, constants=tables, clip=network.clip)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (missing, "there is no weights file"),
        (truncated, "truncated or damaged"),
        (flipped, "is damaged"),
        (another_network, "not the DecoderConfig needed here"),
        (another_config, "different configs"),
        (config_of_other_tensors, "belongs to another network"),
        (another_clip, "was trained on the CLIP"),
        (another_tokenizer, "does not carry the tokenizer"),
        (no_whitening, "lacks the prior's whitening"),
        (no_quantiser, "lacks the prior's quantiser"),
    ],
)
def test_weights_that_do_not_fit_are_refused(unclip, tiny_cascade_folder, tmp_path, harm, said):
    weights = tmp_path / "weights"
    shutil.copytree(tiny_cascade_folder, weights)
    harm(weights)
    code, out, err = unclip(PROMPT, "--weights", str(weights), "--out", "pictures/cat.png")
    assert (code, out, len(err)) == (1, [], 1)
    assert said in err[0] and not (tmp_path / "pictures").exists()


def test_a_full_disk_loses_nothing_that_was_saved(unclip, tmp_path, monkeypatch):
    synced = []

    def sync(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(output.os, "fsync", sync)
    code, _, err = unclip(PROMPT, "--n", "3", "--size", "64")
    assert code == 1 and "unclip-1.png': the disk is full" in err[-1]
    assert names(tmp_path) == ["unclip.png"]
    assert Image.open("unclip.png").size == (64, 64)


def test_odd_prompts_work_with_one_warning_each(unclip, tmp_path):
    for prompt, said in [("", "the prompt is empty"), ("cat " * 2500, "only its first 14"), ("قطة", "never saw")]:
        code, _, err = unclip(prompt, "--size", "64")
        warnings = [line for line in err if "warning" in line]
        assert code == 0 and len(warnings) == 1 and said in warnings[0]
        assert Image.open("unclip.png").text["prompt"] == prompt


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("A cat, to the left of a red APPLE.", []),
        ("a bananna on a blue background", ['"bananna" (nearest: "banana")']),
        ("a 🦓 cat\udc80", ['"🦓"', '"\udc80"']),
        ("   ", ["the prompt is empty"]),
        ("qqqq " * 40, ["only its first 14 word pieces", '"qqqq"']),
        (" ".join(f"x{number}" for number in range(3)), ['"x0"', '"x1"', '"x2"']),
    ],
)
def test_warnings_name_what_the_cascade_never_saw(tiny_cascade_folder, prompt, expected):
    lines = sample.warnings_of(load_cascade(tiny_cascade_folder), prompt.encode("utf-8", "replace").decode())
    said = " ".join(lines)
    assert bool(lines) == bool(expected)
    assert all(part.replace("\udc80", "?") in said for part in expected)


def test_sampling_needs_nothing_of_training(tiny_cascade_folder, tmp_path):
    heavy = "tensorflow tensorflow_datasets grain orbax array_record tensorboardX resvg_py torch unclip_jax.data.loader"
    program = (
        "import sys; from unclip_jax.cli import main; import unclip_jax.sample; "
        f"code = main(['vocabulary', '--weights', {str(tiny_cascade_folder)!r}]); "
        f"sys.exit(code or ', '.join(name for name in {heavy.split()} if name in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("things: cat, dog, apple\nwords: a above an and apple")


@pytest.fixture
def no_cache_chosen():
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_compiled_programs_are_kept_per_versions_and_processor(no_cache_chosen, tmp_path, monkeypatch):
    monkeypatch.setenv("UNCLIP_CACHE_DIR", str(tmp_path))
    folder = compile_cache.enable()
    assert folder is not None and folder.parent == tmp_path and folder.is_dir()
    assert f"jax{jax.__version__}" in folder.name and jax.config.jax_compilation_cache_dir == str(folder)
    monkeypatch.setattr(compile_cache, "_processor", lambda: "another")
    assert compile_cache.machine() != folder.name


def test_a_cache_that_the_user_chose_stays(no_cache_chosen, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    assert compile_cache.enable(tmp_path / "other") == tmp_path
    assert not (tmp_path / "other").exists()


def test_without_a_writable_cache_folder_only_a_warning(no_cache_chosen, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert compile_cache.enable(tmp_path / "file" / "cache") is None
    assert capsys.readouterr().err.count("\n") == 1
