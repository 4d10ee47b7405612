"""Compare a written artefact with the model in memory, on the same images and texts, and time it.

Shapes: B images, N texts, C classes, D features, H and W pixels.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from clipdistill.errors import InputError, RunError
from clipdistill.evaluation.encoding import evaluation_transform
from clipdistill.evaluation.sets.open import load_classification_set
from clipdistill.models.towers import Tower

FEATURE_BOUND = 1e-4
"""Largest difference of unit-norm features, in float32, between a model and another runtime."""

HALF_BOUND = 1e-2
"""The same, for weights stored in float16."""

BATCH_SIZE = 16
"""Images or texts at once. The last batch is usually smaller, which detects a fixed batch size."""

_READ_AHEAD = 1024
_TEXTS = (
    "a photo of a cat.",
    "arrow left circle",
    "Two WORDS, one-line!",
    "it's 3 o'clock in the café",
    "",
    "one word after another " * 40,
)
"""Texts besides the prompts: punctuation, capitals, an accent, an empty text, one longer than any context."""


class ParityError(RunError):
    """A written artefact differs from the model."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """The inputs on which formats are compared.

    Attributes:
        images: original images, of any size.
        source: description of their source.
        pixels_BCHW: the images after open_clip's own evaluation transform of the model.
        texts: inputs of the text tower.
        classes: number of texts, from the first, that serve as classes.
    """

    images: tuple[Image.Image, ...]
    source: str
    pixels_BCHW: Tensor
    texts: tuple[str, ...]
    classes: int


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Outputs of the model in memory for a probe.

    Attributes:
        image_BD: unit-norm image features.
        text_ND: unit-norm text features.
        bank_CD: class features for top-1: those of a prompt set, or of the probe's texts.
        scale: multiplier of the cosine similarities.
    """

    image_BD: Tensor
    text_ND: Tensor
    bank_CD: Tensor
    scale: float

    def probabilities(self) -> Tensor:
        """Softmax (B, C) of the similarity logits over the classes."""
        return (self.scale * self.image_BD @ self.bank_CD.T).softmax(dim=-1)


@dataclass(frozen=True, kw_only=True)
class Runnable:
    """A written artefact, read back from the disk; parts that it lacks are None.

    Attributes:
        name: its file.
        runtime: library that runs it.
        image: normalised pixels (B, 3, H, W) -> unit-norm features (B, D).
        text: texts -> unit-norm features (N, D), with the written tokenizer.
        classify: normalised pixels (B, 3, H, W) -> class probabilities (B, C).
        exact: whether the bound applies; a quantised model is only measured.
    """

    name: str
    runtime: str
    image: Callable[[Tensor], Tensor] | None = None
    text: Callable[[list[str]], Tensor] | None = None
    classify: Callable[[Tensor], Tensor] | None = None
    exact: bool = True


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Comparison of one artefact with the model.

    Attributes:
        name: its file.
        runtime: library that ran it.
        megabytes: its size on disk, in 10^6 bytes.
        difference: largest absolute difference of any unit-norm feature or class probability.
        bound: largest allowed difference; None for a quantised model.
        agreement: share of the images with the model's top-1 class.
        milliseconds: median CPU time of one image, one text (with its tokenizer), or one classification.
    """

    name: str
    runtime: str
    megabytes: float
    difference: float
    bound: float | None
    agreement: float
    milliseconds: dict[str, float]


def synthetic_probe(tower: Tower, *, count: int, prompts: Sequence[str] = ()) -> Probe:
    """A probe of smooth random pictures, the same at every call."""
    height, width = tower.image_size
    images = smooth_pictures(count, height=height + height // 4, width=width + width // 2)
    return _probe(tower, images, f"{count} synthetic pictures (smooth noise)", prompts)


def smooth_pictures(count: int, *, height: int, width: int) -> list[Image.Image]:
    """Smooth noise, the same at every call."""
    coarse = torch.rand(count, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    smooth = F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    pixels = smooth.mul(255).byte().permute(0, 2, 3, 1).contiguous().numpy()
    return [Image.fromarray(picture) for picture in pixels]


def real_probe(
    tower: Tower, folder: str | Path, *, split: str = "test", count: int, prompts: Sequence[str] = ()
) -> Probe:
    """A probe of a data set's images, spread evenly over its first 1,024.

    Args:
        tower: model that provides the transform.
        folder: a data set in CLIP_benchmark's layout.
        split: which split.
        count: largest number of images.
        prompts: texts that serve as classes.

    Raises:
        InputError: no such data set, or an unreadable image.
    """
    data = load_classification_set(folder, split=split, allow_duplicates=True)
    ahead = list(itertools.islice(data.samples(), _READ_AHEAD))
    if not ahead:
        raise InputError(f"data {folder}: no sample; allowed: at least one")
    step = max(1, len(ahead) // count)
    images = [sample.image().convert("RGB") for sample in ahead[::step][:count]]
    return _probe(tower, images, f"{len(images)} images of the data set {data.name} (split {split})", prompts)


def _probe(tower: Tower, images: Sequence[Image.Image], source: str, prompts: Sequence[str]) -> Probe:
    return Probe(
        images=tuple(images),
        source=source,
        pixels_BCHW=transform_images(tower, images),
        texts=(*prompts, *_TEXTS),
        classes=len(prompts) or len(_TEXTS),
    )


def transform_images(tower: Tower, images: Sequence[Image.Image]) -> Tensor:
    """Pixels (B, 3, H, W) of images after open_clip's own evaluation transform."""
    transform = evaluation_transform(tower)
    return torch.stack([transform(image) for image in images])


