"""Overhead of the trainer over a bare loop: the same models, loss and optimizer on tensors that are in memory.

    python scripts/benchmark_overhead.py --config configs/icons.yaml --steps 40 --rounds 3 --json overhead.json

The trainer runs twice: from the shards, and on one batch that is ready in memory, as in the bare loop. The sides
alternate in one process, round after round; the result is the median ratio of their samples/s to the bare loop's.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F

from clipdistill.config import Config, load_config
from clipdistill.data import Batch, StreamLoader
from clipdistill.distributed.signals import Interruption
from clipdistill.io.machine import describe_machine, device_time
from clipdistill.losses import GKL, Feature, gkl_loss
from clipdistill.models.class_embeddings import similarity_logits
from clipdistill.training.trainer import Run, open_run, start_processes


def bare_loop(run: Run, config: Config, batch: Batch, steps: int) -> float:
    """Samples/s of a hand-written loop with GKL over prompts (and cosine features, if the config has them)."""
    device = run.accelerator.device
    batch = batch.to(device)
    teacher, student, class_CD = run.parts.teachers.models[0], run.parts.student, run.parts.teachers.class_embeddings[0]
    assert class_CD is not None
    gkl = next(term for term in config.objective if isinstance(term, GKL))
    feature = next((term for term in config.objective if isinstance(term, Feature)), None)
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-5, fused=True)
    half = config.train.precision == "bf16"
    started = device_time(device)
    for _ in range(steps):
        teacher_BD = teacher.encode_image(batch.image_BCHW)
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            out = student(batch.image_BCHW)
        loss = gkl_loss(
            similarity_logits(out.image_BD, class_CD, out.scale, None),
            similarity_logits(teacher_BD, class_CD, teacher.logit_scale, None),
            alpha=gkl.alpha,
            beta=gkl.beta,
            gamma=gkl.gamma,
        ).loss
        if feature is not None:
            loss = loss + feature.weight * (1 - F.cosine_similarity(out.image_BD, teacher_BD)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
    return steps * len(batch) / (device_time(device) - started)


class TimedLoader:
    """A run's loader that measures a number of steps.

    Attributes:
        seconds: from the first batch to the one after the measured steps; the device has finished them.
    """

    def __init__(self, loader: StreamLoader, device: torch.device, *, steps: int, batch: Batch | None) -> None:
        self.seconds = 0.0
        self._loader = loader
        self._device = device
        self._steps = steps
        self._batch = batch

    def __iter__(self) -> Iterator[Batch]:
        for number, batch in enumerate(self._loader if self._batch is None else repeat(self._batch)):
            if number in (0, self._steps):
                self.seconds = device_time(self._device) - self.seconds
            yield batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def trainer_loop(run: Run, steps: int, *, batch: Batch | None) -> float:
    """Samples/s of ``Run.fit``, including logging but no checkpoint: on one batch, or (None) from the shards."""
    loader = run.parts.loader
    timed = TimedLoader(loader, run.accelerator.device, steps=steps, batch=batch)
    run.parts.loader = cast(StreamLoader, timed)
    run.progress.step, run.total_steps = 0, steps + 1
    run.fit()
    run.parts.loader = loader
    return steps * run.config.data.batch_size / timed.seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/icons.yaml"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(
            args.config,
            [
                f"output={folder}/run",
                f"train.steps={args.steps + 1}",
                "train.save_every=1000000",
                "evaluation.folders=[]",
                *args.overrides,
            ],
        )
        rounds = []
        with (
            Interruption() as interruption,
            open_run(config, start_processes(config), interruption=interruption) as run,
        ):
            batch = next(iter(run.parts.loader))
            bare_loop(run, config, batch, 5)
            for _ in range(args.rounds):
                rounds.append(
                    {
                        "bare": bare_loop(run, config, batch, args.steps),
                        "ready": trainer_loop(run, args.steps, batch=batch),
                        "shards": trainer_loop(run, args.steps, batch=None),
                    }
                )
        ratios = {name: statistics.median(each[name] / each["bare"] for each in rounds) for name in ("ready", "shards")}
    result = {
        "command": " ".join(sys.argv),
        "machine": describe_machine(),
        "torch": torch.__version__,
        "rounds": rounds,
        "ratios": ratios,
    }
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
