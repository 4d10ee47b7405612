"""The run's configuration: typed dataclasses own every default, unit and check; YAML states only the differences.

``load_config("run.yaml", ["optimizer.lr=1e-3"])`` reads a file, applies dotted overrides and returns a ``Config``.
An unknown key, a wrong type or a value out of range raises ``InputError`` in one line.
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar

from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from clipdistill.errors import InputError
from clipdistill.io.files import write_text
from clipdistill.io.resources import resource

OmegaConf.register_resolver("resource", lambda path: str(resource(path)), replace=True)

TEXT_MODES = ("train", "freeze", "teacher")
LABEL_SOURCES = ("none", "dataset", "teacher")
PRECISIONS = ("fp32", "bf16")
LOSS_IMPLEMENTATIONS = ("auto", "plain", "tiled", "triton")
LOSSES_OVER = {
    "gkl": ("prompts", "captions"),
    "kl": ("prompts", "captions"),
    "dkd": ("prompts", "captions"),
    "dist": ("prompts", "captions"),
    "clip": ("captions", "prompts"),
    "feature": ("images", "captions"),
}
"""Each loss and what it may be computed over; the first is the default."""


def _check(ok: bool, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise InputError(f"{name}: {value!r} is not allowed; allowed: {allowed}")


def _one_of(name: str, value: str, choices: Sequence[str]) -> None:
    _check(value in choices, name, value, ", ".join(choices))


@dataclass(kw_only=True)
class TeacherConfig:
    """One frozen teacher."""

    model: str
    """An open_clip model name, ``hf-hub:OWNER/NAME``, ``local-dir:FOLDER``, or a model config (.json)."""
    pretrained: str = ""
    """Tag or weights file for an open_clip model name; empty for ``hf-hub:`` and ``local-dir:``."""
    weight: float = 1.0
    """Share of this teacher in every term; the weights of all teachers are normalised to sum to 1."""
    logit_scale: float | None = None
    """Multiplier of the cosine similarities; empty: the teacher's own."""
    precision: str = "fp32"
    """fp32, or bf16 (autocast; the features and logits are float32 all the same)."""
    shard: bool = False
    """Spread the teacher's weights over the ranks (FSDP2), for a teacher too large for one device."""

    def __post_init__(self) -> None:
        _check(self.weight > 0, "teachers.weight", self.weight, "> 0")
        _check(
            self.logit_scale is None or self.logit_scale > 0,
            "teachers.logit_scale",
            self.logit_scale,
            "> 0 or empty",
        )
        _one_of("teachers.precision", self.precision, PRECISIONS)


