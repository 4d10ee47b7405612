"""``clipdistill cache``: its arguments and the build."""

import argparse
import re
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from clipdistill.io.arguments import path, positive

if TYPE_CHECKING:
    from clipdistill.config import Config
    from clipdistill.distill.teacher_cache import CacheBuild, CacheBuilder, CacheEstimate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``run``."""
    parser.add_argument("--config", required=True, type=path, help="the config that will train from the cache")
    parser.add_argument("--dry-run", action="store_true", help="print disk and time of the build; build nothing")
    parser.add_argument("--rebuild", action="store_true", help="read all shards again, and replace all files")
    parser.add_argument(
        "--part",
        type=_part,
        default=(1, 1),
        metavar="I/N",
        help="this is machine I of N that share the work: it builds every N-th shard's file (the files can be copied "
        "into one folder)",
    )
    parser.add_argument(
        "--batch-size", type=positive, metavar="N", help="samples at once, each in all its views (default: the config)"
    )
    parser.add_argument("--device", help="such as cuda or cpu (default: cuda if available)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as teacher_cache.precision=int8")


def run(args: argparse.Namespace) -> None:
    """Build the missing files of a config; as ``build_cache``."""
    from clipdistill.config import load_config

    build_cache(
        load_config(args.config, args.overrides),
        part=args.part,
        batch_size=args.batch_size,
        device=args.device,
        rebuild=args.rebuild,
        dry_run=args.dry_run,
    )


def build_cache(
    config: "Config",
    *,
    part: tuple[int, int] = (1, 1),
    batch_size: int | None = None,
    device: str | None = None,
    rebuild: bool = False,
    dry_run: bool = False,
) -> None:
    """Build the missing files; the shards are distributed over the processes of a launcher.

    Args:
        config: the run that will train from the cache.
        part: number of this machine, from 1, and number of the machines that share the work.
        batch_size: samples at once, each in all its views; None: the config's.
        device: of the teachers; None: a GPU, if there is one.
        rebuild: read all shards again, and replace all files.
        dry_run: only print disk and time of the build.

    Raises:
        InputError: the models or the shards are invalid, or another process builds this part.
        RunError: the disk is full. The files written so far are complete.
    """
    from clipdistill.distributed.collectives import launched

    with launched(device) as device:
        from clipdistill.distill.teacher_cache import CacheBuilder
        from clipdistill.distributed.collectives import gather_objects, rank, world_size
        from clipdistill.errors import InputError
        from clipdistill.evaluation.ranks import with_shared_errors
        from clipdistill.io.lock import Lock
        from clipdistill.models.loading import read_image_size
        from clipdistill.models.precision import use_tensor_cores, warn_of_emulation
        from clipdistill.training.build import cache_content, index_all, make_decoder

        if not config.teacher_cache.folder:
            raise InputError("teacher_cache.folder: empty; allowed: a folder for the cache's files")
        teachers = [settings.load() for settings in config.teachers]
        sizes = [
            read_image_size(config.student.model, config.student.pretrained),
            *(teacher.image_size for teacher in teachers),
        ]
        content = cache_content(config, make_decoder(config, sizes))
        for teacher in teachers:
            if config.train.channels_last:
                teacher.use_channels_last()
            teacher.to(device)
        builder = CacheBuilder(
            index_all(config, rebuild=rebuild),
            teachers,
            content,
            folder=Path(config.teacher_cache.folder),
            batch_size=batch_size or config.data.batch_size,
            workers=config.data.decoding_processes(on_gpu=device.startswith("cuda")),
            device=device,
        )
        for teacher in teachers:
            if device.startswith("cuda"):
                teacher.store_as_used()
        use_tensor_cores(device)
        for settings in config.teachers:
            warn_of_emulation(device, settings.precision)
        number, parts = part
        mine = range(number - 1, len(builder.index), parts)[rank() :: world_size()]
        missing = list(mine) if rebuild else builder.missing(mine)
        estimates = gather_objects(builder.estimate(missing))
        if rank() == 0:
            print(_forecast(builder, estimates, shards=len(range(number - 1, len(builder.index), parts))), flush=True)
        if dry_run:
            return
        lock = partial(Lock, builder.folder / f".lock-{number}-of-{parts}", f"teacher_cache.folder: {builder.folder}")
        with with_shared_errors(lambda: lock() if rank() == 0 else nullcontext()):
            done = gather_objects(_build(builder, missing, sum(estimate.samples for estimate in estimates)))
        if rank() == 0:
            print(_result(builder, done))


def _build(builder: "CacheBuilder", missing: list[int], samples: int) -> "CacheBuild":
    """Build, with a progress bar on a terminal that estimates all processes' samples from this one's."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

    from clipdistill.distributed.collectives import rank, world_size

    console = Console(stderr=True)
    if rank() > 0 or not console.is_terminal:
        return builder.build(missing)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=samples)
        return builder.build(missing, progress=lambda done: progress.update(bar, completed=done * world_size()))


def _forecast(builder: "CacheBuilder", estimates: list["CacheEstimate"], *, shards: int) -> str:
    samples, missing = (sum(getattr(each, name) for each in estimates) for name in ("samples", "shards"))
    size = sum(each.bytes for each in estimates)
    seconds = max(each.seconds for each in estimates)
    return (
        f"{builder.folder}: {shards - missing} of {shards} shards are cached; to build: {missing} shards, "
        f"{samples:,} samples of {estimates[0].bytes_per_sample:,} bytes ({builder.content.views.number} views, "
        f"{builder.content.precision}), {size / 1e6:,.1f} MB, about {timedelta(seconds=round(seconds))}"
    )


def _result(builder: "CacheBuilder", done: list["CacheBuild"]) -> str:
    skipped = sum((each.skipped for each in done), start=type(done[0].skipped)())
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(skipped.items()))
    return (
        f"{builder.folder}: {sum(each.written for each in done)} files written, "
        f"{sum(each.samples for each in done):,} samples" + (f"; bad samples: {reasons}" if reasons else "")
    )


def _part(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    part, parts = map(int, found.groups()) if found else (0, 0)
    if not 1 <= part <= parts:
        raise argparse.ArgumentTypeError(f"{text} is not allowed; allowed: I/N with I from 1 to N, such as 2/4")
    return part, parts
