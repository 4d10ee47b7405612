"""What a GPU says about clipdistill, in one command of a few minutes; the figures go into one JSON file.

    python scripts/gpu_report.py --json gpu.json
    python scripts/gpu_report.py --json gpu.json --only kernels losses
    python scripts/gpu_report.py --json dry.json --dry

The file is written again after each part, so that a command that is cut off leaves what it has measured. A part that
fails leaves its error and the others run; the exit code is then 1. Parts for which no time is left are named as left
out. ``--dry`` runs all parts with tiny models on the CPU: its figures mean nothing, but every line of the script runs.

Parts, and what they decide:

- ``ceilings``: matrix products and copies, to which the other parts are compared;
- ``kernels``: the Triton kernels against float64 on fresh inputs, in values and gradients;
- ``losses``: plain, tiled and Triton over shapes: from which size on each wins (``FUSED_FROM``, ``auto``);
- ``teacher``, ``student``: the towers in each precision, eager and compiled;
- ``trainer``: over a bare loop on ready tensors (goal 0.97 or more), from shards, with captions, from a teacher cache;
  waits for the device in a step (goal 0); time of a checkpoint;
- ``loader``: decoded images/s by number of workers, JPEGs decoded by Pillow and on the device;
- ``peer``: a distillation step as open_clip's trainer takes it (goals: 1.2 times online, 5 times cached);
- ``bank``: class embeddings, evaluation;
- ``resume``: a run that is killed and resumed, against one that is not.
"""

import argparse
import contextlib
import json
import os
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import open_clip
import torch
import torch.nn.functional as F
from benchmark_losses import copy_bandwidth, peak_bytes, timed, wait
from benchmark_overhead import bare_loop, trainer_loop
from benchmark_train import pictures
from compare_runs import compare_runs
from open_clip.loss import DistillClipLoss
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from clipdistill.cli import main as clipdistill
from clipdistill.config import Config, load_config
from clipdistill.data import Augmentation, Batch, ImageTextStream, StreamLoader, expand_urls, index_shards
from clipdistill.data.sample import Decoder
from clipdistill.distributed.signals import Interruption
from clipdistill.evaluation import open_set
from clipdistill.evaluation.encoding import encode_set
from clipdistill.export import export_open_clip
from clipdistill.io.files import write_json
from clipdistill.io.jsonl import read_jsonl
from clipdistill.io.machine import describe_machine, device_time, matmul_rate
from clipdistill.losses import gkl_loss, gkl_loss_from_features, kd_loss
from clipdistill.losses.fused import kd_loss_from_features
from clipdistill.models.class_embeddings import class_embeddings
from clipdistill.models.loading import load_frozen_model, load_student
from clipdistill.models.prompts import load_prompts
from clipdistill.models.towers import FrozenModel
from clipdistill.shards.writing import write_retrieval_folder
from clipdistill.training.trainer import Run, open_run, start_processes

TINY: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
SCALE = 50.0
"""Logit scale of the losses' inputs."""


