"""Codes, the lookup and attention over kept keys, each against its definition."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fewer.language.spt import kernels
from fewer.language.spt.attention import sparse_attention
from fewer.language.spt.peers import newest_keys, true_keys
from fewer.language.spt.quantizer import CSR, ProductQuantizer, lookup, recall_and_mass


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# Codes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_code_is_the_nearest_codeword_by_l1_of_equal_ones_the_first(dtype: torch.dtype) -> None:
    quantizer = ProductQuantizer(16, 8, 5)
    with torch.no_grad():
        quantizer.codebook[:, 3] = quantizer.codebook[:, 1]
    z = draw(2, 3, 7, 16).to(dtype)
    codes = quantizer.encode(z)
    assert codes.shape == (2, 3, 7, 2)
    assert codes.dtype == torch.uint8
    for place in itertools.product(range(2), range(3), range(7), range(2)):
        part = z[place[:3]][8 * place[3] : 8 * place[3] + 8].float()
        distances = [(part - word).abs().sum().item() for word in quantizer.codebook[place[3]]]
        assert codes[place].item() == distances.index(min(distances))
    assert not (codes == 3).any()
    assert torch.equal(quantizer.encode(z.transpose(0, 1)), codes.transpose(0, 1))  # a view


def test_the_code_books_loss_is_its_formula_and_its_gradient_right() -> None:
    quantizer, z = ProductQuantizer(8, 4, 3).double(), draw(6, 8, dtype=torch.float64).requires_grad_()
    with torch.no_grad():
        z[0, :4] = quantizer.codebook[0, 1]  # a distance of 0: the floor holds
    loss = quantizer.loss(z)
    soft_error = hard_error = 0.0
    for row in z:
        for m in range(2):
            part, words = row[4 * m : 4 * m + 4], quantizer.codebook[m]
            distance = (part - words).abs().sum(-1).clamp_min(1e-5)
            soft = ((1 / distance)[:, None] * words).sum(0) / (1 / distance).sum()
            hard = words[distance.argmin()]
            soft_error += (soft - hard).square().sum() / z.numel()
            hard_error += (part - hard).square().sum() / z.numel()
    torch.testing.assert_close(loss, soft_error + hard_error)
    apart = draw(6, 8, dtype=torch.float64, seed=3)

    def of(book: Tensor) -> Tensor:
        return _loss(quantizer, book, apart)

    assert torch.autograd.gradcheck(of, (quantizer.codebook.detach().clone().requires_grad_(),))
    (gradient,) = torch.autograd.grad(quantizer.loss(z), z)
    assert gradient.any()
    assert torch.autograd.grad(quantizer.loss(z, detach=True), z, allow_unused=True)[0] is None


def _loss(quantizer: ProductQuantizer, book: Tensor, z: Tensor) -> Tensor:
    kept = quantizer.codebook
    del quantizer.codebook
    quantizer.codebook = book  # pyright: ignore[reportAttributeAccessIssue]
    try:
        return quantizer.loss(z)
    finally:
        del quantizer.codebook
        quantizer.codebook = kept


def test_training_the_code_book_raises_the_recall_of_the_true_keys() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(24, 32, generator=generator) * 0.4
    q, k = (
        centres[torch.randint(24, (1, 2, 160), generator=generator)] + 0.05 * torch.randn(1, 2, 160, 32, generator=generator)
        for _ in range(2)
    )
    torch.manual_seed(0)
    quantizer = ProductQuantizer(32)

    def found() -> tuple[float, float]:
        csr = lookup(quantizer.encode(q), quantizer.encode(k), 8)
        return quantizer.loss(q).item() + quantizer.loss(k).item(), recall_and_mass(q, k, csr)[0]

    before = found()
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=3e-2)
    for _ in range(200):
        optimizer.zero_grad()
        (quantizer.loss(q) + quantizer.loss(k)).backward()
        optimizer.step()
    after = found()
    assert after[0] < before[0]
    assert after[1] > before[1]


# The lookup


@contextlib.contextmanager
def in_chunks(numbers: int) -> Iterator[None]:
    """As on another device than the CPU, with chunks of so many numbers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "in_loops", lambda tensor: False)
        patch.setattr(kernels, "CHUNK", numbers)
        yield