@dataclass(kw_only=True)
class StudentConfig:
    """The model that is trained."""

    model: str = "???"
    """An open_clip name, ``hf-hub:``/``local-dir:``, a model config (.json), or the stem of one in configs/models."""
    pretrained: str = ""
    """Tag or weights file to start from; empty: random weights (``hf-hub:``/``local-dir:`` bring their own)."""
    text: str = "train"
    """train: own text tower, trained. freeze: own text tower, frozen. teacher: the teacher's text tower, frozen."""
    logit_scale: float | None = None
    """Initial multiplier of the cosine similarities; empty: the model's own (the teacher's, for ``text: teacher``)."""
    train_logit_scale: bool = True
    """Whether the multiplier is trained (it is capped at 100, as in CLIP)."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """Compile the image tower with torch.compile."""

    def __post_init__(self) -> None:
        _one_of("student.text", self.text, TEXT_MODES)
        _check(
            self.logit_scale is None or 0 < self.logit_scale <= 100,
            "student.logit_scale",
            self.logit_scale,
            "in (0, 100] or empty",
        )


@dataclass(kw_only=True)
class AugmentationConfig:
    """Random changes of a training image; the teacher sees the very same pixels."""

    crop_scale: list[float] = field(default_factory=lambda: [0.9, 1.0])
    """Range of the crop's share of the image area."""
    crop_ratio: list[float] = field(default_factory=lambda: [0.75, 4 / 3])
    """Range of the crop's aspect ratio."""
    flip: float = 0.0
    """Probability of a left-right flip (captions may say "left": off by default)."""
    rotate: float = 0.0
    """Largest rotation, degrees, either way."""
    translate: float = 0.0
    """Largest shift, as a share of the side, either way."""
    zoom: list[float] = field(default_factory=lambda: [1.0, 1.0])
    """Range of the magnification of the picture's content."""
    shear: float = 0.0
    """Largest shear, degrees, either way."""
    stretch: float = 0.0
    """Largest relative change of the aspect ratio, either way."""
    brightness: float = 0.0
    """Largest relative change of brightness, either way."""
    contrast: float = 0.0
    """Largest relative change of contrast, either way."""
    saturation: float = 0.0
    """Largest relative change of saturation, either way."""
    stroke: float = 0.0
    """Probability that lines are thickened or thinned (for line drawings)."""
    outline: float = 0.0
    """Probability that filled shapes become outlines (for line drawings)."""
    fast_jpeg: bool = False
    """Decode JPEGs with simplejpeg (``pip install 'clipdistill[fast]'``); the pixels differ a little from Pillow's,
    which evaluation always uses."""

    def __post_init__(self) -> None:
        for name in ("crop_scale", "crop_ratio", "zoom"):
            low_high = getattr(self, name)
            _check(
                len(low_high) == 2 and 0 < low_high[0] <= low_high[1] < math.inf,
                f"data.augmentation.{name}",
                list(low_high),
                "[low, high] with 0 < low <= high, finite",
            )
        _check(self.crop_scale[1] <= 1, "data.augmentation.crop_scale", list(self.crop_scale), "at most 1")
        for name in ("flip", "stroke", "outline"):
            _check(0 <= getattr(self, name) <= 1, f"data.augmentation.{name}", getattr(self, name), "0 to 1")
        for name in ("rotate", "translate", "shear", "stretch", "brightness", "contrast", "saturation"):
            value = getattr(self, name)
            _check(0 <= value < math.inf, f"data.augmentation.{name}", value, ">= 0, finite")


@dataclass(kw_only=True)
class DataConfig:
    """The training stream."""

    shards: list[str] = field(default_factory=list)
    """WebDataset shards: paths, globs, brace patterns, folders; local, http(s)://, s3:// or hf://."""
    batch_size: int = 256
    """Samples a process and a micro-batch. Global batch = processes x train.accumulate x batch_size."""
    image_size: int | None = None
    """Side, in pixels, of the uint8 crop that all towers share; empty: the largest tower's input size."""
    workers: int = 2
    """Decoding processes for each training process; 0 decodes in the training process itself."""
    views: int = 0
    """Fixed augmentations of each sample, of which an epoch shows one; 0: a new one each epoch."""
    view_seed: int = 0
    """Draws the fixed augmentations; apart from ``seed``, so that runs of several seeds share a teacher cache."""
    shuffle: int = 1000
    """Window of the sample shuffle, in samples (the order of shards is shuffled each epoch, too); 0: off."""
    caption_key: str = "txt"
    """Where the caption is: ``txt``, or a field of the sample's json."""
    label_key: str = "cls"
    """Where the label is: ``cls``, or a field of the sample's json."""
    samples_per_epoch: int | None = None
    """For sets too large for epochs: draw shards at random, each time from all, and call this many samples an epoch.
    Empty: an epoch is every sample once."""
    max_bad_share: float = 0.01
    """Largest share of bad samples, from the first 1,000 on; above it the run saves and stops. 1: never."""
    max_pixels: int = 89_478_485
    """Images of more pixels are refused before they are decoded."""
    cache: str = "~/.cache/clipdistill"
    """Folder for shard indexes and prompt banks, keyed by content."""
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)

    def __post_init__(self) -> None:
        _check(self.batch_size >= 1, "data.batch_size", self.batch_size, ">= 1")
        _check(self.workers >= 0, "data.workers", self.workers, ">= 0")
        _check(self.views >= 0, "data.views", self.views, ">= 0")
        _check(self.view_seed >= 0, "data.view_seed", self.view_seed, ">= 0")
        _check(self.shuffle >= 0, "data.shuffle", self.shuffle, ">= 0")
        _check(
            self.samples_per_epoch is None or self.samples_per_epoch >= 1,
            "data.samples_per_epoch",
            self.samples_per_epoch,
            ">= 1 or empty",
        )
        _check(0 <= self.max_bad_share <= 1, "data.max_bad_share", self.max_bad_share, "0 to 1")
        _check(self.max_pixels >= 1, "data.max_pixels", self.max_pixels, ">= 1")
        _check(
            self.image_size is None or self.image_size >= 1,
            "data.image_size",
            self.image_size,
            ">= 1 or empty",
        )


