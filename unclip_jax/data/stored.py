"""Embeddings that `unclip data embed` stored, joined with the source that they were made of."""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from unclip_jax.data.embeddings import Embeddings, EmbeddingsError, open_embeddings
from unclip_jax.data.listing import digest_of
from unclip_jax.data.records import Broken, DataError, Record, Source, open_source


class StoredSource:
    """Row i is the record i of the embedded source, with its embedding.

    place: the folder. pictures: the spec of the source, where it has moved since; it has to hold the same records.
    """

    def __init__(self, name: str, place: str, pictures: str = "", cache: Path | None = None) -> None:
        self.name, self.folder = name, Path(place).expanduser().absolute()
        self.source: Source = open_source(pictures or self._embeddings.about.source, cache=cache)
        about = self._embeddings.about
        if len(self.source) != about.rows or (self.source.digest != about.digest and not pictures):
            raise DataError(
                f"'{about.source}' has changed since '{place}' was made of it ({about.rows:,} records then, "
                f"{len(self.source):,} now): run unclip data embed again into a new folder"
            )
        some = (
            np.unique(np.linspace(0, about.rows - 1, 1000).astype(int)) if pictures and about.rows else np.zeros(0, int)
        )
        if [self.source.key(int(row)) for row in some] != self._embeddings.keys(some):
            raise DataError(f"'{pictures}' does not hold the records that '{place}' was made of")
        self.problems = self.source.problems
        self.digest = digest_of("stored", about.digest, about.clip, self.source.digest)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_embeddings"}

    @cached_property
    def _embeddings(self) -> Embeddings:
        try:
            return open_embeddings(self.folder)
        except EmbeddingsError as error:
            raise DataError(str(error)) from error

    @property
    def clip(self) -> str:
        """The digest of the CLIP that the embeddings are of."""
        return self._embeddings.about.clip

    def __len__(self) -> int:
        return self._embeddings.about.rows

    def key(self, index: int) -> str:
        """The key of a record in its source."""
        return self.source.key(index)

    def __getitem__(self, index: int) -> Record:
        rows = np.asarray([index])
        if not self._embeddings.rows("valid", rows)[0]:
            raise Broken(f"'{self.key(index)}' was broken when it was embedded")
        return self.source[index]._replace(embedding=self._embeddings.rows("image", rows)[0].astype(np.float32))
