"""The walker of image folders, compared with torchvision's, on real trees with links, hidden names and splits."""

import os
from pathlib import Path

import pytest
from torchvision.datasets import ImageFolder

from clipdistill.errors import InputError
from clipdistill.io.image_folders import IMAGE_SUFFIXES, find_image_folder, is_split_name


def tree(root: Path, *names: str) -> Path:
    """Empty files; a name that ends in a slash is a folder."""
    for name in names:
        path = root / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.touch()
    return root


def found(root: Path, split: str | None = None) -> dict[str, list[str]]:
    folder = find_image_folder(root, split=split)
    assert folder is not None
    return {
        each.path.name: [image.relative_to(folder.root).as_posix() for image in each.images] for each in folder.classes
    }


def test_classes_and_order_are_torchvisions(tmp_path: Path) -> None:
    names = [f"{c}/{d}{n}{suffix}" for c in ("b", "a", "B 2") for d in ("", "z/", "y/x/") for n in (10, 9, "Z")
             for suffix in (IMAGE_SUFFIXES[0], ".PNG")]  # fmt: skip
    tree(tmp_path, *names, "a/notes.txt", "top.png")
    (tmp_path / "linked").symlink_to(tmp_path / "b", target_is_directory=True)
    (tmp_path / "a" / "one.jpg").symlink_to(tmp_path / "b" / "9.jpg")
    theirs = ImageFolder(str(tmp_path), loader=lambda path: path)
    ours = found(tmp_path)
    assert list(ours) == theirs.classes
    assert [image for images in ours.values() for image in images] == [
        Path(path).relative_to(tmp_path).as_posix() for path, _ in theirs.samples
    ]


def test_what_is_skipped_is_counted(tmp_path: Path) -> None:
    tree(tmp_path, "a/1.png", "a/._1.png", "a/.ipynb_checkpoints/1.png", "a/.DS_Store", "a/Thumbs.db", "b/2.JPG")
    tree(tmp_path, ".git/x.png", "__MACOSX/a/._1.png", "b/@eaDir/2.JPG/thumb.jpg", "outside.png", "README.md")
    (tmp_path / "b" / "circle").symlink_to(tmp_path / "b", target_is_directory=True)
    (tmp_path / "b" / "self.png").symlink_to("self.png")
    (tmp_path / "b" / "gone.png").symlink_to("nowhere.png")
    os.mkfifo(tmp_path / "b" / "pipe.png")
    folder = find_image_folder(tmp_path, split=None)
    assert folder is not None
    assert found(tmp_path) == {"a": ["a/1.png"], "b": ["b/2.JPG"]}
    assert folder.notes == (
        "ignored: folders reached again by a link: 1, hidden: 6, images outside the class folders: 1, not images: 4"
    )


@pytest.mark.parametrize(
    "name", ["train", "Val", "TEST", "validation", "test2017", "training_set", "dev", "valid-data"]
)
def test_names_of_splits(name: str) -> None:
    assert is_split_name(name)


@pytest.mark.parametrize("name", ["trainer", "validate", "attest", "1", "apple", "test tube", "train station", "devil"])
def test_names_of_classes(name: str) -> None:
    assert not is_split_name(name)


def test_splits_are_no_classes(tmp_path: Path) -> None:
    tree(tmp_path, "train/a/1.png", "train/b/2.png", "Val/a/3.png", "Val/b/4.png", "annotations/x.json")
    assert found(tmp_path, "val") == {"a": ["a/3.png"], "b": ["b/4.png"]}
    assert found(tmp_path / "train", "test") == {"a": ["a/1.png"], "b": ["b/2.png"]}
    with pytest.raises(
        InputError, match=r"no split 'test', but folders of classes in its splits; allowed: Val, train$"
    ):
        find_image_folder(tmp_path, split="test")
    with pytest.raises(InputError, match=r"no classes, but folders of classes in its splits; allowed: Val, train$"):
        find_image_folder(tmp_path, split=None)


@pytest.mark.parametrize("split", [None, "test", "train"])
def test_classes_may_have_the_names_of_splits(tmp_path: Path, split: str | None) -> None:
    tree(tmp_path, "test/1.png", "train/old/2.png", "bus/3.png")
    assert list(found(tmp_path, split)) == ["bus", "test", "train"]


def test_flat_splits_count_as_classes_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tree(tmp_path, "test/1.png", "train/2.png")
    assert list(found(tmp_path, "test")) == ["test", "train"]
    assert "named as splits count as classes, since they hold images: test, train" in caplog.text


def test_folders_without_classes(tmp_path: Path) -> None:
    assert find_image_folder(tree(tmp_path, "x.png", "empty/", "notes/a.txt"), split="test") is None
    tree(tmp_path, "a/1.png")
    with pytest.raises(InputError, match=r"no image in the class folders empty, notes; allowed: images \(.jpg, "):
        find_image_folder(tmp_path, split="test")


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    tree(tmp_path, "a/1.png")
    Path(os.fsdecode(os.fsencode(tmp_path / "a") + b"/caf\xe9.png")).touch()
    with pytest.raises(InputError, match=r"a: the name 'caf\\udce9.png' is not UTF-8") as caught:
        find_image_folder(tmp_path, split=None)
    str(caught.value).encode()
