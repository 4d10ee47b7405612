"""Kill a training run repeatedly, resume it each time, and compare its results with an undisturbed run.

    python scripts/chaos.py --kills 50 --seed 0 --processes 1 --workers 2 --json chaos.json

The run distils the shipped teacher into a tiny student on a few hundred real icons, as `python scripts/train.py` (under
torchrun with several processes), with accumulation, a moving average, augmentation, class priors, captions, and one
picture that cannot be decoded. Kills happen at random times: during start-up, set-up, a step, a checkpoint write, or at
the end. After each of them all processes of the job must have ended, every checkpoint must be complete, and a run that
received SIGTERM or SIGINT must have saved. If a run finishes before the last kill, another round starts in a new
folder. In the end each round is compared with the undisturbed run, as in scripts/compare_runs.py.

Exit code 0: every check passed, nothing was lost, repeated or different. 1: a check failed. 2: wrong arguments.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import random
import shlex
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from compare_runs import Comparison, compare_runs, show
from jobs import Job, is_alive
from PIL import ImageFont
from rich.console import Console
from rich.table import Table

from clipdistill.io.arguments import positive
from clipdistill.io.files import new_folder, write_json
from clipdistill.io.machine import describe_machine
from clipdistill.io.run_files import SUMMARY_FILE
from clipdistill.shards.icons import FAMILIES, find_classes, find_fonts, read_glyphs, render_glyph, split_of
from clipdistill.shards.writing import Sample, write_shards
from clipdistill.training.checkpoint import find_checkpoint, find_damage

STOPPED = 75
"""Exit code of a run that was stopped by a signal and has saved."""

SAVE_EVERY = 3
PHASES = ("start-up", "step", "checkpoint write", "end")
AIMS = {"start-up": 4, "set-up": 2, "step": 6, "checkpoint write": 6, "end": 2}
"""Phases in which kills are aimed, with their weights; set-up is when the run starts to write into its folder, and has
a higher weight in a new folder."""


# The run: a few hundred icons, one of them broken, and a config.


def prepare(folder: Path, *, classes: int = 48, samples_per_shard: int = 61) -> None:
    """Render the training icons of some classes into ``folder``: ``train/`` (shards, the last one smaller) and
    ``prompts/``.
    """
    fonts, _ = find_fonts()
    glyphs = sorted(read_glyphs(fonts), key=lambda glyph: glyph.key)
    every = find_classes(glyphs)
    names = every[:: len(every) // classes][:classes]
    samples = []
    for glyph in glyphs:
        if glyph.concept in names and split_of(glyph, labelled=True) == "train":
            (font,) = fonts.glob(f"{FAMILIES[glyph.family].font}*.ttf")
            picture = render_glyph(ImageFont.truetype(font, 128), glyph.character, size=64)
            assert picture is not None, glyph.key
            samples.append(_sample(glyph.key, _png(picture), glyph.concept, names.index(glyph.concept)))
    random.Random(0).shuffle(samples)
    samples.append(_sample("broken", samples[0].image[:200], names[0], 0))
    with new_folder(folder) as partial:
        write_shards(samples, partial / "train", samples_per_shard=samples_per_shard)
        (partial / "prompts").mkdir()
        (partial / "prompts" / "classnames.txt").write_text("\n".join(names) + "\n")
        (partial / "prompts" / "templates.txt").write_text("{c}\na picture of {c}\n{c} icon\n")


def _png(picture: Any) -> bytes:
    encoded = io.BytesIO()
    picture.save(encoded, format="PNG")
    return encoded.getvalue()


def _sample(key: str, png: bytes, concept: str, label: int) -> Sample:
    return Sample(key=key, image=png, image_extension="png", caption=concept, label=label)


def write_config(path: Path, *, icons: Path, steps: int, workers: int) -> None:
    """Write the config of the run, except its output and cache."""
    config = {
        "teachers": [{"model": "local-dir:${resource:weights/icons-teacher}"}],
        "student": {"model": "icons-tiny"},
        "data": {
            "shards": [str(icons / "train")],
            "batch_size": 8,
            "workers": workers,
            "shuffle": 50,
            "augmentation": {"rotate": 17, "translate": 0.1, "zoom": [0.72, 1.18], "stroke": 0.5, "outline": 0.2},
        },
        "prompts": str(icons / "prompts"),
        "labels": "dataset",
        "objective": [
            {"loss": "gkl", "over": "prompts", "gamma": 0.5, "beta": 0.1, "class_prior": True},
            {"loss": "gkl", "over": "captions", "gamma": 0.5, "beta": 0.1, "weight": 0.5},
        ],
        "optimizer": {"lr": 2e-3, "warmup_steps": 5},
        "train": {
            "steps": steps,
            "accumulate": 2,
            "ema": 0.9,
            "log_every": 2,
            "save_every": SAVE_EVERY,
            "keep": 2,
            "threads": 1,
            "trackers": [],
            "trace": True,
        },
    }
    write_json(path, config)


# The job.


def start_job(config: Path, folder: Path, *, processes: int, resume: bool) -> Job:
    """Start ``train.py``, with torchrun if several processes; ``folder`` receives ``run/``, ``cache/``, ``log.txt``."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["--config", config, *(["--resume", "auto"] if resume else [])]
    words += [f"output={folder / 'run'}", f"data.cache={folder / 'cache'}"]
    return Job(*words, log=folder / "log.txt", ranks=processes, launcher=True)


