"""From texts to token ids.

Shapes: N texts or classes, n of a group, T templates, L tokens, D features.
"""

import hashlib
import json
import pickle
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

_NUMBERS_OF_GROUPS = (1, 2, 3, 4)


class TokenGroups(NamedTuple):
    """Token ids of texts in groups of similar lengths, each without the columns that its tower ignores.

    The cost of a text tower grows with the columns, and the longest of many captions is several times the mean.
    """

    tokens: tuple[Tensor, ...]
    """Of each group (n, L) or, of classes in several templates, (n, T, L); shorter ones first."""
    place_N: Tensor
    """Row of each text in all groups, one after another."""

    def encode(self, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """Features (N, D) of the texts in their order, from a function of a group's tokens."""
        return self._in_order([encode(tokens) for tokens in self.tokens])

    def map(self, change: Callable[[Tensor], Tensor]) -> "TokenGroups":
        """The groups with a function applied to each tensor, such as moving it to a device."""
        return TokenGroups(tuple(change(tokens) for tokens in self.tokens), change(self.place_N))

    def rows(self, rows: Sequence[int]) -> "TokenGroups":
        """Some of the texts, in another order."""
        return self._replace(place_N=self.place_N[rows])

    def _in_order(self, features: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(features)).index_select(0, self.place_N)

    @staticmethod
    def encode_together(parts: Sequence["TokenGroups"], encode: Callable[[Tensor], Tensor]) -> Tensor:
        """Features of the texts of several micro-batches, encoded together where these have equally many groups."""
        if len({len(part.tokens) for part in parts}) > 1:
            return torch.cat([part.encode(encode) for part in parts])
        of_groups = []
        for tokens in zip(*[part.tokens for part in parts], strict=True):
            of_groups.append(encode(cat_tokens(tokens)).split([len(each) for each in tokens]))
        of_parts = zip(*of_groups, strict=True)
        return torch.cat([part._in_order(features) for part, features in zip(parts, of_parts, strict=True)])


def cat_tokens(parts: Sequence[Tensor]) -> Tensor:
    """Token ids (N, L) one after another; shorter ones are padded with columns that their tower ignores."""
    if len({part.shape[1] for part in parts}) == 1:
        return torch.cat(list(parts)) if len(parts) > 1 else parts[0]
    return pad_sequence([row for part in parts for row in part], batch_first=True)


class TextTokenizer:
    """Converts texts to token ids for a text tower, independently of it: data workers tokenise captions with it.

    Args:
        tokenizer: texts -> (N, L) token ids.
        pooling: the tower's pooling position, from ``find_pooling``.
        multiple: trimmed token ids have a multiple of this number of columns, as far as the context length allows.
            (On a GPU, fewer shapes and aligned ones are faster.)
        group_cost: what a further group costs, in tokens: a tower's time for few tokens is that for its weights, or
            for its kernels. (128 is measured, on a CPU.)
    """

    def __init__(
        self, tokenizer: Any, pooling: Literal["argmax"] | int | None, *, multiple: int = 1, group_cost: int = 128
    ) -> None:
        self.tokenizer = tokenizer
        self.pooling = pooling
        self.multiple = multiple
        self.group_cost = group_cost

    def for_device(self, device: torch.device) -> "TextTokenizer":
        """The same tokenizer, with the shapes of tokens that suit a device."""
        shapes = {"multiple": 8, "group_cost": 4096} if device.type == "cuda" else {}
        return TextTokenizer(self.tokenizer, self.pooling, **shapes)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Token ids (N, L), trimmed."""
        return self.trim(self.tokenizer(list(texts)))

    def grouped(self, texts: Sequence[str], *, at_most: int | None = None) -> TokenGroups:
        """Token ids of texts, in groups as ``group`` makes them."""
        return self.group(self.tokenizer(list(texts)), at_most=at_most)

    def group(self, tokens: Tensor, *, at_most: int | None = None, templates: int = 1) -> TokenGroups:
        """Token ids (N, L), or (N, T, L) of classes in several templates, in groups of equal numbers of rows: in one to
        four, by their cost if ``templates`` of each class are encoded; or in those of ``at_most`` rows."""
        rows = len(tokens)
        if self.pooling is None:
            lengths_N = torch.full((rows,), tokens.shape[-1])
        else:
            lengths_N = pooled_positions(tokens, self.pooling).view(rows, -1).amax(1) + 1
        order_N = lengths_N.argsort(stable=True)
        if at_most is None:
            groups = min(_NUMBERS_OF_GROUPS, key=lambda number: self._cost(lengths_N[order_N], number, templates))
        else:
            groups = -(-rows // at_most)
        parts = order_N.tensor_split(groups)
        return TokenGroups(tuple(self.trim(tokens[part]) for part in parts), order_N.argsort())

    def _cost(self, sorted_N: Tensor, groups: int, texts: int) -> int:
        """Tokens of rows of these lengths, each of some texts, in a number of groups; with the cost of the groups."""
        if groups > len(sorted_N):
            return sys.maxsize
        parts = sorted_N.tensor_split(groups)
        return sum(len(part) * texts * self._rounded(int(part[-1])) + self.group_cost for part in parts)

    def _rounded(self, length: int) -> int:
        return -(-length // self.multiple) * self.multiple

    def trim(self, tokens: Tensor) -> Tensor:
        """Token ids (..., L), without the columns beyond the longest text if the tower ignores them."""
        return tokens[..., : self.used_length(tokens)].contiguous()

    def used_length(self, tokens: Tensor) -> int:
        """The number of columns of token ids (..., L) that the tower does not ignore, rounded up to ``multiple``."""
        if self.pooling is None:
            return tokens.shape[-1]
        used = int(pooled_positions(tokens, self.pooling).max()) + 1
        return min(self._rounded(used), tokens.shape[-1])

    def same_as(self, other: "TextTokenizer") -> bool:
        """Whether both provably return the same tokens for every text."""
        shapes = [(each.pooling, each.multiple, each.group_cost) for each in (self, other)]
        if shapes[0] != shapes[1]:
            return False
        return self.tokenizer is other.tokenizer or pickle.dumps(self.tokenizer) == pickle.dumps(other.tokenizer)

    def digest(self) -> str | None:
        """sha256 of vocabulary and settings, which alone determine the tokens of a text; None: of unknown make."""
        tokenizer = self.tokenizer
        if type(tokenizer) not in (SimpleTokenizer, HFTokenizer) or not hasattr(tokenizer.clean_fn, "__qualname__"):
            return None
        settings = [type(tokenizer).__name__, self.pooling, tokenizer.context_length, tokenizer.clean_fn.__qualname__]
        if isinstance(tokenizer, SimpleTokenizer):
            if tokenizer.reduction_fn is not None:
                return None
            settings += [tokenizer.encoder, list(tokenizer.bpe_ranks)]
        else:
            own = tokenizer.tokenizer
            if not own.is_fast:
                return None
            model = json.loads(own.backend_tokenizer.to_str())
            settings += [{**model, "truncation": None, "padding": None}]  # set anew by each call
            settings += [tokenizer.strip_sep_token, tokenizer.tokenizer_mode, getattr(own, "src_lang", None)]
            settings += [own.padding_side, own.truncation_side, own.pad_token_id]
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def find_pooling(text: Any) -> Literal["argmax"] | int | None:
    """Pooling position of a causal text tower: at the largest token id, or at this id; None if later columns may
    affect the features."""
    causal = getattr(text, "attn_mask", None) is not None
    if not causal or getattr(text, "cls_emb", None) is not None:
        return None
    match getattr(text, "pool_type", None) or getattr(text, "text_pool_type", None):
        case "argmax":
            return "argmax"
        case "eos":
            return int(text.eos_id if hasattr(text, "eos_id") else text.text_eos_id)
    return None


def pooled_positions(tokens: Tensor, pooling: Literal["argmax"] | int) -> Tensor:
    """Position in each row of token ids (..., L) at which a tower pools, by its ``find_pooling``."""
    return (tokens if pooling == "argmax" else torch.eq(tokens, pooling).int()).argmax(dim=-1)
