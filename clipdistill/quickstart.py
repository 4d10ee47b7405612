"""``clipdistill quickstart``: render icons, distil the shipped teacher, evaluate and compare both."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from clipdistill.config import load_config
from clipdistill.errors import InputError
from clipdistill.evaluation import (
    EvaluationSet,
    Predictions,
    classification_metrics,
    image_tower_cost,
    images_per_second,
    load_classification_set,
    load_for_evaluation,
    predict,
)
from clipdistill.io.files import new_file, write_json
from clipdistill.io.resources import resource
from clipdistill.models.towers import Tower
from clipdistill.shards.icons import render_icons
from clipdistill.training.cache_command import build_cache
from clipdistill.training.trainer import train


def quickstart(output: Path, *, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Render the icons, distil the shipped teacher, and evaluate both on the unseen font family.

    ``output`` receives ``icons/`` (shards), ``embeddings/`` (the teacher cache), ``run/`` (the run, with
    ``run/student/``), ``results.json`` and ``icons.png``. What exists is reused, and an existing run is resumed.

    Args:
        output: folder for all results.
        overrides: changes to configs/quickstart.yaml.

    Returns:
        The content of ``results.json``.

    Raises:
        InputError: qtawesome is not installed, or the folder holds a run with other settings.
    """
    started = time.perf_counter()
    console = Console()
    output.mkdir(parents=True, exist_ok=True)
    with _progress(console) as progress:
        task = progress.add_task("render", total=None)
        icons = render_icons(
            output / "icons", progress=lambda done, total: progress.update(task, completed=done, total=total)
        )
    console.print(
        f"icons: {icons.samples['train']} for training, {icons.samples['test']} of the unseen family ri, "
        f"{icons.classes} classes"
    )

    config = load_config(
        resource("configs", "quickstart.yaml"),
        overrides,
        values={
            "output": str(output / "run"),
            "data.shards": [str(output / "icons" / "train")],
            "teacher_cache.folder": str(output / "embeddings"),
        },
    )
    if config.teacher_cache.folder:
        build_cache(config)
    train(config, resume="auto")
    seconds_training = time.perf_counter() - started

    data = load_classification_set(output / "icons" / "test")
    teacher = load_for_evaluation(config.teachers[0].model)
    student = load_for_evaluation(str(output / "run"))
    predictions = {}
    with _progress(console) as progress:
        for name, tower in (("teacher", teacher), ("student", student)):
            task = progress.add_task(f"evaluate {name}", total=icons.samples["test"])
            predictions[name] = predict(tower, data, progress=lambda done: progress.update(task, completed=done))  # noqa: B023
    results: dict[str, Any] = {
        "data": "icons of the family ri (Remix), which neither model has seen",
        "classes": data.prompts.num_classes,
        "images": len(predictions["teacher"].keys),
        "teacher": _measure(teacher, predictions["teacher"], None),
        "student": _measure(student, predictions["student"], predictions["teacher"]),
    }
    results["share_of_teacher"] = results["student"]["acc1"] / results["teacher"]["acc1"]
    results["times_smaller"] = results["teacher"]["parameters_m"] / results["student"]["parameters_m"]
    results["torch"] = torch.__version__
    results["seconds_until_trained"] = round(seconds_training, 1)
    results["seconds"] = round(time.perf_counter() - started, 1)
    write_json(output / "results.json", results)
    draw_guesses(output / "icons.png", data, predictions["teacher"], predictions["student"])
    console.print(_table(results))
    console.print(
        f"student: {output / 'run' / 'student'}\nfigures: {output / 'results.json'}\npicture: {output / 'icons.png'}"
    )
    return results


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)


def _measure(tower: Tower, predictions: Predictions, teacher: Predictions | None) -> dict[str, Any]:
    return {
        **image_tower_cost(tower),
        **classification_metrics(predictions, teacher),
        "images_per_second": images_per_second(tower, batch_size=64),
    }


def _table(results: dict[str, Any]) -> Table:
    table = Table(
        title=f"zero-shot over {results['classes']} classes, {results['images']} images of an unseen icon family"
    )
    table.add_column("")
    for column in ("image tower", "GFLOPs", "top-1", "top-5", "of the teacher", "images/s"):
        table.add_column(column, justify="right")
    for name in ("teacher", "student"):
        row = results[name]
        table.add_row(
            name,
            f"{row['parameters_m']:.2f} M",
            f"{row['gflops']:.3f}",
            f"{row['acc1']:.1%}",
            f"{row['acc5']:.1%}",
            "" if name == "teacher" else f"{results['share_of_teacher']:.0%}",
            f"{row['images_per_second']:.0f}",
        )
    return table


def draw_guesses(
    path: Path,
    data: EvaluationSet,
    teacher: Predictions,
    student: Predictions,
    *,
    columns: int = 8,
    rows: int = 4,
) -> None:
    """Draw test images, evenly spaced over the set, each with both models' top-1 class.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("matplotlib is not installed; allowed: pip install 'clipdistill[demo]'") from error

    count = len(student.keys)
    shown = torch.linspace(0, count - 1, min(count, columns * rows)).round().long().unique().tolist()
    images = [sample.image() for number, sample in enumerate(data.samples()) if number in set(shown)]
    names = data.prompts.classnames
    figure = Figure(figsize=(1.65 * columns, 2.1 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.axis("off")
    figure.suptitle("true class in black, predictions of teacher (T) and student (S): green correct, red wrong")
    for axis, number, image in zip(axes, shown, images, strict=False):
        label = int(student.labels_N[number])
        width, height = image.size
        axis.imshow(image, cmap="gray_r")
        axis.set_ylim(1.4 * height, 0)
        axis.set_title(names[label], fontsize=9, fontweight="bold")
        for line, (mark, predictions) in enumerate((("T", teacher), ("S", student))):
            guess = int(predictions.logits_NC[number].argmax())
            colour = "tab:green" if guess == label else "tab:red"
            place = (width / 2, (1.05 + 0.18 * line) * height)
            axis.text(*place, f"{mark}: {names[guess]}", color=colour, fontsize=8, ha="center", va="top")
    with new_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
