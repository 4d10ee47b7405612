"""ONNX files, for onnxruntime on servers and phones, and onnxruntime-web in browsers.

``image.onnx``       pixel_values float32 (batch, 3, H, W), normalised -> image_embeds (batch, D), unit norm
``text.onnx``        input_ids int64 (batch, L), padded to the context -> text_embeds (batch, D), unit norm
``classifier.onnx``  pixel_values as above -> probabilities (batch, C): a prompt set folded into a linear head

Any batch size; opset 18; operators of the default domain only. Size, mean, std, interpolation and resize mode of the
pixels, the logit scale, and the class names are in each file's metadata (JSON values).

Shapes: B images, N texts, C classes, L tokens, D features, H and W pixels.
"""

import contextlib
import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from clipdistill.errors import InputError
from clipdistill.export.parity import Runnable
from clipdistill.models.prompts import PromptSet
from clipdistill.models.towers import Tower

OPSET = 18
"""Of the default domain; supported by onnxruntime and onnxruntime-web since 1.14."""

IMAGE_FILE = "image.onnx"
TEXT_FILE = "text.onnx"
CLASSIFIER_FILE = "classifier.onnx"

LARGEST = 2**31
"""Size limit of one file, in bytes of float32 weights (that of protocol buffers)."""

_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
_QUANTISED: tuple[dict[str, Any], ...] = (
    {"op_types_to_quantize": ["Conv"], "weight_type": "QUInt8", "per_channel": False},
    {"op_types_to_quantize": ["MatMul", "Gemm", "Gather"], "weight_type": "QInt8", "per_channel": True},
)
"""Passes of the quantiser: onnxruntime before 1.24 has no convolution with signed weights, and matrix products with
unsigned weights take twice as long."""


