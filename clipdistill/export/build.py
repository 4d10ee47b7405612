"""One folder in every format that a model has, each proved equal to it: what ``clipdistill export`` writes."""

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
from clipdistill.models.class_embeddings import prompt_bank
from clipdistill.models.prompts import CLASSNAMES_FILE, TEMPLATE_FILES, PromptSet
from clipdistill.models.towers import Tower

log = logging.getLogger(__name__)

FORMATS = ("open_clip", "transformers", "onnx")
PARITY_FILE = "parity.json"

MOST_TEXTS = 64
"""Class texts that each text tower is asked for; the classifier has them all."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written and measured.

    Attributes:
        formats: those that the folder holds.
        left_out: format -> why the folder does not hold it, in words.
        no_tokenizer: why only open_clip tokenizes for the model, in words; None: ``tokenizer.json`` gives its ids.
        notes: what a user of the folder must know besides.
        measured: each artefact against the model.
        probe: where the images came from, in words.
        images: how many.
        texts: how many.
        classes: among how many top-1 was taken.
        processor: transformers' pixels against open_clip's, where that format was written.
        machine: where the times were taken.
        versions: of the libraries that ran.
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
        """What a terminal is told: a line an artefact, and a line for what is missing."""
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
    """Write a model into a folder in every format it has, read each back, and compare it with the model.

    Args:
        tower: the model, on the CPU; left in eval mode.
        folder: exists, and is empty.
        formats: of `FORMATS`, all required; none: all that are possible, and `Exported.left_out` says why not others.
        prompts: folded into the ONNX classifier, and the classes among which top-1 is compared.
        data: a data set in CLIP_benchmark's layout whose images are used; None: synthetic pictures.
        split: of the data set.
        images: how many.
        half: float16 weights in every file.
        int8: quantised ONNX files besides.
        bound: largest difference of unit-norm features; None: 1e-4, or 1e-2 with ``half``.
        cache: folder for the class features.

    Raises:
        InputError: an unknown format, or one that is required and impossible; features that are not finite.
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
    bank_CD = prompt_bank(tower, prompts, cache=cache) if prompts else None
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
