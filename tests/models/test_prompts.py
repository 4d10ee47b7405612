import importlib.util
import json
import re
from pathlib import Path

import pytest
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES
from timm.data import ImageNetInfo
from torchvision.datasets import Flowers102

from clipdistill.errors import InputError
from clipdistill.io.resources import resource
from clipdistill.models.prompts import PromptSet, load_prompts, shipped_prompt_sets

PUBLISHED_CLASS_COUNTS = {
    "caltech101": 102,
    "caltech101-vtab": 102,
    "cifar10": 10,
    "cifar100": 100,
    "country211": 211,
    "dtd": 47,
    "eurosat": 10,
    "fer2013": 7,
    "fgvc-aircraft": 100,
    "flowers102": 102,
    "food101": 101,
    "gtsrb": 43,
    "imagenet-1k": 1000,
    "mnist": 10,
    "oxford-pets": 37,
    "stl10": 10,
    "svhn": 10,
}

# A class at its index in the data set itself: in its annotation files, or its folder names in sorted order.
KNOWN_CLASSES = [
    ("caltech101", 0, "background"),
    ("caltech101", 5, "accordion"),
    ("caltech101-vtab", 0, "accordion"),
    ("caltech101-vtab", 4, "background"),
    ("cifar10", 9, "truck"),
    ("cifar100", 1, "aquarium fish"),
    ("country211", 210, "Zimbabwe"),
    ("dtd", 5, "chequered"),
    ("eurosat", 9, "lake or sea"),
    ("fer2013", 4, "neutral"),
    ("fgvc-aircraft", 33, "A380"),
    ("food101", 16, "cheese plate"),
    ("gtsrb", 14, "stop"),
    ("oxford-pets", 36, "Yorkshire Terrier"),
    ("stl10", 7, "monkey"),
    ("svhn", 0, "zero"),
]


def write_set(folder: Path, *, classnames: str | bytes | None, templates: str | bytes | None) -> Path:
    for name, content in (("classnames.txt", classnames), ("templates.txt", templates)):
        if content is not None:
            (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


@pytest.mark.parametrize("name", shipped_prompt_sets())
def test_shipped_set_loads_and_is_clean(name):
    prompts = load_prompts(name)
    assert prompts.name == name
    assert prompts.num_classes == len({c.casefold() for c in prompts.classnames}), "tokenizers fold the case"
    assert prompts.num_templates == len(set(prompts.templates))
    for classname in prompts.classnames:
        assert "_" not in classname
        assert classname == " ".join(classname.split())


def test_class_counts_are_the_published_ones():
    counts = {name: load_prompts(name).num_classes for name in PUBLISHED_CLASS_COUNTS}
    assert counts == PUBLISHED_CLASS_COUNTS


@pytest.mark.parametrize(("name", "index", "classname"), KNOWN_CLASSES)
def test_class_order(name, index, classname):
    assert load_prompts(name).classnames[index] == classname


@pytest.mark.parametrize(
    ("name", "space"),
    [("cifar100", "_"), ("food101", "_"), ("dtd", "_"), ("fgvc-aircraft", " "), ("stl10", "_")],
)
def test_sets_numbered_by_sorted_names_are_sorted(name, space):
    original_names = [classname.replace(" ", space) for classname in load_prompts(name).classnames]
    assert original_names == sorted(original_names)


def test_imagenet_names_are_open_clips_but_for_two_renamed_ones():
    ours = load_prompts("imagenet-1k").classnames
    changed = {i: pair for i, pair in enumerate(zip(IMAGENET_CLASSNAMES, ours, strict=True)) if len({*pair}) > 1}
    assert changed == {744: ("missile", "projectile"), 836: ("sunglasses", "sunglass")}


def test_renamed_imagenet_classes_bear_their_synsets_first_name():
    info, ours = ImageNetInfo(), load_prompts("imagenet-1k").classnames
    for index in (657, 744, 836, 837):
        assert ours[index] == info.index_to_description(index).split(",")[0]


def test_imagenet_templates_are_openais():
    assert load_prompts("imagenet-1k").templates == tuple(f("{c}") for f in OPENAI_IMAGENET_TEMPLATES)


def test_flowers_are_torchvisions_but_for_three_corrected_names():
    ours = load_prompts("flowers102").classnames
    changed = {i: (a, b) for i, (a, b) in enumerate(zip(Flowers102.classes, ours, strict=True)) if a != b}
    assert changed == {
        15: ("globe-flower", "globe flower"),
        59: ("pink-yellow dahlia?", "pink and yellow dahlia"),
        92: ("ball moss", "air plant"),
    }


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("caltech101", "caltech101"),
        ("caltech101-vtab", "caltech101_vtab"),
        ("country211", "country211"),
        ("eurosat", "eurosat"),
        ("fer2013", "fer2013"),
        ("flowers102", "flowers"),
        ("gtsrb", "gtsrb"),
        ("mnist", "mnist"),
        ("oxford-pets", "pets"),
        ("svhn", "svhn"),
    ],
)
def test_agrees_with_clip_benchmark(ours, theirs):
    if (benchmark := importlib.util.find_spec("clip_benchmark")) is None:
        pytest.skip("clip_benchmark is not installed")
    folder = Path(benchmark.origin).parent / "datasets"
    classnames = json.loads((folder / "en_classnames.json").read_text())[theirs]
    templates = json.loads((folder / "en_zeroshot_classification_templates.json").read_text())
    prompts = load_prompts(ours)
    assert prompts.classnames == tuple(name.replace("  ", " ") for name in classnames)
    assert prompts.templates == tuple(templates[theirs.removesuffix("_vtab")])


