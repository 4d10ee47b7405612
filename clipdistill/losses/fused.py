"""GKL and KL directly from the embeddings, without the (B, C) logit matrices.

Each function equals its namesake in ``gkl`` or ``kd`` at ``logits = scale * image @ text.T + bias``, in value and in
gradient, with memory proportional to the embeddings. Two implementations:

- ``tiled`` (``fused_tiled``): PyTorch, over blocks of rows, on any device and for any floating type;
- ``triton`` (``fused_triton``): CUDA kernels for float32, bfloat16 and float16.

A bias added to all logits of a row changes neither a softmax nor a difference of logits: it is omitted from the
arithmetic, its gradient is exactly 0, and one that is not finite still makes the loss nan.

Shape suffixes: B rows of a batch, C classes (or captions), D and E feature widths of student and teacher.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from clipdistill.losses import fused_tiled
from clipdistill.losses._common import LossSum, mean_over_rows, outside_autocast, refuse_second_derivative
from clipdistill.losses.fused_common import (
    FeaturePair,
    FusedImplementation,
    GKLDenominators,
    GKLOutput,
    GKLSums,
    Inputs,
    Weights,
    read_inputs,
)
from clipdistill.losses.prior import TopKPrior


def gkl_loss_from_features(
    student_image: Tensor,
    student_text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    *,
    student_scale: Tensor | float,
    teacher_scale: Tensor | float,
    alpha: float = 1.0,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
    weight_temperature: float = 1.0,
    student_bias: Tensor | float | None = None,
    teacher_bias: Tensor | float | None = None,
    class_prior: Tensor | TopKPrior | None = None,
    labels: Tensor | None = None,
    denominators: GKLDenominators | None = None,
    implementation: FusedImplementation = "auto",
    two_sided: bool = False,
) -> GKLOutput:
    """``gkl_loss`` (arXiv 2503.08038) of ``scale * image @ text.T``, without a matrix of that size.

        soft_ce = sum_b ce_b / B                ce_b = -sum_j softmax(t/T)_bj log_softmax(s/T)_bj
        wmse    = sum_b n_b / sum_b W_b^2       n_b  = 1/2 W_b sum_j w_bj (delta_bj - mu_b)^2

    with ``delta = t - s``, ``w = softmax(t/T2)^gamma`` or ``class_prior[labels]^gamma``, ``W_b = sum_j w_bj`` and
    ``mu_b = sum_j w_bj delta_bj / W_b``.

    Only the gradient of ``.loss`` is computed in the forward pass of the tiled implementation. ``.soft_ce`` and
    ``.wmse`` are also differentiable; that computes the logits again.

    Precision: as ``gkl_loss`` on the same float32 or float64 features. Products of half-precision features are exact
    and summed in float32, so the loss equals that of the same features in float32; gradients are rounded to the
    features' type at the end (``triton`` also rounds the gradient of the logits, to 2^-9 of each).

    Args:
        student_image: (B, D), L2-normalised by the caller, any floating type.
        student_text: (C, D).
        teacher_image: (B, E); E need not be D.
        teacher_text: (C, E).
        student_scale: multiplies the cosines: a model's ``logit_scale.exp()``, a tensor of one element or a number.
        teacher_scale: the same for the teacher.
        alpha: weight of the soft cross-entropy.
        beta: weight of the weighted MSE.
        gamma: in [0, 1]; 1 weights by the teacher's probabilities, 0 uniformly.
        temperature: T of the soft cross-entropy, above 0.
        weight_temperature: T2 of the weights, above 0. Has no effect with a class prior.
        student_bias: added to the student's logits, a tensor of one element or a number.
        teacher_bias: the same for the teacher.
        class_prior: (C, C), any floating type, row c the mean teacher prediction over the samples of class c; or
            its largest entries (not for ``triton``). Only the rows of ``labels`` are read, block by block.
        labels: (B,) integers in [0, C): the class of each row. Given together with class_prior or not at all.
        denominators: those of a larger batch that contains this one: ``loss``, ``soft_ce`` and ``wmse`` are then
            this part's shares, which add up over the parts. Sums of ``gkl_denominators_from_features`` over
            micro-batches and ranks. With them, labels on a GPU are checked without synchronisation, as in
            ``gkl_sums``. Without them, and with ``0 < gamma < 1`` and no prior, the tiled implementation computes
            the teacher's logits twice.
        implementation: ``auto`` is ``tiled``, as the kernels have not been timed on a GPU. (The losses from logits are
            faster below ``FUSED_FROM``.)
        two_sided: whether the gradient of wmse also goes to the teacher's image, text and scale, as in ``gkl_loss``
            (not for ``triton``).

    Returns:
        GKLOutput, 0-d, in nats. The gradient goes to the student's image, text, scale and bias; there is no second
        derivative. A logit that is not finite makes the loss nan or inf.

    Raises:
        ValueError: wrong shapes, types or devices, gamma outside [0, 1], a temperature not above 0, labels outside
            [0, C), class_prior without labels or the reverse, an implementation that cannot run here.

    Example:
        >>> import torch
        >>> image, text = torch.tensor([[1.0, 0.0]], requires_grad=True), torch.eye(2)
        >>> out = gkl_loss_from_features(
        ...     image, text, image.detach(), text, student_scale=1.0, teacher_scale=3.0, beta=0.5, gamma=0.6
        ... )
        >>> out.loss.backward()
        >>> [round(x, 4) for x in (out.soft_ce.item(), out.wmse.item(), out.loss.item())]
        [0.3607, 0.2435, 0.4824]
    """
    inputs = read_inputs(
        "gkl",
        (student_image, student_text, student_scale, student_bias),
        (teacher_image, teacher_text, teacher_scale, teacher_bias),
        temperature=temperature,
        weight_temperature=weight_temperature,
        gamma=gamma,
        class_prior=class_prior,
        labels=labels,
        implementation=implementation,
        wait_for_device=denominators is None,
        two_sided=two_sided,
    )
    if denominators is None and inputs.gradient_comes_first:
        denominators = _uncompiled(_denominators, inputs)
    weights = None if denominators is None else (alpha / denominators.soft_ce, beta / denominators.wmse)
    total, sums = _sums(inputs, weights)
    if denominators is None:
        denominators = GKLDenominators(sums.soft_ce.denominator, sums.wmse.denominator)
    soft_ce, wmse = sums.soft_ce.numerator / denominators.soft_ce, sums.wmse.numerator / denominators.wmse
    return GKLOutput(alpha * soft_ce + beta * wmse if total is None else total, soft_ce, wmse)


@torch.no_grad()
def gkl_denominators_from_features(
    teacher_image: Tensor,
    teacher_text: Tensor,
    *,
    teacher_scale: Tensor | float,
    gamma: float = 1.0,
    weight_temperature: float = 1.0,
    class_prior: Tensor | TopKPrior | None = None,
    labels: Tensor | None = None,
    implementation: FusedImplementation = "auto",
) -> GKLDenominators:
    """The denominators of ``gkl_loss_from_features``, without a student.

    They need the teacher's logits only for ``0 < gamma < 1`` without a class prior. Arguments and errors as for
    ``gkl_loss_from_features``.
    """
    teacher = (teacher_image, teacher_text, teacher_scale, None)
    inputs = read_inputs(
        "gkl",
        teacher,
        teacher,
        temperature=weight_temperature,
        weight_temperature=weight_temperature,
        gamma=gamma,
        class_prior=class_prior,
        labels=labels,
        implementation=implementation,
    )
    return _uncompiled(_denominators, inputs)


def kd_loss_from_features(
    student_image: Tensor,
    student_text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    *,
    student_scale: Tensor | float,
    teacher_scale: Tensor | float,
    temperature: float,
    student_bias: Tensor | float | None = None,
    teacher_bias: Tensor | float | None = None,
    rows: Tensor | None = None,
    implementation: FusedImplementation = "auto",
    two_sided: bool = False,
) -> Tensor:
    """``kd_loss`` (arXiv 1503.02531) of ``scale * image @ text.T``: ``T^2 sum_b KL_b / rows``, 0-d, in nats.

    ``rows`` is the number of rows (0-d) of a larger batch that contains this one; by default, of this batch. Other
    arguments, gradients and errors as for ``gkl_loss_from_features``.
    """
    inputs = read_inputs(
        "kl",
        (student_image, student_text, student_scale, student_bias),
        (teacher_image, teacher_text, teacher_scale, teacher_bias),
        temperature=temperature,
        implementation=implementation,
        two_sided=two_sided,
    )
    one = torch.ones((), dtype=inputs.problem.dtype, device=inputs.features.student_image_BD.device)
    total, sums = _sums(inputs, (one, one))
    divergence = sums.soft_ce.numerator if total is None else total
    return divergence / (sums.soft_ce.denominator if rows is None else rows)


def _uncompiled(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call with a graph break under torch.compile, which would unroll the loops over blocks."""
    if torch.compiler.is_compiling():
        function = torch.compiler.disable(function)
    return function(*arguments)


