"""A run as one self-contained HTML file: curves, accuracy against the teacher, calibration, confusions, examples.

Shapes: N samples of a set, C classes.
"""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image

from clipdistill.config import Config, load_saved_config, to_dict
from clipdistill.errors import InputError
from clipdistill.evaluation import EvaluationSet, Predictions, classification_metrics, load_for_evaluation
from clipdistill.evaluation.agreement import class_gains
from clipdistill.evaluation.attack import ROBUST
from clipdistill.evaluation.benchmark_format import MEAN
from clipdistill.evaluation.calibration import expected_calibration_error, reliability
from clipdistill.evaluation.classification import Metrics, recall_per_class
from clipdistill.evaluation.evaluate import Evaluator, zero_shot
from clipdistill.evaluation.models import fingerprint
from clipdistill.evaluation.results import results_of
from clipdistill.evaluation.sets.open import open_sets
from clipdistill.evaluation.shots import head_to_tail
from clipdistill.evaluation.tasks import ATTACK_TASK
from clipdistill.io.files import output_file, write_text, writing
from clipdistill.io.jsonl import read_jsonl
from clipdistill.io.packages import require
from clipdistill.io.paths import expand
from clipdistill.io.run_files import CONFIG_FILE, METRICS_FILE, STUDENT_FOLDER
from clipdistill.io.urls import is_remote
from clipdistill.models.adapted import PYTHON
from clipdistill.models.embedding_table import EMBEDDINGS
from clipdistill.models.loading import TeacherSettings
from clipdistill.report.html import plot_div, render_page

_CLASSES_SHOWN = 24
_THUMBNAIL = 112
_COLOURS = {"student": "#2a6fdb", "teacher": "#e08a1e"}
_KINDS = (
    ("only the student is right", lambda student, teacher: student & ~teacher),
    ("only the teacher is right", lambda student, teacher: ~student & teacher),
    ("both are wrong", lambda student, teacher: ~student & ~teacher),
    ("both are right", lambda student, teacher: student & teacher),
)


@dataclass(frozen=True, kw_only=True)
class SetComparison:
    """A test set with the results of student and teacher; the teacher may be missing.

    Attributes:
        data: the set.
        metrics: by role, ``student`` or ``teacher``.
        predictions: by role; empty for a set without single labels.
    """

    data: EvaluationSet
    metrics: Mapping[str, Metrics]
    predictions: Mapping[str, Predictions]


