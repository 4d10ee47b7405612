"""Learned linear maps from the student's features into the spaces of teachers whose width differs.

They are trained with the student and saved in checkpoints; an export leaves them out.

Shapes: B samples, D the student's width, E the widths of all such teachers together.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Projections(nn.Module):
    """One map for each teacher of another width, for images and, if needed, for captions.

    Args:
        width: of the student's features.
        teacher_widths: of each teacher's.
        captions: project captions, too.
    """

    def __init__(self, width: int, teacher_widths: Sequence[int], *, captions: bool) -> None:
        super().__init__()
        self.widths = tuple(0 if each == width else each for each in teacher_widths)
        """Width of the projected features for each teacher; 0 for those of the student's width."""
        kinds = ("image", "captions") if captions else ("image",)
        self.maps = nn.ModuleDict(
            {kind: nn.ModuleList(nn.Linear(width, each) for each in self.widths if each) for kind in kinds}
        )

    def forward(self, kind: str, features_BD: Tensor) -> Tensor | None:
        """Unit-norm projections (B, E), float32, one teacher's columns after another's; None of captions without maps.

        Args:
            kind: image or captions.
            features_BD: unit-norm features.
        """
        if kind not in self.maps:
            return None
        with torch.autocast(features_BD.device.type, enabled=False):
            parts = [F.normalize(each(features_BD.float()), dim=-1) for each in self.maps[kind]]  # type: ignore[attr-defined]
        return torch.cat(parts, dim=1)
