"""Encode the images and captions of a set with a tower, distributed over the ranks.

Shapes: B images of a batch, N samples, M captions, C classes, D features.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor

from clipdistill.distributed.collectives import rank, world_size
from clipdistill.errors import InputError
from clipdistill.evaluation.ranks import on_all_ranks
from clipdistill.evaluation.sets.samples import EncodedSample, EvaluationSet, Kind, UnreadableImageError
from clipdistill.io.machine import cores_per_process
from clipdistill.models.class_embeddings import class_embeddings
from clipdistill.models.prompts import PromptSet
from clipdistill.models.towers import Tower

log = logging.getLogger(__name__)

_BATCHES_AHEAD = 2
"""Batches decoded ahead of the tower."""


@dataclass(frozen=True, kw_only=True)
class SetFeatures:
    """Features of a whole set; on the CPU, identical on every rank.

    Attributes:
        kind: of the set.
        image_ND: unit-norm image features, float32; zeros for unreadable images.
        readable_N: whether the image could be decoded.
        unreadable: one line for each unreadable image, with its sample.
        text_MD: unit-norm caption features, float32; no rows in sets of other kinds.
        owner_M: index of each caption's sample.
        keys: of the samples.
        labels_N: class indices; -1 in sets of other kinds.
        classes: class indices of each sample of a multi-label set.
        ambiguous: number of images that the other way of decoding (`DecodingSettings`) makes others of.
    """

    kind: Kind
    image_ND: Tensor
    readable_N: Tensor
    unreadable: tuple[str, ...]
    text_MD: Tensor
    owner_M: Tensor
    keys: tuple[str, ...]
    labels_N: Tensor
    classes: tuple[tuple[int, ...], ...]
    ambiguous: int


@torch.no_grad()
def encode_set(
    tower: Tower,
    data: EvaluationSet,
    *,
    batch_size: int = 256,
    workers: int = 0,
    device: torch.device | str = "cpu",
    alone: bool = False,
    progress: Callable[[int], None] | None = None,
) -> SetFeatures:
    """Encode a set with a tower and open_clip's own evaluation transform; with several ranks, all call this together.

    Ranks take whole batches, composed as on a single rank: the features do not depend on the number of ranks.

    Args:
        tower: the model; its mode is restored afterwards.
        data: the set.
        batch_size: images at once.
        workers: threads that decode and resize; 0: one per core.
        device: where the tower is.
        alone: encode the whole set on this rank, without collective calls.
        progress: called with the number of samples this rank has encoded.

    Raises:
        InputError: on every rank: no sample, a bad sample, no readable image, or features that are not finite.
    """
    if not len(data):
        raise InputError(f"data {data.name}: no sample; allowed: one or more")
    count = -(-len(data) // batch_size)
    number, ranks = (0, 1) if alone else (rank(), world_size())
    first, last = number * count // ranks, (number + 1) * count // ranks
    share = range(first * batch_size, min(last * batch_size, len(data)))

    def encode() -> list[_Batch]:
        return list(_encode(tower, data, share, batch_size, workers, torch.device(device), progress))

    was_training = tower.training
    tower.eval()
    try:
        shares = [encode()] if alone else on_all_ranks(encode)
    finally:
        tower.train(was_training)
    features = _concatenate(data.kind, [batch for batches in shares for batch in batches])
    if not features.readable_N.any():
        raise InputError(f"data {data.name}: no image of {len(data)} can be read; first {features.unreadable[0]}")
    if features.unreadable and number == 0:
        log.warning(
            "data %s: %d of its %d images cannot be read, and count as wrong; first %s",
            data.name,
            len(features.unreadable),
            len(data),
            features.unreadable[0],
        )
    if features.ambiguous and number == 0:
        log.warning(
            "data %s: %d of its %d images (turned by EXIF, transparent, or of more than 8 bits) differ between the "
            "decodings standard and clip-benchmark: its figures depend on --decoding, which is %s",
            data.name,
            features.ambiguous,
            len(data),
            data.decoding.decoding,
        )
    _check_finite(tower, f"images of {data.name}", features.image_ND, features.keys)
    _check_finite(tower, f"captions of {data.name}", features.text_MD, [features.keys[n] for n in features.owner_M])
    return features


def evaluation_transform(tower: Tower) -> Callable[[Image.Image], Tensor]:
    """open_clip's own evaluation transform of a model: image -> normalised pixels (3, H, W)."""
    return image_transform_v2(PreprocessCfg(**open_clip.get_model_preprocess_cfg(tower.clip)), is_train=False)


def encode_classes(
    tower: Tower, prompts: PromptSet, *, cache: Path | None = None, device: torch.device | str = "cpu"
) -> Tensor:
    """Class features (C, D), unit norm, on ``device``; see `clipdistill.models.class_embeddings.class_embeddings`.

    Raises:
        InputError: features that are not finite.
    """
    bank_CD = class_embeddings(tower, prompts, cache=cache, device=device)
    _check_finite(tower, f"class prompts {prompts.name}", bank_CD, prompts.classnames)
    return bank_CD