def brute(q: Tensor, k: Tensor, keep: int, mask: Tensor | None, keep_per: str, tie: str, window: int | None) -> list[list[int]]:
    """The kept keys of each query, by sorting."""
    batch, heads, queries, _ = q.shape
    keys, share = k.shape[2], heads // k.shape[1]
    rows = []
    for b in range(batch):
        visible = [True] * keys if mask is None else mask[b].bool().tolist()
        for h in range(heads):
            for i in range(queries):
                at = keys - queries + i
                seen = [j for j in range(at + 1) if visible[j] and (window is None or j > at - window)]
                count = sum(visible) if keep_per == "sequence" else len(seen)
                wanted = math.ceil(count / keep) if visible[at] else 0
                score = {j: int((q[b, h, i] == k[b, h // share, j]).sum()) for j in seen}
                seen.sort(key=lambda j: (-score[j], -j if tie == "recent" else j))
                rows.append(sorted(seen[:wanted]))
    return rows


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6), n=st.integers(1, 40), more=st.integers(0, 8), keep=st.integers(1, 9), padded=st.booleans(),
    keep_per=st.sampled_from(["sequence", "row"]), tie=st.sampled_from(["recent", "early"]), window=st.sampled_from([None, 1, 5]),
    words=st.integers(1, 4),
)  # fmt: skip
def test_the_lookup_is_a_sort(
    seed: int, n: int, more: int, keep: int, padded: bool, keep_per: Any, tie: Any, window: int | None, words: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(words, (2, 4, n, 3), generator=generator, dtype=torch.uint8)
    k = torch.randint(words, (2, 2, n + more, 3), generator=generator, dtype=torch.uint8)
    mask = torch.rand(2, n + more, generator=generator) < 0.7 if padded else None
    csr = lookup(q, k, keep, True, mask, keep_per=keep_per, tie=tie, window=window)
    rows = [part.tolist() for part in csr.indices.split(csr.indptr.diff().tolist())]
    assert rows == brute(q, k, keep, mask, keep_per, tie, window)
    with in_chunks(3 * 8 * (n + more)):
        other = lookup(q, k, keep, True, mask, keep_per=keep_per, tie=tie, window=window)
    assert (other.indptr.tolist(), other.indices.tolist()) == (csr.indptr.tolist(), csr.indices.tolist())


@pytest.mark.parametrize("n", [64, 200])
def test_the_lookup_of_long_rows_is_a_sort_too(n: int) -> None:
    q, k = (torch.randint(3, (1, 1, n, 8), generator=torch.Generator().manual_seed(n), dtype=torch.uint8) for _ in range(2))
    csr = lookup(q, k, 8)
    assert [part.tolist() for part in csr.indices.split(csr.indptr.diff().tolist())] == brute(q, k, 8, None, "sequence", "recent", None)


def test_all_keys_are_seen_where_nothing_is_causal() -> None:
    codes = torch.zeros(1, 1, 10, 2, dtype=torch.uint8)
    assert lookup(codes, codes, 1, causal=False).indptr.tolist() == list(range(0, 101, 10))


# Attention


def masks(csr: CSR, keys: int) -> Tensor:
    kept = torch.zeros(len(csr.indptr) - 1, keys, dtype=torch.bool)
    kept[torch.repeat_interleave(torch.arange(len(kept)), csr.indptr.diff()), csr.indices.long()] = True
    return kept.reshape(*csr.heads, keys)


def plain(q: Tensor, k: Tensor, v: Tensor, csr: CSR, clamp: float | None) -> Tensor:
    share = q.shape[1] // k.shape[1]
    a = q @ k.repeat_interleave(share, 1).transpose(2, 3) * q.shape[-1] ** -0.5
    a = a if clamp is None else a.clamp(-clamp, clamp)
    kept = masks(csr, k.shape[2])
    p = a.masked_fill(~kept, -torch.inf).softmax(-1)
    return torch.nan_to_num(p) @ v.repeat_interleave(share, 1)


def random_csr(n: int, keys: int, heads: tuple[int, int], keep: int, seed: int = 0) -> CSR:
    q, k = (
        torch.randint(3, (2, h, t, 4), generator=torch.Generator().manual_seed(seed + h), dtype=torch.uint8)
        for h, t in zip(heads, (n, keys), strict=True)
    )
    return lookup(q, k, keep)


def test_with_all_keys_and_no_clamp_it_is_causal_attention() -> None:
    q, k, v = (draw(2, 4, 33, 16, seed=seed).requires_grad_() for seed in range(3))
    csr = random_csr(33, 33, (4, 4), 1)
    out, expected = sparse_attention(q, k, v, csr, clamp=None), F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    for one, two in zip(*(torch.autograd.grad(each.square().sum(), (q, k, v)) for each in (out, expected)), strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


def test_equal_vectors_give_the_mean_of_the_kept_values() -> None:
    q = torch.ones(1, 1, 20, 8)
    v, csr = draw(1, 1, 20, 8), lookup(*(torch.zeros(1, 1, 20, 1, dtype=torch.uint8) for _ in range(2)), 4)
    out = sparse_attention(q, q, v, csr)
    for i in range(20):
        kept = csr.indices[csr.indptr[i] : csr.indptr[i + 1]].long()
        torch.testing.assert_close(out[0, 0, i], v[0, 0, kept].mean(0))


@pytest.mark.parametrize("clamp", [10.0, 0.4, None])
def test_gradients_are_those_of_the_kept_entries_and_nothing_goes_through_a_clamped_score(clamp: float | None) -> None:
    q, k, v = (draw(2, h, 6, 3, seed=seed, dtype=torch.float64).requires_grad_() for seed, h in enumerate((4, 2, 2)))
    csr = random_csr(6, 6, (4, 2), 2)
    torch.testing.assert_close(sparse_attention(q, k, v, csr, clamp), plain(q, k, v, csr, clamp), atol=1e-12, rtol=0)
    assert torch.autograd.gradcheck(lambda *each: sparse_attention(*each, csr, clamp), (q, k, v))
    ours, theirs = (
        torch.autograd.grad(each.sum(), (q, k, v)) for each in (sparse_attention(q, k, v, csr, clamp), plain(q, k, v, csr, clamp))
    )
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, atol=1e-10, rtol=0)
    if clamp == 0.4:
        far, v = (5 * draw(2, 4, 9, 4, dtype=torch.float64)).requires_grad_(), draw(2, 4, 9, 4, dtype=torch.float64)
        csr = random_csr(9, 9, (4, 4), 1)
        dead = ((far @ far.transpose(2, 3)).abs() * 0.5 > 0.4) | ~masks(csr, 9)
        (gradient,) = torch.autograd.grad(sparse_attention(far, far.detach(), v, csr, clamp).square().sum(), far)
        assert dead.all(-1).any()
        assert not gradient[dead.all(-1)].any()


@pytest.mark.parametrize("clamp", [0.4, None])
def test_chunks_of_rows_give_what_the_loops_give(clamp: float | None) -> None:
    q, k, v = (draw(2, h, n, 8, seed=h, dtype=torch.float64).requires_grad_() for h, n in ((4, 9), (2, 13), (2, 13)))
    csr, found = random_csr(9, 13, (4, 2), 3), []
    for chunks in (contextlib.nullcontext(), in_chunks(4 * 2 * 8 * 4 * 3)):
        with chunks:
            out = sparse_attention(q, k, v, csr, clamp)
            found.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_types_are_right_to_their_precision_and_views_are_taken(dtype: torch.dtype) -> None:
    q, k, v = (draw(1, 9, 2, 16, seed=seed).transpose(1, 2).to(dtype) for seed in range(3))
    csr = random_csr(9, 9, (2, 2), 2)
    csr = CSR(csr.indptr[: 2 * 9 + 1], csr.indices[: int(csr.indptr[18])], (1, 2, 9))
    out = sparse_attention(q, k, v, csr)
    assert out.dtype == dtype
    torch.testing.assert_close(
        out.double(), plain(q.double(), k.double(), v.double(), csr, 10.0), atol=4 * torch.finfo(dtype).eps, rtol=4 * torch.finfo(dtype).eps
    )


def test_a_query_that_is_padding_gets_zeros_and_changes_no_other() -> None:
    q, k, v = (draw(1, 2, 12, 8, seed=seed) for seed in range(3))
    codes = torch.zeros(1, 2, 12, 1, dtype=torch.uint8)
    mask = torch.arange(12)[None] >= 5
    out = sparse_attention(q, k, v, lookup(codes, codes, 3, True, mask))
    alone = sparse_attention(*(each[:, :, 5:] for each in (q, k, v)), lookup(codes[:, :, 5:], codes[:, :, 5:], 3))
    assert not out[:, :, :5].any()
    torch.testing.assert_close(out[:, :, 5:], alone)


def test_nothing_of_n_by_n_lives_in_a_pass_and_what_is_kept_is_values_and_indices() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    n, heads = 1024, 2
    q, k, v = (draw(1, heads, n, 16, seed=seed).requires_grad_() for seed in range(3))
    largest = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for each in out if isinstance(out, tuple | list) else [out]:
                if isinstance(each, Tensor):
                    largest[0] = max(largest[0], each.nbytes)
            return out

    quantizer, saved = ProductQuantizer(16), []
    with Watch():
        with torch.autograd.graph.saved_tensors_hooks(lambda each: (saved.append(each), each)[1], lambda each: each):
            csr = lookup(quantizer.encode(q), quantizer.encode(k), 8)
            out = sparse_attention(q, k, v, csr)
        out.sum().backward()
    assert largest[0] < 0.3 * n * n * heads * 4
    stored = sum(each.nbytes for each in saved if each.shape[-1:] != (16,))
    assert stored == pytest.approx(n * (n // 8) * heads * (4 + 2), rel=0.1)  # a value and an index


def test_other_ways_to_choose_keep_as_many() -> None:
    q, k = draw(1, 4, 30, 8), draw(1, 2, 30, 8, seed=1)
    codes = lookup(*(torch.zeros(*each.shape[:-1], 1, dtype=torch.uint8) for each in (q, k)), 8)
    best, newest = true_keys(q, k, None), newest_keys(q, k, None)
    assert torch.equal(best.indptr, codes.indptr)
    assert torch.equal(newest.indices, codes.indices)
    assert recall_and_mass(q, k, best)[0] == 1.0
    assert recall_and_mass(q, k, newest)[1] < recall_and_mass(q, k, best)[1] < 1


BAD: list[tuple[Any, str]] = [
    (lambda: ProductQuantizer(20), "a head has 20 numbers and codeword_dim is 8; expected a divisor of 20"),
    (lambda: ProductQuantizer(16, codewords=257), "codewords is 257; expected at most 256"),
    (lambda: lookup(*(torch.zeros(1, 1, 4, 1, dtype=torch.uint8),) * 2, keep=0), "keep is 0; expected a whole number of at least 1"),
    (lambda: lookup(*(torch.zeros(1, 1, 0, 1, dtype=torch.uint8),) * 2), "expected .* with 1 <= n <= t"),
    (
        lambda: lookup(*(torch.zeros(1, 1, 4, 1, dtype=torch.uint8),) * 2, key_mask=torch.ones(1, 3)),
        r"key_mask is \(1, 3\); expected \[1, 4\]",
    ),
    (lambda: lookup(*(torch.zeros(1, 1, 4, 128, dtype=torch.uint8),) * 2), "a code has 128 numbers; expected at most 127"),
    (lambda: sparse_attention(*(torch.zeros(1, 1, 4, 2),) * 3, random_csr(4, 4, (2, 2), 1)), "the kept keys are of"),
    (
        lambda: sparse_attention(*(torch.zeros(2, 2, 4, 2),) * 3, random_csr(4, 4, (2, 2), 1), clamp=0.0),
        "clamp is 0.0; expected a number above 0",
    ),
]


@pytest.mark.parametrize(("work", "message"), BAD)
def test_what_does_not_fit_is_refused(work: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        work()
