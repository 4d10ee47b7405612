"""Build the parts of a run from its config."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor

from clipdistill.config import Config
from clipdistill.data import ImageTextStream, LazyIndex, ShardIndex, StreamLoader, expand_urls, index_shards
from clipdistill.data.class_lists import find_class_lists
from clipdistill.data.embeddings import EmbeddingReader
from clipdistill.data.labels import Labels, count_classes, read_labels, sampling_weights
from clipdistill.data.reading import Views
from clipdistill.data.sample import Decoder
from clipdistill.data.sizes import stated_sizes
from clipdistill.distill.objective import Objective
from clipdistill.distill.student_texts import StudentTexts
from clipdistill.distill.teacher_cache import CacheContent
from clipdistill.distill.teachers import Teachers
from clipdistill.distributed.collectives import gather_objects, rank, world_size
from clipdistill.errors import InputError
from clipdistill.evaluation import EvaluationSet
from clipdistill.evaluation.attack import ROBUST
from clipdistill.evaluation.benchmark_format import MEAN, RISING
from clipdistill.evaluation.ranks import from_first_rank, on_all_ranks
from clipdistill.evaluation.sets.open import open_sets
from clipdistill.io.images import Size
from clipdistill.io.paths import expand
from clipdistill.io.urls import shown
from clipdistill.models.class_embeddings import class_embeddings, class_prompt_tokens
from clipdistill.models.prompts import PromptSet, load_prompts
from clipdistill.models.tokens import TextTokenizer
from clipdistill.models.towers import FrozenModel, Student, Tower
from clipdistill.settings import check


def open_prompts(config: Config) -> PromptSet | None:
    """The prompt set, if the run has one."""
    prompts = load_prompts(config.prompts) if config.prompts else None
    if prompts is not None and prompts.num_classes < 2:
        raise InputError(f"prompts: {config.prompts} has 1 class; allowed: 2 or more")
    return prompts


def open_evaluation_sets(config: Config, *, cache: Path) -> list[EvaluationSet]:
    """The sets on which the student is evaluated; the ranks open them together.

    Raises:
        InputError: a set cannot be read, two have the same name, or none has the metric that ranks checkpoints.
    """
    settings = config.evaluation
    sets = open_sets(settings.folders, settings, cache=cache)
    names = [data.name for data in sets]
    twice = next((name for number, name in enumerate(names) if name in names[:number]), None)
    if twice is not None:
        raise InputError(f"evaluation.folders: two sets named {twice}; allowed: different names")
    metrics = [MEAN, *(f"evaluation/{data.name}/{metric}" for data in sets for metric in RISING[data.kind])]
    if settings.attack is not None:
        metrics += [f"evaluation/{data.name}{ROBUST}" for data in sets if data.kind == "classification"]
    if sets and config.train.best_metric not in metrics:
        raise InputError(f"train.best_metric: {config.train.best_metric}; allowed: {', '.join(metrics)}")
    return sets


def load_student_of(config: Config, teachers: Sequence[FrozenModel]) -> Student:
    """The student, on the CPU, with projections into the spaces of teachers if terms need them; random weights depend
    only on the seed."""
    set_seed(config.seed)
    student = config.student.load(teachers)
    compared = [term.over for term in config.terms if term.needs_equal_widths]
    widths = [teacher.embed_dim for teacher in teachers]
    for term in config.terms:
        most, others = max(term.dims or [0]), [width for width in widths if width != student.embed_dim]
        check(most <= student.embed_dim, f"objective.{term.term_name}.dims", term.dims, f"up to {student.embed_dim}")
        fits = not (term.dims and term.needs_equal_widths and others)
        allowed = f"none, as a projection to the {others} dimensions of a teacher has no nested ones"
        check(fits, f"objective.{term.term_name}.dims", term.dims, allowed)
    if compared and any(width != student.embed_dim for width in widths):
        student.project_to(widths, captions="captions" in compared)
    return student


def make_decoder(config: Config, image_sizes: Sequence[Size]) -> Decoder:
    """Decoder of training samples, with the members that the run requires.

    Args:
        config: of the run.
        image_sizes: input sizes of the towers that see the pixels.
    """
    data = config.data
    heights, widths = zip(*image_sizes, strict=True)
    return Decoder(
        image_size=data.image_size or (max(heights), max(widths)),
        augmentation=data.augmentation,
        caption_key=data.caption_key,
        label_key=data.label_key,
        require_captions=any(term.over == "captions" for term in config.terms),
        require_labels=config.labels == "dataset",
        max_pixels=data.max_pixels,
    )


def cache_content(config: Config, decoder: Decoder) -> CacheContent:
    """Content of the teacher cache's files.

    Args:
        config: of the run.
        decoder: of the run's stream.
    """
    return CacheContent(
        decoder=replace(
            decoder, require_captions=uses_teacher_captions(config), require_labels=False, class_lists=None
        ),
        views=Views(config.data.views, config.data.view_seed),
        precision=config.teacher_cache.precision,
        pixels=config.teacher_cache.pixels,
    )


def uses_teacher_captions(config: Config) -> bool:
    """Whether a teacher's caption features are needed: by a term, or as the student's caption features."""
    over_captions = [term for term in config.terms if term.over == "captions"]
    lent = config.student.text == "teacher" and bool(over_captions)
    return lent or any(term.needs_teacher for term in over_captions)


def open_index(config: Config) -> Sequence[ShardIndex]:
    """The shards of a run: indexed on first use if the files beside them state their sizes, or if samples are drawn;
    else, or if all labels are needed, all of them before the first step.

    Raises:
        InputError: as `index_all` and `stated_sizes`.
    """
    if needs_all_labels(config):
        return index_all(config)
    urls, cache = expand_urls(config.data.shards), expand(config.data.cache)
    if config.data.samples_per_epoch is not None:
        return LazyIndex(urls, cache_dir=cache)
    parts = on_all_ranks(lambda: stated_sizes(urls[rank() :: world_size()]))
    sizes = [parts[number % len(parts)][number // len(parts)] for number in range(len(urls))]
    known = [size for size in sizes if size is not None]
    return LazyIndex(urls, cache_dir=cache, sizes=known) if len(known) == len(urls) else index_all(config)


def index_all(config: Config, *, rebuild: bool = False) -> list[ShardIndex]:
    """The index of all shards; each rank indexes a part of them.

    Args:
        config: of the run.
        rebuild: use no cached index.

    Raises:
        InputError: a shard is missing, or more than the allowed share of them hold no samples.
    """
    urls = expand_urls(config.data.shards)
    cache = None if rebuild else expand(config.data.cache)
    parts = gather_objects(index_shards(urls[rank() :: world_size()], cache_dir=cache))
    index = [parts[number % len(parts)][number // len(parts)] for number in range(len(urls))]
    unusable = [f"shard {shown(shard.url)}: {shard.unusable}" for shard in index if shard.unusable]
    if len(unusable) > config.data.max_bad_share * len(index):
        raise InputError(bad_shards_message(unusable, len(index), config.data.max_bad_share))
    return index


def needs_all_labels(config: Config) -> bool:
    """Whether the class of every sample is needed before the first step."""
    return config.data.sampling is not None or any(term.needs_class_counts for term in config.terms)


def _read_all_labels(config: Config, index: Sequence[ShardIndex], decoder: Decoder) -> list[Labels]:
    """The labels of all shards; each rank reads those of a part of them."""
    cache = expand(config.data.cache)
    parts = on_all_ranks(lambda: read_labels(index[rank() :: world_size()], decoder, cache_dir=cache))
    return [parts[number % len(parts)][number // len(parts)] for number in range(len(index))]


def bad_shards_message(faults: Sequence[str], seen: int, allowed: float) -> str:
    """The message about too many shards that cannot be read.

    Args:
        faults: their errors.
        seen: number of shards opened or tried.
        allowed: ``data.max_bad_share``.
    """
    return (
        f"data.shards: {len(faults):,} of {seen:,} shards have no samples that can be read (the first: {faults[0]}); "
        f"allowed: data.max_bad_share = {allowed:g}, or a higher one"
    )


@dataclass(frozen=True, kw_only=True)
class CaptionTokenizers:
    """The distinct tokenizers of the towers that encode captions in a step, and their assignment to towers.

    Attributes:
        tokenizers: run by the data workers.
        student: index of the student's; None: it encodes no captions.
        teachers: index of each teacher's; empty: they encode none.
    """

    tokenizers: Sequence[TextTokenizer] = ()
    student: int | None = None
    teachers: Sequence[int] = ()

    @classmethod
    def find(
        cls, config: Config, student: Student, teachers: Sequence[FrozenModel], *, device: torch.device
    ) -> "CaptionTokenizers":
        """The tokenizers that a run needs on a device."""
        if not any(term.over == "captions" for term in config.terms):
            return cls()
        distinct: list[TextTokenizer] = []

        def number_of(tower: Tower) -> int:
            tokenizer = tower.text_tokenizer.for_device(device)
            for number, other in enumerate(distinct):
                if tokenizer.same_as(other):
                    return number
            distinct.append(tokenizer)
            return len(distinct) - 1

        of_student = None if student.text_mode == "teacher" else number_of(student)
        encode = uses_teacher_captions(config) and not config.teacher_cache.folder
        of_teachers = [number_of(teacher) for teacher in teachers] if encode else []
        return cls(tokenizers=distinct, student=of_student, teachers=of_teachers)


def open_stream(
    config: Config,
    decoder: Decoder,
    teachers: Sequence[FrozenModel],
    *,
    prompts: PromptSet | None,
    tokenizers: Sequence[TextTokenizer],
    device: torch.device,
) -> StreamLoader:
    """This rank's part of the training stream, with the teachers' embeddings if they are cached.

    Raises:
        InputError: too few samples, a class list beside the shards has classes that the prompts lack, or the teacher
            cache does not match the shards. (Of shards that are indexed on first use, each file is checked then.)
    """
    data, on_gpu = config.data, device.type == "cuda"
    index = open_index(config)
    if config.labels == "dataset" and prompts is not None:
        urls = index.urls if isinstance(index, LazyIndex) else [shard.url for shard in index]
        lists = from_first_rank(lambda: find_class_lists(urls, prompts, by_order=data.labels_by_order))
        decoder = replace(decoder, class_lists=lists)
    weights = class_counts = None
    if needs_all_labels(config):
        labels = _read_all_labels(config, index, decoder)
        weights = None if data.sampling is None else sampling_weights(labels, data.sampling)
        class_counts = None if prompts is None else count_classes(labels, prompts.num_classes, weights=weights)
    embeddings = None
    if config.teacher_cache.folder:
        key = cache_content(config, decoder).key(teachers, device=device)
        embeddings = EmbeddingReader(Path(config.teacher_cache.folder), index, key)
        if not isinstance(index, LazyIndex):
            embeddings.check()
    stream = ImageTextStream(
        index,
        decoder,
        batch_size=data.batch_size,
        seed=config.seed,
        shuffle=data.shuffle,
        views=Views(data.views, data.view_seed),
        embeddings=embeddings,
        weights=weights,
        class_counts=class_counts,
        tokenizers=[tokenizer.grouped for tokenizer in tokenizers],
        samples_per_epoch=data.samples_per_epoch,
        rank=rank(),
        world_size=world_size(),
        num_workers=data.decoding_processes(on_gpu=on_gpu),
    )
    return StreamLoader(stream, pin_memory=on_gpu, timeout=data.worker_timeout, device=device)


def make_objective(
    config: Config,
    *,
    steps_per_epoch: float,
    num_classes: int,
    class_counts: Sequence[float] | None,
    device: torch.device,
) -> Objective:
    """The objective, of the terms with weight above 0."""
    return Objective(
        config.terms,
        warmup_steps={term.term_name: round(term.warmup_epochs * steps_per_epoch) for term in config.terms},
        teacher_weights=[teacher.weight for teacher in config.teachers],
        mix_teachers=config.teacher_ensemble == "probabilities",
        num_classes=num_classes,
        class_counts=class_counts,
        device=device,
        implementation=config.train.loss_implementation,
    )


def freeze_unused(student: Student, objective: Objective) -> None:
    """Freeze the parameters that no term depends on: they would break DDP's synchronisation."""
    if not objective.needs_logits:
        student.clip.logit_scale.requires_grad_(False)
        bias = student.logit_bias()
        if bias is not None:
            bias.requires_grad_(False)
    if not (objective.needs_prompts or objective.needs_captions):
        student.freeze_text()


def make_student_texts(
    config: Config,
    student: Student,
    teachers: Teachers,
    prompts: PromptSet | None,
    tokenizers: CaptionTokenizers,
    objective: Objective,
    **settings: Any,
) -> StudentTexts:
    """The student's class prompts and captions; settings as for ``class_embeddings``."""
    class_CD: Tensor | None = None
    class_tokens_CTL: Tensor | None = None
    if prompts is not None and objective.needs_prompts:
        match student.text_mode:
            case "teacher":
                class_CD = teachers.class_embeddings[0]
            case "freeze":
                class_CD = class_embeddings(student, prompts, **settings)
            case _:
                class_tokens_CTL = class_prompt_tokens(student, prompts)
    return StudentTexts(
        student,
        class_tokens_CTL=class_tokens_CTL,
        class_CD=class_CD,
        templates_per_step=config.templates_per_step,
        seed=config.seed,
        caption_tokens=tokenizers.student,
        teacher_captions=student.text_mode == "teacher" and objective.needs_captions,
    )