@torch.no_grad()
def image_features(tower: Tower, pixels_BCHW: Tensor) -> Tensor:
    """Unit-norm image features (B, D) of normalised pixels, on the CPU."""
    device = tower.device
    return _batched(lambda pixels: F.normalize(tower.clip.encode_image(pixels.to(device)).float(), dim=-1), pixels_BCHW)


@torch.no_grad()
def text_features(tower: Tower, texts: Sequence[str]) -> Tensor:
    """Unit-norm text features (N, D) from untrimmed tokens, on the CPU."""
    device = tower.device
    return _batched(
        lambda batch: F.normalize(tower.clip.encode_text(tower.tokenizer(batch).to(device)).float(), dim=-1),
        list(texts),
    )


def reference_of(tower: Tower, probe: Probe, *, bank_CD: Tensor | None = None) -> Reference:
    """Outputs of a model in memory for a probe; the caller sets its mode.

    Raises:
        InputError: features that are not finite.
    """
    image_BD, text_ND = image_features(tower, probe.pixels_BCHW), text_features(tower, probe.texts)
    for what, features in (("image", image_BD), ("text", text_ND)):
        if not features.isfinite().all():
            raise InputError(f"model {tower.name}: its {what} features are not finite; allowed: weights without NaN")
    return Reference(
        image_BD=image_BD,
        text_ND=text_ND,
        bank_CD=text_ND[: probe.classes] if bank_CD is None else bank_CD.cpu(),
        scale=tower.clip.logit_scale.exp().item(),
    )


def difference(artefact: Runnable, probe: Probe, reference: Reference) -> float:
    """Largest absolute difference of any feature or probability; NaN if any is NaN."""
    return max(_differences(_outputs(artefact, probe), reference), key=_nan_first)


