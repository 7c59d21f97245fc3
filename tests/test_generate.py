import numpy as np
import pytest

import unclip_jax
from unclip_jax.cascade import Cascade, load_cascade
from unclip_jax.generate import check, decode, encode_prompts, generate, upsample
from unclip_jax.inputs import Options, encode, picture_keys
from unclip_jax.priors import prior_embeddings, sample_ar_prior, sample_prior

PROMPT = "a cat on a blue background"


@pytest.fixture(scope="module")
def cascade(tiny_cascade_folder) -> Cascade:
    return load_cascade(tiny_cascade_folder)


@pytest.fixture(scope="module")
def three(cascade):
    return generate(cascade, [PROMPT] * 3, seeds=7)


def levels_apart(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def test_a_picture_is_the_same_alone_and_in_a_batch(cascade, three):
    assert three.shape == (3, 1024, 1024, 3) and three.dtype == np.uint8
    assert levels_apart(generate(cascade, [PROMPT], seeds=9)[0], three[2]) <= 1
    assert levels_apart(three[0], three[1]) > 20


def test_seeds_may_be_given_one_by_one(cascade, three):
    again = generate(cascade, [PROMPT] * 3, seeds=[9, 7, 8], options=Options(size=256))
    ordered = generate(cascade, [PROMPT] * 3, seeds=7, options=Options(size=256))
    assert levels_apart(again, ordered[[2, 0, 1]]) <= 1


def test_prompt_guidance_and_steps_never_recompile(cascade, three):
    functions = (encode, sample_prior, decode, upsample)
    before = [function._cache_size() for function in functions]
    other = Options(steps=5, guidance=1.5, prior_steps=2, prior_guidance=4.0)
    pictures = generate(cascade, ["a red apple", "", "a dog and a house", PROMPT], seeds=1, options=other)
    assert [function._cache_size() for function in functions] == before
    assert levels_apart(pictures[0], three[0]) > 20


@pytest.mark.parametrize("option", ["prompt", "guidance", "steps", "prior_guidance", "prior_steps"])
def test_every_choice_reaches_the_picture(cascade, option):
    small = Options(size=64)
    plain = generate(cascade, [PROMPT, PROMPT, PROMPT], 0, small)
    if option == "prompt":
        changed = generate(cascade, ["a red dog"] * 3, 0, small)
    else:
        changed = generate(cascade, [PROMPT] * 3, 0, small._replace(**{option: 5.0 if "guidance" in option else 5}))
    assert plain.shape == (3, 64, 64, 3)
    assert not np.array_equal(plain, changed)


def test_the_prior_keeps_the_candidate_closest_to_the_text(cascade):
    keys = picture_keys(0, 4)
    text, null = encode_prompts(cascade, [PROMPT, "a dog", "a red apple", ""]), encode_prompts(cascade, [""])
    one = np.asarray(prior_embeddings(cascade.prior, keys, text, null, Options(candidates=1)))
    best = np.asarray(prior_embeddings(cascade.prior, keys, text, null, Options(candidates=2)))
    np.testing.assert_allclose(np.linalg.norm(best, axis=1), 1, rtol=1e-5)
    gain = ((best - one) * np.asarray(text.embedding)).sum(1)
    assert (gain > -1e-5).all() and gain.max() > 1e-4


def test_the_autoregressive_prior_draws_the_same_alone_and_in_a_batch(cascade, three):
    options = Options(size=64, prior="ar")
    drawn = generate(cascade, [PROMPT] * 3, 7, options)
    assert levels_apart(generate(cascade, [PROMPT], 9, options)[0], drawn[2]) <= 1
    assert levels_apart(drawn, generate(cascade, [PROMPT] * 3, 7, options._replace(prior="diffusion"))) > 0
    programs = sample_ar_prior._cache_size()
    for changed in ({"prior_guidance": 9.0}, {"prior_temperature": 0.0}):
        other = generate(cascade, [PROMPT] * 3, 7, options._replace(**changed))
        assert levels_apart(other, drawn) > 0
    assert sample_ar_prior._cache_size() == programs


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (Options(prior="ar", prior_steps=3), "has no steps to choose"),
        (Options(prior_temperature=1.0), "has no temperature"),
        (Options(prior="ar", prior_temperature=-1.0), "prior temperature must be a number"),
        (Options(size=100), "64, 256, 1024 px, not 100"),
        (Options(steps=0), "steps must lie between 1 and 1000, not 0"),
        (Options(steps=1001), "not 1001"),
        (Options(prior_steps=-1), "prior steps must lie"),
        (Options(guidance=float("nan")), "guidance must be a number"),
        (Options(prior_guidance=float("inf")), "prior guidance must be a number"),
        (Options(candidates=0), "candidates must lie"),
    ],
)
def test_options_without_sense_are_refused(cascade, options, said):
    with pytest.raises(ValueError, match=said):
        check(cascade, options)


def test_a_cascade_may_lack_the_autoregressive_prior(cascade):
    alone = cascade._replace(ar_prior=None)
    with pytest.raises(ValueError, match="no ar_prior.safetensors"):
        generate(alone, PROMPT, options=Options(size=64, prior="ar"))
    assert alone.digest != cascade.digest and check(alone, Options(size=64)) == 64


@pytest.mark.parametrize(
    ("prompts", "seeds", "said"),
    [
        ([PROMPT], -1, "not -1"),
        ([PROMPT, PROMPT], 2**32 - 1, "seeds must lie"),
        ([], 0, "0 prompts"),
        ([PROMPT], [], "0 seeds"),
    ],
)
def test_prompts_and_seeds_must_be_there(cascade, prompts, seeds, said):
    with pytest.raises(ValueError, match=said):
        generate(cascade, prompts, seeds)


def test_the_package_offers_four_lines(tiny_cascade_folder):
    cascade = unclip_jax.load_cascade(tiny_cascade_folder)
    pictures = unclip_jax.generate(cascade, ["a cat"], seeds=0, options=unclip_jax.Options(size=64))
    assert pictures.shape == (1, 64, 64, 3)
