"""Further icon fonts as test sets for the icons teacher and its students; none of their drawings was trained on.

    pip install -e '.[evidence]'
    npm install --ignore-scripts @tabler/icons-webfont@3.49.0 line-awesome@1.3.0 @coreui/icons@3.1.0 primeicons@8.0.2
    clipdistill shards icons --output data/icons
    python scripts/render_unseen_icons.py --icons data/icons --output data/unseen

Writes two folders in CLIP_benchmark's layout, over the 240 classes of ``prompts/icons``: ``fonts-val``, by which
settings are chosen, and ``fonts-test``. Each has font families of its own, so that a choice tells nothing about the
drawings of the test. Left out and counted: a drawing whose pixels correlate by more than 0.98 with one of the icons'
training, validation or test split, or with an earlier drawing here (fonts borrow from each other).
"""

import argparse
import importlib.metadata
import importlib.util
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import webdataset
from fontTools.ttLib import TTFont
from numpy.typing import NDArray
from PIL import Image, ImageFont

from clipdistill.errors import InputError
from clipdistill.io.files import new_folder, write_json
from clipdistill.models.prompts import load_prompts
from clipdistill.shards.icons import render_glyph
from clipdistill.shards.writing import Sample, write_classification_folder

SIZE = 64
ALIKE = 0.98


@dataclass(frozen=True, kw_only=True)
class Family:
    """One font."""

    split: str
    package: str
    """Python package that ships it, or ``node_modules/PACKAGE``."""
    font: str
    codes: str
    """File with the names of its glyphs: JSON of code points, or CSS."""
    prefix: str = ""
    """Regular expression of what comes before the concept in a name."""
    suffix: str = ""
    """The same of what comes after it: styles and sizes."""


_NUMBER = r"(-\d+)?"
FAMILIES = {
    "bs": Family(
        split="fonts-val",
        package="ttkbootstrap_icons_bs",
        font="assets/bootstrap.ttf",
        codes="assets/glyphmap.json",
        suffix=f"(-fill)?{_NUMBER}",
    ),
    "ion": Family(
        split="fonts-val",
        package="ttkbootstrap_icons_ion",
        font="fonts/ionicons.ttf",
        codes="glyphmap.json",
        prefix="(ion-)?((ios|md|logo)-)?",
        suffix=f"(-(outline|sharp|strong))*{_NUMBER}",
    ),
    "lucide": Family(
        split="fonts-test",
        package="ttkbootstrap_icons_lucide",
        font="fonts/lucide.ttf",
        codes="glyphmap.json",
        prefix="(icon-)?",
        suffix=_NUMBER,
    ),
    "eva": Family(
        split="fonts-test",
        package="ttkbootstrap_icons_eva",
        font="fonts/eva-icons.ttf",
        codes="glyphmap.json",
        prefix="(eva-)?",
        suffix=f"(-outline)?{_NUMBER}",
    ),
    "fluent-filled": Family(
        split="fonts-test",
        package="ttkbootstrap_icons_fluent",
        font="fonts/FluentSystemIcons-Filled.ttf",
        codes="glyphmap-filled.json",
        prefix="ic-fluent-",
        suffix=r"-\d+-filled",
    ),
    "fluent-regular": Family(
        split="fonts-test",
        package="ttkbootstrap_icons_fluent",
        font="fonts/FluentSystemIcons-Regular.ttf",
        codes="glyphmap-regular.json",
        prefix="ic-fluent-",
        suffix=r"-\d+-regular",
    ),
    "typicons": Family(
        split="fonts-test",
        package="ttkbootstrap_icons_typicons",
        font="fonts/typicons.ttf",
        codes="glyphmap.json",
        prefix="(typcn-)?",
        suffix=f"(-outline)?{_NUMBER}",
    ),
    "boxicons": Family(
        split="fonts-test",
        package="iconipy",
        font="assets/boxicons/boxicons.ttf",
        codes="assets/boxicons/boxicons.css",
        prefix="bx[sl]?-",
        suffix=_NUMBER,
    ),
    "lineicons": Family(
        split="fonts-test",
        package="iconipy",
        font="assets/lineicons/lineicons.ttf",
        codes="assets/lineicons/unicodesMap.json",
        prefix="lni-",
        suffix=_NUMBER,
    ),
    "line-awesome": Family(
        split="fonts-val",
        package="node_modules/line-awesome",
        font="dist/line-awesome/fonts/la-solid-900.ttf",
        codes="dist/line-awesome/css/line-awesome.css",
        prefix="la-",
        suffix=f"(-alt)?{_NUMBER}",
    ),
    "coreui": Family(
        split="fonts-val",
        package="node_modules/@coreui/icons",
        font="fonts/CoreUI-Icons-Free.ttf",
        codes="css/free.css",
        prefix="cil-",
        suffix=_NUMBER,
    ),
    "tabler": Family(
        split="fonts-test",
        package="node_modules/@tabler/icons-webfont",
        font="dist/fonts/tabler-icons.ttf",
        codes="dist/tabler-icons.css",
        prefix="ti-",
        suffix=_NUMBER,
    ),
    "tabler-filled": Family(
        split="fonts-test",
        package="node_modules/@tabler/icons-webfont",
        font="dist/fonts/tabler-icons-filled.ttf",
        codes="dist/tabler-icons-filled.css",
        prefix="ti-",
        suffix=f"(-filled)?{_NUMBER}",
    ),
    "primeicons": Family(
        split="fonts-test",
        package="node_modules/primeicons",
        font="fonts/primeicons.ttf",
        codes="primeicons.css",
        prefix="pi-",
        suffix=f"(-fill)?{_NUMBER}",
    ),
}


