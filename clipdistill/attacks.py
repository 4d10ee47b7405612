"""Adversarial images: gradient ascent inside a ball around each image.

Sources: ``pgd``, Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks" (arXiv 1706.06083),
equation in section 2.1; its step in the L2 norm follows the normalised gradient. ``apgd``, Croce and Hein, "Reliable
evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks" (arXiv 2003.01690), Algorithm 1
and the losses of section 4. Its published libraries do not install beside current packaging tools, or differ from the
algorithm.

Shapes: B images, b of them, C channels or classes, H height, W width, K steps.
"""

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Norm = Literal["linf", "l2"]
"""linf: each value of an image moves by at most epsilon; l2: the image moves by at most epsilon in Euclidean length."""

_TINY = 1e-12


def pgd(
    objective: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    epsilon: float,
    step_size: float,
    steps: int,
    start: Tensor | None = None,
    norm: Norm = "linf",
) -> Tensor:
    """Images near the given ones that raise an objective: projected gradient ascent (PGD).

        linf    x <- P(x + step_size * sign(g))
        l2      x <- P(x + step_size * g / |g|_2)       one length for each image

    with ``g`` the objective's gradient at x, and P the projection onto the ball of radius epsilon around the image, and
    onto [0, 1].

    Parameters get no gradient. Put the network into evaluation mode before, and wrap no gradient synchronisation around
    it: the objective runs once a step, on some rank perhaps alone.

    Args:
        objective: of images (B, C, H, W) to a 0-d tensor, which is maximised. Its terms belong to one image each, as in
            a mean over the batch: in the L2 norm each image has a step of its own.
        images: (B, C, H, W) or any (B, ...), floating type, values in [0, 1].
        epsilon: radius of the ball, in units of pixel values, above 0.
        step_size: length of a step, above 0.
        steps: number of steps, 1 or more.
        start: first iterate, before its projection, such as images with noise; None: the images.
        norm: of the ball and of the steps.

    Returns:
        The images after the last step, as ``images`` in shape, type and device, with values in [0, 1] and no gradient.
        A gradient that is not finite makes them nan.

    Raises:
        ValueError: a setting out of its range, images or start of another shape or type, an objective that is not 0-d
            or does not depend on the images.

    Example:
        >>> import torch
        >>> image = torch.full((1, 3), 0.5)
        >>> pgd(lambda x: x.sum(), image, epsilon=0.25, step_size=0.125, steps=4)
        tensor([[0.7500, 0.7500, 0.7500]])
    """
    _check(images, start, epsilon=epsilon, step_size=step_size, steps=steps, norm=norm)
    centre = images.detach()
    current = centre if start is None else start.detach()
    for _ in range(steps):
        gradient = _gradient(objective, current)
        current = _project(current + step_size * _direction(gradient, norm), centre, epsilon=epsilon, norm=norm)
    return current


def _direction(gradient: Tensor, norm: Norm) -> Tensor:
    if norm == "l2":
        return gradient / _lengths(gradient).clamp(min=_TINY)
    return gradient.sign() + 0 * gradient  # the sign of nan is 0


