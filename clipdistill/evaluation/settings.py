"""Settings of the evaluation during and after training."""

from pydantic import Field

from clipdistill.io.images import DecodingSettings
from clipdistill.settings import Count, CountOrZero, LocalPath


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
    batch_size: Count = 256
    """Images encoded at once."""
    workers: CountOrZero = 0
    """Decoding threads; 0: one per core."""

    @property
    def images(self) -> DecodingSettings:
        """How images are decoded, alone."""
        return DecodingSettings(decoding=self.decoding, max_pixels=self.max_pixels)
