"""Class priors for many classes: a (C, C) matrix cut to the largest entries of every row.

At C = 21,841 a dense prior is 1.9 GB in float32 and 0.95 GB in bfloat16; its 256 largest entries a row, with their
columns, are 45 MB. The fused losses take either, and read only the rows of the batch's labels.

Shape suffixes: C classes, K kept entries a row, B rows of a batch, b rows of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clipdistill.losses._common import common_float

_ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class TopKPrior:
    """A class prior of which every row keeps its K largest entries and spreads the rest evenly.

    Exact for K = C. In general, with ``rho`` the mass of a row beyond its K entries, the weights
    ``w = prior^gamma`` of the row are off by ``E <= 2 (C - K)^(1 - gamma) rho^gamma`` in their sum of absolute
    differences, and their sum W is never below the exact one. The wMSE of a batch is then off by at most
    ``3/4 R^2 max_b(E_b / W_b)``, where R is the largest range over the classes of ``t - s`` in a row; for
    ``gamma = 1``, ``3/2 R^2 max_b(rho_b)``.

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
    def from_dense(cls, prior_CC: Tensor, k: int, *, count_C: Tensor | None = None) -> TopKPrior:
        """Keep the k largest entries of every row.

        Args:
            prior_CC: the dense prior, any floating type, on any device: 256 rows at a time are looked at. With
                ``count_C``: sums of predictions, as they are accumulated.
            k: in [1, C].
            count_C: samples behind each row of sums; the prior is their mean, or 1/C for a class without samples.

        Raises:
            ValueError: a prior that is not square, or k outside [1, C].
        """
        classes = len(prior_CC)
        if tuple(prior_CC.shape) != (classes, classes):
            raise ValueError(f"prior_CC must be square, got shape {tuple(prior_CC.shape)}")
        if not 1 <= k <= classes:
            raise ValueError(f"k must be in [1, {classes}], got {k}")
        if count_C is not None and tuple(count_C.shape) != (classes,):
            raise ValueError(f"count_C must have shape ({classes},), got {tuple(count_C.shape)}")
        values, indices, rests = [], [], []
        for start in range(0, classes, _ROWS_AT_ONCE):
            rows_bC = prior_CC[start : start + _ROWS_AT_ONCE]
            if count_C is not None:
                count_b1 = count_C[start : start + _ROWS_AT_ONCE, None]
                rows_bC = torch.where(count_b1 > 0, rows_bC / count_b1, 1 / classes).to(rows_bC.dtype)
            values_bK, indices_bK = rows_bC.topk(k, dim=1)
            others_bC = rows_bC.scatter(1, indices_bK, 0)
            rest_b = others_bC.sum(1, dtype=common_float(prior_CC=rows_bC)) / max(classes - k, 1)
            values.append(values_bK)
            indices.append(indices_bK.int())
            rests.append(rest_b.to(rows_bC.dtype))
        return cls(torch.cat(values), torch.cat(indices), torch.cat(rests))

    def to(self, device: torch.device | str) -> TopKPrior:
        """The same prior on another device."""
        return TopKPrior(self.values_CK.to(device), self.indices_CK.to(device), self.rest_C.to(device))

    @property
    def shape(self) -> tuple[int, int]:
        """(C, C), that of the dense prior."""
        return len(self.rest_C), len(self.rest_C)

    @property
    def device(self) -> torch.device:
        """Where the prior lies."""
        return self.values_CK.device


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
    """Weights of the kept entries, (b, K), and of each other entry, (b, 1)."""
    values_bK = prior.values_CK.index_select(0, labels_b).to(dtype).pow_(gamma)
    return values_bK, prior.rest_C.index_select(0, labels_b).to(dtype).pow_(gamma).unsqueeze(1)
