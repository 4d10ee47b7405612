"""Zero-shot classification on CLIP_benchmark's folders, with agreement between a student and its teacher.

Shapes: B images, C classes, N samples of the set, D features.
"""

import io
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from clipdistill.data import index_shards
from clipdistill.data.sample import RawSample, SampleReader
from clipdistill.errors import InputError
from clipdistill.prompts import PromptSet, load_prompts
from clipdistill.similarity import prompt_bank, similarity_logits
from clipdistill.towers import Tower, load_teacher

_IMAGE_EXTENSIONS = ("webp", "png", "jpg", "jpeg")


@dataclass(frozen=True, kw_only=True)
class ClassificationSet:
    """A labelled test set on disk.

    Attributes:
        name: of the folder.
        prompts: its class names and templates.
        shards: tar files of the split, in order.
    """

    name: str
    prompts: PromptSet
    shards: tuple[str, ...]

    def samples(self) -> Iterator["EncodedSample"]:
        """The samples in order, images still encoded.

        Raises:
            InputError: a damaged shard, a sample without image or label, a label outside the class list.
        """
        index = index_shards(self.shards, cache_dir=None)
        for shard in index:
            if shard.problems:
                raise InputError(f"shard {shard.url}: {shard.problems[0]}; allowed: a whole tar file")
        reader = SampleReader(index, frozenset((*_IMAGE_EXTENSIONS, "cls")))
        for number, shard in enumerate(index):
            for position in range(len(shard)):
                raw = reader.read(number, position)
                yield self._checked(raw)
        reader.close()

    def _checked(self, raw: RawSample) -> "EncodedSample":
        where = f"{raw.url}: sample {raw.key}"
        if raw.fault is not None:
            raise InputError(f"{where}: {raw.fault.reason}: {raw.fault.detail}")
        extension = next((ext for ext in _IMAGE_EXTENSIONS if ext in raw.members), None)
        if extension is None or "cls" not in raw.members:
            raise InputError(f"{where}: has {sorted(raw.members)}; allowed: an image and cls")
        try:
            label = int(raw.members["cls"])
        except ValueError as error:
            raise InputError(f"{where}: label {raw.members['cls'][:20]!r}; allowed: an integer") from error
        if not 0 <= label < self.prompts.num_classes:
            raise InputError(f"{where}: label {label}; allowed: 0 to {self.prompts.num_classes - 1}")
        return EncodedSample(key=raw.key, data=raw.members[extension], label=label, where=where)


@dataclass(frozen=True, kw_only=True)
class EncodedSample:
    """A labelled image as it lies in its shard."""

    key: str
    data: bytes
    label: int
    where: str

    def image(self) -> Image.Image:
        """The decoded image.

        Raises:
            InputError: it cannot be decoded.
        """
        try:
            image = Image.open(io.BytesIO(self.data))
            image.load()
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise InputError(f"{self.where}: unreadable image: {error}") from error
        return image


