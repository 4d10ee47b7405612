"""Time and memory of the losses' forward and backward, compared with KL, cross-entropy and the papers' pairwise GKL.

    python scripts/benchmark_losses.py --json losses.json --plot losses.png
    python scripts/benchmark_losses.py --quick --json losses.json

The losses of one shape alternate, round after round, so that all see the same machine conditions; ``seconds`` is the
median. ``peak_bytes`` is a loss's peak allocation beyond its inputs, including its ``gradient_bytes``: CUDA's own
count, or on a CPU the running sum of the profiler's trace of all of torch's allocations. This is exact; the size of the
process would depend on the allocator (neither includes a matmul library's own buffers). ``bytes`` and ``flops``
count what no implementation can avoid: inputs read once, gradients written once, four matrix products (two logit
matrices, two gradients); their rates are given as shares of the copy bandwidth and the matmul rate measured in the same
run. Cases that would not fit in memory are skipped and marked in the table and the JSON.

Shape suffixes: B rows of a batch, C classes, D features.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from clipdistill.io.machine import describe_machine, matmul_rate
from clipdistill.losses import gkl_loss, gkl_loss_from_features

TEACHER_SCALE = 30.0
QUICK_BYTES = 2**31
COMPILED = ("kl_compiled", "kl_from_features_compiled")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One loss on one shape; ``dim`` is None if the loss starts from logits."""

    loss: str
    batch: int
    classes: int
    dim: int | None
    device: str
    dtype: str

    @property
    def elements(self) -> int:
        """Elements of one logit matrix."""
        return self.batch * self.classes

    @property
    def bytes(self) -> int:
        """Inputs read once and gradients written once."""
        if self.dim is None:
            matrices = 2 if self.loss == "cross_entropy" else 3
            return matrices * self.elements * DTYPES[self.dtype].itemsize
        return 3 * (self.batch + self.classes) * self.dim * DTYPES[self.dtype].itemsize

    @property
    def flops(self) -> int | None:
        """FLOPs of four matrix products, for losses that start from features."""
        return None if self.dim is None else 8 * self.elements * self.dim

    @property
    def needed_bytes(self) -> int:
        """Upper estimate of inputs and peak together; the logits are at least float32."""
        if self.loss == "gkl_pairwise":
            return 7 * self.elements * self.classes * 4
        inputs = 4 * (self.batch + self.classes) * (self.dim or 0)
        matrices = 0 if self.loss == "gkl_fused" else 10
        return 4 * (matrices * self.elements + 3 * inputs) + 2**28


@dataclass(frozen=True, kw_only=True)
class Record(Case):
    """A case and its figures; if it was skipped, they are None and ``skipped`` is the reason."""

    device_name: str
    threads: int
    rounds: int = 0
    seconds: float | None = None
    seconds_min: float | None = None
    peak_bytes: int | None = None
    gradient_bytes: int | None = None
    bytes_per_second: float | None = None
    flops_per_second: float | None = None
    share_of_copy_bandwidth: float | None = None
    share_of_matmul_rate: float | None = None
    skipped: str | None = None


# --- the losses


@dataclass(frozen=True)
class Logits:
    """Logits, the inputs of most losses."""

    student_BC: Tensor
    teacher_BC: Tensor

    def leaves(self) -> list[Tensor]:
        """Tensors that receive a gradient."""
        return [self.student_BC]

    def logits(self) -> tuple[Tensor, Tensor]:
        """Logits of student and teacher."""
        return self.student_BC, self.teacher_BC


@dataclass(frozen=True)
class Features:
    """Unit-norm embeddings, for losses that start from them."""

    student_image_BD: Tensor
    student_text_CD: Tensor
    teacher_image_BD: Tensor
    teacher_text_CD: Tensor
    student_scale: Tensor

    def leaves(self) -> list[Tensor]:
        """Tensors that receive a gradient."""
        return [self.student_image_BD, self.student_text_CD, self.student_scale]

    def logits(self) -> tuple[Tensor, Tensor]:
        """Logits of student and teacher, by a matrix product."""
        student_BC = self.student_scale * (self.student_image_BD @ self.student_text_CD.T)
        return student_BC, TEACHER_SCALE * (self.teacher_image_BD @ self.teacher_text_CD.T)