def apgd(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float,
    steps: int = 100,
    loss: Literal["ce", "dlr"] = "ce",
    targets: Tensor | None = None,
    start: Tensor | None = None,
    norm: Norm = "linf",
) -> Tensor:
    """Images near the given ones that a classifier gets wrong: auto-PGD, whose step size adapts to each image.

    Steps are twice epsilon long at first, with momentum. At checkpoints the step of an image is halved, and the search
    goes on from its best point, where the loss has risen in fewer than three quarters of the steps since the last one,
    or neither its step nor its best loss has changed.

        ce            cross-entropy; towards targets: its negative at the target
        dlr           -(z_y - max_{i != y} z_i) / (z_1 - z_3)
        dlr, targets  -(z_y - z_t) / (z_1 - (z_3 + z_4) / 2)           z_1 >= z_2 >= ... the sorted logits

    Args:
        model: of images (B, ...) with values in [0, 1] to logits (B, C).
        images: (B, ...), floating type, values in [0, 1].
        labels: (B,), the classes.
        epsilon: radius of the ball, above 0.
        steps: number of steps.
        loss: that is maximised; dlr needs C >= 3, with targets C >= 4.
        targets: (B,), classes to move towards, none of them the image's own; None: away from its own.
        start: first iterate before its projection; None: uniform noise (linf) or a random direction of length epsilon.
        norm: of the ball and of the steps.

    Returns:
        For each image the last iterate that the model got wrong, else that of the highest loss; no gradient.

    Raises:
        ValueError: as ``pgd``; too few classes; targets that are the images' own classes.
    """
    _check(images, start, epsilon=epsilon, step_size=epsilon, steps=steps, norm=norm)
    if targets is not None and (targets == labels).any():
        raise ValueError("targets must differ from the labels")
    centre = images.detach()
    if start is None:
        start = centre + _random_offset(centre, epsilon, norm)

    def evaluate(current: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            watched = current.detach().requires_grad_()
            logits_BC = model(watched)
            loss_B = attack_loss(logits_BC, labels, loss, targets)
            gradient = torch.autograd.grad(loss_B.sum(), watched)[0]
        return loss_B.detach(), gradient, logits_BC.argmax(1) != labels

    current = _project(start.detach(), centre, epsilon=epsilon, norm=norm)
    loss_B, gradient, wrong_B = evaluate(current)
    best, best_gradient, best_loss_B = current.clone(), gradient.clone(), loss_B.clone()
    found = _choose(wrong_B, current, centre)
    ever_wrong_B = wrong_B.clone()
    size_B = torch.full_like(loss_B, 2 * epsilon)
    rises_B, best_at_check_B, halved_B = torch.zeros_like(loss_B), loss_B.clone(), torch.ones_like(wrong_B)
    before, checks, last_check = current, checkpoints(steps), 0
    for step in range(1, steps + 1):
        direction = _direction(gradient, norm)
        moved = _project(current + _per_image(size_B, current) * direction, centre, epsilon=epsilon, norm=norm)
        if step > 1:
            moved = current + _MOMENTUM * (moved - current) + (1 - _MOMENTUM) * (current - before)
            moved = _project(moved, centre, epsilon=epsilon, norm=norm)
        before, current = current, moved
        previous_B = loss_B
        loss_B, gradient, wrong_B = evaluate(current)
        found, ever_wrong_B = _choose(wrong_B, current, found), ever_wrong_B | wrong_B
        rises_B += loss_B > previous_B
        better_B = loss_B > best_loss_B
        best, best_gradient = _choose(better_B, current, best), _choose(better_B, gradient, best_gradient)
        best_loss_B = torch.where(better_B, loss_B, best_loss_B)
        if step in checks:
            stalled_B = rises_B < _RISING * (step - last_check)
            stuck_B = ~halved_B & (best_loss_B <= best_at_check_B)
            halved_B = stalled_B | stuck_B
            size_B = torch.where(halved_B, size_B / 2, size_B)
            current, gradient = _choose(halved_B, best, current), _choose(halved_B, best_gradient, gradient)
            loss_B = torch.where(halved_B, best_loss_B, loss_B)
            rises_B, best_at_check_B, last_check = torch.zeros_like(rises_B), best_loss_B.clone(), step
    return _choose(ever_wrong_B, found, best)


_MOMENTUM = 0.75
"""Share of the new step; the rest repeats the last one."""
_RISING = 0.75
"""Share of steps that have to raise the loss, else the step is halved."""


def checkpoints(steps: int) -> set[int]:
    """Steps at which ``apgd`` reconsiders step sizes: 0.22 of all, then ever shorter periods, by 0.03 down to 0.06."""
    percents = [0, 22]
    while percents[-1] <= 100:
        percents.append(percents[-1] + max(percents[-1] - percents[-2] - 3, 6))
    return {-(-percent * steps // 100) for percent in percents[1:]}


def attack_loss(logits_BC: Tensor, labels_B: Tensor, loss: str, targets_B: Tensor | None) -> Tensor:
    """The losses of ``apgd``, (B,)."""
    if loss == "ce":
        if targets_B is not None:
            return -F.cross_entropy(logits_BC, targets_B, reduction="none")
        return F.cross_entropy(logits_BC, labels_B, reduction="none")
    least = 3 if targets_B is None else 4
    if logits_BC.shape[1] < least:
        raise ValueError(f"loss dlr needs {least} classes or more, got {logits_BC.shape[1]}")
    top_BK = logits_BC.topk(least, dim=1).values
    own_B = logits_BC.gather(1, labels_B[:, None]).squeeze(1)
    if targets_B is None:
        other_B = logits_BC.scatter(1, labels_B[:, None], -math.inf).amax(1)
        return (other_B - own_B) / (top_BK[:, 0] - top_BK[:, 2]).clamp(min=_TINY)
    other_B = logits_BC.gather(1, targets_B[:, None]).squeeze(1)
    return (other_B - own_B) / (top_BK[:, 0] - (top_BK[:, 2] + top_BK[:, 3]) / 2).clamp(min=_TINY)


def _random_offset(images: Tensor, epsilon: float, norm: Norm) -> Tensor:
    if norm == "linf":
        return epsilon * (2 * torch.rand_like(images) - 1)
    noise = torch.randn_like(images)
    return epsilon * noise / _lengths(noise)


def _per_image(values_B: Tensor, images: Tensor) -> Tensor:
    return values_B.view(-1, *[1] * (images.ndim - 1))


def _choose(condition_B: Tensor, images: Tensor, others: Tensor) -> Tensor:
    return torch.where(_per_image(condition_B, images), images, others)


def _gradient(objective: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    with torch.enable_grad():
        watched = images.detach().requires_grad_()
        value = objective(watched)
        if value.ndim != 0:
            raise ValueError(f"objective must return a 0-d tensor, got shape {tuple(value.shape)}")
        if not value.requires_grad:
            raise ValueError("objective must depend on the images: it gives no gradient")
        (gradient,) = torch.autograd.grad(value, watched, allow_unused=True)
    if gradient is None:
        raise ValueError("objective must depend on the images: it gives no gradient")
    return gradient


def _project(images: Tensor, centre: Tensor, *, epsilon: float, norm: Norm) -> Tensor:
    if norm == "linf":
        images = images.clamp(centre - epsilon, centre + epsilon)
    else:
        offset = images - centre
        images = centre + offset * (epsilon / _lengths(offset).clamp(min=epsilon))
    return images.clamp(0, 1)


def _lengths(images: Tensor) -> Tensor:
    """Euclidean length of each image, (B, 1, ...)."""
    return torch.linalg.vector_norm(images, dim=tuple(range(1, images.ndim)), keepdim=True)


def _check(images: Tensor, start: Tensor | None, *, epsilon: float, step_size: float, steps: int, norm: str) -> None:
    if norm not in get_args(Norm):
        raise ValueError(f"norm must be one of {', '.join(get_args(Norm))}, got {norm!r}")
    for name, value in (("epsilon", epsilon), ("step_size", step_size)):
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} must be a finite number above 0, got {value}")
    if steps < 1:
        raise ValueError(f"steps must be 1 or more, got {steps}")
    if not images.is_floating_point() or images.ndim < 2:
        raise ValueError(f"images must be (B, ...) of a floating type, got {tuple(images.shape)} of {images.dtype}")
    if start is not None and (start.shape != images.shape or start.dtype != images.dtype):
        raise ValueError(
            f"start must be as images, {tuple(images.shape)} {images.dtype}, got {tuple(start.shape)} {start.dtype}"
        )
