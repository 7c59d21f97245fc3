import gzip
import time
from importlib.resources import files

import numpy as np
import pytest

from unclip_jax.data.emoji import Scenes, caption_words
from unclip_jax.data.tokenizer import BYTES, ClipTokenizer, clip_encoding, kept_ids

DOG = [49406, 320, 1125, 539, 320, 1929, 49407]
STRANGE = [
    "a photo of a dog",
    "",
    "   ",
    "A CAT, a dog; and\tan   apple\n!",
    "don't we'll it's i'm you've they're he'd",
    "1234 56,78 9.5%",
    "naïve café déjà-vu Zürich straße",
    "Ærøskøbing çok güzel ñandú",
    "кошка слева от красного яблока",
    "γάτα αριστερά από ένα μήλο",
    "猫在红苹果的左边",
    "赤いりんごの左にいる猫",
    "고양이와 사과",
    "قطة إلى يسار تفاحة حمراء",
    "חתול משמאל לתפוח אדום",
    "แมวอยู่ทางซ้ายของแอปเปิ้ล",
    "🐱 left of 🍎",
    "👩‍🚀👨‍👩‍👧‍👦🏳️‍🌈",
    "e\u0301 versus é",
    "zero\u200bwidth\u00a0space",
    "tabs\t\tand\r\nlines",
    "C++ & C# <html> \"quotes\" 'single'",
    "𝒞𝒶𝓉 ℌouse ﬁsh",
    "x" * 300,
]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    scenes = Scenes(seed=9)
    return STRANGE + [scenes[i].caption for i in range(100 - len(STRANGE))]


@pytest.fixture(scope="module")
def reference():
    """Transformers' tokenizer over OpenAI's table, which is put together here once more, from its published rule."""
    import transformers

    packed = (files("unclip_jax.data") / "clip_merges.txt.gz").read_bytes()
    merges = [tuple(line.split()) for line in gzip.decompress(packed).decode().split("\n")]
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in letters:
            letters[byte] = chr(256 + len(letters) - len(printable))
    words = list(letters.values())
    words += [word + "</w>" for word in words] + [a + b for a, b in merges] + ["<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizerFast(vocab={word: i for i, word in enumerate(words)}, merges=merges)


@pytest.fixture(scope="module")
def pruned() -> ClipTokenizer:
    return ClipTokenizer(32, kept_ids(caption_words(Scenes())))


def spelled(tokenizer: ClipTokenizer, text: str) -> str:
    """The text that ids stand for, found again through CLIP's table."""
    table = clip_encoding()
    words = [table.id_to_token(tokenizer.kept[i - 1] if tokenizer.kept else i) for i in tokenizer.pieces(text)]
    known = {chr(b): b for b in (*range(33, 127), *range(161, 173), *range(174, 256))}
    rest = [b for b in range(256) if b not in known.values()]
    known |= {chr(256 + n): byte for n, byte in enumerate(rest)}
    raw = b"".join(b" " if c == "\0" else bytes([known[c]]) for c in "".join(words).replace("</w>", "\0"))
    return raw.decode("utf-8", "replace").strip()


def test_the_known_sentence_has_its_known_ids():
    tokens = ClipTokenizer().encode(["a photo of a dog"])
    assert tokens.ids[0, :7].tolist() == DOG and not tokens.ids[0, 7:].any()
    assert tokens.mask[0].sum() == 7 and not tokens.cut[0] and tokens.ids.dtype == np.int32


def test_ids_equal_those_of_transformers(reference, texts):
    assert reference("a photo of a dog")["input_ids"] == DOG
    assert len(texts) == 100
    tokenizer = ClipTokenizer()
    for text in texts:
        expected = reference(text)["input_ids"]
        assert [49406, *tokenizer.pieces(text), 49407] == expected, text


def test_captions_need_no_bytes_after_pruning(pruned):
    """Words of the vocabulary keep CLIP's own pieces, so that a caption is as long as it is for CLIP."""
    for split in ("train", "held_out"):
        scenes = Scenes(seed=11, split=split)
        for index in range(1000):
            caption = scenes[index].caption
            pieces, whole = pruned.pieces(caption), ClipTokenizer().pieces(caption)
            assert [pruned.kept[i - 1] for i in pieces] == whole, caption
            assert len(whole) <= 30  # context 32


def test_pruned_ids_are_compact(pruned):
    assert pruned.vocab_size == len(pruned.kept) + 3 == 576
    assert list(pruned.kept[:BYTES]) == list(range(BYTES))
    tokens = pruned.encode(["a cat", ""])
    start, end = pruned.vocab_size - 2, pruned.vocab_size - 1
    assert tokens.ids[:, 0].tolist() == [start, start]
    assert tokens.ids[1, 1] == end and tokens.mask[1].sum() == 2
    # The end of text is the largest id of its row: CLIP pools there.
    assert (tokens.ids.argmax(1) == tokens.mask.sum(1) - 1).all() and tokens.ids.max() == end
    assert (tokens.ids[tokens.mask] > 0).all() and not tokens.ids[~tokens.mask].any()


@pytest.mark.parametrize("text", ["a zyzzyva", "🦄", "חתול אדום", "قطة", "猫", "e\u0301", "wolf;=_ü"])
def test_unknown_words_are_spelled_in_bytes(pruned, text):
    pieces = pruned.pieces(text)
    assert pieces and all(0 < piece < pruned.vocab_size - 2 for piece in pieces)
    assert spelled(pruned, text) == spelled(ClipTokenizer(), text)
    assert spelled(pruned, text).split()[-1][-1] in "aüé🦄םة猫"


def test_different_texts_have_different_ids(pruned, texts):
    whole = ClipTokenizer()
    assert len({tuple(pruned.pieces(text)) for text in texts}) == len({tuple(whole.pieces(text)) for text in texts})


def test_what_is_cut_is_said(pruned):
    tokens = pruned.encode(["cat " * 30, "cat " * 31, "cat" + " " * 20_000])
    assert tokens.cut.tolist() == [False, True, True]
    assert (tokens.ids[:2, -1] == pruned.vocab_size - 1).all() and tokens.mask[:2].all()


@pytest.mark.parametrize("text", ["x" * 10_000, "🐱" * 10_000, "a cat, " * 1500, "\ud800 half a pair"])
def test_long_and_broken_prompts_are_fast(pruned, text):
    start = time.perf_counter()
    for tokenizer in (pruned, ClipTokenizer()):
        tokens = tokenizer.encode([text])
        assert tokens.mask[0, :3].all() and tokens.cut[0] == (len(text) > 1000)
    assert time.perf_counter() - start < 3
