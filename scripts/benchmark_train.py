"""Training throughput: from the teacher cache, online, and open_clip's own trainer, in one run.

    python scripts/benchmark_train.py --json train.json
    python scripts/benchmark_train.py --quick --json train.json

Two comparisons, each arm in a separate process, alternating:

- ``icons``: the quickstart's teacher and student, online, from the cache, and from one that also stores pixels, with
  the accuracy that each seed reaches on an unseen font;
- ``peer``: ``--teacher`` into ``--student`` on synthetic JPEG pictures with captions: open_clip's trainer with
  ``--distill-model``, ours online with the same losses (contrastive, and cross-entropy with the teacher's in-batch
  distribution, in both directions), and ours from the cache. Same batch, precision, resolution, optimizer, number of
  workers. Random weights suffice for speed.

Samples/s are medians over the steps of a run, without the first ones. Without a GPU, the icons' cached arm reserves
cores for the decoding processes, which makes it faster, and would make the others slower.
"""

import argparse
import io
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image

from clipdistill.evaluation import classification_metrics, load_classification_set, load_for_evaluation, predict
from clipdistill.io.jsonl import read_jsonl
from clipdistill.io.machine import describe_machine
from clipdistill.io.resources import resource
from clipdistill.shards.icons import render_icons
from clipdistill.shards.writing import Sample, write_retrieval_folder

LEFT_OUT = 3
"""Records at the start of a run that are ignored: memory is allocated and workers start."""

PEER = """
import sys
from open_clip_train import data
from open_clip_train.main import main
group = data.group_by_keys_nothrow
data.group_by_keys_nothrow = lambda files, **settings: group((file for file in files if file), **settings)
main(sys.argv[1:])
"""
"""open_clip's trainer. Its reader does not support the empty marker that webdataset 1.0 appends to each shard."""


def clipdistill(*arguments: object) -> float:
    """Run a command; returns its seconds."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "clipdistill", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr}")
    return time.perf_counter() - started


def throughput(run: Path) -> dict[str, float]:
    """Throughput of one of our runs: medians over its records."""
    records = [record for record in read_jsonl(run / "metrics.jsonl") if "loss" in record][LEFT_OUT:]
    names = ("samples_per_second", "data_wait_share")
    return {name: statistics.median(record[name] for record in records) for name in names}


def icons(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure the quickstart's models, online and from the cache."""
    data = args.icons or folder / "icons"
    if not data.exists():
        render_icons(data, size=48)
    config = resource("configs", "icons.yaml")
    common = [f"data.shards=[{data}/train]", f"data.cache={folder}/index", f"train.steps={args.steps}"]
    common += ["train.log_every=20", "train.trackers=[]", f"data.workers={args.workers}"]
    common += ["data.batch_size=128", "evaluation.folders=[]"]
    cache = [f"data.views={args.views}", f"teacher_cache.folder={folder}/icons-embeddings"]
    pixels = [f"data.views={args.views}", f"teacher_cache.folder={folder}/icons-pixels", "teacher_cache.pixels=true"]
    pixels += ["data.workers=0"]  # nothing is decoded
    building = clipdistill("cache", "--config", config, *common, *cache)
    building_pixels = clipdistill("cache", "--config", config, *common, *pixels)
    if not torch.cuda.is_available():  # without a teacher, decoding keeps up with a step only on reserved cores
        cache.append(f"train.threads={max(1, torch.get_num_threads() - args.workers)}")
    test = load_classification_set(data / "test")
    arms: dict[str, list[dict[str, float]]] = {"online": [], "cached": [], "cached_pixels": []}
    for seed in range(args.seeds):
        for arm, more in (("online", []), ("cached", cache), ("cached_pixels", pixels)):
            run = folder / f"icons-{arm}-{seed}"
            seconds = clipdistill("train", "--config", config, *common, *more, f"output={run}", f"seed={seed}")
            student = load_for_evaluation(str(run))
            accuracy = classification_metrics(predict(student, test))["acc1"]
            assert accuracy is not None
            arms[arm].append(throughput(run) | {"seconds": seconds, "acc1": accuracy})
    return {
        "views": args.views,
        "cache_seconds": {"embeddings": building, "pixels": building_pixels},
        "cache_bytes": {
            name: sum(path.stat().st_size for path in (folder / f"icons-{name}").iterdir())
            for name in ("embeddings", "pixels")
        },
        "arms": arms,
        "cached_over_online": _ratio(arms["cached"], arms["online"]),
        "cached_pixels_over_online": _ratio(arms["cached_pixels"], arms["online"]),
    }


