"""Bytes by message, the break-even, the body's server, and what a client computes."""

from __future__ import annotations

import copy
import gc
import math
from typing import Any

import numpy as np
import pytest
import torch
from split_vits import PlaybackServer, RecordingWire, cut, federation, images
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fewer.federated import BodyServer, FlatModel, Independent, SFPrompt, SFPromptConfig, Shards, Wire, simulate, wire_cost
from fewer.federated._shared.clients import Shard, client_rng
from fewer.federated.sfprompt.algorithm import SplitClient
from fewer.federated.sfprompt.cost import largest, split_numbers

CUTS = pytest.mark.parametrize(
    "words", [{"at": "input"}, {"at": "cut"}, {"at": "cut", "tail_blocks": 0}], ids=["input", "cut", "class token"]
)


# Costs


def by_hand(words, tokens, width, prompt, trained, sent, batches):
    """Point 4, written out."""
    t, p = (tokens + prompt) * width, prompt * width
    if words["at"] == "input":
        return 4 * t * sent + 2 * trained
    if words.get("tail_blocks") == 0:
        return (t - p + 2 * width) * sent + 2 * p * batches + 2 * trained
    return (3 * t - p) * sent + 2 * p * batches + 2 * trained


@pytest.mark.filterwarnings("ignore:client 0 sends")  # more than is wise
@CUTS
def test_counted_bytes_are_the_formulas(words):
    from split_vits import vit

    from fewer.federated import split_vit

    config = SFPromptConfig(batch_size=20, keep=0.5, split_epochs=2)
    split = split_vit(vit(), prompt_tokens=2, **words)
    wire = Wire(split.server())
    x, y = images(90)
    simulate(SFPrompt(config, wire), split.client, Shards(x, y, [range(90)]), 1, sampler=Independent(1.0))
    trained = FlatModel(split).size
    expected = by_hand(words, 5, 16, 2, trained, sent=2 * 45, batches=2 * 3)
    cost = wire_cost(split, 90, 0.5, split_epochs=2, batch_size=20)
    assert cost.numbers == wire.numbers
    assert cost.total == expected
    assert sum(wire.numbers.values()) == expected
    assert cost.sent_examples == 45
    whole = Wire(split.server())  # messages as large as the study's: what they are wrapped in is small beside them
    activations = torch.zeros(30, 17, 48)
    whole.send("smashed", activations)
    assert whole.bytes["smashed"] == pytest.approx(4 * activations.numel(), rel=0.02)


@pytest.mark.filterwarnings("ignore:client 0 sends")
@CUTS
def test_bytes_on_the_wire_within_two_percent_at_the_studys_size(words):
    from transformers import ViTConfig, ViTForImageClassification

    from fewer.federated import split_vit

    shape: dict[str, Any] = {
        "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96, "image_size": 28, "patch_size": 7,
        "num_channels": 1, "num_labels": 10,
    }  # fmt: skip
    split = split_vit(ViTForImageClassification(ViTConfig(**shape)), **words)
    wire, x, y = Wire(split.server()), torch.rand(60, 1, 28, 28), torch.arange(60) % 10
    settings = SFPromptConfig(shortcut_epochs=0)
    simulate(SFPrompt(settings, wire), split.client, Shards(x, y, [range(60)]), 1, sampler=Independent(1.0))
    assert sum(wire.bytes.values()) == pytest.approx(4 * by_hand(words, 17, 48, 4, FlatModel(split).size, sent=30, batches=1), rel=0.02)


@CUTS
def test_at_the_break_even_the_bytes_are_those_of_full_fine_tuning(words):
    split = cut(**words)
    most = wire_cost(split, 1000).break_even
    at, beyond = (wire_cost(split, count, keep=1.0) for count in (most, most + 1))
    assert at.total <= at.full < beyond.total
    assert at.full == 2 * sum(
        parameter.numel() for parameter in (split.head, split.body, split.tail) for parameter in parameter.parameters()
    )
    if words["at"] == "input":
        whole, trained = split.whole_size, FlatModel(split).size
        assert most == math.floor((whole - trained) / (2 * 7 * 16))


