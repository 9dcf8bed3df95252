"""Gradients, scores, updates and the pruner: against constrained least squares, loops, and torch.nn.utils.prune."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

from fewer.optimization import InverseFisher, MFACPruning, collect_gradients, obs_scores, prune_module
from fewer.optimization.mfac import gradients as gradient_collection
from fewer.optimization.mfac.obs import independent_update, joint_update, loss_increase, saliency

M, D, DAMPING = 15, 40, 1e-3


def problem(block_size: int = D) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients, weights, and F written out, of the blocks alone."""
    draw = torch.Generator().manual_seed(0)
    grads, w = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((M, D), (D,)))
    block = torch.arange(D) // block_size
    fisher = DAMPING * torch.eye(D).double() + grads.T @ grads / M
    return grads, w, torch.where(block[:, None] == block, fisher, 0.0)


def least_rise(fisher: torch.Tensor, w: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor:
    """The step with delta = -w on the dropped that minimises 1/2 delta^T F delta, by a linear solve for the others."""
    delta = torch.where(dropped, -w, 0.0)
    stays = ~dropped
    delta[stays] = torch.linalg.solve(fisher[stays][:, stays], -(fisher[stays][:, dropped] @ delta[dropped]))
    return delta


def rise(fisher: torch.Tensor, delta: torch.Tensor) -> float:
    return float(delta @ fisher @ delta / 2)


def test_dropping_one_weight_raises_a_quadratic_loss_by_its_saliency_and_no_less_can_do():
    grads, w, fisher = problem()
    rho = saliency(w, InverseFisher(grads, DAMPING).diagonal())
    draw = torch.Generator().manual_seed(1)
    for i in range(D):
        dropped = torch.arange(D) == i
        delta = joint_update(grads, DAMPING, D, w, dropped)
        assert rise(fisher, delta) == pytest.approx(float(rho[i]), rel=1e-10)
        assert float(delta[i]) == -float(w[i])
        torch.testing.assert_close(delta, least_rise(fisher, w, dropped), rtol=1e-8, atol=1e-9)
        other = delta + 0.01 * torch.randn(D, generator=draw).double() * ~dropped
        assert rise(fisher, other) > rise(fisher, delta)


@pytest.mark.parametrize("block_size", [D, 17, 8])  # more weights than gradients in a block, both, fewer
@pytest.mark.parametrize("chunk", [5, 65536])
def test_the_joint_update_of_a_set_is_the_constrained_minimum(block_size, chunk):
    grads, w, fisher = problem(block_size)
    for share in (0.0, 0.3, 0.9, 1.0):
        dropped = torch.rand(D, generator=torch.Generator().manual_seed(2)) < share
        delta = joint_update(grads, DAMPING, block_size, w, dropped, chunk)
        torch.testing.assert_close(delta, least_rise(fisher, w, dropped), rtol=1e-8, atol=1e-8)
        inverse = torch.linalg.inv(fisher)
        if 0 < share < 1:
            textbook = -inverse[:, dropped] @ torch.linalg.solve(inverse[dropped][:, dropped], w[dropped])
            torch.testing.assert_close(delta, textbook, rtol=1e-6, atol=1e-6)
        assert loss_increase(grads, DAMPING, block_size, delta) == pytest.approx(rise(fisher, delta), rel=1e-10)


def test_the_joint_update_takes_more_than_4096_dropped_weights_in_a_block():
    draw = torch.Generator().manual_seed(0)
    grads, w = torch.randn(12, 6000, generator=draw).double(), torch.randn(6000, generator=draw).double()
    dropped = torch.rand(6000, generator=draw) < 0.8
    delta = joint_update(grads, DAMPING, 6000, w, dropped)
    assert int(dropped.sum()) > 4096
    assert torch.equal(delta[dropped], -w[dropped])
    force = (DAMPING * delta + grads.T @ (grads @ delta) / 12)[
        ~dropped
    ]  # the gradient of the quadratic vanishes where the weights are free
    assert float(force.abs().max()) < 1e-8


def test_the_independent_update_is_the_sum_of_single_ones():
    grads, w, fisher = problem()
    dropped = torch.arange(D) % 3 == 0
    inverse = torch.linalg.inv(fisher)
    t = torch.where(dropped, -w / inverse.diagonal(), 0.0)
    square = InverseFisher(grads, DAMPING)
    torch.testing.assert_close(independent_update(square, square.diagonal(), w, dropped), inverse @ t, rtol=1e-9, atol=1e-9)


# The pruner


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(144, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    net = Net()
    net(torch.randn(32, 1, 8, 8))  # running statistics of its own
    return net


def loader(size: int = 1, number: int = 40, shuffle: bool = False) -> DataLoader:
    draw = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(number * size, 1, 8, 8, generator=draw), torch.randint(3, (number * size,), generator=draw))
    return DataLoader(data, batch_size=size, shuffle=shuffle)


def loop(net: nn.Module, batches, m: int) -> torch.Tensor:
    modes = [part.training for part in net.modules()]
    rows = []
    net.eval()
    for _, (x, y) in zip(range(m), batches, strict=False):
        net.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        rows.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.ndim >= 2]))
    net.zero_grad()
    for part, mode in zip(net.modules(), modes, strict=True):
        part.training = mode
    return torch.stack(rows)


