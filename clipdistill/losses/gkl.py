"""Generalized Kullback-Leibler divergence (GKL): soft cross-entropy plus weighted MSE of logit differences.

Sources: Cui et al., "Decoupled Kullback-Leibler Divergence Loss" (NeurIPS 2024, arXiv 2305.13948) and
"Generalized Kullback-Leibler Divergence Loss" (arXiv 2503.08038).

The papers write the weighted MSE over pairs of classes. With ``W_b = sum_j w_bj``, ``delta = t - s`` and the
weighted mean ``mu_b = sum_j w_bj delta_bj / W_b`` the sum over pairs is a variance,

    1/4 sum_jk w_bj w_bk (delta_bj - delta_bk)^2  =  1/2 W_b sum_j w_bj (delta_bj - mu_b)^2

so time and memory are O(B C), not O(B C^2). ``gkl_sums`` needs even less: it works on blocks of rows, and keeps nothing
of that size for the backward pass except the logits themselves.

Shape suffixes: B rows of a batch, b rows of a block, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import ValidationInfo, field_validator
from torch import Tensor

from clipdistill.losses._common import (
    LossSum,
    check_labels,
    check_matrices,
    check_temperature,
    common_float,
    mean_over_rows,
    refuse_second_derivative,
    row_blocks,
    tempered,
)
from clipdistill.losses.base import Comparison, Loss, LossParts, Paper
from clipdistill.losses.fused import gkl_denominators_from_features, gkl_loss_from_features
from clipdistill.losses.fused_common import GKLDenominators, GKLOutput, GKLSums
from clipdistill.losses.prior import TopKPrior, prior_rows, weight_mass
from clipdistill.settings import Fraction, Positive


class GKL(Loss):
    """``gkl_loss`` as a term: soft cross-entropy plus weighted MSE of logit differences, whose gradient KL lacks."""

    loss: Literal["gkl"] = "gkl"
    over: Literal["prompts", "captions"] = "prompts"
    alpha: float = 1.0
    """Factor of the soft cross-entropy."""
    beta: float = 1.0
    """Factor of the wMSE."""
    gamma: Fraction = 1.0
    """Exponent of the wMSE's weights; 0: uniform weights."""
    temperature: Positive = 1.0
    """Temperature of the logits in the soft cross-entropy."""
    weight_temperature: Positive = 1.0
    """Temperature of the teacher's logits in the wMSE's weights (the authors' T2)."""
    class_prior: bool = False
    """Over prompts: weights from the teacher's mean prediction of the sample's class (needs ``labels``)."""
    two_sided: bool | None = None
    """In adversarial training, over prompts: the student's own clean images in place of a teacher's (GKL-AT). The
    gradient of wMSE goes to both sides; the class prior, which it needs, is the student's mean prediction of the clean
    images."""

    papers: ClassVar = (
        Paper(
            key="cui2025gkl",
            title="Generalized Kullback-Leibler Divergence Loss",
            author="Cui, Jiequan and Zhu, Beier and Xu, Qingshan and Tian, Zhuotao and Qi, Xiaojuan and Yu, Bei and "
            "Zhang, Hanwang and Hong, Richang",
            year=2025,
            arxiv="2503.08038",
        ),
        Paper(
            key="cui2024dkl",
            title="Decoupled Kullback-Leibler Divergence Loss",
            author="Cui, Jiequan and Tian, Zhuotao and Zhong, Zhisheng and Qi, Xiaojuan and Yu, Bei and Zhang, Hanwang",
            year=2023,
            arxiv="2305.13948",
        ),
    )

    @field_validator("class_prior")
    @classmethod
    def _prior_is_of_prompts(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("over") != "prompts":
            raise ValueError("true only with over: prompts")
        return value

    @field_validator("two_sided")
    @classmethod
    def _two_sided_has_a_prior(cls, value: bool | None, info: ValidationInfo) -> bool | None:
        if value and not info.data.get("class_prior"):
            raise ValueError("true only with class_prior: true")
        return value

    @property
    def is_two_sided(self) -> bool:
        """As the setting says."""
        return bool(self.two_sided)

    @property
    def needs_labels(self) -> bool:
        """The class prior has a row for each class."""
        return self.class_prior

    @property
    def prior_temperature(self) -> float | None:
        """T2, the temperature of the weights."""
        return self.weight_temperature if self.class_prior else None

    def denominators(self, comparison: Comparison) -> dict[str, Tensor]:
        """The wMSE's denominator: ``sum_b W_b^2``."""
        if self.is_two_sided:
            assert comparison.class_prior is not None
            assert comparison.target_B is not None
            mass_B = weight_mass(comparison.class_prior, comparison.target_B, self.gamma, torch.float32)
            return {"wmse": mass_B.square().sum()}
        teacher = comparison.teacher
        assert teacher is not None
        if (fused := comparison.fused_implementation) is None:
            return {"wmse": gkl_denominator(teacher.logits_BC, **self._weighting(comparison))}
        wmse = gkl_denominators_from_features(
            teacher.rows_BD,
            teacher.columns_CD,
            teacher_scale=teacher.scale,
            implementation=fused,
            **self._weighting(comparison),
        ).wmse
        return {"wmse": wmse}

    def compute(self, comparison: Comparison, rows: Tensor, denominators: Mapping[str, Tensor]) -> LossParts:
        """Parts ``soft_ce`` and ``wmse``, with alpha and beta applied."""
        student, teacher = comparison.pair
        wmse_denominator = denominators["wmse"].to(rows.dtype)
        if (fused := comparison.fused_implementation) is not None:
            out = gkl_loss_from_features(
                **comparison.features,
                alpha=self.alpha,
                beta=self.beta,
                temperature=self.temperature,
                denominators=GKLDenominators(rows, wmse_denominator),
                implementation=fused,
                two_sided=self.is_two_sided,
                **self._weighting(comparison),
            )
            return LossParts({"soft_ce": self.alpha * out.soft_ce, "wmse": self.beta * out.wmse}, out.loss)
        sums = gkl_sums(
            student.logits_BC,
            teacher.logits_BC,
            temperature=self.temperature,
            two_sided=self.is_two_sided,
            **self._weighting(comparison),
        )
        soft_ce = self.alpha * sums.soft_ce.numerator / rows
        wmse = self.beta * sums.wmse.numerator / wmse_denominator
        return LossParts({"soft_ce": soft_ce, "wmse": wmse}, soft_ce + wmse)

    def _weighting(self, comparison: Comparison) -> dict[str, Any]:
        """Arguments that determine the wMSE's weights."""
        weighting: dict[str, Any] = {"gamma": self.gamma, "weight_temperature": self.weight_temperature}
        if self.class_prior:
            weighting |= {"class_prior": comparison.class_prior, "labels": comparison.target_B}
        return weighting


def gkl_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
    weight_temperature: float = 1.0,
    class_prior: Tensor | TopKPrior | None = None,
    labels: Tensor | None = None,
    two_sided: bool = False,
) -> GKLOutput:
    """GKL divergence of the student from the teacher: ``alpha * soft_ce + beta * wmse``.

        soft_ce = -1/B sum_b sum_j softmax(t/T)_bj log_softmax(s/T)_bj
        wmse    = 1/4 sum_b sum_jk w_bj w_bk (Dt_bjk - Ds_bjk)^2  /  sum_b sum_jk w_bj w_bk

    with ``Dt_bjk = t_bj - t_bk``, ``Ds_bjk = s_bj - s_bk`` and weights ``w = softmax(t/T2)^gamma``, or with
    class-wise information ``w_b = class_prior[labels_b]^gamma``. There is no factor T^2, and wmse uses the
    raw logits. GKL of arXiv 2503.08038; ``gamma=1`` is IKL of arXiv 2305.13948.

    Relation to plain KL: by Theorem 1 of arXiv 2305.13948, KL has the gradients of ``soft_ce + wmse``
    (``gamma=1``) with the gradient of wmse stopped at the student. With a frozen teacher, wmse therefore has
    no effect in KL; here it trains the student. ``beta=0`` has KL's gradient.

    The two-sided form trains one network that sees each image twice: ``teacher_logits`` are of the clean image,
    ``student_logits`` of the attacked one, and the gradient of wmse flows into both. The weights and the target of
    soft_ce stay constants. (Theorem 1: TRADES' KL has wmse's gradient towards the clean side alone; see ``kd_loss``.)

    Args:
        student_logits: (B, C), any floating type; half precision is computed in float32.
        teacher_logits: (B, C).
        alpha: weight of the soft cross-entropy.
        beta: weight of the weighted MSE.
        gamma: in [0, 1]; 1 weights by the teacher's probabilities, 0 uniformly.
        temperature: T of the soft cross-entropy, above 0.
        weight_temperature: T2 of the weights, above 0. Has no effect with a class prior.
        class_prior: (C, C), row c the mean teacher prediction over the samples of class c, or its largest entries. Zero
            entries are allowed; a row of zeros has no weighted mean and makes the loss nan.
        labels: (B,) integers in [0, C): the class of each row. Given together with class_prior or not at all.
            On a GPU the check of their range waits for the device; labels on the CPU do not.
        two_sided: whether the gradient of wmse also goes to the teacher's logits.

    Returns:
        GKLOutput with ``loss``, ``soft_ce`` and ``wmse``: 0-d, in nats, means over the batch as above. The gradient
        goes to the student's logits, and to the teacher's if ``two_sided``; there is no second derivative. Each can be
        differentiated separately in one graph: all but the last with ``retain_graph=True``. A logit that is not finite
        makes the loss nan or inf.

    Raises:
        ValueError: wrong shapes or types, gamma outside [0, 1], a temperature not above 0, labels outside
            [0, C), class_prior without labels or the reverse.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 0.0]], requires_grad=True), torch.tensor([[3.0, 0.0]])
        >>> out = gkl_loss(student, teacher, beta=0.5, gamma=0.6)
        >>> out.loss.backward()
        >>> [round(x, 4) for x in (out.soft_ce.item(), out.wmse.item(), out.loss.item())]
        [0.3607, 0.2435, 0.4824]
    """
    if labels is not None:
        check_matrices(student_logits=student_logits)
        labels = check_labels(labels, student_logits, wait_for_device=True)
    sums = gkl_sums(
        student_logits,
        teacher_logits,
        gamma=gamma,
        temperature=temperature,
        weight_temperature=weight_temperature,
        class_prior=class_prior,
        labels=labels,
        two_sided=two_sided,
    )
    soft_ce, wmse = sums.soft_ce.value, sums.wmse.value
    return GKLOutput(alpha * soft_ce + beta * wmse, soft_ce, wmse)