class Watch:
    """Phase of a job, derived from the files that it has written since the watch was created."""

    def __init__(self, run: Path, *, total_steps: int) -> None:
        self.run = run
        self.total_steps = total_steps
        self.resumed_from = newest_step(run)
        self._trace = run / "samples" / "rank_00000.jsonl"
        self._folder = _stamp(run)
        self._temporary = self._temporary_folders()
        self._seen = _stamp(self._trace)
        self._step: int | None = None

    def touched(self) -> bool:
        """Whether the job has started to write into the run's folder."""
        return _stamp(self.run) != self._folder

    def step(self) -> int | None:
        """The last step that the job has taken, if any."""
        stamp = _stamp(self._trace)
        if stamp != self._seen:
            self._seen = stamp
            step = _last_traced(self._trace)
            self._step = step if step > self.resumed_from else None
        return self._step

    def writing(self) -> bool:
        """Whether a checkpoint is being written."""
        return not self._temporary_folders() <= self._temporary

    def phase(self) -> str:
        """The current phase, one of ``PHASES``."""
        step = self.step()
        if self.writing():
            return "checkpoint write"
        if step is None:
            return "start-up"
        return "end" if step == self.total_steps else "step"

    def _temporary_folders(self) -> set[tuple[str, int]]:
        with contextlib.suppress(FileNotFoundError), os.scandir(self.run / "checkpoints") as entries:
            return {(entry.name, entry.inode()) for entry in entries if entry.name.endswith(".tmp")}
        return set()


def newest_step(run: Path) -> int:
    """Step of the newest complete checkpoint; 0 if there is none."""
    checkpoint = find_checkpoint(run / "checkpoints")
    return 0 if checkpoint is None else int(checkpoint.name.removeprefix("step_"))


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _last_traced(trace: Path) -> int:
    for line in reversed(trace.read_text(encoding="utf-8").splitlines()):
        with contextlib.suppress(ValueError):
            return int(json.loads(line)["step"])
    return 0


# The kills.


@dataclass(frozen=True)
class Kind:
    """A way to stop a job: a signal and its target; ``job`` is all processes, ``launcher`` is torchrun."""

    number: signal.Signals
    to: str
    twice: bool = False

    @property
    def asks(self) -> bool:
        """Whether the run can react to the signal, and so must save."""
        return self.number != signal.SIGKILL and not self.twice

    def __str__(self) -> str:
        whom = {"job": "all processes", "launcher": "torchrun", "rank": "one rank", "worker": "a decoding process"}
        return f"{self.number.name} to {whom[self.to]}{', twice in succession' if self.twice else ''}"


KINDS = {
    "kill-job": Kind(signal.SIGKILL, "job"),
    "kill-rank": Kind(signal.SIGKILL, "rank"),
    "kill-worker": Kind(signal.SIGKILL, "worker"),
    "term-job": Kind(signal.SIGTERM, "job"),
    "term-launcher": Kind(signal.SIGTERM, "launcher"),
    "term-rank": Kind(signal.SIGTERM, "rank"),
    "term-twice": Kind(signal.SIGTERM, "rank", twice=True),
    "int-job": Kind(signal.SIGINT, "job"),
    "int-rank": Kind(signal.SIGINT, "rank"),
}