@pytest.mark.parametrize("size", [1, 4])
def test_gradients_are_those_of_a_loop(net, size, monkeypatch):
    vectorised = []
    per_sample = gradient_collection.per_sample_gradients
    monkeypatch.setattr(gradient_collection, "per_sample_gradients", lambda *args: (vectorised.append(1), per_sample(*args))[1])
    found = collect_gradients(net, nn.functional.cross_entropy, loader(size), 37)
    torch.testing.assert_close(found, loop(net, loader(size), 37), rtol=1e-5, atol=1e-6)
    assert len(vectorised) == (2 if size == 1 else 0)  # 32 samples, then 5
    assert not found.requires_grad


def test_a_module_that_vmap_cannot_run_goes_through_the_loop(net):
    class Counting(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if float(x.sum()) > 1e9 else 2 * x

    net.body.append(Counting())
    found = collect_gradients(net, nn.functional.cross_entropy, loader(), 5)
    torch.testing.assert_close(found, loop(net, loader(), 5), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1, 4])
def test_collecting_leaves_the_module_as_it_was(net, size):
    net.body[0].eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    modes = [part.training for part in net.modules()]
    collect_gradients(net, nn.functional.cross_entropy, loader(size), 5)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert [part.training for part in net.modules()] == modes
    assert all(parameter.grad is None for parameter in net.parameters())


def test_scores_are_named_and_shaped_as_the_weights(net):
    grads = collect_gradients(net, nn.functional.cross_entropy, loader(), 20)
    scores = obs_scores(net, grads, 1e-3, 100)
    assert {name: tuple(score.shape) for name, score in scores.items()} == {"body.0.weight": (4, 1, 3, 3), "body.5.weight": (3, 144)}
    flat = torch.cat([net.body[0].weight.flatten(), net.body[5].weight.flatten()]).detach()
    expected = flat**2 / (2 * InverseFisher(grads, 1e-3, block_size=100).diagonal())
    torch.testing.assert_close(torch.cat([score.flatten() for score in scores.values()]), expected)
    by_name = collect_gradients(net, nn.functional.cross_entropy, loader(), 20, names=["body.5.bias"])
    assert obs_scores(net, by_name, 1e-3, names=["body.5.bias"])["body.5.bias"].shape == (3,)


@pytest.mark.parametrize("update", ["independent", "joint"])
@pytest.mark.parametrize("recompute", [1, 3])
def test_pruning_sets_the_lowest_scores_to_zero_and_updates_the_others(net, update, recompute):
    before = torch.cat([net.body[0].weight.flatten(), net.body[5].weight.flatten()]).detach().clone()
    bias = net.body[5].bias.detach().clone()
    grads = collect_gradients(net, nn.functional.cross_entropy, loader(), 40)
    report = prune_module(net, nn.functional.cross_entropy, loader(), 0.7, 40, 1e-3, 200, update, recompute)
    after = torch.cat([net.body[0].weight.flatten(), net.body[5].weight.flatten()]).detach()
    assert report.dropped == int((after == 0).sum()) == round(0.7 * 468)
    assert report.sparsity == report.dropped / 468
    assert report.steps == pytest.approx([1 - 0.3 ** ((j + 1) / recompute) for j in range(recompute)], abs=0.01)
    assert torch.equal(net.body[5].bias, bias)
    if recompute == 1:
        scores = before**2 / (2 * InverseFisher(grads, 1e-3, block_size=200).diagonal())
        dropped = torch.zeros(468, dtype=torch.bool)
        dropped[scores.topk(report.dropped, largest=False).indices] = True
        assert torch.equal(after == 0, dropped)
        square = InverseFisher(grads, 1e-3, block_size=200)
        delta = (
            joint_update(grads, 1e-3, 200, before, dropped)
            if update == "joint"
            else independent_update(square, square.diagonal(), before, dropped)
        )
        torch.testing.assert_close(after, torch.where(dropped, 0.0, before + delta))
        assert report.loss_increase > 0


def test_the_joint_update_raises_the_quadratic_loss_less_than_the_independent_one():
    increases = {}
    for update in ("independent", "joint"):
        torch.manual_seed(0)
        increases[update] = prune_module(Net(), nn.functional.cross_entropy, loader(), 0.7, 40, 1e-3, None, update).loss_increase
    assert increases["joint"] < increases["independent"]