def test_readme_table_is_true():
    readme = resource("prompts", "README.md").read_text()
    table = dict(re.findall(r"^\| `([\w-]+)` \| (\d[\d,]* \| \d+) \|", readme, flags=re.MULTILINE))
    sets = {name: load_prompts(name) for name in shipped_prompt_sets()}
    assert table == {name: f"{p.num_classes:,} | {p.num_templates}" for name, p in sets.items()}


def test_texts_are_class_major(tmp_path):
    folder = write_set(tmp_path, classnames="cat\ndog\n", templates="a {c}.\n{c}, a {c}\nno {c}\n")
    prompts = load_prompts(folder)
    assert prompts == PromptSet(
        name=tmp_path.name, classnames=("cat", "dog"), templates=("a {c}.", "{c}, a {c}", "no {c}")
    )
    assert prompts.texts() == ["a cat.", "cat, a cat", "no cat", "a dog.", "dog, a dog", "no dog"]
    assert prompts.texts_of(1) == ["cat, a cat", "dog, a dog"]
    with pytest.raises(IndexError):
        prompts.texts_of(3)


def test_class_name_with_braces_is_taken_literally(tmp_path):
    folder = write_set(tmp_path, classnames="the {c} sign\n{}\n", templates="a {c}")
    assert load_prompts(folder).texts() == ["a the {c} sign", "a {}"]


def test_byte_order_mark_windows_endings_and_spaces_do_not_matter(tmp_path):
    (tmp_path / "plain").mkdir()
    (tmp_path / "windows").mkdir()
    plain = write_set(tmp_path / "plain", classnames="café\nsnow leopard\n", templates="a {c}")
    windows = write_set(
        tmp_path / "windows",
        classnames=b"\xef\xbb\xbf caf\xc3\xa9 \r\n\tsnow leopard\r\n",
        templates=b"\xef\xbb\xbfa {c}\r\n",
    )
    assert load_prompts(windows).classnames == ("café", "snow leopard")
    assert load_prompts(windows).texts() == load_prompts(plain).texts()


def test_clip_benchmark_folder(tmp_path):
    write_set(tmp_path, classnames="cat\ndog", templates=None)
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n")
    assert load_prompts(str(tmp_path)).texts() == ["a photo of a cat.", "a photo of a dog."]


