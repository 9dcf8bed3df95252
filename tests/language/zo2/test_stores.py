"""Where blocks live: what goes to and fro, what a crash leaves, what a shorter type loses."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from zo2_models import IDS, make, mezo_steps, same, seeds, streamed
from zo2_stack import stack

from fewer.language import ZO2
from fewer.language.zo2.stores import DiskStore, Layout, Short, buffer, rounded, scale_for

HERE = Path(__file__).parent


def test_each_block_comes_and_goes_once_a_step(tmp_path):
    model = stack(depth=6, width=8)
    zo2 = streamed(model, tmp_path, store="disk")
    size = 6 * (8 * 8 * 4 + 64)  # a bias of 32 bytes takes 64
    x = torch.ones(2, 8)
    for step in range(1, 4):
        zo2.step(lambda model: model(x))
        assert (zo2.store.bytes_read, zo2.store.bytes_written) == (step * size, step * size)
        files = {file.name for file in (tmp_path / "store").glob("block-*")}
        assert len(files) == 12, "two generations, nothing else"
    assert zo2.store.most_attached == 3
    assert zo2.store.attached == 0
    zo2.evaluate(lambda model: model(x))  # a flush reads and writes, the pass reads
    assert (zo2.store.bytes_read, zo2.store.bytes_written) == (5 * size, 4 * size)


def test_what_is_away_cannot_be_used_by_mistake(tmp_path):
    zo2 = streamed(make(), tmp_path, store="disk")
    assert {each.device.type for each in zo2.model.model.layers.parameters()} == {"meta"}
    with pytest.raises(RuntimeError):
        zo2.model(input_ids=IDS)


@pytest.mark.parametrize("store", ["none", "cpu", "disk"])
def test_a_loss_that_is_not_finite_updates_nothing(store, tmp_path):
    model = make("llama-tied")
    told = mezo_steps(model, seeds(2))
    zo2 = streamed(make("llama-tied"), tmp_path, store=store)
    zo2.step(IDS)

    def broken(model):
        return model(input_ids=IDS, labels=IDS, use_cache=False).loss * float("nan")

    with pytest.raises(ValueError, match=r"the loss of step 1 \(seed \d+\) is nan; expected a finite scalar, nothing is updated"):
        zo2.step(broken)
    assert (zo2.steps, len(zo2.journal)) == (1, 1)
    if store == "disk":  # the last whole step is what the directory has, to the bit
        assert zo2.step(IDS)[:2] == told[1]
        assert same(zo2, model)
    else:  # theta has come back but for its rounding
        after = make("llama-tied")
        mezo_steps(after, seeds(1))
        state = zo2.state_dict()["model"]
        assert all(torch.allclose(value, state[name], atol=1e-6) for name, value in after.named_parameters())


@pytest.mark.parametrize("store", ["none", "cpu", "disk"])
def test_a_step_that_breaks_off_is_not_gone_on_with(store, tmp_path):
    model = make()
    mezo_steps(model, seeds(3))
    zo2 = streamed(make(), tmp_path, store=store)
    zo2.step(IDS)
    with pytest.raises(KeyError):  # a batch that the model cannot take: nothing has been touched yet
        zo2.step(lambda model: {}["nothing"])
    zo2.step(IDS)
    kept = zo2.state_dict() if store != "disk" else {}
    kept_steps = []

    def interrupted(*_):
        kept_steps.append(1)
        if len(kept_steps) == 3:
            raise KeyboardInterrupt

    hook = zo2.model.model.layers[1].register_forward_hook(interrupted)
    with pytest.raises(KeyboardInterrupt):
        zo2.step([IDS, IDS])
    hook.remove()
    if store != "disk":
        with pytest.raises(RuntimeError, match="broken off in the middle"):
            zo2.step(IDS)
        zo2.load_state_dict(kept)
    zo2.step(IDS)
    assert same(zo2, model)


def test_a_store_is_resumed_by_the_model_or_without_it(tmp_path):
    model = make("llama-tied")
    told = mezo_steps(model, seeds(4))
    streamed(make("llama-tied"), tmp_path, store="disk").step(IDS)
    second = streamed(make("llama-tied"), tmp_path, store="disk", resume=True)
    assert second.step(IDS)[:2] == told[1]
    third = ZO2.resume(tmp_path / "store")
    assert [third.step(IDS)[:2] for _ in range(2)] == told[2:]
    assert same(third, model)
    assert [each.g for each in third.journal] == [g for _, g in told]


RUN = """
import sys, torch
sys.path.insert(0, {here!r})
from zo2_stack import stack
from fewer.language.zo2.streaming import ZO2
from fewer.language.zo2.mezo import ZO2Config
torch.set_num_threads(1)
config = ZO2Config(lr=1e-2, weight_decay=0.1, working_device="cpu", store="disk", store_dir={store!r})
zo2 = ZO2(stack(8, 64), config, "steps", resume=len(sys.argv) > 1)
print("begun", flush=True)
x = torch.ones(4, 64)
while True:
    zo2.step(lambda model: model(x))
