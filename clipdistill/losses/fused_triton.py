"""The fused losses as Triton kernels, for CUDA or, in Triton's interpreter (TRITON_INTERPRET=1), a CPU.

Forward: ``_row_sums_kernel`` multiplies tiles of rows by tiles of classes and keeps, for every row, running sums
relative to running maxima: an online log-sum-exp of both models' logits, and an online mean and variance of
``delta = t - s`` under the wMSE's weights. The classes are distributed over several programs, whose sums
``_statistics`` combines. Backward: for one chunk of classes at a time, ``_gradient_kernel`` multiplies the tiles
again and writes the gradient of the chunk's logits, which ``_product_kernel`` multiplies by the embeddings. A chunk
needs no more memory than the embeddings, and no sum depends on the order in which programs run.

Products of half-precision embeddings run on tensor cores and are summed in float32; the gradient of the logits is
rounded to the embeddings' type before its products. A float32 product consists of three TF32 products, accurate to
about 2^-21, or of one if ``torch.set_float32_matmul_precision`` is ``medium``. The fastest tile sizes are found by
timing at the first call for each number of classes and each feature width; other sizes round differently.

Logits are over T in this module: s stands for s/T. Shape suffixes: B rows, C classes, D and E feature widths of
student and teacher, S shares of the classes; inside kernels, the sizes of tiles.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from clipdistill.losses.fused_common import FeaturePair, Gradients, Needs, Problem, Sums, Weights

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_SHARE_STEP = 32 if _INTERPRETED else 128
_CHUNK_ELEMENTS = 2**10 if _INTERPRETED else 2**23
_VECTOR = 16
"""Rows of a chunk start at multiples of it: with other strides, Triton loads its elements one by one."""


class _RowSums(NamedTuple):
    """Sums over one share of the classes, (S, B), relative to the share's maxima."""

    student_max: Tensor
    student_sum: Tensor  # of exp(s - max)
    teacher_max: Tensor
    teacher_sum: Tensor  # of exp(t - max)
    cross: Tensor  # of exp(t - max) (max_s - s), for KL of exp(t - max) (max_s - s + t - max)
    base_sum: Tensor  # of exp(T/T2 (t - max))
    weight_sum: Tensor  # of w: exp(gamma T/T2 (t - max)), or prior^gamma
    mean: Tensor  # of delta under w
    squares: Tensor  # sum of w (delta - mean)^2


class _RowStatistics(NamedTuple):
    """Statistics of every row for the backward pass, (B,); names as in _RowSums, W is ``mass``."""

    student_max: Tensor
    student_sum: Tensor
    teacher_max: Tensor
    teacher_sum: Tensor
    weight_sum: Tensor
    mean: Tensor
    mass: Tensor


def forward(features: FeaturePair, problem: Problem, weights: None, needs: Needs) -> Sums:  # noqa: ARG001
    """The sums; their gradient is computed in the backward pass."""
    statistics, soft_B, variance_B = _statistics(features, problem)
    squared_mass_B = statistics.mass.square()
    soft = problem.soft_factor * soft_B.sum()
    wmse = (squared_mass_B * variance_B).sum() * (problem.temperature**2 / 2)
    return Sums(soft, wmse, squared_mass_B.sum(), state=statistics)


def weight_masses(features: FeaturePair, problem: Problem) -> Tensor:
    """``W_B = sum_j w_bj``, from the teacher alone."""
    mass = problem.known_mass(len(features.teacher_text_CE))
    if mass is not None:
        return torch.full(
            (len(features.teacher_image_BE),), mass, dtype=problem.dtype, device=features.teacher_image_BE.device
        )
    return _masses(_row_sums(features, problem, student=False), problem)[2]


