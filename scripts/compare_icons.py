"""The three arms on the icons: no distillation, KL over prompts, GKL over prompts; same student, same steps.

    python scripts/compare_icons.py --data data/icons --output runs/compare --seeds 3

KL and GKL are tuned first, with the same number of trials, on the validation split of the training families; then every
arm runs with its chosen settings and each seed, and is evaluated once on the unseen family. Finished runs are reused.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from clipdistill.config import load_config
from clipdistill.evaluation import (
    classification_metrics,
    load_classification_set,
    load_for_evaluation,
    predict,
)
from clipdistill.io.files import write_json
from clipdistill.io.machine import describe_machine
from clipdistill.io.resources import resource
from clipdistill.training.trainer import train

TRIALS: dict[str, list[list[str]]] = {
    "icons-kl": [[f"objective.0.temperature={t}"] for t in (0.5, 1, 2, 4)],
    "icons-gkl": [
        [f"objective.0.beta={beta}", f"objective.0.gamma={gamma}"] for beta in (0.02, 0.1) for gamma in (0.5, 1.0)
    ],
}
ARMS = ("icons-contrastive", "icons-kl", "icons-gkl")


def run(name: str, output: Path, data: Path, overrides: list[str]) -> Path:
    """Train one config, if not done before; returns the folder of its student."""
    folders = {"data.shards": [str(data / "train")], "evaluation.folders": [str(data / "val")]}
    config = load_config(resource("configs", f"{name}.yaml"), overrides, values={"output": str(output), **folders})
    return train(config, resume="auto").student


def accuracy(student: Path, folder: Path) -> float:
    """Zero-shot top-1 of an exported student."""
    metrics = classification_metrics(predict(load_for_evaluation(str(student)), load_classification_set(folder)))
    assert metrics["acc1"] is not None
    return metrics["acc1"]


def main() -> None:
    """Tune, run, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/icons"))
    parser.add_argument("--output", type=Path, default=Path("runs/compare"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of every run, such as train.steps=100")
    args = parser.parse_args()
    started = time.perf_counter()

    results: dict[str, Any] = {
        "machine": describe_machine(),
        "torch": torch.__version__,
    }
    results["teacher"] = accuracy(resource("weights", "icons-teacher"), args.data / "test")
    chosen: dict[str, list[str]] = {"icons-contrastive": []}
    for name, trials in TRIALS.items():
        scores = {}
        for number, trial in enumerate(trials):
            output = args.output / "tune" / f"{name}-{number}"
            student = run(name, output, args.data, ["seed=1000", *trial, *args.overrides])
            scores[" ".join(trial)] = accuracy(student, args.data / "val")
        best = max(scores, key=lambda trial: scores[trial])
        chosen[name] = best.split()
        results[f"tuning {name}"] = scores

    table = Table(title="zero-shot top-1 on the unseen family ri")
    for column in (
        "arm",
        "settings",
        *(f"seed {seed}" for seed in range(args.seeds)),
        "mean",
        "of the teacher",
    ):
        table.add_column(column)
    for name in ARMS:
        accuracies = []
        for seed in range(args.seeds):
            student = run(
                name,
                args.output / f"{name}-{seed}",
                args.data,
                [f"seed={seed}", *chosen[name], *args.overrides],
            )
            accuracies.append(accuracy(student, args.data / "test"))
        results[name] = {"settings": chosen[name], "acc1": accuracies}
        mean, spread = statistics.mean(accuracies), statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
        settings = " ".join(setting.removeprefix("objective.0.") for setting in chosen[name])
        table.add_row(
            name,
            settings,
            *(f"{value:.1%}" for value in accuracies),
            f"{mean:.1%} ± {spread:.1%}",
            f"{mean / results['teacher']:.0%}",
        )
    results["minutes"] = (time.perf_counter() - started) / 60
    write_json(args.output / "results.json", results)
    console = Console(width=140)
    shown = {key: value for key, value in results.items() if key in ("machine", "torch") or key.startswith("tuning")}
    console.print(json.dumps(shown, indent=2))
    console.print(table)


if __name__ == "__main__":
    main()
