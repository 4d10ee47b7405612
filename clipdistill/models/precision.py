"""Precision of towers: float32, or bfloat16 under autocast; losses and logits are float32 in any case."""

import logging
import os
import platform
from typing import Literal

import torch

log = logging.getLogger(__name__)

Precision = Literal["auto", "bf16-if-native", "fp32", "bf16"]
"""bf16-if-native: bf16 on a device that has instructions for it (most GPUs; CPUs with AVX512-BF16 or AMX), else fp32.
auto: the same on a GPU, and fp32 on a CPU."""


def chosen_precision(precision: str, device: torch.device | str | None = None) -> Literal["fp32", "bf16"]:
    """The precision that ``auto`` and ``bf16-if-native`` stand for on a device; others are themselves.

    Args:
        precision: one of ``Precision``.
        device: None: the one that a run takes on this machine.
    """
    if precision in ("fp32", "bf16"):
        return "bf16" if precision == "bf16" else "fp32"
    if device is None:
        device = "cpu" if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes") else "cuda"
    if torch.device(device).type == "cuda" and torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        found = torch.cpu.get_capabilities()
        native = precision != "auto" and any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return "bf16" if native else "fp32"


def use_tensor_cores(device: torch.device | str) -> None:
    """Let products of float32 matrices run on a GPU's tensor cores: TF32, about three decimal digits. Has no effect on
    other devices."""
    if torch.device(device).type == "cuda":
        torch.set_float32_matmul_precision("high")


def warn_of_emulation(device: torch.device | str, precision: str) -> None:
    """Log a warning where a device computes in bfloat16 without instructions for it: a CPU without AVX-512 is then many
    times slower than in float32."""
    on_cpu = torch.device(device).type == "cpu" and platform.machine().lower() in ("x86_64", "amd64")
    if precision == "bf16" and on_cpu and "AVX512" not in torch.backends.cpu.get_cpu_capability():
        log.warning(
            "precision: bf16 is emulated on this CPU, and many times slower than fp32 (bf16-if-native takes fp32)"
        )
