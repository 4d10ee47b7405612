"""Adversarial images: projected gradient ascent inside a ball around each image.

Sources: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks" (arXiv 1706.06083), equation in
section 2.1; its step in the L2 norm follows the normalised gradient.

Shapes: B images, C channels, H height, W width.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
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
