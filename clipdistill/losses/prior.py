"""Class priors: a teacher's mean prediction for each class (Cui et al., arXiv 2503.08038, class-wise global
information), dense or, for many classes, truncated to the largest entries of every row.

At C = 21,841 a dense prior is 1.9 GB in float32 and 0.95 GB in bfloat16; the 256 largest entries per row, with their
columns, are 45 MB. The losses accept both, and read only the rows of the batch's labels.

Shape suffixes: C classes, K kept entries per row, B rows of a batch, b rows of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from clipdistill.losses._common import common_float

_ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class TopKPrior:
    """A class prior that keeps the K largest entries of every row and distributes the rest uniformly.

    Exact for K = C. In general, with ``rho`` the mass of a row beyond its K entries, the sum of absolute errors of
    the row's weights ``w = prior^gamma`` is ``E <= 2 (C - K)^(1 - gamma) rho^gamma``, and their sum W is never below
    the exact one. The error of a batch's wMSE is then at most ``3/4 R^2 max_b(E_b / W_b)``, where R is the largest
    range over the classes of ``t - s`` in a row; for ``gamma = 1``, ``3/2 R^2 max_b(rho_b)``.

    Attributes:
        values_CK: the kept entries, any floating type.
        indices_CK: their columns, integers in [0, C), without repeats in a row.
        rest_C: the value of every other entry of the row, of the same type as the values.
    """

    values_CK: Tensor
    indices_CK: Tensor
    rest_C: Tensor

    def __post_init__(self) -> None:
        shape = tuple(self.values_CK.shape)
        if len(shape) != 2 or not 0 < shape[1] <= shape[0]:
            raise ValueError(f"values_CK must have shape (C, K) with 0 < K <= C, got {shape}")
        if tuple(self.indices_CK.shape) != shape:
            raise ValueError(f"indices_CK must have values_CK's shape {shape}, got {tuple(self.indices_CK.shape)}")
        if tuple(self.rest_C.shape) != shape[:1]:
            raise ValueError(f"rest_C must have shape {shape[:1]}, got {tuple(self.rest_C.shape)}")
        for name in ("values_CK", "rest_C"):
            if not getattr(self, name).is_floating_point():
                raise ValueError(f"{name} must be floating point, got {getattr(self, name).dtype}")
        if self.indices_CK.is_floating_point() or self.indices_CK.dtype == torch.bool:
            raise ValueError(f"indices_CK must be integers, got {self.indices_CK.dtype}")

    @classmethod
    def from_dense(cls, prior_CC: Tensor, k: int) -> TopKPrior:
        """Keep the k largest entries of every row.

        Args:
            prior_CC: the dense prior, any floating type, on any device.
            k: in [1, C].

        Raises:
            ValueError: a prior that is not square, or k outside [1, C].
        """
        classes = len(prior_CC)
        if tuple(prior_CC.shape) != (classes, classes):
            raise ValueError(f"prior_CC must be square, got shape {tuple(prior_CC.shape)}")
        if not 1 <= k <= classes:
            raise ValueError(f"k must be in [1, {classes}], got {k}")
        parts = [_largest(rows_bC, k) for rows_bC in prior_CC.split(_ROWS_AT_ONCE)]
        return cls(*(torch.cat(part) for part in zip(*parts, strict=True)))

    def to(self, device: torch.device | str) -> TopKPrior:
        """The same prior on another device."""
        return TopKPrior(self.values_CK.to(device), self.indices_CK.to(device), self.rest_C.to(device))

    @property
    def shape(self) -> tuple[int, int]:
        """(C, C), the shape of the dense prior."""
        return len(self.rest_C), len(self.rest_C)

    @property
    def device(self) -> torch.device:
        """Device of the prior."""
        return self.values_CK.device


DENSE_CLASSES = 4096
"""Up to this many classes a ``ClassPrior`` is dense and on the device; beyond, it keeps the largest entries."""

KEPT_ENTRIES = 256
"""Entries kept per row beyond ``DENSE_CLASSES``."""


class ClassPrior:
    """A class prior over the epochs of a run: uniform at first, replaced at each epoch's end by the epoch's means.

    Up to ``DENSE_CLASSES`` classes everything is dense and on the device. Beyond, the current prior is a ``TopKPrior``
    on the device, and the sums of the current epoch, which are exact, are in host memory.

    Attributes:
        prior: the current prior; every row sums to 1.
        sum_CC: sum of this rank's predictions in the current epoch.
        count_C: number of samples in each row of the sum.
    """

    prior: Tensor | TopKPrior
    sum_CC: Tensor
    count_C: Tensor

    def __init__(
        self,
        classes: int,
        device: torch.device | str,
        *,
        dense_classes: int = DENSE_CLASSES,
        kept_entries: int = KEPT_ENTRIES,
    ) -> None:
        dense = classes <= dense_classes
        place = device if dense else "cpu"
        self.sum_CC = torch.zeros(classes, classes, device=place)
        self.count_C = torch.zeros(classes, device=place)
        if dense:
            self.prior = torch.full((classes, classes), 1 / classes, device=device)
        else:
            kept = min(kept_entries, classes)
            columns_CK = torch.arange(kept, dtype=torch.int32, device=device).repeat(classes, 1)
            self.prior = TopKPrior(
                torch.full((classes, kept), 1 / classes, device=device),
                columns_CK,
                torch.full((classes,), 1 / classes, device=device),
            )

    def add(self, probability_BC: Tensor, labels_B: Tensor) -> None:
        """Add a batch of this rank to the sums."""
        place = self.sum_CC.device
        labels_B = labels_B.to(place)
        self.sum_CC.index_add_(0, labels_B, probability_BC.float().to(place))
        self.count_C.index_add_(0, labels_B, torch.ones_like(labels_B, dtype=self.count_C.dtype))

    def end_epoch(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Replace the prior by the epoch's means over all ranks; a class without samples keeps its row."""
        count_C = sum_over_ranks(self.count_C)
        if isinstance(self.prior, TopKPrior):
            self._renew_rows(self.prior, count_C, sum_over_ranks)
        else:
            count_C1 = count_C[:, None]
            mean_CC = sum_over_ranks(self.sum_CC) / count_C1.clamp(min=1)
            self.prior = torch.where(count_C1 > 0, mean_CC, self.prior)
        self.sum_CC.zero_()
        self.count_C.zero_()

    def _renew_rows(self, prior: TopKPrior, count_C: Tensor, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Replace the rows of classes with samples, in blocks: the sums are never copied entirely."""
        for start in range(0, len(count_C), _ROWS_AT_ONCE):
            total_bC = sum_over_ranks(self.sum_CC[start : start + _ROWS_AT_ONCE])
            seen = count_C[start : start + _ROWS_AT_ONCE].nonzero().squeeze(1)
            mean_sC = total_bC[seen] / count_C[start + seen, None]
            place = (start + seen).to(prior.device)
            for kept, renewed in zip(
                (prior.values_CK, prior.indices_CK, prior.rest_C),
                _largest(mean_sC, prior.values_CK.shape[1]),
                strict=True,
            ):
                kept[place] = renewed.to(kept.device)

    def tensors(self) -> dict[str, Tensor]:
        """The current prior's tensors, by the suffix of their names."""
        if isinstance(self.prior, TopKPrior):
            return {".values": self.prior.values_CK, ".indices": self.prior.indices_CK, ".rest": self.prior.rest_C}
        return {"": self.prior}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the prior from ``tensors``."""
        if isinstance(self.prior, TopKPrior):
            device = self.prior.device
            self.prior = TopKPrior(*(tensors[name].to(device, copy=True) for name in (".values", ".indices", ".rest")))
        else:
            self.prior = tensors[""].to(self.prior.device, copy=True)


def _largest(rows_bC: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest entries of each row, their columns, and the mean of the others: (b, k), (b, k), (b,)."""
    values_bK, indices_bK = rows_bC.topk(k, dim=1)
    others_bC = rows_bC.scatter(1, indices_bK, 0)
    rest_b = others_bC.sum(1, dtype=common_float(prior_CC=rows_bC)) / max(rows_bC.shape[1] - k, 1)
    return values_bK, indices_bK.int(), rest_b.to(rows_bC.dtype)


def prior_rows(prior: Tensor | TopKPrior, labels_b: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows of the labels, (b, C)."""
    if not isinstance(prior, TopKPrior):
        return prior.index_select(0, labels_b).to(dtype)
    values_bK = prior.values_CK.index_select(0, labels_b).to(dtype)
    rest_b1 = prior.rest_C.index_select(0, labels_b).to(dtype)[:, None]
    rows_bC = rest_b1.repeat(1, prior.shape[1])
    return rows_bC.scatter_(1, prior.indices_CK.index_select(0, labels_b).long(), values_bK)


def fill_weights(out_bC: Tensor, prior: Tensor | TopKPrior, labels_b: Tensor, gamma: float) -> Tensor:
    """Write the weights ``prior[labels]^gamma`` into ``out_bC``, and return it."""
    if isinstance(prior, TopKPrior):
        values_bK, rest_b1 = _kept(prior, labels_b, gamma, out_bC.dtype)
        out_bC.copy_(rest_b1.expand_as(out_bC))
        return out_bC.scatter_(1, prior.indices_CK.index_select(0, labels_b).long(), values_bK)
    out_bC.copy_(prior.index_select(0, labels_b))
    return out_bC if gamma == 1 else out_bC.pow_(gamma)


def weight_mass(prior: Tensor | TopKPrior, labels_B: Tensor, gamma: float, dtype: torch.dtype) -> Tensor:
    """``W_B``, the row sums of ``prior[labels]^gamma``."""
    if isinstance(prior, TopKPrior):
        values_BK, rest_B1 = _kept(prior, labels_B, gamma, dtype)
        others = prior.shape[1] - values_BK.shape[1]
        return values_BK.sum(1) + others * rest_B1.squeeze(1) if others else values_BK.sum(1)
    return torch.cat(
        [prior.index_select(0, labels_b).to(dtype).pow_(gamma).sum(1) for labels_b in labels_B.split(_ROWS_AT_ONCE)]
    )


def _kept(prior: TopKPrior, labels_b: Tensor, gamma: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weights of the kept entries, (b, K), and of each of the others, (b, 1)."""
    values_bK = prior.values_CK.index_select(0, labels_b).to(dtype).pow_(gamma)
    return values_bK, prior.rest_C.index_select(0, labels_b).to(dtype).pow_(gamma).unsqueeze(1)