def test_the_papers_transformers():
    """Break-even by T and |W| alone: ViT-base and ViT-large."""
    for width, whole, expected in ((768, 86e6, 284), (1024, 303e6, 752)):
        assert largest(lambda s, width=width, whole=whole: 4 * 197 * width * s <= 2 * whole) in (expected - 1, expected)
    assert 197 * 768 == 151_296
    assert 197 * 1024 == 201_728


def test_what_it_is_held_against():
    split = cut()
    trained = FlatModel(split).size
    cost = wire_cost(split, 60, keep=0.5, local_epochs=3)
    assert cost.split_federated == 4 * 7 * 16 * 60 * 3 + 2 * trained
    assert cost.prompt_tuning == 2 * trained
    assert cost.ratio == cost.total / cost.full
    assert cost.bytes == 4 * cost.total
    assert split_numbers(cut(prompt_tokens=0), 10, 1, 5) == {"smashed": 800, "output": 800}


def test_costs_refuse_what_they_cannot_tell():
    split = cut()
    words: dict[str, Any]
    for words in ({"keep": 0.0}, {"examples": 0}, {"split_epochs": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=next(iter(words))):
            wire_cost(split, **({"examples": 10} | words))
    split.tokens = None
    with pytest.raises(ValueError, match=r"does not say how many tokens an example has; expected SplitModel\(..., tokens=...\)"):
        wire_cost(split, 10)
    assert largest(lambda count: False) == 0


# The server


def test_graphs_are_dropped_after_use():
    split = cut()
    server, a = split.server(), torch.randn(4, 7, 16)

    def live():
        gc.collect()
        return sum(type(each) is torch.Tensor for each in gc.get_objects())

    counts = []
    for batch in range(50):
        b = server.forward("client", a)
        server.backward("client", torch.ones_like(b))
        if batch in (5, 49):
            counts.append(live())
    assert counts[0] == counts[1]
    assert not server.waiting
    assert all(parameter.grad is None for parameter in server.body.parameters())


def test_old_passes_are_dropped(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("fewer.federated.sfprompt.wire.time.monotonic", lambda: now[0])
    server = cut().server(timeout=5.0)
    server.forward("silent", torch.randn(1, 7, 16))
    now[0] = 4.0
    server.forward("quick", torch.randn(1, 7, 16))
    assert server.waiting == ["silent", "quick"]
    now[0] = 6.0
    server.forward("later", torch.randn(1, 7, 16))
    assert server.waiting == ["quick", "later"]
    with pytest.raises(ValueError, match="no forward pass of silent waits for a gradient"):
        server.backward("silent", torch.randn(1, 7, 16))


@CUTS
def test_interleaved_and_batched_is_one_after_the_other(words):
    split = cut(torch.float64, **words)
    draw = torch.Generator().manual_seed(0)
    shape = split.cut_shape
    parts = {
        client: (
            torch.randn(3 + client, *shape, generator=draw, dtype=torch.float64),
            split.prompt + client if words["at"] == "cut" else None,
        )
        for client in range(3)
    }
    server = split.server()
    gradients, expected = {}, {}
    for client, part in parts.items():
        b = server.forward(client, *part)
        gradients[client] = torch.randn(b.shape, generator=draw, dtype=torch.float64)
        expected[client] = b, server.backward(client, gradients[client])
    outputs = {client: server.forward(client, *part) for client, part in parts.items()}
    back = {client: server.backward(client, gradients[client]) for client in reversed(list(parts))}
    batched = server.forward_all(parts)
    together = server.backward_all(gradients)
    for client, (b, gradient) in expected.items():
        assert torch.equal(outputs[client], b)
        assert torch.equal(back[client], gradient)
        assert (batched[client] - b).abs().max() <= 1e-12
        assert (together[client] - gradient).abs().max() <= 1e-12
    assert not server.waiting


def test_a_batch_goes_on_without_a_client_that_is_gone():
    split = cut(torch.float64)
    server, a = split.server(), torch.randn(2, 3, 7, 16, dtype=torch.float64)
    b = server.forward("alone", a[1])
    expected = server.backward("alone", torch.ones_like(b))
    server.forward_all({"gone": (a[0], None), "there": (a[1], None)})
    assert (server.backward_all({"there": torch.ones_like(b)})["there"] - expected).abs().max() <= 1e-12
    assert not server.waiting


def test_batches_of_unlike_lengths_pass_apart():
    """As of clients whose sentences differ, where the model does not say how many tokens there are."""
    body, a, b = cut().body, torch.randn(2, 7, 16), torch.randn(3, 5, 16)
    server = BodyServer(body)
    outputs = server.forward_all({"long": (a, None), "short": (b, None), "prompted": (b, torch.zeros(2, 16))})
    assert list(outputs) == ["long", "short", "prompted"]
    assert torch.equal(outputs["short"], body(b))
    assert {id: each.shape for id, each in server.backward_all(outputs).items()} == {
        "long": (2, 7, 16), "short": (3, 5, 16), "prompted": (2, 16),
    }  # fmt: skip
    assert not server.waiting
    assert server.forward_all({}) == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_body_in_another_precision_than_its_clients(dtype):
    split = cut()
    server, a = BodyServer(copy.deepcopy(split.body).to(dtype)), torch.randn(3, 7, 16)
    assert (server.forward(0, a).float() - split.body(a)).abs().max() <= 0.1
    assert server.backward(0, torch.ones(3, 7, 16)).shape == (3, 7, 16)
    history = simulate(SFPrompt(SFPromptConfig(batch_size=8), Wire(server)), split.client, federation(), 1, sampler=Independent(1.0))
    assert history.server.x.isfinite().all()


def test_what_the_server_refuses():
    split = cut()
    server = split.server()
    with pytest.raises(ValueError, match=r"client: activations of shape \(2, 6, 16\); expected \[B, 7, 16\], as the model was cut"):
        server.forward("client", torch.zeros(2, 6, 16))
    with pytest.raises(ValueError, match=r"client: a prompt of shape \(2, 3\); expected \[P, 16\]"):
        server.forward("client", torch.zeros(2, 7, 16), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"client: 8 tokens, its prompt's with them; expected 7, as the model was cut"):
        server.forward("client", torch.zeros(2, 7, 16), torch.zeros(1, 16))
    with pytest.raises(ValueError, match=r"client: torch.int64 numbers; expected floating-point ones"):
        server.forward("client", torch.zeros(2, 7, 16).long())
    server.forward("client", torch.zeros(2, 7, 16))
    with pytest.raises(ValueError, match=r"client: the output's gradient is of shape \(1, 7, 16\); expected \(2, 7, 16\), as it was sent"):
        server.backward("client", torch.zeros(1, 7, 16))
    assert server.waiting == ["client"]  # nothing is lost
    with pytest.raises(ValueError, match="no forward pass of other waits"):
        server.backward("other", torch.zeros(2, 7, 16))
    with pytest.raises(ValueError, match="the body trains 'weight'"):
        BodyServer(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="timeout is 0"):
        BodyServer(nn.Identity(), timeout=0)
    norm = BodyServer(nn.Sequential(nn.BatchNorm1d(4)).requires_grad_(False).eval())
    norm.body.train()
    with pytest.raises(ValueError, match=r"layer '0' \(BatchNorm1d\) of the body is in training mode"):
        norm.forward("client", torch.zeros(2, 4, 3))


def test_server_and_wire_survive_copies():
    wire = Wire(cut().server())
    wire.forward(0, torch.zeros(2, 7, 16))
    other = copy.deepcopy(wire)
    assert other.numbers == wire.numbers
    assert not other.server.waiting
    assert torch.equal(other.forward(0, torch.ones(2, 7, 16)), wire.forward(0, torch.ones(2, 7, 16)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_tensors_arrive_as_they_were_sent(dtype):
    wire, tensor = Wire(cut().server()), torch.randn(5, 4).to(dtype).T
    arrived = wire.send("smashed", tensor)
    assert arrived.dtype == dtype
    assert torch.equal(arrived, tensor)
    arrived.add_(1)  # memory of its own


# What a client computes


def flops_of(act):
    with FlopCounterMode(display=False) as counter:
        act()
    return counter.get_total_flops()


def client_of(split, config, count=20):
    x, y = images(count)
    flat = FlatModel(split.client())
    flat.module_at(flat.initial())
    return SplitClient(Shard(0, flat, x, y, torch.arange(count)), flat.initial(), config, 1)


def epoch(client, wire, batches):
    for rows in batches:
        smashed, prompt = client.smash(rows)
        client.step_prompt(rows, wire.backward(0, client.step_tail(rows, wire.forward(0, smashed, prompt))))


@pytest.mark.parametrize("at", ["input", "cut"])
def test_a_client_computes_head_and_tail_alone(at):
    """Beside a server that plays back what another one answered, so that there is no body."""
    split = cut(at=at)
    config = SFPromptConfig(shortcut_epochs=0, keep=1.0, batch_size=10)
    recording = RecordingWire(split.server())
    batches = client_of(split, config).begin(client_rng(0, 1, 0))
    epoch(client_of(split, config), recording, batches)
    client = client_of(split, config)
    playback = Wire(PlaybackServer(recording.seen))  # pyright: ignore[reportArgumentType] - answers alike
    counted = flops_of(lambda: epoch(client, playback, batches))

    x, _ = images(20)
    tokens = split.prompted(split.smashed(x)).detach()
    head = flops_of(lambda: split.smashed(x).detach() if at == "cut" else torch.autograd.grad(split.smashed(x).sum(), split.prompt))
    tail_parameters = list(split.tail.parameters())
    leaf = tokens.clone().requires_grad_()
    tail = flops_of(lambda: torch.autograd.grad(split.tail(leaf.view_as(leaf)).sum(), [leaf, *tail_parameters]))
    body = flops_of(lambda: split.body(tokens))
    assert head > 0
    assert body > 0
    assert counted == head + tail


def test_at_the_cut_the_head_runs_forward_once():
    split = cut(at="cut")
    config = SFPromptConfig(shortcut_epochs=3, keep=1.0, batch_size=10)
    client = client_of(split, config)
    rng, x = client_rng(0, 1, 0), images(20)[0]
    runs = [0]

    def count(*_):
        runs[0] += 1

    client.model().head.register_forward_hook(count)
    batches = client.begin(rng)
    client.scores()
    epoch(client, Wire(split.server()), batches)
    assert runs[0] == 2  # 20 examples, two batches
    with torch.no_grad():
        assert torch.allclose(client.head_output(client.model(), np.arange(20)), split.smashed(x), atol=1e-6)
    one, three = (
        flops_of(
            lambda epochs=epochs: client_of(split, SFPromptConfig(shortcut_epochs=epochs, keep=1.0, batch_size=10)).begin(
                client_rng(0, 1, 0)
            )
        )
        for epochs in (1, 3)
    )
    tokens = split.prompted(split.smashed(x)).detach()
    tail = flops_of(lambda: torch.autograd.grad(split.tail(split.prompted(tokens[:, :5])).sum(), [split.prompt, *split.tail.parameters()]))
    assert three - one == 2 * tail


def test_federation_has_clients_of_unlike_sizes():
    assert len({len(part) for part in federation().parts}) > 1