def strike(job: Job, kind: Kind, draw: random.Random) -> bool:
    """Send the signal, to the launcher if the target has no process; returns whether the receiver was alive."""
    if kind.to == "job":
        alive = job.signal_groups(kind.number)
        if kind.number == signal.SIGKILL:
            job.kill_rest()
        return alive
    candidates = {"launcher": [], "rank": job.pids, "worker": job.workers() or job.pids}[kind.to]
    living = [pid for pid in candidates if is_alive(pid)] or [job.leader]
    pid = draw.choice(living)
    alive = job.signal(pid, kind.number)
    if kind.twice:
        time.sleep(draw.uniform(0, 0.05))
        job.signal(pid, kind.number)
    return alive


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Seconds of the undisturbed run: until its first step, per step, per checkpoint, and after its last step."""

    start: float
    step: float
    write: float
    end: float


@dataclass(kw_only=True)
class Campaign:
    """Kills and their resumes, round after round.

    Attributes:
        config: of the run.
        folder: receives ``reference/``, ``round_00/``, ...
        limit: seconds within which a job must end after a kill, and within which it must reach the next phase.
        broken: whether a run could not be resumed.
    """

    config: Path
    folder: Path
    total_steps: int
    processes: int
    kinds: Sequence[str]
    limit: float
    draw: random.Random
    console: Console
    kills: int = 0
    resumes: int = 0
    hits: Counter[tuple[str, str]] = field(default_factory=Counter)
    seconds_to_end: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    violations: list[str] = field(default_factory=list)
    broken: bool = False
    _job: Job | None = None

    def undisturbed(self) -> Pace:
        """Run the reference and measure the durations of its parts."""
        job, watch = self._start(self.folder / "reference", resume=False)
        first = last = job.started
        began: float | None = None
        writes = []
        while not job.ended():
            now = time.monotonic()
            if watch.step() is None:
                first = now
            elif watch.step() != self.total_steps:
                last = now
            if watch.writing():
                began = began or now
            elif began is not None:
                writes.append(now - began)
                began = None
            time.sleep(0.001)
        ended = time.monotonic()
        if job.codes[0] != 0 or not writes:
            raise RuntimeError(f"the undisturbed run failed:\n{_tail(job.log)}")
        return Pace(
            start=first - job.started,
            step=(last - first) / self.total_steps,
            write=statistics.median(writes),
            end=ended - last,
        )

    def run(self, kills: int, pace: Pace) -> Iterator[Path]:
        """Run rounds until all kills are done; yields the folder of each round's run when it has finished."""
        rounds = 0
        while self.kills < kills and not self.broken:
            folder = self.folder / f"round_{rounds:02d}"
            rounds += 1
            resume = False
            while self.kills < kills and self._attempt(folder, pace, resume=resume):
                resume = True
            if self.kills == kills and not self.broken:
                self._finish(folder)
            yield folder / "run"

    def _attempt(self, folder: Path, pace: Pace, *, resume: bool) -> bool:
        """Start or resume the run and send the kill; False if it finished before."""
        name = self.draw.choice(self.kinds)
        weights = AIMS if resume else AIMS | {"set-up": 4 * AIMS["set-up"]}
        aim = self.draw.choices(list(weights), weights=list(weights.values()))[0]
        share, count = self.draw.random(), self.draw.randint(1, 3)
        job, watch = self._start(folder, resume=resume)
        hit = self._wait_for(aim, job, watch, pace, share=share, count=count)
        phase = watch.phase()
        struck = time.monotonic()
        hit = hit and strike(job, KINDS[name], self.draw)
        wrong = job.wait_for_all(self.limit)
        code = job.codes[0]
        hit = hit and (code != 0 or KINDS[name].asks)
        what = f"{name} in {phase}" if hit else "unhurt"
        if hit:
            self.kills += 1
            self.hits[name, phase] += 1
            self.seconds_to_end[name].append(time.monotonic() - struck)
        self.broken = not hit and code != 0
        self.console.print(
            f"{self.kills:4d}  {folder.name}  {what}: exit code {code}, at step {watch.step() or watch.resumed_from}, "
            f"newest checkpoint {newest_step(watch.run)}",
            highlight=False,
        )
        for complaint in [wrong, *self._complaints(name if hit else None, phase, job, watch)]:
            if complaint:
                self._complain(f"{folder.name}, kill {self.kills}, {what}: {complaint}", job)
        return hit

    def _finish(self, folder: Path) -> None:
        """Resume a last time, without a kill."""
        job, watch = self._start(folder, resume=True)
        wrong = job.wait_for_all(self.limit + 600)
        for complaint in [wrong, *self._complaints(None, "end", job, watch)]:
            if complaint:
                self._complain(f"{folder.name}, last resume: {complaint}", job)

    def _start(self, folder: Path, *, resume: bool) -> tuple[Job, Watch]:
        self.resumes += resume
        watch = Watch(folder / "run", total_steps=self.total_steps)
        self._job = start_job(self.config, folder, processes=self.processes, resume=resume)
        return self._job, watch

    def close(self) -> None:
        """Kill all remaining processes."""
        if self._job is not None:
            self._job.kill_rest()

    def _wait_for(self, aim: str, job: Job, watch: Watch, pace: Pace, *, share: float, count: int) -> bool:
        """Wait for the time of the kill, up to ``count`` saves later; False if the job ended before."""

        def until(condition: Callable[[], bool]) -> bool:
            deadline = time.monotonic() + self.limit
            while not condition():
                if job.ended() or time.monotonic() > deadline:
                    return False
                time.sleep(0.001)
            return not job.ended()

        def passed(seconds: float) -> bool:
            instant = time.monotonic() + seconds
            return until(lambda: time.monotonic() >= instant)

        if aim == "start-up":
            return passed(share * pace.start)
        if aim == "set-up":
            return until(watch.touched) and passed(share**2 * 0.1)
        if not until(lambda: watch.step() is not None):
            return False
        job.workers()
        if aim == "step":
            goal = (watch.step() or 0) + self.draw.randint(0, SAVE_EVERY * count)
            return until(lambda: (watch.step() or 0) >= goal) and passed(share * pace.step)
        if aim == "end":
            return until(lambda: watch.step() == self.total_steps) and passed(share * pace.end)
        for _ in range(count - 1):
            if not (until(watch.writing) and until(lambda: not watch.writing())):
                return False
        return until(watch.writing) and passed(share * pace.write)

    def _complaints(self, name: str | None, phase: str, job: Job, watch: Watch) -> list[str]:
        """Violations in the state that a job has left; ``name`` is the kind of the kill, if it was killed."""
        found = [
            f"{path.name}: {damage}"
            for path in sorted((watch.run / "checkpoints").glob("step_*"))
            if (damage := find_damage(path)) is not None
        ]
        code, newest = job.codes[0], newest_step(watch.run)
        complete = (watch.run / SUMMARY_FILE).is_file()
        if code == 0 and not complete:
            found.append("exit code 0, without a summary")
        if name is None and code != 0:
            found.append(f"exit code {code}")
        if name is not None and KINDS[name].asks and not complete and phase in ("step", "checkpoint write"):
            if self.processes == 1 and code != STOPPED:
                found.append(f"exit code {code} instead of {STOPPED}")
            if newest != watch.step():
                found.append(f"stopped at step {watch.step()}, newest checkpoint {newest}")
        return found

    def _complain(self, violation: str, job: Job) -> None:
        self.violations.append(violation)
        self.console.print(violation, style="red", markup=False, soft_wrap=True)
        print(_tail(job.log), flush=True)


