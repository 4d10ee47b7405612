"""The configuration of a run: the settings of its components, and the constraints between them.

``load_config("run.yaml", ["optimizer.lr=1e-3"])`` reads a file, applies dotted overrides and returns a ``Config``.
An unknown key, a wrong type or a value out of range raises ``InputError`` in one line. ``${resource:PATH}`` is a
shipped file; no other interpolation is resolved, as a config from elsewhere could read the environment with one.

    output, seed, prompts, labels, templates_per_step     Config, below
    teachers, student      models/loading.py              objective     losses/: each loss in its file
    data                   data/settings.py               optimizer     training/optimizer.py
    teacher_cache          distill/teacher_cache.py       train         training/settings.py
    evaluation             evaluation/settings.py           adversarial   distill/adversary.py
"""

import io
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml  # type: ignore[import-untyped]
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, model_validator
from yaml import YAMLError

from clipdistill.data.settings import DataSettings
from clipdistill.distill.adversary import AdversarialSettings, attackable
from clipdistill.distill.targets import Labels
from clipdistill.distill.teacher_cache import TeacherCacheSettings
from clipdistill.errors import InputError
from clipdistill.evaluation.settings import EvaluationSettings
from clipdistill.io.files import write_text
from clipdistill.io.paths import expand, read_text
from clipdistill.io.resources import resource
from clipdistill.io.run_files import STUDENT_FOLDER
from clipdistill.io.urls import is_remote, shown
from clipdistill.losses import Term
from clipdistill.models.adapted import PYTHON
from clipdistill.models.embedding_table import EMBEDDINGS
from clipdistill.models.initialisation import TEACHER
from clipdistill.models.loading import StudentSettings, TeacherSettings
from clipdistill.models.precision import chosen_precision
from clipdistill.models.prompts import shipped_prompt_sets
from clipdistill.settings import CountOrZero, LocalPath, Settings, check, validate
from clipdistill.training.optimizer import AdamW, AnyOptimizer
from clipdistill.training.settings import TrainSettings

OmegaConf.register_resolver("resource", lambda path: str(resource(path)), replace=True)


