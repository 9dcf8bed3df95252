"""The model as a flat vector, and what clients keep: tied, shared, frozen, half-precision and unsaved tensors."""

from __future__ import annotations

import copy

import pytest
import torch
from direct_grid import DirectGrid
from federations import examples, net
from flwr.app import ArrayRecord
from torch import nn
from torch.nn import functional as F

from fewer.federated import (
    FedAvg,
    FedSpeedAlgorithm,
    FedSpeedConfig,
    FlatModel,
    FlowerStrategy,
    Independent,
    LocalConfig,
    Shards,
    flower_client_app,
    simulate,
)
from fewer.federated._shared.client_states import ClientStates

AVERAGE = FedAvg(LocalConfig(local_epochs=1, batch_size=10))
EVERYBODY = Independent(1.0)


def federation():
    x, y = examples(60)
    return Shards(x, y, torch.arange(60).split(20))


class Tied(nn.Module):
    """Two layers of one weight, in the middle of a classifier; a statistic under two names where asked."""

    def __init__(self, statistics: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.a, self.b, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.b.weight = self.a.weight
        if statistics:
            self.first, self.second = nn.BatchNorm1d(6), nn.BatchNorm1d(6)
            self.second.running_mean = self.first.running_mean
        else:
            self.first = self.second = nn.Identity()

    def forward(self, x):
        return self.out(torch.relu(self.second(self.b(torch.relu(self.first(self.a(x)))))))


def by_flower(model_fn, rounds=2, algorithm=AVERAGE, buffers=None):
    held = federation()

    def load(context):
        rows = held.parts[context.node_config["partition-id"]]
        return held.x[rows], held.y[rows]

    strategy = FlowerStrategy(algorithm, 1.0, 1.0, 3)
    grid = DirectGrid(flower_client_app(algorithm, model_fn, load, buffers=buffers), 3)
    return strategy.start(grid, ArrayRecord(model_fn().state_dict()), num_rounds=rounds)


@pytest.mark.parametrize("statistics", [False, True])
def test_tied_weights_come_back_under_each_of_their_names(statistics):
    buffers = "average" if statistics else None
    arrays = by_flower(lambda: Tied(statistics), buffers=buffers).arrays.to_torch_state_dict()
    before = Tied(statistics)
    model = Tied(statistics)
    model.load_state_dict(arrays)
    assert not torch.equal(model.a.weight, before.a.weight)
    history = simulate(AVERAGE, lambda: Tied(statistics), federation(), 2, sampler=EVERYBODY, buffers=buffers)
    own = history.state_dict()
    assert {"a.weight", "b.weight"} <= set(own)
    other = Tied(statistics)
    other.load_state_dict(own, strict=not statistics)
    for name, tensor in other.named_parameters():
        assert torch.allclose(model.get_parameter(name), tensor, atol=1e-6)
    if statistics:
        assert torch.equal(arrays["first.running_mean"], arrays["second.running_mean"])
        assert arrays["first.running_mean"].abs().max() > 1e-3


@pytest.mark.parametrize("executor", [None, "vmap"])
def test_a_tied_weight_has_the_gradient_of_all_its_places(executor):
    flat, (x, y) = FlatModel(Tied()), examples(20)
    model = Tied()
    F.cross_entropy(model(x), y).backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    start = flat.initial()
    found = flat.stacked_gradient(start[None], x[None], y[None], None)[0] if executor else flat.gradient(start, x, y)
    assert torch.allclose(found, expected, atol=1e-6)


class Transposed(nn.Module):
    """Two parameters in one memory: torch trains them as one, a flat vector would tear them apart."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = nn.Parameter(self.a.weight.data.T)


def test_parameters_that_share_memory_but_are_two_are_refused_by_name():
    with pytest.raises(ValueError, match="'a.weight' and 'b.weight' share memory but are two; expected one parameter under both names"):
        FlatModel(Transposed())
    whole = torch.randn(2, 6, 6)
    model = Transposed()
    model.a.weight, model.b.weight = (nn.Parameter(part) for part in whole)  # neighbours in one storage, each its own place
    assert FlatModel(model).size == 2 * (36 + 6)


class WithTable(nn.Module):
    """A table that is computed when the model is made and not saved with it, as of rotary positions."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.register_buffer("table", torch.linspace(0.5, 1.5, 6), persistent=False)

    def forward(self, x):
        return self.net(x * self.table)


@pytest.mark.parametrize("buffers", [None, "average"])
def test_buffers_that_are_not_saved_with_the_model_are_constants(buffers):
    result = by_flower(WithTable, buffers=buffers)
    history = simulate(AVERAGE, WithTable, federation(), 2, sampler=EVERYBODY, buffers=buffers)
    model = WithTable()
    model.load_state_dict(result.arrays.to_torch_state_dict())
    assert torch.allclose(history.flat.vector_of(dict(model.named_parameters())), history.server.x, atol=1e-6)
    output = history.flat.predict(history.server.x, federation().x)
    assert torch.allclose(model.eval()(federation().x), output, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("executor", [None, "vmap"])
def test_half_precision_models_are_averaged_in_float32(dtype, executor):
    """Small steps and sums of many clients are lost in half precision: the flat vector is float32, the model computes in its own."""
    x, y = examples(60)
    algorithm = FedSpeedAlgorithm(FedSpeedConfig(local_epochs=1, batch_size=10, lr=1e-3))

    def run(dtype, rounds=4):
        shards = Shards(x.to(dtype), y, [range(25), range(25, 60)])
        return simulate(algorithm, lambda: net().to(dtype), shards, rounds, sampler=EVERYBODY, executor=executor)

    half, single = run(dtype), run(torch.float32)
    assert half.server.x.dtype == torch.float32
    assert half.flat.predict(half.server.x, x.to(dtype)).dtype == dtype
    start = half.flat.initial()
    moved = (single.server.x - single.flat.initial()).norm()
    assert ((half.server.x - start) - (single.server.x - single.flat.initial())).norm() < 0.1 * moved


def test_half_precision_travels_by_flower_as_in_the_engine():
    x, y = examples(60)
    result = by_flower(lambda: nn.Sequential(Cast(), net().half()), rounds=1)
    history = simulate(AVERAGE, lambda: nn.Sequential(Cast(), net().half()), Shards(x, y, torch.arange(60).split(20)), 1, sampler=EVERYBODY)
    mine = result.arrays.to_torch_state_dict()
    assert max(float((mine[name] - tensor).abs().max()) for name, tensor in history.state_dict().items()) <= 1e-6


class Cast(nn.Module):
    def forward(self, x):
        return x.half()


def test_weights_in_any_memory_order_are_the_same_vector():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    other[2].weight = nn.Parameter(other[2].weight.data.T.contiguous().T)
    x, y = torch.randn(5, 2, 3, 3), torch.tensor([0, 1, 0, 1, 1])
    one, two = FlatModel(model), FlatModel(other)
    assert torch.equal(one.initial(), two.initial())
    assert torch.allclose(one.gradient(one.initial(), x, y), two.gradient(two.initial(), x, y), atol=1e-6)


def test_parameters_of_unlike_dtypes_are_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())
    with pytest.raises(ValueError, match="torch.float32.*torch.float64|torch.float64.*torch.float32"):
        FlatModel(model)


def test_frozen_parameters_stay_and_do_not_travel():
    model = net()
    model[0].requires_grad_(False)
    history = simulate(AVERAGE, lambda: model, federation(), 2, sampler=EVERYBODY)
    assert set(history.state_dict()) == {"1.weight", "1.bias", "3.weight", "3.bias"}
    assert history.rounds[0].numbers_up == 3 * history.flat.size


def test_large_client_states_lie_in_a_mapped_file():
    small, large = (ClientStates(50, ["g", "last"], 1000, torch.float32, large=limit) for limit in (2**30, 2**16))
    assert (small.mapped, large.mapped) == (False, True)
    for states in (small, large):
        states.put([3, 7], {"g": torch.ones(2, 1000), "last": torch.full((2, 1000), 2.0)})
        states.put(9, {"g": torch.full((1000,), 5.0), "last": torch.zeros(1000)})
        assert states.get(7)["last"].sum() == 2000
        assert torch.equal(states.get([0, 9])["g"].sum(1), torch.tensor([0.0, 5000.0]))
    assert FedSpeedAlgorithm().keeps == ("correction",)
