"""A stand-in for an accelerator on which every wait of the host for the device is an error.

Tensors on the ``meta`` device have shapes and no data. What needs a value on the host (``.item``, ``.cpu``, a mask as
an index) fails by itself; `HostDeviceTrap` also finds the copies from the host, which wait as well.
"""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("meta")


class HostDeviceTrap(TorchDispatchMode):
    """Counts the operators that read tensors with data where others lie on the device: copies, and indices.

    Tensors of one element are excepted: kernels take them as scalars.

    Attributes:
        found: name and number of each operator's calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, int] = {}
        self._constants = _Constants(self.found)

    def __enter__(self) -> "HostDeviceTrap":
        self._constants.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._constants.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        made = [each for each in tree_leaves(out) if isinstance(each, Tensor)]
        on_host = any(each.device != DEVICE and each.ndim > 0 for each in given)
        if on_host and any(each.device == DEVICE for each in given + made):
            _count(self.found, str(func))
        return out


class _Constants(TorchFunctionMode):
    """Tensors made from Python's numbers: no operator, but a copy, makes them on a device."""

    def __init__(self, found: dict[str, int]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor) and out.device == DEVICE:
            _count(self._found, func.__name__)
        return out


def _count(found: dict[str, int], name: str) -> None:
    found[name] = found.get(name, 0) + 1
