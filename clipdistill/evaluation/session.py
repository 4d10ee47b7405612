"""One run of ``clipdistill evaluate``: each model on each set; results are saved one by one and shown at the end."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from operator import eq
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
from clipdistill.evaluation.attack import DEFAULT_RADII, AttackSettings, accuracy_under_attack
from clipdistill.evaluation.benchmark_format import Record, benchmark_record
from clipdistill.evaluation.classification import Metrics
from clipdistill.evaluation.evaluate import Details, Evaluator, probe, robustness
from clipdistill.evaluation.models import best_step, fingerprint, load_for_evaluation
from clipdistill.evaluation.ranks import from_first_rank
from clipdistill.evaluation.results import FORMAT, ResultName, ResultsFolder, load_results, slug, table_of
from clipdistill.evaluation.robustness import BaselineLine, fit_lines
from clipdistill.evaluation.sets.hub import Columns
from clipdistill.evaluation.sets.open import open_set
from clipdistill.evaluation.sets.samples import EvaluationSet, digest
from clipdistill.evaluation.tasks import ATTACK_TASK, SET_TASKS, tasks_for
from clipdistill.io.files import write_json, writing
from clipdistill.io.images import MAX_PIXELS, DecodingSettings
from clipdistill.io.paths import expand
from clipdistill.io.urls import shown
from clipdistill.models.nested import cut_to
from clipdistill.models.precision import chosen_precision, use_tensor_cores, warn_of_emulation
from clipdistill.models.towers import Tower

_GAINS_SHOWN = 5

Report = Callable[[str, int, int], None]
"""Shows a set's name, the size of this rank's share of it, and how many of these samples are done."""


@dataclass(frozen=True, kw_only=True)
class SetEvaluation:
    """One task on one set, run for every model.

    Attributes:
        task: CLIP_benchmark's name, or ``robustness``.
        location: the set as given by the user.
        data: the set.
        others: the training split for a linear probe; the shifts for robustness.
        attack: settings of the attack, for that task.
    """

    task: str
    location: str
    data: EvaluationSet
    others: tuple[EvaluationSet, ...] = ()
    attack: AttackSettings | None = None


@dataclass(frozen=True, kw_only=True)
class EvaluatedModel:
    """A model, and its identity in the results.

    Attributes:
        tower: the model.
        name: as given by the user.
        pretrained: tag or checkpoint.
        fingerprint: from ``fingerprint``; empty where no folder stores results.
    """

    tower: Tower
    name: str
    pretrained: str
    fingerprint: str


def evaluate_all(args: argparse.Namespace, device: str) -> None:
    """Run the command; with several processes, all call this together."""
    args.precision = chosen_precision(args.precision, device)
    use_tensor_cores(device)
    warn_of_emulation(device, args.precision)
    evaluations = _open_sets(args)
    lines = _fit_lines(args, evaluations)
    folder = _results_folder(args)
    teacher = _load(args, args.teacher, args.teacher_pretrained, device) if args.teacher else None
    with _progress() as report:

        @cache
        def identify(data: EvaluationSet) -> str:
            share = -(-len(data) // world_size())
            show = None if report is None else partial(report, f"{data.name} (verifying)", share)
            return data.identity(show)

        make_evaluator = partial(
            Evaluator,
            batch_size=args.batch_size,
            workers=args.workers,
            device=device,
            cache=expand(args.cache),
            progress=report,
        )
        teacher_evaluator = None
        if teacher is not None:
            teacher_evaluator = make_evaluator(teacher.tower, keep_features=len(args.model) > 1 or bool(args.dims))
        results: list[tuple[Record, Details]] = []
        for model in _all_models(args, device):
            evaluator = make_evaluator(model.tower)
            measure = partial(_measure, model=model, evaluator=evaluator, teacher=teacher_evaluator, lines=lines)
            if folder is None:
                results += map(measure, evaluations)
            else:
                key = partial(_key, identify=identify, model=model, teacher=teacher, lines=lines)
                settings = partial(_settings, args, device)
                results += _complete(folder, model, evaluations, key, measure, settings, rebuild=args.rebuild)
    if rank() == 0:
        _show(args, results)


def _results_folder(args: argparse.Namespace) -> ResultsFolder | None:
    """The folder of ``--output``; None for a single file or standard output."""
    return None if args.output is None or args.output.suffix == ".json" else ResultsFolder(args.output)


def _open_sets(args: argparse.Namespace) -> list[SetEvaluation]:
    """Open all sets, with the task on each, before anything is computed."""
    columns = Columns(
        image=args.image_column,
        label=args.label_column,
        caption=args.caption_column,
        subset=args.subset,
        image_root=args.image_root,
    )
    open_split = partial(
        open_set,
        prompts=args.prompts,
        by_order=args.labels_by_order,
        allow_duplicates=args.allow_duplicate_classes,
        columns=columns,
        decoding=DecodingSettings(decoding=args.decoding, max_pixels=args.max_pixels or MAX_PIXELS),
        class_counts=args.class_counts,
        cache=expand(args.cache),
    )
    sets = [open_split(location, split=args.split) for location in args.data]
    if args.task == "robustness":
        if len({data.name for data in sets}) < len(sets):
            raise InputError(
                f"--data: two sets named {sets[0].name}; allowed: a base set and shifts with different names"
            )
        return [SetEvaluation(task=args.task, location=args.data[0], data=sets[0], others=tuple(sets[1:]))]
    evaluations = []
    for location, data in zip(args.data, sets, strict=True):
        if args.task == ATTACK_TASK:
            if data.kind != "classification":
                raise InputError(f"--attack: {location} is a {data.kind} set; allowed: a classification set")
            evaluations.append(SetEvaluation(task=args.task, location=location, data=data, attack=_attack(args)))
        elif args.task == "linear_probe":
            train = open_split(location, split=args.train_split)
            if args.split != args.train_split and _same_place(train, data):
                raise InputError(
                    f"data {location}: --split {args.split} and --train-split {args.train_split} are the same samples; "
                    "allowed: a set with both splits"
                )
            evaluations.append(SetEvaluation(task=args.task, location=location, data=data, others=(train,)))
        else:
            names = [task.name for task in tasks_for(data.kind)]
            if args.task not in ("auto", *names):
                raise InputError(f"--task {args.task}: {location} is a {data.kind} set; allowed: {', '.join(names)}")
            task = names[0] if args.task == "auto" else args.task
            evaluations.append(SetEvaluation(task=task, location=location, data=data))
    return evaluations


def _attack(args: argparse.Namespace) -> AttackSettings:
    return AttackSettings(
        attack=args.attack,
        norm=args.norm,
        radii=tuple(sorted(set(args.eps or DEFAULT_RADII))),
        images=args.attack_images,
        seed=args.attack_seed,
    )


def _same_place(one: EvaluationSet, other: EvaluationSet) -> bool:
    """Whether two splits are the same files or rows, as in a folder without splits."""
    return len(one) == len(other) and all(map(eq, one.samples(), other.samples()))


def _fit_lines(args: argparse.Namespace, evaluations: Sequence[SetEvaluation]) -> dict[str, BaselineLine]:
    """The line of each shift, fitted to the results of ``--baseline``."""
    if not args.baseline:
        return {}
    (robustness_evaluation,) = evaluations
    shifts = [data.name for data in robustness_evaluation.others]
    return fit_lines(load_results(args.baseline), robustness_evaluation.data.name, shifts)


def _load(args: argparse.Namespace, name: str, pretrained: str, device: str, *, of_run: bool = False) -> EvaluatedModel:
    """Load a model; ``of_run``: from the run's checkpoint that ``--step`` or ``--best`` choose, if given."""
    name, tag = _split_tag(name)
    pretrained = tag or pretrained
    if Path(name).is_dir():
        pretrained = ""
    step = None
    if of_run and (args.step is not None or args.best is not None):
        step = args.step if args.best is None else best_step(Path(name), args.best)
        pretrained = f"step_{step:08d}"
    tower = load_for_evaluation(name, pretrained, step=step, precision=args.precision, device=device)
    digest_of_model = "" if _results_folder(args) is None else from_first_rank(partial(fingerprint, tower))
    return EvaluatedModel(tower=tower, name=name, pretrained=pretrained, fingerprint=digest_of_model)


