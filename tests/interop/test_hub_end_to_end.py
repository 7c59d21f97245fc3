"""From a repository's name to a cascade or a CLIP, through the hub's real client."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from unclip_jax.cascade import Cascade, load_cascade, load_clip
from unclip_jax.checkpoint import load_network
from unclip_jax.checkpoint.schema import CheckpointError
from unclip_jax.cli import main
from unclip_jax.interop.clip import clip_folder
from unclip_jax.interop.importing import clip_network, import_weights

TEXT, PICTURE, CLIP = "owner/karlo", "owner/karlo-variations", "owner/clip"


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same(one: Any, other: Any) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)


def params_of(cascade: Cascade) -> list[Any]:
    return [network.params for network in cascade.networks]


@pytest.fixture
def clip(tiny_karlo, tmp_path) -> Path:
    """A CLIP's repository as it is published, and what else lies in it."""
    import_weights([str(tiny_karlo.text), str(tiny_karlo.picture)], tmp_path / "imported")
    network = load_clip(tmp_path / "imported")
    clip_folder(network.params, network.config.network, tmp_path / "clip")  # type: ignore[arg-type]
    for file in (tmp_path / "imported" / "tokenizer").iterdir():
        shutil.copy(file, tmp_path / "clip")
    (tmp_path / "clip" / "pytorch_model.bin").write_bytes(b"pickle")
    (tmp_path / "clip" / "tf_model.h5").write_bytes(b"tensorflow")
    return tmp_path / "clip"


def test_a_cascade_comes_from_a_pinned_revision_over_a_connection_that_breaks(hub, tiny_karlo, tmp_path):
    files = content(tiny_karlo.text)
    commit = hub.push(files, TEXT)
    hub.push(files | {"decoder/config.json": b"{}"}, TEXT)  # the branch moves on
    hub.push(content(tiny_karlo.picture), PICTURE)
    largest = max(files, key=lambda name: len(files[name]))
    hub.cuts = {largest: 1, "prior/diffusion_pytorch_model.safetensors": 2}
    found = load_cascade(f"{TEXT}@{commit}", "float32")
    assert set(hub.cuts.values()) == {0} and hub.fetched().count(largest) == 2
    local = load_cascade(tiny_karlo.text, "float32")
    assert found.digest == local.digest and same(params_of(found), params_of(local))
    both = load_cascade(f"{TEXT}@{commit},{PICTURE}", offload="always")
    assert both.prior is not None and "image_projection" in both.clip.params
    assert main(["import", f"{TEXT}@{commit}", "--out", str(tmp_path / "ours")]) == 0
    ours = load_network(tmp_path / "ours" / "decoder.safetensors")
    assert ours.extra == {"imported": [{"source": TEXT, "revision": commit}]} and same(
        ours.params, found.decoder.params
    )
    with pytest.raises(CheckpointError, match="UNet2DConditionModel has the setting"):
        load_cascade(TEXT)  # which has a config of nothing by now


def test_nothing_is_loaded_of_what_never_arrives(hub, tiny_karlo, tmp_path, capsys):
    hub.push(content(tiny_karlo.text), TEXT)
    hub.cuts = {"decoder/diffusion_pytorch_model.safetensors": 1000}
    assert main(["import", TEXT, "--out", str(tmp_path / "ours")]) == 1
    assert "did not arrive whole" in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()


def test_a_clip_alone_is_imported_and_inspected(hub, clip, tmp_path, capsys):
    files = content(clip)
    commit = hub.push(files, CLIP)
    hub.cuts = {"model.safetensors": 1}
    assert main(["import", CLIP, "--out", str(tmp_path / "ours")]) == 0
    assert set(hub.fetched()) == set(files) - {"pytorch_model.bin", "tf_model.h5"}
    ours, (there, tokenizer) = load_network(tmp_path / "ours" / "clip.safetensors"), clip_network(clip)
    assert ours.extra == {"imported": [{"source": CLIP, "revision": commit}]} and same(ours.params, there.params)
    assert tokenizer is not None and (tmp_path / "ours" / "tokenizer").is_dir()
    capsys.readouterr()
    hub.log.clear()
    assert main(["inspect", f"{CLIP}@{commit}"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "family: CLIP in Hugging Face's layout" and said[-1] == "can be combined: a CLIP alone"
    assert hub.log == []  # the cache is asked alone
    with pytest.raises(CheckpointError, match="has no model_index.json: give a repository that holds a pipeline"):
        load_cascade(CLIP)


def test_models_of_other_kinds_are_not_fetched(hub, clip, tmp_path, capsys):
    for config in ({"model_type": "llama"}, {}):
        hub.push(content(clip) | {"config.json": json.dumps(config).encode()}, CLIP)
        assert main(["import", CLIP, "--out", str(tmp_path / "ours")]) == 1
        assert f"is of a model of type {config.get('model_type')!r}" in capsys.readouterr().err
    hub.push({"README.md": b"words"}, CLIP)
    assert main(["inspect", CLIP]) == 1
    assert "no model_index.json and no config.json" in capsys.readouterr().err
    assert set(hub.fetched()) == {"config.json"}
