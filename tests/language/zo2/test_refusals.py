"""What cannot be is refused in one clear line, and nothing is lost or left behind."""

from __future__ import annotations

import json
import os
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from zo2_models import IDS, make, seeds, streamed
from zo2_stack import Stack, stack

from fewer.language import ZO2, MeZO, ZO2Config, replay


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"eps": 0.0}, "eps is 0.0; expected a finite number above 0"),
        ({"eps": -1e-3}, "eps is -0.001"),
        ({"lr": -1.0}, "lr is -1.0; expected a finite number of at least 0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"micro_batches": 0}, "micro_batches is 0; expected a whole number of at least 1"),
        ({"store": "dsk"}, "store is 'dsk'; expected one of cpu, disk, none: did you mean 'disk'?"),
        ({"store": "disk"}, "store is 'disk' and store_dir is not given; expected the directory"),
        ({"store": "none", "store_dtype": "float16"}, "store_dtype is 'float16' and store 'none'"),
        ({"store_dtype": "int8"}, "store_dtype is 'int8'; expected one of"),
        ({"rng": "numpy"}, "rng is 'numpy'; expected one of torch, counter"),
        ({"decay_rule": "all"}, "decay_rule is 'all'"),
    ],
)
def test_a_config_that_cannot_be(words, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        ZO2Config(**words)


class NoList(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.heads = nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2)])


def test_no_list_of_blocks_lists_the_candidates():
    with pytest.raises(ValueError, match="NoList has no ModuleList of a known family of NoList; expected one of heads: name it as blocks"):
        ZO2(NoList())
    with pytest.raises(
        ValueError, match="blocks is 'model.layer', which is no ModuleList of LlamaForCausalLM; expected one of model.layers"
    ):
        ZO2(make(), ZO2Config(store="none"), "model.layer")
    with pytest.raises(ValueError, match="expected one of none, for it has none"):
        ZO2(nn.Linear(2, 2))


def test_blocks_that_share_a_parameter():
    model = stack()
    model.steps[1].weight = model.steps[0].weight
    with pytest.raises(ValueError, match="steps.0.weight and steps.1.weight are one parameter; expected each block's to be its own"):
        streamed(model)
    model = stack()
    model.first.weight = model.steps[0].weight
    with pytest.raises(ValueError, match="first.weight and steps.0.weight are one parameter"):
        streamed(model)


class Odd(Stack):
    """Its loop does something between the blocks."""

    def forward(self, x):
        for step in self.steps:
            x = step(x) + 1
        return self.last(x).square().mean()


class Idle(Stack):
    def forward(self, x):
        return self.last(self.steps[0](x)).square().mean()


class Pairs(Stack):
    def __init__(self):
        super().__init__()
        for step in self.steps:
            step.forward = lambda x: (x, None)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Odd, "block 1 of steps is not called next with what block 0 returned; expected blocks that follow each other"),
        (Idle, "1 of 2 blocks of steps are called for this batch; expected all"),
        (Pairs, "a Linear returns a tuple; expected the hidden state alone, a tensor"),
    ],
)
def test_models_that_are_no_walk(kind, said):
    zo2 = streamed(kind())
    with pytest.raises(ValueError, match=said):
        zo2.step(lambda model: model(torch.ones(1, 3)))


def test_nothing_to_train():
    with pytest.raises(ValueError, match="no parameter of Stack requires a gradient; expected some to train: unfreeze them"):
        streamed(stack().requires_grad_(False))
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        MeZO(stack().requires_grad_(False).named_parameters())
    with pytest.raises(ValueError, match="have no names, by which MeZO decays them"):
        MeZO(stack().parameters(), weight_decay=0.1)
    with pytest.raises(ValueError, match="given no closure"):
        MeZO(stack().parameters()).step()


@pytest.mark.parametrize("loss", [torch.tensor(float("inf")), torch.ones(2), 3.0, None])
def test_a_loss_that_is_no_finite_scalar(loss):
    model = stack()
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = MeZO(model.named_parameters(), lr=1.0)
    with pytest.raises(ValueError, match=rf"the loss of step 0 \(seed {seeds(1)[0]}\) is .*; expected a finite scalar, nothing is updated"):
        optimizer.step(lambda: loss)
    with pytest.raises(ValueError, match="expected a finite scalar"):
        streamed(model, lr=1.0).step(lambda model: (model(torch.ones(1, 3)), loss)[1])
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert all(torch.allclose(value, before[name], atol=1e-6) for name, value in model.named_parameters())
    assert optimizer.param_groups[0]["step"] == 0


