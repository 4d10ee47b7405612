"""What a run is made of, by content: recorded in every checkpoint, and compared when the run is resumed.

    settings    those that determine the result, without names and places of files
    prompts     class names and templates, in order
    teachers    of each: digests of image and text weights, logit scale and bias, digest of a few texts' tokens
    student     its model config, pixels and tokens; digests of the weights it started from, if they were loaded
    labels      digest of the classes that each shard's labels stand for; empty if labels are not used
    shards      name and digest of each; of a resampled stream, of those that were opened so far
    versions    of Python and the libraries: another one is only logged

Paths and URLs are not part of it: the same files elsewhere are the same run.
"""

import hashlib
import json
import logging
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import open_clip

from clipdistill import __version__
from clipdistill.config import Config, settings_of_result
from clipdistill.distributed.collectives import gather_objects, rank, world_size
from clipdistill.errors import InputError
from clipdistill.io.files import why
from clipdistill.io.identity import first_difference
from clipdistill.models.prompts import PromptSet
from clipdistill.models.towers import FrozenModel, Student, Tower

log = logging.getLogger(__name__)

FORMAT = 1
_PACKAGES = ("torch", "open_clip_torch", "timm", "transformers", "tokenizers", "pillow", "numpy")
_PROBE = ("a photo of a dog", "Größe 42, naïve café!", "zwölf 猫 <b>2.5</b>")
"""Texts whose tokens identify a tokenizer."""
_PROMPTS_TOKENISED = 100

Identity = dict[str, Any]


def describe(
    config: Config, *, prompts: PromptSet | None, teachers: Sequence[FrozenModel], student: Student
) -> Identity:
    """The record of a run, except for its shards; the ranks share the work. Its models are as they were loaded."""
    texts = [*_PROBE, *(prompts.texts()[:_PROMPTS_TOKENISED] if prompts else ())]
    loaded = config.student.has_weights
    parts: list[Callable[[], Any]] = []
    for teacher in teachers:
        parts += [teacher.image_fingerprint, teacher.text_fingerprint]
    if loaded:
        parts += [student.image_fingerprint, student.text_fingerprint]
    done = gather_objects([part() for part in parts[rank() :: world_size()]])
    digests = [done[number % len(done)][number // len(done)] for number in range(len(parts))]
    record = {
        "format": FORMAT,
        "settings": settings_of_result(config),
        "prompts": prompts and {"classnames": list(prompts.classnames), "templates": list(prompts.templates)},
        "teachers": [
            {
                "image_weights": digests[2 * number],
                "text_weights": digests[2 * number + 1],
                "logit_scale": teacher.logit_scale,
                "logit_bias": teacher.bias,
                "tokens": _tokens(teacher, texts),
            }
            for number, teacher in enumerate(teachers)
        ],
        "student": {
            "model_config": _without_tokenizer(student.model_config),
            "pixels": open_clip.get_model_preprocess_cfg(student.clip),
            "tokens": _tokens(student, texts),
            "image_weights": digests[-2] if loaded else None,
            "text_weights": digests[-1] if loaded else None,
        },
        "versions": {
            "clipdistill": __version__,
            "python": platform.python_version(),
            **{package: _version(package) for package in _PACKAGES},
        },
    }
    read_back: Identity = json.loads(json.dumps(record))  # lists in place of tuples, as in a file
    return read_back


def check_same_run(then: Mapping[str, Any], now: Mapping[str, Any], *, run: str) -> None:
    """Refuse to resume a run that was made of something else. Parts that ``now`` lacks are not compared.

    Args:
        then: the record of the run.
        now: that of the config; or some parts of it.
        run: names the run in messages.

    Raises:
        InputError: a part differs; the message names the first.
    """
    if then.get("format") != FORMAT:
        raise InputError(f"{run}: identity of format {then.get('format')}; allowed: {FORMAT}, or another output")
    for part in ("settings", "prompts", "teachers", "student", "labels"):
        if part not in now:
            continue
        found = first_difference(then.get(part), now[part], "" if part == "settings" else part)
        if found is not None:
            raise InputError(
                f"{found.part}: {found.now}, but the run in {run} has {found.then}; allowed: the same, another output, "
                "or --restart"
            )
    versions = now.get("versions", {})
    changed = [
        f"{name} {old} (now {versions[name]})"
        for name, old in then["versions"].items()
        if versions.get(name, old) != old
    ]
    if changed:
        log.warning("the run was made with %s: from here on its results may differ", ", ".join(changed))


def read_identity(file: Path) -> Identity | None:
    """The record in a file; None if it is missing.

    Raises:
        InputError: it cannot be read.
    """
    try:
        found = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: cannot be read: {why(error)}; allowed: the file as written, or --restart") from error
    parts = {"versions": dict, "shards": list}
    if not isinstance(found, dict) or not all(isinstance(found.get(name), kind) for name, kind in parts.items()):
        raise InputError(f"{file}: no record of a run; allowed: the file as written, or --restart")
    return found


def _tokens(tower: Tower, texts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(tower.tokenizer(list(texts)).tolist()).encode()).hexdigest()


def _without_tokenizer(model_config: Mapping[str, Any]) -> dict[str, Any]:
    """A model config without the place of its tokenizer, whose tokens are compared."""
    text = {name: value for name, value in model_config["text_cfg"].items() if name != "hf_tokenizer_name"}
    return {**model_config, "text_cfg": text}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
