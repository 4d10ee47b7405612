"""Metrics against independent ones: scikit-learn, SciPy, plain loops."""

import math

import numpy as np
import pytest
import scipy.stats
import sklearn.linear_model
import sklearn.metrics
import torch

from clipdistill.errors import InputError
from clipdistill.evaluation.agreement import agreement_metrics, class_gains
from clipdistill.evaluation.calibration import (
    calibration_metrics,
    expected_calibration_error,
    fit_temperature,
    reliability,
)
from clipdistill.evaluation.classification import average_precision, classification_metrics, recall_per_class
from clipdistill.evaluation.encoding import SetFeatures
from clipdistill.evaluation.linear_probe import STRENGTHS, linear_probe
from clipdistill.evaluation.predictions import Predictions
from clipdistill.evaluation.retrieval import retrieval_metrics
from clipdistill.evaluation.robustness import BaselineLine, fit_lines, robustness_metrics


def predictions(
    logits_NC: torch.Tensor,
    labels_N: torch.Tensor,
    *,
    unreadable: tuple[int, ...] = (),
    truth_NC: torch.Tensor | None = None,
) -> Predictions:
    readable_N = torch.ones(len(logits_NC), dtype=torch.bool)
    readable_N[list(unreadable)] = False
    logits_NC = logits_NC.clone()
    logits_NC[~readable_N] = torch.nan
    return Predictions(
        logits_NC=logits_NC,
        readable_N=readable_N,
        labels_N=labels_N,
        truth_NC=truth_NC,
        keys=tuple(map(str, range(len(logits_NC)))),
        unreadable=tuple(f"sample {number}" for number in unreadable),
    )


def features(
    image_ND: torch.Tensor, *, labels_N: torch.Tensor | None = None, unreadable: tuple[int, ...] = ()
) -> SetFeatures:
    count = len(image_ND)
    readable_N = torch.ones(count, dtype=torch.bool)
    readable_N[list(unreadable)] = False
    image_ND = image_ND.clone()
    image_ND[~readable_N] = 0
    return SetFeatures(
        kind="classification",
        image_ND=image_ND,
        readable_N=readable_N,
        unreadable=tuple(f"sample {number}" for number in unreadable),
        text_MD=torch.zeros(0, image_ND.shape[1]),
        owner_M=torch.zeros(0, dtype=torch.long),
        keys=tuple(map(str, range(count))),
        labels_N=torch.zeros(count, dtype=torch.long) if labels_N is None else labels_N,
        classes=((),) * count,
        ambiguous=0,
    )


@pytest.fixture
def random() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of 400 samples over 12 classes, right more often than by chance; class 7 has no sample."""
    generator = torch.Generator().manual_seed(0)
    labels_N = torch.randint(0, 12, (400,), generator=generator)
    labels_N[labels_N == 7] = 8
    logits_NC = 3 * torch.randn(400, 12, generator=generator)
    logits_NC[torch.arange(400), labels_N] += 3
    return logits_NC, labels_N


def test_accuracies_are_those_of_scikit_learn(random: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits_NC, labels_N = random
    metrics = classification_metrics(predictions(logits_NC, labels_N))
    guesses = logits_NC.argmax(1)
    assert metrics["acc1"] == pytest.approx(sklearn.metrics.accuracy_score(labels_N, guesses), abs=1e-12)
    top5 = sklearn.metrics.top_k_accuracy_score(labels_N, logits_NC, k=5, labels=range(12))
    assert metrics["acc5"] == pytest.approx(top5, abs=1e-12)
    recall = sklearn.metrics.recall_score(labels_N, guesses, labels=sorted(set(labels_N.tolist())), average="macro")
    assert metrics["mean_per_class_recall"] == pytest.approx(recall, abs=1e-12)
    assert classification_metrics(predictions(logits_NC[:, :4], labels_N % 4))["acc5"] is None


def test_unreadable_images_count_as_wrong(random: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Even where the true class is 0, which argmax says of a row of NaN."""
    logits_NC, labels_N = random
    bad = (3, 50, 399)
    labels_N[list(bad)] = 0
    whole = logits_NC.argmax(1) == labels_N
    whole[list(bad)] = False
    metrics = classification_metrics(predictions(logits_NC, labels_N, unreadable=bad), temperature=True)
    assert metrics["acc1"] == pytest.approx(float(whole.sum()) / 400)
    assert metrics["unreadable"] == 3
    by_class = [float(whole[labels_N == label].double().mean()) for label in range(12) if label != 7]
    assert metrics["mean_per_class_recall"] == pytest.approx(np.mean(by_class))
    assert all(value is None or math.isfinite(value) for value in metrics.values())