def backward(
    features: FeaturePair, problem: Problem, weights: Weights, needs: Needs, statistics: _RowStatistics
) -> Gradients:
    """The gradient of the weighted sum of soft and wmse, over chunks of the classes."""
    image_BD, text_CD = _of_one_type(features.student_image_BD, features.student_text_CD)
    (rows, width), classes = image_BD.shape, len(text_CD)
    wmse_B = statistics.mass.square() * (problem.temperature**2 * weights[1])
    soft_B = torch.ones_like(wmse_B) * (problem.soft_factor * weights[0])
    # gradients of a mean over many rows are too small for float16
    peak = torch.maximum(soft_B.abs().amax(), wmse_B.abs().amax())
    peak = torch.where(peak > 0, peak, 1.0)
    terms_NB = torch.stack((*statistics[:6], soft_B / peak, wmse_B / peak))
    factor = peak * features.student_scale.float() / problem.temperature

    step = max(_CHUNK_ELEMENTS, (rows + classes) * width // 2) // rows // _SHARE_STEP * _SHARE_STEP
    step = min(max(step, _SHARE_STEP), triton.cdiv(classes, _VECTOR) * _VECTOR)
    chunk_Bc = image_BD.new_empty(rows, step)
    grad_image_BD = torch.zeros_like(image_BD, dtype=torch.float32) if needs[0] or needs[2] else None
    grad_text_CD = torch.empty_like(text_CD) if needs[1] else None
    operands, options = _operands(features, problem), _options(problem)
    with torch.cuda.device_of(image_BD):
        for start in range(0, classes, step):
            columns = slice(start, min(start + step, classes))
            grad_Bc = chunk_Bc[:, : columns.stop - start]
            _gradient_kernel[_tiles(*grad_Bc.shape)](*operands, terms_NB, grad_Bc, start, columns.stop, step, **options)
            if grad_image_BD is not None:
                _multiply(grad_Bc, text_CD[columns], None, grad_image_BD, add=True)
            if grad_text_CD is not None:
                _multiply(grad_Bc.T, image_BD, factor, grad_text_CD[columns])

    grad_scale = None
    if grad_image_BD is not None:
        grad_scale = (image_BD * grad_image_BD).sum() * (peak / problem.temperature)
        grad_image_BD *= factor
    return Gradients(grad_image_BD if needs[0] else None, grad_text_CD, grad_scale if needs[2] else None)


def _statistics(features: FeaturePair, problem: Problem) -> tuple[_RowStatistics, Tensor, Tensor]:
    """Statistics of the rows, the rows of the soft part, and the variances of delta, all (B,)."""
    sums = _row_sums(features, problem, student=True)
    student_max, teacher_max = sums.student_max.amax(0), sums.teacher_max.amax(0)
    student_sum = (sums.student_sum * (sums.student_max - student_max).exp()).sum(0)
    teacher_factor = (sums.teacher_max - teacher_max).exp()
    teacher_sum = (sums.teacher_sum * teacher_factor).sum(0)
    entropy = _entropy(problem)
    risen = (student_max - sums.student_max) - entropy * (teacher_max - sums.teacher_max)
    cross = ((sums.cross + sums.teacher_sum * risen) * teacher_factor).sum(0)
    soft = cross / teacher_sum + student_sum.log() - entropy * teacher_sum.log()

    weight_factor, weight_sum, mass = _masses(sums, problem)
    mean = (weight_factor * sums.weight_sum * sums.mean).sum(0) / weight_sum
    squares = weight_factor * (sums.squares + sums.weight_sum * (sums.mean - mean).square())
    if problem.kind == "gkl":
        # a mean is not finite if a logit is not, even one that a softmax turns into 0
        soft = soft + 0 * sums.mean.sum(0)
    statistics = _RowStatistics(student_max, student_sum, teacher_max, teacher_sum, weight_sum, mean, mass)
    return statistics, soft, squares.sum(0) / weight_sum


def _masses(sums: _RowSums, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Factors (S, B) of the shares' sums of weights, their total (B,) relative to the maximum, and W (B,); ones without
    a wMSE."""
    if problem.kind != "gkl":
        ones_SB = torch.ones_like(sums.weight_sum)
        return ones_SB, ones_SB[0], ones_SB[0]
    if _prior(problem) is not None:
        weight_sum = sums.weight_sum.sum(0)
        return torch.ones_like(sums.weight_sum), weight_sum, weight_sum
    log_factor = (sums.teacher_max - sums.teacher_max.amax(0)) * _ratio(problem)
    weight_factor = (log_factor * problem.gamma).exp()
    weight_sum = (sums.weight_sum * weight_factor).sum(0)
    base_sum = (sums.base_sum * log_factor.exp()).sum(0)
    return weight_factor, weight_sum, weight_sum / base_sum**problem.gamma


def _row_sums(features: FeaturePair, problem: Problem, *, student: bool) -> _RowSums:
    """Run the kernel of the forward pass; without ``student``, only for W."""
    rows, classes = len(features.teacher_image_BE), len(features.teacher_text_CE)
    device = features.teacher_image_BE.device
    # four programs per multiprocessor of the GPU: enough to keep all of them busy
    processors = 1 if _INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count
    shares = max(1, 4 * processors // triton.cdiv(rows, 64))
    share = triton.cdiv(triton.cdiv(classes, shares), _SHARE_STEP) * _SHARE_STEP
    sums_NSB = torch.zeros(len(_RowSums._fields), triton.cdiv(classes, share), rows, device=device)

    def grid(meta: dict[str, Any]) -> tuple[int, int]:
        return triton.cdiv(rows, meta["BLOCK_B"]), sums_NSB.shape[1]

    with torch.cuda.device_of(sums_NSB):
        _row_sums_kernel[grid](
            *_operands(features, problem),
            sums_NSB,
            share,
            _entropy(problem),
            STUDENT=student,
            **_options(problem),
        )
    return _RowSums(*sums_NSB)


def _operands(features: FeaturePair, problem: Problem) -> tuple[Tensor | int | float, ...]:
    """The first arguments of both kernels of logits."""
    student = _of_one_type(features.student_image_BD, features.student_text_CD)
    teacher = _of_one_type(features.teacher_image_BE, features.teacher_text_CE)
    scales = torch.stack((features.student_scale, features.teacher_scale)).float() / problem.temperature
    prior, labels = _prior(problem), problem.labels_B
    return (
        *student,
        *teacher,
        scales,
        scales if prior is None else prior.contiguous(),
        scales if labels is None else labels.contiguous(),
        len(student[0]),
        len(student[1]),
        student[0].shape[1],
        teacher[0].shape[1],
        _ratio(problem),
        float(problem.gamma),
    )


def _options(problem: Problem) -> dict[str, Any]:
    """The variant of the kernels of logits."""
    return {
        "PRIOR": _prior(problem) is not None,
        "SMOOTH": _ratio(problem) != 1,
        "POWER": problem.gamma != 1,
        "WMSE": problem.kind == "gkl",
        "PRECISION": _precision(),
    }


def _prior(problem: Problem) -> Tensor | None:
    """Uniform weights need no prior."""
    assert problem.prior is None or isinstance(problem.prior, Tensor)
    return None if problem.gamma == 0 else problem.prior


def _ratio(problem: Problem) -> float:
    """Factor from logits over T to logits over T2."""
    return problem.temperature / problem.weight_temperature


def _entropy(problem: Problem) -> float:
    """Whether the teacher's entropy is subtracted, as a factor 0 or 1."""
    return float(problem.kind == "kl")


def _of_one_type(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(image.dtype, text.dtype)
    return image.to(dtype).contiguous(), text.to(dtype).contiguous()


def _precision() -> str:
    """Precision of products; the interpreter has no products of bfloat16."""
    if _INTERPRETED:
        return "float32"
    if torch.version.hip:
        return "ieee"
    return "tf32" if torch.get_float32_matmul_precision() == "medium" else "tf32x3"


def _multiply(a_MK: Tensor, b_KN: Tensor, factor: Tensor | None, out_MN: Tensor, *, add: bool = False) -> None:
    """``out = factor * a @ b``, or ``out += a @ b``, summed in float32; for contiguous b and out."""
    (rows, inner), columns = a_MK.shape, b_KN.shape[1]
    _product_kernel[_tiles(rows, columns)](
        a_MK,
        b_KN,
        out_MN if factor is None else factor,
        out_MN,
        rows,
        columns,
        inner,
        *a_MK.stride(),
        ADD=add,
        PRECISION=_precision(),
    )


def _tiles(rows: int, columns: int) -> Any:
    """Grid of one program per tile of a matrix; adjacent programs share columns."""
    return lambda meta: (triton.cdiv(rows, meta["BLOCK_B"]), triton.cdiv(columns, meta["BLOCK_C"]))


def _autotuned(key: list[str], *sizes: tuple[int, int, int, int, int], **settings: Any) -> Any:
    """Decorator that finds the fastest tile sizes by timing: rows, columns, depth, warps, stages."""
    if _INTERPRETED:
        return triton.autotune([triton.Config({"BLOCK_B": 32, "BLOCK_C": 32, "BLOCK_D": 32})], key)
    configs = [
        triton.Config({"BLOCK_B": b, "BLOCK_C": c, "BLOCK_D": d}, num_warps=warps, num_stages=stages)
        for b, c, d, warps, stages in sizes
    ]
    return triton.autotune(configs, key, prune_configs_by={"early_config_prune": _suitable}, **settings)


def _suitable(configs: list[triton.Config], arguments: dict[str, Any], **options: Any) -> list[triton.Config]:
    """Steps of 128 bytes along the sum, 32 deep in float32 and 64 in half precision; with a prior, tiles of at most 64
    bytes a thread, which leave registers for its weights."""
    width = next(value for value in arguments.values() if isinstance(value, Tensor)).element_size()
    tile_bytes = 64 if options.get("PRIOR") else 256
    return [
        config
        for config in configs
        if config.kwargs["BLOCK_D"] * width == 128
        and config.kwargs["BLOCK_B"] * config.kwargs["BLOCK_C"] * width <= tile_bytes * 32 * config.num_warps
    ]


_SUM_TILES = (
    (64, 128, 64, 8, 3),
    (128, 64, 64, 8, 3),
    (64, 64, 64, 4, 3),
    (128, 64, 32, 8, 3),
    (64, 64, 32, 4, 3),
    (64, 64, 32, 8, 3),
)
_GRADIENT_TILES = ((128, 128, 64, 8, 3), *_SUM_TILES)
_PRODUCT_TILES = (
    (128, 256, 64, 8, 3),
    (128, 128, 64, 8, 3),
    (64, 128, 64, 4, 4),
    (64, 64, 64, 4, 4),
    (128, 128, 32, 8, 3),
    (64, 64, 32, 4, 3),
)


@triton.jit
def _dot(a_BD, b_DC, sum_BC, PRECISION: tl.constexpr):
    """``sum + a @ b``."""
    if PRECISION == "float32":
        return tl.dot(a_BD.to(tl.float32), b_DC.to(tl.float32), sum_BC)
    return tl.dot(a_BD, b_DC, sum_BC, input_precision=PRECISION)


@triton.jit
def _logits(
    image, text, rows_B, columns_C, rows, last, width,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Cosines of a tile; 0 beyond the last row or column."""
    tile_BC = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    for start in range(0, width, BLOCK_D):
        of_D = start + tl.arange(0, BLOCK_D)
        image_BD = tl.load(
            image + rows_B[:, None] * width + of_D[None, :],
            mask=(rows_B < rows)[:, None] & (of_D < width)[None, :],
            other=0.0,
        )
        text_DC = tl.load(
            text + columns_C[None, :] * width + of_D[:, None],
            mask=(columns_C < last)[None, :] & (of_D < width)[:, None],
            other=0.0,
        )
        tile_BC = _dot(image_BD, text_DC, tile_BC, PRECISION)
    return tile_BC


@triton.jit
def _prior_weights(prior, label_B, columns_C, valid_BC, classes, gamma, POWER: tl.constexpr):
    """``prior[labels]^gamma`` of a tile."""
    prior_BC = tl.load(prior + label_B[:, None] * classes + columns_C[None, :], mask=valid_BC, other=0.0)
    prior_BC = prior_BC.to(tl.float32)
    return tl.exp2(gamma * tl.log2(prior_BC)) if POWER else prior_BC


@_autotuned(["classes", "student_width", "teacher_width", "STUDENT", "PRIOR"], *_SUM_TILES)
@triton.jit
def _row_sums_kernel(
    student_image, student_text, teacher_image, teacher_text, scales, prior, labels,
    rows, classes, student_width, teacher_width, ratio, gamma,
    sums, share, entropy,
    STUDENT: tl.constexpr, PRIOR: tl.constexpr, SMOOTH: tl.constexpr, POWER: tl.constexpr, WMSE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``_RowSums`` of BLOCK_B rows over one share of the classes."""
    row_B = (tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, classes)
    student_scale, teacher_scale = tl.load(scales), tl.load(scales + 1)
    label_B = tl.load(labels + row_B, mask=row_B < rows, other=0) if PRIOR else row_B
    least = -1e30  # finite, so that differences of maxima are finite
    student_max_B = tl.full((BLOCK_B,), least, tl.float32)
    teacher_max_B = tl.full((BLOCK_B,), least, tl.float32)
    student_sum_B = tl.zeros((BLOCK_B,), tl.float32)
    teacher_sum_B = tl.zeros((BLOCK_B,), tl.float32)
    cross_B = tl.zeros((BLOCK_B,), tl.float32)
    base_sum_B = tl.zeros((BLOCK_B,), tl.float32)
    weight_sum_B = tl.zeros((BLOCK_B,), tl.float32)
    mean_B = tl.zeros((BLOCK_B,), tl.float32)
    squares_B = tl.zeros((BLOCK_B,), tl.float32)
    for start in range(first, last, BLOCK_C):
        column_C = (start + tl.arange(0, BLOCK_C)).to(tl.int64)
        valid_BC = (column_C < last)[None, :] & (row_B < rows)[:, None]
        teacher_BC = teacher_scale * _logits(
            teacher_image, teacher_text, row_B, column_C, rows, last, teacher_width,
            BLOCK_B, BLOCK_C, BLOCK_D, PRECISION,
        )  # fmt: skip
        if STUDENT:
            student_BC = student_scale * _logits(
                student_image, student_text, row_B, column_C, rows, last, student_width,
                BLOCK_B, BLOCK_C, BLOCK_D, PRECISION,
            )  # fmt: skip
        new_max_B = tl.maximum(teacher_max_B, tl.max(tl.where(valid_BC, teacher_BC, least), 1))
        teacher_rise_B = new_max_B - teacher_max_B
        teacher_max_B = new_max_B
        above_BC = teacher_BC - teacher_max_B[:, None]
        teacher_exp_BC = tl.where(valid_BC, tl.exp(above_BC), 0.0)
        teacher_shrink_B = tl.exp(-teacher_rise_B)
        if STUDENT:
            new_max_B = tl.maximum(student_max_B, tl.max(tl.where(valid_BC, student_BC, least), 1))
            student_rise_B = new_max_B - student_max_B
            student_max_B = new_max_B
            below_BC = student_max_B[:, None] - student_BC
            student_exp_BC = tl.where(valid_BC, tl.exp(-below_BC), 0.0)
            student_sum_B = student_sum_B * tl.exp(-student_rise_B) + tl.sum(student_exp_BC, 1)
            # entropy is 0 or 1: a factor rather than a branch, as 0 times an infinite logit is nan
            cross_B += teacher_sum_B * (student_rise_B - entropy * teacher_rise_B)
            cross_B = cross_B * teacher_shrink_B + tl.sum(teacher_exp_BC * (below_BC + entropy * above_BC), 1)
        teacher_sum_B = teacher_sum_B * teacher_shrink_B + tl.sum(teacher_exp_BC, 1)
        if WMSE:
            if PRIOR:
                weight_BC = _prior_weights(prior, label_B, column_C, valid_BC, classes, gamma, POWER)
                weight_shrink_B = tl.full((BLOCK_B,), 1.0, tl.float32)
            else:
                base_BC = tl.where(valid_BC, tl.exp(ratio * above_BC), 0.0) if SMOOTH else teacher_exp_BC
                base_sum_B = base_sum_B * tl.exp(-ratio * teacher_rise_B) + tl.sum(base_BC, 1)
                weight_BC = tl.where(valid_BC, tl.exp(gamma * ratio * above_BC), 0.0) if POWER else base_BC
                weight_shrink_B = tl.exp(-gamma * ratio * teacher_rise_B)
            tile_sum_B = tl.sum(weight_BC, 1)
            weight_sum_B *= weight_shrink_B
            if STUDENT:
                delta_BC = teacher_BC - student_BC
                weighted_B = tl.sum(weight_BC * delta_BC, 1)
                tile_mean_B = tl.where(tile_sum_B > 0, weighted_B / tile_sum_B, weighted_B)
                centred_BC = delta_BC - tile_mean_B[:, None]
                step_B = tile_mean_B - mean_B
                total_B = weight_sum_B + tile_sum_B
                share_B = tl.where(total_B > 0, tile_sum_B / total_B, 0.0)
                mean_B += step_B * share_B
                squares_B = squares_B * weight_shrink_B + tl.sum(weight_BC * centred_BC * centred_BC, 1)
                squares_B += step_B * step_B * weight_sum_B * share_B
            weight_sum_B += tile_sum_B

    out = sums + tl.program_id(1) * rows + row_B
    step = tl.num_programs(1) * rows
    stored_B = row_B < rows
    tl.store(out, student_max_B, mask=stored_B)
    tl.store(out + step, student_sum_B, mask=stored_B)
    tl.store(out + 2 * step, teacher_max_B, mask=stored_B)
    tl.store(out + 3 * step, teacher_sum_B, mask=stored_B)
    tl.store(out + 4 * step, cross_B, mask=stored_B)
    tl.store(out + 5 * step, base_sum_B, mask=stored_B)
    tl.store(out + 6 * step, weight_sum_B, mask=stored_B)
    tl.store(out + 7 * step, mean_B, mask=stored_B)
    tl.store(out + 8 * step, squares_B, mask=stored_B)


@_autotuned(["classes", "student_width", "teacher_width", "PRIOR"], *_GRADIENT_TILES)
@triton.jit
def _gradient_kernel(
    student_image, student_text, teacher_image, teacher_text, scales, prior, labels,
    rows, classes, student_width, teacher_width, ratio, gamma,
    terms, out, first, last, out_row,
    PRIOR: tl.constexpr, SMOOTH: tl.constexpr, POWER: tl.constexpr, WMSE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of the student's logits, columns ``first`` to ``last``; ``out_row``: row stride of out."""
    row_B = (tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    column_C = (first + tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    valid_BC = (column_C < last)[None, :] & (row_B < rows)[:, None]
    teacher_BC = tl.load(scales + 1) * _logits(
        teacher_image, teacher_text, row_B, column_C, rows, last, teacher_width,
        BLOCK_B, BLOCK_C, BLOCK_D, PRECISION,
    )  # fmt: skip
    student_BC = tl.load(scales) * _logits(
        student_image, student_text, row_B, column_C, rows, last, student_width,
        BLOCK_B, BLOCK_C, BLOCK_D, PRECISION,
    )  # fmt: skip
    # the rows of ``terms``, in the order in which backward stacks them
    term_B = terms + row_B
    known_B = row_B < rows
    student_max_B = tl.load(term_B, mask=known_B, other=0.0)
    student_sum_B = tl.load(term_B + rows, mask=known_B, other=1.0)
    teacher_max_B = tl.load(term_B + 2 * rows, mask=known_B, other=0.0)
    teacher_sum_B = tl.load(term_B + 3 * rows, mask=known_B, other=1.0)
    weight_sum_B = tl.load(term_B + 4 * rows, mask=known_B, other=1.0)
    mean_B = tl.load(term_B + 5 * rows, mask=known_B, other=0.0)
    soft_B = tl.load(term_B + 6 * rows, mask=known_B, other=0.0)
    wmse_B = tl.load(term_B + 7 * rows, mask=known_B, other=0.0)

    above_BC = teacher_BC - teacher_max_B[:, None]
    teacher_exp_BC = tl.exp(above_BC)
    q_BC = tl.exp(student_BC - student_max_B[:, None]) * (soft_B / student_sum_B)[:, None]
    grad_BC = q_BC - teacher_exp_BC * (soft_B / teacher_sum_B)[:, None]
    if WMSE:
        if PRIOR:
            label_B = tl.load(labels + row_B, mask=known_B, other=0)
            weight_BC = _prior_weights(prior, label_B, column_C, valid_BC, classes, gamma, POWER)
        elif POWER or SMOOTH:
            weight_BC = tl.exp(gamma * ratio * above_BC)
        else:
            weight_BC = teacher_exp_BC
        delta_BC = teacher_BC - student_BC - mean_B[:, None]
        grad_BC -= weight_BC * delta_BC * (wmse_B / weight_sum_B)[:, None]
    out += row_B[:, None] * out_row + (column_C - first)[None, :]
    tl.store(out, grad_BC.to(out.dtype.element_ty), mask=valid_BC)


@_autotuned(["columns", "inner", "ADD"], *_PRODUCT_TILES, restore_value=["out"])
@triton.jit
def _product_kernel(
    a, b, factor, out, rows, columns, inner, a_row, a_inner,
    ADD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tile of ``out = factor * a @ b`` or ``out += a @ b``; BLOCK_D is the depth of a step along the sum."""
    row_B = (tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    column_C = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    tile_BC = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    for start in range(0, inner, BLOCK_D):
        of_D = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        a_BD = tl.load(
            a + row_B[:, None] * a_row + of_D[None, :] * a_inner,
            mask=(row_B < rows)[:, None] & (of_D < inner)[None, :],
            other=0.0,
        )
        b_DC = tl.load(
            b + of_D[:, None] * columns + column_C[None, :],
            mask=(of_D < inner)[:, None] & (column_C < columns)[None, :],
            other=0.0,
        )
        tile_BC = _dot(a_BD, b_DC, tile_BC, PRECISION)
    valid_BC = (row_B < rows)[:, None] & (column_C < columns)[None, :]
    out += row_B[:, None] * columns + column_C[None, :]
    if ADD:
        tile_BC += tl.load(out, mask=valid_BC, other=0.0)
    else:
        tile_BC *= tl.load(factor)
    tl.store(out, tile_BC.to(out.dtype.element_ty), mask=valid_BC)
