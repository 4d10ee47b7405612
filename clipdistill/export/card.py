"""The model card: ``README.md`` and ``.eval_results/*.yaml``, from the run and the export's measurements."""

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import open_clip
import yaml  # type: ignore[import-untyped]
from huggingface_hub import (
    EvalResult,
    EvalResultEntry,
    ModelCard,
    ModelCardData,
    eval_result_entries_to_yaml,
    try_to_load_from_cache,
)
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from clipdistill import __version__
from clipdistill.errors import InputError
from clipdistill.evaluation.benchmark_format import main_metric
from clipdistill.evaluation.robustness import TASK as ROBUSTNESS
from clipdistill.evaluation.tasks import ATTACK_TASK, ZeroShotClassification, ZeroShotRetrieval
from clipdistill.export.build import Exported
from clipdistill.io.files import write_text
from clipdistill.io.jsonl import read_jsonl
from clipdistill.io.run_files import CONFIG_FILE, IDENTITY_FILE, METRICS_FILE, STUDENT_FOLDER, SUMMARY_FILE
from clipdistill.losses import Loss, Paper, Term
from clipdistill.models.initialisation import TEACHER
from clipdistill.models.prompts import PromptSet, load_prompts
from clipdistill.models.timm_towers import is_timm
from clipdistill.models.towers import Tower
from clipdistill.settings import validate

CARD_FILE = "README.md"
RESULTS_FOLDER = ".eval_results"
UNKNOWN = "unknown"

_TASK_TYPES = {
    ZeroShotClassification.name: "zero-shot-image-classification",
    ZeroShotRetrieval.name: "image-text-retrieval",
    ATTACK_TASK: "zero-shot-image-classification",
    ROBUSTNESS: "zero-shot-image-classification",
    "linear_probe": "image-classification",
}
"""A record's task -> its type in the metadata; the Hub's own task list has no image-text retrieval."""

_SHOWN_TEMPLATES = 3


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """A model's training, as far as known; everything may be missing.

    Attributes:
        name: of the run's folder, or of the model if there is no run.
        config: the resolved config.
        prompts: its class names and templates.
        summary: ``summary.json``.
        records: of ``metrics.jsonl``.
    """

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    prompts: PromptSet | None = None
    summary: Mapping[str, Any] = field(default_factory=dict)
    records: Sequence[Mapping[str, Any]] = ()

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """CLIP_benchmark's records of the final model."""
        return list(self.summary.get("evaluations", ()))

    @property
    def terms(self) -> list[Loss]:
        """The terms of the objective with a weight above 0."""
        terms = [validate(Term, term, at=f"objective.{n}") for n, term in enumerate(self.config.get("objective") or [])]
        return [term for term in terms if term.weight > 0]

    @property
    def last_record(self) -> Mapping[str, Any]:
        """The last record of the training log."""
        return next((record for record in reversed(self.records) if "loss" in record), {})


def read_run(checkpoint: str) -> TrainedRun:
    """Read config, summary and metrics beside a checkpoint: in its folder, or in the run's if it is a ``student/``."""
    folder = Path(checkpoint)
    candidates = [folder, *([folder.parent] if folder.name == STUDENT_FOLDER else [])]
    found = next((path for path in candidates if (path / CONFIG_FILE).is_file()), None)
    name = folder.resolve().name if folder.is_dir() else checkpoint.rstrip("/").rsplit("/", 1)[-1]
    if found is None:
        return TrainedRun(name=name)
    try:
        config = yaml.safe_load((found / CONFIG_FILE).read_text(encoding="utf-8"))
        summary_file = found / SUMMARY_FILE
        summary = json.loads(summary_file.read_text(encoding="utf-8")) if summary_file.is_file() else {}
        identity_file = found / IDENTITY_FILE
        identity = json.loads(identity_file.read_text(encoding="utf-8")) if identity_file.is_file() else {}
    except (ValueError, yaml.YAMLError) as error:
        detail = " ".join(str(error).split())
        raise InputError(
            f"checkpoint {checkpoint}: config.yaml, identity.json or summary.json is damaged: {detail}"
        ) from error
    return TrainedRun(
        name=found.resolve().name,
        config=config if isinstance(config, dict) else {},
        prompts=_recorded_prompts(identity),
        summary=summary,
        records=read_jsonl(found / METRICS_FILE),
    )


def _recorded_prompts(identity: Any) -> PromptSet | None:
    """The prompts in a run's record of what it was made of."""
    prompts = identity.get("prompts") if isinstance(identity, dict) else None
    if not isinstance(prompts, dict):
        return None
    return PromptSet(
        name="of the run",
        classnames=tuple(prompts["classnames"]),
        templates=tuple(prompts["templates"]),
        duplicates=True,
    )


