"""Whether test images are among those of training or validation, by content: the bytes of the encoded images."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence

from clipdistill.data import ShardIndex
from clipdistill.data.sample import IMAGE_EXTENSIONS, BadSampleError, SampleReader, find_image
from clipdistill.errors import InputError
from clipdistill.evaluation import EvaluationSet
from clipdistill.io.urls import shown

_NAMED = 3


def check_no_overlap(
    test: Sequence[EvaluationSet], *, training: Sequence[ShardIndex], validation: Sequence[EvaluationSet]
) -> None:
    """Compare all images of the test sets with all others.

    Args:
        test: the test sets.
        training: the training shards.
        validation: the sets by which trials are chosen.

    Raises:
        InputError: a test image is also one of training or validation; the message counts them, and names some.
    """
    tested: dict[bytes, str] = {}
    for digest, place in _of_sets(test):
        tested.setdefault(digest, place)
    for what, images in (("validation", _of_sets(validation)), ("training", _of_shards(training))):
        shared = {place: tested[digest] for digest, place in images if digest in tested}
        if shared:
            examples = "; ".join(f"{there} is {here}" for here, there in list(shared.items())[:_NAMED])
            raise InputError(
                f"test: {len(set(shared.values()))} of {len(tested)} images are also {what} images ({examples}); "
                "allowed: test sets that no training and no choice has seen"
            )


def _of_sets(sets: Iterable[EvaluationSet]) -> Iterator[tuple[bytes, str]]:
    for data in sets:
        for sample in data.samples():
            yield _digest(sample.data), f"{data.name}: {sample.where}"


def _of_shards(index: Sequence[ShardIndex]) -> Iterator[tuple[bytes, str]]:
    reader = SampleReader(index, frozenset(IMAGE_EXTENSIONS))
    try:
        for number, shard in enumerate(index):
            for sample in range(len(shard)):
                raw = reader.read(number, sample)
                try:
                    if raw.fault is None:
                        yield _digest(find_image(raw)), f"{raw.key} in {shown(raw.url)}"
                except BadSampleError:
                    continue
    finally:
        reader.close()


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
