"""Settings of the evaluation during and after training."""

from typing import Literal

from pydantic import Field, field_validator

from clipdistill.io.images import DecodingSettings
from clipdistill.settings import Count, CountOrZero, LocalPath, Radius, Settings, check_radius


class AttackedEvaluation(Settings):
    """Accuracy on attacked images, beside that on clean ones: ``robust_acc1``."""

    attack: Literal["pgd", "apgd"] = "pgd"
    """pgd: 20 steps on the cross-entropy; apgd: APGD-CE and targeted APGD-DLR, far slower."""
    norm: Literal["linf", "l2"] = "linf"
    """Norm of the ball."""
    eps: Radius = 4 / 255
    """Radius of the ball, in units of pixels from 0 to 1 at the student's input size; also as a quotient: 4/255."""
    images: Count = 1000
    """Images drawn from each set."""
    seed: CountOrZero = 0
    """Of the draw and of random starts."""

    _fits_into_pixels = field_validator("eps")(check_radius)


class EvaluationSettings(DecodingSettings):
    """Zero-shot evaluation during and after training."""

    folders: list[str] = Field(default_factory=list)
    """Test sets: folders or URLs in CLIP_benchmark's layout, folders of class folders, Hugging Face data sets."""
    split: str = "test"
    """Split of each set."""
    allow_duplicate_classes: bool = False
    """Accept class lists that name a class twice (published ImageNet lists do)."""
    class_counts: LocalPath = ""
    """Training samples of each class, for accuracy on frequent and rare classes: a file, or a folder with
    ``class_counts.json``; empty: that in the split ``train`` of a local set, if there is one."""
    attack: AttackedEvaluation | None = None
    """Also attack the images of sets for classification; empty: no."""
    batch_size: Count = 256
    """Images encoded at once."""
    workers: CountOrZero = 0
    """Decoding threads; 0: one per core."""

    @property
    def images(self) -> DecodingSettings:
        """How images are decoded, alone."""
        return DecodingSettings(decoding=self.decoding, max_pixels=self.max_pixels)