def _all_models(args: argparse.Namespace, device: str) -> Iterator[EvaluatedModel]:
    """Each model, and then its cuts to fewer dimensions."""
    for name in args.model:
        model = _load(args, name, args.pretrained, device, of_run=True)
        yield model
        for dimensions in args.dims:
            tower = cut_to(model.tower, dimensions)
            found = "" if not model.fingerprint else from_first_rank(partial(fingerprint, tower))
            yield replace(model, tower=tower, name=f"{model.name}, {dimensions} dimensions", fingerprint=found)


def _split_tag(name: str) -> tuple[str, str]:
    """Model and tag of ``NAME,TAG``; a path may have commas of its own."""
    if name.startswith(("hf-hub:", "local-dir:")) or Path(name).exists():
        return name, ""
    commas = [at for at, character in enumerate(name) if character == ","]
    at = next((at for at in reversed(commas) if Path(name[:at]).exists()), commas[0] if commas else len(name))
    return name[:at], name[at + 1 :]


def _key(
    evaluation: SetEvaluation,
    identify: Callable[[EvaluationSet], str],
    model: EvaluatedModel,
    teacher: EvaluatedModel | None,
    lines: Mapping[str, BaselineLine],
) -> str:
    """Digest of everything that determines a result."""
    identities = [identify(data) for data in (evaluation.data, *evaluation.others)]
    fitted = {name: asdict(line) for name, line in lines.items()}
    made_of = [FORMAT, evaluation.task, identities, model.fingerprint, teacher and teacher.fingerprint, fitted]
    return digest(made_of if evaluation.attack is None else [*made_of, evaluation.attack.described()])


