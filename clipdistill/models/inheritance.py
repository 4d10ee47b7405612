"""Weight inheritance: a student's transformer towers as shallower and narrower copies of a larger model's.

Source: the manual rule of TinyCLIP (Wu et al., ICCV 2023, arXiv 2309.12314, section 3.2): layers at a regular interval,
the leading channels, heads and hidden units of each. A tower of which nothing is cut is an exact copy.

Axes of a weight: ``width`` of the residual stream, ``heads`` (heads times their dimensions; several of them where
queries, keys and values are fused), ``hidden`` units of an MLP, ``space`` of the embeddings, ``position`` of a token.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from clipdistill.errors import InputError
from clipdistill.models.towers import is_text

LayerRule = Literal["every", "first", "last"]
WidthRule = Literal["leading", "largest"]

_AXES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        r"(?<!mlp\.)(?<!attn\.)(ln_1|ln_2|norm1|norm2|ln_pre|ln_post|ln_final|norm_pre|norm|fc_norm)\.(weight|bias)",
        ("width",),
    ),
    (r"(ls_1|ls_2|ls1|ls2)\.gamma", ("width",)),
    (r"attn\.(in_proj_weight|qkv\.weight)", ("3 heads", "width")),
    (r"attn\.(in_proj_bias|qkv\.bias)", ("3 heads",)),
    (r"attn\.(out_proj|proj)\.weight", ("width", "heads")),
    (r"attn\.(out_proj|proj)\.bias", ("width",)),
    (r"attn_pool\.latent", ("", "", "width")),
    (r"attn_pool\.q\.weight", ("heads", "width")),
    (r"attn_pool\.q\.bias", ("heads",)),
    (r"attn_pool\.kv\.weight", ("2 heads", "width")),
    (r"attn_pool\.kv\.bias", ("2 heads",)),
    (r"attn_pool\.proj\.weight", ("width", "heads")),
    (r"attn_pool\.proj\.bias", ("width",)),
    (r"mlp\.(c_fc|fc1)\.weight", ("hidden", "width")),
    (r"mlp\.(c_fc|fc1)\.bias", ("hidden",)),
    (r"mlp\.(c_proj|fc2)\.weight", ("width", "hidden")),
    (r"mlp\.(c_proj|fc2)\.bias", ("width",)),
    (r"(conv1|patch_embed\.proj)\.weight", ("width", "", "", "")),
    (r"patch_embed\.proj\.bias", ("width",)),
    (r"(class_embedding|cls_emb)", ("width",)),
    (r"(cls_token|reg_token)", ("", "", "width")),
    (r"pos_embed", ("", "position", "width")),
    (r"positional_embedding", ("position", "width")),
    (r"token_embedding\.weight", ("", "width")),
    (r"(proj|text_projection)", ("width", "space")),
    (r"(head|head\.proj|text_projection)\.weight", ("space", "width")),
    (r"(head|head\.proj|text_projection)\.bias", ("space",)),
)
"""Axes of each weight, by the end of its name; an axis without a name cannot be cut."""
_COMPILED = tuple((re.compile(rf"(?:.*\.)?{pattern}"), axes) for pattern, axes in _AXES)
_BLOCK = re.compile(r"(.*\.(?:resblocks|blocks))\.(\d+)\.(.*)")


class _Attention(NamedTuple):
    heads: int
    dimensions: int
    """Of each head."""


@dataclass(frozen=True, kw_only=True)
class _Tower:
    """One side of an inheritance.

    Attributes:
        state: its tensors by name.
        blocks: number of blocks, by the name of their list.
        attention: of each attention module, by its name; ``attn`` of all blocks is that of the first.
        width: of the residual stream.
    """

    state: Mapping[str, Tensor]
    blocks: Mapping[str, int]
    attention: Mapping[str, _Attention]
    width: int


def inherit(student: nn.Module, source: nn.Module, *, layers: LayerRule, width: WidthRule, what: str) -> None:
    """Copy a tower's weights into a smaller one of the same make, in place.

    Args:
        student: the tower; an image tower, or the module of a text tower.
        source: the larger tower.
        layers: which of its L blocks the student's l are: ``every`` (L // l)-th, the ``first``, or the ``last`` ones.
        width: which channels, heads and hidden units a narrower student keeps: the ``leading`` ones, or those with the
            ``largest`` weights.
        what: the tower, in messages: image or text tower.

    Raises:
        InputError: a weight of the student has no counterpart, or one that does not contain it; it is named.
    """
    ours, theirs = _describe(student), _describe(source)
    shapes = [{name: tensor.shape for name, tensor in tower.state.items()} for tower in (ours, theirs)]
    if shapes[0] == shapes[1] and ours.attention == theirs.attention:
        with torch.no_grad():
            for name, target in ours.state.items():
                target.copy_(theirs.state[name])
        return
    chosen = {}
    for blocks, count in ours.blocks.items():
        have = theirs.blocks.get(blocks, 0)
        if count > have:
            raise InputError(
                f"student.init.from: {blocks} of the {what} has {count} blocks in the student, and {have} in the "
                "source; allowed: at most as many"
            )
        chosen[blocks] = _choose_layers(layers, have, count)
    originals = {}
    for name in ours.state:
        block = _BLOCK.fullmatch(name)
        originals[name] = f"{block[1]}.{chosen[block[1]][int(block[2])]}.{block[3]}" if block else name
        if originals[name] not in theirs.state:
            raise InputError(
                f"student.init.from: the student's {what} has {name}, and the source has no {originals[name]}; "
                "allowed: towers of the same architecture"
            )
    kept = _Kept(ours, theirs, largest=width == "largest", what=what)
    with torch.no_grad():
        for name, target in ours.state.items():
            target.copy_(kept.of(originals[name], target, name))


def _describe(tower: nn.Module) -> _Tower:
    state = tower.state_dict(keep_vars=True)
    if hasattr(tower, "visual"):  # open_clip's CLIP, which is its own text tower
        state = {name: tensor for name, tensor in state.items() if is_text(name)}
    blocks: dict[str, int] = {}
    for name in state:
        if block := _BLOCK.fullmatch(name):
            blocks[block[1]] = max(blocks.get(block[1], 0), int(block[2]) + 1)
    attention: dict[str, _Attention] = {}
    for path, module in tower.named_modules():
        heads = getattr(module, "num_heads", None)
        if isinstance(heads, int) and is_text(path):
            for weight, copies in (("in_proj_weight", 3), ("qkv.weight", 3), ("q.weight", 1)):
                if f"{path}.{weight}" in state:
                    inner = len(state[f"{path}.{weight}"]) // copies
                    attention.setdefault(_without_block(path), _Attention(heads, inner // heads))
    widths = [len(tensor) for name, tensor in state.items() if re.search(r"\.(ln_1|norm1)\.weight$", name)]
    return _Tower(state=state, blocks=blocks, attention=attention, width=widths[0] if widths else 0)


def _without_block(path: str) -> str:
    block = _BLOCK.fullmatch(path)
    return block[3] if block else path


def _choose_layers(rule: LayerRule, theirs: int, ours: int) -> Sequence[int]:
    match rule:
        case "every":
            return range(0, ours * (theirs // ours), theirs // ours)
        case "first":
            return range(ours)
        case "last":
            return range(theirs - ours, theirs)


class _Kept:
    """The part of each of the source's weights that the student keeps."""

    def __init__(self, ours: _Tower, theirs: _Tower, *, largest: bool, what: str) -> None:
        self._ours, self._theirs = ours, theirs
        self._largest = largest
        self._what = what
        self._width = self._choose(theirs.width, ours.width, lambda: self._sizes_of_channels())

    def of(self, name: str, target: Tensor, student_name: str) -> Tensor:
        """The part of a weight that has the target's shape.

        Args:
            name: in the source.
            target: the student's.
            student_name: its name.
        """
        tensor = self._theirs.state[name]
        axes = axes_of(name)
        if axes is None and tensor.shape == target.shape:
            return tensor
        if axes is None or len(axes) != tensor.ndim or tensor.ndim != target.ndim:
            raise self._unmapped(name, target, "allowed: the same shape, as it is not known how to cut it")
        for number, axis in enumerate(axes):
            have, want = tensor.shape[number], target.shape[number]
            if axis == "position":
                tensor = self._positions(name, tensor, number, want, target)
                continue
            if axis in ("", "space"):
                index = torch.arange(want)
                if want > have or (axis == "" and want != have):
                    raise self._unmapped(name, target, f"allowed: {have} in dimension {number}")
            elif want > have:
                raise self._unmapped(name, target, f"allowed: at most {have} in dimension {number}")
            else:
                index = self._index(axis, name, student_name, have, want)
            tensor = tensor.index_select(number, index)
        if tensor.shape != target.shape:
            raise self._unmapped(name, target, "allowed: a tower whose widths fit together")
        return tensor

    def _attention_of(self, name: str) -> str | None:
        found = re.fullmatch(r"(?:.*\.)?(attn_pool|attn)\..*", _without_block(name))
        if found is None:
            return None
        return next((key for key in self._theirs.attention if key.rpartition(".")[2] == found[1]), None)

    def _index(self, axis: str, name: str, student_name: str, have: int, want: int) -> Tensor:
        """Indices along one axis."""
        if axis == "width":
            return self._width
        if axis == "hidden":
            return self._choose(have, want, lambda: self._sizes_of_units(name))
        key = self._attention_of(name)
        if key is None or key not in self._ours.attention:
            raise InputError(f"student.init.from: {name} of the {self._what}: heads unknown; allowed: another tower")
        copies = int(axis.partition(" ")[0]) if " " in axis else 1
        theirs, ours = self._theirs.attention[key], self._ours.attention[key]
        if ours.heads > theirs.heads or ours.dimensions > theirs.dimensions:
            raise InputError(
                f"student.init.from: {student_name} of the {self._what} has {ours.heads} heads of {ours.dimensions} "
                f"dimensions, the source {theirs.heads} of {theirs.dimensions}; allowed: at most as many of both"
            )
        heads = self._choose(theirs.heads, ours.heads, lambda: self._sizes_of_heads(name, theirs))
        inside = torch.arange(ours.dimensions)
        one = (heads[:, None] * theirs.dimensions + inside).flatten()
        return torch.cat([copy * theirs.heads * theirs.dimensions + one for copy in range(copies)])

    def _choose(self, have: int, want: int, sizes: Any) -> Tensor:
        """``want`` of ``have`` indices, in rising order."""
        if not self._largest or want >= have:
            return torch.arange(want)
        chosen: Tensor = sizes().topk(want).indices.sort().values
        return chosen

    def _sizes_of_channels(self) -> Tensor:
        """Squared norm of all weights of each channel of the residual stream."""
        total = torch.zeros(self._theirs.width)
        for name, tensor in self._theirs.state.items():
            axes = axes_of(name)
            if axes is not None and len(axes) == tensor.ndim > 1 and "width" in axes:
                total += _squares(tensor, axes.index("width"))
        return total

    def _sizes_of_units(self, name: str) -> Tensor:
        """Squared norm of the weights into and out of each hidden unit of the MLP that a weight belongs to."""
        prefix = re.sub(r"(c_fc|fc1|c_proj|fc2)\.(weight|bias)$", "", name)
        sizes = [
            _squares(tensor, axes.index("hidden"))
            for key, tensor in self._theirs.state.items()
            if key.startswith(prefix) and tensor.ndim == 2 and (axes := axes_of(key)) and "hidden" in axes
        ]
        return torch.stack(sizes).sum(0)

    def _sizes_of_heads(self, name: str, attention: _Attention) -> Tensor:
        """Squared norm of the weights into and out of each head of the attention that a weight belongs to."""
        prefix = re.sub(r"((?:^|.*\.)(?:attn_pool|attn)\.).*$", r"\1", name)
        total = torch.zeros(attention.heads)
        for key, tensor in self._theirs.state.items():
            axes = axes_of(key)
            if not key.startswith(prefix) or tensor.ndim != 2 or axes is None:
                continue
            for number, axis in enumerate(axes):
                if axis.endswith("heads"):
                    total += _squares(tensor, number).view(-1, attention.heads, attention.dimensions).sum((0, 2))
        return total

    def _positions(self, name: str, tensor: Tensor, axis: int, want: int, target: Tensor) -> Tensor:
        """The embeddings of positions: those of a text's first ones; of an image's grid, interpolated to another."""
        have = tensor.shape[axis]
        if want == have:
            return tensor
        if self._what == "text tower":
            if want > have:
                raise self._unmapped(name, target, f"allowed: a context of at most {have} tokens")
            return tensor.narrow(axis, 0, want)
        extra = {count - round(count**0.5) ** 2 for count in (have, want)}
        if len(extra) != 1:
            raise self._unmapped(name, target, "allowed: square grids of patches")
        batched = tensor if axis == 1 else tensor[None]
        side, prefix = round(want**0.5), extra.pop()
        resized = resample_abs_pos_embed(batched, [side, side], num_prefix_tokens=prefix, verbose=False)
        return resized if axis == 1 else resized[0]

    def _unmapped(self, name: str, target: Tensor, allowed: str) -> InputError:
        theirs, ours = list(self._theirs.state[name].shape), list(target.shape)
        return InputError(
            f"student.init.from: {name} of the {self._what} is {theirs} in the source and {ours} in the student; "
            f"{allowed}"
        )


def axes_of(name: str) -> tuple[str, ...] | None:
    """The axes of a weight of a transformer tower, by its name; None if it is unknown."""
    return next((axes for pattern, axes in _COMPILED if pattern.fullmatch(name)), None)


def _squares(tensor: Tensor, axis: int) -> Tensor:
    return tensor.detach().float().square().transpose(0, axis).flatten(1).sum(1)