def gkl_sums(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    gamma: float = 1.0,
    temperature: float = 1.0,
    weight_temperature: float = 1.0,
    class_prior: Tensor | TopKPrior | None = None,
    labels: Tensor | None = None,
    two_sided: bool = False,
) -> GKLSums:
    """Both parts of ``gkl_loss`` as sums over rows with their denominators, from one pass over the logits.

    The wMSE's denominator, ``sum_b W_b^2``, does not depend on the student: ``gkl_denominator`` computes it in advance.

    Args:
        student_logits: (B, C), any floating type; half precision is computed in float32.
        teacher_logits: (B, C).
        gamma: as for ``gkl_loss``, like the other settings.
        temperature: T of the soft cross-entropy.
        weight_temperature: T2 of the weights.
        class_prior: (C, C), given together with labels or not at all.
        labels: (B,) integers in [0, C). No GPU synchronisation: the range of labels on a GPU is left to the
            indexing kernel, which aborts the program on a bad label.
        two_sided: as for ``gkl_loss``.

    Returns:
        ``soft_ce`` and ``wmse``, in nats; gradients as for ``gkl_loss``.

    Raises:
        ValueError: as ``gkl_loss``.
    """
    check_matrices(student_logits=student_logits, teacher_logits=teacher_logits)
    check_temperature("temperature", temperature)
    labels = _check_weight_settings(teacher_logits, gamma, weight_temperature, class_prior, labels)
    dtype = common_float(student_logits=student_logits, teacher_logits=teacher_logits)
    settings = _Settings(dtype, gamma, temperature, weight_temperature)
    if not two_sided:
        teacher_logits = teacher_logits.detach()
    soft_ce, wmse, denominator = _GKL.apply(student_logits, teacher_logits, class_prior, labels, settings)
    return GKLSums(mean_over_rows(soft_ce, len(student_logits)), LossSum(wmse, denominator))


