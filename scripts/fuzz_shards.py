"""Feed mutated shards to the reader, and check its output.

    python scripts/fuzz_shards.py --shards 2000 --seed 0 --json fuzz.json

`hostile_shards.make_shard` makes the shards. `index_shards` and `StreamLoader` read each together with a good one, in a
separate process with a time limit.

A sample that no mutation touched must be yielded exactly, or skipped for its known reason. One that was touched may
differ or be missing, but never silently, and never with members of two samples. Two kinds may be missing although
untouched: samples that inserted or deleted bytes have moved off tar's grid of 512 bytes, and samples swallowed by a
member with a forged, larger size. The latter, and samples deleted or overwritten completely, may be missing silently:
the archive contains no trace of them.

Exit status 0: no crash, no hang, no wrong or lost sample, no executed pickle, and the counts add up; 1: otherwise.
"""

import argparse
import faulthandler
import json
import logging
import multiprocessing
import os
import platform
import random
import resource
import shlex
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from multiprocessing.connection import Connection, wait
from pathlib import Path

import numpy as np
import PIL
import torch
from hostile_shards import SIDE, Bad, Pixels, Sample, Shard, build, good_sample, list_entries, make_shard
from rich.console import Console
from rich.progress import track

import clipdistill
from clipdistill.data import ImageTextStream, ShardIndex, StreamLoader, index_shards
from clipdistill.data.sample import Decoder
from clipdistill.io.files import write_json
from clipdistill.io.machine import describe_machine

FAULTS = ("crashes", "hangs", "wrong_samples", "lost_samples", "miscounted", "executed")
BESIDE = ("beside/0", "beside/1")


@dataclass
class HandedOut:
    """A sample as yielded by the loader."""

    key: str
    caption: str
    label: int
    pixels: Pixels


@dataclass(kw_only=True)
class Outcome:
    """Result of reading a shard together with a good one."""

    indexes: list[ShardIndex]
    handed_out: list[HandedOut]
    skipped: dict[str, int]
    logged: list[tuple[str, str]]
    """Key and reason of each sample that was logged as skipped."""


class LoggedSkips(logging.Handler):
    """Collects the log lines on skipped samples."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Record key and reason."""
        if record.getMessage().count("\n"):
            raise ValueError(f"a log message with several lines: {record.getMessage()!r}")
        if str(record.msg).startswith("skipped") and isinstance(record.args, tuple):
            key, _, reason, *_ = record.args
            self.found.append((str(key), str(reason)))


def read(shard: Shard, urls: list[str]) -> Outcome:
    """Index the shards, and read one epoch."""
    logger = logging.getLogger("clipdistill")
    logger.propagate = False
    skips = LoggedSkips()
    logger.addHandler(skips)
    try:
        indexes = index_shards(urls, cache_dir=None, threads=2)
        stream = ImageTextStream(
            indexes,
            Decoder(
                image_size=SIDE,
                augmentation=None,
                caption_key="caption" if shard.as_json else "txt",
                label_key="label" if shard.as_json else "cls",
                require_captions=shard.required,
                require_labels=shard.required,
            ),
            batch_size=1,
            seed=shard.rng.randrange(1000),
            shuffle=shard.rng.choice([0, 3, 1000]),
        )
        loader = StreamLoader(stream)
        handed_out = [
            HandedOut(
                batch.keys[0], batch.captions[0], int(batch.labels_B[0]), batch.image_BCHW[0].numpy().transpose(1, 2, 0)
            )
            for batch in islice(loader, loader.steps_per_epoch)
        ]
    finally:
        logger.removeHandler(skips)
    return Outcome(indexes=indexes, handed_out=handed_out, skipped=loader.skipped, logged=skips.found)


