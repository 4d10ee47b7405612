"""Initialisation of a new student's weights.

To add one: a subclass of ``Initialisation`` with a ``name`` of its own in a file of its own, and its entry in
``INITIALISATIONS``.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from clipdistill.models.towers import FrozenModel, Student
from clipdistill.settings import Settings, union_of


class Initialisation(Settings):
    """Changes the student's weights after it was built, before the first step of a new run."""

    def apply(self, student: Student, teachers: Sequence[FrozenModel]) -> None:
        """Change the student's weights in place; everything is on the CPU.

        Raises:
            InputError: the student is not supported.
        """
        raise NotImplementedError


class OwnWeights(Initialisation):
    """Keep the model's weights: those of ``student.pretrained``, or random ones."""

    name: Literal["own"] = "own"
    """Selects this initialisation."""

    def apply(self, student: Student, teachers: Sequence[FrozenModel]) -> None:
        """Change nothing."""


INITIALISATIONS: tuple[type[Initialisation], ...] = (OwnWeights,)
"""All initialisations that a config may name."""

if TYPE_CHECKING:
    AnyInitialisation = Initialisation
else:
    AnyInitialisation = union_of(INITIALISATIONS, "name", default="own")
