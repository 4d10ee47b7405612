"""Open icon fonts as image-text pairs, with one family held out: the data set of the quickstart.

    fonts of qtawesome ─ read_glyphs ─> Glyph(family, name) ─┬─ .concept ─────> caption, class
                                                             ├─ render_glyph ─> picture
                                                             └─ split_of ─────> train/ | val/ | test/

The registry package ``qtawesome`` carries icon fonts whose glyphs have names of words, given by their
designers. Its files are read from disk; neither the package nor Qt is imported. Licences of the fonts: Font
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
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from clipdistill.errors import InputError
from clipdistill.io.files import new_folder, write_json
from clipdistill.models.prompts import load_prompts
from clipdistill.shards.writing import Sample, write_classification_folder, write_shards


@dataclass(frozen=True, kw_only=True)
class Family:
    """One font file."""

    font: str
    """How its files begin in qtawesome's ``fonts`` folder."""
    group: str
    """Families of one group are weights or versions of the same drawings."""
    style_suffixes: tuple[str, ...] = ()
    """Last words of a name that tell the style of the drawing, not what it shows."""
    counts_for_classes: bool = True
    """Whether a concept that this font has counts as shared by it."""


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
"""The fonts in use, by qtawesome's prefixes. Left out are ``fa5b`` and ``mdi5``: ``fa6b`` and ``mdi6``, newer
releases of the same fonts, hold nearly all of their glyphs, mostly unchanged."""

HELD_OUT = "ri"
"""Remix Icon: the zero-shot test. No training or validation sample comes from it."""

SHARED_WITH = 2
"""A concept of the held-out family is a class when at least this many of the other fonts have it."""

VALIDATION_SHARE = 0.2
"""Share of the (group, concept) pairs of the classes that is kept for validation."""

FORMAT = 1
"""Goes up when the same settings come to give other files, so that older folders are not reused."""


@dataclass(frozen=True, kw_only=True)
class Glyph:
    """One character of one font."""

    family: str
    name: str
    """Words joined by hyphens, such as ``arrow-down-circle-fill``."""
    character: str

    @property
    def key(self) -> str:
        """Key of its sample, unique over all families."""
        return f"{self.family}-{self.name}"

    @property
    def concept(self) -> str:
        """What it shows: "arrow down circle", its name without the style suffixes and numbers at the end.

        Suffixes are a family's own: "light" is a weight in ``ph``, and part of "traffic light" in ``fa6s``.
        """
        endings = "|".join((r"\d+", *FAMILIES[self.family].style_suffixes))
        return re.sub(rf"(-({endings}))+$", "", self.name).replace("-", " ")


@dataclass(frozen=True, kw_only=True)
class IconsSummary:
    """What a rendered folder holds; saved in it as ``icons.json``."""

    format: int
    qtawesome: str
    """Version of the package that the fonts came from."""
    size: int
    """Width and height of a picture, in pixels."""
    classes: int
    samples: dict[str, int]
    """Number of samples of each split."""
    families: dict[str, dict[str, int]]
    """The same, of each family in each split."""
    empty: list[str]
    """Keys of the glyphs left out because they have no ink."""