def require_onnx() -> None:
    """Raise ``InputError`` unless the packages of the extra ``onnx`` are installed."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"{', '.join(missing)}: not installed; allowed: pip install 'clipdistill[onnx]'")


class _ImageTower(nn.Module):
    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, pixel_values: Tensor) -> Tensor:
        return F.normalize(self.clip.encode_image(pixel_values), dim=-1)


class _TextTower(nn.Module):
    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, input_ids: Tensor) -> Tensor:
        return F.normalize(self.clip.encode_text(input_ids), dim=-1)


class _Classifier(nn.Module):
    def __init__(self, clip: Any, bank_CD: Tensor) -> None:
        super().__init__()
        self.image = _ImageTower(clip)
        self.head = nn.Linear(bank_CD.shape[1], bank_CD.shape[0], bias=False)
        self.head.weight = nn.Parameter(clip.logit_scale.detach().exp() * bank_CD, requires_grad=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(self.image(pixel_values)).softmax(dim=-1)


def write_onnx(
    tower: Tower,
    folder: Path,
    *,
    prompts: PromptSet | None = None,
    bank_CD: Tensor | None = None,
    half: bool = False,
    int8: bool = False,
) -> list[Path]:
    """Write the ONNX files of a tower on the CPU and in eval mode.

    Args:
        tower: the model.
        folder: receives the files.
        prompts: classes and templates of the classifier; None: no classifier.
        bank_CD: the tower's class features of these prompts.
        half: store weights in float16; they are cast to float32 when the file is loaded.
        int8: also write ``*.int8.onnx`` for each file: int8 weights, and activations quantised dynamically.

    Returns:
        The files, quantised ones last.

    Raises:
        InputError: the packages are not installed, the model exceeds the size limit, or torch cannot export it.
    """
    require_onnx()
    size = 4 * sum(parameter.numel() for parameter in tower.clip.parameters())
    if size >= LARGEST:
        raise InputError(f"{size / 1e9:.1f} GB of weights, more than one file can hold ({LARGEST / 1e9:.1f} GB)")
    pixels_BCHW = torch.zeros(2, 3, *tower.image_size)
    tokens_NL = tower.tokenizer(["one text", "another text"])
    metadata = _metadata(tower)
    programs: list[tuple[str, Any, dict[str, Any]]] = [
        (IMAGE_FILE, _export(_ImageTower(tower.clip), pixels_BCHW, "pixel_values", "image_embeds"), {}),
        (TEXT_FILE, _export(_TextTower(tower.clip), tokens_NL, "input_ids", "text_embeds"), {}),
    ]
    if prompts is not None and bank_CD is not None:
        classifier = _export(_Classifier(tower.clip, bank_CD), pixels_BCHW, "pixel_values", "probabilities")
        classes: dict[str, Any] = {
            "prompts": prompts.name,
            "classnames": list(prompts.classnames),
            "templates": list(prompts.templates),
        }
        programs.append((CLASSIFIER_FILE, classifier, classes))
    paths = []
    for name, program, extra in programs:
        path = folder / name
        values = {key: json.dumps(value) for key, value in (metadata | extra).items()}
        program.model.metadata_props.update(values)
        program.save(path)
        paths.append(path)
    quantised = [_quantise(path) for path in paths] if int8 else []
    if half:
        for path in paths:
            _store_as_half(path)
    for path in (*paths, *quantised):
        _check(path)
    return [*paths, *quantised]


def load_onnx(path: Path, tower: Tower, *, tokenizer_file: Path | None = None) -> Runnable:
    """Load a written file with onnxruntime.

    Args:
        path: the file.
        tower: tokenizes if there is no ``tokenizer_file``.
        tokenizer_file: a ``tokenizer.json`` known to give the tower's ids.
    """
    import onnxruntime  # type: ignore[import-untyped]

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(values: np.ndarray) -> Tensor:
        return torch.from_numpy(session.run(None, {name: values})[0])

    def pixels(pixels_BCHW: Tensor) -> Tensor:
        return run(pixels_BCHW.numpy())

    kind = path.name.partition(".")[0]
    parts: dict[str, Any] = {"image": pixels} if kind == "image" else {"classify": pixels}
    if kind == "text":
        tokenizer = Tokenizer.from_file(str(tokenizer_file)) if tokenizer_file else None

        def text(texts: list[str]) -> Tensor:
            if tokenizer is None:
                return run(tower.tokenizer(texts).numpy())
            return run(np.array([encoding.ids for encoding in tokenizer.encode_batch(texts)]))

        parts = {"text": text}
    return Runnable(name=path.name, runtime="onnxruntime", exact=".int8." not in path.name, **parts)


def _metadata(tower: Tower) -> dict[str, Any]:
    preprocessing = open_clip.get_model_preprocess_cfg(tower.clip)
    height, width = tower.image_size
    return {
        "size": height if height == width else [height, width],
        "mean": list(preprocessing["mean"]),
        "std": list(preprocessing["std"]),
        "interpolation": preprocessing["interpolation"],
        "resize_mode": preprocessing["resize_mode"],
        "logit_scale": tower.clip.logit_scale.exp().item(),
        "logit_bias": None if tower.logit_bias() is None else float(tower.logit_bias()),  # type: ignore[arg-type]
        "context_length": tower.tokenizer.context_length,
    }


def _export(module: nn.Module, example: Tensor, input_name: str, output_name: str) -> Any:
    try:
        with _quiet(), torch.no_grad():
            return torch.onnx.export(
                module.eval(),
                (example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=[input_name],
                output_names=[output_name],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        cause = error.__cause__ or error
        detail = next((line for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
        raise InputError(f"torch cannot export the graph of {output_name}: {detail.strip()[:200]}") from error


def _store_as_half(path: Path) -> None:
    """Store float32 initializers in float16, each with a cast to float32, which runtimes fold at load time."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(path)
    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) > 1:
            name = tensor.name
            values = numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(values, f"{name}_float16"))
            casts.append(helper.make_node("Cast", [tensor.name], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, path)


def _quantise(path: Path) -> Path:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic  # type: ignore[import-untyped]

    target = path.with_suffix(".int8.onnx")
    model = onnx.load(path)
    for settings in _QUANTISED:
        del model.graph.value_info[:]  # older quantisers transpose weights without updating their shapes
        with _quiet():
            quantize_dynamic(model, target, **settings | {"weight_type": QuantType[settings["weight_type"]]})
        model = onnx.load(target)
    return target


def _check(path: Path) -> None:
    import onnx

    onnx.checker.check_model(str(path), full_check=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the progress output and warnings of exporter and quantiser."""
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
