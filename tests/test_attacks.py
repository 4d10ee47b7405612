"""PGD against the authors' attack, closed forms of linear objectives, and the ball that it has to stay in."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from clipdistill.attacks import apgd, attack_loss, checkpoints, pgd
from clipdistill.losses import gkl_loss

GOLDEN = Path(__file__).parent / "losses" / "golden"
CASES = [case for case in json.loads((GOLDEN / "two_sided.json").read_text()) if case["loss"] == "gkl_attack"]
TENSORS = np.load(GOLDEN / "two_sided.npz")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_matches_the_authors_attack(case: dict[str, float]) -> None:
    def golden(name: str) -> Tensor:
        return torch.from_numpy(TENSORS[f"{case['name']}.{name}"])

    def network(images_BCHW: Tensor) -> Tensor:
        hidden_BD = torch.tanh(images_BCHW.flatten(1) @ golden("W1").T + golden("b1"))
        return hidden_BD @ golden("W2").T + golden("b2")

    images_BCHW = golden("images")
    clean_BC = network(images_BCHW)
    settings = {name: case[name] for name in ("alpha", "beta", "gamma")}
    prior = {"class_prior": golden("class_prior"), "labels": golden("labels")}
    attacked_BCHW = pgd(
        lambda images: gkl_loss(network(images), clean_BC, **settings, **prior).loss,  # type: ignore[arg-type]
        images_BCHW,
        epsilon=case["epsilon"],
        step_size=case["step_size"],
        steps=int(case["steps"]),
        start=images_BCHW + 0.001 * golden("start_noise"),
    )
    torch.testing.assert_close(attacked_BCHW, golden("expected_images"), rtol=0, atol=1e-12)


def images_of(seed: int, *, low: float = 0.0, high: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(3, 2, 4, 5, generator=generator, dtype=torch.float64)


def test_a_linear_objective_is_solved() -> None:
    """The optimum in the ball is known: a corner of the cube, or the point in the gradient's direction."""
    images, slope = images_of(0, low=0.4, high=0.6), images_of(1, low=-1)
    found = pgd(lambda x: (x * slope).sum(), images, epsilon=0.1, step_size=0.03, steps=5)
    torch.testing.assert_close(found, images + 0.1 * slope.sign())
    found = pgd(lambda x: (x * slope).sum(), images, epsilon=0.1, step_size=0.03, steps=5, norm="l2")
    lengths = slope.flatten(1).norm(dim=1)[:, None, None, None]
    torch.testing.assert_close(found, images + 0.1 * slope / lengths)