def test_masks_are_torchs_own_and_last_through_training(net):
    prune_module(net, nn.functional.cross_entropy, loader(), 0.5, 40)
    assert prune.is_pruned(net)
    zero = net.body[5].weight == 0
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for x, y in loader(4, 5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    net(torch.randn(2, 1, 8, 8))
    assert torch.equal(net.body[5].weight == 0, zero)
    first = int((net.body[5].weight == 0).sum() + (net.body[0].weight == 0).sum())
    report = prune_module(net, nn.functional.cross_entropy, loader(), 0.8, 40)  # on from there
    assert (first, report.dropped) == (234, round(0.8 * 468))
    assert bool((net.body[5].weight[zero] == 0).all())
    for layer in (net.body[0], net.body[5]):
        prune.remove(layer, "weight")
    assert int((net.body[5].weight == 0).sum() + (net.body[0].weight == 0).sum()) == report.dropped


def test_torchs_global_pruning_takes_the_method_and_the_scores(net):
    grads = collect_gradients(net, nn.functional.cross_entropy, loader(), 40)
    scores = obs_scores(net, grads, 1e-3, None)
    pairs = {(net.body[0], "weight"): scores["body.0.weight"], (net.body[5], "weight"): scores["body.5.weight"]}
    flat = torch.cat([score.flatten() for score in scores.values()])
    prune.global_unstructured(list(pairs), MFACPruning, importance_scores=pairs, amount=0.5)
    masks = torch.cat([net.body[0].weight_mask.flatten(), net.body[5].weight_mask.flatten()])
    assert torch.equal(masks == 0, flat <= flat.sort().values[233])


def failing_loader():
    for number, batch in enumerate(loader(number=100)):
        if number == 30:
            raise OSError("the disk is gone")
        yield batch


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sparsity": 1.0}, ValueError, r"sparsity is 1.0; expected a fraction in \[0, 1\)"),
        ({"sparsity": -0.1}, ValueError, "sparsity is -0.1"),
        ({"num_grads": 41}, ValueError, "the loader gave 40 batches; expected at least num_grads=41"),
        ({"num_grads": 0}, ValueError, "num_grads is 0"),
        ({"damping": 0.0}, ValueError, "damping is 0.0"),
        ({"block_size": 0}, ValueError, "block_size is 0"),
        ({"update": "both"}, ValueError, "update is 'both'; expected one of independent, joint"),
        ({"recompute": 0}, ValueError, "recompute is 0"),
        ({"names": ["body.9.weight"]}, ValueError, "the module has no parameter 'body.9.weight'"),
        ({"loader": failing_loader()}, OSError, "the disk is gone"),
    ],
)
def test_what_cannot_be_used_is_said_and_leaves_the_module_as_it_was(net, options, error, message):
    before = {name: value.clone() for name, value in net.state_dict().items()}
    given = {"loader": loader(), "sparsity": 0.5, "num_grads": 40} | options
    with pytest.raises(error, match=message):
        prune_module(net, nn.functional.cross_entropy, **given)
    assert before.keys() == net.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_failure_in_a_later_step_gives_the_weights_back(net):
    before = {name: value.clone() for name, value in net.state_dict().items()}
    batches = iter(loader(number=60))
    with pytest.raises(ValueError, match="the loader gave 20 batches"):
        prune_module(net, nn.functional.cross_entropy, batches, 0.5, 40, recompute=2)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_gradients_of_other_weights_are_refused(net):
    with pytest.raises(ValueError, match="grads has 3 columns; expected 468"):
        obs_scores(net, torch.ones(2, 3))
    with pytest.raises(ValueError, match="the module has no weight matrix that is trained"):
        collect_gradients(nn.LayerNorm(3), nn.functional.cross_entropy, loader(), 5)
    with pytest.raises(ValueError, match=r"amount is 1.5; expected a fraction in \[0, 1\)"):
        MFACPruning(1.5)


# A pruned model is a model like any other


