"""Precision of towers: float32, or bfloat16 under autocast; losses and logits are float32 in any case."""

import os
from typing import Literal

import torch

Precision = Literal["auto", "fp32", "bf16"]
"""auto: bf16 on a GPU that computes in it, else fp32."""


def chosen_precision(precision: str, device: torch.device | str | None = None) -> Literal["fp32", "bf16"]:
    """The precision that ``auto`` stands for on a device; others are themselves.

    Args:
        precision: auto, fp32 or bf16.
        device: None: the one that a run takes on this machine.
    """
    if precision != "auto":
        return "bf16" if precision == "bf16" else "fp32"
    if device is None:
        device = "cpu" if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes") else "cuda"
    on_gpu = torch.device(device).type == "cuda" and torch.cuda.is_available()
    return "bf16" if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def use_tensor_cores(device: torch.device | str) -> None:
    """Let products of float32 matrices run on a GPU's tensor cores: TF32, about three decimal digits. Has no effect on
    other devices."""
    if torch.device(device).type == "cuda":
        torch.set_float32_matmul_precision("high")
