"""What a config asks for, made: models, stream, terms, optimizer. The trainer calls this, and the cache command."""

import importlib.util
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate.utils import set_seed

from clipdistill.config import Config
from clipdistill.data import (
    Augmentation,
    ImageTextStream,
    LazyIndex,
    ShardIndex,
    StreamLoader,
    expand_urls,
    index_shards,
)
from clipdistill.data.embeddings import EmbeddingReader
from clipdistill.distill.objective import Objective, Term
from clipdistill.distill.teacher_cache import CacheSettings
from clipdistill.distributed.collectives import gather_objects, rank, world_size
from clipdistill.errors import InputError
from clipdistill.evaluation import EvaluationSet, open_set
from clipdistill.evaluation.benchmark_format import MEAN, RISING
from clipdistill.models.prompts import PromptSet, load_prompts
from clipdistill.models.towers import Student, Teacher, load_student, load_teacher
from clipdistill.training.optimizer import parameter_groups


def open_prompts(config: Config) -> PromptSet | None:
    """The prompt set, if the run has one."""
    prompts = load_prompts(config.prompts) if config.prompts else None
    if prompts is not None and prompts.num_classes < 2:
        raise InputError(f"prompts: {config.prompts} has 1 class; allowed: 2 or more")
    return prompts


def open_evaluation_sets(config: Config, *, cache: Path) -> list[EvaluationSet]:
    """The sets on which the student is evaluated; the ranks open them together.

    Raises:
        InputError: a set that cannot be read, two of one name, or none of them has the metric that rates checkpoints.
    """
    settings = config.evaluation
    sets = [
        open_set(folder, split=settings.split, allow_duplicates=settings.allow_duplicate_classes, cache=cache)
        for folder in settings.folders
    ]
    names = [data.name for data in sets]
    twice = next((name for number, name in enumerate(names) if name in names[:number]), None)
    if twice is not None:
        raise InputError(f"evaluation.folders: two sets named {twice}; allowed: different names")
    metrics = [MEAN, *(f"evaluation/{data.name}/{metric}" for data in sets for metric in RISING[data.kind])]
    if sets and config.train.best_metric not in metrics:
        raise InputError(f"train.best_metric: {config.train.best_metric}; allowed: {', '.join(metrics)}")
    return sets


def open_teachers(config: Config) -> list[Teacher]:
    """The teachers, whole and on the CPU."""
    return [
        load_teacher(
            settings.model,
            pretrained=settings.pretrained,
            weight=settings.weight,
            logit_scale=settings.logit_scale,
            precision=settings.precision,
        )
        for settings in config.teachers
    ]


def open_student(config: Config, teachers: Sequence[Teacher]) -> Student:
    """The student, with weights that the seed alone decides, on the CPU. Memory formats are set here for all towers.

    Raises:
        InputError: it cannot be compared with a teacher as the objective asks.
    """
    settings = config.student
    set_seed(config.seed)
    student = load_student(
        settings.model,
        pretrained=settings.pretrained,
        text_mode=settings.text,
        teacher=teachers[0] if settings.text == "teacher" else None,
        logit_scale=settings.logit_scale,
        train_logit_scale=settings.train_logit_scale,
    )
    if settings.grad_checkpointing:
        student.clip.set_grad_checkpointing(True)
    if config.train.channels_last:
        for tower in (student, *teachers):
            tower.use_channels_last()
    for teacher in teachers:
        features = any(term.loss == "feature" and term.weight > 0 for term in config.objective)
        if features and teacher.embed_dim != student.embed_dim:
            raise InputError(
                f"objective.loss: feature compares the student's {student.embed_dim} dimensions with the "
                f"{teacher.embed_dim} of teacher {teacher.name}; allowed: equal ones (as student.text: teacher)"
            )
    return student