def render_icons(output: Path, *, size: int = 64, progress: Callable[[int, int], None] | None = None) -> IconsSummary:
    """Render the icon fonts into shards of pictures, captions and labels, unless ``output`` holds them.

    ============== =====================================================================================
    ``train/``     the training families: picture, caption, {family, name}, and the label if there is one
    ``val/``       CLIP_benchmark folder with split "test": about a fifth of their drawings with a label
    ``test/``      CLIP_benchmark folder with split "test": the held-out family's drawings with a label
    ``icons.json`` the summary
    ============== =====================================================================================

    A picture is a PNG of ``size`` x ``size`` grey pixels, white on black; a caption is a glyph's concept; a
    label is an index into ``prompts/icons/classnames.txt``. The order within a split is a fixed shuffle.
    ``progress`` is called with the number of glyphs done and their total.

    Validation takes whole (group, concept) pairs, so that no other weight or version of its drawings is
    trained on; a training picture that equals one of validation (an alias) is dropped. The held-out family's
    glyphs that belong to no class are in no split.

    Raises:
        InputError: ``size`` is out of range; qtawesome is missing, or its fonts give other classes than those
            shipped; ``output`` holds anything but icons of the same settings.
    """
    if not 32 <= size <= 512:
        raise InputError(f"size: {size} is not a number of pixels from 32 to 512")
    fonts, version = find_fonts()
    if output.exists():
        return _reuse(output, format=FORMAT, qtawesome=version, size=size)

    glyphs = sorted(read_glyphs(fonts), key=lambda glyph: _hash(glyph.key))
    classnames = find_classes(glyphs)
    prompts = load_prompts("icons")
    if tuple(classnames) != prompts.classnames:
        raise InputError(f"qtawesome {version}: its fonts give other classes than prompts/icons; use qtawesome 1.4")
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

    summary = IconsSummary(
        format=FORMAT,
        qtawesome=version,
        size=size,
        classes=len(classnames),
        samples={split: len(group) for split, group in samples.items()},
        families={split: _count_families(group) for split, group in samples.items()},
        empty=sorted(empty),
    )
    with new_folder(output) as partial:
        write_shards(samples["train"], partial / "train", samples_per_shard=2000)
        for split in ("val", "test"):
            write_classification_folder(
                samples[split],
                partial / split,
                split="test",
                classnames=prompts.classnames,
                templates=prompts.templates,
            )
        write_json(partial / "icons.json", asdict(summary))
    return summary


def find_fonts() -> tuple[Path, str]:
    """qtawesome's folder of fonts, and its version.

    Raises:
        InputError: it is not installed.
    """
    spec = importlib.util.find_spec("qtawesome")
    if spec is None or spec.origin is None:
        raise InputError("qtawesome, whose fonts the icons are, is not installed: pip install 'clipdistill[demo]'")
    return Path(spec.origin).parent / "fonts", importlib.metadata.version("qtawesome")


def read_glyphs(fonts: Path) -> list[Glyph]:
    """Every glyph of the fonts in use, from the ``*-charmap-*.json`` beside each font."""
    glyphs = []
    for family in FAMILIES:
        codes = json.loads(_find_file(fonts, family, ".json").read_text(encoding="utf-8"))
        glyphs += [Glyph(family=family, name=name, character=chr(int(code, 16))) for name, code in codes.items()]
    return glyphs


def find_classes(glyphs: Iterable[Glyph]) -> list[str]:
    """The concepts that the held-out family shares with at least two of the other fonts, in alphabetical
    order."""
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

    Validation is drawn by a hash of (group, concept): the same everywhere, whatever else the fonts hold.
    """
    if glyph.family == HELD_OUT:
        return "test" if labelled else None
    pair = f"{FAMILIES[glyph.family].group}/{glyph.concept}"
    return "val" if labelled and _hash(pair) < VALIDATION_SHARE else "train"


def render_glyph(font: ImageFont.FreeTypeFont, character: str, *, size: int) -> Image.Image | None:
    """Draw a character white on black, in the middle, its longer side 7/8 of ``size`` pixels; None if it has
    no ink."""
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
        raise InputError(
            f"{fonts / pattern}: {len(files)} files match instead of one; qtawesome 1.4 has what is needed"
        )
    return files[0]


def _reuse(output: Path, **settings: object) -> IconsSummary:
    """The summary of a folder rendered before, if its settings are these."""
    file = output / "icons.json"
    if not file.is_file():
        raise InputError(f"{output}: exists and holds no icons.json; name a new folder")
    found = json.loads(file.read_text(encoding="utf-8"))
    for name, value in settings.items():
        if found.get(name) != value:
            raise InputError(f"{output}: holds icons of {name} {found.get(name)}, not {value}; name another folder")
    return IconsSummary(**found)


def _count_families(samples: Iterable[Sample]) -> dict[str, int]:
    counts = Counter(sample.metadata["family"] for sample in samples if sample.metadata)
    return {family: counts[family] for family in FAMILIES if counts[family]}


def _hash(text: str) -> float:
    """A number from 0 to 1 that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6]) / 2**48
