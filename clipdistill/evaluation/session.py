"""One call of ``clipdistill evaluate``: every model on every set, each result kept at once, all shown at the end."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from clipdistill import __version__
from clipdistill.distributed.collectives import rank, world_size
from clipdistill.errors import InputError
from clipdistill.evaluation.benchmark_format import TASKS, Record, benchmark_record
from clipdistill.evaluation.classification import Metrics
from clipdistill.evaluation.evaluate import Details, Examinee, probe, robustness, zero_shot
from clipdistill.evaluation.models import best_step, fingerprint, load_for_evaluation
from clipdistill.evaluation.ranks import from_first_rank
from clipdistill.evaluation.results import FORMAT, Place, Results, load_results, slug, table_of
from clipdistill.evaluation.robustness import BaselineLine, fit_lines
from clipdistill.evaluation.sets.hub import Columns
from clipdistill.evaluation.sets.open import open_set
from clipdistill.evaluation.sets.samples import EvaluationSet, digest
from clipdistill.io.files import write_json, writing
from clipdistill.io.urls import shown
from clipdistill.models.towers import Tower

_GAINS_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is asked of every model.

    Attributes:
        task: CLIP_benchmark's name, or ``robustness``.
        location: the set as the user gave it.
        data: the set.
        others: the training split of a linear probe; the shifts for robustness.
    """

    task: str
    location: str
    data: EvaluationSet
    others: tuple[EvaluationSet, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A model that is evaluated, and what its results are filed under.

    Attributes:
        tower: the model.
        model: what the user called it.
        pretrained: tag or checkpoint.
        fingerprint: of its weights; empty where no folder keeps results.
    """

    tower: Tower
    model: str
    pretrained: str
    fingerprint: str


def evaluate_all(args: argparse.Namespace, device: str) -> None:
    """Run the command; with several processes, all call this together."""
    jobs = _jobs(args)
    lines = _lines(args, jobs)
    folder = _folder(args)
    identities: dict[Job, list[str]] = {}
    if folder is not None:
        identities = {job: [data.identity() for data in (job.data, *job.others)] for job in jobs}
    teacher = _load(args, args.teacher, args.teacher_pretrained, device) if args.teacher else None
    with _progress() as report:
        ask = partial(
            Examinee,
            batch_size=args.batch_size,
            workers=args.workers,
            device=device,
            cache=args.cache.expanduser(),
            progress=report,
        )
        taught = None if teacher is None else ask(teacher.tower, remembers=len(args.model) > 1)
        results: list[tuple[Record, Details]] = []
        for name in args.model:
            candidate = _load(args, name, args.pretrained, device, chosen=True)
            measure = partial(_measure, candidate=candidate, student=ask(candidate.tower), teacher=taught, lines=lines)
            if folder is None:
                results += map(measure, jobs)
            else:
                keys = {job: _key(job.task, found, candidate, teacher, lines) for job, found in identities.items()}
                results += _complete(folder, candidate, keys, measure, partial(_settings, args, device))
    if rank() == 0:
        _show(args, results)


def _folder(args: argparse.Namespace) -> Results | None:
    """The folder that keeps results, where one was asked for."""
    return None if args.output is None or args.output.suffix == ".json" else Results(args.output)


def _jobs(args: argparse.Namespace) -> list[Job]:
    """What the arguments ask of every model; all sets are opened before anything is computed."""
    columns = Columns(image=args.image_column, label=args.label_column, caption=args.caption_column, subset=args.subset)
    opened = partial(
        open_set,
        prompts=args.prompts,
        allow_duplicates=args.allow_duplicate_classes,
        columns=columns,
        cache=args.cache.expanduser(),
    )
    sets = [opened(location, split=args.split) for location in args.data]
    if args.task == "robustness":
        if len({data.name for data in sets}) < len(sets):
            raise InputError(
                f"--data: two sets named {sets[0].name}; allowed: a base set and shifts, of different names"
            )
        return [Job(task=args.task, location=args.data[0], data=sets[0], others=tuple(sets[1:]))]
    jobs = []
    for location, data in zip(args.data, sets, strict=True):
        if args.task == "linear_probe":
            train = opened(location, split=args.train_split)
            jobs.append(Job(task=args.task, location=location, data=data, others=(train,)))
        elif args.task in ("auto", TASKS[data.kind]):
            jobs.append(Job(task=TASKS[data.kind], location=location, data=data))
        else:
            raise InputError(f"--task {args.task}: {location} is a {data.kind} set; allowed: {TASKS[data.kind]}")
    return jobs


def _lines(args: argparse.Namespace, jobs: Sequence[Job]) -> dict[str, BaselineLine]:
    if not args.baseline:
        return {}
    return fit_lines(load_results(args.baseline), jobs[0].data.name, [data.name for data in jobs[0].others])


def _load(args: argparse.Namespace, name: str, pretrained: str, device: str, *, chosen: bool = False) -> Candidate:
    """Load a model; ``chosen`` ones are a run's checkpoint where one was asked for."""
    if "," in name and not Path(name).exists():
        name, pretrained = name.split(",", 1)
    if Path(name).is_dir():
        pretrained = ""
    step = None
    if chosen and (args.step is not None or args.best is not None):
        step = args.step if args.best is None else best_step(Path(name), args.best)
        pretrained = f"step_{step:08d}"
    tower = load_for_evaluation(name, pretrained, step=step, precision=args.precision, device=device)
    of_weights = "" if _folder(args) is None else from_first_rank(partial(fingerprint, tower))
    return Candidate(tower=tower, model=name, pretrained=pretrained, fingerprint=of_weights)


def _key(
    task: str,
    identities: Sequence[str],
    candidate: Candidate,
    teacher: Candidate | None,
    lines: Mapping[str, BaselineLine],
) -> str:
    """Digest of everything that a result comes from."""
    fitted = {name: asdict(line) for name, line in lines.items()}
    return digest([FORMAT, task, identities, candidate.fingerprint, teacher and teacher.fingerprint, fitted])


def _complete(
    folder: Results,
    candidate: Candidate,
    keys: Mapping[Job, str],
    measure: Callable[[Job], tuple[Record, Details]],
    settings: Callable[[Job], dict[str, Any]],
) -> list[tuple[Record, Details]]:
    """A model's results: those in the folder, without details, and the others, which are measured and kept there."""
    results: list[tuple[Record, Details]] = []
    try:
        for job, key in keys.items():
            place = Place(
                model=slug(f"{candidate.model} {candidate.pretrained}"),
                data=slug(shown(job.location)),
                task=job.task,
            )
            kept = from_first_rank(partial(folder.find, place, key))
            if kept is not None:
                results.append((kept, {}))
                continue
            record, details = measure(job)
            results.append((record, details))
            from_first_rank(partial(folder.save, place, key, record, details | {"settings": settings(job)}))
    finally:
        if rank() == 0:
            folder.write_all()
    return results


def _measure(
    job: Job,
    candidate: Candidate,
    student: Examinee,
    teacher: Examinee | None,
    lines: Mapping[str, BaselineLine],
) -> tuple[Record, Details]:
    metrics, details = _examine(job, student, teacher, lines)
    record = benchmark_record(job.data, metrics, model=candidate.model, pretrained=candidate.pretrained, task=job.task)
    return record, details


def _examine(
    job: Job, student: Examinee, teacher: Examinee | None, lines: Mapping[str, BaselineLine]
) -> tuple[Metrics, Details]:
    if job.task == "linear_probe":
        return probe(student, job.data, job.others[0], teacher)
    if job.task == "robustness":
        return robustness(student, (job.data, *job.others), teacher, lines=lines)
    return zero_shot(student, job.data, teacher)


def _settings(args: argparse.Namespace, device: str, job: Job) -> dict[str, Any]:
    """How a result was made, for its reader."""
    return {
        "data": shown(job.location),
        "split": args.split,
        "prompts": args.prompts,
        "templates": job.data.prompts.num_templates,
        "teacher": args.teacher,
        "precision": args.precision,
        "batch_size": args.batch_size,
        "device": device,
        "processes": world_size(),
        "clipdistill": __version__,
        "torch": torch.__version__,
        "open_clip": open_clip.__version__,
    }


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None] | None]:
    """A bar of the set under way, on a terminal."""
    console = Console(stderr=True)
    if rank() > 0 or not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=None)

        def report(name: str, done: int, share: int) -> None:
            progress.update(bar, description=name, completed=done, total=share)

        yield report