def _complete(
    folder: ResultsFolder,
    model: EvaluatedModel,
    evaluations: Sequence[SetEvaluation],
    key_of: Callable[[SetEvaluation], str],
    measure: Callable[[SetEvaluation], tuple[Record, Details]],
    settings: Callable[[SetEvaluation], dict[str, Any]],
    *,
    rebuild: bool,
) -> list[tuple[Record, Details]]:
    """A model's results: those in the folder, without details; missing ones are measured and saved there, with
    ``rebuild`` all."""
    results: list[tuple[Record, Details]] = []
    try:
        for evaluation in evaluations:
            key = key_of(evaluation)
            name = ResultName(
                model=slug(f"{model.name} {model.pretrained}".strip()),
                data=slug(shown(evaluation.location)),
                task=evaluation.task,
            )
            saved = None if rebuild else from_first_rank(partial(folder.find, name, key))
            if saved is not None:
                results.append((saved, {}))
                continue
            record, details = measure(evaluation)
            results.append((record, details))
            about = details | {"model": model.fingerprint, "settings": settings(evaluation)}
            from_first_rank(partial(folder.save, name, key, record, about))
    finally:
        if rank() == 0:
            folder.write_all()
    return results


def _measure(
    evaluation: SetEvaluation,
    model: EvaluatedModel,
    evaluator: Evaluator,
    teacher: Evaluator | None,
    lines: Mapping[str, BaselineLine],
) -> tuple[Record, Details]:
    data, task = evaluation.data, evaluation.task
    metrics, details = _run_task(evaluation, evaluator, teacher, lines)
    return benchmark_record(data, metrics, model=model.name, pretrained=model.pretrained, task=task), details


def _run_task(
    evaluation: SetEvaluation, evaluator: Evaluator, teacher: Evaluator | None, lines: Mapping[str, BaselineLine]
) -> tuple[Metrics, Details]:
    data, others = evaluation.data, evaluation.others
    if evaluation.attack is not None:
        return accuracy_under_attack(evaluator, data, evaluation.attack, teacher)
    if evaluation.task == "linear_probe":
        return probe(evaluator, data, others[0], teacher)
    if evaluation.task == "robustness":
        return robustness(evaluator, (data, *others), teacher, lines=lines)
    task = next(task for task in SET_TASKS if task.name == evaluation.task)
    return task.measure(evaluator, data, teacher)


def _settings(args: argparse.Namespace, device: str, evaluation: SetEvaluation) -> dict[str, Any]:
    """Settings that are saved with a result."""
    return {
        "data": shown(evaluation.location),
        "split": args.split,
        "prompts": args.prompts,
        "decoding": args.decoding,
        "labels_by_order": args.labels_by_order,
        "templates": evaluation.data.prompts.num_templates,
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
def _progress() -> Iterator[Report | None]:
    """Progress bar of the current set, on a terminal; yields its callback, or None."""
    console = Console(stderr=True)
    if rank() > 0 or not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=None)

        def report(name: str, share: int, done: int) -> None:
            progress.update(bar, description=name, completed=done, total=share)

        yield report


def _show(args: argparse.Namespace, results: Sequence[tuple[Record, Details]]) -> None:
    """Print the results, or write them to the file of ``--output``."""
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
        saved = sum(not details for _, details in results)
        print(f"{args.output}: {len(results) - saved} new results, {saved} already there")
    if len(results) == 1:
        _show_gains(results[0][1])


def _show_gains(details: Details) -> None:
    """Print the classes with the student's largest gains and losses against its teacher."""
    classes = [each for each in details.get("classes", ()) if "gain" in each]
    for what, largest in (
        ("gains", [each for each in classes if each["gain"] > 0][:_GAINS_SHOWN]),
        ("losses", [each for each in reversed(classes) if each["gain"] < 0][:_GAINS_SHOWN]),
    ):
        if largest:
            listed = ", ".join(f"{each['name']} {each['gain']:+.0%}" for each in largest)
            print(f"largest {what} against the teacher: {listed}", file=sys.stderr)
