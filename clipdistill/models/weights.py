"""Files of weights: their wrappers and prefixes, and what does not fit."""

import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from clipdistill.errors import InputError

_WRAPPERS = ("state_dict", "model", "model_state_dict", "ema", "model_ema", "student")
_PREFIXES = ("_orig_mod.", "module.", "model.")
"""Of torch.compile, DistributedDataParallel, and modules that hold a model."""


@contextmanager
def plain_weights(file: str) -> Iterator[str]:
    """A file of weights as open_clip reads it: without wrappers (``{"model": ...}``) and common prefixes of all names
    (``_orig_mod.``, ``module.``). That is the file itself, or a temporary one.

    Raises:
        InputError: several sets of weights in one file.
    """
    path = Path(file)
    if not path.is_file() or path.suffix in (".npz", ".npy") or not (state := _cleaned(path)):
        yield file
        return
    with tempfile.TemporaryDirectory() as folder:
        cleaned = Path(folder) / "weights.safetensors"
        save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, cleaned)
        yield str(cleaned)


def _cleaned(path: Path) -> dict[str, Tensor] | None:
    """The weights in a file, if open_clip cannot read it as it is; else None."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as weights:
            names = list(weights.keys())
        prefix = _common_prefix(names)
        return {name.removeprefix(prefix): tensor for name, tensor in load_file(path).items()} if prefix else None
    content = torch.load(path, map_location="cpu", weights_only=True)
    state, wrapped = content, False
    while isinstance(state, dict):
        held = [name for name in _WRAPPERS if isinstance(state.get(name), Mapping)]
        if len(held) > 1:
            raise InputError(f"weights {path}: holds {' and '.join(held)}; allowed: one set of weights")
        if not held:
            break
        state, wrapped = state[held[0]], True
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        return None
    prefix = _common_prefix(list(state))
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()} if wrapped or prefix else None


def _common_prefix(names: list[str]) -> str:
    prefix = ""
    while names and (found := next((each for each in _PREFIXES if all(map(_starts(prefix + each), names))), "")):
        prefix += found
    return prefix


def _starts(prefix: str) -> Any:
    return lambda name: name.startswith(prefix)


def describe_mismatch(error: RuntimeError) -> str:
    """torch's error about a state dict on one line: how many names differ, and one of each kind."""
    text = str(error)
    found = []
    for title, what in (("Missing", "missing"), ("Unexpected", "unexpected")):
        listed = re.search(rf"{title} key\(s\) in state_dict: (.*)", text)
        names = re.findall(r'"([^"]+)"', listed[1]) if listed else []
        found += [f"{len(names)} {what}, such as {names[0]}"] if names else []
    sizes = re.findall(r"size mismatch for (\S+): .*?\[(.*?)\].*?\[(.*?)\]", text)
    if sizes:
        name, theirs, ours = sizes[0]
        found.append(f"{len(sizes)} of another shape, such as {name}: [{theirs}] for [{ours}]")
    return "; ".join(found) or " ".join(text.split())[:300]
