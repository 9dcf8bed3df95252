"""The same bits as MeZO: losses, projected gradients and weights, wherever the blocks live."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn
from zo2_models import DECAY, IDS, LR, MADE, make, mezo_steps, same, seeds, streamed
from zo2_stack import stack

from fewer.language import MeZO, ZO2Config

REFERENCE: dict[str, tuple[list[tuple[float, float]], nn.Module]] = {}


def reference(name: str) -> tuple[list[tuple[float, float]], nn.Module]:
    """What five steps of MeZO tell, and the model after them."""
    if name not in REFERENCE:
        model = make(name)
        REFERENCE[name] = mezo_steps(model, seeds(5)), model
    return REFERENCE[name]


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
@pytest.mark.parametrize(("store", "cache_z", "overlap"), list(itertools.product(["none", "cpu", "disk"], [True, False], [True, False])))
def test_five_steps_are_mezos_to_the_bit(name, store, cache_z, overlap, tmp_path):
    told, model = reference(name)
    zo2 = streamed(make(name), tmp_path, store=store, cache_z=cache_z, overlap=overlap)
    assert [zo2.step(IDS)[:2] for _ in range(5)] == told
    assert same(zo2, model)


@pytest.mark.parametrize("name", sorted(set(MADE) - {"llama", "llama-tied"}))
def test_every_family_is_walked_by_its_own_loop(name, tmp_path):
    told, model = reference(name)
    zo2 = streamed(make(name), tmp_path, store="cpu")
    assert [zo2.step(IDS)[:2] for _ in range(5)] == told
    assert same(zo2, model)
    assert zo2.evaluate(IDS) == model.eval()(input_ids=IDS, labels=IDS).loss.item()


def test_padding_and_micro_batches(tmp_path):
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    words = {"input_ids": IDS, "labels": IDS.masked_fill(mask == 0, -100), "attention_mask": mask}
    model = make()
    rows = [{name: each[row : row + 1] for name, each in words.items()} for row in range(2)]
    told = mezo_steps(model, seeds(3), lambda: torch.stack([model(**row, use_cache=False).loss for row in rows]).mean())
    zo2, listed = streamed(make(), tmp_path, store="disk", micro_batches=2), streamed(make())
    assert [zo2.step(words)[:2] for _ in range(3)] == told == [listed.step(rows)[:2] for _ in range(3)]
    assert same(zo2, model)


def test_the_optimizer_is_the_reference_and_goes_on_from_its_state():
    told, model = reference("llama")
    mine = make().eval()
    optimizer = MeZO(mine.named_parameters(), lr=LR, weight_decay=DECAY)

    def loss():
        return mine(input_ids=IDS, labels=IDS, use_cache=False).loss

    for step in range(5):
        if step == 2:
            optimizer, state = MeZO(mine.named_parameters(), lr=1.0), copy.deepcopy(optimizer.state_dict())
            optimizer.load_state_dict(state)
        assert optimizer.step(loss).item() == told[step][0]
        assert optimizer.last[:2] == told[step]
    assert all(torch.equal(mine.get_parameter(name), value) for name, value in model.named_parameters())


def test_a_schedule_s_rate_belongs_to_its_step():
    """The update of step t waits, and is then applied at the rate of step t (the released code takes the current one)."""
    lrs = [1e-2, 3e-3, 1e-3]
    model = make()
    told = mezo_steps(model, seeds(3), lrs=lrs)
    zo2, optimizer = streamed(make()), MeZO((mine := make().eval()).named_parameters(), lr=1e-2, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lrs[min(step, 2)] / 1e-2)
    for step, lr in enumerate(lrs):
        zo2.lr = lr
        assert zo2.step(IDS)[:2] == told[step]
        optimizer.step(lambda: mine(input_ids=IDS, labels=IDS, use_cache=False).loss)
        schedule.step()
    assert same(zo2, model)
    assert all(torch.equal(mine.get_parameter(name), value) for name, value in model.named_parameters())


def test_the_update_waits_until_it_is_flushed():
    told, _ = reference("llama-tied")
    before = make("llama-tied")
    mezo_steps(before, seeds(3))
    after = make("llama-tied")
    mezo_steps(after, seeds(4))
    zo2 = streamed(make("llama-tied"))
    assert [zo2.step(IDS)[:2] for _ in range(4)] == told[:4]
    # one update back, and moved as the fourth step's three perturbations have moved it
    for parameters, scaling in itertools.product([list(before.parameters())], (1, -2, 1)):
        torch.manual_seed(seeds(4)[3])
        for each in parameters:
            each.data = each.data + scaling * torch.normal(mean=0, std=1, size=each.size()) * 1e-3
    assert all(torch.equal(zo2.model.get_parameter(name), value) for name, value in before.named_parameters())
    assert zo2.evaluate(IDS) == after.eval()(input_ids=IDS, labels=IDS).loss.item()
    assert same(zo2, after)
    kept = copy.deepcopy(zo2.state_dict()["model"])
    zo2.flush()
    assert all(torch.equal(value, kept[name]) for name, value in zo2.state_dict()["model"].items())
    assert zo2.step(IDS)[:2] == told[4]


def constant(model):
    return model(input_ids=IDS, labels=IDS, use_cache=False).loss * 0 + 3.0


def test_a_gradient_of_nothing_still_decays_and_advances(tmp_path):
    model = make()
    told = mezo_steps(model, seeds(2), lambda: constant(model)) + mezo_steps(model, [seeds(4)[2], seeds(4)[3]])
    zo2 = streamed(make(), tmp_path, store="disk")
    assert [zo2.step(batch)[:2] for batch in (constant, constant, IDS, IDS)] == told
    assert told[0] == (3.0, 0.0)
    assert same(zo2, model)


def flat(model):
    """A loss that nothing changes."""
    return model(torch.ones(1, 3)) * 0 + 1.0


def test_without_a_rate_theta_comes_back_within_its_rounding():
    start = {name: value.detach() for name, value in stack().named_parameters()}
    zo2 = streamed(stack(), lr=0.0)
    for _ in range(1000):
        zo2.step(flat)
    drift = sum((zo2.model.get_parameter(name) - value).detach().square().sum() for name, value in start.items()) ** 0.5
    norm = sum(value.square().sum() for value in start.values()) ** 0.5
    assert 0 < float(drift) < 1e-5 * float(norm)


def test_with_decay_alone_theta_shrinks():
    start, lr, steps = dict(stack().named_parameters()), 0.01, 100
    zo2, matrices = (streamed(stack(), lr=lr, decay_rule=rule) for rule in ("mezo", "matrices"))
    for each in (zo2, matrices):
        for _ in range(steps):
            each.step(flat)
        for name, value in each.state_dict()["model"].items():
            factor = 1.0 if "bias" in name else (1 - lr * DECAY) ** steps
            assert torch.allclose(value, factor * start[name], rtol=1e-5, atol=1e-6), name


def test_draws_are_counted(monkeypatch, tmp_path):
    """2 of each parameter a step with its z kept, 4 in MeZO: the same ones."""
    drawn: list[torch.Tensor] = []
    normal = torch.normal
    monkeypatch.setattr(torch, "normal", lambda *args, **words: drawn.append(normal(*args, **words)) or drawn[-1])
    parameters = len(list(make().parameters()))
    mezo_steps(make(), seeds(4))
    theirs = list(drawn)
    drawn.clear()
    zo2 = streamed(make(), tmp_path, store="disk")
    for _ in range(4):
        zo2.step(IDS)
    zo2.flush()
    assert (len(theirs), len(drawn)) == (4 * 4 * parameters, 2 * 4 * parameters)
    assert {each.numpy().tobytes() for each in theirs} == {each.numpy().tobytes() for each in drawn}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("store", ["none", "cpu"])
def test_other_types_are_mezos_too(dtype, store):
    model = make("llama-tied", dtype)
    told = mezo_steps(model, seeds(3))
    zo2 = streamed(make("llama-tied", dtype), store=store)
    assert [zo2.step(IDS)[:2] for _ in range(3)] == told
    assert same(zo2, model)


def test_what_is_frozen_stays_and_draws_nothing():
    def frozen():
        model = make()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("mlp" in name)
        return model

    zo2, mine = streamed(frozen(), store="cpu"), frozen().eval()
    optimizer = MeZO(mine.named_parameters(), lr=LR, weight_decay=DECAY)
    for _ in range(3):
        optimizer.step(lambda: mine(input_ids=IDS, labels=IDS, use_cache=False).loss)
        assert zo2.step(IDS) == optimizer.last
    assert same(zo2, mine)
    assert torch.equal(zo2.state_dict()["model"]["model.norm.weight"], make().model.norm.weight)


@pytest.mark.parametrize("store", ["none", "cpu"])
def test_copies_go_their_own_way(store):
    zo2 = streamed(make("llama-tied"), store=store)
    zo2.step(IDS)
    for twin in (copy.deepcopy(zo2), pickle.loads(pickle.dumps(zo2))):
        before = twin.step(IDS)
        assert twin.model is not zo2.model
        assert before == copy.deepcopy(zo2).step(IDS)
    fresh = streamed(make("llama-tied"), store="cpu")
    fresh.load_state_dict(zo2.state_dict())
    assert fresh.step(IDS) == zo2.step(IDS)
    assert fresh.config == ZO2Config.from_dict(fresh.config.to_dict())


def test_modes_are_given_back_and_gradients_stay_possible():
    zo2 = streamed(make("gpt2"))
    zo2.model.transformer.h[0].eval()
    zo2.step(IDS[:1])
    assert (zo2.model.training, zo2.model.transformer.h[0].training, zo2.model.transformer.h[1].training) == (True, False, True)
    zo2.flush()
    zo2.model(input_ids=IDS[:, ::2], labels=IDS[:, ::2]).loss.backward()
    assert all(each.grad is not None for each in zo2.model.parameters())