"""


@pytest.mark.alone
def test_a_killed_run_goes_on_where_its_last_whole_step_was(tmp_path):
    """Killed at five random moments; then the weights are those of a run that nobody disturbed."""
    chance = random.Random(0)
    store = tmp_path / "store"
    code = RUN.format(here=str(HERE), store=str(store))
    reached = []
    for _ in range(5):
        process = subprocess.Popen(
            [sys.executable, "-c", code, *reached[:1]], stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
        time.sleep(chance.uniform(0.05, 0.25))
        process.kill()
        process.wait()
        reached.append(str(json.loads((store / "index.json").read_text())["steps"]))
    zo2 = streamed(stack(8, 64), tmp_path, store="disk", resume=True)
    assert zo2.steps == int(reached[-1]) > int(reached[0])
    x = torch.ones(4, 64)
    zo2.step(lambda model: model(x))
    undisturbed = streamed(stack(8, 64))
    for _ in range(zo2.steps):
        undisturbed.step(lambda model: model(x))
    left, right = zo2.state_dict(), undisturbed.state_dict()
    assert left["journal"] == right["journal"]
    assert all(torch.equal(value, right["model"][name]) for name, value in left["model"].items())
    assert not [file.name for file in store.glob(".fewer-*")], "what the killed steps had not finished is gone"


# Shorter types


def test_a_float32_store_is_no_store(tmp_path):
    one, two = streamed(make()), streamed(make(), tmp_path, store="cpu")
    assert [one.step(IDS) for _ in range(2)] == [two.step(IDS) for _ in range(2)]


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_a_round_trip_is_idempotent(name):
    block = {"w": torch.nn.Parameter(torch.randn(40, 9) * 30), "b": torch.nn.Parameter(torch.randn(7) * 1e-3)}
    layout, short = Layout(block), Short(getattr(torch, name), "nearest")
    once = short.narrow(layout.pack(lambda key: block[key].data), layout, 0)
    wide = short.widen(once, layout)
    again = short.widen(short.narrow(wide, layout, 0), layout)
    assert torch.equal(wide, again)
    relative = (layout.slots[0].view(wide) - block["w"]).abs().max() / block["w"].abs().max()
    assert relative < {"float16": 1e-3, "bfloat16": 4e-3, "float8_e4m3fn": 0.07, "float8_e5m2": 0.13}[name]
    assert once.nbytes == 367 * getattr(torch, name).itemsize + 8


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_stochastic_rounding_has_the_right_mean_and_takes_neighbours_alone(name):
    dtype = getattr(torch, name)
    values = torch.tensor([0.3, -0.3, 1.0, -5.3, 0.01, 0.0, 17.7], dtype=torch.float64)
    scale = scale_for(values.abs().max().item(), dtype)
    draws = torch.Generator().manual_seed(0)
    taken = torch.stack([rounded(values / scale, dtype, draws).double() * scale for _ in range(4000)])
    for column, value in zip(taken.T, values, strict=True):
        assert len(column.unique()) <= 2
        assert abs(column.mean() - value) <= 4 * column.std() / 4000**0.5 + 1e-15


def test_what_rounding_loses_of_small_updates():
    weights = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    moved = weights * (1 + 1e-6)
    nearest = rounded(moved, torch.bfloat16).float()
    assert (nearest == weights).double().mean() > 0.8
    stochastic = rounded(moved, torch.bfloat16, torch.Generator().manual_seed(1)).double()
    error = (stochastic - moved.double()) / weights.double()
    assert abs(error.mean()) < 4 * error.std() / len(error) ** 0.5
    assert 0 < (stochastic != weights).double().mean() < 1e-2


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_short_store_trains_and_says_what_it_loses(rounding, tmp_path):
    zo2 = streamed(make(), tmp_path, store="disk", store_dtype="bfloat16", store_rounding=rounding, lr=1e-7)
    assert zo2.lost_updates is None
    for _ in range(3):
        zo2.step(IDS)
    lost = zo2.lost_updates
    assert lost is not None
    assert (lost > 0.8) if rounding == "nearest" else (0 < lost < 1)
    plain = streamed(make(), tmp_path / "wide", store="disk", lr=1e-7)
    assert zo2.store.bytes_written < 0.52 * 3 * plain.store.block_bytes
    twin = streamed(make(), None, store="cpu", store_dtype="bfloat16", store_rounding=rounding, lr=1e-7)
    for _ in range(3):
        twin.step(IDS)
    assert torch.equal(
        twin.state_dict()["model"]["model.layers.0.mlp.up_proj.weight"], zo2.state_dict()["model"]["model.layers.0.mlp.up_proj.weight"]
    )
    list(zo2.named_values())  # a walk that only reads
    assert zo2.lost_updates is not None


@pytest.mark.parametrize("words", [{}, {"store_dtype": "bfloat16"}, {"overlap": False}])
def test_blocks_come_into_memory_that_earlier_ones_left_but_what_was_given_away_stays(words, tmp_path, monkeypatch):
    model, new = stack(depth=6, width=8), []
    zo2 = streamed(model, tmp_path, store="disk", **words)
    x = torch.ones(2, 8)
    zo2.step(lambda model: model(x))
    monkeypatch.setattr(DiskStore, "_room", lambda self, size, room=DiskStore._room: new.append(size) or room(self, size))
    fresh = [0]

    def counted(size, made=buffer):
        fresh[0] += 1
        return made(size)

    monkeypatch.setattr("fewer.language.zo2.stores.buffer", counted)
    for _ in range(3):
        zo2.step(lambda model: model(x))
    blocks = 3 * 6
    assert len(new) == blocks
    assert fresh[0] == (2 * blocks if "store_dtype" in words else 0)  # the wide and the short form of a block are made anew
    kept = [dict(part) for part in zo2.named_values()]
    before = [{name: value.clone() for name, value in part.items()} for part in kept[:-1]]
    for _ in range(2):
        zo2.step(lambda model: model(x))
    assert all(torch.equal(part[name], old[name]) for part, old in zip(kept, before, strict=False) for name in old)
