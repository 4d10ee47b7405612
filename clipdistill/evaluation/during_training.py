"""Zero-shot evaluation of a student during and after its training."""

from collections.abc import Sequence
from pathlib import Path

import torch

from clipdistill.evaluation.attack import AttackSettings, accuracy_under_attack
from clipdistill.evaluation.benchmark_format import Record, benchmark_record
from clipdistill.evaluation.evaluate import Evaluator, zero_shot
from clipdistill.evaluation.ranks import broadcast_from_first_rank
from clipdistill.evaluation.sets.samples import EvaluationSet
from clipdistill.models.towers import Tower


def evaluate_sets(
    tower: Tower,
    sets: Sequence[EvaluationSet],
    *,
    model: str,
    pretrained: str = "",
    batch_size: int = 256,
    workers: int = 0,
    device: torch.device | str = "cpu",
    cache: Path | None = None,
    attack: AttackSettings | None = None,
) -> list[Record]:
    """Evaluate a tower zero-shot; with several ranks, all call this together, and all get the records.

    Each sample is counted once. A rank encodes its share of the batches and all class prompts; the first rank computes
    the metrics. Buffers such as batch-norm statistics differ between the ranks of a training run: all take the first
    rank's, as DDP does at its next step.

    Args:
        tower: the model, with the same weights on every rank; its mode is restored afterwards.
        sets: from ``open_set``.
        model: name of the model in the records.
        pretrained: tag or checkpoint in the records.
        batch_size: images at once.
        workers: threads of a rank that decode and resize; 0: one per core.
        device: where the tower is.
        cache: folder for class features, useful while the text tower does not change.
        attack: also measure ``robust_acc1`` on sets for classification.

    Returns:
        One CLIP_benchmark record per set; see ``classification_metrics``, ``retrieval_metrics`` and
        ``accuracy_under_attack``.

    Raises:
        InputError: on every rank: a bad sample, a set without readable images, or features that are not finite.
    """
    broadcast_from_first_rank(tower.clip.buffers())
    evaluator = Evaluator(tower, batch_size=batch_size, workers=workers, device=device, cache=cache)
    records = []
    for data in sets:
        metrics = zero_shot(evaluator, data, temperature=False)[0]
        if attack is not None and data.kind == "classification":
            attacked = accuracy_under_attack(evaluator, data, attack)[0]
            metrics |= {name: value for name, value in attacked.items() if name.startswith("robust_")}
        records.append(benchmark_record(data, metrics, model=model, pretrained=pretrained))
    return records