def _tail(log: Path, lines: int = 25) -> str:
    return "\n".join(f"    {line}" for line in log.read_text(errors="replace").splitlines()[-lines:])


# The program.


def main(argv: Sequence[str] | None = None) -> int:
    """Run the kills, compare, and print."""
    args = _parse(argv)
    started = time.perf_counter()
    console = Console(width=120)
    folder = (args.output or Path(tempfile.mkdtemp(prefix="chaos-"))).resolve()
    if not (folder / "icons").exists():
        prepare(folder / "icons")
    for old in [folder / "reference", *folder.glob("round_??")]:
        shutil.rmtree(old, ignore_errors=True)
    write_config(folder / "config.json", icons=folder / "icons", steps=args.steps, workers=args.workers)
    campaign = Campaign(
        config=folder / "config.json",
        folder=folder,
        total_steps=args.steps,
        processes=args.processes,
        kinds=args.kinds,
        limit=args.limit,
        draw=random.Random(args.seed),
        console=console,
    )
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with contextlib.closing(campaign):
        comparisons = _compare_rounds(campaign, args.kills)
    result = _result(args, campaign, comparisons) | {"seconds": round(time.perf_counter() - started, 1)}
    console.print(_table(campaign))
    show(console, comparisons)
    console.print(
        "{kills} kills, {resumes} resumes, {rounds} rounds, {seconds} s; {machine}; {versions}".format(**result),
        highlight=False,
        soft_wrap=True,
    )
    if args.json:
        write_json(args.json, result)
    good = all(comparison.same() for comparison in comparisons) and not campaign.violations
    if not good:
        console.print(f"the runs and their logs: {folder}", highlight=False, soft_wrap=True)
    elif args.output is None:
        shutil.rmtree(folder)
    return 0 if good else 1