class Config(Settings):
    """Configuration of a run."""

    output: Annotated[LocalPath, Field(min_length=1)]
    """Folder of the run: resolved config, metrics, checkpoints, the student. Must be new unless the run is resumed."""
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    """Seed of the initial weights, the order of samples and their augmentation."""
    teachers: list[TeacherSettings] = Field(default_factory=list)
    """One or several teachers; none if no term needs one (clip)."""
    teacher_ensemble: Literal["losses", "probabilities"] | None = None
    """Several teachers. losses, or empty: each term is the mean over teachers. probabilities: terms on logits compare
    with one teacher, whose probabilities are the weighted mean of theirs, each with its own ``logit_scale``
    (MobileCLIP2)."""
    student: StudentSettings
    data: DataSettings = Field(default_factory=DataSettings)
    teacher_cache: TeacherCacheSettings = Field(default_factory=TeacherCacheSettings)
    prompts: str = ""
    """Prompt set: the name of a shipped one, or a folder with classnames.txt and templates.txt."""
    templates_per_step: CountOrZero = 1
    """Templates per step in which the trained text tower encodes every class (``text: train``); 0: all."""
    labels: Labels = "none"
    """Class of a training sample: none; dataset (``data.label_key``); teacher (the first teacher's argmax)."""
    objective: list[Term] = Field(default_factory=list)
    adversarial: AdversarialSettings | None = None
    """Attacks on the student's images during training; empty: none."""
    optimizer: AnyOptimizer = Field(default_factory=AdamW)
    train: TrainSettings = Field(default_factory=TrainSettings)
    evaluation: EvaluationSettings = Field(default_factory=EvaluationSettings)

    @property
    def terms(self) -> list[Term]:
        """The terms of the objective that have a weight."""
        return [term for term in self.objective if term.weight > 0]

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Self:
        train, terms = self.train, self.terms
        if (train.epochs is None) == (train.steps is None):
            raise InputError(
                f"train.epochs: {train.epochs} with train.steps: {train.steps}; state exactly one of the two"
            )
        stated = [term.model_dump(mode="json", exclude_unset=True) for term in self.objective]
        check(bool(terms), "objective", stated, "at least one term of weight > 0")
        names = [term.term_name for term in terms]
        for name in names:
            check(names.count(name) == 1, "objective", name, "different names; set name in one of the terms")
        check(bool(self.data.shards), "data.shards", self.data.shards, "at least one path or pattern")
        self._check_prompts(terms)
        self._check_teachers(terms)
        needs_clean = [term.term_name for term in terms if term.needs_clean]
        if needs_clean:
            what = f"{needs_clean[0]} compares with clean images, or sees them"
            check(self.adversarial is not None, "adversarial", "none", f"settings of an attack, as {what}")
            others = [term.term_name for term in terms if not term.separable or term.over == "captions"]
            check(not others, "objective", others, f"terms over prompts or images, as {what}")
            both = [term.term_name for term in terms if term.clean and term.is_two_sided]
            check(not both, "objective", both, "clean or two_sided: a two-sided term sees both")
        if self.adversarial is not None:
            against, allowed = self.adversarial.against, [term.term_name for term in terms if attackable(term, "")]
            one = "a term over prompts or images, each sample by itself"
            check(bool(allowed), "adversarial", stated, one)
            check(against in ("", *allowed), "adversarial.against", against, f"{one}: {', '.join(allowed)}")
            sides = [term.is_two_sided for term in terms if attackable(term, against)]
            start = self.adversarial.start
            moves = start != "clean" or not all(sides)
            check(
                moves,
                "adversarial.start",
                start,
                "uniform or normal, as two-sided terms have no gradient at clean images",
            )
        return self

    def _check_prompts(self, terms: Sequence[Term]) -> None:
        if any(term.over == "prompts" for term in terms):
            check(bool(self.prompts), "prompts", self.prompts, "a prompt set, as a term is over prompts")
        if self.labels == "teacher":
            check(bool(self.prompts), "prompts", self.prompts, "a prompt set, as labels are the teacher's argmax")
        for term in terms:
            allowed = f"dataset or teacher, as {term.term_name} needs them"
            check(not term.needs_labels or self.labels != "none", "labels", self.labels, allowed)
        reasons = [] if self.data.sampling is None else [f"data.sampling is {self.data.sampling}"]
        reasons += [f"{term.term_name} has an adjustment" for term in terms if term.needs_class_counts]
        for reason in reasons[:1]:
            drawn = self.data.samples_per_epoch
            check(self.labels == "dataset", "labels", self.labels, f"dataset, as {reason}")
            check(drawn is None, "data.samples_per_epoch", drawn, f"empty, as {reason}")

    def _check_teachers(self, terms: Sequence[Term]) -> None:
        needs_teacher = [term.term_name for term in terms if term.needs_teacher]
        if needs_teacher or self.student.text == "teacher" or self.labels == "teacher":
            what = needs_teacher[0] if needs_teacher else "student.text or labels = teacher"
            check(bool(self.teachers), "teachers", self.teachers, f"at least one, as {what} needs it")
        if self.teacher_cache.folder:
            check(bool(self.teachers), "teachers", self.teachers, "at least one, as teacher_cache.folder needs it")
            check(self.data.views >= 1, "data.views", self.data.views, ">= 1, as teacher_cache.folder needs it")
            sharded = any(teacher.shard for teacher in self.teachers)
            check(not sharded, "teachers.shard", sharded, "false, as teacher_cache.folder needs no teacher in memory")
        tables = [teacher.model for teacher in self.teachers if teacher.model.startswith(EMBEDDINGS)]
        check(
            not tables or bool(self.teacher_cache.folder),
            "teacher_cache.folder",
            self.teacher_cache.folder,
            f"a folder that `clipdistill cache` fills, as {tables} has no model",
        )
        if self.student.text == "teacher":
            adapted = [teacher.model for teacher in self.teachers if teacher.model.startswith((PYTHON, EMBEDDINGS))]
            check(
                not adapted, "student.text", "teacher", f"train or freeze, as {adapted} has no text tower of open_clip"
            )
            number = len(self.teachers)
            check(number == 1, "teachers", number, "exactly one for student.text: teacher")