def write_report(
    run: Path,
    *,
    output: Path | None = None,
    data: Sequence[str] = (),
    results: Sequence[Path] = (),
    with_teacher: bool = True,
    remote: bool = False,
    examples: int = 24,
    batch_size: int = 256,
    workers: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[str], None] = lambda _: None,
) -> Path:
    """Write a run's report: one file that includes its scripts and images, readable offline.

    Args:
        run: folder of a finished or unfinished run; without a student the report has curves only.
        output: the file; by default ``RUN/report.html``.
        data: test sets, as for ``open_set``; by default those of the run's config.
        results: folders of ``clipdistill evaluate --output``, whose results of the student under attack are shown.
        with_teacher: also evaluate the run's first teacher.
        remote: also open what the run's config names on other machines. A run may come from anywhere: by default
            nothing is fetched because its config says so, and the report lists what it leaves out.
        examples: number of test images shown for each set.
        batch_size: images at once.
        workers: threads that decode images; 0: one per core.
        device: where the models run.
        progress: called with a description of each step, before it.

    Returns:
        The file.

    Raises:
        InputError: the folder holds no run, a test set is damaged, ``results`` hold none of the student, or plotly is
            not installed.
        RunError: the file could not be written.
    """
    require("report", "jinja2", "plotly", extra="report")
    records = read_jsonl(run / METRICS_FILE)
    if not records or not (run / CONFIG_FILE).is_file():
        raise InputError(f"run {run}: no {CONFIG_FILE} and {METRICS_FILE} with a record; allowed: the folder of a run")
    path = output or run / "report.html"
    try:
        output_file(path)
    except InputError as error:
        raise InputError(f"--output {error}") from error
    if not path.parent.is_dir():
        raise InputError(f"--output {path}: no folder {path.parent}; allowed: a file in an existing folder")
    config = load_saved_config(run / CONFIG_FILE)
    settings = config.evaluation
    cache = expand(config.data.cache)
    teacher = config.teachers[0] if with_teacher and config.teachers else None
    left_out = []
    for prefix, why in ((PYTHON, "its code is not run for a report"), (EMBEDDINGS, "it has no model")):
        if teacher is not None and teacher.model.startswith(prefix):
            progress(f"left out teacher {teacher.model}: {why}")
            teacher = None
    if not remote:
        left_out = [f"test set {folder}" for folder in settings.folders if not data and is_remote(folder)]
        if teacher is not None and _is_fetched(teacher):
            left_out.append(f"teacher {teacher.model} {teacher.pretrained}".strip())
            teacher = None
    for what in left_out:
        progress(f"left out {what}: on another machine (--remote fetches it)")
    folders = [folder for folder in data or settings.folders if data or remote or not is_remote(folder)]
    sets = open_sets(folders, settings, cache=cache, counts_must_fit=not data)
    steps = [record for record in records if "loss" in record]
    evaluations = [record for record in records if MEAN in record]

    attacked = _results_under_attack(run, results, device) if results else []
    comparisons: list[SetComparison] = []
    if sets and (run / STUDENT_FOLDER).is_dir():
        names = {"student": (str(run), "")}
        if teacher is not None:
            names["teacher"] = (teacher.model, teacher.pretrained)
        models: dict[str, Evaluator] = {}
        for role, (model, pretrained) in names.items():
            progress(f"load the {role}")
            tower = load_for_evaluation(model, pretrained, device=device)
            models[role] = Evaluator(tower, batch_size=batch_size, workers=workers, device=device)
        for test_set in sets:
            progress(f"evaluate {test_set.name}")
            comparisons.append(_compare(test_set, models))
    progress("draw")
    html = render_page(
        "clipdistill.report",
        name=run.resolve().name,
        summary=_summary(config, steps),
        curves=_curves(steps, evaluations) if steps else [],
        sets=[_set_section(comparison, examples) for comparison in comparisons],
        attacks=_attacks(attacked),
        why_no_sets="" if comparisons else _why_no_sets(sets, run),
        left_out=left_out,
        config=OmegaConf.to_yaml(to_dict(config)),
    )
    with writing(f"report {path}", path.parent):
        write_text(path, html)
    return path


def _compare(data: EvaluationSet, models: Mapping[str, Evaluator]) -> SetComparison:
    if data.kind != "classification":
        metrics = {role: zero_shot(model, data, temperature=False)[0] for role, model in models.items()}
        return SetComparison(data=data, metrics=metrics, predictions={})
    predictions = {role: model.predictions(data) for role, model in models.items()}
    measure = partial(classification_metrics, class_counts=data.class_counts)
    metrics = {"student": measure(predictions["student"], predictions.get("teacher"))}
    if "teacher" in predictions:
        metrics["teacher"] = measure(predictions["teacher"])
    return SetComparison(data=data, metrics=metrics, predictions=predictions)


def _is_fetched(teacher: TeacherSettings) -> bool:
    """Whether open_clip may fetch a teacher's weights: from a repository, or those of a tag."""
    return is_remote(teacher.model) or bool(teacher.pretrained and not Path(teacher.pretrained).exists())


def _why_no_sets(sets: Sequence[EvaluationSet], run: Path) -> str:
    if not sets:
        return "The run's config names no test set on this machine; give one with --data."
    return f"The run has not ended: {run.name} holds no student yet."


# Summary of the run.