def measure(artefact: Runnable, probe: Probe, reference: Reference, *, files: Sequence[Path], bound: float) -> Measured:
    """Compare an artefact with the model, and time it.

    Args:
        artefact: read back from the disk.
        probe: inputs of both.
        reference: outputs of the model.
        files: that the artefact consists of.
        bound: largest difference of features; for probabilities, times the logit scale.

    Raises:
        ParityError: an exact artefact exceeds the bound, or any artefact returns NaN.
    """
    outputs = _outputs(artefact, probe)
    found = max(_differences(outputs, reference), key=_nan_first)
    allowed = bound * max(1.0, reference.scale) if artefact.classify else bound
    if math.isnan(found) or (artefact.exact and found > allowed):
        raise ParityError(f"{artefact.name}: differs from the model by {found:.1e}; allowed: at most {allowed:.1e}")
    return Measured(
        name=artefact.name,
        runtime=artefact.runtime,
        megabytes=sum(path.stat().st_size for path in files) / 1e6,
        difference=found,
        bound=allowed if artefact.exact else None,
        agreement=_agreement(outputs, probe, reference),
        milliseconds=_latencies(artefact, probe),
    )


def _outputs(artefact: Runnable, probe: Probe) -> dict[str, Tensor]:
    outputs = {}
    if artefact.image is not None:
        outputs["image"] = _batched(artefact.image, probe.pixels_BCHW)
    if artefact.text is not None:
        outputs["text"] = _batched(artefact.text, list(probe.texts))
    if artefact.classify is not None:
        outputs["classify"] = _batched(artefact.classify, probe.pixels_BCHW)
    return outputs


def _differences(outputs: dict[str, Tensor], reference: Reference) -> list[float]:
    expected = {
        "image": reference.image_BD,
        "text": reference.text_ND,
        "classify": reference.probabilities(),
    }
    return [float((value - expected[part]).abs().max()) for part, value in outputs.items()]


def _nan_first(value: float) -> tuple[bool, float]:
    return (math.isnan(value), value)


def _agreement(outputs: dict[str, Tensor], probe: Probe, reference: Reference) -> float:
    """Share of the images with the model's top-1 class; a text tower is combined with the model's image features."""
    if "classify" in outputs:
        return _same_top1(outputs["classify"], reference.probabilities())
    image_BD = outputs.get("image", reference.image_BD)
    if "text" not in outputs:
        return _same_top1(image_BD @ reference.bank_CD.T, reference.image_BD @ reference.bank_CD.T)
    text_CD, expected_CD = outputs["text"][: probe.classes], reference.text_ND[: probe.classes]
    return _same_top1(image_BD @ text_CD.T, reference.image_BD @ expected_CD.T)


def _same_top1(logits_BC: Tensor, expected_BC: Tensor) -> float:
    return float((logits_BC.argmax(dim=1) == expected_BC.argmax(dim=1)).double().mean())


def _latencies(artefact: Runnable, probe: Probe) -> dict[str, float]:
    one_image, one_text = probe.pixels_BCHW[:1], [probe.texts[0]]
    calls: dict[str, Callable[[], Any]] = {}
    if artefact.image is not None:
        image = artefact.image
        calls["image"] = lambda: image(one_image)
    if artefact.text is not None:
        text = artefact.text
        calls["text"] = lambda: text(one_text)
    if artefact.classify is not None:
        classify = artefact.classify
        calls["classify"] = lambda: classify(one_image)
    return {part: _median_milliseconds(call) for part, call in calls.items()}


def _median_milliseconds(call: Callable[[], Any], *, times: int = 21, seconds: float = 3.0) -> float:
    """Median duration of ``times`` calls after two warm-up calls, or of as many as fit in ``seconds``."""
    call()
    call()
    durations: list[float] = []
    while len(durations) < times and sum(durations) < seconds:
        start = time.perf_counter()
        call()
        durations.append(time.perf_counter() - start)
    return 1e3 * statistics.median(durations)


def _batched(run: Callable[[Any], Tensor], inputs: Any) -> Tensor:
    chunks = (inputs[start : start + BATCH_SIZE] for start in range(0, len(inputs), BATCH_SIZE))
    return torch.cat([run(chunk).cpu() for chunk in chunks])
