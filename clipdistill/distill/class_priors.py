"""The class priors of an objective: one per teacher and per term that uses one; of two-sided terms the student's own.

Shapes: B rows of this rank, C classes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from clipdistill.distributed.collectives import own_part, sum_over_ranks
from clipdistill.losses import ClassPrior, Loss, TopKPrior


class ClassPriors:
    """Class priors by term and teacher.

    Args:
        terms: of the objective.
        teachers: number of teachers.
        num_classes: C.
        device: device of the priors.
    """

    def __init__(self, terms: Sequence[Loss], *, teachers: int, num_classes: int, device: torch.device | str) -> None:
        self._priors = {
            f"{term.term_name}/{teacher}": ClassPrior(num_classes, device)
            for term in terms
            if term.prior_temperature is not None
            for teacher in range(1 if term.is_two_sided else teachers)
        }
        self._own = {f"{term.term_name}/0" for term in terms if term.is_two_sided}
        self.complete = False
        """Whether the teachers' priors are final: means over all stored views of a teacher cache."""

    @property
    def of_teachers(self) -> bool:
        """Whether there are any of a teacher's predictions."""
        return bool(self._priors.keys() - self._own)

    def get(self, term: Loss, teacher: int) -> Tensor | TopKPrior | None:
        """The current prior; None if the term uses none."""
        prior = self._priors.get(f"{term.term_name}/{teacher}")
        return None if prior is None else prior.prior

    def observe(self, term: Loss, teacher: int, logits_BC: Tensor, labels_B: Tensor) -> None:
        """Add predictions to the prior of the next epoch.

        Args:
            term: that uses the prior.
            teacher: number of the teacher; 0 for a two-sided term.
            logits_BC: the teacher's; of a two-sided term the student's for clean images.
            labels_B: the classes.
        """
        if term.prior_temperature is not None:
            probability_BC = (logits_BC / term.prior_temperature).softmax(dim=-1)
            self._priors[f"{term.term_name}/{teacher}"].add(probability_BC, labels_B)

    def end_epoch(self, *, of_teachers: bool = True, own: bool = True) -> None:
        """Replace the priors by the means of the epoch.

        Args:
            of_teachers: those of teachers' predictions.
            own: those of the student's.
        """
        for name, prior in self._priors.items():
            if own if name in self._own else of_teachers:
                prior.end_epoch(sum_over_ranks)

    def shared_state(self) -> dict[str, Tensor]:
        """The current priors, the same on all ranks."""
        return {f"{name}{part}": x for name, prior in self._priors.items() for part, x in prior.tensors().items()}

    def state_dict(self) -> dict[str, Any]:
        """This rank's sums of the current epoch."""
        return {
            "complete": self.complete,
            "sums": {name: prior.sum_CC.cpu() for name, prior in self._priors.items()},
            "counts": {name: prior.count_C.cpu() for name, prior in self._priors.items()},
        }

    def load_shared_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Use saved priors."""
        for name, prior in self._priors.items():
            prior.load_tensors({part: tensors[f"{name}{part}"] for part in prior.tensors()})

    def load_state_dict(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Restore the sums of all ranks that saved; the number of ranks may have changed."""
        self.complete = states[0]["complete"]
        for name, prior in self._priors.items():
            prior.sum_CC = own_part([state["sums"][name] for state in states]).to(prior.sum_CC.device)
            prior.count_C = own_part([state["counts"][name] for state in states]).to(prior.count_C.device)