def _denominators(inputs: Inputs) -> GKLDenominators:
    with torch.no_grad(), outside_autocast(inputs.features.teacher_image_BE):
        mass_B = _engine(inputs).weight_masses(inputs.features, inputs.problem)
        return GKLDenominators(mass_B.new_full((), len(mass_B)), mass_B.square().sum())


def _sums(inputs: Inputs, weights: Weights | None) -> tuple[Tensor | None, GKLSums]:
    """The sums and, if ``gradient_comes_first``, their weighted sum, which is cheaper to differentiate."""
    total, sums = _uncompiled(_fused_sums, inputs, weights if inputs.gradient_comes_first else None)
    if inputs.no_bias is None:
        return total, sums
    soft_ce, wmse = (LossSum(part.numerator + inputs.no_bias, part.denominator) for part in sums)
    return None if total is None else total + inputs.no_bias, GKLSums(soft_ce, wmse)


def _fused_sums(inputs: Inputs, weights: Weights | None) -> tuple[Tensor | None, GKLSums]:
    with outside_autocast(inputs.features.student_image_BD):
        total, soft, wmse, denominator = _FromFeatures.apply(*inputs.features, inputs.problem, weights, _engine(inputs))
        return total, GKLSums(mean_over_rows(soft, len(inputs.features.student_image_BD)), LossSum(wmse, denominator))


