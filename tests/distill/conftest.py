"""What the tests of a step share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from clipdistill.models.loading import load_frozen_model
from clipdistill.models.towers import FrozenModel


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def teacher(teacher_folder: Path) -> FrozenModel:
    return load_frozen_model(f"local-dir:{teacher_folder}")