def _show(args: argparse.Namespace, results: Sequence[tuple[Record, Details]]) -> None:
    records = [record for record, _ in results]
    if args.output is None:
        print(json.dumps(records[0] if len(records) == 1 else records, indent=2, allow_nan=False))
    elif args.output.suffix == ".json":
        with writing(f"result {args.output}", args.output.parent):
            write_json(args.output, records[0])
        values = ", ".join(f"{k} {v:.4f}" for k, v in records[0]["metrics"].items() if isinstance(v, float))
        print(f"{args.output}: {values}")
    else:
        heading, *rows = table_of(records)
        table = Table(*map(escape, heading))
        for column in table.columns[2:]:
            column.justify = "right"
        for row in rows:
            table.add_row(*map(escape, row))
        Console().print(table)
        old = sum(not details for _, details in results)
        print(f"{args.output}: {len(results) - old} new results, {old} that were there")
    if len(results) == 1:
        _show_gains(results[0][1])


def _show_gains(details: Details) -> None:
    """The classes in which a student gains and loses most against its teacher."""
    classes = [each for each in details.get("classes", ()) if "gain" in each]
    for what, chosen in (
        ("gains", [each for each in classes if each["gain"] > 0][:_GAINS_SHOWN]),
        ("losses", [each for each in reversed(classes) if each["gain"] < 0][:_GAINS_SHOWN]),
    ):
        if chosen:
            listed = ", ".join(f"{each['name']} {each['gain']:+.0%}" for each in chosen)
            print(f"largest {what} against the teacher: {listed}", file=sys.stderr)
