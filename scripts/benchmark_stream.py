"""Cost of an exact stream: samples/s of StreamLoader relative to plain webdataset, in one run.

    python scripts/benchmark_stream.py --samples 2000 --rounds 9 --workers 2 --json stream.json

Both sides read the same local shards, use a shuffle window of the same size, decode, crop and resize with the
same function (`clipdistill.data.image.render`), and yield batches of the same content: uint8 pixels, captions,
labels, keys. Our side has everything enabled: an order determined by the seed, augmentations determined by the
sample, checks of every sample, counts of bad ones, and a state after every batch. Webdataset shuffles with its own
buffer, draws augmentations from one generator per worker, and checks nothing.

Both loaders exist for the entire run and alternate, in an order that is swapped every round. A turn begins when the
other side's workers are idle, and its clock starts when the prefetched batches are consumed. The results are medians
over the rounds.

The pictures are synthetic: JPEGs with photographic statistics (1/f noise, gradients, shapes), and, if qtawesome is
installed, the icons of the quickstart (grey PNGs), whose decoding cost is negligible.
"""

import argparse
import io
import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds
from PIL import Image, ImageDraw

from clipdistill.data import Augmentation, ImageTextStream, StreamLoader, expand_urls, index_shards
from clipdistill.data.image import render
from clipdistill.data.sample import Decoder
from clipdistill.io.machine import describe_machine
from clipdistill.shards.icons import render_icons
from clipdistill.shards.writing import Sample, write_shards

MAX_PIXELS = 89_478_485
PREFETCH = 2
DIFFERENT_PHOTOS = 400
ICON_SIZE = 64