def load_config(
    path: str | Path | None, overrides: Sequence[str] = (), *, values: Mapping[str, Any] | None = None
) -> Config:
    """Read a YAML config, apply ``dotted.key=value`` overrides, check everything, choose the automatic precision.

    Args:
        path: YAML file; None starts from the defaults.
        overrides: such as ``optimizer.lr=1e-3`` or ``objective.0.gamma=0.5``; the right side is read as YAML.
        values: overrides as Python values, applied before ``overrides``.

    Raises:
        InputError: unreadable file, unknown key (the nearest valid one is named), wrong type, value out of range; a
            chain of stages.
    """
    stated, source = _read_changed(path, overrides, values or {})
    if STAGES in stated:
        raise InputError(f"config {path}: {STAGES}: a chain of runs, which `clipdistill train` runs; allowed: one run")
    return _resolve(stated, source, path)


def load_stages(path: str | Path, overrides: Sequence[str] = ()) -> list[Config]:
    """Read a config that may be a chain of runs: the config of each stage; of a single run, that one.

    ``stages`` is a list of mappings with a ``name`` and any settings, each on top of those of the file and of
    ``overrides``; a list replaces a list. A stage's output is ``OUTPUT/NUMBER-NAME``. As a teacher's ``model`` and as
    ``student.init.from``, ``previous`` is the student of the stage before.

    Raises:
        InputError: as ``load_config``; a stage without a name, or two with the same; ``previous`` in the first one.
    """
    stated, source = _read_changed(path, overrides, {})
    if STAGES not in stated:
        return [_resolve(stated, source, path)]
    stages, texts = stated.pop(STAGES), source.pop(STAGES)
    allowed = "a list of mappings, each with a name of letters, digits, . _ -"
    shown_stages = OmegaConf.to_container(stages) if OmegaConf.is_config(stages) else stages
    named = [_has_name(stage) for stage in stages] if OmegaConf.is_list(stages) else []
    check(bool(named) and all(named), STAGES, shown_stages, allowed)
    names = [str(stage.pop("name")) for stage in stages]
    check(len(set(names)) == len(names), STAGES, names, "different names")
    configs: list[Config] = []
    for number, (name, stage, text) in enumerate(zip(names, stages, texts, strict=True), 1):
        text.pop("name")
        student = f"{configs[-1].output}/{STUDENT_FOLDER}" if configs else ""
        values: Any = OmegaConf.merge(stated, stage)
        texts_of_values: Any = OmegaConf.merge(source, text)
        for part in (values, texts_of_values):
            part.output = str(Path(str(part.get("output", "")), f"{number}-{name}")) if part.get("output") else ""
            _replace_previous(part, student, stage=name)
        try:
            configs.append(_resolve(values, texts_of_values, path))
        except InputError as error:
            raise InputError(f"stage {name}: {error}") from error
    return configs


def _has_name(stage: Any) -> bool:
    return OmegaConf.is_dict(stage) and bool(re.fullmatch(r"[\w.-]+", str(stage.get("name", ""))))


STAGES = "stages"
PREVIOUS = "previous"


def _replace_previous(config: Any, student: str, *, stage: str) -> None:
    """Put the student of the stage before in the place of its name."""
    places = [
        (each, "model", f"local-dir:{student}") for each in config.get("teachers") or [] if OmegaConf.is_dict(each)
    ]
    init = OmegaConf.select(config, "student.init")
    places += [(init, "from", student)] if OmegaConf.is_dict(init) else []
    for holder, key, value in places:
        if holder.get(key) == PREVIOUS:
            check(bool(student), f"stage {stage}: {key}", PREVIOUS, "another model, as there is no stage before")
            holder[key] = value


