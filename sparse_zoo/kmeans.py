"""K-means (Lloyd's algorithm, Euclidean) of tokens, separate for each batch item and head, without random numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_zoo.blocks import slice_of

SCORES = 1 << 24
"""Distances held at once on a CPU while tokens are assigned to clusters; elsewhere as many as `slice_of` says."""


def clusters(
    x: Tensor, films: Sequence[Tensor], count: int, rounds: int, start: Sequence[Tensor] | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Cluster the tokens of each film, in float32.

    Args:
        x: (B, H, L, D).
        films: Tokens of the stream for each film, int64 (n,) with n at least 1.
        count: Clusters per film, or as many as it has tokens.
        rounds: Rounds of Lloyd's algorithm.
        start: Centroids to start from; None for tokens spread evenly over the film.

    Returns:
        The cluster of each token, int64 (B, H, L), counted through the films, -1 for tokens of none; and each film's
        centroids, float32 (B, H, clusters, D), the means of its clusters. Clusters may be empty.
    """
    labels = torch.full(x.shape[:3], -1, device=x.device)
    found: list[Tensor] = []
    for film, tokens in enumerate(films):
        many = min(count, len(tokens))
        spread = (2 * torch.arange(many, device=x.device) + 1) * len(tokens) // (2 * many)
        centroids = start[film] if start else x[:, :, tokens[spread]].float()
        nearest, centroids = kmeans(x, tokens, centroids, rounds)
        labels[:, :, tokens] = nearest + sum(held.shape[2] for held in found)
        found.append(centroids)
    return labels, found


def kmeans(x: Tensor, tokens: Tensor, centroids: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    """The nearest centroid of each of `tokens` of x (B, H, L, D), int64 (B, H, n), and the means that follow from it.

    `centroids` is float32 (B, H, C, D); an empty cluster keeps its centroid. Sums are products with one-hot tables,
    which give the same bits every time, also on a GPU, where adding by index does not. On the CPU, where reading a
    value costs nothing, rounds after one in which no token moved are skipped: they would change no bit.
    """
    batch, heads, count, _ = centroids.shape
    most = SCORES if x.device.type == "cpu" else slice_of(x)
    step = max(1, most // (batch * heads * count))
    nearest = torch.full((batch, heads, len(tokens)), -1, device=x.device)
    for _ in range(rounds):
        before = nearest.clone()
        total, number = torch.zeros_like(centroids), torch.zeros_like(centroids[..., :1])
        for first in range(0, len(tokens), step):
            some = slice(first, first + step)
            part = x[:, :, tokens[some]].float()
            # |x - c|^2 is least where x c - |c|^2 / 2 is largest; the first of equals is taken.
            scores = part @ centroids.transpose(-1, -2) - centroids.square().sum(-1)[:, :, None] / 2
            nearest[:, :, some] = scores.argmax(-1)
            taken = torch.zeros_like(scores).scatter_(-1, nearest[:, :, some, None], 1.0)
            total += taken.transpose(-1, -2) @ part
            number += taken.sum(2)[..., None]
        centroids = torch.where(number > 0, total / number.clamp(min=1), centroids)
        if x.device.type == "cpu" and torch.equal(nearest, before):
            break
    return nearest, centroids
