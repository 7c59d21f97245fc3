import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from unclip_jax.cascade import load_cascade
from unclip_jax.checkpoint import load_network
from unclip_jax.checkpoint.sources import find_weights, open_source
from unclip_jax.cli import main
from unclip_jax.interop.folder import load_folders
from unclip_jax.interop.hub import COMPONENTS

WEIGHTS = "diffusion_pytorch_model.safetensors"


def same(a: Any, b: Any) -> bool:
    """Whether two trees have the same structure, dtypes and bits."""
    a, b = (jax.tree.map(np.asarray, dict(tree)) for tree in (a, b))
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.fixture(scope="module")
def whole(tiny_karlo, tmp_path_factory) -> Path:
    """One folder with all of both repositories, the image tower beside what the pipeline lists."""
    folder = tmp_path_factory.mktemp("whole") / "karlo"
    shutil.copytree(tiny_karlo.text, folder)
    for component in ("image_encoder", "feature_extractor"):
        shutil.copytree(tiny_karlo.picture / component, folder / component)
    return folder


@pytest.fixture(scope="module")
def ours(tiny_karlo, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("ours") / "karlo"
    assert main(["import", str(tiny_karlo.text), str(tiny_karlo.picture), "--out", str(out)]) == 0
    return out


def test_an_imported_cascade_is_ours(tiny_karlo, ours):
    cascade, published = load_cascade(ours), load_folders([tiny_karlo.text, tiny_karlo.picture])
    parts = [(c.clip, c.prior, c.decoder, *c.upsamplers) for c in (cascade, published)]
    for network, wanted in zip(*parts, strict=True):
        assert same(network.params, wanted.params) and same(network.constants, wanted.constants)
        assert network.config == wanted.config
        assert network.extra == {"imported": [{"source": "text"}, {"source": "picture"}]}
    texts = ["a cat!", "", "a dog " * 9]
    assert same(*({"": c.tokenizer.encode(texts).ids} for c in (cascade, published)))
    assert sorted(path.name for path in ours.iterdir()) == [
        *("clip.safetensors", "decoder.safetensors", "prior.safetensors", "tokenizer", "upsampler_32.safetensors")
    ]


def test_import_and_export_are_inverses(whole, ours, tmp_path, capsys):
    assert main(["export", str(ours), "--out", str(tmp_path / "back")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'back'}\n"
    for component, stem in COMPONENTS.items():
        if stem is not None:
            back, theirs = (
                open_source(find_weights(folder / component, stem)) for folder in (tmp_path / "back", whole)
            )
            assert same(back.arrays, theirs.arrays)


def test_a_dtype_can_be_chosen(tiny_karlo, ours, tmp_path):
    out = tmp_path / "half"
    assert main(["import", str(tiny_karlo.text), "--out", str(out), "--dtype", "bfloat16"]) == 0
    half, whole = (load_network(folder / "prior.safetensors") for folder in (out, ours))
    assert same(half.params, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), whole.params))
    assert same(half.constants, whole.constants) and half.clip == load_network(out / "clip.safetensors").digest


def test_a_text_tower_alone_is_enough_for_captions(tiny_karlo, tmp_path, capsys):
    out = tmp_path / "ours"
    assert main(["import", str(tiny_karlo.text), "--out", str(out)]) == 0
    cascade = load_cascade(out)
    assert "image_projection" not in cascade.clip.params and cascade.prior is not None
    lines = shown(capsys, out)
    assert "text tower alone" in lines[3] and lines[-1] == "can be combined: yes"


def test_image_variations_alone_are_imported_without_a_prior(tiny_karlo, tmp_path, capsys):
    out, back = tmp_path / "ours", tmp_path / "back"
    assert main(["import", str(tiny_karlo.picture), "--out", str(out)]) == 0
    assert shown(capsys, out)[-1].startswith("can be combined: yes, but without prior.safetensors")
    cascade, published = load_cascade(out), load_cascade(tiny_karlo.picture, "float32")
    assert cascade.prior is None
    parts = [(c.clip, c.decoder, *c.upsamplers) for c in (cascade, published)]
    assert all(same(network.params, wanted.params) for network, wanted in zip(*parts, strict=True))
    assert "no diffusion prior" in refused(capsys, "sample", "a dog", "--weights", out)
    assert main(["export", str(out), "--out", str(back)]) == 0
    assert shown(capsys, back)[-1] == "can be combined: yes"


