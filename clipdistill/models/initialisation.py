"""Where the weights of a new student come from.

To add one: a subclass of ``Initialisation`` with a ``name`` of its own in a file of its own, and its place in
``INITIALISATIONS``.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from clipdistill.models.towers import FrozenModel, Student
from clipdistill.settings import Settings, union_of


class Initialisation(Settings):
    """What is done to the student's weights after it was built, before the first step of a new run."""

    def apply(self, student: Student, teachers: Sequence[FrozenModel]) -> None:
        """Change the student's weights in place; everything is on the CPU.

        Raises:
            InputError: the student does not fit.
        """
        raise NotImplementedError


class OwnWeights(Initialisation):
    """Keep what the model has: the weights of ``student.pretrained``, or random ones."""

    name: Literal["own"] = "own"
    """Which initialisation."""

    def apply(self, student: Student, teachers: Sequence[FrozenModel]) -> None:
        """Change nothing."""


INITIALISATIONS: tuple[type[Initialisation], ...] = (OwnWeights,)
"""Every initialisation that a config may name."""

if TYPE_CHECKING:
    AnyInitialisation = Initialisation
else:
    AnyInitialisation = union_of(INITIALISATIONS, "name", default="own")
