"""Linear probe: logistic regression on frozen image features, fitted by L-BFGS as in CLIP's own evaluation.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", arXiv 2103.00020,
appendix A.3: scikit-learn's L-BFGS, at most 1,000 iterations, the strength of the L2 penalty chosen on held-out
samples. The features are the unit-norm embeddings, as in CLIP_benchmark's probe. The fit is deterministic.

Shapes: N samples, C classes, D features.
"""

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipdistill.errors import InputError
from clipdistill.evaluation.encoding import SetFeatures

STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0, 10000.0)
"""scikit-learn's C, the inverse of the penalty; ascending, so the strongest penalty is first."""

_HELD_OUT_OF = 5
_ITERATIONS = 1000


def linear_probe(train: SetFeatures, test: SetFeatures, *, classes: int) -> dict[str, float | int | bool | None]:
    """Fit on one split and evaluate on another.

    Every fifth training sample of each class, from its second on, is held out to choose the penalty: the most accurate
    there, of equals the strongest. The probe is then fitted on all training samples.

    Args:
        train: features of the training split; unreadable images are left out.
        test: features of the test split; unreadable images count as wrong.
        classes: C; classes without a training sample are never predicted.

    Returns:
        CLIP_benchmark's ``lp_acc1``, ``lp_acc5`` (None for fewer than 5 classes in training) and
        ``lp_mean_per_class_recall``; ``lp_c``: the C chosen; ``lp_converged``: whether the last fit converged within
        its iterations; ``unreadable`` and ``unreadable_train``: numbers of unreadable images.

    Raises:
        InputError: fewer than two classes in training.
    """
    train_ND, labels_N = _readable(train)
    if len(np.unique(labels_N)) < 2:
        raise InputError(f"linear probe: the training split has {len(np.unique(labels_N))} class; allowed: 2 or more")
    best, best_accuracy = STRENGTHS[0], -1.0
    held_out_N = _held_out(labels_N)
    if held_out_N.any() and len(np.unique(labels_N[~held_out_N])) > 1:
        for strength in STRENGTHS:
            probe, _ = _fit(train_ND[~held_out_N], labels_N[~held_out_N], strength)
            accuracy = float(probe.score(train_ND[held_out_N], labels_N[held_out_N]))
            if accuracy > best_accuracy:
                best, best_accuracy = strength, accuracy
    probe, converged = _fit(train_ND, labels_N, best)
    order_NC = probe.predict_proba(test.image_ND.double().numpy()).argsort(axis=1)[:, ::-1]
    guesses_NC = probe.classes_[order_NC]
    truth_N, readable_N = test.labels_N.numpy(), test.readable_N.numpy()
    hit_N = (guesses_NC[:, 0] == truth_N) & readable_N
    top5_N = (guesses_NC[:, :5] == truth_N[:, None]).any(axis=1) & readable_N
    recalls = [hit_N[truth_N == label].mean() for label in range(classes) if (truth_N == label).any()]
    return {
        "lp_acc1": float(hit_N.mean()),
        "lp_acc5": float(top5_N.mean()) if len(probe.classes_) >= 5 else None,
        "lp_mean_per_class_recall": float(np.mean(recalls)),
        "lp_c": best,
        "lp_converged": converged,
        "unreadable": len(test.unreadable),
        "unreadable_train": len(train.unreadable),
    }


def _readable(features: SetFeatures) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Features and labels of the readable images."""
    readable_N = features.readable_N
    return features.image_ND[readable_N].double().numpy(), features.labels_N[readable_N].numpy()


def _held_out(labels_N: NDArray[np.int64]) -> NDArray[np.bool_]:
    held_out_N = np.zeros(len(labels_N), dtype=bool)
    for label in np.unique(labels_N):
        held_out_N[np.flatnonzero(labels_N == label)[1::_HELD_OUT_OF]] = True
    return held_out_N


def _fit(features_ND: NDArray[np.float64], labels_N: NDArray[np.int64], strength: float) -> tuple[Any, bool]:
    """The fitted probe, and whether it converged."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    probe = LogisticRegression(C=strength, max_iter=_ITERATIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        probe.fit(features_ND, labels_N)
    return probe, int(np.max(probe.n_iter_)) < _ITERATIONS
