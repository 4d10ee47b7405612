"""A labelled test set and its samples, whatever they lie in."""

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from PIL import Image

from clipdistill.errors import InputError
from clipdistill.io.urls import one_line
from clipdistill.models.prompts import PromptSet
from clipdistill.shards.sources import READABLE_FORMATS
from clipdistill.shards.writing import DEFAULT_TEMPLATES

Kind = Literal["classification", "multilabel", "retrieval"]
"""What the samples of a set say of their images: a class, any number of classes, or captions."""


class UnreadableImageError(InputError):
    """An image that cannot be decoded; the message names its sample."""


@dataclass(frozen=True, kw_only=True)
class EncodedSample:
    """A sample of a test set, its image as it lies on the disk.

    Attributes:
        key: of the sample.
        where: shard and key, or file, or row: for messages.
        data: the encoded image.
        label: its class; -1 in sets of other kinds.
        classes: what a multi-label set says that it shows.
        captions: of a retrieval set.
    """

    key: str
    where: str
    data: bytes
    label: int = -1
    classes: tuple[int, ...] = ()
    captions: tuple[str, ...] = ()

    def image(self) -> Image.Image:
        """The decoded image, in RGB before any resizing, as CLIP_benchmark's reader has it.

        Raises:
            UnreadableImageError: it cannot be decoded.
        """
        try:
            return Image.open(io.BytesIO(self.data), formats=READABLE_FORMATS).convert("RGB")
        except Exception as error:  # Pillow's decoders raise many kinds
            reason = "not an image" if "cannot identify" in str(error) else one_line(error)
            raise UnreadableImageError(f"{self.where}: unreadable image: {reason}") from error


class Reader(Protocol):
    """Samples numbered from 0, any run of which can be read in order, so that ranks can share them out."""

    def __len__(self) -> int: ...

    def read(self, positions: range) -> Iterator[EncodedSample]:
        """The samples of a range.

        Raises:
            InputError: one without image or annotation, or with one that cannot be understood.
        """
        ...

    def identity(self) -> str:
        """Digest that is another one when the samples are others."""
        ...


@dataclass(frozen=True, kw_only=True)
class EvaluationSet:
    """A test set; alike on every rank.

    Attributes:
        name: of its folder, or on the Hub.
        kind: of its annotations.
        prompts: class names and templates; empty for retrieval.
        reader: its samples.
    """

    name: str
    kind: Kind
    prompts: PromptSet
    reader: Reader

    def __len__(self) -> int:
        return len(self.reader)

    def samples(self, positions: range | None = None) -> Iterator[EncodedSample]:
        """All samples in order, or those of a range, images still encoded.

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
            yield sample

    def identity(self) -> str:
        """Digest that is another one when samples, class names or templates are others."""
        return digest([self.kind, self.prompts.classnames, self.prompts.templates, self.reader.identity()])


def digest(value: Any) -> str:
    """sha256 of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def name_classes(data: str, names: Sequence[str], prompts: PromptSet | None) -> tuple[PromptSet, dict[str, int]]:
    """The prompt set of a set whose classes have names of their own, and the number of each name in it.

    Args:
        data: name of the set.
        names: of its classes, in their order.
        prompts: asked for by the user. Its own numbers count where it has all the names; else the classes keep their
            order, as the folders of ImageNet do, whose names are no words. None: the names, in one plain template.

    Raises:
        InputError: ``prompts`` has neither these names nor as many.
    """
    in_order = {name: number for number, name in enumerate(names)}
    if prompts is None:
        return PromptSet(name=data, classnames=tuple(names), templates=DEFAULT_TEMPLATES), in_order
    unknown = next((name for name in names if name not in prompts.classnames), None)
    if unknown is None:
        return prompts, {name: prompts.classnames.index(name) for name in names}
    if len(names) != prompts.num_classes:
        raise InputError(
            f"data {data}: {len(names)} classes, among them {unknown!r}; allowed with prompts {prompts.name}: "
            f"its names, or as many classes as it has ({prompts.num_classes})"
        )
    return prompts, in_order
