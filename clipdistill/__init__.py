"""clipdistill: distil a large OpenCLIP teacher into a small zero-shot student."""

from importlib.metadata import version

__version__ = version("clipdistill")
