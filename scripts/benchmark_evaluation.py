"""Images and classes per second of zero-shot evaluation, ours versus CLIP_benchmark's, alternating in one process.

    python scripts/benchmark_evaluation.py --model ViT-S-32 --json evaluation.json

Both evaluate the same model (random weights suffice for speed) on the same set in CLIP_benchmark's layout: JPEG
pictures generated here, a class list of 1,000 names. Both read the shards, encode every class in every template and
every image in float32, and compute the metrics; loading the model is excluded. The rate is images plus classes, divided
by the seconds of these steps.
"""

import argparse
import builtins
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from clipdistill.evaluation import evaluate_sets, open_set
from clipdistill.io.machine import describe_machine
from clipdistill.models.loading import load_student
from clipdistill.models.prompts import load_prompts
from clipdistill.models.towers import Tower
from clipdistill.shards.writing import Sample, write_classification_folder


def pictures(count: int, *, classes: int, side: int) -> Iterator[Sample]:
    """Smooth random pictures, about as expensive to decode as JPEG photos of their size."""
    generator = np.random.default_rng(0)
    for number in range(count):
        coarse = generator.integers(0, 256, (side // 16, side // 12, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(coarse).resize((side * 4 // 3, side), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        yield Sample(key=f"{number:06d}", image=buffer.getvalue(), image_extension="jpg", label=number % classes)


def run_clipdistill(tower: Tower, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Evaluate with this project."""
    (record,) = evaluate_sets(
        tower, [open_set(folder)], model="", batch_size=args.batch_size, workers=args.workers, device=args.device
    )
    return record["metrics"]


def run_clip_benchmark(tower: Tower, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Evaluate with CLIP_benchmark, like its command."""
    from clip_benchmark.datasets.builder import build_dataset
    from clip_benchmark.metrics import zeroshot_classification

    # clip-benchmark 1.6.2 calls float() on arrays of one element, which NumPy 2.4 rejects.
    zeroshot_classification.float = lambda value: builtins.float(np.asarray(value).item())
    transform = image_transform_v2(PreprocessCfg(**open_clip.get_model_preprocess_cfg(tower.clip)), is_train=False)
    dataset = build_dataset("wds/set", root=str(folder), transform=transform, split="test")
    loader = torch.utils.data.DataLoader(
        dataset.batched(args.batch_size), batch_size=None, shuffle=False, num_workers=args.workers
    )
    tower.clip.output_dict = False
    metrics = zeroshot_classification.evaluate(
        tower.clip, loader, tower.tokenizer, dataset.classes, dataset.templates, device=args.device, amp=False
    )
    tower.clip.output_dict = True
    return metrics


def main() -> None:
    """Measure, and print the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-S-32", help="an open_clip name (default: %(default)s)")
    parser.add_argument("--images", type=int, default=400, help="default: %(default)s")
    parser.add_argument("--side", type=int, default=384, help="side of the pictures, pixels (default: %(default)s)")
    parser.add_argument("--prompts", default="imagenet-1k", help="prompt set (default: %(default)s)")
    parser.add_argument("--templates", type=int, default=1, help="use the first N of the set (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="default: CLIP_benchmark's, %(default)s")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="threads; processes (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's)")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    prompts = load_prompts(args.prompts, allow_duplicates=True)
    names = list(dict.fromkeys(prompts.classnames))
    tower = load_student(args.model).to(args.device).eval()
    seconds: dict[str, list[float]] = {"ours": [], "clip_benchmark": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "set"
        write_classification_folder(
            pictures(args.images, classes=len(names), side=args.side),
            folder,
            split="test",
            classnames=names,
            templates=prompts.templates[: args.templates],
            samples_per_shard=-(-args.images // max(1, args.workers)),  # CLIP_benchmark's workers need a shard each
        )
        for _ in range(args.rounds):
            metrics = {}
            for name, evaluate in (("ours", run_clipdistill), ("clip_benchmark", run_clip_benchmark)):
                started = time.perf_counter()
                metrics[name] = evaluate(tower, folder, args)
                seconds[name].append(time.perf_counter() - started)
    work = args.images + len(names)
    result: dict[str, Any] = {
        "command": " ".join(sys.argv),
        "machine": describe_machine(),
        "device": args.device,
        "torch": torch.__version__,
        "open_clip": open_clip.__version__,
        "clip-benchmark": version("clip-benchmark"),
        "images": args.images,
        "classes": len(names),
        "templates": args.templates,
        "seconds": seconds,
        "per_second": {name: work / min(values) for name, values in seconds.items()},
        "ratio_of_best": min(seconds["clip_benchmark"]) / min(seconds["ours"]),
        "ratio_of_medians": statistics.median(seconds["clip_benchmark"]) / statistics.median(seconds["ours"]),
        "acc1": {name: values["acc1"] for name, values in metrics.items()},
    }
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
