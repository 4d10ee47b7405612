"""Streams from flat settings, as tests vary them one by one."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from clipdistill.data import Augmentation, ImageTextStream, ShardIndex
from clipdistill.data.reading import Views
from clipdistill.data.sample import Decoder

DECODER_FIELDS = {field.name for field in fields(Decoder)}


def make_stream(index: Sequence[ShardIndex], **settings: Any) -> ImageTextStream:
    """A stream whose settings are those of the decoder, of the stream, and ``views`` with ``view_seed``."""
    decoder = {name: settings.pop(name) for name in DECODER_FIELDS & settings.keys()}
    views = Views(settings.pop("views", 0), settings.pop("view_seed", settings.get("seed", 0)))
    return ImageTextStream(index, Decoder(**{"augmentation": Augmentation()} | decoder), views=views, **settings)
