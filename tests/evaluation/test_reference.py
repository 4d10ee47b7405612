"""The same numbers as CLIP_benchmark's own command: the shipped icons teacher on sets of icons it has not seen."""

import builtins
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFont

from clipdistill.evaluation import evaluate_sets, load_for_evaluation, open_set
from clipdistill.io.images import DecodingSettings
from clipdistill.io.resources import resource
from clipdistill.models.prompts import load_prompts
from clipdistill.shards.icons import FAMILIES, find_fonts, read_glyphs, render_glyph
from clipdistill.shards.writing import Sample, write_classification_folder, write_retrieval_folder
from tests.conftest import write_tar

TEACHER = f"local-dir:{resource('weights', 'icons-teacher')}"
BATCH = 32
CLASSES = load_prompts("icons").classnames


@pytest.fixture(scope="module")
def icons() -> list[tuple[str, Image.Image]]:
    """Concepts and pictures of the held-out family."""
    folder, _ = find_fonts()
    glyphs = [glyph for glyph in read_glyphs(folder) if glyph.family == "ri" and glyph.concept in CLASSES]
    font = ImageFont.truetype(str(next(folder.glob(f"{FAMILIES['ri'].font}*.ttf"))), 96)
    drawn = [(glyph.concept, render_glyph(font, glyph.character, size=64)) for glyph in glyphs[::4]]
    return [(concept, picture) for concept, picture in drawn if picture is not None]


def _encoded(picture: Image.Image, number: int) -> tuple[bytes, str]:
    """The picture in one of several formats and modes, two of them not square."""
    variants: list[tuple[Callable[[Image.Image], Image.Image], str]] = [
        (lambda image: image.convert("RGB"), "png"),
        (lambda image: image.convert("RGB").quantize(7), "png"),
        (lambda image: _on_canvas(image, (90, 64)), "jpg"),
        (lambda image: image.convert("RGBA").rotate(5), "png"),
        (lambda image: _on_canvas(image, (64, 71)), "webp"),
    ]
    change, extension = variants[number % len(variants)]
    buffer = io.BytesIO()
    change(picture).save(buffer, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[extension])
    return buffer.getvalue(), extension


