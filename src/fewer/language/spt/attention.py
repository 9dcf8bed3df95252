"""Attention over the keys that a lookup kept: values and indices of n K entries a head are stored, and no tensor of n x n ever.

With the settings of a sparse model, the module that chooses keys by codes, and the codes of a key-value cache's keys.

Source: SPT, arXiv 2312.10365: a = clamp(q.k / sqrt(d), -10, 10), softmax over the kept entries; the clamp stands for subtracting the largest.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from fewer.checks import check_choice, check_not_negative, check_whole
from fewer.language.spt.quantizer import CSR, Keep, ProductQuantizer, Tie, lookup


@dataclass(frozen=True)
class SPTConfig:
    """What of a model is made sparse, and how.

    Attributes:
        lora_r: LoRA's rank on all linear and embedding layers (no scaling factor); 0 puts none on.
        ffn_blocks, ffn_active: blocks of channels, and how many of them a token passes.
        attention_keep: one key in so many is kept.
        keep_per: see `lookup`; "row" makes writing with a cache equal to reading at once.
        codeword_dim, codewords: numbers of a subspace, and codewords in each.
        tie: which of equally agreeing keys are kept.
        clamp: of attention scores; None subtracts the largest instead.
        pq_weight, balance_weight: of the code books' loss and of the routers' balance, in `auxiliary_loss`.
        detach: keep the code books' loss from changing queries and keys.
        sparse_attention, routed_ffn: which of the two is done.
    """

    lora_r: int = 16
    ffn_blocks: int = 4
    ffn_active: int = 2
    attention_keep: int = 8
    keep_per: Keep = "sequence"
    codeword_dim: int = 8
    codewords: int = 16
    tie: Tie = "recent"
    clamp: float | None = 10.0
    pq_weight: float = 1e-2
    balance_weight: float = 0.0
    detach: bool = False
    sparse_attention: bool = True
    routed_ffn: bool = True

    def __post_init__(self) -> None:
        check_whole(0, lora_r=self.lora_r)
        check_whole(ffn_blocks=self.ffn_blocks, ffn_active=self.ffn_active, attention_keep=self.attention_keep)
        check_whole(codeword_dim=self.codeword_dim, codewords=self.codewords)
        check_not_negative(pq_weight=self.pq_weight, balance_weight=self.balance_weight)
        check_choice(("sequence", "row"), keep_per=self.keep_per)
        check_choice(("recent", "early"), tie=self.tie)
        if self.ffn_active > self.ffn_blocks:
            raise ValueError(f"ffn_active is {self.ffn_active} and ffn_blocks {self.ffn_blocks}; expected 1 to {self.ffn_blocks}")
        if self.codewords > 256:
            raise ValueError(f"codewords is {self.codewords}; expected at most 256: a code is a byte")
        if self.clamp is not None and not self.clamp > 0:
            raise ValueError(f"clamp is {self.clamp}; expected a number above 0, or None")


def sparse_attention(
    q: Float[Tensor, "B H n d"],
    k: Float[Tensor, "B G t d"],
    v: Float[Tensor, "B G t d"],
    csr: CSR,
    clamp: float | None = 10.0,
    scale: float | None = None,
) -> Float[Tensor, "B H n d"]:
    """Softmax attention over the kept keys; a query that keeps none gets zeros.

    Args:
        q, k, v: H query heads and G key heads (H is a multiple of G); half types are computed in float32.
        csr: what `lookup` gave for them.
        clamp: scores are clamped to it, and have no gradient beyond; None subtracts the largest score instead.
        scale: of q.k; 1 / sqrt(d) where it is None.

    Raises:
        ValueError: shapes that do not fit, a clamp that is not above 0.
    """
    batch, heads, queries, width = q.shape
    if csr.heads != (batch, heads, queries) or k.shape != v.shape or heads % k.shape[1] or k.shape[-1] != width:
        raise ValueError(
            f"q is {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} and the kept keys are of {csr.heads}; expected [B, H, n, d], "
            "[B, G, t, d] twice and the lookup of these very codes"
        )
    if clamp is not None and not clamp > 0:
        raise ValueError(f"clamp is {clamp}; expected a number above 0, or None")
    work = q.dtype if q.dtype == torch.float64 else torch.float32
    parts: Any = tuple(each.to(work).contiguous() for each in (q, k, v))
    out: Any = _Attention.apply(*parts, csr, clamp or 0.0, width**-0.5 if scale is None else scale)
    return out.to(q.dtype)


class _Attention(torch.autograd.Function):
    """Heads are independent but for the gradients of keys and values that several query heads share: a task is a key head."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, csr: CSR, clamp: float, scale: float) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        from fewer.language.spt import kernels

        run: Any = kernels.attend
        out, weights = torch.empty_like(q), q.new_empty(len(csr.indices))

        def one(b: int, h: int) -> None:
            indptr, indices, part = _of_head(csr, b, h)
            g = h * k.shape[1] // q.shape[1]
            run(*_arrays(q[b, h], k[b, g], v[b, g]), indptr, indices, scale, clamp, *_arrays(out[b, h], weights[part]))

        if kernels.in_loops(q):
            kernels.each_of(functools.partial(one, b, h) for b in range(len(q)) for h in range(q.shape[1]))
        else:
            kernels.attend_in_chunks(q, k, v, csr.indptr, csr.indices, scale, clamp, out, weights)
        ctx.save_for_backward(q, k, v, weights, csr.indptr, csr.indices)
        ctx.heads, ctx.scale = csr.heads, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        from fewer.language.spt import kernels

        q, k, v, weights, indptr, indices = ctx.saved_tensors
        csr = CSR(indptr, indices, ctx.heads)
        run: Any = kernels.attend_backward
        grad, share = grad.contiguous(), q.shape[1] // k.shape[1]
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)

        def one(b: int, g: int) -> None:
            for h in range(g * share, (g + 1) * share):
                indptr, indices, part = _of_head(csr, b, h)
                run(
                    *_arrays(q[b, h], k[b, g], v[b, g]), indptr, indices, ctx.scale,
                    *_arrays(weights[part], grad[b, h], dq[b, h], dk[b, g], dv[b, g]),
                )  # fmt: skip

        if kernels.in_loops(q):
            kernels.each_of(functools.partial(one, b, g) for b in range(len(q)) for g in range(k.shape[1]))
        else:
            kernels.attend_backward_in_chunks(q, k, v, csr.indptr, csr.indices, ctx.scale, weights, grad, dq, dk, dv)
        return dq, dk, dv, None, None, None