def _read_changed(path: str | Path | None, overrides: Sequence[str], values: Mapping[str, Any]) -> tuple[Any, Any]:
    """A file with its overrides: its values, unresolved, and these as texts."""
    stated, source = (OmegaConf.create(), OmegaConf.create()) if path is None else _read(path)
    changes = [(key, value, value) for key, value in values.items()]
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise InputError(f"override {override!r}: no '='; allowed: dotted.key=value")
        changes.append((key, *_parse_value(override, text)))
    for key, value, text in changes:
        try:
            with _one_line(key):
                OmegaConf.update(stated, key, value, merge=True)
                OmegaConf.update(source, key, text, merge=True)
        except InputError:
            raise
        except (LookupError, ValueError) as error:
            raise InputError(f"{key}: {error}; allowed: names and numbers with dots between them") from error
    return stated, source


def _resolve(stated: Any, source: Any, path: str | Path | None) -> Config:
    """The config of values, and of these as texts."""
    for key, text in _texts("", OmegaConf.to_container(stated)):
        if "${" in _RESOURCE.sub("", text):
            raise InputError(f"{key}: {text!r} is not allowed; allowed: ${{resource:PATH}}, or text without '${{'")
    with _one_line(path):
        resolved = OmegaConf.to_container(stated, resolve=True)
    return _with_precision(_validate(resolved, source))


def load_saved_config(path: Path) -> Config:
    """Read the config that a run has saved. It is resolved: nothing in it is interpolated.

    Raises:
        InputError: as ``load_config``.
    """
    stated, source = _read(path)
    return _validate(OmegaConf.to_container(stated), source)


def save_config(config: Config, path: Path) -> None:
    """Write the resolved config as YAML, its URLs without credentials, and its local paths absolute: it means the same
    in every working directory."""
    write_text(path, OmegaConf.to_yaml(_map_texts(to_dict(config), _absolute)))


def to_dict(config: Config) -> dict[str, Any]:
    """The resolved config as plain dicts and lists, its URLs without credentials."""
    public: dict[str, Any] = _map_texts(config.model_dump(mode="json"), lambda _, text: shown(text))
    return public


def _map_texts(value: Any, change: Callable[[str, str], str], key: str = "") -> Any:
    """Plain values with each text changed, given its dotted key; items of a list have their list's."""
    if isinstance(value, dict):
        return {name: _map_texts(item, change, f"{key}.{name}" if key else name) for name, item in value.items()}
    if isinstance(value, list):
        return [_map_texts(item, change, key) for item in value]
    return change(key, value) if isinstance(value, str) else value


_NAMES_OR_PATHS = frozenset(
    (
        "prompts",
        "teachers.model",
        "teachers.pretrained",
        "student.model",
        "student.pretrained",
        "student.text_model",
        "student.init.from",
    )
)
_NAMES = {"student.init.from": TEACHER}
"""Texts that are a name, whatever files there are."""
_PATHS = _NAMES_OR_PATHS | {
    "output",
    "data.shards",
    "data.cache",
    "teacher_cache.folder",
    "evaluation.folders",
    "evaluation.class_counts",
}


def _absolute(key: str, text: str) -> str:
    """A local path as an absolute one; other texts unchanged."""
    if key not in _PATHS or text in ("", _NAMES.get(key)) or is_remote(text) or "://" in text:
        return text
    prefix, _, rest = text.partition(":")
    if prefix in ("local-dir", "embeddings"):
        return f"{prefix}:{_from_root(rest)}"
    if key in _NAMES_OR_PATHS and (text in shipped_prompt_sets() or not expand(text).exists()):
        return text
    return _from_root(text)


def _from_root(path: str) -> str:
    return os.path.abspath(expand(path))  # noqa: PTH100 (Path.resolve would follow links)


_SHOWN = 80
_RESOURCE = re.compile(r"\$\{resource:[^${}]*\}")


