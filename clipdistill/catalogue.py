"""``clipdistill models``: candidates for a student, with their cost and what loads them.

Candidates are open_clip's model configs and timm's image towers. Parameters and operations are counted on the meta
device, once for each version of the libraries, and kept in the cache; images per second are measured when asked for.
"""

import argparse
import fnmatch
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from clipdistill.errors import InputError
from clipdistill.io.arguments import path, positive, positive_number
from clipdistill.io.caches import CATALOGUE, DEFAULT_CACHE, mark_used
from clipdistill.io.files import write_json

_WIDTH = 512
"""Width of the embeddings for which towers of timm are counted."""
_PACKAGES = ("torch", "open_clip_torch", "timm")
_FORMAT = 1
_SAVE_EVERY = 50
_ORDERS = ("gflops", "params", "speed", "name")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A possible student.

    Attributes:
        name: for ``student.model``.
        image_size: height and width in pixels.
        parameters_m: of the image tower, in millions.
        gflops: of the image tower for one image, 2 per multiply-add.
        text_parameters_m: of the text tower, in millions; None: it has none, or one of transformers.
        transformers: whether an export has a transformers form.
        images_per_second: of the image tower with random weights on this machine; None: not measured.
    """

    name: str
    image_size: tuple[int, int]
    parameters_m: float
    gflops: float
    text_parameters_m: float | None = None
    transformers: bool = False
    images_per_second: float | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``run``."""
    parser.add_argument(
        "patterns",
        nargs="*",
        metavar="NAME",
        help="names, or parts of them, or patterns such as 'timm/mobilenetv4*'; default: all of open_clip, and all "
        "towers of timm that have pretrained weights",
    )
    parser.add_argument(
        "--max-params", type=positive_number, metavar="M", help="image tower: at most M million parameters"
    )
    parser.add_argument(
        "--max-gflops", type=positive_number, metavar="G", help="image tower: at most G GFLOPs an image"
    )
    parser.add_argument("--speed", action="store_true", help="measure images per second of the models that are shown")
    parser.add_argument("--batch-size", type=positive, default=16, help="for --speed (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="for --speed (default: %(default)s)")
    parser.add_argument(
        "--sort", choices=_ORDERS, default="gflops", help="largest first, names in order (default: %(default)s)"
    )
    parser.add_argument("--top", type=positive, default=30, help="show at most so many (default: %(default)s)")
    parser.add_argument("--json", type=path, metavar="FILE", help="also write the models that are shown to this file")
    parser.add_argument("--cache", type=path, default=Path(DEFAULT_CACHE), metavar="DIR", help="default: %(default)s")


def run(args: argparse.Namespace) -> None:
    """Count, filter, measure, and print.

    Raises:
        InputError: no model has such a name, or is small enough; a wrong device or file.
    """
    from rich.console import Console

    if args.json is not None and not args.json.parent.is_dir():
        raise InputError(f"--json {args.json}: no folder {args.json.parent}; allowed: a file in an existing folder")
    if args.sort == "speed" and not args.speed:
        raise InputError("--sort speed: without --speed; allowed: both, or another order")
    names = find_names(args.patterns)
    counted = list(count(names, args.cache.expanduser()))
    limits = [("--max-params", args.max_params, "parameters_m"), ("--max-gflops", args.max_gflops, "gflops")]
    fitting = [each for each in counted if all(most is None or getattr(each, of) <= most for _, most, of in limits)]
    if not counted:
        raise InputError(f"NAME {' '.join(args.patterns)}: cannot be a student's image tower; allowed: other models")
    if not fitting:
        smallest = min(counted, key=lambda each: each.gflops)
        raise InputError(
            f"{' '.join(name for name, most, _ in limits if most is not None)}: none of {len(counted)} models is so "
            f"small; the smallest is {smallest.name}: {smallest.parameters_m:.2f} M, {smallest.gflops:.2f} GFLOPs"
        )
    if args.speed and args.sort == "speed":
        fitting = measure(fitting, batch_size=args.batch_size, device=args.device)
    shown = _sorted(fitting, args.sort)[: args.top]
    if args.speed and args.sort != "speed":
        shown = measure(shown, batch_size=args.batch_size, device=args.device)
    if args.json is not None:
        write_json(args.json, [asdict(each) for each in shown])
    _print(Console(), shown, of=len(fitting), speed=args.speed, args=args)


def find_names(patterns: Sequence[str]) -> list[str]:
    """The candidates' names that match.

    Args:
        patterns: parts of names, or shell patterns; without any, those of towers of timm without pretrained weights are
            left out.

    Raises:
        InputError: a pattern matches none.
    """
    import open_clip
    import timm

    usual = timm.list_models()
    if not patterns:
        pretrained = {name.partition(".")[0] for name in timm.list_pretrained()}
        usual = [name for name in usual if name in pretrained and not name.startswith("test_")]
    names = [*open_clip.list_models(), *(f"timm/{name}" for name in usual)]
    if not patterns:
        return names
    found: dict[str, None] = {}
    for pattern in patterns:
        glob = pattern if any(sign in pattern for sign in "*?[") else f"*{pattern}*"
        exact = [name for name in names if name == pattern]
        matches = exact or [name for name in names if fnmatch.fnmatch(name.lower(), glob.lower())]
        if not matches:
            raise InputError(f"NAME {pattern}: no model of open_clip or timm; allowed: a part of a name, or a pattern")
        found |= dict.fromkeys(matches)
    return list(found)


def count(names: Sequence[str], cache: Path) -> Iterator[Candidate]:
    """Each candidate with its cost, from the cache or counted; those that give no embedding are left out.

    Args:
        names: of the candidates.
        cache: folder of the cache.
    """
    from rich.progress import track

    made_of = json.dumps([_FORMAT, _WIDTH, *(version(package) for package in _PACKAGES)])
    file = cache / CATALOGUE / f"{sha256(made_of.encode()).hexdigest()[:32]}.json"
    known = _read(file)
    missing = [name for name in names if name not in known]
    for number, name in enumerate(track(missing, description="counting", transient=True, disable=len(missing) < 2)):
        candidate = _count(name)
        known[name] = candidate
        if number % _SAVE_EVERY == _SAVE_EVERY - 1:
            _write(file, known)
    if missing:
        _write(file, known)
    else:
        mark_used(file)
    yield from (candidate for name in names if (candidate := known[name]) is not None)


def _read(file: Path) -> dict[str, Candidate | None]:
    try:
        stated = json.loads(file.read_text(encoding="utf-8"))
        names = {each.name for each in fields(Candidate)}
        return {
            name: None if each is None else Candidate(**{**each, "image_size": tuple(each["image_size"])})
            for name, each in stated.items()
            if each is None or each.keys() <= names
        }
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return {}


def _write(file: Path, known: dict[str, Candidate | None]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {name: None if each is None else asdict(each) for name, each in known.items()})


def _count(name: str) -> Candidate | None:
    """A candidate's cost; None if the libraries cannot build it as an image tower with an embedding."""
    import torch

    from clipdistill.evaluation.cost import module_cost

    logging.disable(logging.ERROR)
    try:
        with torch.device("meta"):
            visual, size, more = _build(name, text=True)
        cost = module_cost(visual, size, device="meta")
        return Candidate(name=name, image_size=size, parameters_m=cost["parameters_m"], gflops=cost["gflops"], **more)
    except Exception:  # of any of a thousand architectures
        return None
    finally:
        logging.disable(logging.NOTSET)


def _build(name: str, *, text: bool) -> tuple[Any, tuple[int, int], dict[str, Any]]:
    """An image tower with random weights, its size, and what is known of the rest of the model.

    Args:
        name: of the candidate.
        text: also find out about the text tower and transformers.
    """
    import open_clip
    from open_clip.timm_model import TimmModel

    from clipdistill.export.transformers_format import unmapped
    from clipdistill.io.images import as_size
    from clipdistill.models.timm_towers import find_timm_tower, is_timm
    from clipdistill.models.towers import Tower

    if is_timm(name):
        tower = find_timm_tower(name)
        stated = {key.removeprefix("timm_"): value for key, value in tower.vision_config.items()}
        model_name = stated.pop("model_name")
        return TimmModel(model_name, _WIDTH, **stated).eval(), as_size(tower.preprocess["size"]), {}
    config = open_clip.get_model_config(name)
    if "multimodal_cfg" in config:
        raise ValueError("a captioning model (CoCa)")
    size = as_size(config["vision_cfg"].get("image_size", 224))
    if not text or "hf_model_name" in config["text_cfg"]:
        visual = open_clip.model._build_vision_tower(
            config["embed_dim"], config["vision_cfg"], quick_gelu=config.get("quick_gelu", False)
        )
        return visual.eval(), size, {}
    clip = open_clip.create_model(name, device="meta", load_weights=False, output_dict=True)
    whole = Tower(name, clip, config, None)
    parameters = sum(each.numel() for part, each in clip.named_parameters() if not part.startswith("visual."))
    return clip.visual, size, {"text_parameters_m": parameters / 1e6, "transformers": not unmapped(whole)}


def measure(candidates: Sequence[Candidate], *, batch_size: int, device: str) -> list[Candidate]:
    """The candidates with their images per second: float32, random weights and pixels.

    Raises:
        InputError: no such device.
    """
    import torch
    from rich.progress import track

    from clipdistill.distributed.collectives import available_device
    from clipdistill.evaluation.cost import throughput

    device = available_device(device)
    found = []
    for candidate in track(candidates, description="measuring", transient=True, disable=len(candidates) < 2):
        visual, size, _ = _build(candidate.name, text=False)
        images_BCHW = torch.rand(batch_size, 3, *size, device=device)
        speed = throughput(visual.to(device), images_BCHW)
        found.append(replace(candidate, images_per_second=speed))
    return found


def _sorted(candidates: Sequence[Candidate], order: str) -> list[Candidate]:
    key = {"gflops": "gflops", "params": "parameters_m", "speed": "images_per_second", "name": "name"}[order]
    return sorted(candidates, key=lambda each: getattr(each, key), reverse=order != "name")


def _print(console: Any, shown: Sequence[Candidate], *, of: int, speed: bool, args: argparse.Namespace) -> None:
    from rich.table import Table

    from clipdistill.io.machine import describe_machine

    table = Table(box=None, header_style="bold")
    table.add_column("model", overflow="fold")
    for column in ("pixels", "M param.", "GFLOPs", "text M", *(["images/s"] if speed else [])):
        table.add_column(column, justify="right")
    table.add_column("transformers")
    for each in shown:
        height, width = each.image_size
        row = [each.name, f"{height}" if height == width else f"{height}x{width}"]
        row += [f"{each.parameters_m:.2f}", f"{each.gflops:.2f}"]
        row.append("" if each.text_parameters_m is None else f"{each.text_parameters_m:.1f}")
        if speed:
            row.append(f"{each.images_per_second:,.0f}")
        table.add_row(*row, "yes" if each.transformers else "no")
    console.print(table)
    if of > len(shown):
        console.print(f"{of - len(shown):,} more; --top shows more of them", highlight=False)
    if speed:
        console.print(f"images/s: batches of {args.batch_size}, float32; {describe_machine()}", highlight=False)
