"""A labelled test set and its samples, independent of the storage."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from PIL import Image

from clipdistill.distributed.collectives import rank, world_size
from clipdistill.errors import InputError
from clipdistill.evaluation.ranks import on_all_ranks
from clipdistill.io.images import STANDARD_DECODING, DecodingSettings
from clipdistill.io.urls import one_line
from clipdistill.models.class_matching import match_through
from clipdistill.models.prompts import PromptSet
from clipdistill.shards.writing import DEFAULT_TEMPLATES

Kind = Literal["classification", "multilabel", "retrieval"]
"""Annotations of a set's images: one class, any number of classes, or captions."""


_BLOCK = 1024
"""Samples of one digest: ranks share a set's identity in blocks."""


class UnreadableImageError(InputError):
    """An image that cannot be decoded; the message names its sample."""


@dataclass(frozen=True, kw_only=True)
class EncodedSample:
    """A sample of a test set, its image still encoded.

    Attributes:
        key: of the sample.
        where: shard and key, file or row, for messages.
        data: the encoded image.
        label: its class; -1 in sets of other kinds.
        classes: class indices, in a multi-label set.
        captions: in a retrieval set.
        decoding: of its image.
    """

    key: str
    where: str
    data: bytes
    label: int = -1
    classes: tuple[int, ...] = ()
    captions: tuple[str, ...] = ()
    decoding: DecodingSettings = STANDARD_DECODING

    def image(self) -> Image.Image:
        """The image in RGB; see `decode`."""
        return self.decode()[0]

    def decode(self) -> tuple[Image.Image, bool]:
        """Decode the image to RGB; returns it, and whether the other way of decoding gives other pixels.

        Raises:
            UnreadableImageError: it cannot be decoded.
        """
        try:
            return self.decoding.decode(self.data)
        except Exception as error:  # Pillow's decoders raise many types
            reason = "not an image" if "cannot identify" in str(error) else one_line(error)
            raise UnreadableImageError(f"{self.where}: unreadable image: {reason}") from error


class Reader(Protocol):
    """Samples numbered from 0; any range can be read in order, so that ranks can split a set."""

    def __len__(self) -> int: ...

    def read(self, positions: range) -> Iterator[EncodedSample]:
        """The samples of a range.

        Raises:
            InputError: a sample without image or annotation, or with an invalid annotation.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class EvaluationSet:
    """A test set; identical on every rank.

    Attributes:
        name: of its folder or Hub repository.
        kind: of its annotations.
        prompts: class names and templates; empty for retrieval.
        reader: its samples.
        decoding: of its images.
        class_counts: training samples of each class of the prompts; None if they are not known.
    """

    name: str
    kind: Kind
    prompts: PromptSet
    reader: Reader
    decoding: DecodingSettings = STANDARD_DECODING
    class_counts: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.reader)

    def samples(self, positions: range | None = None) -> Iterator[EncodedSample]:
        """All samples in order, or those of a range.

        Raises:
            InputError: as ``Reader.read``, or a label outside the class list.
        """
        for sample in self.reader.read(range(len(self)) if positions is None else positions):
            for label in (sample.label,) if self.kind == "classification" else sample.classes:
                if not 0 <= label < self.prompts.num_classes:
                    raise InputError(
                        f"{sample.where}: label {label}; allowed: 0 to {self.prompts.num_classes - 1} "
                        f"(there are {self.prompts.num_classes} class names)"
                    )
            yield replace(sample, decoding=self.decoding)

    def identity(self, progress: Callable[[int], None] | None = None) -> str:
        """Digest of every byte of the samples, their decoding, class names and templates, and the numbers of training
        samples, if known; the same wherever the set is.

        Every rank calls this, and reads its share; ``progress`` is called with the number of samples it has read.

        Raises:
            InputError: on every rank: as ``samples``.
        """
        blocks = [range(at, min(at + _BLOCK, len(self))) for at in range(0, len(self), _BLOCK)]
        first, last = (number * len(blocks) // world_size() for number in (rank(), rank() + 1))

        def read_share() -> list[str]:
            digests = []
            for block in blocks[first:last]:
                digests.append(_digest_of(self.samples(block)))
                if progress is not None:
                    progress(block.stop - blocks[first].start)
            return digests

        content = [each for share in on_all_ranks(read_share) for each in share]
        decoding = [self.decoding.decoding, self.decoding.max_pixels]
        counts = [] if self.class_counts is None else [self.class_counts]
        return digest([self.kind, self.prompts.classnames, self.prompts.templates, content, decoding, *counts])


def _digest_of(samples: Iterator[EncodedSample]) -> str:
    found = hashlib.blake2b(digest_size=16)
    for each in samples:
        found.update(json.dumps([each.key, each.label, each.classes, each.captions, len(each.data)]).encode())
        found.update(each.data)
    return found.hexdigest()


def digest(value: Any) -> str:
    """sha256 of a JSON-serialisable value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def name_classes(
    data: str,
    names: Sequence[str],
    prompts: PromptSet | None,
    *,
    own: PromptSet | None = None,
    by_order: bool = False,
) -> tuple[PromptSet, tuple[int, ...]]:
    """The prompt set of a data set, and the index in it of each class; see `match_through`.

    Args:
        data: name of the set.
        names: of its classes, in order.
        prompts: chosen by the user; None: the set's own list, or the names themselves, in the default template.
        own: the set's own class list and templates.
        by_order: match the classes by their order in place of their names.

    Raises:
        InputError: a name is not among the classes.
    """
    used = prompts or own or PromptSet(name=data, classnames=tuple(names), templates=DEFAULT_TEMPLATES)
    indices = match_through(
        names,
        own.classnames if own else None,
        prompts.classnames if prompts else None,
        of=f"data {data}",
        to=f"prompts {used.name}",
        by_order=by_order,
    )
    return used, indices