def pictures(count: int) -> Iterator[Sample]:
    """Smooth random JPEG pictures with captions of about ten words."""
    generator = np.random.default_rng(0)
    words = ["red", "small", "dog", "old", "house", "near", "river", "with", "green", "tree", "bright", "boat", "city"]
    for number in range(count):
        coarse = generator.integers(0, 256, (16, 21, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(coarse).resize((340, 256), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        caption = " ".join(generator.choice(words, generator.integers(6, 14)))
        yield Sample(key=f"{number:06d}", image=file.getvalue(), image_extension="jpg", caption=caption)


def peer(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure open_clip's trainer, ours online, and ours from the cache."""
    steps = args.peer_steps
    samples = args.batch_size * steps
    shards = folder / "pictures"
    write_retrieval_folder(
        pictures(samples), shards, split="train", samples_per_shard=-(-samples // max(1, args.workers))
    )
    weights = folder / "teacher.pt"
    torch.save(open_clip.create_model(args.teacher).state_dict(), weights)
    count = len(list((shards / "train").glob("*.tar")))
    config = {
        "output": str(folder / "ours"),
        "teachers": [{"model": args.teacher, "pretrained": str(weights), "precision": args.precision}],
        "student": {"model": args.student},
        "data": {
            "shards": [str(shards / "train")],
            "batch_size": args.batch_size,
            "workers": args.workers,
            "cache": str(folder / "index"),
            "augmentation": {"crop_scale": [0.9, 1.0]},
        },
        "objective": [{"loss": "clip", "over": "captions"}, {"loss": "kl", "over": "captions"}],
        "train": {"steps": steps, "precision": args.precision, "log_every": 1, "trackers": [], "save_every": 10**9},
    }
    path = folder / "peer.yaml"
    path.write_text(json.dumps(config))
    cache = ["data.views=1", f"teacher_cache.folder={folder}/peer-embeddings"]
    building = clipdistill("cache", "--config", path, *cache)
    theirs = [
        *("--train-data", f"{shards}/train/{{0..{count - 1}}}.tar", "--train-num-samples", samples),
        *("--dataset-type", "webdataset", "--batch-size", args.batch_size, "--workers", args.workers),
        *("--model", args.student, "--distill-model", args.teacher, "--distill-pretrained", weights),
        *("--precision", {"fp32": "fp32", "bf16": "amp_bf16"}[args.precision], "--epochs", 1, "--warmup", 1),
        *("--lr", 5e-4, "--log-every-n-steps", 1, "--logs", folder / "logs", "--save-frequency", 0),
    ]
    arms: dict[str, list[dict[str, float]]] = {"open_clip": [], "online": [], "cached": []}
    for number in range(args.rounds):
        command = [sys.executable, "-c", PEER, *map(str, theirs), "--name", f"round-{number}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"open_clip_train: {done.stderr[-3000:]}")
        log = (folder / "logs" / f"round-{number}" / "out.log").read_text()
        rates = [float(rate) for rate in re.findall(r"Batch \(t\): [\d.]+, ([\d.e+]+)/s", log)][LEFT_OUT:]
        waits = [
            float(wait) / float(step) for wait, step in re.findall(r"Data \(t\): ([\d.]+) Batch \(t\): ([\d.]+)", log)
        ]
        arms["open_clip"].append(
            {"samples_per_second": statistics.median(rates), "data_wait_share": statistics.median(waits[LEFT_OUT:])}
        )
        for arm, more in (("online", []), ("cached", cache)):
            run = folder / f"{arm}-{number}"
            clipdistill("train", "--config", path, *more, f"output={run}")
            arms[arm].append(throughput(run))
    return {
        "teacher": args.teacher,
        "student": args.student,
        "batch_size": args.batch_size,
        "precision": args.precision,
        "cache_seconds": building,
        "arms": arms,
        "online_over_open_clip": _ratio(arms["online"], arms["open_clip"]),
        "cached_over_open_clip": _ratio(arms["cached"], arms["open_clip"]),
        "cached_over_online": _ratio(arms["cached"], arms["online"]),
    }


def _ratio(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> float:
    """Ratio of the medians of samples/s."""
    first, second = (statistics.median(run["samples_per_second"] for run in runs) for runs in (ours, theirs))
    return first / second


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, one round, few steps")
    parser.add_argument("--only", choices=("icons", "peer"), help="run only one of the comparisons")
    parser.add_argument("--icons", type=Path, help="folder of rendered icons (default: render them)")
    parser.add_argument("--steps", type=int, default=600, help="steps of the icons runs (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--views", type=int, default=8, help="stored augmentations of an icon (default: %(default)s)")
    parser.add_argument("--teacher", default="ViT-B-32", help="of the peer comparison (default: %(default)s)")
    parser.add_argument("--student", default="ViT-S-32", help="of the peer comparison (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="of the peer comparison (default: %(default)s)")
    parser.add_argument("--peer-steps", type=int, default=25, help="of the peer comparison (default: %(default)s)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of peer (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="decoding processes (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of the peer comparison (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.rounds, args.steps, args.peer_steps = 1, 1, 200, 10
    result: dict[str, Any] = {
        "command": " ".join(sys.argv),
        "machine": describe_machine(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {"torch": torch.__version__, "open_clip": open_clip.__version__},
    }
    with tempfile.TemporaryDirectory() as temporary:
        for name, compare in (("icons", icons), ("peer", peer)):
            if args.only in (None, name):
                result[name] = compare(args, Path(temporary))
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
