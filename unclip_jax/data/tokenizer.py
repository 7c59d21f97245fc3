"""CLIP's byte-pair encoding, cut down to the ids that a cascade's captions use, with a fallback to bytes."""

import gzip
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

START, END = "<|startoftext|>", "<|endoftext|>"
BYTES = 512  # the 256 bytes, each alone and as the end of a word


class Tokens(NamedTuple):
    """Encoded texts: ids [b n] padded with 0, mask [b n] true on real tokens, cut [b] true where text was lost."""

    ids: Int[np.ndarray, "b n"]
    mask: Bool[np.ndarray, "b n"]
    cut: Bool[np.ndarray, " b"]


@cache
def clip_encoding() -> Tokenizer:
    """OpenAI's tokenizer (49,408 ids), from the merges kept in this package."""
    with (files("unclip_jax.data") / "clip_merges.txt.gz").open("rb") as packed:
        lines = gzip.decompress(packed.read()).decode().split("\n")
    merges = [(first, second) for first, second in map(str.split, lines)]
    # The order of OpenAI's table: printable bytes by code point, then the remaining bytes as code points from 256.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(code) for code in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges), START, END]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token=END, end_of_word_suffix="</w>", fuse_unk=False)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    return tokenizer


@cache
def clip_vocabulary() -> dict[str, int]:
    """Ids of OpenAI's tokenizer by word piece."""
    return clip_encoding().get_vocab()


@runtime_checkable
class TextTokenizer(Protocol):
    """What turns prompts into ids for a cascade."""

    @property
    def context_length(self) -> int:
        """Ids of a text, padding included."""
        ...

    def encode(self, texts: list[str]) -> Tokens:
        """Texts as ids; what does not fit is cut, with the end of text kept."""
        ...


@dataclass(frozen=True)
class ClipTokenizer:
    """Texts to padded ids.

    kept: CLIP ids that keep an id of their own, ascending, the 512 byte ids among them; () keeps all 49,408 ids.
        A word piece outside them is spelled in bytes, so every text can be encoded.
    Compact ids: 0 is padding, then `kept` in order, then start and end of text (the largest: CLIP pools there).
    """

    context_length: int = 77
    kept: tuple[int, ...] = ()

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return len(self.kept) + 3 if self.kept else 49408

    def _spell(self, index: int) -> list[int]:
        """A CLIP id in compact ids: itself where kept, else its bytes."""
        compact = _compact(self.kept)
        if index in compact:
            return [compact[index]]
        vocabulary = clip_vocabulary()
        word = clip_encoding().id_to_token(index) or ""
        body, suffix = (word[:-4], "</w>") if word.endswith("</w>") else (word, "")
        letters = [*body[:-1], body[-1] + suffix]
        return [compact[vocabulary[letter]] for letter in letters]

    def pieces(self, text: str) -> list[int]:
        """The text's ids without start, end or padding."""
        text = text.encode("utf-8", "replace").decode()  # half a surrogate pair is no text
        ids = clip_encoding().encode(text, add_special_tokens=False).ids
        return [compact for index in ids for compact in self._spell(index)] if self.kept else ids

    def encode(self, texts: list[str]) -> Tokens:
        """Texts as ids; what does not fit is cut, with the end of text kept.

        Texts longer than 10,000 characters are cut to that length first.
        """
        start, end = (self.vocab_size - 2, self.vocab_size - 1) if self.kept else (49406, 49407)
        ids = np.zeros((len(texts), self.context_length), np.int32)
        mask = np.zeros(ids.shape, bool)
        cut = np.zeros(len(texts), bool)
        for row, text in enumerate(texts):
            pieces = self.pieces(text[:10_000])
            room = self.context_length - 2
            cut[row] = len(pieces) > room or len(text) > 10_000
            line = [start, *pieces[:room], end]
            ids[row, : len(line)] = line
            mask[row, : len(line)] = True
        return Tokens(ids, mask, cut)


@cache
def _compact(kept: tuple[int, ...]) -> dict[int, int]:
    return {index: position + 1 for position, index in enumerate(kept)}


def kept_ids(texts: list[str]) -> tuple[int, ...]:
    """The CLIP ids that these texts use, together with the byte ids."""
    used = {index for text in texts for index in clip_encoding().encode(text, add_special_tokens=False).ids}
    return tuple(sorted(used | set(range(BYTES))))