@dataclass(frozen=True)
class _Decoded:
    """An image after open_clip's transform (3, H, W), or why it is unreadable; whether its pixels depend on the
    decoding."""

    pixels: Tensor | None = None
    ambiguous: bool = False
    fault: str | None = None


@dataclass
class _Batch:
    """Features of one batch, and its samples without their image data; ``faults`` holds why an image is unreadable,
    ``ambiguous`` the number of images whose pixels depend on the decoding."""

    samples: list[EncodedSample]
    faults: list[str | None]
    image_BD: Tensor
    text_MD: Tensor
    ambiguous: int


def _encode(
    tower: Tower,
    data: EvaluationSet,
    positions: range,
    batch_size: int,
    workers: int,
    device: torch.device,
    progress: Callable[[int], None] | None,
) -> Iterator[_Batch]:
    transform = evaluation_transform(tower)

    def decode(sample: EncodedSample) -> _Decoded:
        try:
            image, ambiguous = sample.decode()
            return _Decoded(transform(image), ambiguous)
        except UnreadableImageError as error:
            return _Decoded(fault=str(error))

    done = 0
    with ThreadPoolExecutor(max_workers=workers or cores_per_process()) as pool:
        batches = _decode_ahead(data.samples(positions), batch_size, lambda sample: pool.submit(decode, sample))
        for samples, decoded in batches:
            pixels = [each.pixels for each in decoded if each.pixels is not None]
            image_BD = torch.zeros(len(samples), tower.embed_dim)
            if pixels:
                readable_B = torch.tensor([each.pixels is not None for each in decoded])
                image_BD[readable_B] = encode_pixels(tower, torch.stack(pixels).to(device)).cpu()
            captions = [caption for sample in samples for caption in sample.captions]
            text_MD = torch.zeros(0, tower.embed_dim)
            if captions:
                tokens = tower.text_tokenizer.grouped(captions).map(lambda each: each.to(device))
                text_MD = tokens.encode(tower.encode_tokens).cpu()
            faults = [each.fault for each in decoded]
            ambiguous = sum(each.ambiguous for each in decoded)
            yield _Batch([replace(sample, data=b"") for sample in samples], faults, image_BD, text_MD, ambiguous)
            done += len(samples)
            if progress is not None:
                progress(done)


def _decode_ahead(
    samples: Iterator[EncodedSample], size: int, submit: Callable[[EncodedSample], "Future[_Decoded]"]
) -> Iterator[tuple[list[EncodedSample], "list[_Decoded]"]]:
    """Batches of samples with their decoded images, or why these are unreadable; the next batches decode meanwhile."""
    waiting: deque[tuple[list[EncodedSample], list[Future[_Decoded]]]] = deque()
    while True:
        while len(waiting) <= _BATCHES_AHEAD and (batch := list(islice(samples, size))):
            waiting.append((batch, [submit(sample) for sample in batch]))
        if not waiting:
            return
        batch, futures = waiting.popleft()
        yield batch, [future.result() for future in futures]


def encode_pixels(tower: Tower, pixels_BCHW: Tensor) -> Tensor:
    """Unit-norm features (B, D), float32, of images after open_clip's transform."""
    if tower.channels_last:
        pixels_BCHW = pixels_BCHW.contiguous(memory_format=torch.channels_last)
    with torch.autocast(pixels_BCHW.device.type, dtype=torch.bfloat16, enabled=tower.precision == "bf16"):
        image_BD = tower.clip.encode_image(pixels_BCHW)
    return F.normalize(image_BD.float(), dim=-1)


def _concatenate(kind: Kind, batches: Sequence[_Batch]) -> SetFeatures:
    samples = [sample for batch in batches for sample in batch.samples]
    faults = [fault for batch in batches for fault in batch.faults]
    captions = torch.tensor([len(sample.captions) for sample in samples])
    return SetFeatures(
        kind=kind,
        image_ND=torch.cat([batch.image_BD for batch in batches]),
        readable_N=torch.tensor([fault is None for fault in faults]),
        unreadable=tuple(fault for fault in faults if fault is not None),
        text_MD=torch.cat([batch.text_MD for batch in batches]),
        owner_M=torch.arange(len(samples)).repeat_interleave(captions),
        ambiguous=sum(batch.ambiguous for batch in batches),
        keys=tuple(sample.key for sample in samples),
        labels_N=torch.tensor([sample.label for sample in samples]),
        classes=tuple(sample.classes for sample in samples),
    )


def _check_finite(tower: Tower, what: str, features_ND: Tensor, names: Sequence[str]) -> None:
    bad_N = ~features_ND.isfinite().all(dim=1)
    if bad_N.any():
        first = names[int(bad_N.nonzero()[0])]
        raise InputError(
            f"model {tower.name}: the features of {int(bad_N.sum())} of {len(features_ND)} {what} are not finite "
            f"(first: {first!r}); allowed: a model with finite features"
        )
