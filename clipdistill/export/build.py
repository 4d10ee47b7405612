"""Write a model into one folder in every possible format, each verified against it."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from clipdistill.errors import InputError
from clipdistill.export import onnx_format, open_clip_format, transformers_format
from clipdistill.export.parity import (
    FEATURE_BOUND,
    HALF_BOUND,
    Measured,
    Probe,
    Reference,
    Runnable,
    measure,
    real_probe,
    reference_of,
    synthetic_probe,
)
from clipdistill.export.tokenizer_files import TOKENIZER_FILE, write_tokenizer
from clipdistill.export.transformers_format import ProcessorParity
from clipdistill.io.files import write_json, write_text
from clipdistill.io.machine import describe_machine
from clipdistill.models.class_embeddings import class_embeddings
from clipdistill.models.prompts import CLASSNAMES_FILE, TEMPLATE_FILES, PromptSet
from clipdistill.models.towers import Tower

log = logging.getLogger(__name__)

FORMATS = ("open_clip", "transformers", "onnx")
PARITY_FILE = "parity.json"

MOST_TEXTS = 64
"""Class texts at most that the text towers are compared on; the classifier has all classes."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """The formats of an export, and their measurements.

    Attributes:
        formats: those that the folder holds.
        left_out: format -> reason why it was not written.
        no_tokenizer: reason why only open_clip tokenizes for the model; None: ``tokenizer.json`` gives its ids.
        notes: further limitations, for users of the folder.
        measured: each artefact compared with the model.
        probe: description of the images' source.
        images: number of images compared.
        texts: number of texts compared.
        classes: number of classes for top-1.
        processor: transformers' pixels compared with open_clip's, if that format was written.
        machine: where the times were measured.
        versions: of the libraries used.
    """

    formats: tuple[str, ...]
    left_out: dict[str, str]
    no_tokenizer: str | None
    notes: tuple[str, ...]
    measured: tuple[Measured, ...]
    probe: str
    images: int
    texts: int
    classes: int
    processor: ProcessorParity | None
    machine: str
    versions: dict[str, str]

    def lines(self) -> Iterator[str]:
        """Summary for the terminal: one line per artefact, and one per format that was not written."""
        for each in self.measured:
            times = ", ".join(f"{part} {value:.2f} ms" for part, value in each.milliseconds.items())
            allowed = f"allowed {each.bound:.0e}" if each.bound is not None else "measured only"
            yield (
                f"{each.name}: {each.megabytes:.1f} MB, differs by {each.difference:.1e} ({allowed}), "
                f"top-1 agreement {each.agreement:.1%}, {times}"
            )
        yield f"on {self.probe}, {self.texts} texts, {self.classes} classes"
        for name, reason in self.left_out.items():
            yield f"not written: {name}: {reason}"
        yield from self.notes


def write_formats(
    tower: Tower,
    folder: Path,
    *,
    formats: Sequence[str] = (),
    prompts: PromptSet | None = None,
    data: str | Path | None = None,
    split: str = "test",
    images: int = 64,
    half: bool = False,
    int8: bool = False,
    bound: float | None = None,
    cache: Path | None = None,
) -> Exported:
    """Write a model into a folder in every possible format, read each back, and compare it with the model.

    Args:
        tower: the model, on the CPU; left in eval mode.
        folder: an existing, empty folder.
        formats: of `FORMATS`, all required; empty: all possible ones, and `Exported.left_out` has why not others.
        prompts: classes of the ONNX classifier, and those among which top-1 is compared.
        data: a data set in CLIP_benchmark's layout that provides the images; None: synthetic ones.
        split: of the data set.
        images: number of images to compare.
        half: float16 weights in every file.
        int8: also write quantised ONNX files.
        bound: largest difference of unit-norm features; None: 1e-4, or 1e-2 with ``half``.
        cache: folder for the class features.

    Raises:
        InputError: an unknown format, a required one that is impossible, or features that are not finite.
        ParityError: an artefact differs from the model by more than the bound.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise InputError(f"--formats {unknown[0]}: unknown; allowed: {', '.join(FORMATS)}")
    left_out = _impossible(tower)
    for name in formats:
        if name in left_out:
            raise InputError(f"--formats {name}: {left_out[name]}; allowed here: {_possible(left_out)}")
    wanted = [name for name in FORMATS if name not in left_out and (not formats or name in formats)]
    dtype = torch.float16 if half else torch.float32
    bound = bound if bound is not None else (HALF_BOUND if half else FEATURE_BOUND)

    tower.eval()
    class_texts = prompts.texts_of(0)[:MOST_TEXTS] if prompts else ()
    if data is None:
        probe = synthetic_probe(tower, count=images, prompts=class_texts)
    else:
        probe = real_probe(tower, data, split=split, count=images, prompts=class_texts)
    bank_CD = class_embeddings(tower, prompts, cache=cache) if prompts else None
    reference = reference_of(tower, probe, bank_CD=bank_CD)

    no_tokenizer = write_tokenizer(tower, folder, probe.texts)
    if no_tokenizer and "transformers" in wanted:
        if "transformers" in formats:
            raise InputError(f"--formats transformers: {no_tokenizer}; allowed here: open_clip, onnx")
        left_out["transformers"] = no_tokenizer
        wanted.remove("transformers")

    measured: list[Measured] = []
    processor = None
    if "open_clip" in wanted:
        open_clip_format.write_open_clip(tower, folder, dtype=dtype)
        runnable = open_clip_format.load_open_clip(folder)
        measured.append(_measured(runnable, probe, reference, folder, bound))
    if "transformers" in wanted:
        transformers_format.write_transformers(tower, folder, dtype=dtype)
        runnable = transformers_format.load_transformers(folder)
        measured.append(_measured(runnable, probe, reference, folder, bound))
        processor = transformers_format.compare_processor(folder, tower, probe, reference)
    if "onnx" in wanted:
        try:
            paths = onnx_format.write_onnx(tower, folder, prompts=prompts, bank_CD=bank_CD, half=half, int8=int8)
        except InputError as error:
            if "onnx" in formats:
                raise InputError(
                    f"--formats onnx: {error}; allowed here: {_possible(left_out | {'onnx': ''})}"
                ) from error
            left_out["onnx"] = str(error)
            wanted.remove("onnx")
            paths = []
        tokenizer_file = None if no_tokenizer else folder / TOKENIZER_FILE
        for path in paths:
            runnable = onnx_format.load_onnx(path, tower, tokenizer_file=tokenizer_file)
            measured.append(_measured(runnable, probe, reference, folder, bound))
        if paths and prompts is not None:
            write_text(folder / CLASSNAMES_FILE, "\n".join(prompts.classnames) + "\n")
            write_text(folder / TEMPLATE_FILES[0], "\n".join(prompts.templates) + "\n")
    exported = Exported(
        formats=tuple(wanted),
        left_out=left_out if not formats else {},
        no_tokenizer=no_tokenizer,
        notes=_notes(tower, no_tokenizer, prompts, wanted),
        measured=tuple(measured),
        probe=probe.source,
        images=len(probe.images),
        texts=len(probe.texts),
        classes=len(reference.bank_CD),
        processor=processor,
        machine=describe_machine(),
        versions=_versions(wanted),
    )
    write_json(folder / PARITY_FILE, asdict(exported))
    return exported


