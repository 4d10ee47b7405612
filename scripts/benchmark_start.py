"""Time until the first step of a run over many remote shards: with their sizes stated beside them, and without.

    python scripts/benchmark_start.py --shards 2000 --latency 0.02 --json start.json

A server of this machine answers every request after the latency. The runs are `clipdistill train` of one step of the
quickstart's config, in processes of their own, one after another; their time includes Python's start and the loading of
the models, which the run over two local shards shows.
"""

import argparse
import functools
import http.server
import io
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import ClassVar

import torch
from PIL import Image

from clipdistill.io.machine import describe_machine
from clipdistill.io.resources import resource
from clipdistill.shards.writing import Sample, write_shards


class Slow(http.server.SimpleHTTPRequestHandler):
    """Serves files, with byte ranges and an ETag, each answer after a latency."""

    protocol_version = "HTTP/1.1"
    latency = 0.0
    asked: ClassVar[Counter[str]] = Counter()

    def log_message(self, *args: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        """Answer without a body."""
        self._answer(body=False)

    def do_GET(self) -> None:
        """Answer with the range that is asked for."""
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        time.sleep(self.latency)
        path = Path(self.translate_path(self.path))
        self.asked["list" if path.suffix == ".json" else "shard"] += 1
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        first, last = 0, len(content) - 1
        wanted = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
        if wanted[0]:
            first, last = int(wanted[0]), min(int(wanted[2] or last), last)
        self.send_response(206 if wanted[0] else 200)
        if wanted[0]:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.send_header("Content-Length", str(last + 1 - first))
        self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        self.end_headers()
        if body:
            self.wfile.write(content[first : last + 1])


def write(folder: Path, *, shards: int, samples: int) -> None:
    """Shards of small pictures, numbered."""
    encoded = io.BytesIO()
    Image.new("RGB", (48, 48), "white").save(encoded, "PNG")

    def all_samples() -> object:
        for number in range(shards * samples):
            yield Sample(key=f"{number:07d}", image=encoded.getvalue(), image_extension="png", caption="a picture")

    write_shards(all_samples(), folder, samples_per_shard=samples)  # type: ignore[arg-type]


def seconds_to_first_step(shards: str, folder: Path) -> float:
    """Time of a run of one step."""
    started = time.perf_counter()
    subprocess.run(
        [
            *(sys.executable, "-m", "clipdistill", "train", "--config", str(resource("configs", "icons.yaml"))),
            *(f"output={folder}/run", f"data.shards=['{shards}']", f"data.cache={folder}/cache", "train.steps=1"),
            *("train.trackers=[]", "data.views=0", "teacher_cache.folder=''", "evaluation.folders=[]"),
            *("data.batch_size=64", "optimizer.warmup_steps=0"),
        ],
        check=True,
        capture_output=True,
    )
    return time.perf_counter() - started


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=2000)
    parser.add_argument("--samples", type=int, default=100, help="in each shard (default: %(default)s)")
    parser.add_argument("--latency", type=float, default=0.02, help="seconds (default: %(default)s)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    seconds: dict[str, float] = {}
    requests: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write(folder / "site", shards=args.shards, samples=args.samples)
        write(folder / "two", shards=2, samples=args.samples)
        (folder / "two" / "sizes.json").write_text(json.dumps({f"{number}.tar": args.samples for number in range(2)}))
        Slow.latency = args.latency
        server = http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), functools.partial(Slow, directory=str(folder / "site"))
        )
        threading.Thread(target=server.serve_forever, daemon=True).start()
        pattern = f"http://127.0.0.1:{server.server_port}/{{0..{args.shards - 1}}}.tar"
        sizes = json.dumps({f"{number}.tar": args.samples for number in range(args.shards)})
        for name, shards in (("two local shards", str(folder / "two")), ("unstated", pattern), ("sizes.json", pattern)):
            if name == "sizes.json":
                (folder / "site" / "sizes.json").write_text(sizes)
            Slow.asked.clear()
            seconds[name] = seconds_to_first_step(shards, folder / name.replace(" ", "-"))
            requests[name] = dict(Slow.asked)
        for number in range(args.shards):
            stats = {"count": args.samples, "successes": args.samples}
            (folder / "site" / f"{number}_stats.json").write_text(json.dumps(stats))
        (folder / "site" / "sizes.json").unlink()
        Slow.asked.clear()
        seconds["img2dataset"] = seconds_to_first_step(pattern, folder / "img2dataset")
        requests["img2dataset"] = dict(Slow.asked)
        server.shutdown()
    result = {
        "command": " ".join(sys.argv),
        "machine": describe_machine(),
        "torch": torch.__version__,
        "seconds": seconds,
        "requests": requests,
    }
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