def test_a_clip_comes_and_goes(ours, tmp_path):
    assert main(["export", str(ours / "clip.safetensors"), "--out", str(tmp_path / "clip")]) == 0
    model = transformers.CLIPModel.from_pretrained(tmp_path / "clip")
    assert main(["import", str(tmp_path / "clip"), "--out", str(tmp_path / "ours")]) == 0
    assert main(["export", str(tmp_path / "ours" / "clip.safetensors"), "--out", str(tmp_path / "again")]) == 0
    again = transformers.CLIPModel.from_pretrained(tmp_path / "again")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert {path.name for path in (tmp_path / "again").iterdir()} == {
        path.name for path in (tmp_path / "clip").iterdir()
    }
    assert same(*(load_network(path / "clip.safetensors").params for path in (ours, tmp_path / "ours")))


def test_a_clip_with_a_cut_vocabulary_goes_without_a_tokenizer(tiny_cascade_folder, tmp_path, capsys):
    assert main(["export", str(tiny_cascade_folder / "clip.safetensors"), "--out", str(tmp_path / "clip")]) == 0
    assert "no tokenizer" in capsys.readouterr().err
    transformers.CLIPModel.from_pretrained(tmp_path / "clip")
    assert main(["inspect", str(tmp_path / "clip")]) == 0
    assert "it has no tokenizer" in capsys.readouterr().out


def shown(capsys: Any, path: Path) -> list[str]:
    capsys.readouterr()
    assert main(["inspect", str(path)]) == 0
    return capsys.readouterr().out.splitlines()


def test_inspect_says_what_a_published_folder_holds(tiny_karlo, capsys):
    lines = shown(capsys, tiny_karlo.text)
    pipeline = tiny_karlo.text_pipeline
    assert lines[0] == "family: unCLIP in diffusers' layout" and lines[-1] == "can be combined: yes"
    rows = {line.split()[0]: line.split() for line in lines[3:-2]}
    for name in ("text_encoder", "prior", "text_proj", "decoder", "super_res_first", "super_res_last"):
        tensors = list(getattr(pipeline, name).state_dict().values())
        numbers = sum(tensor.numel() for tensor in tensors)
        kind = type(getattr(pipeline, name)).__name__
        assert rows[name][1:5] == [kind, f"{numbers:,}", str(len(tensors)), "float32"]
    size = 4 * sum(tensor.numel() for tensor in pipeline.text_encoder.parameters())
    assert rows["text_encoder"][5:7] == [f"{size / 1e6:.2f}", "MB"] and len(rows["text_encoder"][7]) == 12
    assert rows["total"][1] == f"{sum(int(row[2].replace(',', '')) for n, row in rows.items() if n != 'total'):,}"


def test_inspect_says_what_ours_hold_without_reading_them(ours, tmp_path, capsys):
    folder = shutil.copytree(ours, tmp_path / "ours")
    path = folder / "prior.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # of a tensor
    path.write_bytes(data)
    lines = shown(capsys, folder)
    digest = load_network(ours / "clip.safetensors").digest
    assert lines[0] == "family: unclip_jax" and lines[-1] == "can be combined: yes"
    assert [line.split()[-1] for line in lines[3:-3]] == [digest, digest, digest, "-"]
    assert [line.split("  ")[0] for line in lines[3:-3]] == ["clip", "decoder", "prior", "upsampler_32"]
    alone = shown(capsys, path)
    assert alone[0] == "family: unclip_jax" and "diffusion prior" in alone[3] and alone[-1].endswith("alone")


def test_inspect_says_why_parts_are_no_cascade(ours, tiny_cascade_folder, tmp_path, capsys):
    folder = shutil.copytree(ours, tmp_path / "mixed")
    shutil.copy(tiny_cascade_folder / "prior.safetensors", folder)
    other = load_network(tiny_cascade_folder / "clip.safetensors").digest
    assert shown(capsys, folder)[-1].startswith(f"can be combined: no: prior was trained on the CLIP {other}, not on ")
    (folder / "prior.safetensors").unlink()
    assert "without prior.safetensors" in shown(capsys, folder)[-1]
    assert shown(capsys, tiny_cascade_folder)[-1] == "can be combined: yes"


