"""Cost of a step on attacked images over a plain one: the same batch, models and terms, with and without the attack.

    clipdistill cache --config configs/icons-robust.yaml data.views=1 teacher_cache.folder=data/icons-embeddings
    python scripts/benchmark_robust.py --config configs/icons-robust.yaml data.views=1 \\
        teacher_cache.folder=data/icons-embeddings

Both kinds of step alternate on a batch that is ready in memory. An attack of n steps costs n forward and backward
passes of the student; without the gradients of its weights, a pass is cheaper than that of a plain step.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch

from clipdistill.config import load_config
from clipdistill.data import Batch
from clipdistill.distributed.signals import Interruption
from clipdistill.io.machine import describe_machine, device_time
from clipdistill.training.trainer import Run, open_run, start_processes


def seconds_of_a_step(run: Run, batch: Batch, *, attacked: bool, steps: int) -> float:
    """Mean time of a step's gradients; the weights stay."""
    step = run.parts.distillation
    perturb = step.perturb
    step.perturb = perturb if attacked else None
    started = device_time(run.device)
    for number in range(steps):
        step([batch], number + 10**6, measure_shares=False)  # after the warm-up of the radius
        run.parts.optimizer.zero_grad(set_to_none=True)
    step.perturb = perturb
    return (device_time(run.device) - started) / steps


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/icons-robust.yaml"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(args.config, [f"output={folder}/run", "evaluation.folders=[]", *args.overrides])
        if config.adversarial is None or any(term.is_two_sided for term in config.terms):
            parser.error(f"--config {args.config}: allowed: one with `adversarial`, and terms that are not two-sided")
        with (
            Interruption() as interruption,
            open_run(config, start_processes(config), interruption=interruption) as run,
        ):
            batch = next(iter(run.parts.loader))
            run.parts.model.train()
            rounds = []
            for number in range(args.rounds + 1):
                found = {
                    kind: seconds_of_a_step(run, batch, attacked=kind == "attacked", steps=args.steps)
                    for kind in ("plain", "attacked")
                }
                if number:  # the first round warms up
                    rounds.append(found)
    result = {
        "command": " ".join(sys.argv),
        "machine": describe_machine(),
        "torch": torch.__version__,
        "teacher": "from the cache" if config.teacher_cache.folder else "runs in both kinds of step",
        "attack_steps": config.adversarial.steps,
        "rounds": rounds,
        "ratio": statistics.median(each["attacked"] / each["plain"] for each in rounds),
    }
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