@dataclass(kw_only=True)
class TeacherCacheConfig:
    """The teachers' embeddings, which ``clipdistill cache`` computes once for all views of all samples."""

    folder: str = ""
    """Where the files are, one a shard; empty: the teachers run in every step."""
    precision: str = "bf16"
    """fp32, bf16, or int8 (with a factor a row)."""

    def __post_init__(self) -> None:
        _one_of("teacher_cache.precision", self.precision, ("fp32", "bf16", "int8"))


@dataclass(kw_only=True)
class TermConfig:
    """One weighted term of the objective. Settings that a loss does not use must stay at their defaults."""

    loss: str
    """gkl, kl, dkd, dist, clip or feature."""
    over: str = ""
    """prompts: class prompts; captions: the in-batch image-text matrix, both directions; images: image features."""
    weight: float = 1.0
    """Factor of the term; 0 switches it off at no cost."""
    warmup_epochs: float = 0.0
    """Epochs over which the weight rises linearly from 0."""
    alpha: float = 1.0
    """gkl: factor of the soft cross-entropy. dkd: factor of the target-class part."""
    beta: float = 1.0
    """gkl: factor of wMSE. dkd: factor of the non-target part. dist: factor of the inter-class relation."""
    gamma: float = 1.0
    """gkl: exponent of the weights, in [0, 1]. dist: factor of the intra-class relation."""
    temperature: float = 1.0
    """gkl (soft cross-entropy only), kl, dkd: divides the logits."""
    weight_temperature: float = 1.0
    """gkl: divides the teacher's logits inside the wMSE weights (the authors' T2)."""
    class_prior: bool = False
    """gkl over prompts: weights from the teacher's mean prediction of the sample's class (needs ``labels``)."""
    kind: str = "cosine"
    """feature: cosine or mse."""

    _USED_BY: ClassVar = {
        "alpha": ("gkl", "dkd"),
        "beta": ("gkl", "dkd", "dist"),
        "gamma": ("gkl", "dist"),
        "temperature": ("gkl", "kl", "dkd"),
        "weight_temperature": ("gkl",),
        "class_prior": ("gkl",),
        "kind": ("feature",),
    }

    def __post_init__(self) -> None:
        _one_of("objective.loss", self.loss, tuple(LOSSES_OVER))
        self.over = self.over or LOSSES_OVER[self.loss][0]
        _one_of(f"objective.over (of loss {self.loss})", self.over, LOSSES_OVER[self.loss])
        for setting in fields(self):
            users = self._USED_BY.get(setting.name)
            value = getattr(self, setting.name)
            if users and self.loss not in users and value != setting.default:
                raise InputError(
                    f"objective.{setting.name}: {value!r} has no meaning for loss {self.loss}; "
                    f"used by: {', '.join(users)}"
                )
        _check(self.weight >= 0, "objective.weight", self.weight, ">= 0")
        _check(self.warmup_epochs >= 0, "objective.warmup_epochs", self.warmup_epochs, ">= 0")
        _check(self.temperature > 0, "objective.temperature", self.temperature, "> 0")
        _check(self.weight_temperature > 0, "objective.weight_temperature", self.weight_temperature, "> 0")
        if self.loss == "gkl":
            _check(0 <= self.gamma <= 1, "objective.gamma", self.gamma, "0 to 1 for gkl")
        _one_of("objective.kind", self.kind, ("cosine", "mse"))
        _check(
            not (self.class_prior and self.over != "prompts"),
            "objective.class_prior",
            self.class_prior,
            "over: prompts only",
        )

    @property
    def name(self) -> str:
        """How the term is called in the metrics, such as ``gkl_prompts``."""
        return f"{self.loss}_{self.over}"


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW; biases, norms, embeddings' positions and the logit scale are not decayed."""

    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices and convolutions."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    eps: float = 1e-8
    clip_norm: float | None = 1.0
    """Largest global gradient norm; empty: no clipping."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up; then the rate falls to 0 along a cosine."""

    def __post_init__(self) -> None:
        _check(self.lr > 0, "optimizer.lr", self.lr, "> 0")
        _check(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, ">= 0")
        _check(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            "optimizer.betas",
            list(self.betas),
            "two numbers in [0, 1)",
        )
        _check(self.eps > 0, "optimizer.eps", self.eps, "> 0")
        _check(
            self.clip_norm is None or self.clip_norm > 0,
            "optimizer.clip_norm",
            self.clip_norm,
            "> 0 or empty",
        )
        _check(self.warmup_steps >= 0, "optimizer.warmup_steps", self.warmup_steps, ">= 0")


