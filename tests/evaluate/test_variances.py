"""Statistics of a prior's analytic sampler: what is stored with it, and that sampling reads it."""

import shutil
from dataclasses import replace

import numpy as np
import pytest

from unclip_jax.cascade import load_cascade, load_checked, load_clip
from unclip_jax.checkpoint import save_network
from unclip_jax.cli import main
from unclip_jax.config import DataConfig, PriorConfig
from unclip_jax.diffusion.analytic import clean_variance
from unclip_jax.diffusion.schedule import make_schedule
from unclip_jax.generate import encode_prompts
from unclip_jax.inputs import Options, picture_keys
from unclip_jax.priors import prior_embeddings

DATA = DataConfig(concepts=("cat", "dog", "apple"), backgrounds=("blue", "pink"), context_length=16)


@pytest.fixture(scope="module")
def folder(tiny_cascade_folder, tmp_path_factory):
    """A cascade whose prior has been measured and adopts the analytic sampler, and what the command said."""
    folder = tmp_path_factory.mktemp("analytic")
    for path in tiny_cascade_folder.iterdir():
        shutil.copy(path, folder)
    prior = load_checked(folder / "prior.safetensors", PriorConfig, load_clip(folder))
    prior = prior._replace(config=replace(prior.config, data=DATA))
    save_network(folder / "prior.safetensors", prior.config, prior.params, constants=prior.constants, clip=prior.clip)
    before = load_cascade(folder)
    assert main(["analytic", "--weights", str(folder), "--n", "8", "--timesteps", "5", "--adopt"]) == 0
    return folder, before.prior


def test_statistics_are_stored_beside_the_whitening_and_nothing_else_changes(folder):
    after, before = load_cascade(folder[0]).prior, folder[1]
    gamma = after.constants["analytic"]["gamma"]
    assert gamma.shape == (1000,) and gamma.dtype == np.float64
    assert after.digest != before.digest and after.clip == before.clip
    assert after.config == replace(before.config, sample=replace(before.config.sample, sampler="analytic"))
    np.testing.assert_array_equal(after.constants["whitening"]["mean"], before.constants["whitening"]["mean"])
    np.testing.assert_array_equal(after.params["query"], before.params["query"])
    clean = clean_variance(make_schedule(after.config.diffusion), gamma)
    assert (clean >= 0).all() and clean[-1] > 0.01


def test_the_sampler_is_the_small_variance_plus_what_was_measured(folder):
    cascade, before = load_cascade(folder[0]), folder[1]
    keys, text, null = picture_keys(0, 2), *(encode_prompts(cascade, p) for p in (["a cat", "a dog"], [""]))

    def drawn(prior):
        return np.asarray(prior_embeddings(prior, keys, text, null, Options(candidates=1)))

    prior = cascade.prior
    exact = prior._replace(constants={**prior.constants, "analytic": {"gamma": np.ones(1000)}})
    np.testing.assert_allclose(drawn(exact), drawn(before), atol=1e-5)
    assert np.abs(drawn(prior) - drawn(before)).max() > 1e-3


@pytest.mark.parametrize("constants", [{}, {"analytic": {}}, {"analytic": {"gamma": np.ones(7)}}])
def test_a_prior_without_statistics_says_so(folder, constants):
    cascade = load_cascade(folder[0])
    text = encode_prompts(cascade, ["a cat", "a dog"])
    prior = cascade.prior._replace(constants={"whitening": cascade.prior.constants["whitening"], **constants})
    with pytest.raises(ValueError, match="lacks the statistics of its analytic sampler: run unclip analytic"):
        prior_embeddings(prior, picture_keys(0, 2), text, text, Options())


@pytest.mark.parametrize(
    ("arguments", "said"), [(["--n", "0"], "--n must be at least 1"), (["--timesteps", "1001"], "between 1 and 1000")]
)
def test_refused_in_one_sentence(folder, capsys, arguments, said):
    assert main(["analytic", "--weights", str(folder[0]), *arguments]) == 1
    assert said in capsys.readouterr().err.splitlines()[-1]
