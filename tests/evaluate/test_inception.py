from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from unclip_jax.checkpoint.safetensors import save_file
from unclip_jax.checkpoint.schema import CheckpointError
from unclip_jax.evaluate.distances import frechet, moments_of
from unclip_jax.evaluate.inception import expected_shapes, inception_features, load_inception, resized


@pytest.fixture(scope="module")
def network():
    spec = spec_from_file_location("torch_inception", Path(__file__).with_name("torch_inception.py"))
    assert spec is not None and spec.loader is not None
    oracle = module_from_spec(spec)
    spec.loader.exec_module(oracle)
    return oracle.randomised(oracle.Inception())


@pytest.fixture(scope="module")
def path(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "pt_inception.pth"
    torch.save(network.state_dict(), path)
    return path


def test_features_and_distance_equal_torch(network, path):
    """At 75 px, the least that its blocks leave anything of; beside_pytorch_fid.py compares them at 299."""
    pictures = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3)).astype(np.uint8)
    network.size, params = 75, load_inception(path).params
    ours = np.asarray(inception_features(params, pictures, size=75))
    with torch.no_grad():
        theirs = network(torch.from_numpy(pictures)).numpy()
    assert np.abs(theirs).max() > 1
    np.testing.assert_allclose(ours, theirs, atol=1e-3)
    halves = [[moments_of(part[:, ::8]) for part in (features[:2], features[2:])] for features in (ours, theirs)]
    assert frechet(*halves[0]) == pytest.approx(frechet(*halves[1]), rel=1e-3)


@pytest.mark.parametrize("side", [64, 400])
def test_resizing_is_torchs(side):
    pictures = np.random.default_rng(0).random((1, side, side, 3)).astype(np.float32)
    theirs = F.interpolate(torch.from_numpy(pictures.transpose(0, 3, 1, 2)), (299, 299), mode="bilinear")
    np.testing.assert_allclose(resized(jnp.asarray(pictures), 299), theirs.numpy().transpose(0, 2, 3, 1), atol=2e-5)


def test_names_and_shapes_are_the_published_ones(network):
    given = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    unused = {name for name in given if name.startswith("fc.") or name.endswith("num_batches_tracked")}
    assert {name: shape for name, shape in given.items() if name not in unused} == expected_shapes()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("Mixed_7c.branch_pool.bn.bias"), "lacks 'Mixed_7c.branch_pool.bn.bias'"),
        (lambda t: t.update({"AuxLogits.fc.weight": np.zeros(3, np.float32)}), "'AuxLogits.fc.weight', which"),
        (lambda t: t.update({"Mixed_5b.branch1x1.bn.bias": np.zeros(63, np.float32)}), "of shape (63,)"),
    ],
)
def test_another_network_is_refused_by_name(tmp_path, change, says):
    tensors = {name: np.zeros(shape, np.float16) for name, shape in expected_shapes().items()}
    change(tensors)
    save_file(tensors, tmp_path / "inception.safetensors")
    with pytest.raises(CheckpointError, match="inception.safetensors") as caught:
        load_inception(tmp_path / "inception.safetensors")
    assert says in str(caught.value)
