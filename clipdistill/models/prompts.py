"""Prompt sets: class names x templates -> the texts that represent the classes.

A prompt set is a folder with two text files: ``classnames.txt``, one class per line in the order of the class
indices, and ``templates.txt``, one template per line with ``{c}`` in place of the class name. CLIP_benchmark's
data set folders, whose second file is ``zeroshot_classification_templates.txt``, are also accepted.
"""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from clipdistill.errors import InputError
from clipdistill.io.paths import expand
from clipdistill.io.resources import resource

PLACEHOLDER = "{c}"
CLASSNAMES_FILE = "classnames.txt"
TEMPLATE_FILES = ("templates.txt", "zeroshot_classification_templates.txt")


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """C class names, in the order of the class indices, and T templates."""

    name: str
    classnames: tuple[str, ...]
    templates: tuple[str, ...]
    duplicates: bool = False
    """Whether classes may share a name, or the tokens of their names."""

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.classnames)

    @property
    def num_templates(self) -> int:
        """T."""
        return len(self.templates)

    def texts(self) -> list[str]:
        """All C * T texts, class-major: class 0 in every template, then class 1, ..."""
        return [_fill(template, name) for name in self.classnames for template in self.templates]

    def texts_of(self, template_index: int) -> list[str]:
        """The C texts of one template, in class order."""
        template = self.templates[template_index]
        return [_fill(template, name) for name in self.classnames]


def load_prompts(
    name_or_folder: str | Path, *, allow_duplicates: bool = False, default_templates: Sequence[str] = ()
) -> PromptSet:
    """Read a shipped prompt set by its name, or any prompt set by its folder.

    Args:
        name_or_folder: one of `shipped_prompt_sets`, or a folder. A string that is a shipped name means the
            shipped set; write ``./cifar10`` for a folder of that name in the working directory.
        allow_duplicates: accept classes that share a name. They also share their text features, so no student
            can distinguish them; this is for reproducing published evaluations, as the usual ImageNet names
            contain "missile" and "sunglasses" twice.
        default_templates: used if the set has no file of templates; none: such a set is refused.

    Raises:
        InputError: no such set, or a missing, empty or malformed file; names file, line and what is allowed.
    """
    shipped = shipped_prompt_sets()
    if isinstance(name_or_folder, str) and name_or_folder in shipped:
        folder = resource("prompts", name_or_folder)
    else:
        folder = expand(name_or_folder)
    if not folder.is_dir():
        raise InputError(_no_such_set(name_or_folder, shipped))

    class_file = _first_file(folder, CLASSNAMES_FILE)
    classnames = parse_classnames(class_file.read_bytes(), where=class_file)
    if not allow_duplicates:
        _check_distinct(class_file, classnames)
    if default_templates and not any((folder / name).is_file() for name in TEMPLATE_FILES):
        templates = list(default_templates)
    else:
        template_file = _first_file(folder, *TEMPLATE_FILES)
        templates = _parse_lines(template_file.read_bytes(), where=template_file, what="template")
        _check_placeholders(template_file, templates)
    return PromptSet(
        name=folder.resolve().name,
        classnames=tuple(classnames),
        templates=tuple(templates),
        duplicates=allow_duplicates,
    )


def load_own_prompts(
    folders: Iterable[Path], *, default_templates: Sequence[str], allow_duplicates: bool = False
) -> PromptSet | None:
    """The prompt set of the first folder that holds a ``classnames.txt``; None if there is none.

    Raises:
        InputError: as ``load_prompts``.
    """
    own = next((folder for folder in folders if (folder / CLASSNAMES_FILE).is_file()), None)
    if own is None:
        return None
    return load_prompts(own, allow_duplicates=allow_duplicates, default_templates=default_templates)


def parse_classnames(content: bytes, *, where: object) -> list[str]:
    """The class names in the content of a ``classnames.txt``, one a line.

    Raises:
        InputError: empty, an empty line, or not UTF-8; names ``where``, the file or URL.
    """
    return _parse_lines(content, where=where, what="class name")


def shipped_prompt_sets() -> list[str]:
    """Names of the prompt sets shipped with clipdistill, sorted."""
    return sorted(path.parent.name for path in resource("prompts").glob(f"*/{CLASSNAMES_FILE}"))


def _fill(template: str, classname: str) -> str:
    return template.replace(PLACEHOLDER, classname)


def _first_file(folder: Path, *names: str) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise InputError(f"{folder}: a prompt set needs the file {' or '.join(names)}, which is missing")


def _parse_lines(content: bytes, *, where: object, what: str) -> list[str]:
    """The lines of a UTF-8 text, stripped; a byte order mark and Windows line endings are accepted."""
    try:
        text = content.decode("utf-8-sig").removesuffix("\n")
    except UnicodeDecodeError as error:
        number = error.object[: error.start].count(b"\n") + 1
        raise InputError(f"{where}:{number}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
    if not text.strip():
        raise InputError(f"{where}: empty; allowed: one {what} per line, at least one")
    lines = [line.strip() for line in text.split("\n")]
    if "" in lines:
        raise InputError(f"{where}:{lines.index('') + 1}: empty line; every line is one {what}")
    return lines


def _check_distinct(path: Path, classnames: list[str]) -> None:
    first_line: dict[str, int] = {}
    for number, name in enumerate(classnames, start=1):
        if name in first_line:
            raise InputError(
                f"{path}:{number}: class {name!r} is already on line {first_line[name]}; "
                "every class needs a unique name"
            )
        first_line[name] = number


def _check_placeholders(path: Path, templates: list[str]) -> None:
    for number, template in enumerate(templates, start=1):
        rest = template.replace(PLACEHOLDER, "")
        if rest == template or "{" in rest or "}" in rest:
            raise InputError(
                f"{path}:{number}: template {template!r} must contain {PLACEHOLDER}, for the class name, "
                "and no other braces"
            )


def _no_such_set(value: str | Path, shipped: list[str]) -> str:
    close = difflib.get_close_matches(str(value), shipped, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"prompts: no shipped set and no folder {str(value)!r}; {hint}shipped sets: {', '.join(shipped)}"