class Tied(nn.Module):
    """Two layers, one of them at two places by its parameter, the other by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.a(x).relu()).relu())


def vectors(number: int = 40, dtype: torch.dtype = torch.int64) -> list:
    draw = torch.Generator().manual_seed(0)
    return [(torch.randn(1, 4, generator=draw), torch.randint(3, (1,), generator=draw).to(dtype)) for _ in range(number)]


def train_on(model: nn.Module, steps: int = 5) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for x, y in vectors(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    model(torch.ones(1, 4))


def test_weights_of_tied_modules_do_not_grow_back():
    torch.manual_seed(0)
    model = Tied()
    report = prune_module(model, nn.functional.cross_entropy, vectors(), 0.5, 40)
    assert report.weights == 28  # the tied ones once
    assert model.a.weight_orig is model.b.weight_orig
    dropped = model.a.weight == 0
    assert torch.equal(model.b.weight == 0, dropped)
    train_on(model)
    for layer in (model.a, model.b):
        assert torch.equal(layer.weight == 0, dropped)
        prune.remove(layer, "weight")
    assert model.a.weight is model.b.weight
    assert torch.equal(model.a.weight == 0, dropped)


def test_what_was_pruned_at_one_of_two_places_stays_dropped_at_both():
    torch.manual_seed(0)
    model = Tied()
    prune.l1_unstructured(model.b, "weight", 0.5)
    first = model.b.weight_mask == 0
    prune_module(model, nn.functional.cross_entropy, vectors(), 0.6, 40)
    train_on(model)
    assert bool((model.a.weight[first] == 0).all())
    assert torch.equal(model.a.weight == 0, model.b.weight == 0)


def test_two_parameters_on_one_memory_are_refused():
    model = Tied()
    model.b.weight = nn.Parameter(model.a.weight.data)
    with pytest.raises(ValueError, match=r"a.weight and b.weight are two parameters on one memory; expected one: tie them"):
        prune_module(model, nn.functional.cross_entropy, vectors(), 0.5, 40)


@pytest.mark.parametrize("state", ["fresh", "trained", "pruned again"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_pruned_model_is_copied_and_pickled(state, duplicate):
    torch.manual_seed(0)
    model = Tied()
    prune_module(model, nn.functional.cross_entropy, vectors(), 0.5, 40)
    if state != "fresh":
        train_on(model)
    if state == "pruned again":
        prune_module(model, nn.functional.cross_entropy, vectors(), 0.7, 40)
    other, x = duplicate(model), torch.ones(2, 4)
    assert torch.equal(other(x), model(x))
    assert other.a.weight_orig is other.b.weight_orig
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    train_on(other)
    assert torch.equal(other.a.weight == 0, model.a.weight == 0)
    assert not torch.equal(other.c.weight, model.c.weight)
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    layer = nn.Linear(2, 2)
    MFACPruning.apply(layer, "weight", 0.5, importance_scores=torch.tensor([[3.0, 1.0], [2.0, 4.0]]))
    assert torch.equal(duplicate(layer)(x[:, :2]), layer(x[:, :2]))


def test_a_penalty_on_the_masked_weight_reaches_the_weights():
    torch.manual_seed(0)
    model = Tied()
    prune_module(model, nn.functional.cross_entropy, vectors(), 0.5, 40)
    model(torch.ones(1, 4))
    assert type(model.c.weight * 2) is torch.Tensor
    (gradient,) = torch.autograd.grad(model.c.weight.square().sum(), model.c.weight_orig)
    assert torch.equal(gradient != 0, model.c.weight_mask != 0)


def test_the_same_names_prune_again(net):
    names = ["body.5.weight", "body.0.weight"]
    for sparsity in (0.5, 0.8):
        report = prune_module(net, nn.functional.cross_entropy, loader(), sparsity, 40, names=names)
        assert report.dropped == round(sparsity * 468)
        assert list(report.per_parameter) == names
    assert int((net.body[5].weight == 0).sum() + (net.body[0].weight == 0).sum()) == report.dropped
    assert len(net.body[5]._forward_pre_hooks) == 1
    grads = collect_gradients(net, nn.functional.cross_entropy, loader(), 40, names=names)
    assert obs_scores(net, grads, names=names).keys() == {"body.5.weight_orig", "body.0.weight_orig"}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_class_numbers_may_be_of_any_integer_type(dtype):
    torch.manual_seed(0)
    model = Tied()
    expected = collect_gradients(model, nn.functional.cross_entropy, vectors(), 8)
    assert torch.equal(collect_gradients(model, nn.functional.cross_entropy, vectors(dtype=dtype), 8), expected)
    pairs = [(torch.cat([x, x]), torch.cat([y, y])) for x, y in vectors(8, dtype)]
    collect_gradients(model, nn.functional.cross_entropy, pairs, 8)


def test_a_loader_without_batches_is_said():
    with pytest.raises(ValueError, match="the loader gave 0 batches; expected at least num_grads=4"):
        prune_module(Tied(), nn.functional.cross_entropy, DataLoader(TensorDataset(torch.zeros(0, 4))), 0.5, 4)


def test_gradients_and_weights_need_not_be_contiguous_or_of_one_dtype():
    torch.manual_seed(0)
    model = Tied()
    model.c.weight = nn.Parameter(torch.randn(4, 3).T)
    model.c.double()
    model.b.register_forward_hook(lambda layer, given, output: output.double())
    report = prune_module(model, lambda output, y: nn.functional.cross_entropy(output.float(), y), vectors(), 0.5, 40)
    assert report.dropped == 14
    assert (model.a.weight_orig.dtype, model.c.weight_orig.dtype) == (torch.float32, torch.float64)
