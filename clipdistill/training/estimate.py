"""``clipdistill estimate``: time, memory and disk of a run, from a few of its steps, before renting hardware."""

import argparse
import gc
import json
import os
import subprocess
import sys
from dataclasses import asdict
from datetime import timedelta
from typing import Any

from clipdistill.io.arguments import path, positive

_STEPS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``run``."""
    parser.add_argument("--config", required=True, type=path, help="config of the run")
    parser.add_argument("--steps", type=positive, default=_STEPS, help="steps to measure (default: %(default)s)")
    parser.add_argument(
        "--no-sweep", action="store_true", help="skip the search for the largest batch that fits (made by one process)"
    )
    parser.add_argument("--largest", type=positive, default=65536, help="largest batch to try (default: %(default)s)")
    parser.add_argument("--json", type=path, help="also write the figures to this file")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as data.batch_size=512")


def run(args: argparse.Namespace) -> None:
    """Measure, sweep, and print.

    Raises:
        InputError: the config, the models or the shards are invalid.
    """
    from rich.console import Console

    from clipdistill.config import load_config
    from clipdistill.errors import InputError
    from clipdistill.io.files import write_json
    from clipdistill.training.profiling import profile_steps

    if args.json is not None and not args.json.parent.is_dir():
        raise InputError(f"--json {args.json}: no folder {args.json.parent}; allowed: a file in an existing folder")
    config = load_config(args.config, args.overrides)
    if args.one:
        print(json.dumps(asdict(profile_steps(config, args.steps))))
        return
    console = Console()
    profile = profile_steps(config, args.steps)
    if int(os.environ.get("RANK", "0")) > 0:
        return
    profile.print(console)
    kept = config.train.keep + (config.train.keep_best if config.train.evaluate_every else 0) + 1
    disk = kept * profile.checkpoint_bytes
    hours = timedelta(seconds=round(profile.total_steps * profile.seconds))
    console.print(
        f"the run: {profile.total_steps:,} steps, {profile.total_steps * profile.samples:,} samples, {hours} of "
        f"training; up to {kept} checkpoints, {disk / 2**30:,.2f} GiB of disk",
        highlight=False,
    )
    result: dict[str, Any] = asdict(profile) | {
        "samples_per_second": profile.samples_per_second,
        "utilisation": profile.utilisation,
        "disk_bytes": disk,
        "hours": profile.total_steps * profile.seconds / 3600,
    }
    if not args.no_sweep and profile.processes == 1:
        result["sweep"] = _sweep(args, config.data.batch_size, console)
    if args.json:
        write_json(args.json, result)


def _sweep(args: argparse.Namespace, batch_size: int, console: Any) -> list[dict[str, Any]]:
    """Double the batch until it does not fit; each size in a separate process, which may run out of memory."""
    import torch
    from rich.table import Table

    gc.collect()  # the run that was measured
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    found: list[dict[str, Any]] = []
    table = Table(title="batch sizes of one process")
    for column in ("batch", "samples/s", "peak memory", ""):
        table.add_column(column, justify="right")
    size, room = batch_size, _room()
    while size <= args.largest:
        if found and room is not None and 2 * found[-1]["peak_bytes"] > room:
            table.add_row(f"{size:,}", "", "", f"would not fit in {room / 2**30:,.1f} GiB")
            break
        command = [sys.executable, "-m", "clipdistill", "estimate", "--one", "--steps", "4"]
        command += ["--config", str(args.config), *args.overrides, f"data.batch_size={size}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            why = (done.stderr.strip().splitlines() or ["killed"])[-1]
            table.add_row(f"{size:,}", "", "", "out of memory" if "memory" in why.lower() else why)
            break
        profile = json.loads(done.stdout.splitlines()[-1])
        rate = profile["samples"] / profile["seconds"]
        found.append({"batch_size": size, "samples_per_second": rate, "peak_bytes": profile["peak_bytes"]})
        table.add_row(f"{size:,}", f"{rate:,.0f}", f"{profile['peak_bytes'] / 2**30:,.2f} GiB", "")
        size *= 2
    console.print(table)
    if found:
        best = max(found, key=lambda each: each["samples_per_second"])
        console.print(
            f"largest that fits: {found[-1]['batch_size']:,}; fastest: {best['batch_size']:,}", highlight=False
        )
    return found


def _room() -> int | None:
    """Memory of the machine if training runs on the CPU, to stop before it is full; None: a GPU raises an error."""
    import torch

    if torch.accelerator.is_available():
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