@dataclass(kw_only=True)
class TrainConfig:
    """How long, how often, how precisely."""

    epochs: float | None = None
    """Length of the run in passes over the data; state this or ``steps``."""
    steps: int | None = None
    """Length of the run in optimizer steps; state this or ``epochs``."""
    accumulate: int = 1
    """Micro-batches an optimizer step; the result equals one batch of that many times the size, save where the model
    itself looks at its micro-batch (batch norm) or at chance (dropout)."""
    teacher_micro_batches: int = 1
    """Micro-batches that the teachers, which keep nothing for a backward pass, see at once, where memory allows."""
    precision: str = "fp32"
    """fp32, or bf16 (autocast of the student; losses and weights stay float32)."""
    loss_implementation: str = "auto"
    """Of gkl and kl. plain: by way of the matrices of logits; tiled, triton: straight from the features, without these
    matrices, in PyTorch and in CUDA kernels; auto: whichever is faster for the size."""
    channels_last: bool = True
    """Memory layout of convolutions: faster on most devices, never wrong."""
    ema: float | None = None
    """Decay of a moving average of the weights, which is then what is evaluated and exported; empty: off."""
    log_every: int = 20
    """Optimizer steps between two records of the metrics."""
    evaluate_every: int | None = None
    """Optimizer steps between two evaluations; empty: at the end only."""
    save_every: int = 500
    """Optimizer steps between two checkpoints (one is also written of each step that is evaluated, and at the end)."""
    keep: int = 3
    """Newest checkpoints that are kept."""
    keep_best: int = 1
    """Checkpoints that are kept for their ``best_metric``, where ``evaluate_every`` has it measured; 0: none."""
    best_metric: str = "evaluation/mean"
    """What makes a checkpoint one of the best: ``evaluation/SET/METRIC``, as in the metrics; or the mean over the sets
    of their main metrics, which are acc1, mean_average_precision (multi-label sets) and mean_recall@1 (retrieval)."""
    rank_timeout: float = 600.0
    """Seconds that a process waits for the others before it ends the run; in half of them, one that gives no sign of
    life is given up. Work that the first process does alone, such as the export, may take longer."""
    trace: bool = False
    """Write the keys of every step's samples, and a digest of their pixels, to samples/ in the output."""
    threads: int | None = None
    """CPU threads of a process; empty: what torch chooses."""
    trackers: list[str] | None = None
    """Accelerate trackers beside metrics.jsonl; empty: tensorboard where it is installed."""

    def __post_init__(self) -> None:
        _check(self.epochs is None or 0 < self.epochs < math.inf, "train.epochs", self.epochs, "> 0")
        _check(self.steps is None or self.steps >= 1, "train.steps", self.steps, ">= 1")
        for name in ("accumulate", "teacher_micro_batches", "log_every", "save_every", "keep"):
            _check(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), ">= 1")
        _check(self.keep_best >= 0, "train.keep_best", self.keep_best, ">= 0")
        _check(self.threads is None or self.threads >= 1, "train.threads", self.threads, ">= 1, or empty")
        _check(1 <= self.rank_timeout < math.inf, "train.rank_timeout", self.rank_timeout, ">= 1")
        _check(
            self.evaluate_every is None or self.evaluate_every >= 1,
            "train.evaluate_every",
            self.evaluate_every,
            ">= 1 or empty",
        )
        _one_of("train.precision", self.precision, PRECISIONS)
        _one_of("train.loss_implementation", self.loss_implementation, LOSS_IMPLEMENTATIONS)
        _check(self.ema is None or 0 < self.ema < 1, "train.ema", self.ema, "in (0, 1) or empty")