def judge(shard: Shard, outcome: Outcome) -> dict[str, list[str]]:
    """Faults of an outcome, by kind."""
    wrong, lost, miscounted = [], [], []
    (indexed, beside), problems = map(len, outcome.indexes), outcome.indexes[0].problems
    samples, skips = indexed + beside, sum(outcome.skipped.values())
    # An epoch has a step for each sample. If some are skipped, its last steps repeat its first ones.
    once, again = outcome.handed_out[: samples - skips], outcome.handed_out[samples - skips :]
    keys = Counter(sample.key for sample in once)
    reasons = Counter(reason for _, reason in outcome.logged)
    contents_only = all(mutation.startswith("contents") for mutation in shard.mutations)

    if len(outcome.handed_out) != samples:
        miscounted.append(f"{len(outcome.handed_out)} steps for {samples} samples")
    if not {sample.key for sample in again} <= keys.keys():
        miscounted.append(f"{samples} samples, {skips} skipped, but more than {samples - skips} yielded")
    if reasons != outcome.skipped if contents_only else not reasons.keys() <= outcome.skipped.keys():
        miscounted.append(f"skipped {outcome.skipped}, but logged {dict(reasons)}")
    if contents_only and (problems or indexed + len(shard.out_of_reach) != len(shard.samples)):
        miscounted.append(f"{indexed} of {len(shard.samples)} samples in an archive without damage, {problems}")
    if sorted(set(keys) & set(BESIDE)) != sorted(BESIDE):
        lost.append("samples of the good shard")
    wrong += [f"yielded {count} times: {key!r}" for key, count in keys.items() if count > 1]

    for sample in once:
        origins = origins_of(shard, sample)
        if len(set(origins.values())) > 1 and not shard.spliced:
            wrong.append(f"{sample.key!r} has parts of several samples: {origins}")
        if sample.key not in {*BESIDE, *(known.key for known in shard.samples)} and not shard.touched:
            wrong.append(f"unknown key: {sample.key!r}")
    for number, expected in enumerate(shard.samples):
        found = next((sample for sample in once if sample.key == expected.key), None)
        fault = expected.fault(required=shard.required)
        logged = [reason for key, reason in outcome.logged if key == expected.key]
        if not found and not logged and not problems and number not in shard.unmentioned:
            lost.append(f"silently: sample {number}, {expected.key!r}")
        if number in shard.touched:
            continue
        if found and (fault or not is_exact(found, expected)):
            wrong.append(f"sample {number}, {expected.key!r}: {fault or 'differs'}")
        if not found and not logged and number not in shard.out_of_reach:
            lost.append(f"sample {number}, {expected.key!r}")
        if not found and logged and logged != [fault]:
            wrong.append(f"sample {number}, {expected.key!r} was skipped for {logged}, not {fault}")
    return {"wrong_samples": wrong, "lost_samples": lost, "miscounted": miscounted}


def origins_of(shard: Shard, sample: HandedOut) -> dict[str, int]:
    """Numbers of the samples that picture, caption and label come from, if known."""
    origins = {}
    for number, known in enumerate(shard.samples):
        if not isinstance(known.image, Bad) and np.array_equal(known.image, sample.pixels):
            origins["picture"] = number
        if not isinstance(known.caption, Bad) and known.caption == sample.caption:
            origins["caption"] = number
        if not isinstance(known.label, Bad) and known.label == sample.label:
            origins["label"] = number
    return origins


def is_exact(found: HandedOut, expected: Sample) -> bool:
    """Whether a sample was yielded as expected."""
    caption = "" if isinstance(expected.caption, Bad) else expected.caption
    label = -1 if isinstance(expected.label, Bad) else expected.label
    difference = np.abs(found.pixels.astype(int) - np.asarray(expected.image, int)).max()
    return found.caption == caption and found.label == label and difference <= expected.tolerance


@dataclass(kw_only=True)
class Report:
    """Result of one shard."""

    number: int
    faults: dict[str, list[str]]
    mutations: list[str] = field(default_factory=list)
    samples: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    seconds: float = 0.0
    peak_memory_mib: int = 0


def try_shard(seed: int, number: int) -> Report:
    """Make, read and check a shard in the working directory."""
    shard = make_shard(seed, number)
    report = Report(number=number, faults={}, mutations=shard.mutations)
    Path("0.tar").write_bytes(shard.data)
    started = time.perf_counter()
    try:
        outcome = read(shard, ["0.tar", "beside.tar"])
    except Exception:  # any error that the reader lets through would stop a run
        report.faults["crashes"] = [traceback.format_exc()]
    else:
        report.faults = judge(shard, outcome)
        report.samples, report.skipped = len(outcome.indexes[0]), outcome.skipped
        report.problems = outcome.indexes[0].problems
    report.seconds = time.perf_counter() - started
    report.peak_memory_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    report.faults["executed"] = sorted({path.name for path in Path().iterdir()} - {"0.tar", "beside.tar"})
    for name in report.faults["executed"]:
        Path(name).rmdir()
    return report


def write_beside(path: Path) -> None:
    """Write a good shard, for either layout."""
    rng = random.Random(0)
    beside = Shard(rng=rng, as_json=False, required=True, tar_format="pax")
    for key in BESIDE:
        sample = good_sample(rng, key, ["image", "text", "extra"], as_json=False)
        sample.members.append(("json", json.dumps({"caption": sample.caption, "label": sample.label}).encode()))
        beside.samples.append(sample)
    list_entries(beside)
    build(beside)
    path.write_bytes(beside.data)


