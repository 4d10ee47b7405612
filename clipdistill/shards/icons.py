"""Open icon fonts as image-text pairs, with one family held out: the data set of the quickstart.

    fonts of qtawesome ─ read_glyphs ─> Glyph(family, name) ─┬─ .concept ─────> caption, class
                                                             ├─ render_glyph ─> picture
                                                             └─ split_of ─────> train/ | val/ | test/

The package ``qtawesome`` ships icon fonts whose designers named the glyphs in words. Its files are read from
disk; neither the package nor Qt is imported. Licences of the fonts: Font
Awesome Free and Elusive Icons, SIL OFL 1.1; Material Design Icons and Remix Icon, Apache 2.0; Phosphor, MIT;
Codicons, CC BY 4.0.
"""

import hashlib
import importlib.metadata
import importlib.util
import io
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from clipdistill.errors import InputError
from clipdistill.io.files import check_new, new_folder, write_json
from clipdistill.io.manifest import find_change, fingerprints
from clipdistill.models.prompts import load_prompts
from clipdistill.shards.writing import Sample, write_classification_folder, write_shards


@dataclass(frozen=True, kw_only=True)
class Family:
    """One font file."""

    font: str
    """Prefix of its files in qtawesome's ``fonts`` folder."""
    group: str
    """Families of one group are weights or versions of the same drawings."""
    style_suffixes: tuple[str, ...] = ()
    """Trailing words of a name that describe the style of the drawing, not its concept."""
    counts_for_classes: bool = True
    """Whether this font counts for `SHARED_WITH`."""


FAMILIES = {
    "fa5s": Family(font="fontawesome5-solid", group="fa", style_suffixes=("alt",)),
    "fa5r": Family(font="fontawesome5-regular", group="fa", style_suffixes=("alt",), counts_for_classes=False),
    "fa6s": Family(font="fontawesome6-solid", group="fa", style_suffixes=("alt",)),
    "fa6r": Family(font="fontawesome6-regular", group="fa", style_suffixes=("alt",)),
    "fa6b": Family(font="fontawesome6-brands", group="fa", counts_for_classes=False),
    "mdi6": Family(font="materialdesignicons6", group="mdi", style_suffixes=("outline", "variant")),
    "ph": Family(font="phosphor", group="ph", style_suffixes=("bold", "fill", "light", "thin", "duotone")),
    "msc": Family(font="codicon", group="msc"),
    "ei": Family(font="elusiveicons", group="ei", style_suffixes=("alt",)),
    "ri": Family(font="remixicon", group="ri", style_suffixes=("line", "fill")),
}
"""The fonts in use, by qtawesome's prefixes. ``fa5b`` and ``mdi5`` are left out: ``fa6b`` and ``mdi6``, newer
releases of the same fonts, contain nearly all of their glyphs."""

HELD_OUT = "ri"
"""Remix Icon: the zero-shot test. No training or validation sample comes from it."""

SHARED_WITH = 2
"""A concept of the held-out family is a class when at least this many of the other fonts have it."""

MAX_IMBALANCE = 1000

VALIDATION_SHARE = 0.2
"""Share of the (group, concept) pairs of the classes that goes to validation."""

FORMAT = 3
"""Version of the rendered files; increased when the same settings give other files, so that older folders are not
reused."""


@dataclass(frozen=True, kw_only=True)
class Glyph:
    """One character of one font."""

    family: str
    name: str
    """Words joined by hyphens, such as ``arrow-down-circle-fill``."""
    character: str

    @property
    def key(self) -> str:
        """Key of its sample, unique across families."""
        return f"{self.family}-{self.name}"

    @property
    def concept(self) -> str:
        """What it shows, such as "arrow down circle": its name without trailing style suffixes and numbers.

        Suffixes depend on the family: "light" is a weight in ``ph``, but part of "traffic light" in ``fa6s``.
        """
        endings = "|".join((r"\d+", *FAMILIES[self.family].style_suffixes))
        return re.sub(rf"(-({endings}))+$", "", self.name).replace("-", " ")


@dataclass(frozen=True, kw_only=True)
class IconsSummary:
    """Content of a rendered folder; saved in it as ``icons.json``."""

    format: int
    qtawesome: str
    """Version of the package with the fonts."""
    size: int
    """Width and height of a picture, in pixels."""
    imbalance: int | None
    """Training pictures of the most frequent class, where the rarest has one; None: all drawings once."""
    seed: int | None
    """Seed of the choice of the long-tailed set's drawings; None: all drawings once."""
    classes: int
    samples: dict[str, int]
    """Number of samples of each split."""
    families: dict[str, dict[str, int]]
    """Number of samples of each family in each split."""
    empty: list[str]
    """Keys of glyphs without ink, which are left out."""
    files: dict[str, dict[str, Any]]
    """Size and sha256 of every other file, by its path."""


