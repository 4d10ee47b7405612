"""``clipdistill export``: its arguments, and the steps of an export."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from clipdistill.io.arguments import path, positive, positive_number
from clipdistill.io.caches import DEFAULT_CACHE

if TYPE_CHECKING:
    from clipdistill.export.card import TrainedRun
    from clipdistill.models.prompts import PromptSet

_FORMATS = "open_clip, transformers, onnx"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``clipdistill export``."""
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="RUN",
        help="a finished run's folder, an export, hf-hub:OWNER/NAME, local-dir:FOLDER, or an open_clip name",
    )
    parser.add_argument("--pretrained", default="", help="tag or weights file, with an open_clip name")
    parser.add_argument("--output", required=True, type=path, metavar="DIR", help="new folder")
    parser.add_argument(
        "--formats",
        nargs="+",
        default=[],
        metavar="FORMAT",
        help=f"of {_FORMATS}; each must be possible (default: all possible ones; the reasons for others are printed)",
    )
    parser.add_argument(
        "--prompts",
        metavar="SET",
        help="prompt set (name or folder) that becomes classifier.onnx, and among whose classes top-1 is compared "
        "(default: the run's)",
    )
    parser.add_argument(
        "--allow-duplicate-classes",
        action="store_true",
        help="accept a class list that names a class twice (published ImageNet lists do)",
    )
    parser.add_argument(
        "--dims",
        type=positive,
        metavar="D",
        help="cut the embeddings to their first D dimensions, for a student that was trained with nested ones",
    )
    parser.add_argument("--half", action="store_true", help="float16 weights in every file: half the size")
    parser.add_argument("--int8", action="store_true", help="also write dynamically quantised ONNX files")
    checks = parser.add_argument_group("verification against the model")
    checks.add_argument(
        "--data",
        metavar="FOLDER",
        help="use images of this data set in CLIP_benchmark's layout (default: synthetic ones)",
    )
    checks.add_argument("--split", default="test", help="of the data set (default: %(default)s)")
    checks.add_argument("--images", type=positive, default=64, help="number of images (default: %(default)s)")
    checks.add_argument(
        "--parity-bound",
        type=positive_number,
        metavar="X",
        help="largest difference of unit-norm features; beyond it the export fails (default: 1e-4, with --half 1e-2)",
    )
    checks.add_argument(
        "--cache",
        type=path,
        default=Path(DEFAULT_CACHE),
        metavar="DIR",
        help="folder for the class features (default: %(default)s)",
    )
    card = parser.add_argument_group("the model card")
    card.add_argument(
        "--license", default="unknown", help="of the weights, as the Hub writes it (default: %(default)s)"
    )
    card.add_argument("--datasets", nargs="+", default=[], metavar="OWNER/NAME", help="Hub ids of the training data")
    card.add_argument(
        "--benchmark",
        action="append",
        default=[],
        metavar="SET=OWNER/NAME[:TASK]",
        help="the Hub benchmark of an evaluation set of the run; its result goes to .eval_results/ (repeatable)",
    )
    card.add_argument(
        "--results",
        type=path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="folders of `clipdistill evaluate --output`: their results of this model, such as those under attack, go "
        "into the card",
    )
    hub = parser.add_argument_group("the Hugging Face Hub (token: HF_TOKEN, or `hf auth login`)")
    hub.add_argument("--push-to-hub", metavar="OWNER/NAME", help="push the export, in one commit")
    hub.add_argument("--private", action="store_true", help="to a private repo")


def run(args: argparse.Namespace) -> None:
    """Check the arguments, write and verify the export, write its card, push it.

    Raises:
        InputError: bad arguments, checkpoint or token; nothing is written.
        RunError: a file differs from the model (nothing is left behind), the disk is full, or the push failed.
    """
    from dataclasses import replace

    import transformers

    from clipdistill.errors import InputError
    from clipdistill.evaluation import load_for_evaluation
    from clipdistill.evaluation.models import fingerprint
    from clipdistill.evaluation.results import results_of
    from clipdistill.export.build import write_formats
    from clipdistill.export.card import UserMetadata, check_repo_id, read_run, write_card
    from clipdistill.export.hub import check_token, push
    from clipdistill.io.files import check_new, new_folder, writing
    from clipdistill.io.lock import Lock
    from clipdistill.io.paths import expand
    from clipdistill.models.nested import cut_to

    check_new(args.output, what="--output")
    if args.private and not args.push_to_hub:
        raise InputError("--private: given without --push-to-hub; allowed: only together with --push-to-hub")
    user_metadata = UserMetadata(license=args.license, datasets=args.datasets, benchmarks=_benchmarks(args.benchmark))
    if args.push_to_hub:
        check_repo_id("--push-to-hub", args.push_to_hub)
        check_token(args.push_to_hub)

    transformers.utils.logging.disable_progress_bar()
    trained_run = read_run(args.checkpoint)
    prompts = _choose_prompts(args.prompts, trained_run, allow_duplicates=args.allow_duplicate_classes)
    tower = load_for_evaluation(args.checkpoint, args.pretrained)
    if args.dims is not None:
        tower = cut_to(tower, args.dims)
        summary = {key: value for key, value in trained_run.summary.items() if key != "evaluations"}
        trained_run = replace(trained_run, summary=summary)  # those are of all dimensions
    results = results_of(args.results, fingerprint(tower), flag="--results") if args.results else []
    lock = Lock(args.output.with_name(f".{args.output.name}.lock"), f"--output {args.output}")
    with lock, writing(f"export {args.output}", args.output), new_folder(args.output) as folder:
        exported = write_formats(
            tower,
            folder,
            formats=[name for argument in args.formats for name in argument.split(",")],
            prompts=prompts,
            data=args.data,
            split=args.split,
            images=args.images,
            half=args.half,
            int8=args.int8,
            bound=args.parity_bound,
            cache=expand(args.cache),
        )
        write_card(
            folder,
            tower,
            exported,
            trained_run,
            results=results,
            user_metadata=user_metadata,
            prompts=prompts,
            half=args.half,
            repo_id=args.push_to_hub,
        )
    for line in exported.lines():
        print(line)
    print(f"{args.output}: {', '.join(exported.formats)}; the card: {args.output / 'README.md'}")
    if args.push_to_hub:
        print(f"pushed: {push(args.output, args.push_to_hub, private=args.private)}")


def _choose_prompts(chosen: str | None, run: "TrainedRun", *, allow_duplicates: bool) -> "PromptSet | None":
    """The prompt set chosen by the user; else the run's: as it was recorded, or else from where its config says."""
    from clipdistill.errors import InputError
    from clipdistill.models.prompts import load_prompts

    if chosen:
        return load_prompts(chosen, allow_duplicates=allow_duplicates)
    if run.prompts is not None or not run.config.get("prompts"):
        return run.prompts
    try:
        return load_prompts(run.config["prompts"], allow_duplicates=allow_duplicates)
    except InputError as error:
        raise InputError(f"--prompts: not given, and the run's are not there: {error}") from error


def _benchmarks(arguments: list[str]) -> dict[str, str]:
    from clipdistill.errors import InputError

    benchmarks = {}
    for argument in arguments:
        name, equals, benchmark = argument.partition("=")
        if not (name and equals and benchmark):
            raise InputError(f"--benchmark {argument}: not SET=OWNER/NAME; allowed: e.g. icons=OWNER/icons:default")
        benchmarks[name] = benchmark
    return benchmarks