def serve(connection: Connection, seed: int, folder: Path) -> None:
    """Try the shards whose numbers are received, in a folder of this process."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    faulthandler.enable()
    os.chdir(tempfile.mkdtemp(dir=folder))
    write_beside(Path("beside.tar"))
    connection.send("ready")
    while True:
        connection.send(try_shard(seed, connection.recv()))


class Worker:
    """A process that tries one shard at a time."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.connection, other = multiprocessing.Pipe()
        self.process = multiprocessing.Process(target=serve, args=(other, seed, folder), daemon=True)
        self.process.start()
        other.close()
        self.connection.recv()

    def begin(self, number: int, seconds: float) -> None:
        """Start on a shard."""
        self.number, self.deadline = number, time.monotonic() + seconds
        self.connection.send(number)

    def report(self) -> Report | None:
        """Result of the shard; None while it is running. A late process is killed."""
        if self.connection.poll():
            try:
                report: Report = self.connection.recv()
            except EOFError:
                self.process.join()
                return Report(number=self.number, faults={"crashes": [f"exit code {self.process.exitcode}"]})
            return report
        if time.monotonic() < self.deadline:
            return None
        self.process.kill()
        self.process.join()
        return Report(number=self.number, faults={"hangs": ["over its time limit"]})


def try_all(numbers: Sequence[int], *, seed: int, processes: int, seconds: float, folder: Path) -> Iterator[Report]:
    """Try shards in several processes; one that dies or is late is replaced."""
    waiting = iter(numbers)
    idle = [Worker(seed, folder) for _ in range(min(processes, len(numbers)))]
    busy: list[Worker] = []
    while True:
        while idle and (number := next(waiting, None)) is not None:
            idle[-1].begin(number, seconds)
            busy.append(idle.pop())
        if not busy:
            return
        wait([worker.connection for worker in busy], min(worker.deadline for worker in busy) - time.monotonic())
        for worker in list(busy):
            if report := worker.report():
                yield report
                busy.remove(worker)
                idle.append(worker if worker.process.is_alive() else Worker(seed, folder))


def keep(folder: Path, seed: int, report: Report) -> None:
    """Write a shard and its report into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{seed}-{report.number}.tar").write_bytes(make_shard(seed, report.number).data)
    write_json(folder / f"{seed}-{report.number}.json", {"seed": seed} | asdict(report))


def main() -> int:
    """Try all shards, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=2000, help="number of shards (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all mutations (default: %(default)s)")
    parser.add_argument("--only", type=int, metavar="K", help="try only shard K, and print all its details")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="readers (default: one per core)")
    parser.add_argument("--seconds-per-shard", type=float, default=20, help="time limit (default: %(default)s)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="folder for the shards with faults")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the figures")
    args = parser.parse_args()

    numbers = range(args.shards) if args.only is None else [args.only]
    totals: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    slowest = peak = 0.0
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        reports = try_all(
            numbers, seed=args.seed, processes=args.processes, seconds=args.seconds_per_shard, folder=Path(folder)
        )
        for report in track(reports, total=len(numbers), description="shards", console=Console(stderr=True)):
            totals += Counter({kind: len(found) for kind, found in report.faults.items()})
            totals += Counter(samples=report.samples, damaged_shards=bool(report.problems))
            skipped += Counter(report.skipped)
            slowest, peak = max(slowest, report.seconds), max(peak, report.peak_memory_mib)
            failed = any(report.faults.values())
            if failed or args.only is not None:
                print(json.dumps(asdict(report), indent=2, ensure_ascii=True))
                if args.keep:
                    keep(args.keep, args.seed, report)
    result = {
        "shards": len(numbers),
        "seed": args.seed,
        "samples": totals["samples"],
        "good": totals["samples"] - skipped.total(),
        "skipped": dict(sorted(skipped.items())),
        "damaged_shards": totals["damaged_shards"],
        **{kind: totals[kind] for kind in FAULTS},
        "slowest_shard_seconds": round(slowest, 2),
        "peak_memory_mib": peak,
        "seconds": round(time.perf_counter() - started, 1),
        "machine": f"{describe_machine()}, {args.processes} processes",
        "versions": {
            "python": platform.python_version(),
            "clipdistill": clipdistill.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "pillow": PIL.__version__,
        },
        "command": shlex.join(sys.argv),
    }
    print(json.dumps(result, indent=2))
    if args.json:
        write_json(args.json, result)
    return int(any(totals[kind] for kind in FAULTS))


if __name__ == "__main__":
    sys.exit(main())