def _on_canvas(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    canvas = Image.new("RGB", size, "white")
    canvas.paste(picture.convert("RGB"), ((size[0] - 64) // 2, (size[1] - 64) // 2))
    return canvas


def _samples(icons: list[tuple[str, Image.Image]], **caption: bool) -> Iterator[Sample]:
    for number, (concept, picture) in enumerate(icons):
        data, extension = _encoded(picture, number)
        yield Sample(
            key=f"{number:05d}",
            image=data,
            image_extension=extension,
            label=None if caption else CLASSES.index(concept),
            caption=f"{concept} number {number}" if caption else None,
        )


@pytest.fixture(scope="module")
def sets(icons: list[tuple[str, Image.Image]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of sets: many classes, few classes, multi-label, one caption an image, and several."""
    root = tmp_path_factory.mktemp("sets")
    write_classification_folder(
        _samples(icons),
        root / "many",
        split="test",
        classnames=CLASSES,
        templates=["{c}", "{c} icon"],
        samples_per_shard=60,
    )
    few = icons[: len(icons) // 4]
    names = sorted({concept for concept, _ in few})[:4]
    write_classification_folder(
        (
            Sample(key=f"{n}", image=_encoded(p, n)[0], image_extension=_encoded(p, n)[1], label=names.index(c))
            for n, (c, p) in enumerate(icons)
            if c in names
        ),
        root / "few",
        split="test",
        classnames=names,
        templates=["{c}"],
    )
    write_retrieval_folder(_samples(icons[:90], caption=True), root / "single", split="test")
    _write_several_captions(root / "several", icons[40:130])
    _write_multilabel(root / "multi", icons)
    return root


def _write_several_captions(folder: Path, icons: list[tuple[str, Image.Image]]) -> None:
    samples: list[dict[str, Any]] = []
    for number, (concept, picture) in enumerate(icons):
        data, extension = _encoded(picture, number)
        captions = [f"{concept} {number}", f"an icon of {concept}, {number}", f"{number} {concept} line"]
        samples.append({"key": f"s{number:04d}", extension: data, "txt": "\n".join(captions[: 1 + number % 3])})
    _write_shards(folder, samples, dataset_type="retrieval")


def _write_multilabel(folder: Path, icons: list[tuple[str, Image.Image]]) -> None:
    samples: list[dict[str, Any]] = []
    for number in range(0, len(icons) - 1, 2):
        canvas = Image.new("RGB", (64, 64), "white")
        marks = np.zeros(len(CLASSES), dtype=np.int64)
        for place, (concept, picture) in enumerate(icons[number : number + 2]):
            canvas.paste(picture.convert("RGB").resize((32, 32)), (32 * place, 16))
            marks[CLASSES.index(concept)] = 1
        array = io.BytesIO()
        np.save(array, marks)
        samples.append({"key": f"s{number:04d}", "webp": _encoded_webp(canvas), "npy": array.getvalue()})
    _write_shards(folder, samples, dataset_type="multilabel")
    (folder / "classnames.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    (folder / "zeroshot_classification_templates.txt").write_text("{c}\n")


def _encoded_webp(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


def _write_shards(folder: Path, samples: list[dict[str, Any]], *, dataset_type: str) -> None:
    write_tar(folder / "test" / "0.tar", samples[:50])
    write_tar(folder / "test" / "1.tar", samples[50:])
    (folder / "test" / "nshards.txt").write_text("2")
    (folder / "dataset_type.txt").write_text(dataset_type)


@pytest.fixture
def clip_benchmark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, float]]:
    """CLIP_benchmark's command line, in this process; its metrics."""
    cli = pytest.importorskip("clip_benchmark.cli")
    # clip-benchmark 1.6.2 calls float() on arrays of one element, which NumPy 2.4 refuses.
    monkeypatch.setattr(
        cli.zeroshot_classification, "float", lambda x: builtins.float(np.asarray(x).item()), raising=False
    )

    def run(folder: Path, *, task: str) -> dict[str, float]:
        output = tmp_path / f"{folder.name}.json"
        arguments = ["--dataset", f"wds/{folder.name}", "--dataset_root", folder, "--task", task, "--output", output]
        settings = ["--model", TEACHER, "--pretrained", "", "--no_amp", "--batch_size", BATCH, "--num_workers", 0]
        recalls = ["--recall_k", 1, 5, 10, "--quiet"]
        monkeypatch.setattr(sys, "argv", ["clip_benchmark", "eval", *map(str, arguments + settings + recalls)])
        cli.main()
        return json.loads(output.read_text())["metrics"]

    return run


@pytest.mark.parametrize(
    ("name", "task", "expected"),
    [
        ("many", "zeroshot_classification", {"acc1", "acc5", "mean_per_class_recall"}),
        ("few", "zeroshot_classification", {"acc1", "mean_per_class_recall"}),
        ("multi", "zeroshot_classification", {"mean_average_precision"}),
        ("single", "zeroshot_retrieval", {f"{w}_retrieval_recall@{k}" for w in ("image", "text") for k in (1, 5, 10)}),
        ("several", "zeroshot_retrieval", {f"{w}_retrieval_recall@{k}" for w in ("image", "text") for k in (1, 5, 10)}),
    ],
)
def test_metrics_are_those_of_clip_benchmark(
    clip_benchmark: Callable[..., dict[str, float]], sets: Path, name: str, task: str, expected: set[str]
) -> None:
    theirs = clip_benchmark(sets / name, task=task)
    tower = load_for_evaluation(TEACHER)
    decoding = DecodingSettings(decoding="clip-benchmark")  # some of the pictures are transparent
    (record,) = evaluate_sets(
        tower, [open_set(sets / name, decoding=decoding)], model=TEACHER, batch_size=BATCH, workers=2
    )
    assert record["task"] == task
    assert {metric for metric, value in theirs.items() if not np.isnan(value)} == expected
    for metric in expected:
        assert theirs[metric] > 0
        assert record["metrics"][metric] == pytest.approx(theirs[metric], abs=1e-6), metric
    assert record["metrics"]["unreadable"] == 0