def _summary(config: Config, steps: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    teachers = [f"{t.model} {t.pretrained}".strip() for t in config.teachers]
    terms = [f"{t.weight:g} x {t.loss} over {t.over}" for t in config.objective if t.weight > 0]
    rows = [
        ("teacher", ", ".join(teachers) or "none"),
        ("student", f"{config.student.model} (text: {config.student.text})"),
        ("prompts", config.prompts or "none"),
        ("objective", " + ".join(terms)),
    ]
    if steps:
        last = steps[-1]
        rows += [
            ("steps", f"{last['step']:,}"),
            ("last loss", f"{last['loss']:.4g}"),
            ("samples/s, median", f"{np.median([record['samples_per_second'] for record in steps]):,.0f}"),
            ("waiting for data, median", f"{np.median([record['data_wait_share'] for record in steps]):.1%}"),
        ]
        skipped = {name.partition("/")[2]: int(n) for name, n in last.items() if name.startswith("skipped/")}
        rows.append(("bad samples", ", ".join(f"{n:,} {reason}" for reason, n in skipped.items()) or "none"))
    return rows


# Training.


def _curves(steps: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    def lines(prefix: str) -> dict[str, str]:
        names = dict.fromkeys(name for record in steps for name in record if name.startswith(prefix))
        return {name: name.removeprefix(prefix) for name in names}

    curves = [
        _lines("Loss", steps, {"loss": "weighted total", **lines("loss/")}, log=True),
        _lines("Share of the gradient at the image features", steps, lines("gradient_share/"), stack=True),
        _lines("Gradient norm", steps, {"grad_norm": "before clipping"}, log=True),
        _lines("Learning rate", steps, {"lr": "learning rate"}),
        _lines("Logit scale", steps, {"logit_scale": "student"}),
        _lines("Throughput, samples/s", steps, {"samples_per_second": "all ranks"}),
        _lines("Share of the time spent waiting for data", steps, {"data_wait_share": "mean over ranks"}, percent=True),
    ]
    sets = dict.fromkeys(name for record in evaluations for name in record if name.endswith("/acc1"))
    if evaluations:
        names = {name: name.removeprefix("evaluation/").removesuffix("/acc1") for name in sets}
        curves.append(_lines("Zero-shot top-1", evaluations, names, percent=True, markers=True))
        robust = [
            name for name in dict.fromkeys(name for record in evaluations for name in record) if name.endswith(ROBUST)
        ]
        names = {name: name.removeprefix("evaluation/").removesuffix(ROBUST) for name in robust}
        curves.append(_lines("Zero-shot top-1 under attack", evaluations, names, percent=True, markers=True))
    return [curve for curve in curves if curve["plot"]]


def _lines(
    title: str,
    records: Sequence[Mapping[str, Any]],
    names: Mapping[str, str],
    *,
    log: bool = False,
    stack: bool = False,
    percent: bool = False,
    markers: bool = False,
) -> dict[str, str]:
    from plotly import graph_objects as go

    figure = go.Figure()
    for name, label in names.items():
        points = [(record["step"], record[name]) for record in records if record.get(name) is not None]
        if points:
            x, y = zip(*points, strict=True)
            figure.add_scatter(
                x=x, y=y, name=label, mode="lines+markers" if markers else "lines", stackgroup="all" if stack else None
            )
    if not figure.data:
        return {"title": title, "plot": ""}
    positive = all(value > 0 for trace in figure.data for value in trace.y)
    figure.update_yaxes(type="log" if log and positive else "linear", tickformat=".0%" if percent or stack else None)
    figure.update_xaxes(title="step")
    return {"title": title, "plot": plot_div(figure)}


# Under attack.


def _results_under_attack(run: Path, folders: Sequence[Path], device: torch.device | str) -> list[dict[str, Any]]:
    if not (run / STUDENT_FOLDER).is_dir():
        raise InputError(f"--results: {run} holds no student yet; allowed: a finished run")
    student = fingerprint(load_for_evaluation(str(run), "", device=device))
    found = results_of(folders, student, flag="--results")
    attacked = [details for details in found if details["record"]["task"] == ATTACK_TASK]
    if not attacked:
        raise InputError(
            f"--results {folders[0]}: no result of `clipdistill evaluate --attack`; allowed: folders with one of this "
            "run"
        )
    return attacked


def _attacks(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each set, the accuracy by the attack's radius, and the classes that lose most."""
    from plotly import graph_objects as go

    found = []
    for details in results:
        attack, metrics = details["attack"], details["record"]["metrics"]
        accuracies = {"0": metrics["acc1"]} | {each: metrics[f"robust_acc1@{each}"] for each in attack["radii"]}
        figure = go.Figure(go.Scatter(x=list(accuracies), y=list(accuracies.values()), mode="lines+markers"))
        figure.update_xaxes(title=f"radius ({attack['norm']}, pixels from 0 to 1)", type="category")
        figure.update_yaxes(title="zero-shot top-1", tickformat=".0%", rangemode="tozero")
        last = attack["radii"][-1]
        losses = sorted(details["classes"], key=lambda each: each["robust_recall"][last] - each["recall"])
        worst = losses[:_CLASSES_SHOWN][::-1]
        classes = go.Figure(
            go.Bar(
                x=[each["robust_recall"][last] - each["recall"] for each in worst],
                y=[each["name"] for each in worst],
                orientation="h",
            )
        )
        classes.update_xaxes(tickformat="+.0%", title=f"recall at {last} - recall of clean images")
        classes.update_layout(height=120 + 20 * len(worst))
        found.append(
            {
                "title": f"{details['record']['dataset']} under attack: {attack['attack'].upper()}, "
                f"{details['samples']:,} images",
                "rows": [(radius, f"{accuracy:.2%}") for radius, accuracy in accuracies.items()],
                "plots": [
                    {"title": "Accuracy by radius", "plot": plot_div(figure)},
                    {"title": "Classes that lose most", "plot": plot_div(classes)},
                ],
            }
        )
    return found


# A test set.


def _set_section(comparison: SetComparison, examples: int) -> dict[str, Any]:
    names = list(dict.fromkeys(name for values in comparison.metrics.values() for name in values))
    shown = {role: {name: values.get(name) for name in names} for role, values in comparison.metrics.items()}
    plots = []
    if comparison.predictions:
        plots = [_reliability(comparison), _confusion(comparison)]
        if comparison.data.class_counts is not None:
            plots.insert(0, _head_to_tail(comparison, comparison.data.class_counts))
    if "teacher" in comparison.predictions:
        plots.insert(0, _gains(comparison))
    return {
        "name": comparison.data.name,
        "samples": len(comparison.data),
        "classes": comparison.data.prompts.num_classes,
        "names": names,
        "metrics": shown,
        "kept": comparison.metrics["student"].get("share_of_teacher"),
        "plots": plots,
        "examples": _examples(comparison, examples) if comparison.predictions else [],
    }


def _gains(comparison: SetComparison) -> dict[str, str]:
    """The classes with the largest gains and losses of recall against the teacher."""
    from plotly import graph_objects as go

    student, teacher = comparison.predictions["student"], comparison.predictions["teacher"]
    gains = class_gains(
        recall_per_class(student), recall_per_class(teacher), student.labels_N, comparison.data.prompts.classnames
    )[::-1]
    half = _CLASSES_SHOWN // 2
    chosen = gains if len(gains) <= _CLASSES_SHOWN else gains[:half] + gains[-half:]
    figure = go.Figure(
        go.Bar(
            x=[each.gain for each in chosen],
            y=[each.name for each in chosen],
            orientation="h",
            marker_color=[_COLOURS["student" if each.gain >= 0 else "teacher"] for each in chosen],
        )
    )
    figure.update_xaxes(tickformat="+.0%", title="recall of the student - recall of the teacher")
    figure.update_layout(height=120 + 20 * len(chosen))
    return {"title": "Classes that gain and lose most against the teacher", "plot": plot_div(figure)}


def _head_to_tail(comparison: SetComparison, class_counts: Sequence[int]) -> dict[str, str]:
    """Accuracy from the classes with the most training samples to those with the fewest."""
    from plotly import graph_objects as go

    figure = go.Figure()
    for role, predictions in comparison.predictions.items():
        points = head_to_tail(recall_per_class(predictions), class_counts)
        sizes = np.array([point.classes for point in points])
        figure.add_scatter(
            x=(sizes.cumsum() - sizes / 2).tolist(),
            y=[point.recall for point in points],
            text=[f"{point.classes} classes of {point.training_samples:,.0f} training samples" for point in points],
            mode="lines+markers",
            name=role,
            line={"color": _COLOURS[role]},
        )
    figure.update_xaxes(title="classes, those with the most training samples first")
    figure.update_yaxes(title="mean accuracy of the classes", tickformat=".0%", rangemode="tozero")
    return {"title": "From frequent to rare classes", "plot": plot_div(figure)}


def _reliability(comparison: SetComparison) -> dict[str, str]:
    from plotly import graph_objects as go

    figure = go.Figure()
    figure.add_scatter(x=[0, 1], y=[0, 1], mode="lines", name="calibrated", line={"dash": "dot", "color": "gray"})
    for role, predictions in comparison.predictions.items():
        error = expected_calibration_error(predictions.logits_NC, predictions.labels_N)
        used = [each for each in reliability(predictions.logits_NC, predictions.labels_N) if each.samples]
        figure.add_scatter(
            x=[each.confidence for each in used],
            y=[each.accuracy for each in used],
            text=[f"{each.samples:,} samples" for each in used],
            mode="lines+markers",
            name=f"{role}: ECE {error:.1%}",
            line={"color": _COLOURS[role]},
        )
    figure.update_xaxes(title="mean confidence of the bin", tickformat=".0%", range=[0, 1])
    figure.update_yaxes(title="accuracy", tickformat=".0%", range=[0, 1])
    return {"title": "Reliability", "plot": plot_div(figure)}


def _confusion(comparison: SetComparison) -> dict[str, str]:
    """The student's confusion matrix, over the classes with the most errors."""
    from plotly import graph_objects as go

    student = comparison.predictions["student"]
    labels_N = student.labels_N[student.readable_N]
    guess_N = student.logits_NC[student.readable_N].argmax(1)
    classes = comparison.data.prompts.num_classes
    wrong_N = labels_N != guess_N
    errors_C = labels_N[wrong_N].bincount(minlength=classes) + guess_N[wrong_N].bincount(minlength=classes)
    worst = errors_C.argsort(descending=True, stable=True)[:_CLASSES_SHOWN]
    matrix = [[int(((labels_N == row) & (guess_N == column)).sum()) for column in worst] for row in worst]
    names = [comparison.data.prompts.classnames[c] for c in worst.tolist()]
    figure = go.Figure(
        go.Heatmap(
            z=matrix,
            x=names,
            y=names,
            colorscale="Blues",
            hovertemplate="%{y} taken for %{x}: %{z}<extra></extra>",
        )
    )
    figure.update_yaxes(autorange="reversed", title="is")
    figure.update_xaxes(title="was taken for", tickangle=-60)
    figure.update_layout(height=680)
    title = "Confusion" if len(names) == classes else f"Confusion among the {len(names)} classes with most errors"
    return {"title": title, "plot": plot_div(figure)}


def _examples(comparison: SetComparison, count: int) -> list[dict[str, Any]]:
    """Test images from all combinations of right and wrong student and teacher, with the top guesses of both."""
    student = comparison.predictions["student"]
    right = {role: each.logits_NC.argmax(1) == each.labels_N for role, each in comparison.predictions.items()}
    with_teacher = "teacher" in right
    groups: dict[int, str] = {}
    for number, (kind, chosen) in enumerate(_KINDS):
        among_N = chosen(right["student"], right.get("teacher", right["student"])) & student.readable_N
        candidates = among_N.nonzero().flatten()
        share = (count - len(groups)) // (len(_KINDS) - number)
        at = torch.linspace(0, len(candidates) - 1, min(share, len(candidates))).long()
        groups |= dict.fromkeys(candidates[at].tolist(), kind if with_teacher else "")
    shown = [
        {
            "kind": kind,
            "picture": _thumbnail(sample.image()),
            "key": sample.key,
            "is": comparison.data.prompts.classnames[sample.label],
            "guesses": {role: _guesses(comparison, each, number) for role, each in comparison.predictions.items()},
        }
        for number, kind in groups.items()
        for sample in comparison.data.samples(range(number, number + 1))
    ]
    order = [kind for kind, _ in _KINDS]
    return sorted(shown, key=lambda example: order.index(str(example["kind"])) if with_teacher else 0)


def _guesses(comparison: SetComparison, predictions: Predictions, number: int) -> list[tuple[str, float, bool]]:
    """Name, probability and correctness of the top classes of a sample."""
    top = predictions.logits_NC[number].softmax(0).topk(min(3, predictions.logits_NC.shape[1]))
    label = int(predictions.labels_N[number])
    return [
        (comparison.data.prompts.classnames[c], p, c == label)
        for c, p in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]


def _thumbnail(image: Image.Image) -> str:
    """A thumbnail of the image as a data URL."""
    image = image.convert("RGB")
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
