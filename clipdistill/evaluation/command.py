"""``clipdistill evaluate``: its arguments, and the checks made before anything is loaded."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

from clipdistill.errors import InputError
from clipdistill.evaluation.tasks import ATTACK_TASK, SET_TASKS
from clipdistill.io.arguments import not_negative, path, positive, radius
from clipdistill.io.caches import DEFAULT_CACHE
from clipdistill.io.lock import LOCK_FILE, Lock
from clipdistill.models.class_matching import BY_ORDER_FLAG

TASKS = ("auto", *(task.name for task in SET_TASKS), "linear_probe", "robustness")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``clipdistill evaluate``."""
    models = parser.add_argument_group("models")
    models.add_argument(
        "--model",
        required=True,
        nargs="+",
        metavar="MODEL",
        help="runs' folders, exports, transformers CLIP folders, hf-hub:OWNER/NAME, local-dir:FOLDER, open_clip names "
        "(NAME or NAME,TAG), model configs (.json)",
    )
    models.add_argument("--pretrained", default="", metavar="TAG", help="tag or weights file of open_clip names")
    checkpoint = models.add_mutually_exclusive_group()
    checkpoint.add_argument("--step", type=not_negative, metavar="N", help="of runs, the checkpoint of step N")
    checkpoint.add_argument(
        "--best",
        nargs="?",
        const="evaluation/mean",
        metavar="METRIC",
        help="of runs, the checkpoint with the highest METRIC in metrics.jsonl (default: %(const)s)",
    )
    models.add_argument("--teacher", metavar="MODEL", help="a model to compare the others with")
    models.add_argument("--teacher-pretrained", default="", metavar="TAG", help="tag or weights file of the teacher")
    models.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="auto: bf16 on a GPU that computes in it, else fp32 (default: %(default)s)",
    )

    models.add_argument(
        "--dims",
        type=positive,
        nargs="+",
        default=[],
        metavar="D",
        help="also evaluate each model with its embeddings cut to their first D dimensions",
    )

    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        required=True,
        nargs="+",
        metavar="SET",
        help="folders or URLs (http, s3, hf) in CLIP_benchmark's layout, folders of tar files, of class folders, or of "
        "data that the library datasets loads, hf-hub:OWNER/NAME",
    )
    data.add_argument("--split", default="test", help="default: %(default)s")
    data.add_argument(
        "--prompts",
        metavar="SET",
        help="a prompt set (name or folder) in place of the data sets' own; their classes are matched with it by name",
    )
    data.add_argument(
        BY_ORDER_FLAG,
        action="store_true",
        help="match the data sets' classes with the prompts by their order (default: by name; names that are all "
        "numbers are indices)",
    )
    data.add_argument(
        "--allow-duplicate-classes",
        action="store_true",
        help="accept a class list that names a class twice (published ImageNet lists do)",
    )
    data.add_argument(
        "--class-counts",
        type=path,
        metavar="FILE|DIR",
        help="training samples of each class (class_counts.json, as clipdistill shards writes it): also report the "
        "accuracy of classes with many (> 100), a medium number of (20 to 100) and few of them (default: that in the "
        "split train of a local set, if there is one)",
    )
    data.add_argument("--subset", metavar="NAME", help="configuration of a Hugging Face data set")
    for column in ("image", "label", "caption"):
        data.add_argument(
            f"--{column}-column", metavar="NAME", help="of a Hugging Face data set (default: found by type or name)"
        )
    data.add_argument(
        "--decoding",
        choices=("standard", "clip-benchmark"),
        default="standard",
        help="of images: as in training (EXIF orientation applied, transparency on white, 16 bits to 8), or as in "
        'CLIP_benchmark, with Pillow\'s convert("RGB") alone (default: %(default)s)',
    )
    data.add_argument(
        "--max-pixels",
        type=positive,
        metavar="N",
        help="an image that claims more pixels is not decoded, and counts as wrong (default: 89478485, as in training)",
    )
    data.add_argument(
        "--image-root",
        type=path,
        metavar="DIR",
        help="folder in which image cells of a Hugging Face data set may name files (default: only embedded images, "
        "and files of the data set)",
    )
    data.add_argument(
        "--cache",
        type=path,
        default=Path(DEFAULT_CACHE),
        metavar="DIR",
        help="for indexes and copies of remote shards (default: %(default)s)",
    )

    task = parser.add_argument_group("task")
    task.add_argument(
        "--task",
        choices=TASKS,
        default="auto",
        help="auto: zero-shot, by the set's kind; linear_probe: fitted on --train-split; robustness: the first set, "
        "and the others as shifts of it (default: %(default)s)",
    )
    task.add_argument("--train-split", default="train", metavar="SPLIT", help="default: %(default)s")
    task.add_argument(
        "--baseline",
        type=path,
        nargs="+",
        metavar="RESULTS",
        help="files or folders with results of --task robustness; effective robustness is relative to the line fitted "
        "to these models",
    )

    attack = parser.add_argument_group("attack", "accuracy on images that are attacked with the model's own gradients")
    attack.add_argument(
        "--attack",
        nargs="?",
        const="apgd",
        choices=("apgd", "pgd"),
        help="apgd: APGD-CE and targeted APGD-DLR (default where no name is given); pgd: 20 steps",
    )
    attack.add_argument(
        "--eps",
        nargs="+",
        type=radius,
        metavar="R",
        help="radii of the ball, for pixels from 0 to 1 at the model's input size (default: 1/255 2/255 4/255)",
    )
    attack.add_argument("--norm", choices=("linf", "l2"), default="linf", help="of the ball (default: %(default)s)")
    attack.add_argument(
        "--attack-images", type=positive, default=1000, metavar="N", help="drawn from the set (default: %(default)s)"
    )
    attack.add_argument(
        "--attack-seed",
        type=not_negative,
        default=0,
        metavar="N",
        help="of the draw and of random starts (default: %(default)s)",
    )

    parser.add_argument(
        "--output",
        type=path,
        metavar="FILE.json|DIR",
        help="file for CLIP_benchmark's record of one model on one set; or folder for any number of results, which the "
        "same command completes after an interruption (default: printed)",
    )
    parser.add_argument(
        "--rebuild",
        action="store_true",
        help="measure again what the folder of --output holds, and use nothing of the cache",
    )
    parser.add_argument("--batch-size", type=positive, default=256, help="images at once (default: %(default)s)")
    parser.add_argument("--workers", type=positive, default=0, help="decoding threads (default: one per core)")
    parser.add_argument("--device", help="such as cuda or cpu (default: cuda where there is one)")


