"""Races: the area's casts against torchao's, what they take beside the tensor, and what a cast model costs to read with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fewer.devices import one_thread
from fewer.errors import require
from fewer.lowbit import block_matmul, fake_quantize, hadamard, quantize
from fewer.lowbit.int_vs_fp.model.divergence import Reference, divergence
from fewer.lowbit.int_vs_fp.model.linear import convert, revert
from fewer.lowbit.int_vs_fp.problems import model_and_text, torchao_int8
from fewer.meters import tensor_memory
from fewer.study import Bench

bench = Bench("int-vs-fp")
Work = Callable[[], object]
SHAPE = (4096, 1024)
SIZE = "4096 x 1024, one thread"


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def alone(work: Work) -> Work:
    def run() -> object:
        with one_thread():
            return work()

    return run


def mx_peer(x: Tensor, element: Any) -> Work:
    peer = require("torchao.prototype.mx_formats.mx_tensor", "peers")

    def run() -> Tensor:
        scale, codes = peer.to_mx(x, element, 32)
        return peer.to_dtype(codes, scale, element, 32, torch.float32)

    return run


@bench.race(f"cast to mxfp4 and back, {SIZE}", peer="torchao to_mx and to_dtype", reach=1 / 5)
def mxfp4() -> tuple[Work, Work]:
    x = drawn(*SHAPE)
    return alone(lambda: fake_quantize(x, "mxfp4")), alone(mx_peer(x, torch.float4_e2m1fn_x2))


@bench.race(f"cast to mxfp8 and back, {SIZE}", peer="torchao to_mx and to_dtype", reach=1 / 5)
def mxfp8() -> tuple[Work, Work]:
    x = drawn(*SHAPE)
    return alone(lambda: fake_quantize(x, "mxfp8_e4m3")), alone(mx_peer(x, torch.float8_e4m3fn))


@bench.race(f"cast to nvfp4 and back, {SIZE}", peer="torchao NVFP4Tensor", reach=1 / 5)
def nvfp4() -> tuple[Work, Work]:
    peer = require("torchao.prototype.mx_formats.nvfp4_tensor", "peers")
    x = drawn(*SHAPE)

    def theirs() -> Tensor:
        whole = peer.per_tensor_amax_to_scale(x.abs().max())
        return peer.NVFP4Tensor.to_nvfp4(x, per_tensor_scale=whole).dequantize(torch.float32)

    return alone(lambda: fake_quantize(x, "nvfp4")), alone(theirs)


@bench.race(f"stochastic rounding to mxfp4, {SIZE}", peer="our own cast to nearest", reach=2.5)
def stochastic() -> tuple[Work, Work]:
    x, draw = drawn(*SHAPE), torch.Generator().manual_seed(0)
    return (
        alone(lambda: fake_quantize(x, "mxfp4", rounding="stochastic", generator=draw)),
        alone(lambda: fake_quantize(x, "mxfp4")),
    )


@bench.race(f"packed to mxfp4, {SIZE}", peer="torchao to_mx")
def packed() -> tuple[Work, Work]:
    peer = require("torchao.prototype.mx_formats.mx_tensor", "peers")
    x = drawn(*SHAPE)
    return alone(lambda: quantize(x, "mxfp4")), alone(lambda: peer.to_mx(x, torch.float4_e2m1fn_x2, 32))


def memory_of(work: Work) -> int:
    """The peak of what is allocated, the result with it."""
    work()
    with tensor_memory() as memory:
        kept = work()
    del kept
    return memory.total


@bench.quantity("memory that a cast to nvfp4 takes, its result with it", peer="the tensor itself", unit="bytes", reach=1.5)
def memory() -> tuple[float, float]:
    x = drawn(*SHAPE)
    return memory_of(lambda: fake_quantize(x, "nvfp4")), x.nbytes


@bench.quantity("memory that a cast to nvfp4 in place takes", peer="16 MiB", unit="bytes", reach=1.0)
def memory_in_place() -> tuple[float, float]:
    x = drawn(*SHAPE)
    return memory_of(lambda: fake_quantize(x, "nvfp4", out=x)), 2**24


@bench.quantity("memory that a cast to mxfp4 takes, its result with it", peer="torchao to_mx and to_dtype", unit="bytes", reach=1.0)
def memory_beside_torchao() -> tuple[float, float]:
    x = drawn(*SHAPE)
    return memory_of(lambda: fake_quantize(x, "mxfp4")), memory_of(mx_peer(x, torch.float4_e2m1fn_x2))


@bench.race(f"a Hadamard rotation by 1,024, {SIZE}", peer="hadamard-transform", reach=1.0)
def rotation() -> tuple[Work, Work]:
    peer = require("hadamard_transform", "peers")
    x = drawn(*SHAPE)
    return alone(lambda: hadamard(x, 1024)), alone(lambda: peer.hadamard_transform(x))


@bench.race("MXINT8 product 256 x 1024 x 1024 by whole numbers", peer="dequantising and sgemm")
def product() -> tuple[Work, Work]:
    a, b = quantize(drawn(256, 1024), "mxint8"), quantize(drawn(1024, 1024, seed=1), "mxint8").T
    return lambda: block_matmul(a, b), lambda: a.dequantize() @ b.dequantize()


@bench.race("reading 256 tokens with SmolLM2-135M cast to MXINT8", peer="the uncast model", reach=1.5)
def reading() -> tuple[Work, Work]:
    given = model_and_text()
    cast, plain = convert(given.model(), "mxint8"), given.model()
    ids = given.windows(0)[0]["input_ids"]

    @torch.no_grad()
    def read(model: Any) -> Tensor:
        return model(input_ids=ids).logits

    return lambda: read(cast), lambda: read(plain)


@bench.quantity("KL of SmolLM2-135M in MXINT8", peer="torchao int8 by row and token", unit="nats a token", reach=1.0)
def kl() -> tuple[float, float]:
    given = model_and_text()
    model = given.model()
    reference = Reference.of(model, [each["input_ids"] for each in given.windows(0)])
    ours = divergence(reference, convert(model, "mxint8")).kl
    return ours, divergence(reference, torchao_int8(revert(model))).kl