@dataclass(kw_only=True)
class Bench:
    """Models, data and sizes of a report.

    Attributes:
        dry: tiny models on the CPU.
        device: of the models.
        folder: temporary files.
    """

    dry: bool
    device: torch.device
    folder: Path

    @property
    def batch_size(self) -> int:
        """Images at once."""
        return 4 if self.dry else 256

    @property
    def steps(self) -> int:
        """Steps of a measurement."""
        return 3 if self.dry else 20

    @property
    def samples(self) -> int:
        """Pictures of the shards."""
        return 64 if self.dry else 4096

    @property
    def prompts(self) -> str:
        """Name of a prompt set."""
        return "icons" if self.dry else "imagenet-1k"

    @cached_property
    def models(self) -> tuple[str, str]:
        """Names of the teacher's and the student's architecture."""
        if not self.dry:
            return "ViT-L-14", "ViT-B-32"
        path = self.folder / "report-tiny.json"
        path.write_text(json.dumps(TINY))
        return str(path), str(path)

    @cached_property
    def teacher_folder(self) -> Path:
        """A teacher of random weights."""
        torch.manual_seed(0)
        folder = self.folder / "teacher"
        export_open_clip(load_student(self.models[0], logit_scale=SCALE), folder)
        return folder

    @cached_property
    def shards(self) -> Path:
        """A folder of JPEG pictures with captions, as a retrieval set with the split ``train``."""
        folder = self.folder / "pictures"
        write_retrieval_folder(pictures(self.samples), folder, split="train", samples_per_shard=self.samples // 16)
        return folder

    def teacher(self, precision: str = "fp32") -> FrozenModel:
        """The teacher on the device."""
        return load_frozen_model(f"local-dir:{self.teacher_folder}", precision=precision, device=self.device)

    def images(self, size: tuple[int, int]) -> Tensor:
        """Random pixels (B, 3, H, W), uint8."""
        return torch.randint(0, 256, (self.batch_size, 3, *size), dtype=torch.uint8, device=self.device)

    def config(self, name: str, *overrides: str, captions: bool = False, workers: int | None = None) -> Config:
        """A run's config; its output is ``name`` in the folder."""
        over = [{"loss": "clip", "over": "captions"}, {"loss": "kl", "over": "captions"}]
        config = {
            "output": str(self.folder / name),
            "teachers": [{"model": f"local-dir:{self.teacher_folder}"}],
            "student": {"model": self.models[1], "text": "train" if captions else "teacher"},
            "data": {
                "shards": [str(self.shards / "train")],
                "batch_size": self.batch_size,
                "cache": str(self.folder / "cache"),
                "workers": 0 if self.dry else workers,
            },
            "prompts": "" if captions else self.prompts,
            "objective": over if captions else [{"loss": "gkl", "gamma": 0.5}],
            "train": {"steps": self.steps, "log_every": 10**9, "save_every": 10**9, "trackers": []},
        }
        path = self.folder / f"{name}.yaml"
        path.write_text(json.dumps(config))
        return load_config(path, list(overrides))

    @contextlib.contextmanager
    def run(self, config: Config) -> Iterator[Run]:
        """An open run, which is not trained yet."""
        with (
            Interruption() as interruption,
            open_run(config, start_processes(config), interruption=interruption) as run,
        ):
            yield run

    def per_second(self, work: Callable[[], object], amount: float) -> float:
        """``amount`` over the seconds of one call, after two others."""
        work()
        work()
        return amount / timed(work, self.device.type, self.steps)


def ceilings(bench: Bench) -> dict[str, Any]:
    """Rates of matrix products (FLOP/s) and of copies (bytes/s)."""
    found: dict[str, Any] = {"matmul_bf16": matmul_rate(bench.device, torch.bfloat16)}
    before = torch.get_float32_matmul_precision()
    for name, precision in (("matmul_fp32", "highest"), ("matmul_tf32", "high")):
        torch.set_float32_matmul_precision(precision)
        found[name] = matmul_rate(bench.device, torch.float32)
    torch.set_float32_matmul_precision(before)
    found["copy_on_device"] = copy_bandwidth(bench.device.type)
    host = torch.empty(2**22 if bench.dry else 2**28, dtype=torch.uint8, pin_memory=bench.device.type == "cuda")
    there = torch.empty_like(host, device=bench.device)
    found["copy_to_device"] = bench.per_second(lambda: there.copy_(host, non_blocking=True), host.nbytes)
    found["copy_from_device"] = bench.per_second(lambda: host.copy_(there, non_blocking=True), host.nbytes)
    return found


def _features(bench: Bench, rows: int, columns: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """Unit-norm features of student and teacher, images then texts; the student's need gradients."""
    shapes = [rows, columns, rows, columns]
    tensors = [F.normalize(torch.randn(n, width, device=bench.device), dim=1).to(dtype) for n in shapes]
    return [tensor.requires_grad_(number < 2) for number, tensor in enumerate(tensors)]


def kernels(bench: Bench) -> dict[str, Any]:
    """Largest errors of the loss and of its gradients, relative to those in float64 of the same features."""
    implementation: Any = "tiled" if bench.dry else "triton"
    shapes = [(5, 7, 16), (33, 40, 32)] if bench.dry else [(512, 1000, 512), (1000, 5457, 768), (257, 333, 640)]
    found = {}
    for rows, columns, width in shapes:
        labels = torch.arange(rows, device=bench.device) % columns
        prior = torch.randn(columns, columns, device=bench.device).softmax(1)
        settings: dict[str, dict[str, Any]] = {
            "gkl": {},
            "gkl gamma 0.5 temperature 2": {"gamma": 0.5, "temperature": 2.0},
            "gkl prior": {"class_prior": prior, "labels": labels, "gamma": 0.6},
            "kl temperature 2": {"temperature": 2.0},
        }
        for (name, values), dtype in (
            (each, dtype) for each in settings.items() for dtype in (torch.float32, torch.bfloat16)
        ):
            features = _features(bench, rows, columns, width, dtype)
            exact = [tensor.detach().double().requires_grad_(number < 2) for number, tensor in enumerate(features)]
            exact_values: dict[str, Any] = {
                key: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
                for key, value in values.items()
            }
            logits = [SCALE * (exact[n] @ exact[n + 1].T) for n in (0, 2)]
            if name.startswith("gkl"):
                ours = gkl_loss_from_features(
                    *features, student_scale=SCALE, teacher_scale=SCALE, implementation=implementation, **values
                ).loss
                expected = gkl_loss(*logits, **exact_values).loss
            else:
                ours = kd_loss_from_features(
                    *features, student_scale=SCALE, teacher_scale=SCALE, implementation=implementation, **values
                )
                expected = kd_loss(*logits, **exact_values)
            gradients = zip(
                torch.autograd.grad(ours, features[:2]), torch.autograd.grad(expected, exact[:2]), strict=True
            )
            errors = {
                "loss": float(abs(ours.double() - expected).detach() / abs(expected).detach()),
                "gradient": max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in gradients),
            }
            allowed = {"loss": 1e-4, "gradient": 1e-3 if dtype == torch.float32 else 2e-2}
            case = f"{name}, {str(dtype).removeprefix('torch.')}, {rows} x {columns} x {width}"
            found[case] = errors | {"passed": all(errors[key] <= allowed[key] for key in errors)}
    passed = all(each["passed"] for each in found.values())
    return {"implementation": implementation, "passed": passed, "cases": found}


def losses(bench: Bench) -> dict[str, Any]:
    """Seconds and peak bytes of forward and backward from features, and the sizes from which each form wins."""
    names = ["plain", "tiled"] + ([] if bench.dry else ["triton"])
    sizes = [(8, 16), (16, 32)] if bench.dry else [(b, c) for b in (256, 1024, 4096) for c in (1000, 5457, 21841)]
    cases = []
    for rows, columns in sizes:
        features = _features(bench, rows, columns, 16 if bench.dry else 512, torch.float32)

        def step(name: str, features: list[Tensor] = features) -> None:
            for leaf in features[:2]:
                leaf.grad = None
            if name == "plain":
                logits = [SCALE * (features[n] @ features[n + 1].T) for n in (0, 2)]
                loss = gkl_loss(*logits, gamma=0.5).loss
            else:
                loss = gkl_loss_from_features(
                    *features, student_scale=SCALE, teacher_scale=SCALE, gamma=0.5, implementation=cast(Any, name)
                ).loss
            loss.backward()

        case: dict[str, Any] = {"rows": rows, "columns": columns}
        for name in names:
            work = partial(step, name)
            case[name] = {
                "seconds": 1 / bench.per_second(work, 1),
                "peak_bytes": peak_bytes(work, bench.device.type),
            }
        cases.append(case)
    cases.sort(key=lambda case: case["rows"] * case["columns"])
    wins = {}
    for name in names[1:]:
        slower = [c["rows"] * c["columns"] for c in cases if c[name]["seconds"] > c["plain"]["seconds"]]
        larger = [c["rows"] * c["columns"] for c in cases if c["rows"] * c["columns"] > max(slower, default=0)]
        wins[name] = min(larger, default=None)
    return {"cases": cases, "faster_than_plain_from": wins}


def _flops(work: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def teacher(bench: Bench) -> dict[str, Any]:
    """Images/s and FLOP/s of the teacher's image tower."""
    found: dict[str, Any] = {}
    before = torch.get_float32_matmul_precision()
    arms = [("fp32", "highest", "fp32", ""), ("tf32", "high", "fp32", ""), ("bf16", "high", "bf16", "")]
    arms += [("bf16 weights", "high", "bf16", "stored"), ("bf16 weights, compiled", "high", "bf16", "compiled")]
    for name, matmul, precision, more in arms:
        torch.set_float32_matmul_precision(matmul)
        model = bench.teacher(precision)
        images = bench.images(model.image_size)
        work = partial(model.encode_image, images)
        flops = found["flops"] = found.get("flops") or _flops(work) / len(images)
        if more:
            model.store_as_used()
        if more == "compiled":
            model.compile_blocks()
        rate = bench.per_second(work, len(images))
        found[name] = {"images_per_second": rate, "flops_per_second": rate * flops}
    torch.set_float32_matmul_precision(before)
    return found


def student(bench: Bench) -> dict[str, Any]:
    """Images/s and FLOP/s of the student's image tower, forward and backward."""
    found: dict[str, Any] = {}
    for name, precision, compiled in (
        ("fp32", "fp32", False),
        ("bf16", "bf16", False),
        ("bf16, compiled", "bf16", True),
    ):
        model = load_student(bench.models[1]).to(bench.device)
        images = bench.images(model.image_size)
        if compiled:
            model.compile_towers()

        def step(model: Any = model, images: Tensor = images, half: bool = precision == "bf16") -> None:
            model.zero_grad(set_to_none=True)
            with torch.autocast(bench.device.type, torch.bfloat16, enabled=half):
                image_BD = model(images).image_BD
            (image_BD**3).sum().backward()

        flops = found["flops"] = found.get("flops") or _flops(step) / len(images)
        rate = bench.per_second(step, len(images))
        found[name] = {"images_per_second": rate, "flops_per_second": rate * flops}
    return found


def _count_waits(run: Run, bench: Bench, batch: Batch) -> float | None:
    """Waits for the device in a step, without those of the last one, which is logged; None without a GPU."""
    if bench.device.type != "cuda":
        return None
    counts = []
    for steps in (bench.steps, 2 * bench.steps):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                trainer_loop(run, steps, batch=batch)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchroniz" in str(each.message) for each in caught))
    return (counts[1] - counts[0]) / bench.steps


def _rates(bench: Bench, config: Config) -> dict[str, Any]:
    """Samples/s of a run on a ready batch and from its shards, and its waits for the device."""
    with bench.run(config) as run:
        batch = next(iter(run.parts.loader))
        trainer_loop(run, 5, batch=batch)
        return {
            "ready": trainer_loop(run, bench.steps, batch=batch),
            "shards": trainer_loop(run, bench.steps, batch=None),
            "waits_in_a_step": _count_waits(run, bench, batch),
        }


def _build_cache(bench: Bench, name: str, *more: str, captions: bool = False) -> tuple[Config, float]:
    """Build a teacher cache; returns the config of a run from it, and the samples/s of the build."""
    overrides = ["data.views=1", f"teacher_cache.folder={bench.folder / name}-cache", *more]
    config = bench.config(name, *overrides, captions=captions)
    started = time.perf_counter()
    if clipdistill(["cache", "--config", str(bench.folder / f"{name}.yaml"), *overrides]):
        raise RuntimeError("clipdistill cache failed")
    return config, bench.samples / (time.perf_counter() - started)


def trainer(bench: Bench) -> dict[str, Any]:
    """Samples/s of the trainer against a bare loop's, and from caches; the cost of a checkpoint."""
    found: dict[str, Any] = {}
    config = bench.config("bare")
    with bench.run(config) as run:
        batch = next(iter(run.parts.loader))
        bare_loop(run, config, batch, 5)
        trainer_loop(run, 5, batch=batch)
        rounds = [
            (bare_loop(run, config, batch, bench.steps), trainer_loop(run, bench.steps, batch=batch)) for _ in range(5)
        ]
        found["bare"] = statistics.median(bare for bare, _ in rounds)
        found["over_bare"] = statistics.median(ours / bare for bare, ours in rounds)
    found["online"] = _rates(bench, bench.config("online"))
    found["captions"] = _rates(bench, bench.config("captions", captions=True))
    for name, more in (("cached", []), ("cached-pixels", ["teacher_cache.pixels=true"])):
        config, rate = _build_cache(bench, name, *more)
        found[name] = {"build_samples_per_second": rate} | _rates(bench, config)
    every = max(1, bench.steps // 2)
    for name, overrides in (("unsaved", []), ("saved", [f"train.save_every={every}"])):
        with bench.run(bench.config(f"checkpoints-{name}", *overrides, "train.ema=0.99")) as run:
            batch = next(iter(run.parts.loader))
            trainer_loop(run, 1, batch=batch)
            found[f"seconds_{name}"] = 2 * every * bench.batch_size / trainer_loop(run, 2 * every, batch=batch)
    found["stall_of_a_checkpoint"] = (found["seconds_saved"] - found["seconds_unsaved"]) / 2
    return found


def loader(bench: Bench) -> dict[str, Any]:
    """Images/s by number of decoding processes, decoded by Pillow and on the device; and how far the pixels differ."""
    index = index_shards(expand_urls([str(bench.shards / "train")]), cache_dir=None)
    size = 32 if bench.dry else 224

    def batches(workers: int, decoder: str) -> StreamLoader:
        augmentation = Augmentation.model_validate({"jpeg_decoder": decoder})
        stream = ImageTextStream(
            index,
            Decoder(image_size=size, augmentation=augmentation),
            batch_size=bench.batch_size,
            num_workers=workers,
        )
        return StreamLoader(stream, pin_memory=bench.device.type == "cuda", device=bench.device)

    first = [next(iter(batches(0, decoder))).image_BCHW.cpu().int() for decoder in ("pillow", "device")]
    levels = (first[0] - first[1]).abs()
    found: dict[str, Any] = {"device_from_pillow": {"mean": levels.double().mean().item(), "most": levels.max().item()}}
    for decoder in ("pillow", "device"):
        for workers in (0, 1) if bench.dry else (1, 8, 16):
            stream = batches(workers, decoder)
            images, started = 0, 0.0
            for number, batch in enumerate(stream):
                if number == 2 * workers:  # what was decoded ahead is used up
                    wait(bench.device.type)
                    started = time.perf_counter()
                elif started:
                    images += len(batch)
                    if time.perf_counter() - started > (0.2 if bench.dry else 4):
                        break
            wait(bench.device.type)
            found[f"{decoder}, {workers} workers"] = images / (time.perf_counter() - started)
            stream.close()
    return found


def peer(bench: Bench) -> dict[str, Any]:
    """Samples/s of a step as in open_clip's trainer with ``--distill-model`` and ``--precision amp_bf16``, of ours
    with the same losses, and of ours from the cache, all on ready tensors."""
    half = torch.autocast(bench.device.type, torch.bfloat16)
    batch, size = bench.batch_size, (32, 32) if bench.dry else (224, 224)
    models = bench.models
    for model in models if bench.dry else ():
        open_clip.add_model_config(model)
    theirs = [open_clip.create_model(Path(model).stem if bench.dry else model).to(bench.device) for model in models]
    frozen, model = theirs[0].eval(), theirs[1]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    images = torch.randn(batch, 3, *size, device=bench.device)
    texts = torch.randint(1, 49000, (batch, 77), device=bench.device)
    loss = DistillClipLoss(local_loss=False, gather_with_grad=False, cache_labels=True)

    def step() -> None:
        optimizer.zero_grad()
        with half:
            out = dict(zip(("image_features", "text_features", "logit_scale"), model(images, texts)[:3], strict=True))
            with torch.no_grad():
                soft = frozen(images, texts)[:3]
            names = ("dist_image_features", "dist_text_features", "dist_logit_scale")
            parts = loss(**out, **dict(zip(names, soft, strict=True)), output_dict=True)
        sum(parts.values()).backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, 4.6052)

    found: dict[str, Any] = {"open_clip": bench.per_second(step, batch)}
    cached, _ = _build_cache(bench, "peer-cached", captions=True)
    for name, config in (("online", bench.config("peer", captions=True)), ("cached", cached)):
        found[name] = _rates(bench, config)
        found[f"{name}_over_open_clip"] = found[name]["ready"] / found["open_clip"]
    return found


def bank(bench: Bench) -> dict[str, Any]:
    """Seconds of the class embeddings of a prompt set, and images/s of an evaluation."""
    model, prompts = bench.teacher("fp32" if bench.dry else "bf16"), load_prompts(bench.prompts)
    started = device_time(bench.device)
    class_embeddings(model, prompts, device=bench.device)
    seconds = device_time(bench.device) - started
    data = open_set(str(bench.shards), split="train")
    started = device_time(bench.device)
    encode_set(model, data, batch_size=bench.batch_size, device=bench.device)
    rate = len(data) / (device_time(bench.device) - started)
    return {"prompts": len(prompts.texts()), "class_embeddings_seconds": seconds, "evaluation_images_per_second": rate}


def resume(bench: Bench) -> dict[str, Any]:
    """Samples and weights of a run that was killed and resumed, against those of one that was not."""
    more = ["train.trace=true", "train.save_every=4", f"train.steps={3 * bench.steps}"]
    bench.config("undisturbed", *more, workers=2)
    command = [sys.executable, "-m", "clipdistill", "train", "--config", str(bench.folder / "undisturbed.yaml"), *more]
    subprocess.run(command, check=True, capture_output=True)
    killed = bench.folder / "killed"
    process = subprocess.Popen(
        [*command, f"output={killed}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while process.poll() is None and not list((killed / "checkpoints").glob("step_*")):
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    subprocess.run([*command, f"output={killed}", "--resume", "auto"], check=True, capture_output=True)
    found = compare_runs(bench.folder / "undisturbed", killed)
    last = [
        [record for record in read_jsonl(run / "metrics.jsonl") if "loss" in record][-1]["loss"]
        for run in (bench.folder / "undisturbed", killed)
    ]
    return {
        "killed": process.returncode == -signal.SIGKILL,
        "samples": found.seen,
        "lost": found.lost,
        "repeated": found.repeated,
        "values_compared": found.compared,
        "values_differing": len(found.differing),
        "last_losses": last,
    }


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    part.__name__: part for part in (ceilings, kernels, losses, teacher, student, trainer, loader, peer, bank, resume)
}


def main() -> int:
    """Measure, part by part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file of the figures")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), metavar="PART", help=f"some of: {', '.join(PARTS)}")
    parser.add_argument("--minutes", type=float, default=9, help="start no part after this time (default: %(default)s)")
    parser.add_argument("--dry", action="store_true", help="tiny models on the CPU: the script itself is tested")
    args = parser.parse_args()
    if not args.dry and not torch.cuda.is_available():
        parser.error("no GPU here; allowed: a machine with one, or --dry")
    started = time.monotonic()
    device = torch.device("cpu" if args.dry else "cuda")
    report: dict[str, Any] = {
        "command": shlex.join(sys.argv),
        "dry": args.dry,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "machine": f"{describe_machine()}, {platform.platform()}",
        "versions": {name: version(name) for name in ("torch", "open_clip_torch", "accelerate", "webdataset")},
        "parts": {},
    }
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(dry=args.dry, device=device, folder=Path(folder))
        for name in args.only or PARTS:
            since = time.monotonic()
            if since - started > 60 * args.minutes:
                report["parts"][name] = {"left out": f"no part is started after {args.minutes:g} minutes"}
            else:
                try:
                    found = PARTS[name](bench)
                except Exception as error:  # the other parts are worth having
                    traceback.print_exc()
                    failed = True
                    found = {"error": f"{type(error).__name__}: {error}"}
                report["parts"][name] = found | {"seconds_of_the_part": time.monotonic() - since}
            write_json(args.json, report)
            print(f"{name}: {json.dumps(report['parts'][name], default=str)}", flush=True)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
