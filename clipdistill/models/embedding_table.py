"""Embeddings that were computed elsewhere, as a teacher without a model: the teacher cache is filled from them.

``embeddings:FOLDER`` holds

    image.npy       (N, D)     features of the images, any floating type; they need not have unit norm
    keys.txt        N lines    key of each row's sample; SHARD/KEY where shards share keys (SHARD without .tar)
    captions.npy    (N, D)     features of the samples' captions, for terms over captions
    classes.npy     (C, D)     class embeddings, for terms over prompts
    classnames.txt  C lines    the classes' names

or, in the place of the first three, ``*.parquet`` with columns ``key``, ``image`` and, perhaps, ``caption``.

Shapes: N rows, D features, C classes.
"""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clipdistill.errors import InputError
from clipdistill.io.paths import expand, read_text
from clipdistill.io.urls import one_line
from clipdistill.models.adapted import AdaptedModel
from clipdistill.models.prompts import PromptSet

EMBEDDINGS = "embeddings:"

_ROWS_AT_ONCE = 65536


class EmbeddingTable(AdaptedModel):
    """A teacher whose features are looked up by the samples' keys.

    Args:
        model: ``embeddings:FOLDER``.
        logit_scale: multiplier of the cosine similarities.

    Raises:
        InputError: a file is missing or damaged; counts, widths or keys do not fit together; features that are not
            finite, or zero.
    """

    def __init__(self, model: str, *, logit_scale: float | None) -> None:
        if logit_scale is None:
            raise InputError(f"teachers.logit_scale: None for {model}; allowed: a number, as embeddings state none")
        self._folder = expand(model.removeprefix(EMBEDDINGS))
        keys, self._image_ND, self._captions_ND = self._read()
        source = _Source(logit_scale, width=self._image_ND.shape[1])
        super().__init__(model, source, logit_scale=logit_scale)
        self._shard_of: dict[int | None, str] = {}
        self._row = {key: row for row, key in enumerate(keys)}
        if len(self._row) < len(keys):
            twice = next(key for row, key in enumerate(keys) if self._row[key] != row)
            raise InputError(f"model {model}: key {twice!r} more than once; allowed: different keys, such as SHARD/KEY")

    def look_up(self, shard: str, keys: Sequence[str], *, owner: str, captions: bool) -> Tensor:
        """Unit-norm features (N, D), float32, of samples of a shard.

        Args:
            shard: name of the shard, without .tar.
            keys: of the samples.
            owner: digest of the shard's content: a row belongs to one shard.
            captions: those of the captions.

        Raises:
            InputError: a sample has no row.
        """
        table_ND = self._captions_ND if captions else self._image_ND
        if table_ND is None:
            raise InputError(f"model {self.name}: no features of captions; allowed: captions.npy, or a column caption")
        rows = [self._row.get(f"{shard}/{key}", self._row.get(key)) for key in keys]
        missing = [key for key, row in zip(keys, rows, strict=True) if row is None]
        if missing:
            raise InputError(
                f"model {self.name}: no row for {len(missing)} of {len(keys)} samples of shard {shard}, such as "
                f"{missing[0]!r}; allowed: a row for each sample"
            )
        for row, key in zip(rows, keys, strict=True):
            if self._shard_of.setdefault(row, owner) != owner:
                raise InputError(
                    f"model {self.name}: the row of key {key!r} stands for samples of two shards, one of them {shard}; "
                    "allowed: keys SHARD/KEY, and shards of different names"
                )
        found = torch.from_numpy(np.asarray(table_ND[np.array(rows, dtype=np.int64)], dtype=np.float32))
        return F.normalize(found, dim=-1)

    def stored_class_embeddings(self, prompts: PromptSet) -> Tensor:
        """The class embeddings (C, D) in the folder, unit norm, by the classes' names.

        Raises:
            InputError: a class has none.
        """
        names = read_text(self._folder / "classnames.txt", what=f"model {self.name}").splitlines()
        classes_CD = self._read_features(self._folder / "classes.npy", rows=len(names), width=self.embed_dim)
        row = {name: number for number, name in enumerate(names)}
        missing = [name for name in prompts.classnames if name not in row]
        if missing or len(row) < len(names):
            what = f"no class {missing[0]!r}" if missing else "a name more than once"
            raise InputError(
                f"model {self.name}: classnames.txt has {what}; allowed: the names of prompts {prompts.name}"
            )
        found = np.asarray(classes_CD[[row[name] for name in prompts.classnames]], dtype=np.float32)
        return F.normalize(torch.from_numpy(found), dim=-1)

    def _probe(self) -> int:
        return int(self._image_ND.shape[1])

    def _fingerprint(self, settings: Any) -> str:
        return hashlib.sha256(f"{settings}/{self._content}".encode()).hexdigest()

    @cached_property
    def _content(self) -> str:
        """sha256 of the files."""
        digest = hashlib.sha256()
        for file in sorted(path for path in self._folder.iterdir() if path.is_file()):
            with file.open("rb") as content:
                digest.update(f"{file.name}:{hashlib.file_digest(content, 'sha256').hexdigest()};".encode())
        return digest.hexdigest()

    def _read(self) -> tuple[list[str], Any, Any]:
        """Keys, features of the images, and of the captions or None."""
        folder = self._folder
        parquets = sorted(folder.glob("*.parquet"))
        if parquets:
            return self._read_parquets(parquets)
        for name in ("image.npy", "keys.txt"):
            if not (folder / name).is_file():
                raise InputError(
                    f"model {EMBEDDINGS}{folder}: no {name} in it; allowed: image.npy and keys.txt, or *.parquet"
                )
        keys = read_text(folder / "keys.txt", what="keys", most=1 << 33).splitlines()
        image_ND = self._read_features(folder / "image.npy", rows=len(keys))
        captions_ND = None
        if (folder / "captions.npy").is_file():
            captions_ND = self._read_features(folder / "captions.npy", rows=len(keys), width=image_ND.shape[1])
        return keys, image_ND, captions_ND

    def _read_parquets(self, files: Sequence[Path]) -> tuple[list[str], Any, Any]:
        import pyarrow  # type: ignore[import-untyped]
        import pyarrow.compute  # type: ignore[import-untyped]
        import pyarrow.parquet  # type: ignore[import-untyped]

        keys: list[str] = []
        columns: dict[str, list[Any]] = {"image": [], "caption": []}
        for file in files:
            try:
                table = pyarrow.parquet.read_table(file)
                keys += map(str, table["key"].to_pylist())
                for name in ("image", "caption") if "caption" in table.column_names else ("image",):
                    flat = table[name].combine_chunks()
                    lengths = pyarrow.compute.unique(pyarrow.compute.list_value_length(flat))
                    if flat.null_count or table["key"].null_count or len(lengths) > 1:
                        raise ValueError(f"column {name} has empty rows, or rows of several lengths")
                    values = np.asarray(flat.flatten(), dtype=np.float32).reshape(len(table), -1)
                    columns[name].append(self._checked(values, file, rows=len(table)))
            except (OSError, KeyError, ValueError, AttributeError, pyarrow.ArrowException) as error:
                raise InputError(
                    f"embeddings {file}: cannot be read: {one_line(error)[:300]}; allowed: key, image"
                ) from error
        widths = {part.shape[1] for parts in columns.values() for part in parts}
        if len(widths) != 1 or len(columns["caption"]) not in (0, len(files)):
            raise InputError(
                f"embeddings {self._folder}: widths {sorted(widths)}; allowed: one, and captions in all files"
            )
        image_ND, captions_ND = (np.concatenate(parts) if parts else None for parts in columns.values())
        return keys, image_ND, captions_ND

    def _read_features(self, file: Path, *, rows: int, width: int | None = None) -> Any:
        try:
            features_ND = np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise InputError(f"embeddings {file}: cannot be read: {one_line(error)[:300]}; allowed: .npy") from error
        return self._checked(features_ND, file, rows=rows, width=width)

    def _checked(self, features_ND: Any, file: Path, *, rows: int, width: int | None = None) -> Any:
        shape = tuple(features_ND.shape)
        wanted = f"({rows}, {width or 'D'}), numbers with a point"
        if len(shape) != 2 or len(features_ND) != rows or shape[1] < 1 or (width is not None and shape[1] != width):
            raise InputError(f"embeddings {file}: shape {shape}; allowed: {wanted}")
        if not np.issubdtype(features_ND.dtype, np.floating):
            raise InputError(f"embeddings {file}: {features_ND.dtype}; allowed: {wanted}")
        for start in range(0, rows, _ROWS_AT_ONCE):
            norms = np.linalg.norm(np.asarray(features_ND[start : start + _ROWS_AT_ONCE], dtype=np.float32), axis=1)
            bad = ~np.isfinite(norms) | (norms == 0)
            if bad.any():
                raise InputError(
                    f"embeddings {file}: row {start + int(bad.argmax())} is zero or not finite; allowed: others"
                )
        return features_ND


class _Source:
    """What an adapted model needs of a model; it encodes nothing."""

    image_size = 1
    fingerprint = "embeddings"

    def __init__(self, logit_scale: float, *, width: int) -> None:
        self.logit_scale = logit_scale
        self._width = width

    def tokenizer(self, texts: Sequence[str]) -> Tensor:
        """No tokens."""
        return torch.zeros(len(texts), 0, dtype=torch.long)

    def encode_image(self, image_BCHW: Tensor) -> NoReturn:  # noqa: ARG002
        """Refuse."""
        raise InputError(
            "teachers.model: embeddings: there is no model that encodes; allowed: terms from the teacher cache"
        )

    encode_text = encode_image
