"""A published CLIP's tokenizer: transformers' CLIPTokenizerFast from the files of its repository."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unclip_jax.checkpoint.schema import CheckpointError
from unclip_jax.config import ClipConfig
from unclip_jax.data.tokenizer import BYTES, END, START, ClipTokenizer, Tokens, clip_encoding, clip_vocabulary

FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")  # beside the words and merges
WORDS = ("tokenizer.json", "vocab.json", "merges.txt")
LONGEST = 10_000  # characters of a text that are read, as ClipTokenizer does


@dataclass(frozen=True)
class HubTokenizer:
    """Texts to padded ids, as ClipTokenizer, but by the repository's own words, special tokens and padding.

    hub: transformers' tokenizer. folder: where its files lie. Karlo's pads with "!", which makes every exclamation mark
    of a prompt the id 0 there, unmasked.
    """

    hub: Any
    folder: Path
    context_length: int = 77

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return len(self.hub)

    def encode(self, texts: list[str]) -> Tokens:
        """Texts as ids; what does not fit is cut, with the end of text kept.

        Texts longer than 10,000 characters are cut to that length first.
        """
        shape = (len(texts), self.context_length)
        ids, lengths = np.full(shape, self.hub.pad_token_id, np.int32), np.zeros(len(texts), np.int64)
        cut = np.zeros(len(texts), bool)
        for row, text in enumerate(texts):
            whole = text[:LONGEST].encode("utf-8", "replace").decode()  # half a surrogate pair is no text
            line = self.hub(whole, verbose=False)["input_ids"]
            cut[row] = len(line) > self.context_length or len(text) > LONGEST
            line = [*line[: self.context_length - 1], line[-1]] if len(line) > self.context_length else line
            ids[row, : len(line)], lengths[row] = line, len(line)
        return Tokens(ids, np.arange(self.context_length) < lengths[:, None], cut)


def load_tokenizer(folder: str | Path, config: ClipConfig) -> HubTokenizer:
    """The tokenizer of a repository's folder: tokenizer.json, or vocab.json and merges.txt, and the files beside them.

    CheckpointError where they are missing or damaged, or are not those of a CLIP of this config, and where
    transformers is not installed. Nothing is fetched.
    """
    try:
        from transformers import CLIPTokenizerFast  # type: ignore[attr-defined]
    except ImportError as error:
        raise CheckpointError(
            "a published CLIP's tokenizer needs the package transformers: pip install transformers"
        ) from error
    folder = Path(folder)
    # With a file missing, transformers goes on with a vocabulary of three words, or one without merges.
    if not (folder / "tokenizer.json").is_file():
        for name in WORDS[1:]:
            if not (folder / name).is_file():
                raise CheckpointError(f"'{folder}' lacks {name}, which its tokenizer needs: fetch the folder again")
    try:
        hub = CLIPTokenizerFast.from_pretrained(str(folder), local_files_only=True)
        merges = json.loads(hub.backend_tokenizer.to_str())["model"]["merges"]
        words = hub.backend_tokenizer.get_vocab_size(with_added_tokens=False)
        ends = hub("")["input_ids"]
    except Exception as error:  # damaged files raise whatever they meet first in a parser
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"the tokenizer in '{folder}' cannot be read ({reason}): fetch it again") from error
    if len(hub) != config.vocab_size:
        raise CheckpointError(
            f"the tokenizer in '{folder}' has {len(hub)} ids and the CLIP {config.vocab_size}: they are no pair"
        )
    if len(merges) < words - BYTES - 2:
        raise CheckpointError(
            f"the tokenizer in '{folder}' has {words} words but only {len(merges)} merges: fetch its files again"
        )
    end = config.vocab_size - 1 if config.eos_id is None else config.eos_id
    if ends != [end - 1, end] or hub.pad_token_id is None:
        raise CheckpointError(
            f"the tokenizer in '{folder}' writes the empty text as {ends} and pads with {hub.pad_token_id}, where its "
            f"CLIP starts with {end - 1} and ends with {end}: it belongs to another CLIP"
        )
    return HubTokenizer(hub, folder, config.context_length)


def save_tokenizer(tokenizer: ClipTokenizer | HubTokenizer, out: str | Path) -> None:
    """Writes the files from which transformers builds this tokenizer.

    One of our own has to keep all of CLIP's ids, else CheckpointError. It pads with the end of text there, which no
    result depends on: padding with the id 0 would turn every "!" into padding.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    if isinstance(tokenizer, HubTokenizer):
        for name in (*WORDS, *FILES):
            if (tokenizer.folder / name).is_file():
                shutil.copyfile(tokenizer.folder / name, out / name)
        return
    if tokenizer.kept:
        raise CheckpointError(
            f"transformers' CLIPTokenizer cannot be a vocabulary cut to {tokenizer.vocab_size} ids: export without it"
        )
    merges = json.loads(clip_encoding().to_str())["model"]["merges"]
    lines = ["#version: 0.2", *(pair if isinstance(pair, str) else " ".join(pair) for pair in merges)]
    (out / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (out / "vocab.json").write_text(json.dumps(clip_vocabulary(), ensure_ascii=False), encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": tokenizer.context_length, **special}
    (out / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
