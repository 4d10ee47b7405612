"""``clipdistill cache-clean``: its arguments, and the deleting."""

import argparse
import math
import shutil
from pathlib import Path

from clipdistill.errors import InputError
from clipdistill.io.arguments import path, positive_number
from clipdistill.io.caches import DEFAULT_CACHE, clean
from clipdistill.io.files import why
from clipdistill.io.lock import LOCK_FILE, Lock
from clipdistill.io.run_files import ASIDE, CHECKPOINTS_FOLDER, CONFIG_FILE

_UNUSED_DAYS = 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``run``."""
    parser.add_argument("--cache", type=path, default=Path(DEFAULT_CACHE), metavar="DIR", help="default: %(default)s")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--unused-days",
        type=positive_number,
        default=_UNUSED_DAYS,
        metavar="N",
        help="delete files that no command has used for N days (default: %(default)s)",
    )
    which.add_argument("--all", action="store_true", help="delete all files of the cache")
    parser.add_argument(
        "--max-gb",
        type=positive_number,
        metavar="GB",
        help="then delete those used least recently, until GB gigabytes are left",
    )
    parser.add_argument(
        "--abandoned",
        type=path,
        nargs="+",
        default=[],
        metavar="RUN",
        help="also delete what --restart and --resume have set aside in these runs",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be deleted")


def run(args: argparse.Namespace) -> None:
    """Delete, and print what was deleted.

    Raises:
        InputError: a folder that is no run, that another process is writing, or from which nothing may be deleted.
    """
    for folder in args.abandoned:
        if not (folder / CONFIG_FILE).is_file():
            raise InputError(f"--abandoned {folder}: no {CONFIG_FILE} in it; allowed: the folder of a run")
    cache = args.cache.expanduser()
    if cache.exists() and not cache.is_dir():
        raise InputError(f"--cache {cache}: not a folder; allowed: a folder")
    most = None if args.max_gb is None else round(args.max_gb * 1e9)
    verb = "would be deleted" if args.dry_run else "deleted"
    try:
        days = -math.inf if args.all else args.unused_days
        for name, cleaned in clean(cache, days=days, most_bytes=most, dry_run=args.dry_run).items():
            print(
                f"{cache / name}: {len(cleaned.deleted):,} of {cleaned.files:,} files {verb}, "
                f"{cleaned.deleted_bytes / 1e6:,.1f} of {cleaned.bytes / 1e6:,.1f} MB"
            )
        for folder in args.abandoned:
            with Lock(folder / LOCK_FILE, f"--abandoned {folder}"):
                for aside in [*folder.glob(f"{ASIDE}[0-9]*"), *(folder / CHECKPOINTS_FOLDER).glob(f"{ASIDE}step_*")]:
                    size = sum(each.stat().st_size for each in aside.rglob("*") if each.is_file())
                    if not args.dry_run:
                        shutil.rmtree(aside)
                    print(f"{aside}: {verb}, {size / 1e6:,.1f} MB")
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be deleted: {why(error)}; allowed: a file that may be") from error