def run(args: argparse.Namespace) -> None:
    """Run the evaluation, in all processes of `torchrun` or `accelerate launch`."""
    _check(args)
    from clipdistill.distributed.collectives import launched

    with launched(args.device) as device:
        from clipdistill.evaluation.session import evaluate_all

        with _locked(args.output), TemporaryDirectory() if args.rebuild else nullcontext(args.cache) as cache:
            args.cache = Path(cache)
            evaluate_all(args, device)


@contextmanager
def _locked(output: Path | None) -> Iterator[None]:
    """Hold the lock of an output folder, on the first rank."""
    from clipdistill.distributed.collectives import rank
    from clipdistill.evaluation.ranks import with_shared_errors

    folder = output if output is not None and output.suffix != ".json" and rank() == 0 else None
    with with_shared_errors(lambda: Lock(folder / LOCK_FILE, f"--output {folder}") if folder else nullcontext()):
        yield


def _check(args: argparse.Namespace) -> None:
    """Reject invalid combinations of arguments and output paths, before anything is loaded."""
    for name in ("model", "data"):
        given = getattr(args, name)
        twice = next((each for number, each in enumerate(given) if each in given[:number]), None)
        if twice is not None:
            raise InputError(f"--{name}: {twice} given twice; allowed: each once")
    results = len(args.model) * (1 if args.task == "robustness" else len(args.data))
    output = args.output
    if output is not None and output.suffix == ".json":
        if output.is_dir():
            raise InputError(f"--output {output}: a folder; allowed: a file, or a folder without .json in its name")
        if not output.parent.is_dir():
            raise InputError(f"--output {output}: no folder {output.parent}; allowed: a file in an existing folder")
        if results > 1:
            raise InputError(f"--output {output}: one file for {results} results; allowed: a folder")
    elif output is not None:
        nearest = next(path for path in (output, *output.absolute().parents) if path.exists())
        if not nearest.is_dir():
            what = "a file" if nearest == output else f"{nearest} is a file"
            raise InputError(f"--output {output}: {what}; allowed: a folder, or a file with a name in .json")
    if args.attack is None:
        if args.eps is not None:
            raise InputError("--eps: given without --attack; allowed: only with --attack")
    elif args.task != "auto":
        raise InputError(f"--attack: given with --task {args.task}; allowed: without --task")
    else:
        args.task = ATTACK_TASK
    if args.task == "robustness" and len(args.data) < 2:
        raise InputError("--task robustness: --data has 1 set; allowed: a base set and one or more shifts of it")
    if args.baseline and args.task != "robustness":
        raise InputError(f"--baseline: given with --task {args.task}; allowed: only with --task robustness")