def _of_head(csr: CSR, b: int, h: int) -> tuple[np.ndarray, np.ndarray, slice]:
    """(indptr, indices, the entries) of a head."""
    _, heads, queries = csr.heads
    at = (b * heads + h) * queries
    indptr = csr.indptr[at : at + queries + 1]
    part = slice(int(indptr[0]), int(indptr[-1]))
    return indptr.numpy(), csr.indices[part].numpy(), part


def _arrays(*tensors: Tensor) -> list[np.ndarray]:
    return [each.detach().numpy() for each in tensors]


class SparseAttention(nn.Module):
    """The code book of an attention layer and what it found last; attached to the layer as `spt`.

    Attributes:
        beside: the cache's layer that this pass's keys come from, for their codes; None without a cache.
        watched: where it is a list, (q, k, csr, mask, window) of each pass goes into it.
        loss: the code books' loss of the last pass in training mode.
    """

    def __init__(self, head_dim: int, config: SPTConfig) -> None:
        super().__init__()
        self.quantizer, self.config = ProductQuantizer(head_dim, config.codeword_dim, config.codewords), config
        self.beside: CachedCodes | None = None
        self.watched: list[tuple[Any, ...]] | None = None
        self.loss: Tensor | None = None
        self.stored_bytes = 0

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, window: int | None) -> Tensor:
        config = self.config
        if self.training:
            self.loss = self.quantizer.loss(q, config.detach) + self.quantizer.loss(k, config.detach)
        csr = self.choose(q, k, mask, window)
        self.beside = None
        self.stored_bytes = len(csr.indices) * (csr.indices.element_size() + max(4, q.element_size()))
        if self.watched is not None:
            self.watched.append((q.detach(), k.detach(), csr, mask, window))
        return sparse_attention(q, k, v, csr, config.clamp, scale)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"loss": None, "beside": None}  # it has a graph, which no copy can have

    def choose(self, q: Tensor, k: Tensor, mask: Tensor | None, window: int | None) -> CSR:
        """The keys that are kept: those whose codes agree most."""
        config, quantizer = self.config, self.quantizer
        k_codes = quantizer.encode(k) if self.beside is None else self.beside.codes_of(k, q.shape[2], quantizer)
        words: dict[str, Any] = {"keep_per": config.keep_per, "tie": config.tie, "window": window}
        return lookup(quantizer.encode(q), k_codes, config.attention_keep, True, mask, **words)


