"""The Triton kernels, compiled for GPUs that need not be here: Triton's compiler and ptxas run on any machine."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from clipdistill.losses import fused_triton  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
SPILLED_BYTES = 512
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not (TOOLS / "cuobjdump").exists(), reason="no compiler for CUDA")]


def variants(kernel, dtype):
    """Types of the arguments that are no constants, and the constants, of each use of a kernel."""
    pointer = f"*{dtype}"
    if kernel is fused_triton._product_kernel:
        sizes = dict.fromkeys(("rows", "columns", "inner", "a_row", "a_inner"), "i32")
        types = {"a": pointer, "b": pointer, "factor": "*fp32", **sizes}
        yield types | {"out": "*fp32"}, {"ADD": True, "PRECISION": "tf32x3", "a_inner": 1}
        yield types | {"out": pointer}, {"ADD": False, "PRECISION": "tf32x3", "a_row": 1}
        return
    sides = (f"{side}_{part}" for side in ("student", "teacher") for part in ("image", "text"))
    sizes = ("rows", "classes", "student_width", "teacher_width", "share", "first", "last", "out_row")
    types = dict.fromkeys(sides, pointer) | dict.fromkeys(sizes, "i32")
    types |= dict.fromkeys(("scales", "prior", "sums", "terms"), "*fp32") | {"out": pointer}
    types |= dict.fromkeys(("ratio", "gamma", "entropy"), "fp32")
    for prior in (False, True):
        constants = {"STUDENT": True, "PRIOR": prior, "SMOOTH": not prior, "POWER": True, "WMSE": True}
        yield types | {"labels": "*i64" if prior else "*fp32"}, constants | {"PRECISION": "tf32x3"}


def build(kernel, types, constants, config, target):
    """Compile one variant with sizes and strides that are multiples of 16."""
    function = kernel.fn
    constants = {name: value for name, value in (constants | config.kwargs).items() if name in function.arg_names}
    signature = {name: "constexpr" if name in constants else types[name] for name in function.arg_names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or (kind == "i32" and name not in ("first", "last"))
    }
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    source = ASTSource(function, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def spilled_bytes(built, folder):
    """Local memory of a thread, from the machine code."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(built.asm["cubin"])
    command = [TOOLS / "cuobjdump", "--dump-resource-usage", cubin]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    assert int(found[1]) <= 255
    return int(found[2])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", ["_row_sums_kernel", "_gradient_kernel", "_product_kernel"])
@pytest.mark.parametrize("target", SHARED_BYTES)
def test_every_tile_fits_the_gpu(target, name, dtype, tmp_path):
    """Each configuration that autotuning may time fits into shared memory, keeps its values in registers, multiplies on
    tensor cores, and copies embeddings 16 bytes at a time."""
    kernel = getattr(fused_triton, name)
    operand = torch.empty(0, dtype=TYPES[dtype])
    for types, constants in variants(kernel, dtype):
        configs = kernel.early_config_prune(kernel.configs, {"operand": operand}, **constants)
        assert configs
        for config in configs:
            built = build(kernel, types, constants, config, target)
            what = f"{constants} {config}"
            assert built.metadata.shared <= SHARED_BYTES[target], what
            assert spilled_bytes(built, tmp_path) <= SPILLED_BYTES, what
            assert TENSOR_CORES[target] in built.asm["ptx"], what
            assert "cp.async.cg.shared.global" in built.asm["ptx"], what