def load_classification_set(
    folder: str | Path, *, split: str = "test", prompts: str | None = None, allow_duplicates: bool = False
) -> ClassificationSet:
    """Open a data set in CLIP_benchmark's layout.

    Args:
        folder: holds ``classnames.txt``, ``zeroshot_classification_templates.txt`` and ``{split}/{0..n-1}.tar``.
        split: which split.
        prompts: another prompt set (a name or a folder) in place of the folder's own.
        allow_duplicates: accept a class list that names a class twice.

    Raises:
        InputError: what is missing, or wrong with the class list.
    """
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"data {root}: no such folder; allowed: a data set in CLIP_benchmark's layout")
    listing = root / split / "nshards.txt"
    if not listing.is_file():
        raise InputError(f"data {root}: no {split}/nshards.txt; allowed: a data set in CLIP_benchmark's layout")
    text = listing.read_text(encoding="utf-8").strip()
    if not text.isdigit() or int(text) == 0:
        raise InputError(f"{listing}: {text!r}; allowed: a positive number of shards")
    shards = tuple(str(root / split / f"{number}.tar") for number in range(int(text)))
    for shard in shards:
        if not Path(shard).is_file():
            raise InputError(f"{listing}: says {text} shards, but {shard} is missing")
    return ClassificationSet(
        name=root.name,
        prompts=load_prompts(prompts or root, allow_duplicates=allow_duplicates),
        shards=shards,
    )


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What one tower says of a whole set.

    Attributes:
        logits_NC: similarity logits, on the CPU.
        labels_N: the true classes.
        keys: of the samples.
    """

    logits_NC: Tensor
    labels_N: Tensor
    keys: tuple[str, ...]


@torch.no_grad()
def predict(
    tower: Tower,
    data: ClassificationSet,
    *,
    batch_size: int = 256,
    workers: int = 0,
    device: torch.device | str = "cpu",
    cache: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> Predictions:
    """Run a tower over a set, with open_clip's own evaluation transform.

    Args:
        tower: teacher or student; its mode is restored afterwards.
        data: the set.
        batch_size: images at once.
        workers: threads that decode and resize; 0 means one.
        device: where the tower is.
        cache: folder for its class features.
        progress: called with the number of images done.
    """
    was_training = tower.training
    tower.eval()
    config = PreprocessCfg(**open_clip.get_model_preprocess_cfg(tower.clip))
    transform = image_transform_v2(config, is_train=False)
    bank_CD = prompt_bank(tower, data.prompts, cache=cache, device=device)
    scale = tower.clip.logit_scale.exp().item()
    logits, labels, keys = [], [], []
    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        for chunk in _chunks(data.samples(), batch_size):
            pixels = torch.stack(list(pool.map(lambda sample: transform(sample.image()), chunk))).to(device)
            image_BD = F.normalize(tower.clip.encode_image(pixels).float(), dim=-1)
            logits.append(similarity_logits(image_BD, bank_CD, scale, tower.logit_bias()).cpu())
            labels += [sample.label for sample in chunk]
            keys += [sample.key for sample in chunk]
            if progress is not None:
                progress(len(keys))
    tower.train(was_training)
    if not keys:
        raise InputError(f"data {data.name}: no sample in {len(data.shards)} shards; allowed: at least one")
    return Predictions(logits_NC=torch.cat(logits), labels_N=torch.tensor(labels), keys=tuple(keys))


def _chunks(samples: Iterator[EncodedSample], size: int) -> Iterator[list[EncodedSample]]:
    chunk = []
    for sample in samples:
        chunk.append(sample)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def classification_metrics(predictions: Predictions, teacher: Predictions | None = None) -> dict[str, float | None]:
    """Metrics under CLIP_benchmark's names, and agreement with a teacher.

    Returns:
        ``acc1``, ``acc5`` (None under 5 classes), ``mean_per_class_recall`` over the classes present; with a teacher,
        ``teacher_agreement``: the share of samples on which both name the same class, and ``teacher_kl``: the mean
        Kullback-Leibler divergence from the teacher's softmax to the student's, in nats.
    """
    logits_NC, labels_N = predictions.logits_NC, predictions.labels_N
    classes = logits_NC.shape[1]
    top = logits_NC.topk(min(5, classes), dim=1).indices
    hit_N = (top[:, 0] == labels_N).double()
    seen_C = torch.zeros(classes, dtype=torch.float64).index_add_(0, labels_N, torch.ones_like(hit_N))
    hits_C = torch.zeros(classes, dtype=torch.float64).index_add_(0, labels_N, hit_N)
    present = seen_C > 0
    metrics: dict[str, float | None] = {
        "acc1": float(hit_N.mean()),
        "acc5": float((top == labels_N[:, None]).any(dim=1).double().mean()) if classes >= 5 else None,
        "mean_per_class_recall": float((hits_C[present] / seen_C[present]).mean()),
    }
    if teacher is not None:
        metrics["teacher_agreement"] = float((top[:, 0] == teacher.logits_NC.argmax(dim=1)).double().mean())
        student_log = logits_NC.double().log_softmax(dim=1)
        teacher_log = teacher.logits_NC.double().log_softmax(dim=1)
        metrics["teacher_kl"] = float((teacher_log.exp() * (teacher_log - student_log)).sum(dim=1).mean())
    return metrics


def benchmark_record(
    data: ClassificationSet, metrics: dict[str, float | None], *, model: str, pretrained: str
) -> dict[str, Any]:
    """One result in CLIP_benchmark's JSON format."""
    return {
        "dataset": data.name,
        "model": model,
        "pretrained": pretrained,
        "task": "zeroshot_classification",
        "metrics": metrics,
        "language": "en",
    }


def load_for_evaluation(model: str, pretrained: str = "", *, device: torch.device | str = "cpu") -> Tower:
    """A model by any of its names: a run's folder, an exported folder, or what ``load_teacher`` takes."""
    folder = Path(model)
    for candidate in (folder / "student", folder):
        if (candidate / "open_clip_config.json").is_file():
            return load_teacher(f"local-dir:{candidate}", device=device)
    if folder.is_dir():
        raise InputError(
            f"model {model}: no open_clip_config.json in it or in student/; allowed: a finished run or an export"
        )
    return load_teacher(model, pretrained=pretrained, device=device)


def images_per_second(tower: Tower, *, batch_size: int, seconds: float = 1.0) -> float:
    """Throughput of the image tower alone on random pixels, after one warm-up batch."""
    images = torch.randint(0, 256, (batch_size, 3, tower.image_size, tower.image_size), dtype=torch.uint8)
    images = images.to(tower.device)
    with torch.no_grad():
        tower.encode_image(images)
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            tower.encode_image(images)
            count += batch_size
    return count / (time.perf_counter() - start)


def image_tower_cost(tower: Tower) -> dict[str, float]:
    """Parameters (millions) and GFLOPs (2 per multiply-add) an image, counted by torch's FlopCounterMode."""
    parameters = sum(parameter.numel() for parameter in tower.clip.visual.parameters())
    images = torch.zeros(1, 3, tower.image_size, tower.image_size, dtype=torch.uint8, device=tower.device)
    was_training = tower.training
    tower.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        tower.encode_image(images)
    tower.train(was_training)
    return {"parameters_m": parameters / 1e6, "gflops": counter.get_total_flops() / 1e9}


def mean_acc1(records: Sequence[dict[str, Any]]) -> float:
    """Mean top-1 over several sets."""
    return sum(record["metrics"]["acc1"] for record in records) / len(records)