def random_inputs(case: Case) -> Logits | Features:
    """Inputs of the case's shape, the same for every loss."""
    generator = torch.Generator(case.device).manual_seed(0)

    def normal(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator, device=case.device)

    def cast(tensor: Tensor, *, leaf: bool) -> Tensor:
        return tensor.to(DTYPES[case.dtype]).requires_grad_(leaf)

    if case.dim is None:
        student_BC, teacher_BC = (3 * normal(case.batch, case.classes) for _ in range(2))
        return Logits(cast(student_BC, leaf=True), cast(teacher_BC, leaf=False))
    student_image_BD, student_text_CD, teacher_image_BD, teacher_text_CD = (
        cast(F.normalize(normal(rows, case.dim), dim=1), leaf=leaf)
        for leaf in (True, False)
        for rows in (case.batch, case.classes)
    )
    scale = torch.tensor(TEACHER_SCALE, device=case.device, requires_grad=True)
    return Features(student_image_BD, student_text_CD, teacher_image_BD, teacher_text_CD, scale)


def gkl_pairwise(inputs: Logits | Features) -> Tensor:
    """GKL (alpha = beta = gamma = T = T2 = 1) by the papers' definition over pairs of classes: (B, C, C) tensors."""
    student_BC, teacher_BC = (logits.float() for logits in inputs.logits())
    p_BC = teacher_BC.softmax(1)
    soft_ce = -(p_BC * student_BC.log_softmax(1)).sum(1).mean()
    student_BCC = student_BC[:, :, None] - student_BC[:, None, :]
    teacher_BCC = teacher_BC[:, :, None] - teacher_BC[:, None, :]
    weight_BCC = p_BC[:, :, None] * p_BC[:, None, :]
    wmse = (weight_BCC * (teacher_BCC - student_BCC) ** 2).sum() / 4 / weight_BCC.sum()
    return soft_ce + wmse


def gkl(inputs: Logits | Features) -> Tensor:
    """The closed form."""
    return gkl_loss(*inputs.logits()).loss


def gkl_fused(inputs: Logits | Features) -> Tensor:
    """The closed form from features, without a logit matrix."""
    assert isinstance(inputs, Features)
    return gkl_loss_from_features(
        inputs.student_image_BD,
        inputs.student_text_CD,
        inputs.teacher_image_BD,
        inputs.teacher_text_CD,
        student_scale=inputs.student_scale,
        teacher_scale=TEACHER_SCALE,
        implementation="triton" if inputs.student_image_BD.is_cuda else "tiled",
    ).loss


def kl(inputs: Logits | Features) -> Tensor:
    """KL as it is usually written."""
    student_BC, teacher_BC = inputs.logits()
    return F.kl_div(F.log_softmax(student_BC, 1), F.softmax(teacher_BC, 1), reduction="batchmean")


def cross_entropy(inputs: Logits | Features) -> Tensor:
    """Cross-entropy with one class per row."""
    student_BC, _ = inputs.logits()
    return F.cross_entropy(student_BC, torch.arange(len(student_BC), device=student_BC.device) % student_BC.shape[1])


Loss = Callable[[Logits | Features], Tensor]
FROM_LOGITS: dict[str, Loss] = {"gkl_pairwise": gkl_pairwise, "gkl": gkl, "kl": kl, "cross_entropy": cross_entropy}
FROM_FEATURES: dict[str, Loss] = {"gkl_fused": gkl_fused, "gkl_from_features_plain": gkl, "kl_from_features": kl}


def losses_for(device: str, dim: int | None) -> dict[str, Loss]:
    """Losses by name; on a GPU also KL as torch.compile fuses it."""
    losses = dict(FROM_LOGITS if dim is None else FROM_FEATURES)
    if device == "cuda":
        torch.compiler.reset()  # otherwise it falls back to eager after a few shapes of one function
        losses[COMPILED[dim is not None]] = torch.compile(kl, dynamic=False)
    return losses


# --- measuring


def wait(device: str) -> None:
    """Wait until the device has finished all queued work."""
    if device == "cuda":
        torch.cuda.synchronize()