def test_folder_beats_no_shipped_name_unless_written_as_a_path(tmp_path, monkeypatch):
    (tmp_path / "cifar10").mkdir()
    write_set(tmp_path / "cifar10", classnames="one\ntwo", templates="{c}")
    monkeypatch.chdir(tmp_path)
    assert load_prompts("cifar10").num_classes == 10
    assert load_prompts("./cifar10").num_classes == 2
    assert load_prompts(Path("cifar10")).num_classes == 2


GOOD_CLASSES, GOOD_TEMPLATES = "cat\ndog\n", "a {c}\n"
BAD_SETS = {
    "no class file": (None, GOOD_TEMPLATES, r"needs the file classnames\.txt"),
    "no template file": (
        GOOD_CLASSES,
        None,
        r"needs the file templates\.txt or zeroshot_classification_templates\.txt",
    ),
    "empty class file": ("", GOOD_TEMPLATES, r"classnames\.txt: empty; .*class name per line"),
    "blank class file": ("\n \n", GOOD_TEMPLATES, r"classnames\.txt: empty"),
    "empty template file": (GOOD_CLASSES, "\n", r"templates\.txt: empty; .*template per line"),
    "empty class line": ("cat\n  \ndog\n", GOOD_TEMPLATES, r"classnames\.txt:2: empty line"),
    "two newlines at the end": ("cat\ndog\n\n", GOOD_TEMPLATES, r"classnames\.txt:3: empty line"),
    "empty template line": (GOOD_CLASSES, "a {c}\n\nthe {c}", r"templates\.txt:2: empty line"),
    "duplicate class": ("cat\ndog\nemu\ndog \n", GOOD_TEMPLATES, r"classnames\.txt:4: class 'dog' .*line 2"),
    "no placeholder": (GOOD_CLASSES, "a {c}\na photo\n", r"templates\.txt:2: template 'a photo' .*\{c\}"),
    "positional placeholder": (GOOD_CLASSES, "a {}\n", r"templates\.txt:1: template 'a \{\}' .*\{c\}"),
    "other placeholder": (GOOD_CLASSES, "a {c} {d}\n", r"templates\.txt:1: .*no other braces"),
    "stray brace": (GOOD_CLASSES, "a {c}}\n", r"templates\.txt:1: .*no other braces"),
    "Latin-1 classes": ("cat\ncafé\n".encode("latin-1"), GOOD_TEMPLATES, r"classnames\.txt:2: not UTF-8"),
    "UTF-16 templates": (GOOD_CLASSES, GOOD_TEMPLATES.encode("utf-16"), r"templates\.txt:1: not UTF-8"),
}


@pytest.mark.parametrize(("classnames", "templates", "message"), BAD_SETS.values(), ids=BAD_SETS)
def test_bad_set_is_named_in_one_line(tmp_path, classnames, templates, message):
    with pytest.raises(InputError, match=message) as caught:
        load_prompts(write_set(tmp_path, classnames=classnames, templates=templates))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_duplicates_may_be_allowed(tmp_path):
    folder = write_set(tmp_path, classnames="missile\nsunglasses\nsunglasses", templates="{c}")
    assert load_prompts(folder, allow_duplicates=True).texts() == ["missile", "sunglasses", "sunglasses"]


def test_unknown_set_names_the_nearest_and_all_shipped_ones():
    with pytest.raises(InputError, match=r"'imagenet1k'; did you mean 'imagenet-1k'\? shipped sets: .*cifar10") as e:
        load_prompts("imagenet1k")
    assert all(name in str(e.value) for name in PUBLISHED_CLASS_COUNTS)


def test_unknown_folder_has_no_far_fetched_hint(tmp_path):
    with pytest.raises(InputError, match=r"no folder '.*/absent'; shipped sets: "):
        load_prompts(tmp_path / "absent")


def test_file_in_place_of_a_folder(tmp_path):
    (tmp_path / "names.txt").write_text("cat\n")
    with pytest.raises(InputError, match=r"no folder '.*names\.txt'"):
        load_prompts(tmp_path / "names.txt")
