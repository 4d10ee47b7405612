"""The last transformer block of open_clip's towers, computed for the pooled token alone.

CLIP's features are those of one token: the class token of an image, the end-of-text token of a text. In the last block
the other tokens only serve as keys and values: queries, output projection and MLP, five sixths of the block's matrix
products, are needed for one row. The result is the same to rounding.

Shapes: N images or texts, L tokens, D width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from open_clip.transformer import ResidualAttentionBlock, Transformer, VisionTransformer
from torch import Tensor


class LastBlock(ResidualAttentionBlock):
    """A block whose output is right at the pooled tokens, and repeats them at the others.

    Attributes:
        pooled_N: position of the pooled token of each text; None: all tokens are computed, as in other blocks.
        pools_first: whether the first token of every input is pooled.
    """

    pooled_N: Tensor | None = None
    pools_first = False

    def forward(
        self,
        q_x: Tensor,
        k_x: Tensor | None = None,
        v_x: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        """(N, L, D) -> (N, L, D), or (N, 1, D) of the first token."""
        if self.pools_first:
            return self._at(q_x[:, :1], q_x, None)
        if self.pooled_N is None:
            return super().forward(q_x, k_x, v_x, attn_mask)
        rows_N = torch.arange(len(q_x), device=q_x.device)
        mask_NL = None if attn_mask is None else attn_mask[self.pooled_N]
        return self._at(q_x[rows_N, self.pooled_N][:, None], q_x, mask_NL).expand_as(q_x)

    def _at(self, pooled_N1D: Tensor, x_NLD: Tensor, mask_NL: Tensor | None) -> Tensor:
        """The block's output at one token of each input."""
        keys_NLD = self.ln_1(x_NLD)
        mask = (
            None if mask_NL is None else mask_NL.to(keys_NLD.dtype).repeat_interleave(self.attn.num_heads, 0)[:, None]
        )
        attended = self.attn(self.ln_1(pooled_N1D), keys_NLD, keys_NLD, need_weights=False, attn_mask=mask)[0]
        x_N1D = pooled_N1D + self.ls_1(attended)
        return x_N1D + self.ls_2(self.mlp(self.ln_2(x_N1D)))


def shorten_image_tower(visual: Any) -> None:
    """Compute the last block of a vision transformer for the class token alone, if that is what it pools."""
    if type(visual) is VisionTransformer and visual.attn_pool is None and visual.pool_type == "tok":
        block = None if visual.output_tokens else _shorten(visual.transformer)
        if block is not None:
            block.pools_first = True


@contextmanager
def all_tokens(visual: Any) -> Iterator[None]:
    """A block in which an image tower computes its last block for all tokens, as open_clip does."""
    shortened = [module for module in visual.modules() if isinstance(module, LastBlock) and module.pools_first]
    for block in shortened:
        block.pools_first = False
    try:
        yield
    finally:
        for block in shortened:
            block.pools_first = True


def shorten_text_tower(text: Any) -> LastBlock | None:
    """Prepare the last block of a text tower; it is shortened where ``pooled_at`` states the pooled tokens. None for a
    tower of another make."""
    output_tokens = getattr(text, "output_tokens", False)
    return None if output_tokens else _shorten(getattr(text, "transformer", None))


def _shorten(transformer: Any) -> LastBlock | None:
    if type(transformer) is not Transformer or not transformer.batch_first or not transformer.resblocks:
        return None
    block = transformer.resblocks[-1]
    if type(block) is ResidualAttentionBlock and not hasattr(block, "ln_1_kv"):
        block.__class__ = LastBlock  # the modules and their names stay
    return block if isinstance(block, LastBlock) else None


@contextmanager
def pooled_at(block: LastBlock | None, pooled_N: Tensor | None) -> Iterator[None]:
    """A block in which a text tower's last block is computed for these tokens alone."""
    if block is None or pooled_N is None:
        yield
        return
    block.pooled_N = pooled_N
    try:
        yield
    finally:
        block.pooled_N = None
