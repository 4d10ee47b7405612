"""What the tests of the losses share: seeded inputs, a comparison, and a recorder of large tensors.

Shapes: B rows, C classes, D and E feature widths of student and teacher.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random_logits(*shape: int, seed: int = 0, scale: float = 3.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_prior(classes: int, *, seed: int = 0) -> Tensor:
    """A class prior whose last entry for class 0 is 0: a class that the teacher never predicts for it."""
    prior_CC = random_logits(classes, classes, seed=seed).softmax(1)
    prior_CC[0, -1] = 0 if classes > 1 else 1
    return prior_CC / prior_CC.sum(1, keepdim=True)


def features(
    rows: int,
    classes: int,
    width: int = 12,
    teacher_width: int = 20,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: str = DEVICE,
) -> list[Tensor]:
    """Embeddings of student image, student text, teacher image, teacher text."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, width), (classes, width), (rows, teacher_width), (classes, teacher_width))
    made = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [F.normalize(x, dim=1).to(device, dtype) for x in made]


def assert_near(actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    """Equal to ``tolerance`` times the largest entry."""
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected, strict=True):
        size = max(theirs.abs().max().item(), 1e-9)
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=tolerance, atol=tolerance * size)


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements behind the result of any operation, forward or backward."""

    numel = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        made = [tensor.untyped_storage().nbytes() // tensor.element_size() for tensor in tensors]
        self.numel = max([self.numel, *made])
        return out