def render_icons(
    output: Path,
    *,
    size: int = 64,
    imbalance: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> IconsSummary:
    """Render the icon fonts into shards of images, captions and labels; an ``output`` with the same settings is reused.

    ============== =====================================================================================
    ``train/``     the training families: image, caption, {family, name}, and the label if there is one
    ``val/``       CLIP_benchmark folder with split "test": about a fifth of their labelled drawings
    ``test/``      CLIP_benchmark folder with split "test": the held-out family's labelled drawings
    ``icons.json`` the summary
    ============== =====================================================================================

    An image is a grey PNG of ``size`` x ``size`` pixels, white on black; a caption is a glyph's concept; a label
    is an index into ``prompts/icons/classnames.txt``. The order within a split is a fixed shuffle. ``progress``
    is called with the number of glyphs done and their total.

    Validation takes whole (group, concept) pairs, so that other weights or versions of its drawings are not
    trained on; training images identical to a validation image (aliases) are dropped. Glyphs of the held-out
    family without a class are in no split.

    With an ``imbalance``, ``train/`` is a long-tailed set of the labelled drawings: see `long_tailed`.

    Raises:
        InputError: ``size`` or ``imbalance`` is out of range; qtawesome is missing, or its fonts give other classes
            than those shipped; ``output`` contains anything but icons of the same settings.
    """
    if not 32 <= size <= 512:
        raise InputError(f"size: {size}; allowed: 32 to 512 pixels")
    fonts, version = find_fonts()
    tail: dict[str, Any] = {"imbalance": imbalance, "seed": None if imbalance is None else seed}
    if imbalance is not None and not 2 <= imbalance <= MAX_IMBALANCE:
        raise InputError(f"imbalance: {imbalance}; allowed: 2 to {MAX_IMBALANCE}")
    if output.exists():
        return _reuse(output, format=FORMAT, qtawesome=version, size=size, **tail)

    check_new(output)
    glyphs = sorted(read_glyphs(fonts), key=lambda glyph: _hash(glyph.key))
    classnames = find_classes(glyphs)
    prompts = load_prompts("icons")
    if tuple(classnames) != prompts.classnames:
        raise InputError(f"qtawesome {version}: its fonts differ from the classes of prompts/icons; allowed: 1.4")
    labels = {name: label for label, name in enumerate(classnames)}
    freetype = {
        family: ImageFont.truetype(_find_file(fonts, family, ".ttf"), max(128, 2 * size)) for family in FAMILIES
    }

    samples: dict[str, list[Sample]] = {"train": [], "val": [], "test": []}
    empty = []
    for done, glyph in enumerate(glyphs, 1):
        label = labels.get(glyph.concept)
        if split := split_of(glyph, labelled=label is not None):
            picture = render_glyph(freetype[glyph.family], glyph.character, size=size)
            if picture is None:
                empty.append(glyph.key)
            else:
                samples[split].append(_to_sample(glyph, picture, label=label))
        if progress:
            progress(done, len(glyphs))
    validation_images = {sample.image for sample in samples["val"]}
    samples["train"] = [sample for sample in samples["train"] if sample.image not in validation_images]
    if imbalance is not None:
        samples["train"] = long_tailed(samples["train"], imbalance=imbalance, seed=seed)

    counts: dict[str, Any] = {
        "format": FORMAT,
        "qtawesome": version,
        "size": size,
        **tail,
        "classes": len(classnames),
        "samples": {split: len(group) for split, group in samples.items()},
        "families": {split: _count_families(group) for split, group in samples.items()},
        "empty": sorted(empty),
    }
    with new_folder(output) as folder:
        write_shards(samples["train"], folder / "train", samples_per_shard=2000, classnames=prompts.classnames)
        for split in ("val", "test"):
            write_classification_folder(
                samples[split],
                folder / split,
                split="test",
                classnames=prompts.classnames,
                templates=prompts.templates,
            )
        summary = IconsSummary(**counts, files=fingerprints(folder))
        write_json(folder / "icons.json", asdict(summary))
    return summary


def long_tailed(samples: Iterable[Sample], *, imbalance: int, seed: int) -> list[Sample]:
    """A long-tailed set: the class of rank r of C has ``imbalance^(1 - r / (C - 1))`` pictures, rounded.

    The counts fall exponentially from ``imbalance`` to 1, as in the long-tailed CIFAR of Cui et al. 2019
    (Class-balanced loss based on effective number of samples, arXiv 1901.05555). Classes are ranked by their number of
    drawings, the frequent ones first, as designers drew them; the seed ranks equal ones and orders the drawings of a
    class. A class with fewer drawings than pictures repeats them in turn.

    Args:
        samples: those without a label are left out.
        imbalance: pictures of the first class.
        seed: of the order of equal classes, of the drawings, and of the result.
    """
    of_class: defaultdict[int, list[Sample]] = defaultdict(list)
    for sample in sorted(samples, key=lambda sample: _hash(f"{seed}/{sample.key}")):
        if sample.label is not None:
            of_class[sample.label].append(sample)
    ranked = sorted(of_class, key=lambda label: (-len(of_class[label]), _hash(f"{seed}/{label}")))
    chosen = []
    for rank, label in enumerate(ranked):
        drawings = of_class[label]
        for number in range(round(imbalance ** (1 - rank / max(1, len(ranked) - 1)))):
            turn, drawing = divmod(number, len(drawings))
            key = drawings[drawing].key + (f"+{turn}" if turn else "")
            chosen.append(replace(drawings[drawing], key=key))
    return sorted(chosen, key=lambda sample: _hash(f"{seed}/{sample.key}"))


def find_fonts() -> tuple[Path, str]:
    """Locate qtawesome's font folder; returns it and the package's version.

    Raises:
        InputError: it is not installed.
    """
    spec = importlib.util.find_spec("qtawesome")
    if spec is None or spec.origin is None:
        raise InputError("qtawesome, with the icon fonts, is not installed; allowed: pip install 'clipdistill[demo]'")
    return Path(spec.origin).parent / "fonts", importlib.metadata.version("qtawesome")


def read_glyphs(fonts: Path) -> list[Glyph]:
    """All glyphs of the fonts in use, from the ``*-charmap-*.json`` beside each font."""
    glyphs = []
    for family in FAMILIES:
        codes = json.loads(_find_file(fonts, family, ".json").read_text(encoding="utf-8"))
        glyphs += [Glyph(family=family, name=name, character=chr(int(code, 16))) for name, code in codes.items()]
    return glyphs


def find_classes(glyphs: Iterable[Glyph]) -> list[str]:
    """The concepts that the held-out family shares with at least `SHARED_WITH` other fonts, sorted."""
    families: defaultdict[str, set[str]] = defaultdict(set)
    for glyph in glyphs:
        if FAMILIES[glyph.family].counts_for_classes:
            families[glyph.concept].add(glyph.family)
    return sorted(
        concept
        for concept, having in families.items()
        if HELD_OUT in having and len(having - {HELD_OUT}) >= SHARED_WITH
    )


def split_of(glyph: Glyph, *, labelled: bool) -> str | None:
    """``train``, ``val`` or ``test``; None for a glyph of the held-out family without a label.

    Validation is selected by a hash of (group, concept), independent of all other glyphs.
    """
    if glyph.family == HELD_OUT:
        return "test" if labelled else None
    pair = f"{FAMILIES[glyph.family].group}/{glyph.concept}"
    return "val" if labelled and _hash(pair) < VALIDATION_SHARE else "train"


def render_glyph(font: ImageFont.FreeTypeFont, character: str, *, size: int) -> Image.Image | None:
    """Draw a character white on black, centred, its longer side 7/8 of ``size`` pixels; None if it has no ink."""
    left, top, right, bottom = font.getbbox(character)
    canvas = Image.new("L", (math.ceil(right - left), math.ceil(bottom - top)))
    ImageDraw.Draw(canvas).text((-left, -top), character, fill=255, font=font)
    ink = canvas.getbbox()
    if ink is None:
        return None
    drawing = canvas.crop(ink)
    margin = size // 16
    inner = size - 2 * margin
    if max(drawing.size) < inner:
        larger = font.font_variant(size=2 * font.size * inner / max(drawing.size))
        return render_glyph(larger, character, size=size)
    fitted = ImageOps.pad(drawing, (inner, inner), method=Image.Resampling.LANCZOS)
    return ImageOps.expand(fitted, margin)


def _to_sample(glyph: Glyph, picture: Image.Image, *, label: int | None) -> Sample:
    encoded = io.BytesIO()
    picture.save(encoded, format="PNG", compress_level=1)
    return Sample(
        key=glyph.key,
        image=encoded.getvalue(),
        image_extension="png",
        caption=glyph.concept,
        label=label,
        metadata={"family": glyph.family, "name": glyph.name},
    )


def _find_file(fonts: Path, family: str, extension: str) -> Path:
    pattern = f"{FAMILIES[family].font}*{extension}"
    files = sorted(fonts.glob(pattern))
    if len(files) != 1:
        raise InputError(f"{fonts / pattern}: {len(files)} files match; allowed: one, as in qtawesome 1.4")
    return files[0]


def _reuse(output: Path, **settings: object) -> IconsSummary:
    """The summary of an existing folder, if it was rendered with these settings and is as it was written."""
    file = output / "icons.json"
    if not file.is_file():
        raise InputError(f"{output}: exists and holds no icons.json; allowed: a new folder")
    found = json.loads(file.read_text(encoding="utf-8"))
    for name, value in settings.items():
        if found.get(name) != value:
            raise InputError(f"{output}: holds icons of {name} {found.get(name)}; allowed: {value}, or a new folder")
    change = find_change(output, found["files"])
    if change is not None:
        raise InputError(f"{output}: {change}; allowed: the folder as it was written, or a new one")
    return IconsSummary(**found)


def _count_families(samples: Iterable[Sample]) -> dict[str, int]:
    counts = Counter(sample.metadata["family"] for sample in samples if sample.metadata)
    return {family: counts[family] for family in FAMILIES if counts[family]}


def _hash(text: str) -> float:
    """Hash of a text as a number in [0, 1)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6]) / 2**48