def timed(work: Callable[[], object], device: str, repeats: int = 1) -> float:
    """Seconds of one repeat."""
    wait(device)
    started = time.perf_counter()
    for _ in range(repeats):
        work()
    wait(device)
    return (time.perf_counter() - started) / repeats


def peak_bytes(work: Callable[[], object], device: str) -> int:
    """Peak number of bytes that ``work`` has allocated at one time."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        work()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(path))
        events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    changes = [event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])]
    return max(itertools.accumulate(changes, initial=0))


def available_bytes(device: str) -> int:
    """Four fifths of the free memory."""
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available
    return int(0.8 * free)


def copy_bandwidth(device: str) -> float:
    """Bytes/s, read and written, of copying 256 MiB."""
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(timed(lambda: target.copy_(source), device) for _ in range(8))


@dataclass(frozen=True)
class Machine:
    """The machine of the cases, and its measured limits."""

    device: str
    name: str
    copy_bandwidth: float
    matmul_rates: dict[str, float]

    @classmethod
    def measure(cls, device: str, dtypes: Sequence[str]) -> Machine:
        """Measure the limits."""
        name = torch.cuda.get_device_name() if device == "cuda" else describe_machine()
        return cls(
            device,
            name,
            copy_bandwidth(device),
            {dtype: matmul_rate(torch.device(device), DTYPES[dtype]) for dtype in dtypes},
        )


def step(loss: Loss, inputs: Logits | Features) -> Tensor:
    """Forward and backward; returns the loss."""
    for leaf in inputs.leaves():
        leaf.grad = None
    value = loss(inputs)
    value.backward()
    return value.detach()


def measure_group(
    cases: Sequence[Case], machine: Machine, *, rounds: int, seconds: float, most_bytes: int | None
) -> list[Record]:
    """Measure several losses on one shape, alternating.

    Args:
        cases: of one shape, device and dtype.
        machine: its limits.
        rounds: samples of each loss.
        seconds: minimum length of a sample, which repeats a loss until then.
        most_bytes: memory limit of a case, even if more is free.
    """
    losses = losses_for(machine.device, cases[0].dim)
    available = min(available_bytes(machine.device), most_bytes or sys.maxsize)
    fitting = [case for case in cases if case.needed_bytes <= available]
    work: dict[str, Callable[[], Tensor]] = {}
    if fitting:
        inputs = random_inputs(cases[0])
        work = {case.loss: partial(step, losses[case.loss], inputs) for case in fitting}
    check_agreement({name: run().item() for name, run in work.items()}, cases[0].dtype)
    repeats = {name: max(1, round(seconds / timed(run, machine.device))) for name, run in work.items()}
    samples: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, run in work.items():
            samples[name].append(timed(run, machine.device, repeats[name]))
    records = []
    for case in cases:
        record = Record(**asdict(case), device_name=machine.name, threads=torch.get_num_threads())
        if case in fitting:
            median = statistics.median(samples[case.loss])
            flop_rate = None if case.flops is None else case.flops / median
            for leaf in inputs.leaves():
                leaf.grad = None
            record = replace(
                record,
                rounds=rounds,
                seconds=median,
                seconds_min=min(samples[case.loss]),
                peak_bytes=peak_bytes(work[case.loss], machine.device),
                gradient_bytes=sum(leaf.nbytes for leaf in inputs.leaves()),
                bytes_per_second=case.bytes / median,
                flops_per_second=flop_rate,
                share_of_copy_bandwidth=case.bytes / median / machine.copy_bandwidth,
                share_of_matmul_rate=None if flop_rate is None else flop_rate / machine.matmul_rates[case.dtype],
            )
        else:
            skipped = f"needs {case.needed_bytes / 1e9:.0f} GB, {available / 1e9:.0f} GB are allowed"
            record = replace(record, skipped=skipped)
        records.append(record)
    return records


def check_agreement(values: Mapping[str, float], dtype: str) -> None:
    """Raise AssertionError if two forms of GKL have different values: their times would not be comparable."""
    for form, reference in (("gkl_pairwise", "gkl"), ("gkl_fused", "gkl_from_features_plain")):
        if form in values and reference in values:
            tolerance = 0.02 if dtype == "bfloat16" else 1e-3
            torch.testing.assert_close(values[form], values[reference], rtol=tolerance, atol=0)


# --- reporting


def print_table(records: Sequence[Record], console: Console) -> None:
    """Print one row per case, with a rule between shapes."""
    table = Table("B", "C", "D", "dtype", "loss", "time", "peak memory", "bytes/s", "of copy", "FLOP/s", "of matmul")
    for column in table.columns[5:]:
        column.justify = "right"
    shape = None
    for record in records:
        if shape not in (None, (record.batch, record.classes, record.dim, record.dtype)):
            table.add_section()
        shape = (record.batch, record.classes, record.dim, record.dtype)
        where = [str(record.batch), str(record.classes), str(record.dim or "-"), record.dtype, record.loss]
        if record.seconds is None or record.peak_bytes is None or record.share_of_copy_bandwidth is None:
            table.add_row(*where, f"skipped: {record.skipped}", "", "", "", "", "")
            continue
        flops = ["-", "-"]
        if record.flops_per_second is not None and record.share_of_matmul_rate is not None:
            flops = [f"{record.flops_per_second / 1e9:.1f} G", f"{record.share_of_matmul_rate:.0%}"]
        table.add_row(
            *where,
            f"{record.seconds * 1e3:.3f} ms",
            f"{record.peak_bytes / 1e6:.2f} MB",
            f"{(record.bytes_per_second or 0) / 1e9:.2f} G",
            f"{record.share_of_copy_bandwidth:.0%}",
            *flops,
        )
    console.print(table)


def print_ratios(records: Sequence[Record], console: Console) -> None:
    """Print the ratios relevant to the project, if both sides were measured."""
    found = {(r.loss, r.batch, r.classes, r.dim, r.dtype): r for r in records}
    comparisons: list[tuple[str, str, str, int, int, int | None]] = [
        ("pairwise over closed form", "gkl_pairwise", "gkl", 64, 1000, None),
        ("GKL over KL", "gkl", "kl", 256, 1000, None),
        ("GKL over KL", "gkl", "kl", 1024, 1000, None),
        ("fused over plain GKL", "gkl_fused", "gkl_from_features_plain", 1024, 21841, 512),
        ("fused GKL over compiled KL", "gkl_fused", "kl_from_features_compiled", 4096, 1000, 512),
        ("fused GKL over compiled KL", "gkl_fused", "kl_from_features_compiled", 4096, 21841, 768),
    ]
    for dtype, (what, loss, rival, batch, classes, dim) in itertools.product(DTYPES, comparisons):
        ours, theirs = (found.get((name, batch, classes, dim, dtype)) for name in (loss, rival))
        if ours and theirs and ours.seconds and theirs.seconds and ours.peak_bytes and theirs.peak_bytes:
            where = f"({batch}, {classes}{f', {dim}' if dim else ''}), {dtype}"
            time_ratio, memory_ratio = ours.seconds / theirs.seconds, ours.peak_bytes / theirs.peak_bytes
            gradients = ours.gradient_bytes or 0
            extra_ratio = (ours.peak_bytes - gradients) / (theirs.peak_bytes - gradients)
            memory = f"peak memory {memory_ratio:.4g}, without the gradients themselves {extra_ratio:.4g}"
            console.print(f"{what} at {where}: time {time_ratio:.4g}, {memory}")


def plot(records: Sequence[Record], path: Path) -> None:
    """Plot time and peak memory over the number of classes, one column per batch size."""
    from matplotlib.figure import Figure

    batches = sorted({record.batch for record in records})
    figure = Figure(figsize=(4 * len(batches) + 2, 7), layout="constrained")
    axes = figure.subplots(2, len(batches), sharex=True, sharey="row", squeeze=False)
    colours = {loss: f"C{number}" for number, loss in enumerate(dict.fromkeys(r.loss for r in records))}
    dims = list(dict.fromkeys(r.dim for r in records if r.dim))
    labelled = {}
    for (loss, dim, dtype), (column, batch) in itertools.product(
        dict.fromkeys((r.loss, r.dim, r.dtype) for r in records), enumerate(batches)
    ):
        points = [r for r in records if (r.loss, r.dim, r.dtype, r.batch) == (loss, dim, dtype, batch) and r.seconds]
        line = "--" if dim in dims[1:] else "-"
        style = {
            "color": colours[loss],
            "linestyle": line,
            "marker": "o" if dtype == "float32" else "^",
            "markersize": 4,
        }
        classes = [r.classes for r in points]
        label = ", ".join(str(part) for part in (loss, dtype, dim and f"D = {dim}") if part)
        (labelled[label],) = axes[0, column].loglog(classes, [(r.seconds or 0) * 1e3 for r in points], **style)
        axes[1, column].loglog(classes, [(r.peak_bytes or 0) / 1e6 for r in points], **style)
        axes[0, column].set_title(f"batch {batch}")
        axes[1, column].set_xlabel("classes")
    axes[0, 0].set_ylabel("forward + backward, ms")
    axes[1, 0].set_ylabel("peak memory beyond the inputs, MB")
    figure.legend(labelled.values(), labelled.keys(), loc="outside right center", fontsize="small")
    figure.suptitle(records[0].device_name)
    figure.savefig(path, dpi=150)


def shapes(args: argparse.Namespace) -> list[tuple[int, int, int | None]]:
    """(B, C, D), D None for the losses that start from logits."""
    if args.quick:
        return [(64, 1000, None), (256, 100, None), (256, 1000, None), (1024, 1000, None), (256, 1000, 512)]
    return [(64, 1000, None), *itertools.product(args.batch, args.classes, (None, *args.dim))]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*FROM_LOGITS, *FROM_FEATURES, *COMPILED]
    parser.add_argument("--json", type=Path, help="write the list of records to this file")
    parser.add_argument("--plot", type=Path, help="plot time and memory over the number of classes to this file")
    parser.add_argument("--quick", action="store_true", help="few small shapes, under a minute")
    parser.add_argument("--batch", type=int, nargs="+", default=[256, 1024, 4096], help="default: %(default)s")
    parser.add_argument(
        "--classes", type=int, nargs="+", default=[100, 1000, 10000, 21841], help="default: %(default)s"
    )
    parser.add_argument("--dim", type=int, nargs="+", default=[512, 768], help="feature widths, default: %(default)s")
    parser.add_argument("--only", nargs="+", choices=names, metavar="LOSS", help=f"some of: {', '.join(names)}")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), help="default: float32, and bfloat16 on a GPU")
    parser.add_argument("--threads", type=int, help="torch threads on the CPU (default: torch's)")
    parser.add_argument("--rounds", type=int, default=5, help="samples of each loss (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.05, help="minimum length of a sample (default %(default)s)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    dtypes = args.dtype or (["float32", "bfloat16"] if args.device == "cuda" else ["float32"])
    console = Console(width=None if sys.stdout.isatty() else 160)
    machine = Machine.measure(args.device, dtypes)
    console.print(f"{shlex.join(sys.argv)}\n{machine.name}, {platform.platform()}")
    console.print(f"Python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    rates = ", ".join(f"{dtype} matmul {rate / 1e9:.0f} GFLOP/s" for dtype, rate in machine.matmul_rates.items())
    console.print(f"measured limits: copy {machine.copy_bandwidth / 1e9:.1f} GB/s, {rates}")

    records: list[Record] = []
    for dtype, (batch, classes, dim) in itertools.product(dtypes, shapes(args)):
        chosen = [name for name in losses_for(args.device, dim) if not args.only or name in args.only]
        shape = {"batch": batch, "classes": classes, "dim": dim, "device": args.device, "dtype": dtype}
        cases = [Case(loss=name, **shape) for name in chosen]
        if cases:
            most_bytes = QUICK_BYTES if args.quick else None
            records += measure_group(cases, machine, rounds=args.rounds, seconds=args.seconds, most_bytes=most_bytes)
            gc.collect()
    print_table(records, console)
    print_ratios(records, console)
    if args.json:
        args.json.write_text(json.dumps([asdict(record) for record in records], indent=2) + "\n")
    if args.plot:
        plot(records, args.plot)


if __name__ == "__main__":
    main()