@torch.no_grad()
def gkl_denominator(
    teacher_logits: Tensor,
    *,
    gamma: float = 1.0,
    weight_temperature: float = 1.0,
    class_prior: Tensor | TopKPrior | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    """The denominator of ``gkl_sums(...).wmse``, ``sum_b W_b^2``, without a student: 0-d.

    It is a sum over the batch: add it up over micro-batches and ranks before dividing. Settings as for
    ``gkl_sums``.
    """
    check_matrices(teacher_logits=teacher_logits)
    labels = _check_weight_settings(teacher_logits, gamma, weight_temperature, class_prior, labels)
    dtype = common_float(teacher_logits=teacher_logits)
    if class_prior is None and gamma in (0, 1):
        mass = teacher_logits.shape[1] if gamma == 0 else 1
        return teacher_logits.new_full((), len(teacher_logits) * mass**2, dtype=dtype)
    settings = _Settings(dtype, gamma, weight_temperature, weight_temperature)
    denominator = torch.zeros((), dtype=dtype, device=teacher_logits.device)
    for rows in row_blocks(teacher_logits):
        _, teacher_bC, prior_bC = _block(dtype, rows, teacher_logits, teacher_logits, class_prior, labels)
        p_bC = _softmax(teacher_bC, 1 / weight_temperature)
        share_bC = _shares(teacher_bC, p_bC, prior_bC, settings)
        mass_b1 = _masses(teacher_bC, p_bC, prior_bC, share_bC, settings)
        denominator += len(teacher_bC) if mass_b1 is None else mass_b1.square().sum()
    return denominator


class _Settings(NamedTuple):
    dtype: torch.dtype
    gamma: float
    temperature: float
    weight_temperature: float


class _GKL(torch.autograd.Function):
    """Numerators of soft_ce and wMSE and the latter's denominator, computed over blocks of rows.

    The backward pass recomputes the probabilities from the logits: on a CPU, a block stays in the cache, which is
    faster than writing (B, C) matrices to memory and reading them back. Of matrices that are small themselves, the
    forward pass keeps both gradients, as most of their time goes into the number of operations. Autocast moves none of
    these operations to half precision.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student_BC: Tensor,
        teacher_BC: Tensor,
        prior_CC: Tensor | TopKPrior | None,
        labels_B: Tensor | None,
        settings: _Settings,
    ) -> tuple[Tensor, Tensor, Tensor]:
        inputs = (student_BC, teacher_BC, prior_CC, labels_B)
        blocks = row_blocks(student_BC)
        ctx.set_materialize_grads(False)
        wanted = any(ctx.needs_input_grad[:2])
        ctx.settings, ctx.at_once = settings, len(blocks) == 1 and wanted and _is_small(student_BC)
        if ctx.at_once:
            soft_ce, wmse, denominator, *gradients = _at_once(*_block(settings.dtype, blocks[0], *inputs), settings)
            ctx.save_for_backward(*gradients)
            ctx.dtypes = student_BC.dtype, teacher_BC.dtype
            ctx.mark_non_differentiable(denominator)
            return soft_ce, wmse, denominator
        statistics = [_statistics(*_block(settings.dtype, rows, *inputs), settings) for rows in blocks]
        soft_ce_B, mean_B, variance_B, *masses = torch.cat(statistics).unbind(1)
        if masses:
            square_B = masses[0].square()
            variance_B, denominator = square_B * variance_B, square_B.sum()
        else:
            square_B, denominator = None, mean_B.new_full((), len(mean_B))
        ctx.save_for_backward(mean_B, square_B, student_BC, teacher_BC, labels_B)
        ctx.prior = prior_CC
        ctx.mark_non_differentiable(denominator)
        return soft_ce_B.sum(), variance_B.sum() / 2, denominator

    @staticmethod
    def backward(ctx: Any, grad_soft_ce: Tensor | None, grad_wmse: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("GKL")
        to_student, to_teacher = ctx.needs_input_grad[:2]
        grad_BC = opposite_BC = None
        if ctx.at_once:
            ce_BC, wmse_BC = ctx.saved_tensors
            if to_student:
                grad_BC = torch.zeros_like(ce_BC) if grad_soft_ce is None else ce_BC * grad_soft_ce
                grad_BC = (grad_BC if grad_wmse is None else grad_BC.addcmul_(wmse_BC, grad_wmse)).to(ctx.dtypes[0])
            if to_teacher and grad_wmse is not None:
                opposite_BC = (wmse_BC * -grad_wmse).to(ctx.dtypes[1])
            return grad_BC, opposite_BC, None, None, None
        mean_B, square_B, student_BC, teacher_BC, labels_B = ctx.saved_tensors
        grad_BC = torch.empty_like(student_BC) if to_student else None
        opposite_BC = torch.empty_like(teacher_BC) if to_teacher and grad_wmse is not None else None
        for rows in row_blocks(student_BC):
            slope = grad_wmse if grad_wmse is None or square_B is None else grad_wmse * square_B[rows, None]
            block = _block(ctx.settings.dtype, rows, student_BC, teacher_BC, ctx.prior, labels_B)
            mean_b1 = mean_B[rows, None]
            if grad_BC is not None:
                _gradient(*block, ctx.settings, mean_b1, grad_soft_ce, slope, out_bC=grad_BC[rows])
            if opposite_BC is not None and slope is not None:
                _gradient(*block, ctx.settings, mean_b1, None, -slope, out_bC=opposite_BC[rows])
        return grad_BC, opposite_BC, None, None, None


def _block(
    dtype: torch.dtype,
    rows: slice,
    student_BC: Tensor,
    teacher_BC: Tensor,
    prior_CC: Tensor | TopKPrior | None,
    labels_B: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The student's and the teacher's logits and, with a class prior, its rows, in the given precision."""
    student_bC, teacher_bC = student_BC[rows].to(dtype), teacher_BC[rows].to(dtype)
    if prior_CC is None or labels_B is None:
        return student_bC, teacher_bC, None
    return student_bC, teacher_bC, prior_rows(prior_CC, labels_B[rows], dtype)


def _statistics(student_bC: Tensor, teacher_bC: Tensor, prior_bC: Tensor | None, settings: _Settings) -> Tensor:
    """(b, 3): soft cross-entropy, mean and variance of delta under the weights; (b, 4) with W if it is not 1."""
    p_bC = _softmax(teacher_bC, 1 / settings.temperature)
    share_bC = _shares(teacher_bC, p_bC, prior_bC, settings)
    mass_b1 = _masses(teacher_bC, p_bC, prior_bC, share_bC, settings)
    cross_b1 = torch.log_softmax(tempered(student_bC, settings.temperature), 1).mul_(p_bC).sum(1, keepdim=True)
    delta_bC = teacher_bC - student_bC
    mean_b1 = (share_bC * delta_bC).sum(1, keepdim=True)
    variance_b1 = delta_bC.sub_(mean_b1).square_().mul_(share_bC).sum(1, keepdim=True)
    # a softmax hides -inf as probability 0: the mean reveals it or, if prior entries may be 0, the logits do
    witness_b1 = mean_b1 if prior_bC is None else teacher_bC.amin(1, keepdim=True)
    soft_ce_b1 = 0 * witness_b1 - cross_b1
    return torch.cat([soft_ce_b1, mean_b1, variance_b1] + ([] if mass_b1 is None else [mass_b1]), 1)


def _is_small(matrix_BC: Tensor) -> bool:
    """Whether a matrix, and a few others of its size, fit in a CPU's cache."""
    return matrix_BC.device.type == "cpu" and matrix_BC.numel() <= 2**17 and not torch.compiler.is_compiling()


def _at_once(
    student_BC: Tensor, teacher_BC: Tensor, prior_BC: Tensor | None, settings: _Settings
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The outputs of ``_GKL``, 0-d, and the gradients of soft_ce and wMSE, (B, C)."""
    temperature = settings.temperature
    p_BC = _softmax(teacher_BC, 1 / temperature)
    share_BC = _shares(teacher_BC, p_BC, prior_BC, settings)
    mass_B1 = _masses(teacher_BC, p_BC, prior_BC, share_BC, settings)
    delta_BC = teacher_BC - student_BC
    mean_B1 = (share_BC * delta_BC).sum(1, keepdim=True)
    weighted_BC = delta_BC.sub_(mean_B1) * share_BC
    if mass_B1 is None:
        denominator = mean_B1.new_full((), len(mean_B1))
    else:
        square_B1 = mass_B1.square()
        weighted_BC.mul_(square_B1)
        denominator = square_B1.sum()
    wmse = delta_BC.mul_(weighted_BC).sum() / 2
    del delta_BC, share_BC
    log_q_BC = torch.log_softmax(tempered(student_BC, temperature), 1)
    witness_B1 = mean_B1 if prior_BC is None else teacher_BC.amin(1, keepdim=True)  # see _statistics
    soft_ce = 0 * witness_B1.sum() - (p_BC * log_q_BC).sum()
    return soft_ce, wmse, denominator, tempered(log_q_BC.exp_().sub_(p_BC), temperature), weighted_BC.neg_()


def _gradient(
    student_bC: Tensor,
    teacher_bC: Tensor,
    prior_bC: Tensor | None,
    settings: _Settings,
    mean_b1: Tensor,
    pull: Tensor | None,
    slope: Tensor | None,
    *,
    out_bC: Tensor,
) -> None:
    """``pull / T (q - p) - slope v (delta - mu)``, with the shares v of the weights; slope is a number or (b, 1)."""
    p_bC = _softmax(teacher_bC, 1 / settings.temperature)
    if pull is None:
        grad_bC = student_bC.new_zeros(())
    else:
        grad_bC = _softmax(student_bC, 1 / settings.temperature).sub_(p_bC).mul_(tempered(pull, settings.temperature))
    if slope is None:
        out_bC.copy_(grad_bC)
    else:
        share_bC = _shares(teacher_bC, p_bC, prior_bC, settings)
        torch.addcmul(grad_bC, (student_bC - teacher_bC).add_(mean_b1).mul_(slope), share_bC, out=out_bC)


def _shares(teacher_bC: Tensor, p_bC: Tensor, prior_bC: Tensor | None, settings: _Settings) -> Tensor:
    """The weights divided by their row sum W; p is ``softmax(t/T)``."""
    if prior_bC is not None:
        weight_bC = prior_bC**settings.gamma
        return weight_bC.div_(weight_bC.sum(1, keepdim=True))
    if settings.gamma * settings.temperature == settings.weight_temperature:
        return p_bC
    return _softmax(teacher_bC, settings.gamma / settings.weight_temperature)


def _masses(
    teacher_bC: Tensor, p_bC: Tensor, prior_bC: Tensor | None, share_bC: Tensor, settings: _Settings
) -> Tensor | None:
    """W, (b, 1), or None if it is 1: from ``w = base^gamma = W v`` at the likeliest class, far from underflow."""
    if prior_bC is not None:
        base_bC = prior_bC
    elif settings.gamma == 1:
        return None
    elif settings.temperature == settings.weight_temperature:
        base_bC = p_bC
    else:
        base_bC = _softmax(teacher_bC, 1 / settings.weight_temperature)
    return base_bC.amax(1, keepdim=True) ** settings.gamma / share_bC.amax(1, keepdim=True)


def _softmax(logits_bC: Tensor, scale: float) -> Tensor:
    return torch.softmax(logits_bC if scale == 1 else logits_bC * scale, 1)


def _check_weight_settings(
    teacher_logits: Tensor,
    gamma: float,
    weight_temperature: float,
    class_prior: Tensor | TopKPrior | None,
    labels: Tensor | None,
) -> Tensor | None:
    """Raise ValueError for invalid settings of w; returns the labels as ``check_labels`` does."""
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must be in [0, 1], got {gamma}")
    check_temperature("weight_temperature", weight_temperature)
    if (class_prior is None) != (labels is None):
        missing = "class_prior" if class_prior is None else "labels"
        raise ValueError(f"class_prior and labels must be given together or not at all, got {missing}=None")
    if class_prior is None or labels is None:
        return None
    square = (teacher_logits.shape[1], teacher_logits.shape[1])
    if tuple(class_prior.shape) != square:
        raise ValueError(f"class_prior must have shape {square}, got {tuple(class_prior.shape)}")
    if not isinstance(class_prior, TopKPrior):
        common_float(class_prior=class_prior)
    return check_labels(labels, teacher_logits, wait_for_device=False)
