"""Re-ranking and CLIP guidance: the first candidate is the plain picture, the best is kept, off is off."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from unclip_jax.cascade import load_cascade
from unclip_jax.cli import main
from unclip_jax.evaluate.retrieval import embed_pictures
from unclip_jax.generate import check, decode, draw_candidates, encode_prompts, generate, generate_ranked
from unclip_jax.inputs import Options, picture_keys
from unclip_jax.models.clip import normalise
from unclip_jax.rank import best_of, candidate_keys, picture_score
from unclip_jax.stages import to_model

PROMPTS = ["a cat on a blue background", "a red apple", "a dog"]
SMALL = Options(size=64)


@pytest.fixture(scope="module")
def cascade(tiny_cascade_folder):
    return load_cascade(tiny_cascade_folder)


@pytest.fixture(scope="module")
def six(cascade):
    """Six candidates of three prompts: 18 pictures, so more than one batch."""
    return draw_candidates(cascade, PROMPTS, [5, 6, 7], SMALL._replace(rank_from=6))


def test_keys_of_candidates_are_distinct_and_the_first_is_the_pictures_own():
    keys = picture_keys(3, 4)
    many, few = candidate_keys(keys, 6), candidate_keys(keys, 2)
    data = jax.random.key_data(many)
    np.testing.assert_array_equal(data[:, 0], jax.random.key_data(keys))
    np.testing.assert_array_equal(data[:, :2], jax.random.key_data(few))
    assert len({tuple(row) for row in np.asarray(data).reshape(-1, data.shape[-1])}) == 24
    np.testing.assert_array_equal(jax.random.key_data(candidate_keys(keys, 1)), data[:, :1])


def test_more_candidates_leave_the_first_ones_as_they_are(cascade, six):
    plain = generate(cascade, PROMPTS, 5, SMALL)
    assert np.abs(six.pictures[:, 0].astype(int) - plain).max() <= 1
    two = draw_candidates(cascade, PROMPTS, [5, 6, 7], SMALL._replace(rank_from=2))
    assert np.abs(six.pictures[:, :2].astype(int) - two.pictures).max() <= 1
    np.testing.assert_allclose(six.scores[:, :2], two.scores, atol=1e-2)
    assert all(np.abs(np.diff(row.astype(int), axis=0)).max() > 5 for row in six.pictures)


def test_scores_are_cosines_of_picture_and_prompt(cascade, six):
    text = np.asarray(normalise(encode_prompts(cascade, PROMPTS).embedding))
    for row in range(3):
        cosines = embed_pictures(cascade.clip, six.pictures[row]) @ text[row]
        np.testing.assert_allclose(six.scores[row], cosines, atol=1e-5)


def test_the_best_picture_is_kept_and_enlarged_with_its_own_noise(cascade, six):
    pictures, scores = generate_ranked(cascade, PROMPTS, 5, SMALL._replace(rank_from=6))
    np.testing.assert_array_equal(scores, six.scores)
    for row, place in enumerate(best_of(six.scores, 6)):
        np.testing.assert_array_equal(pictures[row], six.pictures[row, place])
        assert scores[row, place] == scores[row].max()


def test_the_best_of_the_first_few():
    scores = np.array([[0.1, 0.3, 0.2, 0.4], [0.9, 0.1, 0.2, 0.3]], np.float32)
    assert [best_of(scores, n).tolist() for n in (1, 2, 3, 4)] == [[0, 0], [1, 0], [1, 0], [3, 0]]


def test_one_candidate_is_not_scored(cascade):
    pictures, scores = generate_ranked(cascade, PROMPTS[:1], 5, SMALL)
    assert scores is None and pictures.shape == (1, 64, 64, 3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (Options(rank_from=0), "rank from must lie between 1 and 512, not 0"),
        (Options(rank_from=513), "not 513"),
        (Options(clip_guidance=-1.0), "clip guidance must be a number"),
        (Options(clip_guidance=float("nan")), "clip guidance must be a number"),
    ],
)
def test_options_without_sense_are_refused(cascade, options, said):
    with pytest.raises(ValueError, match=said):
        check(cascade, options)


def test_pictures_say_what_they_were_chosen_by(tiny_cascade_folder, tmp_path, capsys, six):
    out = tmp_path / "cat.png"
    command = ["sample", PROMPTS[0], "--rank-from", "6", "--seed", "5", "--size", "64", "--out", str(out)]
    assert main([*command, "--weights", str(tiny_cascade_folder)]) == 0
    capsys.readouterr()
    with Image.open(out) as picture:
        about = picture.text
    assert json.loads(about["settings"])["rank_from"] == 6
    scores = json.loads(about["clip_scores"])
    np.testing.assert_allclose(scores, six.scores[0], atol=1e-2)
    assert int(about["candidate"]) == int(np.argmax(scores))


def test_the_guiding_score_is_the_ranking_score_and_guidance_raises_it(cascade, six):
    text = encode_prompts(cascade, PROMPTS).embedding
    clip = cascade.clip.config.network
    score = picture_score(clip, cascade.clip.params, text)
    x0 = to_model(jnp.asarray(six.pictures[:, 0]))
    values, gradient = jax.jit(lambda x: (score(x), jax.grad(lambda y: score(y).sum())(x)))(x0)
    np.testing.assert_allclose(values / values[0], six.scores[:, 0] / six.scores[0, 0], rtol=1e-3)
    # Along the gradient the score rises by the step times its squared length: the gradient is the score's.
    step = 1e-3 / jnp.sqrt(jnp.square(gradient).sum((1, 2, 3), keepdims=True))
    rise = score(x0 + step * gradient) - values
    np.testing.assert_allclose(rise, 1e-3 * jnp.sqrt(jnp.square(gradient).sum((1, 2, 3))), rtol=0.05, atol=2e-5)


def test_clip_guidance_reaches_the_picture_and_is_data(cascade):
    plain = generate(cascade, PROMPTS, 5, SMALL)
    before = decode._cache_size()
    np.testing.assert_array_equal(generate(cascade, PROMPTS, 5, SMALL._replace(clip_guidance=0.0)), plain)
    assert decode._cache_size() == before
    guided = [generate(cascade, PROMPTS, 5, SMALL._replace(clip_guidance=scale)) for scale in (5.0, 50.0)]
    assert decode._cache_size() == before + 1
    assert not np.array_equal(guided[0], plain) and not np.array_equal(guided[0], guided[1])