def test_a_batch_without_labels_or_of_odd_rows():
    with pytest.raises(ValueError, match="the model gives no loss for this batch; expected one with labels"):
        streamed(make()).step({"input_ids": IDS})
    with pytest.raises(ValueError, match=r"micro_batches is 3 and the batch has \[2\] rows; expected a multiple"):
        streamed(make(), micro_batches=3).step(IDS)


def test_a_store_is_never_written_over(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "mine.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="store_dir .* is not empty"):
        streamed(stack(), tmp_path, store="disk")
    assert [file.name for file in (tmp_path / "store").iterdir()] == ["mine.txt"]
    streamed(stack(), tmp_path / "a", store="disk")
    with pytest.raises(FileExistsError):
        streamed(stack(), tmp_path / "a", store="disk")
    streamed(stack(), tmp_path / "a", store="disk", resume=True)
    with pytest.raises(ValueError, match="holds blocks of another model or type"):
        streamed(stack(3), tmp_path / "a", store="disk", resume=True)
    with pytest.raises(ValueError, match="store is 'none'; expected 'disk'"):
        streamed(stack(), resume=True)
    with pytest.raises(ValueError, match="is of a model that is none of transformers'"):
        ZO2.resume(tmp_path / "a" / "store")


def test_too_little_space(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(ValueError, match=r"has 1e-07 GB free; expected \S+ GB, twice the model: choose another place"):
        streamed(stack(), tmp_path, store="disk")
    assert not list(tmp_path.iterdir())


def test_a_store_that_is_spoilt_says_which_file(tmp_path):
    zo2 = streamed(stack(), tmp_path, store="disk")
    file = zo2.store.file(1, zo2.store.generation)
    file.write_bytes(file.read_bytes()[:10])
    with pytest.raises(ValueError, match=r"block-00001.0.bin has 10 bytes; expected 128: the store is cut off"):
        zo2.step(lambda model: model(torch.ones(1, 3)))
    index = tmp_path / "store" / "index.json"
    index.write_text("{}")
    with pytest.raises(ValueError, match=r"index.json lacks blocks, .*; expected the index of a store of zo2"):
        streamed(stack(), tmp_path, store="disk", resume=True)


def test_a_disk_store_is_not_copied(tmp_path):
    import copy

    with pytest.raises(TypeError, match="a copy would write into as well; use save_pretrained or state_dict"):
        copy.deepcopy(streamed(stack(), tmp_path, store="disk"))


def test_states_and_journals_of_others(tmp_path):
    with pytest.raises(ValueError, match="the state lacks steps.0.weight in this model's shape"):
        streamed(stack()).load_state_dict(streamed(stack(width=4)).state_dict())
    make().save_pretrained(tmp_path / "base")
    for text in ("[1", "{}", json.dumps({"base": "x", "config": {"eps": 0}, "updates": []})):
        (tmp_path / "journal.json").write_text(text)
        with pytest.raises(ValueError, match="journal.json is no"):
            replay(tmp_path / "base", tmp_path / "journal.json", tmp_path / "out")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError, match="pipe is no file; expected journal.json"):
        replay(tmp_path / "base", tmp_path / "pipe", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="base has no index.json; expected the store of a run"):
        ZO2.resume(tmp_path / "base")
    with pytest.raises(ValueError, match="Stack is no model of transformers; expected one: use state_dict"):
        streamed(stack()).save_pretrained(tmp_path / "out")
    zo2 = streamed(make(), tmp_path, store="disk")
    with pytest.raises(FileExistsError, match="which is read here"):
        zo2.save_pretrained(tmp_path / "store", overwrite=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["base", "journal.json", "pipe", "store"]


def test_directories_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="is no model directory"):
        ZO2.from_pretrained(tmp_path, ZO2Config(store="cpu"))
    make().save_pretrained(tmp_path / "base")
    weights = tmp_path / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is no whole safetensors file"):
        ZO2.from_pretrained(tmp_path / "base", ZO2Config(store="disk", store_dir=str(tmp_path / "store")))
    assert not (tmp_path / "store").exists()
