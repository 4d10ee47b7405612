"""The command line: ``clipdistill {quickstart,models,shards,estimate,cache,cache-clean,train,tune,compare,evaluate,
export,report}``.

Exit code 0: done. 2: wrong input (one line). 1: an error (one line, if it is a known one).
75: stopped by SIGTERM or SIGINT, and saved; the same command with ``--resume auto`` resumes. `accelerate launch` and
`torchrun` exit with 1 for every code except 0.
"""

import argparse
import errno
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clipdistill import __version__
from clipdistill.cache_clean import add_arguments as cache_clean_arguments
from clipdistill.cache_clean import run as run_cache_clean
from clipdistill.catalogue import add_arguments as catalogue_arguments
from clipdistill.catalogue import run as run_catalogue
from clipdistill.compare.command import add_arguments as compare_arguments
from clipdistill.compare.command import run as run_compare
from clipdistill.distributed.signals import Interruption, exit_now
from clipdistill.errors import InputError, Interrupted, ReportedElsewhereError, RunError
from clipdistill.evaluation.command import add_arguments as evaluation_arguments
from clipdistill.evaluation.command import run as run_evaluation
from clipdistill.export.command import add_arguments as export_arguments
from clipdistill.export.command import run as run_export
from clipdistill.io.arguments import Parser, path, positive
from clipdistill.io.urls import shown_text
from clipdistill.report.command import add_arguments as report_arguments
from clipdistill.report.command import run as run_report
from clipdistill.shards.command import add_arguments as shard_arguments
from clipdistill.shards.command import run as run_shards
from clipdistill.training.cache_command import add_arguments as cache_arguments
from clipdistill.training.cache_command import run as run_cache
from clipdistill.training.estimate import add_arguments as estimate_arguments
from clipdistill.training.estimate import run as run_estimate
from clipdistill.tune.command import add_arguments as tune_arguments
from clipdistill.tune.command import run as run_tune

if TYPE_CHECKING:
    from clipdistill.config import Config
    from clipdistill.training.run_folder import RunResult


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    parser = _parser()
    args = parser.parse_args(argv)
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, handlers=[handler])
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    try:
        args.run(args)
        return 0
    except (InputError, RunError, FloatingPointError, Interrupted) as error:
        line = " ".join(shown_text(str(error)).splitlines())
        if len(line) > _LONGEST:
            line = f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"
        sys.stderr.write(f"clipdistill: {line}\n")  # print() writes the newline apart: ranks would share lines
        code = getattr(error, "exit_code", 1)
    except OSError as error:
        if error.errno not in _PATH_ERRORS:
            sys.stderr.write(shown_text(traceback.format_exc()))
            code = 1
        else:
            name = shown_text(str(error.filename))
            sys.stderr.write(f"clipdistill: {name[:_SHOWN]}: {error.strerror}; allowed: a path that can exist\n")
            code = InputError.exit_code
    except ReportedElsewhereError as error:
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    except Exception:
        sys.stderr.write(shown_text(traceback.format_exc()))
        code = 1
    if several:  # the interpreter's normal exit would wait for processes that may be dead
        sys.stdout.flush()
        exit_now(code)
    return code


_PATH_ERRORS = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR)
"""Errors that only a path can cause."""

_SHOWN, _LONGEST = 80, 2000


class _Formatter(logging.Formatter):
    """Formats records of this and other packages without credentials."""

    def format(self, record: logging.LogRecord) -> str:
        return shown_text(super().format(record))