def test_inspect_knows_single_files(whole, tmp_path, capsys):
    for component, kind in (
        ("prior", "PriorTransformer"),
        ("decoder", "UNet2DConditionModel"),
        ("super_res_last", "UNet2DModel"),
        ("text_proj", "UnCLIPTextProjModel"),
    ):
        assert f" {kind} " in shown(capsys, whole / component / WEIGHTS)[3]
    torch.save({"state_dict": {"model.prd_emb": torch.zeros(2).half()}}, tmp_path / "prior.ckpt")
    assert shown(capsys, tmp_path / "prior.ckpt")[3].split()[-7:] == ["prior", "2", "1", "float16", "4", "B", "-"]
    torch.save({"other": torch.zeros(2)}, tmp_path / "other.bin")
    assert "unknown tensors" in shown(capsys, tmp_path / "other.bin")[3]


def refused(capsys: Any, *arguments: Any) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    return said.err


class Payload:
    """What would create a file, were it unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def payload(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({"weight": Payload(folder.parents[1] / "attacked")}, folder / "diffusion_pytorch_model.bin")


def truncated(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).write_bytes(data[:-5])


def sharded(folder: Path, shard: str) -> None:
    names = list(open_source(folder / WEIGHTS).arrays)
    (folder / WEIGHTS).unlink()
    index = {"weight_map": dict.fromkeys(names, shard)}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def changed(folder: Path, **tensors: np.ndarray) -> None:
    found = safetensors.numpy.load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    safetensors.numpy.save_file(found | tensors, folder / WEIGHTS)


def of_another_family(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").write_text('{"_class_name": "DiTTransformer2DModel"}')


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (payload, "posix.mkdir|os.mkdir"),
        (truncated, "is truncated"),
        (lambda folder: sharded(folder, "model-1.safetensors"), "'model-1.safetensors', and there is no such file"),
        (lambda folder: sharded(folder, "../model.safetensors"), "outside of its folder: do not trust it"),
        (lambda folder: changed(folder, wing=np.zeros(2, np.float32)), "has the unknown wing"),
        (lambda folder: changed(folder, prd_embedding=np.zeros(2, np.float32)), r"mis-shaped prd_embedding \(2,\)"),
        (of_another_family, "a DiTTransformer2DModel, not a PriorTransformer"),
    ],
    ids=["payload", "truncated", "missing shard", "path", "extra", "mis-shaped", "family"],
)
def test_what_cannot_be_used_is_refused_in_a_sentence(
    whole: Path, tmp_path: Path, capsys, damage: Callable[[Path], None], said: str
):
    folder = shutil.copytree(whole, tmp_path / "karlo", copy_function=os.link)
    damage(folder / "prior")
    message = refused(capsys, "import", folder, "--out", tmp_path / "out")
    assert re.search(said, message), message
    assert [path.name for path in tmp_path.iterdir()] == ["karlo"]


def test_parts_of_two_clips_are_refused(ours, tiny_cascade_folder, tmp_path, capsys):
    folder = shutil.copytree(ours, tmp_path / "mixed")
    shutil.copy(tiny_cascade_folder / "prior.safetensors", folder)
    assert "take all of them from one cascade" in refused(capsys, "export", folder, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_none_of_these_is_refused(tiny_cascade_folder, ours, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "no folder of a pipeline" in refused(capsys, "import", tmp_path / "empty", "--out", tmp_path / "out")
    assert "one by one" in refused(capsys, "import", tmp_path / "empty", ours, "--out", tmp_path / "out")
    assert "holds no weights" in refused(capsys, "inspect", tmp_path / "empty")
    assert "there is no file or folder" in refused(capsys, "inspect", tmp_path / "absent")
    assert "holds a PriorConfig" in refused(capsys, "export", ours / "prior.safetensors", "--out", tmp_path / "out")
    assert "cannot be exported" in refused(capsys, "export", tiny_cascade_folder, "--out", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
