"""``clipdistill shards``: its arguments, and the sources and formats that they select."""

import argparse
import sys
from typing import Any

from clipdistill.errors import InputError
from clipdistill.io.arguments import not_negative, path, positive
from clipdistill.io.files import check_new
from clipdistill.models.class_matching import BY_ORDER_FLAG
from clipdistill.models.prompts import load_prompts
from clipdistill.shards.icons import render_icons
from clipdistill.shards.sources import Source, from_csv, from_hf_dataset, from_image_folder
from clipdistill.shards.writing import (
    DEFAULT_TEMPLATES,
    write_classification_folder,
    write_retrieval_folder,
    write_split,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``clipdistill shards``: one sub-command for each source."""
    sources = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")

    icons = sources.add_parser(
        "icons",
        help="the icon fonts of the package qtawesome: the data of the quickstart",
        description="Render open icon fonts: DIR/train, DIR/val (a fifth of the drawings of 240 classes) and "
        "DIR/test (the same classes in a font held out). A folder that holds them already is kept.",
    )
    icons.add_argument("--output", type=path, required=True, metavar="DIR", help="folder to write")
    icons.add_argument(
        "--size", type=positive, default=64, metavar="PIXELS", help="width and height, 32 to 512 (default: 64)"
    )
    icons.add_argument(
        "--imbalance",
        type=positive,
        metavar="N",
        help="a long-tailed training set: from N pictures of the most frequent class to 1 of the rarest, falling "
        "exponentially (default: every drawing once)",
    )
    icons.add_argument(
        "--seed",
        type=not_negative,
        metavar="N",
        help="of the drawings of a long-tailed training set (default: 0)",
    )

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--output", type=path, required=True, metavar="DIR", help="folder to write, or to add the split to"
    )
    common.add_argument("--split", default="train", metavar="NAME", help="the shards go to DIR/NAME (default: train)")
    common.add_argument(
        "--samples-per-shard",
        type=positive,
        default=1000,
        metavar="N",
        help="samples in one tar file (default: 1000)",
    )
    common.add_argument(
        "--prompts",
        metavar="SET",
        help="class names and templates: a shipped set such as imagenet-1k, or a folder with classnames.txt "
        f"and templates.txt (default: the source's own names, and {DEFAULT_TEMPLATES[0]!r})",
    )
    common.add_argument(
        BY_ORDER_FLAG,
        action="store_true",
        help="match the source's classes with those of --prompts by their order (default: by name; names that are all "
        "numbers are indices)",
    )
    common.add_argument(
        "--keep-order",
        action="store_true",
        help="keep the order of the source (default: a fixed shuffle, so that each shard is a mixture)",
    )
    common.add_argument(
        "--skip-bad",
        action="store_true",
        help="skip bad rows and list them (default: stop at the first)",
    )
    columns = argparse.ArgumentParser(add_help=False)
    columns.add_argument(
        "--image-column", default="image", metavar="NAME", help="column of the images (default: image)"
    )
    columns.add_argument("--caption-column", metavar="NAME", help="column of the captions (default: no captions)")
    columns.add_argument(
        "--label-column", metavar="NAME", help="column of class names, or of indices from 0 (default: no labels)"
    )

    folder = sources.add_parser(
        "folder",
        parents=[common],
        help="an image folder with one folder per class",
        description="Make shards of ROOT/<class>/**/<image>, as torchvision's ImageFolder reads it. Links are "
        "followed, hidden names skipped. ROOT/classnames.txt, if there is one, lists the classes by name.",
    )
    folder.add_argument(
        "root", type=path, metavar="ROOT", help="the image folder; if it has splits, that of --split is read"
    )

    table = sources.add_parser(
        "csv",
        parents=[common, columns],
        help="a CSV or TSV table with paths of images",
        description="Make shards of a UTF-8 table with a header line. With captions, rows that name the same "
        "image are one sample.",
    )
    table.add_argument("table", type=path, metavar="TABLE", help="the table")
    table.add_argument(
        "--root",
        type=path,
        metavar="DIR",
        help="where relative paths of images start (default: the table's folder)",
    )
    table.add_argument(
        "--delimiter", metavar="CHARACTER", help="between columns (default: a tab for .tsv, else a comma)"
    )

    hub = sources.add_parser(
        "hf",
        parents=[common, columns],
        help="a dataset of the Hugging Face Hub, or a local one",
        description="Make shards of a dataset that the library `datasets` can load. Private ones need `hf auth login`.",
    )
    hub.add_argument("name", metavar="NAME", help="name on the Hub, local folder, or folder of save_to_disk")
    hub.add_argument("--subset", metavar="NAME", help="configuration of the dataset, where it has several")
    hub.add_argument(
        "--source-split",
        metavar="SPLIT",
        help="split to read, such as 'train[:10%%]' (default: that of --split)",
    )
    hub.add_argument(
        "--image-root",
        type=path,
        metavar="DIR",
        help="folder in which image cells may name files (default: only embedded images, and files of the dataset)",
    )
    hub.add_argument("--streaming", action="store_true", help="do not download the dataset first; keeps its order")


def run(args: argparse.Namespace) -> None:
    """Make the shards, and print a one-line summary."""
    if args.source == "icons":
        _run_icons(args)
        return
    check_new(args.output / args.split)
    source = _open_source(args)
    options: dict[str, Any] = {
        "split": args.split,
        "samples_per_shard": args.samples_per_shard,
        "progress": _show if sys.stderr.isatty() else None,
    }
    if source.classnames is not None:
        templates = load_prompts(args.prompts).templates if args.prompts else source.templates
        summary = write_classification_folder(
            source.samples, args.output, classnames=source.classnames, templates=templates, **options
        )
        content = f", {len(source.classnames)} classes"
    elif args.caption_column is not None and args.label_column is None:
        summary = write_retrieval_folder(source.samples, args.output, **options)
        content = " with captions"
    else:
        summary = write_split(source.samples, args.output, shared_files={}, **options)
        content = ""
    for line in source.skipped:
        print(f"skipped: {line}", file=sys.stderr)
    skipped = f"; {len(source.skipped)} bad rows skipped" if source.skipped else ""
    notes = "".join(f"; {note}" for note in source.notes)
    print(f"{summary.folder}: {summary.samples} samples in {summary.shards} shards{content}{skipped}{notes}")


def _open_source(args: argparse.Namespace) -> Source:
    common: dict[str, Any] = {
        "classnames": load_prompts(args.prompts).classnames if args.prompts else None,
        "by_order": args.labels_by_order,
        "shuffle_seed": None if args.keep_order or getattr(args, "streaming", False) else 0,
        "skip_bad": args.skip_bad,
    }
    if args.source == "folder":
        return from_image_folder(args.root, split=args.split, **common)
    if args.labels_by_order and not args.prompts:
        raise InputError(f"{BY_ORDER_FLAG}: given without --prompts; allowed: only together with --prompts")
    if args.prompts and args.label_column is None:
        raise InputError("--prompts: given without --label-column; allowed: only together with --label-column")
    common |= {name: getattr(args, name) for name in ("image_column", "caption_column", "label_column")}
    if args.source == "csv":
        return from_csv(args.table, root=args.root, delimiter=args.delimiter, **common)
    split = args.source_split or args.split
    common |= {name: getattr(args, name) for name in ("subset", "streaming", "image_root")}
    return from_hf_dataset(args.name, split=split, **common)


def _run_icons(args: argparse.Namespace) -> None:
    if args.seed is not None and args.imbalance is None:
        raise InputError("--seed: given without --imbalance; allowed: only with --imbalance")
    progress = _show if sys.stderr.isatty() else None
    summary = render_icons(
        args.output, size=args.size, imbalance=args.imbalance, seed=args.seed or 0, progress=progress
    )
    counts = ", ".join(f"{count} {split}" for split, count in summary.samples.items())
    print(f"{args.output}: {counts} icons of {summary.size} px, {summary.classes} classes")


def _show(done: int, total: int | None = None) -> None:
    """Show a count on the terminal; the next line printed overwrites it."""
    print(f"{done}{f' of {total}' if total else ''}", end="\r", file=sys.stderr, flush=True)