def _parser() -> Parser:
    parser = Parser(prog="clipdistill", description="Distil a large OpenCLIP teacher into a small zero-shot student.")
    parser.add_argument("--version", action="version", version=f"clipdistill {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="log what is loaded and written")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    quickstart = commands.add_parser(
        "quickstart",
        help="render icons, distil a small student, compare it with its teacher on an unseen icon family",
        description="Render ten icon fonts, distil the shipped teacher into a student several times smaller, evaluate "
        "both on a font that neither has seen, and write the student, results.json and a picture. Needs no network and "
        "no GPU. Existing results in the output folder are reused.",
    )
    quickstart.add_argument(
        "--output", type=path, default=Path("quickstart"), help="folder for everything (default: %(default)s)"
    )
    quickstart.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes to configs/quickstart.yaml")
    quickstart.set_defaults(run=_quickstart)

    models = commands.add_parser(
        "models",
        help="list candidates for a student, with their cost and speed",
        description="List open_clip's models and timm's image towers as candidates for student.model: parameters and "
        "GFLOPs of the image tower, counted without memory and kept in the cache; with --speed, images per second on "
        "this machine; and whether an export loads in transformers. Such as: clipdistill models timm/mobilenetv4 "
        "--max-gflops 1 --speed",
    )
    catalogue_arguments(models)
    models.set_defaults(run=run_catalogue)

    train = commands.add_parser(
        "train",
        help="distil a student from a config",
        description="Distil a student. Under `accelerate launch` or `torchrun` use scripts/train.py, same arguments. "
        "SIGTERM and SIGINT (Ctrl-C) finish the step, save, and exit with code 75 (launchers exit with 1); a second "
        "one exits at once. With --resume auto the same command resumes, with any number of processes. A config with "
        "stages is a chain of runs, one after another: a teacher `previous` is the student of the stage before.",
    )
    train.add_argument("--config", required=True, type=path, help="YAML file, such as configs/quickstart.yaml")
    start = train.add_mutually_exclusive_group()
    start.add_argument(
        "--resume",
        metavar="auto|CHECKPOINT",
        help="auto: resume from the newest complete checkpoint in the config's output, or start; or a checkpoint's "
        "folder. A run resumes only with what it was made of, wherever that is",
    )
    start.add_argument(
        "--restart",
        action="store_true",
        help="start from the beginning; a run in the config's output is kept in abandoned_001/ in it",
    )
    train.add_argument(
        "--profile",
        nargs="?",
        const=20,
        type=positive,
        metavar="STEPS",
        help="take a few steps (default: %(const)s), print the time of each section, and delete all output",
    )
    train.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="such as optimizer.lr=1e-3 objective.0.gamma=0.5"
    )
    train.set_defaults(run=_train)

    tune = commands.add_parser(
        "tune",
        help="search settings on validation sets, from a teacher cache, in as many trials as are given",
        description="Search settings with optuna: each trial is a run, chosen by train.best_metric on the sets in "
        "evaluation.folders. Hopeless trials end early; a trial that was killed goes on when the same command is "
        "given again; several processes with the same --output share the trials. Writes best.yaml, trials.json and "
        "tune.html.",
    )
    tune_arguments(tune)
    tune.set_defaults(run=run_tune)

    compare = commands.add_parser(
        "compare",
        help="tune arms with equal numbers of trials, run them with the same seeds, and compare them on test sets",
        description="Compare arms, such as losses: each is tuned with the same number of trials on validation sets, "
        "run with the same seeds, and measured once on test sets that share no image with training and validation. "
        "Says beforehand which difference it can show, and claims one only where an exact test over seeds, McNemar's "
        "over images and a bootstrap interval agree. A call that was stopped goes on when it is given again.",
    )
    compare_arguments(compare)
    compare.set_defaults(run=run_compare)

    estimate = commands.add_parser(
        "estimate",
        help="estimate memory, samples/s, hours and disk of a run from a few of its steps",
        description="Take a few steps of a run and delete their output; print the time of each section, the time of "
        "the full run, and the largest batch that fits.",
    )
    estimate_arguments(estimate)
    estimate.set_defaults(run=run_estimate)

    cache = commands.add_parser(
        "cache",
        help="compute the teachers' embeddings of the training images once",
        description="Compute the teachers' embeddings of every stored view of every sample, and write them to one file "
        "per shard; training with the same config then runs no teacher. An interrupted build resumes with the missing "
        "files. Several processes share the work under `torchrun -m clipdistill cache`, same arguments.",
    )
    cache_arguments(cache)
    cache.set_defaults(run=run_cache)

    cache_clean = commands.add_parser(
        "cache-clean",
        help="delete indexes, copies of remote shards and class features that are no longer used",
        description="Delete files of the cache that no command has used for a while: shard indexes, copies of remote "
        "test sets, class features. All are made again when they are needed. A teacher cache is no part of it.",
    )
    cache_clean_arguments(cache_clean)
    cache_clean.set_defaults(run=run_cache_clean)

    evaluate = commands.add_parser(
        "evaluate",
        help="evaluate models on test sets: accuracy, retrieval, linear probes, robustness, agreement with a teacher",
        description="Evaluate models on test sets: zero-shot classification and retrieval, linear probes, robustness, "
        "calibration, and agreement with a teacher. Writes CLIP_benchmark's JSON, DataComp's lines, and a summary. "
        "Under `accelerate launch` or `torchrun` use scripts/evaluate.py, same arguments: processes share the work.",
    )
    evaluation_arguments(evaluate)
    evaluate.set_defaults(run=run_evaluation)

    export = commands.add_parser(
        "export",
        help="write a student as a folder that open_clip, transformers and onnxruntime load",
        description="Write a student in every format that supports it, compare each with the student, write a model "
        "card, and push it to the Hugging Face Hub with --push-to-hub.",
    )
    export_arguments(export)
    export.set_defaults(run=run_export)

    report = commands.add_parser(
        "report",
        help="write a report of a run as one HTML file",
        description="Write a run's curves, the accuracies of student and teacher, and test images with both models' "
        "predictions as one HTML file that needs no network. Also works on a run that has not ended.",
    )
    report_arguments(report)
    report.set_defaults(run=run_report)

    shards = commands.add_parser(
        "shards",
        help="make WebDataset shards from icons, an image folder, a CSV or a Hugging Face data set",
        description="Make WebDataset shards.",
    )
    shard_arguments(shards)
    shards.set_defaults(run=run_shards)
    return parser


def _quickstart(args: argparse.Namespace) -> None:
    from clipdistill.io.lock import LOCK_FILE, Lock
    from clipdistill.quickstart import quickstart

    with Lock(args.output / LOCK_FILE, f"--output {args.output}"):
        quickstart(args.output, overrides=args.overrides)


def _train(args: argparse.Namespace) -> None:
    with Interruption() as interruption:
        from clipdistill.config import load_stages

        configs = load_stages(args.config, args.overrides)
        if args.profile is not None:
            _profile(configs[0], args.profile, interruption)
            return
        from clipdistill.training.stages import train_stages

        for result in train_stages(configs, resume=args.resume, restart=args.restart, interruption=interruption):
            if int(os.environ.get("RANK", "0")) == 0:
                _print_result(result)


def _print_result(result: "RunResult") -> None:
    from clipdistill.evaluation import main_metric

    print(f"student: {result.student}", flush=True)
    for record in result.evaluations:
        name, value = main_metric(record)
        print(f"{record['dataset']}: zero-shot {name} {value:.2%}", flush=True)


def _profile(config: "Config", steps: int, interruption: Interruption) -> None:
    from rich.console import Console

    from clipdistill.training.profiling import profile_steps

    profile = profile_steps(config, steps, interruption=interruption)
    if int(os.environ.get("RANK", "0")) == 0:
        profile.print(Console())