def test_each_image_has_its_own_step() -> None:
    """In the L2 norm, the size of one image's gradient does not matter to the others."""
    images, slope = images_of(0, low=0.4, high=0.6), images_of(1, low=-1)
    sizes = torch.tensor([1e-6, 1.0, 1e6], dtype=torch.float64)[:, None, None, None]
    same, scaled = (
        pgd(lambda x, slope=slope: (x * slope).sum(), images, epsilon=0.1, step_size=0.02, steps=1, norm="l2")
        for slope in (slope, slope * sizes)
    )
    torch.testing.assert_close(same, scaled)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@given(
    seed=st.integers(0, 1000),
    epsilon=st.floats(1e-3, 2.0),
    step=st.floats(1e-4, 5.0),
    steps=st.integers(1, 4),
    noise=st.floats(0, 3.0),
)
def test_images_stay_in_the_ball(norm: str, seed: int, epsilon: float, step: float, steps: int, noise: float) -> None:
    images = images_of(seed)
    start = images + noise * (images_of(seed + 1) - 0.5)
    found = pgd(
        lambda x: (x * images_of(seed + 2, low=-1)).sin().sum(),
        images,
        epsilon=epsilon,
        step_size=step,
        steps=steps,
        start=start,
        norm=norm,  # type: ignore[arg-type]
    )
    offset = (found - images).flatten(1)
    size = offset.abs().amax(1) if norm == "linf" else offset.norm(dim=1)
    assert (size <= epsilon * (1 + 1e-12)).all()
    assert ((found >= 0) & (found <= 1)).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_network_is_fooled_and_left_alone(norm: str) -> None:
    """The loss rises; parameters, their gradients and the graph's mode are as before."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(40, 9), nn.Tanh(), nn.Linear(9, 4)).double()
    images, labels = images_of(3), torch.tensor([0, 1, 2])

    def loss(x: Tensor) -> Tensor:
        return nn.functional.cross_entropy(network(x), labels)

    losses = [loss(images).item()]
    with torch.no_grad():
        for steps in (1, 10):
            found = pgd(loss, images, epsilon=0.1, step_size=0.05, steps=steps, norm=norm)  # type: ignore[arg-type]
            losses.append(loss(found).item())
            assert not found.requires_grad
    assert losses == sorted(losses)
    assert losses[0] < losses[-1]
    assert all(parameter.grad is None for parameter in network.parameters())


def test_values_that_are_not_finite_show() -> None:
    images = images_of(0)
    found = pgd(lambda x: (x * float("nan")).sum(), images, epsilon=0.1, step_size=0.1, steps=1)
    assert found.isnan().all()


def total(images: Tensor) -> Tensor:
    return images.sum()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epsilon": 0.0}, "epsilon must be a finite number above 0, got 0.0"),
        ({"step_size": float("inf")}, "step_size must be a finite number above 0"),
        ({"steps": 0}, "steps must be 1 or more, got 0"),
        ({"norm": "l1"}, "norm must be one of linf, l2, got 'l1'"),
        ({"images": torch.zeros(2, 3, dtype=torch.uint8)}, "images must be"),
        ({"start": torch.zeros(2, 4)}, "start must be as images"),
        ({"objective": lambda x: x.sum(1)}, "objective must return a 0-d tensor"),
        ({"objective": lambda x: x.detach().sum()}, "it gives no gradient"),
        ({"objective": lambda x: torch.ones((), requires_grad=True) * len(x)}, "it gives no gradient"),
    ],
)
def test_wrong_input_is_named(changes: dict[str, object], message: str) -> None:
    settings: dict[str, object] = {
        "objective": total,
        "images": torch.zeros(2, 3),
        "epsilon": 0.1,
        "step_size": 0.1,
        "steps": 1,
    }
    call: Callable[..., Tensor] = pgd
    with pytest.raises(ValueError, match=message):
        call(**(settings | changes))


# APGD.


def linear_problem(seed: int, *, classes: int = 5) -> tuple[nn.Module, Tensor, Tensor]:
    """A linear classifier, and images in the middle of [0, 1] with the classes that it gives them."""
    generator = torch.Generator().manual_seed(seed)
    weight_CP = torch.randn(classes, 40, generator=generator, dtype=torch.float64)
    model = nn.Sequential(nn.Flatten(), nn.Linear(40, classes)).double()
    with torch.no_grad():
        model[1].weight.copy_(weight_CP)
        model[1].bias.zero_()
    images = 0.4 + 0.2 * torch.rand(60, 2, 4, 5, generator=generator, dtype=torch.float64)
    return model, images, model(images).argmax(1).detach()


@pytest.mark.parametrize("loss", ["ce", "dlr"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_apgd_breaks_exactly_what_can_be_broken(norm: str, loss: str) -> None:
    """Of a linear classifier the distance to each other class is known; with all targets, APGD reaches the nearest."""
    model, images, labels = linear_problem(0)
    weight_CP, flat_BP = model[1].weight.detach(), images.flatten(1)
    epsilon = {"linf": 0.02, "l2": 0.12}[norm]
    others = [(labels + shift) % 5 for shift in range(1, 5)]
    lengths = [(weight_CP[labels] - weight_CP[t]).norm(p={"linf": 1, "l2": 2}[norm], dim=1) for t in others]
    margins = [((weight_CP[labels] - weight_CP[target]) * flat_BP).sum(1) for target in others]
    breakable_B = torch.stack([m / w for m, w in zip(margins, lengths, strict=True)]).amin(0) < epsilon * 0.999
    broken_B = torch.zeros_like(breakable_B)
    torch.manual_seed(0)
    for target in others:
        found = apgd(
            model,
            images,
            labels,
            epsilon=epsilon,
            loss=loss,  # type: ignore[arg-type]
            targets=target,
            norm=norm,  # type: ignore[arg-type]
        )
        broken_B |= model(found).argmax(1) != labels
    assert 5 < breakable_B.sum() < 55
    assert torch.equal(broken_B, breakable_B)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_apgd_is_as_strong_as_pgd(norm: str, loss: str) -> None:
    """On networks of three layers; in the ball, without gradients of parameters."""
    wrong = {"pgd": 0, "apgd": 0}
    for seed in range(4):
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Flatten(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 6)
        ).double()
        images = torch.rand(40, 2, 4, 5, dtype=torch.float64)
        labels = network(images).argmax(1)
        epsilon = {"linf": 0.05, "l2": 0.25}[norm]
        by_pgd = pgd(
            lambda x, network=network, labels=labels: nn.functional.cross_entropy(network(x), labels, reduction="sum"),
            images,
            epsilon=epsilon,
            step_size=epsilon / 4,
            steps=20,
            norm=norm,  # type: ignore[arg-type]
        )
        found = apgd(network, images, labels, epsilon=epsilon, loss=loss, norm=norm)  # type: ignore[arg-type]
        wrong["pgd"] += int((network(by_pgd).argmax(1) != labels).sum())
        wrong["apgd"] += int((network(found).argmax(1) != labels).sum())
        offset = (found - images).flatten(1)
        size = offset.abs().amax(1) if norm == "linf" else offset.norm(dim=1)
        assert (size <= epsilon * (1 + 1e-12)).all()
        assert ((found >= 0) & (found <= 1)).all()
        assert all(parameter.grad is None for parameter in network.parameters())
    assert 0 < wrong["pgd"] < 160
    assert wrong["apgd"] >= 0.97 * wrong["pgd"]


def test_dlr_is_that_of_the_paper() -> None:
    """Two images, steps of no effect: the best loss decides which iterate comes back, so check the formula directly."""
    logits_BC = torch.tensor([[3.0, 1.0, 0.5, -2.0, 0.0], [1.0, 4.0, 2.0, 0.0, 3.5]])
    labels_B, targets_B = torch.tensor([0, 2]), torch.tensor([2, 0])
    untargeted = [-(3.0 - 1.0) / (3.0 - 0.5), -(2.0 - 4.0) / (4.0 - 2.0)]
    targeted = [-(3.0 - 0.5) / (3.0 - (0.5 + 0.0) / 2), -(2.0 - 1.0) / (4.0 - (2.0 + 1.0) / 2)]
    for targets, expected in ((None, untargeted), (targets_B, targeted)):
        assert attack_loss(logits_BC, labels_B, "dlr", targets).tolist() == pytest.approx(expected)


def test_step_sizes_are_reconsidered_when_the_paper_says() -> None:
    assert sorted(checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99, 105]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": torch.tensor([0, 1])}, "targets must differ from the labels"),
        ({"loss": "dlr"}, "loss dlr needs 3 classes or more, got 2"),
        ({"epsilon": -1.0}, "epsilon must be a finite number above 0"),
    ],
)
def test_wrong_input_of_apgd_is_named(changes: dict[str, object], message: str) -> None:
    settings: dict[str, object] = {
        "model": lambda x: x.flatten(1)[:, :2],
        "images": torch.rand(2, 3),
        "labels": torch.tensor([0, 0]),
        "epsilon": 0.1,
    }
    call: Callable[..., Tensor] = apgd
    with pytest.raises(ValueError, match=message):
        call(**(settings | changes))