def main() -> None:
    """Render both splits, and say what they hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--icons", type=Path, default=Path("data/icons"), help="folder of `clipdistill shards icons`")
    parser.add_argument("--output", type=Path, default=Path("data/unseen"))
    args = parser.parse_args()

    prompts = load_prompts("icons")
    labels = {name: label for label, name in enumerate(prompts.classnames)}
    known = Seen(list(read_pictures(args.icons)))
    samples: dict[str, list[Sample]] = {"fonts-val": [], "fonts-test": []}
    counts: Counter[str] = Counter()
    alike: Counter[str] = Counter()
    for name, family in FAMILIES.items():
        for sample in render(name, family, labels):
            if known.has(sample.image):
                alike[name] += 1
            else:
                samples[family.split].append(sample)
                counts[name] += 1
    packages = {family.package: version_of(family.package) for family in FAMILIES.values()}
    with new_folder(args.output) as folder:
        for split, group in samples.items():
            write_classification_folder(
                group, folder / split, split="test", classnames=prompts.classnames, templates=prompts.templates
            )
        write_json(folder / "unseen.json", {"packages": packages, "drawings": counts, "left_out_as_alike": alike})
    for split, group in samples.items():
        families = ", ".join(
            f"{name} {counts[name]} ({alike[name]} left out)"
            for name, family in FAMILIES.items()
            if family.split == split
        )
        print(f"{split}: {len(group)} drawings of {len({sample.label for sample in group})} classes: {families}")


def render(name: str, family: Family, labels: dict[str, int]) -> Iterator[Sample]:
    """The drawings of a family that belong to a class: one of each code point, and one of each style and concept.

    Raises:
        InputError: its package is not installed.
    """
    folder = folder_of(family.package)
    font = ImageFont.truetype(folder / family.font, 2 * SIZE)
    with TTFont(folder / family.font) as tables:
        characters = {chr(code) for code in tables.getBestCmap()}
    pattern = re.compile(f"{family.prefix}(?P<concept>.+?){family.suffix}")
    done: set[str] = set()
    styles: set[str] = set()
    for glyph, code in read_codes(folder / family.codes):
        match = pattern.fullmatch(glyph)
        concept = match["concept"].replace("-", " ") if match else ""
        style = re.sub(r"\d+", "", glyph)
        if concept not in labels or code not in characters or code in done or style in styles:
            continue
        done.add(code)
        styles.add(style)
        picture = render_glyph(font, code, size=SIZE)
        if picture is None:
            continue
        encoded = io.BytesIO()
        picture.save(encoded, format="PNG", compress_level=1)
        yield Sample(
            key=f"{name}-{glyph}",
            image=encoded.getvalue(),
            image_extension="png",
            caption=concept,
            label=labels[concept],
            metadata={"family": name, "name": glyph},
        )


def folder_of(package: str) -> Path:
    """Where the files of a package are.

    Raises:
        InputError: it is not installed.
    """
    if package.startswith("node_modules/"):
        folder = Path(package)
        if not folder.is_dir():
            raise InputError(f"{package}: not a folder; allowed: what `npm install` of this script's header makes here")
        return folder
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise InputError(f"{package} is not installed; allowed: pip install 'clipdistill[evidence]'")
    return Path(spec.origin).parent


def version_of(package: str) -> str:
    """Version of an installed package."""
    if package.startswith("node_modules/"):
        version = json.loads((Path(package) / "package.json").read_text(encoding="utf-8"))["version"]
        return str(version)
    return importlib.metadata.version(package)


def read_codes(path: Path) -> list[tuple[str, str]]:
    """Names of a font's glyphs and their characters, in the order of the names."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".css":
        codes = {
            name: int(code, 16) for name, code in re.findall(r'\.([\w-]+):before\s*{\s*content:\s*"\\(\w+)"', text)
        }
    else:
        codes = {
            name: code if isinstance(code, int) else int(code, 16) for name, code in json.loads(text).items() if code
        }
    return [(name, chr(code)) for name, code in sorted(codes.items())]


def read_pictures(icons: Path) -> Iterator[bytes]:
    """The pictures of all splits of the icons."""
    for path in sorted(icons.rglob("*.tar")):
        for sample in webdataset.WebDataset(str(path), shardshuffle=False):
            yield sample["png"]


class Seen:
    """Pictures seen so far, and whether a further one looks like any of them."""

    def __init__(self, pictures: list[bytes]) -> None:
        self._pixels_ND = np.stack([self._normalised(picture) for picture in pictures])
        self._further: list[NDArray[np.float32]] = []

    def has(self, picture: bytes) -> bool:
        """Whether it correlates with one of them; if not, it is one of them from now on."""
        pixels_D = self._normalised(picture)
        if (self._pixels_ND @ pixels_D).max() > ALIKE or any(other @ pixels_D > ALIKE for other in self._further):
            return True
        self._further.append(pixels_D)
        return False

    @staticmethod
    def _normalised(picture: bytes) -> NDArray[np.float32]:
        pixels_D = np.asarray(Image.open(io.BytesIO(picture)).convert("L"), np.float32).ravel()
        pixels_D -= pixels_D.mean()
        return pixels_D / max(float(np.linalg.norm(pixels_D)), 1e-6)


if __name__ == "__main__":
    main()