def photo(rng: np.random.Generator, size: int) -> bytes:
    """A JPEG with the spectrum, contrasts and edges of a photograph."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    frequency[0, 0] = np.inf
    phases = rng.normal(size=(3, *frequency.shape)) + 1j * rng.normal(size=(3, *frequency.shape))
    texture = np.fft.irfft2((phases + 1.5 * phases[:1]) / frequency**1.2, s=(size, size))
    slope = rng.normal(size=(3, 2)) @ np.indices((size, size)).reshape(2, -1) / size
    picture = 40 * texture / texture.std() + 30 * slope.reshape(3, size, size) + rng.uniform(80, 170, (3, 1, 1))
    image = Image.fromarray(picture.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
    draw = ImageDraw.Draw(image)
    for shape in (draw.ellipse, draw.rectangle, draw.ellipse):
        corners = np.sort(rng.integers(0, size, (2, 2)), axis=0).ravel().tolist()
        shape(corners, fill=tuple(rng.integers(0, 256, 3).tolist()))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


def write_photos(folder: Path, *, samples: int, size: int) -> None:
    """Write eight shards of photographs, each with a caption and a label."""
    rng = np.random.default_rng(0)
    photos = [photo(rng, size) for _ in range(min(samples, DIFFERENT_PHOTOS))]
    write_shards(
        (
            Sample(
                key=f"{number:08d}",
                image=photos[number % len(photos)],
                image_extension="jpg",
                caption=f"photograph number {number}",
                label=number % 1000,
            )
            for number in range(samples)
        ),
        folder,
        samples_per_shard=-(-samples // 8),
    )


def ours(urls: list[str], *, image_size: int, batch_size: int, shuffle: int, workers: int) -> Iterator[Any]:
    """Batches of our stream, with the state after each."""
    stream = ImageTextStream(
        index_shards(urls, cache_dir=None),
        Decoder(image_size=image_size, augmentation=Augmentation(), require_captions=True, max_pixels=MAX_PIXELS),
        batch_size=batch_size,
        shuffle=shuffle,
        num_workers=workers,
    )
    loader = StreamLoader(stream, prefetch=PREFETCH)
    for batch in loader:
        yield batch, loader.state_dict()


def webdatasets(urls: list[str], *, image_size: int, batch_size: int, shuffle: int, workers: int) -> Iterator[Any]:
    """Batches of plain webdataset."""
    augmentation, rng = Augmentation(), np.random.default_rng()

    def decode(sample: dict[str, Any]) -> tuple[Any, str, int, str]:
        data = next(sample[extension] for extension in ("png", "jpg") if extension in sample)
        (pixels,) = render(data, image_size=image_size, augmentation=augmentation, rngs=[rng], max_pixels=MAX_PIXELS)
        return pixels, sample["txt"].decode(), int(sample.get("cls", b"-1")), sample["__key__"]

    def collate(samples: list[tuple[Any, str, int, str]]) -> tuple[torch.Tensor, list[str], torch.Tensor, list[str]]:
        pixels, captions, labels, keys = zip(*samples, strict=True)
        image_BCHW = np.stack(pixels, out=np.empty((len(samples), *pixels[0].shape), np.uint8))
        return torch.from_numpy(image_BCHW), list(captions), torch.tensor(labels), list(keys)

    data = wds.WebDataset(urls, shardshuffle=len(urls)).repeat().shuffle(shuffle, initial=shuffle).map(decode)
    return iter(
        wds.WebLoader(
            data.batched(batch_size, collation_fn=collate, partial=False),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=PREFETCH if workers else None,
        )
    )


def compare(urls: list[str], args: argparse.Namespace, *, image_size: int) -> dict[str, Any]:
    """Samples/s of both sides, alternating, and their ratio."""
    settings: dict[str, Any] = {
        "image_size": image_size,
        "batch_size": args.batch_size,
        "shuffle": args.shuffle,
        "workers": args.workers,
    }
    sides: dict[str, Callable[..., Iterator[Any]]] = {"ours": ours, "webdataset": webdatasets}
    batches = {name: side(urls, **settings) for name, side in sides.items()}
    for name in batches:
        speed(batches[name], args)
    rounds = []
    for number in range(args.rounds):
        order = list(batches) if number % 2 else list(reversed(batches))
        rounds.append({name: speed(batches[name], args) for name in order})
    return {
        "rounds": rounds,
        "ours_samples_per_second": statistics.median(turn["ours"] for turn in rounds),
        "webdataset_samples_per_second": statistics.median(turn["webdataset"] for turn in rounds),
        "ratio": statistics.median(turn["ours"] / turn["webdataset"] for turn in rounds),
    }


def speed(batches: Iterator[Any], args: argparse.Namespace) -> float:
    """Samples/s of the next batches, after the prefetched ones; then wait until as many are prefetched again."""
    ready = PREFETCH * args.workers
    for _ in islice(batches, ready + args.workers):
        pass
    count = max(1, args.samples // args.batch_size)
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    started = clock()
    for _ in islice(batches, count):
        pass
    elapsed = clock() - started
    time.sleep(2 * ready * elapsed / count)
    return count * args.batch_size / elapsed


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2000, help="per side and round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="default: %(default)s")
    parser.add_argument(
        "--workers", type=int, default=2, help="workers of each side; 0: in this process (default: %(default)s)"
    )
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: CPU time of this process, for a busy machine, with --workers 0 (default: %(default)s)",
    )
    parser.add_argument("--batch-size", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--shuffle", type=int, default=1000, help="window, samples (default: %(default)s)")
    parser.add_argument("--photo-size", type=int, default=256, help="side of the JPEGs, pixels (default: %(default)s)")
    parser.add_argument("--image-size", type=int, default=224, help="side of the views, pixels (default: %(default)s)")
    parser.add_argument("--photos", type=int, default=4000, help="photos in the shards (default: %(default)s)")
    parser.add_argument("--no-icons", action="store_true", help="skip the icons")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    args = parser.parse_args()
    if args.clock == "cpu" and args.workers:
        parser.error(f"--clock cpu: --workers is {args.workers}, allowed: 0 (other processes are not counted)")

    names = ("torch", "webdataset", "pillow", "numpy", "clipdistill")
    result: dict[str, Any] = {
        "command": shlex.join(sys.argv),
        "machine": f"{describe_machine()}, load {os.getloadavg()[0]:.1f}",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in names}},
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_photos(folder / "photos", samples=args.photos, size=args.photo_size)
        result |= compare(expand_urls([str(folder / "photos")]), args, image_size=args.image_size)
        if find_spec("qtawesome") and not args.no_icons:
            render_icons(folder / "icons", size=ICON_SIZE)
            result["icons"] = compare(expand_urls([str(folder / "icons" / "train")]), args, image_size=ICON_SIZE // 2)
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