def _read(path: str | Path) -> tuple[Any, Any]:
    """Parse a YAML mapping, with its interpolations unresolved: its values, and these as the texts that stand there."""
    text = read_text(Path(path), what="config")
    try:
        with _one_line(path):
            stated = OmegaConf.load(io.StringIO(text))
            source = yaml.load(text, yaml.BaseLoader)
    except (YAMLError, OSError, ValueError, RecursionError) as error:
        detail = " ".join(str(error).split())
        kind = "YAML" if isinstance(error, YAMLError) else "a mapping of config keys"
        raise InputError(f"config {path}: not {kind}: {detail[:300]}") from error
    if not OmegaConf.is_dict(stated):
        raise InputError(f"{path}: a {type(stated).__name__}; allowed: a mapping of config keys")
    return stated, OmegaConf.create(source or {})


@contextmanager
def _one_line(source: str | Path | None) -> Iterator[None]:
    """Convert OmegaConf's errors to one line that names the key or the file."""
    try:
        yield
    except (OmegaConfBaseException, TypeError, AttributeError) as error:
        raise InputError(f"{source}: {(str(error).splitlines() or [type(error).__name__])[0]}") from error


def _texts(key: str, value: Any) -> Iterator[tuple[str, str]]:
    """All texts in a value, with their dotted keys."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict | list):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _texts(f"{key}.{name}" if key else str(name), item)


def _with_precision(config: Config) -> Config:
    """The config with the precisions that ``auto`` stands for on this machine: a run keeps them wherever it resumes."""
    train = config.train.model_copy(update={"precision": chosen_precision(config.train.precision)})
    teachers = [
        teacher.model_copy(update={"precision": chosen_precision(teacher.precision)}) for teacher in config.teachers
    ]
    return config.model_copy(update={"train": train, "teachers": teachers})


def _validate(values: Any, source: Any) -> Config:
    return validate(Config, {str(name): value for name, value in values.items()}, source=OmegaConf.to_container(source))


def _parse_value(override: str, text: str) -> tuple[Any, Any]:
    """The value of an override, and the same as texts. A text that is not in quotes is taken whole: ``#`` begins no
    comment."""
    try:
        value: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
        source = yaml.load(text, yaml.BaseLoader)
        if isinstance(source, str) and not text.lstrip().startswith(("'", '"')):
            source = text.strip()
            value = {"value": source} if isinstance(value["value"], str) else value
        return value["value"], source
    except (YAMLError, OmegaConfBaseException, ValueError) as error:  # ValueError: a number of thousands of digits
        detail = " ".join(str(error).split())
        raise InputError(
            f"override {override[:_SHOWN]!r}: the value is not YAML: {detail[:300]}; "
            "allowed: YAML, such as a.b=[1, 'x']"
        ) from error


_FREE_ON_RESUME = frozenset(
    (
        "output",
        "evaluation",
        "data.cache",
        "teacher_cache.folder",
        "teacher_cache.pixels",
        "data.workers",
        "data.worker_timeout",
        "data.max_bad_share",
        "data.batch_size",
        "teachers.shard",
        "teachers.compile",
        "student.grad_checkpointing",
        "student.compile",
        *(f"train.{name}" for name in ("accumulate", "teacher_micro_batches", "log_every", "evaluate_every")),
        *(f"train.{name}" for name in ("save_every", "keep", "keep_best", "best_metric", "rank_timeout", "trace")),
        *(f"train.{name}" for name in ("threads", "trackers")),
    )
)
"""Settings that change no result, and the factors of the global batch, whose product the trainer checks."""

_BY_CONTENT = _NAMES_OR_PATHS | {"data.shards"}
"""Names and places of files: what is in them is compared, wherever it is."""


def settings_of_result(config: Config) -> dict[str, Any]:
    """The settings that determine a run's result, without names and places of files."""
    settings: dict[str, Any] = _without(to_dict(config), _FREE_ON_RESUME | _BY_CONTENT, "")
    return settings


def _without(value: Any, left_out: frozenset[str], key: str) -> Any:
    """Plain values without some dotted keys; those of a list's items have no number."""
    if isinstance(value, list):
        return [_without(item, left_out, key) for item in value]
    if not isinstance(value, dict):
        return value
    names = {name: f"{key}.{name}" if key else name for name in value}
    return {name: _without(value[name], left_out, path) for name, path in names.items() if path not in left_out}
