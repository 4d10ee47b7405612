"""The classes of all training samples before the first step: for sampling by class, and for class frequencies.

    shards ─ read_labels ─> class of each sample ─┬─ sampling_weights ─> how often an epoch holds each sample
                                                  └─ count_classes ────> samples of each class in an epoch

The labels of a shard are read once, and cached by the shard's content.

Shape suffixes: N samples of a shard or of all shards, C classes.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from clipdistill.data.index import ShardIndex
from clipdistill.data.sample import Decoder, SampleReader
from clipdistill.data.shard_format import SHARD_UNREADABLE, BadSampleError
from clipdistill.errors import InputError
from clipdistill.io.caches import LABELS, mark_used
from clipdistill.io.files import why, write_text
from clipdistill.io.paths import expand
from clipdistill.io.urls import shown

log = logging.getLogger(__name__)

Sampling = Literal["square_root", "class"]
"""How often an epoch holds the samples of a class of n samples: in proportion to the square root of n, or as often as
those of any other class (Kang et al. 2020, Decoupling representation and classifier, arXiv 1910.09217)."""

_POWERS: dict[Sampling, float] = {"square_root": 0.5, "class": 0.0}
_FORMAT = 1
_THREADS = 8

Labels = NDArray[np.int64]


def read_labels(index: Sequence[ShardIndex], decoder: Decoder, *, cache_dir: str | Path | None) -> list[Labels]:
    """The class of each sample of each shard (N,); -1 for one without a label that can be read.

    Args:
        index: the shards; each rank may read a slice of them.
        decoder: of the run; reads the labels.
        cache_dir: folder for the labels of shards; None: no cache.

    Raises:
        InputError: a label outside the class list, or a shard that cannot be read.
    """
    urls = [shard.url for shard in index]
    digests = [""] * len(urls) if decoder.class_lists is None else decoder.class_lists.digests(urls)
    with ThreadPoolExecutor(max_workers=_THREADS) as pool:
        labels = list(pool.map(lambda shard, classes: _labels_of(shard, classes, decoder, cache_dir), index, digests))
    missing = sum(int((label_N < 0).sum()) for label_N in labels)
    if missing:
        log.warning("data.shards: %d of %d samples have no label", missing, sum(map(len, labels)))
    return labels


def sampling_weights(labels: Sequence[Labels], sampling: Sampling) -> NDArray[np.float64]:
    """How often an epoch holds each sample of all shards (N,), on average; the sum is N.

    A sample without a label has weight 1.
    """
    label_N = np.concatenate([*labels, np.zeros(0, np.int64)])
    weight_N = np.ones(len(label_N))
    known_N = label_N >= 0
    if known_N.any():
        _, class_N, count_C = np.unique(label_N[known_N], return_inverse=True, return_counts=True)
        known_weight_N = (count_C.astype(np.float64) ** (_POWERS[sampling] - 1))[class_N]
        weight_N[known_N] = known_weight_N * len(class_N) / known_weight_N.sum()
    return weight_N


def count_classes(labels: Sequence[Labels], classes: int, *, weights: NDArray[np.float64] | None = None) -> list[float]:
    """How many samples of each class an epoch holds, with the weights of its samples (`sampling_weights`), if any."""
    label_N = np.concatenate([*labels, np.zeros(0, np.int64)])
    known_N = label_N >= 0
    weight_N = None if weights is None else weights[known_N]
    count_C: list[float] = np.bincount(label_N[known_N], weights=weight_N, minlength=classes).tolist()
    return count_C


def _labels_of(shard: ShardIndex, classes: str, decoder: Decoder, cache_dir: str | Path | None) -> Labels:
    """The labels of a shard, from the cache or the shard."""
    key = hashlib.sha256(json.dumps([_FORMAT, shard.content, decoder.label_key, classes]).encode()).hexdigest()[:32]
    cached = None if cache_dir is None else expand(cache_dir) / LABELS / f"{key}.json"
    if cached is not None and (known := _load(cached, len(shard))) is not None:
        mark_used(cached)
        return known
    reader = SampleReader([shard], decoder.wanted)
    try:
        labels = [_label_of(reader, sample, decoder) for sample in range(len(shard))]
    finally:
        reader.close()
    if cached is not None:
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            write_text(cached, json.dumps({"labels": labels, "sha256": _digest_of(labels)}))
        except OSError as error:  # the labels are read again at the next start
            log.warning("the labels of shard %s are not cached: %s", shown(shard.url), why(error))
    return np.array(labels, np.int64)


def _label_of(reader: SampleReader, sample: int, decoder: Decoder) -> int:
    raw = reader.read(0, sample)
    try:
        return decoder.label(raw)
    except BadSampleError as bad:
        if bad.reason == SHARD_UNREADABLE:  # perhaps only temporarily
            raise InputError(
                f"data.shards: {shown(raw.url)}: labels cannot be read: {bad.detail}; allowed: readable shards, as all "
                "labels are needed before the first step"
            ) from bad
        return -1


def _load(path: Path, samples: int) -> Labels | None:
    """The labels in a cache file; None if it is missing or damaged."""
    try:
        saved: Any = json.loads(path.read_text(encoding="utf-8"))
        if saved["sha256"] != _digest_of(saved["labels"]) or len(saved["labels"]) != samples:
            raise ValueError
        return np.array(saved["labels"], np.int64)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        log.warning("labels %s are damaged: they are read again", path)
        return None


def _digest_of(labels: Sequence[int]) -> str:
    return hashlib.sha256(json.dumps(list(labels)).encode()).hexdigest()
