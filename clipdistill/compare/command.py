"""``clipdistill compare``: its arguments, and what it writes."""

import argparse
import json
from pathlib import Path
from typing import Any

from clipdistill.errors import InputError
from clipdistill.io.arguments import path
from clipdistill.io.paths import read_text
from clipdistill.tune.command import check_start

RESULTS_FILE, TABLE_FILE, PAGE_FILE = "results.json", "table.md", "compare.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``run``."""
    parser.add_argument(
        "arms", type=path, nargs="?", metavar="ARMS.yaml", help="the arms: see clipdistill/compare/arms.py"
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--power-only", action="store_true", help="check everything, say which difference can be shown, and end"
    )
    kind.add_argument(
        "--only", metavar="ARM,...", help="run these arms only: the others run elsewhere, or later, into another output"
    )
    kind.add_argument(
        "--combine",
        nargs="+",
        type=path,
        metavar=("FOLDER", "RESULTS.json"),
        help="in place of running ARMS.yaml: compare the arms of several results, and write into FOLDER",
    )
    parser.add_argument("--against", default="", metavar="ARM", help="of --combine: compare all others with this arm")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the file, such as seeds=12 trials=32")


def run(args: argparse.Namespace) -> None:
    """Compare, and write the results.

    Raises:
        InputError: the arms are invalid, a test image is one of training or validation, parts belong to different
            comparisons, or a package is missing.
        RunError: the disk is full.
    """
    from clipdistill.distributed.signals import Interruption
    from clipdistill.io.lock import LOCK_FILE, Lock

    if (args.arms is None) == (args.combine is None) or (args.combine and len(args.combine) < 2):
        raise InputError("compare: allowed: ARMS.yaml, or --combine FOLDER RESULTS.json ...")
    if args.against and not args.combine:
        raise InputError("--against: is for --combine; allowed: against=ARM, or `against` in ARMS.yaml")
    check_start("compare", "statsmodels", allowed="one process")
    if args.combine:
        from clipdistill.compare.combine import combine

        folder, *parts = args.combine
        results = combine({str(part): _read_results(part) for part in parts}, against=args.against)
        with Lock(folder / LOCK_FILE, f"--combine: {folder}"):
            _write(folder, results)
        return
    with Interruption():
        from clipdistill.compare.arms import read_arms
        from clipdistill.compare.comparison import ArmsComparison

        only = [] if args.only is None else args.only.split(",")
        settings = read_arms(args.arms, args.overrides, only=only)
    with Lock(settings.folder / LOCK_FILE, f"output: {settings.folder}"):
        comparison = ArmsComparison(settings, progress=lambda line: print(line, flush=True))
        if args.power_only:
            comparison.prepare()
            comparison.forecast()
            return
        _write(settings.folder, comparison.run())


def _read_results(file: Path) -> Any:
    try:
        return json.loads(read_text(file, what="results"))
    except ValueError as error:
        raise InputError(f"results {file}: no JSON: {error}; allowed: results.json of `clipdistill compare`") from error


def _write(folder: Path, results: dict[str, Any]) -> None:
    from rich.console import Console

    from clipdistill.compare.page import by_shot, markdown, page, text_table
    from clipdistill.io.files import write_json, write_text, writing

    with writing(f"output {folder}", folder):
        write_json(folder / RESULTS_FILE, results)
        write_text(folder / TABLE_FILE, markdown(results))
        write_text(folder / PAGE_FILE, page(results, name=folder.resolve().name))
    Console(width=160).print(text_table(results))
    for pair in results["comparisons"]:
        print(pair["claim"])
    for line in by_shot(results):
        print(line)
    print(f"table: {folder / TABLE_FILE}\nfigures: {folder / RESULTS_FILE}\npage: {folder / PAGE_FILE}")