def _measured(runnable: Runnable, probe: Probe, reference: Reference, folder: Path, bound: float) -> Measured:
    result = measure(runnable, probe, reference, files=[folder / runnable.name], bound=bound)
    log.info("%s: differs by %.1e", result.name, result.difference)
    return result


def _impossible(tower: Tower) -> dict[str, str]:
    left_out = {}
    reasons = transformers_format.unmapped(tower)
    if reasons:
        left_out["transformers"] = f"CLIPModel has no place for: {'; '.join(reasons)}"
    try:
        onnx_format.require_onnx()
    except InputError as error:
        left_out["onnx"] = str(error)
    return left_out


def _possible(left_out: dict[str, str]) -> str:
    return ", ".join(name for name in FORMATS if name not in left_out)


def _notes(tower: Tower, no_tokenizer: str | None, prompts: PromptSet | None, wanted: Sequence[str]) -> tuple[str, ...]:
    notes = []
    if no_tokenizer:
        notes.append(f"Only open_clip tokenizes for this model ({no_tokenizer}).")
    if "onnx" in wanted and prompts is None:
        notes.append("There is no classifier.onnx: no prompt set was chosen.")
    if tower.logit_bias() is not None and "onnx" in wanted and prompts is not None:
        notes.append("The model was trained with a sigmoid; the classifier gives a softmax over its classes.")
    return tuple(notes)


def _versions(wanted: Sequence[str]) -> dict[str, str]:
    packages = {
        "open_clip": ("torch", "open_clip_torch"),
        "transformers": ("torch", "transformers"),
        "onnx": ("torch", "onnx", "onnxruntime"),
    }
    return {package: version(package) for name in wanted for package in packages[name]}
