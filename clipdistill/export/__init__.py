"""Export a model: one folder that open_clip, transformers and onnxruntime load, verified against it, with a card.

``export_open_clip`` writes open_clip's format alone, as training does; ``clipdistill export`` writes the rest.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipdistill.export.open_clip_format import PARITY_BOUND, export_open_clip

__all__ = ["PARITY_BOUND", "export_open_clip"]


def __getattr__(name: str) -> Any:
    """Import torch and open_clip on first use: ``clipdistill export --help`` needs neither."""
    if name in __all__:
        from clipdistill.export import open_clip_format

        return getattr(open_clip_format, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