@dataclass(frozen=True, kw_only=True)
class UserMetadata:
    """Card metadata that only the user knows.

    Attributes:
        license: of the exported weights, as the Hub writes it.
        datasets: Hub ids of the training data.
        benchmarks: name of an evaluation set -> Hub id of its benchmark, or ``OWNER/NAME:TASK_ID``.
    """

    license: str = UNKNOWN
    datasets: Sequence[str] = ()
    benchmarks: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for repo_id in (*self.datasets, *(benchmark.partition(":")[0] for benchmark in self.benchmarks.values())):
            check_repo_id("data set", repo_id)


def check_repo_id(what: str, repo_id: str) -> None:
    """Raise ``InputError`` unless a name is a complete repo id of the Hub."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"{what} {repo_id!r}: {' '.join(str(error).split())}; allowed: OWNER/NAME") from error
    if repo_id.count("/") != 1:
        raise InputError(f"{what} {repo_id!r}: no owner; allowed: OWNER/NAME")


def write_card(
    folder: Path,
    tower: Tower,
    exported: Exported,
    run: TrainedRun,
    *,
    results: Sequence[Mapping[str, Any]] = (),
    user_metadata: UserMetadata | None = None,
    prompts: PromptSet | None = None,
    half: bool = False,
    repo_id: str | None = None,
) -> None:
    """Write ``README.md`` and ``.eval_results/*.yaml`` into an export.

    Args:
        folder: holds the export.
        tower: the model.
        exported: formats and measurements.
        run: how it was trained.
        results: further results of the model: details, as ``clipdistill evaluate`` stores them.
        user_metadata: given by the user.
        prompts: classes and templates of the classifier, and of the examples.
        half: whether the weights are in float16.
        repo_id: future repo on the Hub; None: the examples load from the folder itself.
    """
    user_metadata = user_metadata or UserMetadata()
    name = repo_id.partition("/")[2] if repo_id else run.name
    teachers = [_teacher(teacher) for teacher in run.config.get("teachers") or []]
    measured = [part for record in run.evaluations for part in _by_task(record, run.config)] + list(results)
    sets = [_evaluated(details, run.config) for details in measured]
    entries = {
        item["dataset"]: _leaderboard_entry(details["record"], item, user_metadata)
        for details, item in zip(measured, sets, strict=True)
        if details["record"]["task"].startswith("zeroshot_")
    }
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["json"] = lambda value: json.dumps(value, ensure_ascii=False)
    environment.filters["time"] = _time
    body = environment.get_template("card.md").render(
        name=name,
        version=__version__,
        model=_model(tower),
        half=half,
        teachers=teachers,
        user_metadata=user_metadata,
        data=_data(run.config),
        prompts=prompts,
        objective=[_term(term) for term in run.terms],
        settings=_settings(run),
        losses={k: v for k, v in run.last_record.items() if k.startswith("loss") and isinstance(v, int | float)},
        sets=sets,
        measured_later=bool(results),
        exported=exported,
        examples=_examples(tower, prompts, repo_id),
        papers=_papers(run.terms),
        unknown=UNKNOWN,
    )
    start = _timm_repository(run.config.get("student") or {})
    bases = [*(teacher["hub_id"] for teacher in teachers), start]
    metadata = _metadata(name, user_metadata, [base for base in bases if base], teachers, sets, exported)
    write_text(folder / CARD_FILE, str(ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{body}")))
    for dataset, entry in entries.items():
        if entry:
            path = folder / RESULTS_FOLDER / f"{re.sub(r'[^A-Za-z0-9._-]', '_', dataset)}.yaml"
            path.parent.mkdir(exist_ok=True)
            write_text(path, yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False))


def _time(milliseconds: Mapping[str, float], *parts: str) -> str:
    return next((f"{milliseconds[part]:.2f}" for part in parts if part in milliseconds), "")


def _metadata(
    name: str,
    user_metadata: UserMetadata,
    bases: Sequence[str],
    teachers: Sequence[Mapping[str, Any]],
    sets: Sequence[Mapping[str, Any]],
    exported: Exported,
) -> ModelCardData:
    results = [
        EvalResult(
            task_type=item["task_type"],
            task_name=item["task"],
            dataset_type=user_metadata.benchmarks.get(item["dataset"], item["dataset"]).partition(":")[0],
            dataset_name=item["dataset"],
            # the Hub takes results with one task type, data set and configuration for one task
            dataset_config=None if item["task"].startswith("zero-shot") else item["task"],
            metric_type="accuracy" if metric.startswith("acc") else metric,
            metric_name=metric,
            metric_value=round(value, 6),
        )
        for item in sets
        for metric, value in item["metrics"].items()
    ]
    return ModelCardData(
        library_name="open_clip",
        pipeline_tag="zero-shot-image-classification",
        license=user_metadata.license,
        base_model=list(dict.fromkeys(bases)) or None,
        datasets=list(user_metadata.datasets) or None,
        tags=[
            "clip",
            "clipdistill",
            *(["knowledge-distillation"] if teachers else []),
            *(["onnx"] if "onnx" in exported.formats else []),
        ],
        model_name=name,
        eval_results=results or None,
    )


def _leaderboard_entry(
    record: Mapping[str, Any], item: Mapping[str, Any], user_metadata: UserMetadata
) -> EvalResultEntry | None:
    """A set's result in the format of the benchmark's leaderboard; None unless the user has named the benchmark."""
    benchmark = user_metadata.benchmarks.get(item["dataset"])
    if benchmark is None:
        return None
    dataset_id, _, task_id = benchmark.partition(":")
    metric, value = main_metric(record)
    notes = f"{item['task']}, {metric}" + (f", {item['prompts']}" if item["prompts"] else "")
    return EvalResultEntry(dataset_id=dataset_id, task_id=task_id or "default", value=round(value, 6), notes=notes)


def _teacher(config: Mapping[str, Any]) -> dict[str, Any]:
    """A teacher's public name and share, with its Hub repo and licence if known."""
    model, pretrained = config["model"], config.get("pretrained") or ""
    schema, _, rest = model.partition(":")
    hub_id, card = None, None
    if schema == "hf-hub":
        hub_id = rest
    elif schema in ("local-dir", "embeddings"):
        card = Path(rest) / CARD_FILE
        model = f"{schema}:{Path(rest).name}"
    elif Path(model).is_absolute():
        card, model = Path(model) / CARD_FILE, Path(model).name
    elif pretrained:
        known = open_clip.get_pretrained_cfg(model, pretrained) or {}
        hub_id = "/".join(known.get("hf_hub", "").split("/")[:2]) or None
    if hub_id:
        cached = try_to_load_from_cache(hub_id, CARD_FILE)
        card = Path(cached) if isinstance(cached, str) else None
    pretrained = Path(pretrained).name if "/" in pretrained else pretrained
    return {
        "model": model,
        "pretrained": pretrained,
        "hub_id": hub_id,
        "license": _license_of(card),
        "weight": config.get("weight", 1.0),
    }


def _license_of(card: Path | None) -> str:
    if card is None or not card.is_file():
        return UNKNOWN
    return ModelCard.load(card, ignore_metadata_errors=True).data.license or UNKNOWN


def _model(tower: Tower) -> dict[str, Any]:
    vision, text = tower.model_config["vision_cfg"], tower.model_config["text_cfg"]
    image_parameters = sum(parameter.numel() for parameter in tower.clip.visual.parameters())
    all_parameters = sum(parameter.numel() for parameter in tower.clip.parameters())
    if "timm_model_name" in vision:
        image = f"timm's {vision['timm_model_name']}"
    elif isinstance(vision["layers"], list | tuple):
        image = f"a ResNet of width {vision['width']}"
    else:
        image = f"a vision transformer of {vision['layers']} layers, width {vision['width']}"
        image += f", patches of {vision['patch_size']} pixels"
    words = text.get("hf_model_name") or f"a transformer of {text.get('layers', 12)} layers, width {text.get('width')}"
    return {
        "image": image,
        "pixels": " x ".join(map(str, reversed(tower.image_size))),
        "image_parameters": image_parameters / 1e6,
        "text": words,
        "context_length": tower.tokenizer.context_length,
        "text_parameters": (all_parameters - image_parameters) / 1e6,
        "embed_dim": tower.embed_dim,
        "logit_scale": tower.clip.logit_scale.exp().item(),
    }


def _data(config: Mapping[str, Any]) -> dict[str, Any] | None:
    data = config.get("data")
    if not data:
        return None
    return {
        "shards": [_public(str(url)) for url in data.get("shards") or []],
        "prompts": _public(config.get("prompts") or ""),
        "labels": config.get("labels", "none"),
    }


def _public(path: str) -> str:
    """A path or URL without private parts: the last two names of a path, no user, no signature."""
    if "://" in path:
        parts = urlsplit(path)
        return f"{parts.scheme}://{parts.hostname or ''}{parts.path}"
    return "/".join(Path(path).parts[-2:])


def _term(term: Loss) -> dict[str, Any]:
    return {
        "loss": term.loss,
        "over": term.over,
        "weight": term.weight,
        "settings": ", ".join(f"{key} {value}" for key, value in term.notable_settings.items()),
    }


def _start_of(student: Mapping[str, Any]) -> str:
    """The weights that a student started from."""
    init = student.get("init") or {}
    if init.get("from"):
        source = "the teacher" if init["from"] == TEACHER else Path(init["from"]).name
        towers = "" if init.get("towers") == "both" else f" ({init.get('towers')} tower)"
        return f"weights of {source}{towers}, {init.get('layers')} layers, {init.get('width')} channels"
    if str(student.get("model", "")).startswith(("hf-hub:", "local-dir:")):
        return "its own weights"
    return "pretrained weights" if student.get("pretrained") else "random weights"


def _timm_repository(student: Mapping[str, Any]) -> str | None:
    """The Hub's repository of the timm weights that a student started from; None of others, or of a file."""
    model, pretrained = str(student.get("model", "")), str(student.get("pretrained") or "")
    if not is_timm(model) or not pretrained or "/" in pretrained:
        return None
    return f"{model.partition('.')[0]}.{pretrained}"


def _settings(run: TrainedRun) -> dict[str, Any]:
    """Rows of the settings table; empty without a config."""
    if not run.config:
        return {}
    config = run.config
    optimizer, training, student = (config.get(key) or {} for key in ("optimizer", "train", "student"))
    start = _start_of(student)
    rate = f"{optimizer.get('lr')}, {optimizer.get('warmup_steps', 0)} steps of warm-up, then a cosine"
    speeds = [r["samples_per_second"] for r in run.records if "samples_per_second" in r]
    rows = {
        "student": f"{_public(str(student.get('model', UNKNOWN)))}, from {start}, text tower: {student.get('text')}",
        "steps": run.summary.get("steps") or run.last_record.get("step") or UNKNOWN,
        "batch": f"{(config.get('data') or {}).get('batch_size')} a process x {training.get('accumulate', 1)}",
        "AdamW": f"rate {rate}; weight decay {optimizer.get('weight_decay')}, betas {optimizer.get('betas')}",
        "precision": training.get("precision"),
        "moving average": training.get("ema") or "off",
        "seed": config.get("seed"),
    }
    if speeds:
        rows["samples a second"] = f"{sorted(speeds)[len(speeds) // 2]:.0f} (median of the log)"
    skipped = run.summary.get("skipped")
    if skipped:
        rows["bad samples"] = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
    return rows


def _by_task(record: Mapping[str, Any], config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A run's record as details: clean and, if its images were attacked too, under attack."""
    robust = {name: value for name, value in record["metrics"].items() if name.startswith("robust_")}
    clean = {name: value for name, value in record["metrics"].items() if name not in robust}
    parts: list[dict[str, Any]] = [{"record": {**record, "metrics": clean}}]
    attack = (config.get("evaluation") or {}).get("attack")
    if robust and attack:
        of_attack = {"record": {**record, "task": ATTACK_TASK, "metrics": robust}, "attack": attack}
        parts.append({**of_attack, "samples": f"up to {attack['images']:,}"})
    return parts


def _evaluated(details: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """A data set's metrics, and a description of its prompts if its folder still exists."""
    record, task = details["record"], details["record"]["task"].replace("zeroshot", "zero-shot").replace("_", " ")
    if attack := details.get("attack"):
        samples = details["samples"]
        images = f"{samples:,}" if isinstance(samples, int) else samples
        task += f" ({attack['attack'].upper()}, {attack['norm']}, {images} images)"
    metrics = {k: v for k, v in record["metrics"].items() if isinstance(v, int | float) and not isinstance(v, bool)}
    folders = (config.get("evaluation") or {}).get("folders") or []
    folder = next((path for path in folders if Path(path).name == record["dataset"] and Path(path).is_dir()), None)
    prompts = ""
    if folder is not None:
        with contextlib.suppress(InputError):
            prompts = _describe_prompts(load_prompts(Path(folder), allow_duplicates=True))
    return {
        "dataset": record["dataset"],
        "task": task,
        "task_type": _TASK_TYPES[record["task"]],
        "metrics": metrics,
        "prompts": prompts,
    }


def _describe_prompts(prompts: PromptSet) -> str:
    shown = ", ".join(f'"{template}"' for template in prompts.templates[:_SHOWN_TEMPLATES])
    more = prompts.num_templates - _SHOWN_TEMPLATES
    return f"{prompts.num_classes} classes, {shown}" + (f" and {more} more templates" if more > 0 else "")


def _examples(tower: Tower, prompts: PromptSet | None, repo_id: str | None) -> dict[str, Any]:
    labels = list(prompts.classnames[:3]) if prompts else ["a cat", "a dog", "a car"]
    template = prompts.templates[0] if prompts else "a photo of {c}"
    preprocessing = open_clip.get_model_preprocess_cfg(tower.clip)
    return {
        "repo_id": repo_id,
        "labels": labels,
        "template": template,
        "bilinear": preprocessing["interpolation"] == "bilinear",
        "resize_mode": preprocessing["resize_mode"],
    }


def _papers(terms: Sequence[Loss]) -> list[Paper]:
    return list(dict.fromkeys(paper for term in terms for paper in term.papers))