def test_average_precision_is_a_plain_loop(random: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits_NC, _ = random
    truth_NC = torch.rand(400, 12, generator=torch.Generator().manual_seed(1)) < 0.2
    truth_NC[:, 4] = False
    found = average_precision(predictions(logits_NC, torch.full((400,), -1), truth_NC=truth_NC))
    for number in range(12):
        hits, total = 0, 0.0
        for rank, sample in enumerate(sorted(range(400), key=lambda n: -logits_NC[n, number].item()), start=1):
            if truth_NC[sample, number]:
                hits += 1
                total += hits / rank
        assert found[number].item() == pytest.approx(total / max(hits, 1), abs=1e-12)
    without = [n for n in range(400) if n not in (0, 9)]
    kept = average_precision(
        predictions(logits_NC[without], torch.full((398,), -1), truth_NC=truth_NC[without])
    ) * truth_NC[without].sum(0)
    unread = predictions(logits_NC, torch.full((400,), -1), truth_NC=truth_NC, unreadable=(0, 9))
    torch.testing.assert_close(average_precision(unread) * truth_NC.sum(0), kept)


def test_agreement_is_that_of_scipy(random: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits_NC, labels_N = random
    teacher_NC = logits_NC + torch.randn(400, 12, generator=torch.Generator().manual_seed(2))
    teacher_NC[5, 3] = teacher_NC[5, 4]  # a tie
    metrics = agreement_metrics(predictions(logits_NC, labels_N), predictions(teacher_NC, labels_N))
    ours, theirs = (torch.softmax(each.double(), 1).numpy() for each in (logits_NC, teacher_NC))
    assert metrics["teacher_kl"] == pytest.approx(np.mean(scipy.stats.entropy(theirs, ours, axis=1)), rel=1e-9)
    rows = zip(logits_NC.numpy(), teacher_NC.numpy(), strict=True)
    expected = np.mean([scipy.stats.spearmanr(*row).statistic for row in rows])
    assert metrics["teacher_rank_correlation"] == pytest.approx(expected, rel=1e-9)
    same = sum(a == b for a, b in zip(logits_NC.argmax(1).tolist(), teacher_NC.argmax(1).tolist(), strict=True))
    assert metrics["teacher_agreement"] == same / 400
    with pytest.raises(ValueError, match="400 and 399 samples; allowed: one set"):
        agreement_metrics(predictions(logits_NC, labels_N), predictions(teacher_NC[1:], labels_N[1:]))


def test_share_of_the_teacher_and_gains_by_class(random: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits_NC, labels_N = random
    teacher_NC = logits_NC.clone()
    teacher_NC[torch.arange(400), labels_N] += 2
    teacher_NC[labels_N == 2, 2] = -100
    student, teacher = predictions(logits_NC, labels_N), predictions(teacher_NC, labels_N)
    metrics = classification_metrics(student, teacher)
    assert metrics["teacher_acc1"] == classification_metrics(teacher)["acc1"]
    assert metrics["share_of_teacher"] == pytest.approx(metrics["acc1"] / metrics["teacher_acc1"])  # type: ignore[operator]
    names = tuple("abcdefghijkl")
    gains = class_gains(recall_per_class(student), recall_per_class(teacher), labels_N, names)
    assert gains[0].name == "c"
    assert gains[0].teacher == 0
    assert gains[0].gain > 0 >= gains[-1].gain
    assert "h" not in {each.name for each in gains}
    assert sum(each.samples for each in gains) == 400
    assert sum(each.samples * each.student for each in gains) / 400 == pytest.approx(metrics["acc1"])


def test_calibration_error_is_a_plain_loop(random: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits_NC, labels_N = random
    gaps = [0.0] * 15
    for logits, label in zip(logits_NC.double(), labels_N.tolist(), strict=True):
        probabilities = torch.softmax(logits, 0)
        confidence = probabilities.max().item()
        number = min(range(15), key=lambda n: 0 if n / 15 < confidence <= (n + 1) / 15 else 1)
        gaps[number] += confidence - float(probabilities.argmax() == label)
    assert expected_calibration_error(logits_NC, labels_N) == pytest.approx(sum(map(abs, gaps)) / 400, abs=1e-6)
    diagram = reliability(logits_NC, labels_N)
    assert len(diagram) == 15
    assert sum(each.samples for each in diagram) == 400
    assert all((each.accuracy is None) == (each.samples == 0) for each in diagram)


def test_temperature_finds_the_one_that_labels_were_drawn_with() -> None:
    generator = torch.Generator().manual_seed(3)
    logits_NC = 4 * torch.randn(20_000, 5, generator=generator)
    labels_N = torch.multinomial(torch.softmax(logits_NC / 2.5, 1), 1, generator=generator)[:, 0]
    assert fit_temperature(logits_NC, labels_N) == pytest.approx(2.5, rel=0.05)
    metrics = calibration_metrics(logits_NC, labels_N)
    assert metrics["temperature"] == pytest.approx(2.5, rel=0.05)
    assert metrics["ece_tempered"] < 0.02 < expected_calibration_error(logits_NC, labels_N)  # type: ignore[operator]


def test_retrieval_with_unreadable_images_and_few_candidates() -> None:
    """Images 0..3; image 2 cannot be read: it is not found, finds nothing, and is in nobody's way."""
    image_ND = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0.6, 0.8, 0]])
    text_MD = torch.tensor([[1.0, 0, 0], [0.9, -0.43, 0], [0, 1, 0], [0, 0, 1], [0.7, 0.71, 0], [-1, 0, 0]])
    each = features(image_ND, unreadable=(2,))
    found = SetFeatures(**{**vars(each), "text_MD": text_MD, "owner_M": torch.tensor([0, 0, 1, 2, 3, 3])})
    metrics = retrieval_metrics(found)
    assert metrics["image_retrieval_recall@1"] == pytest.approx(4 / 6)
    assert metrics["text_retrieval_recall@1"] == pytest.approx(3 / 4)
    assert metrics["mean_recall@1"] == pytest.approx((4 / 6 + 3 / 4) / 2)
    assert metrics["image_retrieval_recall@5"] is None
    assert metrics["text_retrieval_recall@5"] == pytest.approx(3 / 4)
    assert metrics["text_retrieval_recall@10"] is None
    assert metrics["unreadable"] == 1


def _blobs(count: int, *, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(6, 16, generator=torch.Generator().manual_seed(9))
    labels_N = torch.arange(count) % 6
    noisy = centres[labels_N] + 1.3 * torch.randn(count, 16, generator=generator)
    return torch.nn.functional.normalize(noisy, dim=1), labels_N


def test_linear_probe_chooses_its_penalty_on_held_out_samples() -> None:
    (train_ND, labels_N), (test_ND, truth_N) = _blobs(300, seed=0), _blobs(200, seed=1)
    train, test = features(train_ND, labels_N=labels_N), features(test_ND, labels_N=truth_N, unreadable=(0, 6))
    metrics = linear_probe(train, test, classes=6)
    held_out = np.array([(number // 6) % 5 == 1 for number in range(300)])
    scores = {}
    for strength in STRENGTHS:
        probe = sklearn.linear_model.LogisticRegression(C=strength, max_iter=1000)
        probe.fit(train_ND[~held_out].double(), labels_N[~held_out])
        scores[strength] = probe.score(train_ND[held_out].double(), labels_N[held_out])
    best = max(scores, key=lambda strength: (scores[strength], -strength))
    assert metrics["lp_c"] == best
    probe = sklearn.linear_model.LogisticRegression(C=best, max_iter=1000).fit(train_ND.double(), labels_N)
    right = probe.predict(test_ND.double()) == truth_N.numpy()
    right[[0, 6]] = False
    assert metrics["lp_acc1"] == pytest.approx(right.mean())
    assert metrics["lp_acc1"] > 0.5
    assert metrics["lp_acc5"] > metrics["lp_acc1"]  # type: ignore[operator]
    assert (metrics["unreadable"], metrics["unreadable_train"]) == (2, 0)
    assert metrics == linear_probe(train, test, classes=6)


def test_linear_probe_needs_two_classes() -> None:
    train = features(torch.randn(5, 4), labels_N=torch.zeros(5, dtype=torch.long))
    with pytest.raises(InputError, match="has 1 class; allowed: 2 or more"):
        linear_probe(train, train, classes=2)


def test_robustness_compares_over_the_classes_of_the_shift(random: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits_NC, labels_N = random
    names, kept = tuple("abcdefghijkl"), ("d", "b", "k")
    base = predictions(logits_NC, labels_N)
    shift_NC, shift_N = torch.randn(30, 3, generator=torch.Generator().manual_seed(4)), torch.arange(30) % 3
    line = BaselineLine(slope=0.9, intercept=-0.5, models=4)
    metrics = robustness_metrics((names, base), {"s": (kept, predictions(shift_NC, shift_N))}, {"s": line})
    rows = [n for n in range(400) if names[int(labels_N[n])] in kept]
    guesses = [kept[int(logits_NC[n, [3, 1, 10]].argmax())] for n in rows]
    expected = np.mean([guess == names[int(labels_N[n])] for guess, n in zip(guesses, rows, strict=True)])
    assert metrics["s/base_acc1"] == pytest.approx(expected)
    assert metrics["s/acc1"] == pytest.approx((shift_NC.argmax(1) == shift_N).double().mean())
    assert metrics["s/drop"] == pytest.approx(metrics["s/base_acc1"] - metrics["s/acc1"])  # type: ignore[operator]
    odds = (expected / (1 - expected)) ** 0.9 * math.exp(-0.5)
    assert metrics["s/effective_robustness"] == pytest.approx(metrics["s/acc1"] - odds / (1 + odds))  # type: ignore[operator]


def test_robustness_knows_classes_in_another_spelling(
    random: tuple[torch.Tensor, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    base = predictions(*random)
    names = [f"Class-{letter}" for letter in "abcdefghijkl"]
    shift = predictions(torch.randn(30, 3, generator=torch.Generator().manual_seed(4)), torch.arange(30) % 3)

    def base_accuracy(*kept: str) -> object:
        return robustness_metrics((names, base), {"s": (kept, shift)})["s/base_acc1"]

    exact = base_accuracy("Class-d", "Class-b", "Class-k")
    assert base_accuracy("class d", "Class-b", "class_k") == exact
    assert not caplog.records
    everything = base_accuracy("class d", "Class-b", "dog")
    assert everything == robustness_metrics((names, base), {})["base_acc1"] != exact
    assert "1 of the 3 classes of s are not among the base set's (such as 'dog')" in caplog.text


def _result(base: float, shift: float, *, model: str) -> dict[str, object]:
    metrics = {"base_acc1": base, "s/acc1": shift, "s/base_acc1": base, "s/drop": base - shift}
    return {
        "dataset": "b",
        "model": model,
        "pretrained": "",
        "task": "robustness",
        "metrics": metrics,
        "language": "en",
    }


def test_lines_are_fitted_in_logits() -> None:
    def logit(x: float) -> float:
        return math.log(x / (1 - x))

    accuracies = (0.3, 0.5, 0.72, 0.81)
    records = [
        _result(x, 1 / (1 + math.exp(-(1.1 * logit(x) - 0.4))), model=str(number))
        for number, x in enumerate(accuracies)
    ]
    line = fit_lines(records, "b", ["s"])["s"]
    assert (line.slope, line.intercept, line.models) == (pytest.approx(1.1), pytest.approx(-0.4), 4)
    with pytest.raises(InputError, match="1 models with results of --task robustness on b and s; allowed: 2 or more"):
        fit_lines(records[:1], "b", ["s"])
    with pytest.raises(InputError, match="an accuracy of 0 or 1 on b or s; allowed: values between 0 and 1"):
        fit_lines([*records, _result(0.6, 0.0, model="x")], "b", ["s"])