def index_all(config: Config) -> list[ShardIndex]:
    """The index of all shards; the ranks make it together."""
    urls = expand_urls(config.data.shards)
    cache = Path(config.data.cache).expanduser()
    parts = gather_objects(index_shards(urls[rank() :: world_size()], cache_dir=cache))
    return [parts[number % len(parts)][number // len(parts)] for number in range(len(urls))]


def cache_settings(config: Config, student: Student, teachers: Sequence[Teacher]) -> CacheSettings:
    """What the files of the teacher cache depend on, beside shards and teachers."""
    over_captions = [term for term in config.objective if term.over == "captions" and term.weight > 0]
    compared = any(term.loss != "clip" for term in over_captions)
    return CacheSettings(
        views=config.data.views,
        seed=config.data.view_seed,
        image_size=_image_size(config, student, teachers),
        augmentation=_augmentation(config),
        max_pixels=config.data.max_pixels,
        caption_key=config.data.caption_key,
        label_key=config.data.label_key,
        captions=compared or (config.student.text == "teacher" and bool(over_captions)),
        precision=config.teacher_cache.precision,
    )


def open_stream(
    config: Config,
    student: Student,
    teachers: Sequence[Teacher],
    *,
    num_classes: int | None,
    pin_memory: bool,
) -> StreamLoader:
    """This rank's part of the training stream, with the teachers' embeddings where they are stored.

    Raises:
        InputError: the shards are too few, or the teacher cache does not serve them. (Of a resampled stream, whose
            shards are not known before they are drawn, each file is checked when it is needed.)
    """
    data = config.data
    index: Sequence[ShardIndex]
    if data.samples_per_epoch is None:
        index = index_all(config)
    else:
        index = LazyIndex(expand_urls(data.shards), cache_dir=Path(data.cache).expanduser())
    embeddings = None
    if config.teacher_cache.folder:
        key = cache_settings(config, student, teachers).key(teachers)
        embeddings = EmbeddingReader(Path(config.teacher_cache.folder), index, key, caption_key=data.caption_key)
        if data.samples_per_epoch is None:
            embeddings.check()
    needs_captions = any(term.over == "captions" and term.weight > 0 for term in config.objective)
    stream = ImageTextStream(
        index,
        batch_size=data.batch_size,
        image_size=_image_size(config, student, teachers),
        augmentation=_augmentation(config),
        seed=config.seed,
        shuffle=data.shuffle,
        views=data.views,
        view_seed=data.view_seed,
        embeddings=embeddings,
        samples_per_epoch=data.samples_per_epoch,
        rank=rank(),
        world_size=world_size(),
        num_workers=data.workers,
        caption_key=data.caption_key,
        label_key=data.label_key,
        require_captions=needs_captions,
        require_labels=config.labels == "dataset",
        num_classes=num_classes if config.labels == "dataset" else None,
        max_pixels=data.max_pixels,
    )
    return StreamLoader(stream, pin_memory=pin_memory)


def _image_size(config: Config, student: Student, teachers: Sequence[Teacher]) -> int:
    return config.data.image_size or max(tower.image_size for tower in (student, *teachers))


def _augmentation(config: Config) -> Augmentation:
    settings = asdict(config.data.augmentation)
    if settings["fast_jpeg"] and importlib.util.find_spec("simplejpeg") is None:
        raise InputError(
            "data.augmentation.fast_jpeg: simplejpeg is missing; allowed: false, or pip install 'clipdistill[fast]'"
        )
    return Augmentation(**{name: tuple(v) if isinstance(v, list) else v for name, v in settings.items()})  # type: ignore[arg-type]


def make_terms(config: Config, steps_per_epoch: float) -> list[Term]:
    """The terms of the objective that have a weight."""
    terms = []
    for term in config.objective:
        if term.weight > 0:
            settings = asdict(term)
            warmup_steps = round(settings.pop("warmup_epochs") * steps_per_epoch)
            terms.append(Term(name=term.name, warmup_steps=warmup_steps, **settings))
    return terms


def freeze_unused(student: Student, objective: Objective) -> None:
    """Parameters that no term reaches would break DDP's synchronisation."""
    if not objective.needs_logits:
        student.clip.logit_scale.requires_grad_(False)
        bias = student.logit_bias()
        if bias is not None:
            bias.requires_grad_(False)
    if not (objective.needs_prompts or objective.needs_captions):
        student.freeze_text()


def make_optimizer(config: Config, student: Student, device: torch.device) -> torch.optim.AdamW:
    """AdamW over what is trained of the student."""
    settings = config.optimizer
    return torch.optim.AdamW(
        parameter_groups(student, settings.weight_decay),
        lr=settings.lr,
        betas=(settings.betas[0], settings.betas[1]),
        eps=settings.eps,
        fused=device.type == "cuda" or None,
    )