def _engine(inputs: Inputs) -> ModuleType:
    """The module of the implementation; each has ``forward``, ``backward`` and ``weight_masses``."""
    if inputs.implementation == "triton":
        from clipdistill.losses import fused_triton

        return fused_triton
    return fused_tiled


class _FromFeatures(torch.autograd.Function):
    """Weighted sum (None without weights), numerators of soft_ce and wMSE, denominator of wMSE, from an engine.

    With weights, the engine also computes the gradient of the weighted sum in the forward pass. The first backward pass
    that needs only this gradient returns it; any other computes the gradient again.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        *features, problem, weights, engine = arguments
        sums = engine.forward(FeaturePair(*features), problem, weights, ctx.needs_input_grad[:6])
        ctx.save_for_backward(*features)
        ctx.problem, ctx.weights, ctx.engine = problem, weights, engine
        ctx.gradients, ctx.state = sums.gradients, sums.state
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(sums.denominator)
        total = None if weights is None else weights[0] * sums.soft + weights[1] * sums.wmse
        return total, sums.soft, sums.wmse, sums.denominator

    @staticmethod
    def backward(
        ctx: Any, grad_total: Tensor | None, grad_soft: Tensor | None, grad_wmse: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("a loss from features")
        if grad_total is None and grad_soft is None and grad_wmse is None:
            return (None,) * 9
        features = FeaturePair(*ctx.saved_tensors)
        factor, weights, gradients = grad_total, ctx.weights, ctx.gradients
        ctx.gradients = None
        if grad_soft is not None or grad_wmse is not None:
            factor, weights, gradients = None, _added(weights, grad_total, grad_soft, grad_wmse), None
        with outside_autocast(features.student_image_BD):
            if gradients is None:
                gradients = ctx.engine.backward(features, ctx.problem, weights, ctx.needs_input_grad[:6], ctx.state)
            scaled = (x if x is None or factor is None else x.mul_(factor) for x in gradients)
            return *(x if x is None else x.to(y.dtype) for x, y in zip(scaled, features, strict=True)), *[None] * 3


def _added(weights: Weights | None, factor: Tensor | None, *more: Tensor | None) -> Weights:
    """``factor * weights + more``; None counts as 0."""
    scaled = [0.0 if weights is None or factor is None else weight * factor for weight in weights or (0, 0)]
    return tuple(a if b is None else a + b for a, b in zip(scaled, more, strict=True))