def _compare_rounds(campaign: Campaign, kills: int) -> list[Comparison]:
    pace = campaign.undisturbed()
    campaign.console.print(
        f"undisturbed: {pace.start:.1f} s to the first step, {pace.step:.3f} s/step, {pace.write:.3f} s/checkpoint, "
        f"{pace.end:.1f} s after the last step",
        highlight=False,
    )
    return [compare_runs(campaign.folder / "reference" / "run", run) for run in campaign.run(kills, pace)]


def _result(args: argparse.Namespace, campaign: Campaign, comparisons: Sequence[Comparison]) -> dict[str, Any]:
    return {
        "kills": campaign.kills,
        "resumes": campaign.resumes,
        "seen": comparisons[0].seen,
        "lost": sum(comparison.lost for comparison in comparisons),
        "repeated": sum(comparison.repeated for comparison in comparisons),
        "differing_tensors": sum(len(comparison.differing) for comparison in comparisons),
        "compared_tensors": comparisons[0].compared,
        "rounds": len(comparisons),
        "violations": campaign.violations,
        "kinds": {
            name: {phase: campaign.hits[name, phase] for phase in PHASES if campaign.hits[name, phase]}
            for name in campaign.seconds_to_end
        },
        "phases": {phase: sum(campaign.hits[name, phase] for name in KINDS) for phase in PHASES},
        "slowest_end_seconds": {name: round(max(times), 2) for name, times in campaign.seconds_to_end.items()},
        "command": shlex.join(["python", *sys.argv]),
        "seed": args.seed,
        "steps": args.steps,
        "processes": args.processes,
        "workers": args.workers,
        "machine": f"{describe_machine()}, {platform.system()} {platform.release()}",
        "versions": f"python {platform.python_version()}, torch {torch.__version__}",
    }


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    kinds = "".join(f"\n  {name:14} {kind}" for name, kind in KINDS.items())
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"kinds of kill:{kinds}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=positive, default=10, metavar="N", help="total kills (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of kinds, aims and times (default: %(default)s)")
    parser.add_argument("--processes", type=positive, default=1, metavar="P", help="ranks (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, metavar="W", help="decoding processes per rank (default: 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder for icons, runs and logs; earlier ones in it are replaced (default: a temporary folder, kept only "
        "if a check fails)",
    )
    parser.add_argument("--steps", type=positive, default=48, help="length of the run (default: %(default)s)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, metavar="KIND", help="see below (default: all that apply)")
    parser.add_argument(
        "--limit", type=float, default=120, help="seconds within which a job must end (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    if args.workers < 0:
        parser.error(f"--workers: {args.workers} is not allowed; allowed: 0 or more")
    if args.steps < 2 * SAVE_EVERY:
        parser.error(f"--steps: {args.steps} is not allowed; allowed: {2 * SAVE_EVERY} or more")
    if args.kinds is None:
        idle = {"kill-worker": args.workers == 0, "term-launcher": args.processes == 1}
        args.kinds = [name for name in KINDS if not idle.get(name)]
    return args


def _table(campaign: Campaign) -> Table:
    table = Table(title="kills by kind and phase of the run")
    table.add_column("")
    for column in (*PHASES, "slowest end, s"):
        table.add_column(column, justify="right")
    for name, times in campaign.seconds_to_end.items():
        counts = [str(campaign.hits[name, phase] or "") for phase in PHASES]
        table.add_row(name, *counts, f"{max(times):.1f}")
    return table


if __name__ == "__main__":
    sys.exit(main())
