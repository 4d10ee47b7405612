"""Image-text retrieval: recall of images by their captions, and of captions by their image.

Shapes: N images, M captions, D features.
"""

import torch
from torch import Tensor

from clipdistill.evaluation.encoding import SetFeatures

RECALL_AT = (1, 5, 10)
_QUERIES = 1024
"""Queries per chunk: their scores take 4 bytes a candidate."""


def retrieval_metrics(features: SetFeatures) -> dict[str, float | int | None]:
    """Recall under CLIP_benchmark's names.

    Returns:
        For k of 1, 5 and 10 ``image_retrieval_recall@k``: the share of captions with their image among the k most
        similar images, and ``text_retrieval_recall@k``: the share of images with one of their captions among the k most
        similar captions (None for fewer than k candidates); ``mean_recall@1`` of both, DataComp's main metric;
        ``unreadable``: the number of unreadable images, which count as misses in both directions.
    """
    images, captions = len(features.keys), len(features.owner_M)
    number_N = torch.arange(images)
    readable_M = features.readable_N[features.owner_M]
    image_of_M = _first_hit(features.text_MD, features.image_ND, features.owner_M, number_N, features.readable_N)
    text_of_N = _first_hit(features.image_ND, features.text_MD, number_N, features.owner_M, torch.ones(captions).bool())
    metrics: dict[str, float | int | None] = {}
    for k in RECALL_AT:
        found_M, found_N = (image_of_M < k) & readable_M, (text_of_N < k) & features.readable_N
        metrics[f"image_retrieval_recall@{k}"] = float(found_M.double().mean()) if images >= k else None
        metrics[f"text_retrieval_recall@{k}"] = float(found_N.double().mean()) if captions >= k else None
    both = (metrics["image_retrieval_recall@1"], metrics["text_retrieval_recall@1"])
    metrics["mean_recall@1"] = sum(value or 0.0 for value in both) / 2
    metrics["unreadable"] = len(features.unreadable)
    return metrics


def _first_hit(query_QD: Tensor, candidate_PD: Tensor, owner_Q: Tensor, owner_P: Tensor, usable_P: Tensor) -> Tensor:
    """Rank (Q,), from 0 up to the largest k, of the best usable candidate that has the same owner as the query."""
    deepest = min(max(RECALL_AT), len(candidate_PD))
    ranks = []
    for query_BD, owner_B in zip(query_QD.split(_QUERIES), owner_Q.split(_QUERIES), strict=True):
        scores_BP = (query_BD @ candidate_PD.T).masked_fill(~usable_P, -torch.inf)
        match_BK = owner_P[scores_BP.topk(deepest, dim=1).indices] == owner_B[:, None]
        ranks.append(torch.where(match_BK.any(dim=1), match_BK.int().argmax(dim=1), deepest))
    return torch.cat(ranks)
