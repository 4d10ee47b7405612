"""``clipdistill compare``: its arguments, and what it writes."""

import argparse

from clipdistill.io.arguments import path
from clipdistill.tune.command import check_start

RESULTS_FILE, TABLE_FILE, PAGE_FILE = "results.json", "table.md", "compare.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``run``."""
    parser.add_argument("arms", type=path, metavar="ARMS.yaml", help="the arms: see clipdistill/compare/arms.py")
    parser.add_argument(
        "--power-only", action="store_true", help="check everything, say which difference can be shown, and end"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the file, such as seeds=12 trials=32")


def run(args: argparse.Namespace) -> None:
    """Compare, and write the results.

    Raises:
        InputError: the arms are invalid, a test image is one of training or validation, or a package is missing.
        RunError: the disk is full.
    """
    from rich.console import Console

    from clipdistill.distributed.signals import Interruption
    from clipdistill.io.files import write_json, write_text, writing
    from clipdistill.io.lock import LOCK_FILE, Lock

    check_start("compare", "statsmodels", allowed="one process")
    with Interruption():
        from clipdistill.compare.arms import read_arms
        from clipdistill.compare.comparison import ArmsComparison
        from clipdistill.compare.page import markdown, page, text_table

        settings = read_arms(args.arms, args.overrides)
    folder = settings.folder
    with Lock(folder / LOCK_FILE, f"output: {folder}"):
        comparison = ArmsComparison(settings, progress=lambda line: print(line, flush=True))
        if args.power_only:
            comparison.prepare()
            comparison.forecast()
            return
        results = comparison.run()
        with writing(f"output {folder}", folder):
            write_json(folder / RESULTS_FILE, results)
            write_text(folder / TABLE_FILE, markdown(results))
            write_text(folder / PAGE_FILE, page(results, name=folder.resolve().name))
    Console(width=160).print(text_table(results))
    for pair in results["comparisons"]:
        print(pair["claim"])
    print(f"table: {folder / TABLE_FILE}\nfigures: {folder / RESULTS_FILE}\npage: {folder / PAGE_FILE}")
