"""Compare two runs of one config that should be identical, sample by sample and bit by bit.

    python scripts/compare_runs.py runs/undisturbed runs/resumed

Samples: those in the traces of all ranks (`train.trace`), each at its step and position, with the digest of the step's
pixels. Bits: every tensor and value of the newest checkpoint, every file of the exported student, the summary, the
metrics without timings, and the evaluations without the folder's name. Exit code 0: no differences; 1: differences.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from clipdistill.io.jsonl import read_jsonl
from clipdistill.io.run_files import METRICS_FILE, SUMMARY_FILE
from clipdistill.training.checkpoint import find_checkpoint

TIMINGS = ("samples_per_second", "data_wait_share")
"""Metrics that differ between any two runs."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Comparison of a run with another, the reference.

    Attributes:
        seen: samples that the reference saw, over all ranks and steps.
        lost: of these, those that the run did not see at their position with the same pixels.
        repeated: samples that the run saw at a position where the reference did not.
        compared: number of tensors and values compared.
        differing: names of those that differ or exist in only one of the two.
    """

    seen: int
    lost: int
    repeated: int
    compared: int
    differing: list[str]

    def same(self) -> bool:
        """Whether the reference saw samples and nothing differs."""
        return self.seen > 0 and not (self.lost or self.repeated or self.differing)


def compare_runs(reference: Path, run: Path) -> Comparison:
    """Compare the folders of two runs."""
    expected, found = _places(reference), _places(run)
    values, others = left_by(reference), left_by(run)
    names = values.keys() | others.keys()
    return Comparison(
        seen=expected.total(),
        lost=(expected - found).total(),
        repeated=(found - expected).total(),
        compared=len(names),
        differing=sorted(name for name in names if name not in values or values[name] != others.get(name)),
    )


def _places(run: Path) -> Counter[tuple[str, int, int, str, str]]:
    """Rank, step, position in the step, key, and digest of the step's pixels, of every sample in the traces."""
    return Counter(
        (file.stem, record["step"], place, key, record["pixels"])
        for file in (run / "samples").glob("rank_*.jsonl")
        for record in read_jsonl(file)
        for place, key in enumerate(record["keys"])
    )


def left_by(run: Path) -> dict[str, object]:
    """Names and contents of everything else that a run has written, without timings."""
    return dict(_values(run))


def _values(run: Path) -> Iterator[tuple[str, object]]:
    checkpoint = find_checkpoint(run / "checkpoints")
    for folder in [run / "student", *([checkpoint] if checkpoint else [])]:
        for file in sorted(folder.glob("*")):
            name = str(file.relative_to(run))
            if file.suffix == ".safetensors":
                yield from _leaves(name, load_file(file))
            elif file.suffix == ".pt":
                yield from _leaves(name, torch.load(file, weights_only=True))
            elif file.name == "manifest.json":
                manifest = json.loads(file.read_text(encoding="utf-8"))
                yield f"{name}: evaluations", _of_any_folder(manifest["evaluations"] or [])
            else:
                yield name, file.read_bytes()
    for number, record in enumerate(read_jsonl(run / METRICS_FILE)):
        for key, value in record.items():
            if key not in TIMINGS:
                yield f"{METRICS_FILE}: record {number}: {key}", repr(value)
    if (run / SUMMARY_FILE).is_file():
        summary = json.loads((run / SUMMARY_FILE).read_text(encoding="utf-8"))
        yield SUMMARY_FILE, repr(summary | {"evaluations": _of_any_folder(summary["evaluations"])})


def _of_any_folder(evaluations: list[dict[str, Any]]) -> str:
    """Evaluations without the folder of the run."""
    return repr([record | {"pretrained": "the run"} for record in evaluations])


def _leaves(name: str, value: Any) -> Iterator[tuple[str, object]]:
    if isinstance(value, torch.Tensor):
        content = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        yield name, (str(value.dtype), tuple(value.shape), content)
    elif isinstance(value, dict | list | tuple) and value:
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(f"{name}: {key}", part)
    else:
        yield name, repr(value)


def show(console: Console, comparisons: Sequence[Comparison], *, most: int = 20) -> None:
    """Print a table with one row per comparison, and the names of all differences."""
    table = Table(title="compared with the undisturbed run")
    for column in ("run", "samples seen", "lost", "repeated", "tensors and values", "differing"):
        table.add_column(column, justify="right")
    for number, result in enumerate(comparisons):
        figures = (number, result.seen, result.lost, result.repeated, result.compared, len(result.differing))
        table.add_row(*(str(figure) for figure in figures))
    console.print(table)
    for number, result in enumerate(comparisons):
        for name in result.differing[:most]:
            console.print(f"run {number} differs: {name}", highlight=False, markup=False, soft_wrap=True)
        if len(result.differing) > most:
            console.print(f"run {number} differs in {len(result.differing) - most} more", highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", type=Path, help="folder of the undisturbed run")
    parser.add_argument("run", type=Path, help="folder of the other run")
    args = parser.parse_args(argv)
    for folder in (args.reference, args.run):
        if not (folder / "samples").is_dir():
            parser.error(f"{folder}: no traces in {folder / 'samples'}; allowed: the folder of a run with train.trace")
    result = compare_runs(args.reference, args.run)
    show(Console(width=120), [result])
    return 0 if result.same() else 1


if __name__ == "__main__":
    sys.exit(main())
