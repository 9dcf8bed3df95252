"""The two losses on router logits: neighbouring tokens shall activate the same experts, and a chunk of tokens few (section 3.2 of the paper)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Integer
from torch import Tensor
from torch.nn import functional as F

from fewer.checks import check_positive, check_whole
from fewer.language._shared.token_rows import neighbours, rows_of, valid_tokens
from fewer.language.block_ffn.layer import root_mean_square_norm

EPS = 1e-5  # of the released code, in p's divisor and in ln(1 - p + eps)


def activation_locality_loss(
    router_logits: Float[Tensor, "B S E"],
    doc_ids: Integer[Tensor, "B S"] | None = None,
    attention_mask: Integer[Tensor, "B S"] | None = None,
    alpha: float = 100.0,
    detach_target: bool = False,
) -> Float[Tensor, ""]:
    """L_AL of a layer: the cross-entropy between sigma(alpha A0_t) and sigma(alpha A0_{t+1}), mean over pairs of neighbours and experts.

    Args:
        router_logits: A0 of consecutive tokens.
        doc_ids: a number for each document; a pair of two documents does not count.
        attention_mask: 0 for padding; a pair with padding does not count.
        alpha: how sharply the sigmoid tells active from inactive, above 0.
        detach_target: no gradient into the later token; by default it flows into both, as in the released code.

    Returns:
        float32 (float64 of float64), 0 where there is no pair.

    Examples:
        >>> activation_locality_loss(torch.tensor([[[9.0, -9.0], [9.0, -9.0]]]))
        tensor(0.)
    """
    check_positive(alpha=alpha)
    pairs = neighbours(rows_of(router_logits), doc_ids, attention_mask).to(router_logits.device)
    sharp = alpha * router_logits.to(torch.promote_types(router_logits.dtype, torch.float32))
    target = torch.sigmoid(sharp[:, 1:][pairs])
    losses = F.binary_cross_entropy_with_logits(sharp[:, :-1][pairs], target.detach() if detach_target else target, reduction="sum")
    return losses / max(1, target.numel())


def chunk_sparsification_loss(
    router_logits: Float[Tensor, "B S E"],
    attention_mask: Integer[Tensor, "B S"] | None = None,
    chunk_len: int = 64,
    eps: float = EPS,
) -> Float[Tensor, ""]:
    """L_CS of a layer: the probability that a chunk of tokens activates an expert, mean over chunks and experts.

    p_ik, the share of expert i in token k's gates (without the weight w), is taken for the probability that the token activates the expert;
    over a chunk that is 1 - prod_k (1 - p_ik).

    Args:
        router_logits: A0; chunks are cut from the sequence's start.
        attention_mask: 0 for padding, which activates nothing; chunks of padding alone do not count.
        chunk_len: L.
        eps: of the router's norm.

    Returns:
        float32 (float64 of float64), 0 where all is padding.

    Raises:
        ValueError: the sequence is no multiple of L, or a shape does not fit.

    Examples:
        >>> same = torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(1, 8, 4)
        >>> other = torch.eye(4).repeat(1, 2, 1)
        >>> round(chunk_sparsification_loss(same, chunk_len=4).item(), 2), round(chunk_sparsification_loss(other, chunk_len=4).item(), 2)
        (0.25, 1.0)
    """
    batch, length = rows = rows_of(router_logits)
    check_whole(chunk_len=chunk_len)
    if length % chunk_len:
        whole = -(-length // chunk_len) * chunk_len
        raise ValueError(f"the sequence has {length} tokens; expected a multiple of chunk_len {chunk_len}: pad it to {whole}")
    valid = valid_tokens(rows, attention_mask).to(router_logits.device).view(batch, -1, chunk_len)
    gates = root_mean_square_norm(F.relu(router_logits), eps)
    share = gates / (gates.sum(-1, keepdim=True) + EPS)
    unused = torch.log(1 - share + EPS).unflatten(1, (-1, chunk_len)).masked_fill(~valid[..., None], 0)
    used = 1 - unused.sum(2).exp()
    chunks = valid.any(-1)
    return used[chunks].sum() / max(1, int(chunks.sum()) * router_logits.shape[-1])