@dataclass(kw_only=True)
class EvaluationConfig:
    """Zero-shot evaluation during and after training."""

    folders: list[str] = field(default_factory=list)
    """Test sets: folders or URLs in CLIP_benchmark's layout, folders of class folders, Hugging Face data sets."""
    split: str = "test"
    allow_duplicate_classes: bool = False
    """Accept class lists that name a class twice (published ImageNet lists do)."""
    batch_size: int = 256
    workers: int = 0
    """Decoding threads; 0 means one."""

    def __post_init__(self) -> None:
        _check(self.batch_size >= 1, "evaluation.batch_size", self.batch_size, ">= 1")
        _check(self.workers >= 0, "evaluation.workers", self.workers, ">= 0")


@dataclass(kw_only=True)
class Config:
    """A whole run."""

    output: str = "???"
    """Folder of the run: resolved config, metrics, checkpoints, the student. Must be new, or resumed."""
    seed: int = 0
    """Seed of the initial weights, the order of samples and their augmentation."""
    teachers: list[TeacherConfig] = field(default_factory=list)
    """One teacher or several; none where every term does without (clip)."""
    student: StudentConfig = field(default_factory=StudentConfig)
    data: DataConfig = field(default_factory=DataConfig)
    teacher_cache: TeacherCacheConfig = field(default_factory=TeacherCacheConfig)
    prompts: str = ""
    """Prompt set: the name of a shipped one, or a folder with classnames.txt and templates.txt."""
    templates_per_step: int = 1
    """Templates of which the training text tower encodes every class in a step (``text: train``); 0: all."""
    labels: str = "none"
    """Class of a training sample: none; dataset (``data.label_key``); teacher (the first teacher's argmax)."""
    objective: list[TermConfig] = field(default_factory=list)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        _one_of("labels", self.labels, LABEL_SOURCES)
        _check(0 <= self.seed < 2**31, "seed", self.seed, "0 to 2147483647")
        _check(self.templates_per_step >= 0, "templates_per_step", self.templates_per_step, ">= 0")
        if (self.train.epochs is None) == (self.train.steps is None):
            raise InputError(
                f"train.epochs: {self.train.epochs} with train.steps: {self.train.steps}; state exactly one of the two"
            )
        active = [term for term in self.objective if term.weight > 0]
        _check(bool(active), "objective", self.objective, "at least one term of weight > 0")
        names = [term.name for term in active]
        for name in names:
            _check(names.count(name) == 1, "objective", name, "each loss once over prompts, once over captions")
        _check(bool(self.data.shards), "data.shards", self.data.shards, "at least one path or pattern")
        if any(term.over == "prompts" for term in active):
            _check(bool(self.prompts), "prompts", self.prompts, "a prompt set, as a term is over prompts")
        if self.labels == "teacher":
            _check(bool(self.prompts), "prompts", self.prompts, "a prompt set, as labels are the teacher's argmax")
        needs_teacher = [term.name for term in active if term.loss != "clip"]
        if needs_teacher or self.student.text == "teacher" or self.labels == "teacher":
            what = needs_teacher[0] if needs_teacher else "student.text or labels = teacher"
            _check(bool(self.teachers), "teachers", self.teachers, f"at least one, as {what} needs it")
        if self.teacher_cache.folder:
            _check(bool(self.teachers), "teachers", self.teachers, "at least one, as teacher_cache.folder needs it")
            _check(self.data.views >= 1, "data.views", self.data.views, ">= 1, as teacher_cache.folder needs it")
            sharded = any(teacher.shard for teacher in self.teachers)
            _check(not sharded, "teachers.shard", sharded, "false, as teacher_cache.folder needs no teacher in memory")
        if self.student.text == "teacher":
            _check(
                len(self.teachers) == 1,
                "teachers",
                len(self.teachers),
                "exactly one for student.text: teacher",
            )
        for term in active:
            labelled = term.over == "prompts" and (term.class_prior or term.loss in ("dkd", "clip"))
            _check(
                not labelled or self.labels != "none",
                "labels",
                self.labels,
                f"dataset or teacher, as {term.name} needs them",
            )