# Codes beside a key-value cache


class CachedCodes:
    """What a layer of a transformers cache has besides: its keys' codes, which go where the keys go, so that a step encodes new keys alone.

    Attributes:
        codes: [B, G, t, M] of the newest keys.
        book: the code book that they are of; with another one they are made anew.
    """

    codes: Tensor | None = None
    book: Tensor | None = None

    def codes_of(self, k: Float[Tensor, "B G t d"], new: int, quantizer: ProductQuantizer) -> UInt8[Tensor, "B G t M"]:
        """The codes of a pass's keys, the last `new` of which no pass had before."""
        old, book = k.shape[2] - new, quantizer.codebook
        if self.codes is None or self.book is None or self.codes.shape[2] < old or not _alike(self.book, book):
            self.codes, self.book = quantizer.encode(k), book.detach().clone()
        else:
            known = self.codes[:, :, self.codes.shape[2] - old :]
            self.codes = torch.cat([known, quantizer.encode(k[:, :, old:])], dim=2)
        return self.codes

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.codes is not None:
            self.codes = change(self.codes)

    def reset(self) -> None:
        super().reset()  # pyright: ignore[reportAttributeAccessIssue]
        self.codes = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # pyright: ignore[reportAttributeAccessIssue]
        self._change(lambda codes: codes.index_select(0, beam_idx.to(codes.device)))

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)  # pyright: ignore[reportAttributeAccessIssue]
        if tokens_to_remove:
            self._change(lambda codes: codes[:, :, : -abs(tokens_to_remove)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # pyright: ignore[reportAttributeAccessIssue]
        self._change(lambda codes: codes.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # pyright: ignore[reportAttributeAccessIssue]
        self._change(lambda codes: codes[indices])


class CodedLayer(CachedCodes, DynamicLayer):
    """A cache's layer of all keys, and their codes."""


class CodedWindowLayer(CachedCodes, DynamicSlidingWindowLayer):
    """A cache's layer of a sliding window's keys, and their codes."""


CODED: dict[type, type] = {DynamicLayer: CodedLayer, DynamicSlidingWindowLayer: CodedWindowLayer}


def keep_codes(module: nn.Module, args: tuple[Any, ...], words: dict[str, Any]) -> None:
    """Before an attention's pass: let its layer of the cache, if there is one, hold codes too.

    A cache of another kind (quantised, whose old keys change) holds none: all its keys are encoded at each step.
    """
    own, cache, number = cast(Any, module).spt, words.get("cache"), cast(Any, module).layer_idx
    own.beside = None
    if cache is None:
        return
    while len(cache.layers) <= number and cache.layer_class_to_replicate is not None:  # as its update would
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[number]
    if type(layer) in CODED:
        plain, layer = layer, object.__new__(CODED[type(layer)])
        layer.__dict__.update(plain.__dict__)
        cache.layers[number] = layer
    own.beside = layer if isinstance(layer, CachedCodes) else None


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
