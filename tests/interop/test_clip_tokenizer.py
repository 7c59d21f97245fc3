import gzip
import json
import shutil
import sys
from dataclasses import replace
from functools import partial
from importlib.resources import files
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from unclip_jax.checkpoint.schema import CheckpointError
from unclip_jax.checkpoint.sources import open_source
from unclip_jax.config import ClipConfig
from unclip_jax.data.tokenizer import ClipTokenizer, kept_ids
from unclip_jax.interop.clip import clip_config, text_entries, text_shapes
from unclip_jax.interop.clip_tokenizer import load_tokenizer, save_tokenizer
from unclip_jax.interop.loading import load_params
from unclip_jax.models.clip import TextTower

TEXTS = [
    "a photo of a dog",
    "",
    "   ",
    "A CAT, a dog; and\tan   apple\n",
    "wow! great!!! !",
    "naïve café déjà-vu e\u0301",
    "👩‍🚀👨‍👩‍👧‍👦🏳️‍🌈 🐱 left of 🍎",
    "قطة إلى يسار تفاحة حمراء",
    "חתול משמאל לתפוח אדום",
    "猫在红苹果的左边",
    "half a pair \ud83d here",
    "a <|endoftext|> in the middle",
    "one two three " * 40,
    "!" * 200,
    " ".join(["dog"] * 75),  # fills the context to the last place
    " ".join(["dog"] * 76),
]


def openai_files(folder: Path, pad: str) -> Path:
    """A repository's four files, with the table put together from its published rule; pad: Karlo's "!", or the end."""
    packed = (files("unclip_jax.data") / "clip_merges.txt.gz").read_bytes()
    merges = gzip.decompress(packed).decode().split("\n")
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(byte) for byte in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    words = [*letters, *(letter + "</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    assert len(words) == 49408
    special = {"bos_token": words[-2], "eos_token": words[-1], "unk_token": words[-1]}
    added = {
        name: {"content": word, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
        for name, word in special.items()
    }
    settings = {name: {"__type": "AddedToken"} | word for name, word in added.items()}
    settings |= {"pad_token": pad, "model_max_length": 77, "do_lower_case": True, "tokenizer_class": "CLIPTokenizer"}
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(added | {"pad_token": pad}))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def karlo(tmp_path_factory) -> Path:
    return openai_files(tmp_path_factory.mktemp("karlo"), "!")


@pytest.fixture(scope="module")
def openai(tmp_path_factory) -> Path:
    return openai_files(tmp_path_factory.mktemp("openai"), "<|endoftext|>")


def reference(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    hub = transformers.CLIPTokenizerFast(
        vocab=str(folder / "vocab.json"),
        merges=str(folder / "merges.txt"),
        pad_token=json.loads((folder / "tokenizer_config.json").read_text())["pad_token"],
    )
    texts = [text.encode("utf-8", "replace").decode() for text in TEXTS]
    found = hub(texts, padding="max_length", truncation=True, max_length=77, return_tensors="np")
    return found["input_ids"], found["attention_mask"] == 1


@pytest.mark.parametrize("name", ["karlo", "openai"])
def test_ids_and_masks_are_the_reference_s(name, request):
    folder = request.getfixturevalue(name)
    tokenizer = load_tokenizer(folder, ClipConfig())
    tokens = tokenizer.encode(TEXTS)
    ids, mask = reference(folder)
    np.testing.assert_array_equal(tokens.ids, ids)
    np.testing.assert_array_equal(tokens.mask, mask)
    assert tokens.ids.dtype == np.int32 and tokenizer.vocab_size == 49408
    np.testing.assert_array_equal(np.flatnonzero(tokens.cut), [12, 13, 15] if name == "karlo" else [12, 15])
    assert (tokens.ids[tokens.cut, -1] == 49407).all()
    assert tokens.ids[0, :7].tolist() == [49406, 320, 1125, 539, 320, 1929, 49407]


def test_prompts_to_states_as_the_reference(karlo, tmp_path):
    """Short, empty, strange and too long prompts through tokenizer and text tower, both theirs and both ours."""
    import torch

    torch.set_num_threads(2)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    settings = transformers.CLIPTextConfig(**sizes, projection_dim=24, hidden_act="quick_gelu", eos_token_id=2)
    model = transformers.CLIPTextModelWithProjection(settings).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) * 0.15
    model.save_pretrained(tmp_path)
    ids, mask = reference(karlo)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor(ids))

    config = clip_config(json.loads((tmp_path / "config.json").read_text()))
    source = open_source(tmp_path / "model.safetensors")
    params = load_params(text_entries(config), source, text_shapes(config))
    encode = jax.jit(partial(TextTower(config).apply, method="encode_text"))
    found = encode({"params": params}, jnp.asarray(load_tokenizer(karlo, config).encode(TEXTS).ids))
    np.testing.assert_allclose(found.states, expected.last_hidden_state, atol=1e-5)
    np.testing.assert_allclose(found.embedding, expected.text_embeds, atol=1e-5)
    assert len({tuple(row) for row in np.asarray(found.embedding).round(3)}) == len({tuple(row) for row in ids})


def test_karlo_s_exclamation_mark_is_its_padding_and_stays_visible(karlo, openai):
    row = TEXTS.index("wow! great!!! !")
    tokens, plain = (load_tokenizer(folder, ClipConfig()).encode(TEXTS) for folder in (karlo, openai))
    assert (tokens.ids[row] == 0)[tokens.mask[row]].sum() == 5
    assert not (plain.ids[row] == 0).any() and (plain.ids[row] == 256).any()  # "!" at the end of a word
    # Without such marks both are our own tokenizer.
    quiet = [text for text in TEXTS if "!" not in text and "<|" not in text]
    ours, theirs = ClipTokenizer().encode(quiet), load_tokenizer(karlo, ClipConfig()).encode(quiet)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, other)