def load_config(
    path: str | Path | None, overrides: Sequence[str] = (), *, values: Mapping[str, Any] | None = None
) -> Config:
    """Read a YAML config, apply ``dotted.key=value`` overrides, check everything.

    Args:
        path: YAML file; None starts from the defaults.
        overrides: such as ``optimizer.lr=1e-3`` or ``objective.0.gamma=0.5``; the right side is read as YAML.
        values: the same as Python values, taken as they are, before the overrides.

    Raises:
        InputError: unreadable file, unknown key (the nearest valid one is named), wrong type, value out of range.
    """
    base = OmegaConf.structured(Config)
    key = ""
    try:
        if path is not None:
            loaded = OmegaConf.load(path)
            if not OmegaConf.is_dict(loaded):
                raise InputError(f"{path}: a {type(loaded).__name__}; allowed: a mapping of config keys")
            base = OmegaConf.merge(base, loaded)
        for key, value in (values or {}).items():
            OmegaConf.update(base, key, value, merge=True)
        for override in overrides:
            key, equals, _ = override.partition("=")
            if not equals:
                raise InputError(f"override {override!r}: no '='; allowed: dotted.key=value")
            value = _parse_value(override, override[len(key) + 1 :])
            OmegaConf.update(base, key, value, merge=True)
        missing = sorted(OmegaConf.missing_keys(base))
        if missing:
            raise InputError(f"{missing[0]}: no value; it must be stated")
        key = ""
        config = OmegaConf.to_object(base)
    except InputError as error:
        raise InputError(str(error).splitlines()[0]) from error
    except FileNotFoundError as error:
        raise InputError(f"config {path}: no such file") from error
    except (YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"config {path}: not YAML: {' '.join(str(error).split())}") from error
    except (ConfigKeyError, ConfigAttributeError) as error:
        raise InputError(_unknown_key(error, key)) from error
    except OmegaConfBaseException as error:
        raise InputError(f"{key or error.full_key}: {str(error).splitlines()[0]}") from error
    assert isinstance(config, Config)
    return config


def save_config(config: Config, path: Path) -> None:
    """Write the resolved config as YAML."""
    write_text(path, OmegaConf.to_yaml(OmegaConf.structured(config)))


def to_dict(config: Config) -> dict[str, Any]:
    """The resolved config as plain dicts and lists."""
    container = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def _parse_value(override: str, text: str) -> Any:
    try:
        return OmegaConf.from_dotlist([f"value={text}"]).value
    except (YAMLError, OmegaConfBaseException) as error:
        detail = " ".join(str(error).split())
        raise InputError(
            f"override {override!r}: the value is not YAML: {detail}; allowed: such as a.b=[1, 'x']"
        ) from error


_FREE_ON_RESUME = (
    "output",
    "evaluation",
    "data.cache",
    "teacher_cache.folder",
    "data.workers",
    "data.max_bad_share",
    "data.batch_size",
    "train.accumulate",
    "train.teacher_micro_batches",
    "student.grad_checkpointing",
    "student.compile",
    *(f"train.{name}" for name in ("log_every", "evaluate_every", "save_every", "keep", "keep_best")),
    "train.best_metric",
    *(f"train.{name}" for name in ("rank_timeout", "trace", "threads", "trackers")),
)


def check_same_run(saved: Config, config: Config) -> None:
    """Refuse to go on with a run under settings that would have made it another run.

    What makes up the global batch is not among them: the trainer checks it, which knows the number of processes.

    Raises:
        InputError: naming the first setting that differs.
    """
    before, now = to_dict(saved), to_dict(config)
    difference = _first_difference(before, now, "")
    if difference is not None:
        key, was, value = difference
        raise InputError(
            f"{key}: {value!r}, but the run in {config.output} has {was!r}; allowed: the same, or another output"
        )


def _first_difference(before: Any, now: Any, key: str) -> tuple[str, Any, Any] | None:
    if key in _FREE_ON_RESUME or before == now:
        return None
    if isinstance(before, dict) and isinstance(now, dict):
        found = (_first_difference(before[k], now[k], f"{key}.{k}" if key else k) for k in before)
        return next((difference for difference in found if difference is not None), None)
    return key, before, now


def _unknown_key(error: OmegaConfBaseException, override: str) -> str:
    full_key = error.full_key or override
    name = str(error.key if error.key is not None else full_key).rsplit(".", 1)[-1]
    valid = [f.name for f in fields(error.object_type)] if is_dataclass(error.object_type) else []
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.0)
    hint = f"; nearest valid key: {near[0]}" if near else ""
    return f"{full_key}: unknown config key{hint}; allowed here: {', '.join(valid)}"
