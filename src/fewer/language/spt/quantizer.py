"""Product quantisation of queries and keys, and the lookup: keys whose codes agree with a query's in most subspaces are kept.

Source: SPT, arXiv 2312.10365, and its released quantiser (L1 distance, 16 codewords of 8 numbers, one code book a layer).
"""

from __future__ import annotations

import functools
import itertools
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int32, Int64, UInt8, UInt16
from torch import Tensor, nn

from fewer.checks import check_choice, check_whole

Keep = Literal["sequence", "row"]
Tie = Literal["recent", "early"]
MOST_SUBSPACES = 127  # a byte's half: the other half marks keys that are not to be seen


class CSR(NamedTuple):
    """Which keys each query keeps, for B x H heads of n queries one after the other.

    Attributes:
        indptr: [B H n + 1] where each query's keys begin.
        indices: the keys, rising for each query; two bytes each up to 65,536 keys, four beyond.
        heads: (B, H, n).
    """

    indptr: Int64[Tensor, "rows+1"]
    indices: UInt16[Tensor, "kept"] | Int32[Tensor, "kept"]
    heads: tuple[int, int, int]


class ProductQuantizer(nn.Module):
    """A code of M = d / codeword_dim numbers for each head vector: in each subspace the nearest of a few codewords by L1 distance.

    Attributes:
        codebook: [M, codewords, codeword_dim], drawn from N(0, 1), shared by all heads and by queries and keys of a layer.

    Raises:
        ValueError: head_dim is no multiple of codeword_dim, more than 256 codewords, none.

    Examples:
        >>> quantizer = ProductQuantizer(head_dim=64)
        >>> quantizer.encode(torch.randn(2, 3, 5, 64)).shape
        torch.Size([2, 3, 5, 8])
    """

    def __init__(self, head_dim: int, codeword_dim: int = 8, codewords: int = 16) -> None:
        super().__init__()
        check_whole(head_dim=head_dim, codeword_dim=codeword_dim, codewords=codewords)
        if head_dim % codeword_dim:
            raise ValueError(f"a head has {head_dim} numbers and codeword_dim is {codeword_dim}; expected a divisor of {head_dim}")
        if codewords > 256:
            raise ValueError(f"codewords is {codewords}; expected at most 256: a code is a byte")
        self.codebook = nn.Parameter(torch.randn(head_dim // codeword_dim, codewords, codeword_dim))

    def _distances(self, z: Float[Tensor, "... d"]) -> tuple[Float[Tensor, "M n c"], Float[Tensor, "M n w"]]:
        """(the vectors by subspace, their L1 distances to its codewords); half types are computed in float32."""
        subspaces, _, width = self.codebook.shape
        book = self.codebook if self.codebook.dtype == torch.float64 else self.codebook.float()
        parts = z.reshape(-1, subspaces, width).to(book.dtype).transpose(0, 1)
        return parts, torch.cdist(parts.contiguous(), book, p=1)

    @torch.no_grad()
    def encode(self, z: Float[Tensor, "... d"]) -> UInt8[Tensor, "... M"]:
        """The nearest codeword of each subspace, of equally near ones the first."""
        _, distance = self._distances(z)
        return distance.argmin(-1).T.reshape(*z.shape[:-1], -1).to(torch.uint8)

    def loss(self, z: Float[Tensor, "... d"], detach: bool = False) -> Float[Tensor, ""]:
        """MSE(soft, hard) + MSE(z, hard): a soft centroid by inverse distances, and the nearest codeword; the code is a constant.

        Args:
            detach: keep the gradient from the vectors themselves.
        """
        parts, distance = self._distances(z.detach() if detach else z)
        near = distance.clamp_min(1e-5).reciprocal()
        weight = near / near.sum(-1, keepdim=True)  # softmax(-log(distance))
        book = self.codebook.to(parts.dtype)
        soft = weight @ book
        hard = torch.gather(book, 1, distance.argmin(-1, keepdim=True).expand_as(parts))
        return nn.functional.mse_loss(soft, hard) + nn.functional.mse_loss(parts, hard)


def kept_counts(visible: Bool[Tensor, "B t"], queries: int, keep: int, keep_per: Keep) -> Int64[Tensor, "B n"]:
    """How many keys each query keeps: ceil(n / keep) of the sequence's own tokens, or of those up to the query; none where it is padding."""
    seen = visible.cumsum(-1)
    base = seen[:, -1:].expand_as(seen) if keep_per == "sequence" else seen
    return torch.minimum(-(-base // keep), seen).masked_fill(~visible, 0)[:, -queries:]


@torch.no_grad()
def lookup(
    q_codes: UInt8[Tensor, "B H n M"],
    k_codes: UInt8[Tensor, "B G t M"],
    keep: int = 8,
    causal: bool = True,
    key_mask: Tensor | None = None,
    *,
    keep_per: Keep = "sequence",
    tie: Tie = "recent",
    window: int | None = None,
) -> CSR:
    """The keys with the most agreeing codes for each query, exactly, without a tensor of n x t.

    Args:
        q_codes, k_codes: of H query heads and G key heads (H is a multiple of G); the last n of t positions are the queries'.
        keep: one in so many keys is kept, rounded up; fewer where fewer are visible.
        causal: a query sees keys up to its own position; False lets it see all.
        key_mask: [B, t], false for padding, which is never kept and keeps nothing.
        keep_per: "sequence" counts all of the sequence's tokens, "row" those that the query sees, as writing with a cache does.
        tie: of keys that agree as much, the "recent" ones or the "early" ones.
        window: a query sees no key farther back than so many.

    Raises:
        ValueError: keep below 1, no tokens, codes or a mask of shapes that do not fit, codes of more than 127 numbers.
    """
    from fewer.language.spt import kernels

    check_whole(keep=keep)
    check_choice(get_args(Keep), keep_per=keep_per)
    check_choice(get_args(Tie), tie=tie)
    batch, heads, queries, subspaces = q_codes.shape
    groups, keys = k_codes.shape[1:3]
    if not queries or keys < queries or heads % groups or k_codes.shape[3] != subspaces or len(k_codes) != batch:
        raise ValueError(
            f"q_codes are {tuple(q_codes.shape)} and k_codes {tuple(k_codes.shape)}; expected [B, H, n, M] and [B, G, t, M] with 1 <= n <= t "
            "and H a multiple of G"
        )
    if subspaces > MOST_SUBSPACES:
        raise ValueError(f"a code has {subspaces} numbers; expected at most {MOST_SUBSPACES}: use a larger codeword_dim")
    device = q_codes.device
    visible = torch.ones(batch, keys, dtype=torch.bool, device=device) if key_mask is None else key_mask.bool().to(device)
    if visible.shape != (batch, keys):
        raise ValueError(f"key_mask is {tuple(visible.shape)}; expected [{batch}, {keys}]: one value for each key")
    place = torch.arange(keys - queries, keys, device=device)
    last = place if causal else torch.full_like(place, keys - 1)
    first = torch.zeros_like(place) if window is None else (place - window + 1).clamp_min(0)
    wanted = kept_counts(visible, queries, keep, keep_per)
    if window is not None or not causal:
        before = nn.functional.pad(visible.cumsum(-1), (1, 0))
        seen = (before[:, last + 1] - before[:, first]) * visible[:, -queries:]
        wanted = -(-seen // keep) if keep_per == "row" or not causal else torch.minimum(wanted, seen)
    indptr = nn.functional.pad(wanted[:, None].expand(-1, heads, -1).reshape(-1).cumsum(0), (1, 0))
    short, recent = torch.uint16 if keys <= 1 << 16 else torch.int32, tie == "recent"
    hidden = (128 * ~visible).to(torch.uint8)
    if not kernels.in_loops(q_codes):
        starts = indptr[:-1].view(batch, heads, queries)
        found = kernels.select_in_chunks(q_codes, k_codes, hidden, first, last, wanted, recent, starts, int(indptr[-1]))
        return CSR(indptr, found.to(short), (batch, heads, queries))
    indices = torch.empty(int(indptr[-1]), dtype=short)
    q, k, unseen = q_codes.contiguous().numpy(), k_codes.transpose(2, 3).contiguous().numpy(), hidden.numpy()
    spans, due, kept = (first.numpy(), last.numpy()), wanted.numpy(), indices.numpy()

    def one(b: int, h: int) -> None:
        at = int(indptr[(b * heads + h) * queries])
        kernels.select_keys(q[b, h], k[b, h * groups // heads], unseen[b], *spans, due[b], recent, at, kept)

    kernels.each_of(functools.partial(one, b, h) for b in range(batch) for h in range(heads))
    return CSR(indptr, indices, (batch, heads, queries))


def visible_scores(
    q: Float[Tensor, "n d"], k: Float[Tensor, "t d"], mask: Tensor | None = None, window: int | None = None
) -> Float[Tensor, "n t"]:
    """A head's true scores, -inf where a query does not see a key: the matrix that codes avoid."""
    n, t = len(q), len(k)
    seen = torch.ones(n, t, dtype=torch.bool, device=q.device).tril(t - n)
    if window is not None:
        seen = seen.triu(t - n - window + 1)
    if mask is not None:
        seen &= mask
    return (q.float() @ k.float().T * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)


@torch.no_grad()
def recall_and_mass(
    q: Float[Tensor, "B H n d"], k: Float[Tensor, "B G t d"], csr: CSR, mask: Tensor | None = None, window: int | None = None
) -> tuple[float, float]:
    """(how many of the K truly largest scores of each query were kept, which share of the whole softmax they hold), means over queries.

    A diagnosis: the scores of a head at a time.
    """
    batch, heads, queries = csr.heads
    counts, recalls, masses = csr.indptr.diff().cpu().view(batch, heads, queries), [], []
    parts = csr.indices.cpu().long().split(counts.sum(-1).flatten().tolist())
    for (b, h), kept_keys in zip(itertools.product(range(batch), range(heads)), parts, strict=True):
        scores = visible_scores(q[b, h], k[b, h * k.shape[1] // heads], None if mask is None else mask[b], window).cpu()
        wanted, some = counts[b, h], counts[b, h] > 0
        kept = torch.zeros_like(scores, dtype=torch.bool)
        kept[torch.repeat_interleave(torch.arange(queries), wanted), kept_keys] = True
        rank = scores.argsort(-1, descending=True).argsort(-1)
        recalls.append(((kept & (rank < wanted[:, None])).sum(-1) / wanted)[some].mean().item())
        masses.append((scores.softmax(-1) * kept).sum(-1)[some].mean().item())
    return sum(recalls) / len(recalls), sum(masses) / len(masses)