def test_other_lengths_no_texts_and_long_texts(karlo):
    tokenizer = load_tokenizer(karlo, replace(ClipConfig(), context_length=5))
    tokens = tokenizer.encode(["a photo of a dog", "dog"])
    assert tokens.ids.tolist() == [[49406, 320, 1125, 539, 49407], [49406, 1929, 49407, 0, 0]]
    assert tokens.cut.tolist() == [True, False] and tokens.mask.sum(1).tolist() == [5, 3]
    assert tokenizer.encode([]).ids.shape == (0, 5)
    assert tokenizer.encode([" " * 20_000 + "dog"]).cut[0]


def test_a_tokenizer_json_alone_is_enough(karlo, tmp_path):
    load_tokenizer(karlo, ClipConfig()).hub.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file() and not (tmp_path / "merges.txt").exists()
    found, expected = (load_tokenizer(folder, ClipConfig()).encode(TEXTS) for folder in (tmp_path, karlo))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_is_saved_loads_with_the_same_ids(karlo, tmp_path):
    save_tokenizer(load_tokenizer(karlo, ClipConfig()), tmp_path / "karlo")
    for path in karlo.iterdir():
        assert (tmp_path / "karlo" / path.name).read_bytes() == path.read_bytes()
    save_tokenizer(ClipTokenizer(), tmp_path / "own")
    texts = [text for text in TEXTS if "<|" not in text]
    expected, found = ClipTokenizer().encode(texts), load_tokenizer(tmp_path / "own", ClipConfig()).encode(texts)
    np.testing.assert_array_equal(found.mask, expected.mask)
    np.testing.assert_array_equal(found.cut, expected.cut)
    np.testing.assert_array_equal(found.ids * found.mask, expected.ids)  # exclamation marks included
    with pytest.raises(CheckpointError, match="cut to"):
        save_tokenizer(ClipTokenizer(77, kept_ids(["dog"])), tmp_path / "compact")


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_a_missing_file_is_named_and_no_vocabulary_made_up(karlo, tmp_path, name):
    shutil.copytree(karlo, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        load_tokenizer(tmp_path, ClipConfig())
    with pytest.raises(CheckpointError, match="lacks vocab.json"):
        load_tokenizer(tmp_path / "nowhere", ClipConfig())


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("merges.txt", "#version: 0.2\ni n\n", "merges"),
        ("merges.txt", "#version: 0.2\nno such\n", "cannot be read"),
        ("vocab.json", "{", "cannot be read"),
        ("vocab.json", '{"!": 0, "<|startoftext|>": 1, "<|endoftext|>": 2}', "fetch it again|no pair"),
        ("tokenizer_config.json", '{"pad_token": "!", "bos_token": "a</w>"}', "another CLIP"),
        ("tokenizer_config.json", '{"pad_token": "<pad>"}', "49409 ids"),
        ("tokenizer_config.json", "[]", "cannot be read"),
    ],
)
def test_damaged_files_and_other_vocabularies_are_refused(karlo, tmp_path, name, content, said):
    shutil.copytree(karlo, tmp_path, dirs_exist_ok=True)
    (tmp_path / "special_tokens_map.json").unlink()
    (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=said) as error:
        load_tokenizer(tmp_path, ClipConfig())
    assert "\n" not in str(error.value)


def test_a_tokenizer_of_another_clip_is_refused(karlo):
    with pytest.raises(CheckpointError, match="49408 ids and the CLIP 50"):
        load_tokenizer(karlo, replace(ClipConfig(), vocab_size=50))
    load_tokenizer(karlo, replace(ClipConfig(), eos_id=49407))
    with pytest.raises(CheckpointError, match="another CLIP"):
        load_tokenizer(karlo, replace(ClipConfig(), eos_id=40))


def test_without_transformers_one_sentence_says_what_to_install(karlo, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(CheckpointError, match="pip install transformers"):
        load_tokenizer(karlo, ClipConfig())
