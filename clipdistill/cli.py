"""The command line: ``clipdistill {quickstart,train,evaluate,export,shards}``.

Exit code 0: done. 2: the user's input is wrong (one line says what). 1: a fault.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from clipdistill import __version__
from clipdistill.errors import InputError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    parser = _parser()
    args = parser.parse_args(argv)
    logging.basicConfig(
        level=logging.INFO if args.verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )
    try:
        args.run(args)
    except InputError as error:
        print(f"clipdistill: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"clipdistill: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="clipdistill", description="Distil a large OpenCLIP teacher into a small zero-shot student."
    )
    parser.add_argument("--version", action="version", version=f"clipdistill {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="log what is loaded and written")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    quickstart = commands.add_parser(
        "quickstart",
        help="render icons, distil a small student, compare it with its teacher on an unseen icon family",
        description="Render ten icon fonts, distil the shipped teacher into a student several times smaller, evaluate "
        "both on a font that neither has seen, and write the student, results.json and a picture. Needs no network, no "
        "GPU. What is already in the output folder is reused.",
    )
    quickstart.add_argument(
        "--output", type=Path, default=Path("quickstart"), help="folder for everything (default: %(default)s)"
    )
    quickstart.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes to configs/quickstart.yaml")
    quickstart.set_defaults(run=_quickstart)

    train = commands.add_parser(
        "train",
        help="distil a student as a config says",
        description="Distil a student. Under `accelerate launch` or `torchrun` use scripts/train.py, same arguments.",
    )
    train.add_argument("--config", required=True, type=Path, help="YAML file, such as configs/icons-gkl.yaml")
    train.add_argument(
        "--resume",
        metavar="auto|CHECKPOINT",
        help="auto: go on from the newest valid checkpoint in the config's output, or start; or a checkpoint's folder",
    )
    train.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="such as optimizer.lr=1e-3 objective.0.gamma=0.5"
    )
    train.set_defaults(run=_train)

    evaluate = commands.add_parser(
        "evaluate",
        help="zero-shot accuracy on data sets in CLIP_benchmark's layout",
        description="Zero-shot top-1, top-5 and mean per-class recall on a data set in CLIP_benchmark's layout, and "
        "agreement with a teacher. Writes CLIP_benchmark's JSON.",
    )
    evaluate.add_argument(
        "--model",
        required=True,
        help="a run's folder, an export, hf-hub:OWNER/NAME, local-dir:FOLDER, or an open_clip name",
    )
    evaluate.add_argument("--pretrained", default="", help="tag or weights file, with an open_clip name")
    evaluate.add_argument(
        "--data", required=True, metavar="FOLDER", help="holds classnames.txt and SPLIT/0.tar, 1.tar, ..."
    )
    evaluate.add_argument("--split", default="test", help="default: %(default)s")
    evaluate.add_argument("--prompts", help="a prompt set (name or folder) in place of the data set's own")
    evaluate.add_argument(
        "--allow-duplicate-classes",
        action="store_true",
        help="accept a class list that names a class twice (published ImageNet lists do)",
    )
    evaluate.add_argument("--teacher", help="a second model, for teacher_agreement and teacher_kl")
    evaluate.add_argument("--teacher-pretrained", default="", help="tag or weights file of the teacher")
    evaluate.add_argument(
        "--output", type=Path, metavar="FILE.json", help="where the result is written (default: printed)"
    )
    evaluate.add_argument("--batch-size", type=_positive, default=256, help="images at once (default: %(default)s)")
    evaluate.add_argument("--workers", type=_positive, default=4, help="decoding threads (default: %(default)s)")
    evaluate.add_argument("--device", default=None, help="such as cuda or cpu (default: cuda where there is one)")
    evaluate.set_defaults(run=_evaluate)

    export = commands.add_parser(
        "export",
        help="write a run's student as a folder that open_clip loads",
        description="Write a student in open_clip's format (config, safetensors, tokenizer), after checking that the "
        "reloaded model computes the same features.",
    )
    export.add_argument(
        "--checkpoint",
        required=True,
        metavar="RUN",
        help="a finished run's folder, or anything evaluate --model takes",
    )
    export.add_argument("--output", required=True, type=Path, metavar="DIR", help="new folder")
    export.add_argument("--half", action="store_true", help="float16 weights: half the size")
    export.set_defaults(run=_export)

    shards = commands.add_parser(
        "shards",
        help="make WebDataset shards from icons, an image folder, a CSV or a Hugging Face data set",
        description="Make WebDataset shards.",
    )
    from clipdistill.shards import add_arguments

    add_arguments(shards)
    shards.set_defaults(run=_shards)
    return parser


def _quickstart(args: argparse.Namespace) -> None:
    from clipdistill.quickstart import quickstart

    quickstart(args.output, overrides=args.overrides)


def _train(args: argparse.Namespace) -> None:
    from clipdistill.config import load_config

    config = load_config(args.config, args.overrides)
    from clipdistill.trainer import train

    result = train(config, resume=args.resume)
    if int(os.environ.get("RANK", "0")) > 0:
        return
    print(f"student: {result.student}")
    for record in result.evaluations:
        print(f"{record['dataset']}: zero-shot top-1 {record['metrics']['acc1']:.2%}")


def _evaluate(args: argparse.Namespace) -> None:
    import torch

    from clipdistill import evaluation
    from clipdistill.files import write_json

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"--device {device}: not available here; allowed: cpu, or a device that torch finds"
        ) from error
    if args.output is not None and args.output.is_dir():
        raise InputError(f"--output {args.output}: a folder; allowed: a file in an existing folder")
    if args.output is not None and not args.output.parent.is_dir():
        raise InputError(
            f"--output {args.output}: no folder {args.output.parent}; allowed: a file in an existing folder"
        )
    data = evaluation.load_classification_set(
        args.data, split=args.split, prompts=args.prompts, allow_duplicates=args.allow_duplicate_classes
    )
    tower = evaluation.load_for_evaluation(args.model, args.pretrained, device=device)
    teacher_predictions = None
    if args.teacher:
        teacher = evaluation.load_for_evaluation(args.teacher, args.teacher_pretrained, device=device)
        teacher_predictions = evaluation.predict(
            teacher, data, batch_size=args.batch_size, workers=args.workers, device=device
        )
    predictions = evaluation.predict(tower, data, batch_size=args.batch_size, workers=args.workers, device=device)
    metrics = evaluation.classification_metrics(predictions, teacher_predictions)
    record = evaluation.benchmark_record(data, metrics, model=args.model, pretrained=args.pretrained)
    if args.output is None:
        print(json.dumps(record, indent=2, allow_nan=False))
    else:
        write_json(args.output, record)
        print(f"{args.output}: " + ", ".join(f"{k} {v:.4f}" for k, v in metrics.items() if v is not None))


def _export(args: argparse.Namespace) -> None:
    import torch

    from clipdistill.evaluation import load_for_evaluation
    from clipdistill.export import export_open_clip

    tower = load_for_evaluation(args.checkpoint)
    dtype = torch.float16 if args.half else torch.float32
    difference = export_open_clip(tower, args.output, dtype=dtype)
    print(f"{args.output}: features differ by at most {difference:.1e} when reloaded")


def _shards(args: argparse.Namespace) -> None:
    from clipdistill.shards import run

    run(args)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not allowed; allowed: 1 or more")
    return number


if __name__ == "__main__":
    sys.exit(main())
