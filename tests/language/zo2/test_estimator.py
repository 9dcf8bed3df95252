"""What the projected gradient is, and the z that it is taken along."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from zo2_models import IDS, make, streamed
from zo2_stack import Stack, stack

from fewer.language import MeZO, ZO2Config
from fewer.language.zo2.mezo import CounterDraws, TorchDraws, Trained, counter_normal, projected_gradient
from house import on_two_processes


def quadratic() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    a, b, x = (torch.randn(size, generator=draw, dtype=torch.float64) for size in ((4, 4), (4,), (4,)))
    return a @ a.T, b, x


def test_it_is_exact_for_quadratics():
    a, b, x = quadratic()
    theta = nn.Parameter(x.clone())
    optimizer = MeZO([("x", theta)], lr=0.0)
    for seed in range(20):
        at = theta.detach().clone()
        optimizer.step(lambda: theta @ a @ theta / 2 + b @ theta, seed=seed)
        z = TorchDraws(seed, torch.device("cpu")).draw("x", theta)
        assert abs(optimizer.last.projected_grad - float(z @ (a @ at + b))) < 1e-6


def test_its_mean_is_the_gradient():
    a, b, x = quadratic()
    gradient, eps = a @ x + b, 1e-3
    trained = Trained([("x", x.clone())], ZO2Config(eps=eps))
    estimates = torch.empty(20_000, 4, dtype=torch.float64)
    theta = trained.parameters[0][1]
    for seed in range(len(estimates)):
        draws = TorchDraws(seed, torch.device("cpu"))
        theta.copy_(x)
        perturb = trained.perturbations(draws)
        losses = []
        for scaling in (1, -2):
            perturb(scaling)
            losses.append(theta @ a @ theta / 2 + b @ theta)
        z = TorchDraws(seed, torch.device("cpu")).draw("x", theta)
        estimates[seed] = projected_gradient(losses[0] - losses[1], eps) * z
    error = estimates.std(0) / len(estimates) ** 0.5
    assert ((estimates.mean(0) - gradient).abs() < 5 * error).all()


def test_the_loss_is_differenced_in_its_own_precision():
    """A difference of 1e-3 drowns in bfloat16."""
    theta = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = MeZO([("x", theta)], lr=0.0, eps=1e-6)
    optimizer.step(lambda: 100 + theta.sum(), seed=0)
    z = TorchDraws(0, torch.device("cpu")).draw("x", theta)
    assert abs(optimizer.last.projected_grad - z.item()) < 1e-7


class Backwards(Stack):
    """The same weights under the same names, registered last to first."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("last", "steps", "first"):
            self._modules[name] = self._modules.pop(name)


def test_counter_draws_know_no_order():
    torch.manual_seed(0)
    backwards = Backwards()
    plain = stack()
    backwards.load_state_dict(plain.state_dict())
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(3))
    one, two = streamed(plain, rng="counter"), streamed(backwards, rng="counter")
    for _ in range(3):
        assert one.step(lambda model: model(x)) == two.step(lambda model: model(x))
    other = two.state_dict()["model"]
    assert all(torch.equal(value, other[name]) for name, value in one.state_dict()["model"].items())
    with pytest.raises(ValueError, match="first.weight is registered after the blocks and used before them; .*: use rng='counter'"):
        streamed(Backwards()).step(lambda model: model(x))


def test_counter_draws_are_a_function_of_the_element_and_normal():
    z = counter_normal(7, "w", 40_000)
    for first in (0, 1, 6, 39_990):
        assert torch.equal(counter_normal(7, "w", 10, first=first), z[first : first + 10])
    assert not torch.equal(counter_normal(7, "v", 10), z[:10])
    assert not torch.equal(counter_normal(8, "w", 10), z[:10])
    assert abs(z.mean()) < 4 / 200
    assert abs(z.var() - 1) < 4 * 2**0.5 / 200
    assert abs((z.abs() < 1).double().mean() - 0.6827) < 0.01
    assert abs((z[1:] * z[:-1]).mean()) < 4 / 200
    assert CounterDraws(7).draw("w", torch.empty(2, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_counter_draws_of_a_tied_model(tmp_path):
    """The tied head sees the perturbed embedding: MeZO with the same z tells the same."""
    model = make("llama-tied").eval()
    trained = Trained(list(model.named_parameters()), ZO2Config())
    with torch.no_grad():
        perturb = trained.perturbations(CounterDraws(5))
        perturb(1)
        one = model(input_ids=IDS, labels=IDS).loss.item()
    assert streamed(make("llama-tied"), tmp_path, store="disk", rng="counter").step(IDS, seed=5).loss == one


def loss64(ids):
    """transformers' own loss is float32, and so would be what the workers differ by."""

    def loss(model):
        logits = model(input_ids=ids, use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    return loss


def worker(rank: int, folder: Path) -> None:
    sent: list[int] = []
    reduce = dist.all_reduce
    dist.all_reduce = lambda tensor, **words: sent.append(tensor.numel()) or reduce(tensor, **words)
    zo2 = streamed(make().double())
    zo2.group = dist.group.WORLD
    for _ in range(3):
        zo2.step(loss64(IDS[rank : rank + 1]))
    torch.save((sent, zo2.state_dict()["model"]), folder / f"{rank}.pt")


def test_two_workers_are_one_on_the_joint_batch(tmp_path):
    on_two_processes(worker, tmp_path)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    one = streamed(make().double())
    for _ in range(3):
        one.step(loss64(IDS))
    for name, value in one.state_dict()["model"].items():
        assert torch.equal(found[0][1][name], found[1][1][name]), "the workers' weights are identical"
        assert abs(found[0][1][name] - value).max() < 1e-6
    assert [sent for sent, _ in found] == [[1, 1, 1]] * 2, "one number a step"
