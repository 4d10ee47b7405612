import logging
from typing import Any

import pytest
import torch

from clipdistill.models.precision import chosen_precision, warn_of_emulation


@pytest.mark.parametrize(
    ("instructions", "native"),
    [
        ({"avx2": True}, "fp32"),
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, "fp32"),
        ({"avx512_f": True, "avx512_bf16": True}, "bf16"),
        ({"avx512_f": True, "amx_bf16": True}, "bf16"),
        ({"neon": True, "bf16": True}, "bf16"),
    ],
)
def test_bf16_on_a_cpu_with_instructions_for_it(
    instructions: dict[str, Any], native: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions)
    assert chosen_precision("bf16-if-native", "cpu") == native
    assert chosen_precision("auto", "cpu") == "fp32"
    assert chosen_precision("bf16", "cpu") == "bf16"


@pytest.mark.parametrize(("capability", "warned"), [("AVX2", True), ("AVX512", False)])
def test_emulated_bf16_is_named(
    capability: str, warned: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    with caplog.at_level(logging.WARNING):
        warn_of_emulation("cpu", "fp32")
        assert not caplog.messages
        warn_of_emulation("cpu", "bf16")
    assert bool(caplog.messages) == warned
