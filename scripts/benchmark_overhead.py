"""Overhead of the trainer over a bare loop: the same models, loss and optimizer on tensors that are in memory.

    python scripts/benchmark_overhead.py --config configs/quickstart.yaml --steps 40 --rounds 3 --json overhead.json

Both sides alternate in one process, round after round; the result is the median ratio of their samples/s.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

from clipdistill.config import Config, load_config
from clipdistill.distributed.signals import Interruption
from clipdistill.io.machine import describe_machine, device_time
from clipdistill.losses import GKL, Feature, gkl_loss
from clipdistill.models.class_embeddings import similarity_logits
from clipdistill.training.trainer import Run, open_run, start_processes


def bare_loop(run: Run, config: Config, steps: int) -> float:
    """Samples/s of a hand-written loop with GKL over prompts (and cosine features, if the config has them)."""
    device = run.accelerator.device
    batch = next(iter(run.parts.loader)).to(device)
    teacher, student, class_CD = run.parts.teachers.models[0], run.parts.student, run.parts.teachers.class_embeddings[0]
    assert class_CD is not None
    gkl = next(term for term in config.objective if isinstance(term, GKL))
    feature = next((term for term in config.objective if isinstance(term, Feature)), None)
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-5)
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


def trainer_loop(run: Run, steps: int) -> float:
    """Samples/s of ``Run.fit``, including decoding, augmentation and logging."""
    run.progress.step, run.total_steps = 0, steps
    device = run.accelerator.device
    started = device_time(device)
    run.fit()
    return steps * run.config.data.batch_size / (device_time(device) - started)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.yaml"))
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
                f"train.steps={args.steps}",
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
            bare_loop(run, config, 5)
            for _ in range(args.rounds):
                bare = bare_loop(run, config, args.steps)
                rounds.append({"bare": bare, "trainer": trainer_loop(run, args.steps)})
        ratios = [r["trainer"] / r["bare"] for r in rounds]
    result = {
        "command": " ".join(sys.argv),
        "machine": describe_machine(),
        "torch": torch.__version__,
        "rounds": rounds,
        "ratio": statistics.median(ratios),
    }
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
