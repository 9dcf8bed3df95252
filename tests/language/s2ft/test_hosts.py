"""S2FT in its host libraries: transformers' Trainer, accelerate, DistributedDataParallel, peft, quantised weights."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from s2ft_models import EVERY, FAMILIES, assert_tied, logits, loss_of, make, state, train, trained, wrap
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from fewer.language import S2FTConfig, get_s2ft_model, to_peft_lora
from fewer.language.s2ft.slice_linear import S2Linear
from house import on_two_processes


def trainer_of(model, folder, steps):
    words = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=3,
        learning_rate=1e-2,
        save_steps=3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="steps",
        lr_scheduler_type="constant",
    )
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 64, (6, 9), generator=torch.Generator().manual_seed(0))]
    return Trainer(model=model, args=words, train_dataset=rows)


@pytest.mark.parametrize("layout", ["permuted", "gather"])
def test_transformers_trainer_trains_saves_and_resumes(layout, tmp_path):
    straight = wrap(**EVERY, layout=layout)
    plain = state(make())
    trainer_of(straight, tmp_path / "straight", 6).train()
    trainer_of(wrap(**EVERY, layout=layout), tmp_path / "broken", 3).train()
    resumed = wrap(**EVERY, layout=layout)
    trainer_of(resumed, tmp_path / "broken", 6).train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-3"))
    assert torch.allclose(logits(resumed), logits(straight), atol=1e-5)
    assert_tied(resumed)
    stored = sum(file.stat().st_size for file in (tmp_path / "broken" / "checkpoint-3").glob("model.safetensors"))
    assert stored < 4 * sum(value.numel() for value in plain.values())
    assert not torch.allclose(logits(straight), logits(make()), atol=1e-2)


def test_accelerate_prepares_and_a_device_map_holds_the_slice_with_its_layer():
    from accelerate import Accelerator, dispatch_model

    straight, prepared = wrap(), wrap()
    train(straight, 3)
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(trained(prepared), lr=1e-2, weight_decay=0)
    ready, optimizer = accelerator.prepare(prepared, optimizer)
    train(ready, 3, optimizer)
    assert torch.allclose(logits(ready), logits(straight), atol=1e-6)
    dispatched = get_s2ft_model(dispatch_model(make(), {"": "cpu"}, force_hooks=True), S2FTConfig(**EVERY))
    train(dispatched, 3)
    assert torch.allclose(logits(dispatched), logits(straight), atol=1e-6)
    assert all(layer.s.device == layer.weight.device for layer in dispatched.layers.values())


def sliced() -> nn.Module:
    torch.manual_seed(0)
    first = S2Linear(nn.Linear(8, 12), torch.tensor([1, 5]), "rows", "gather")
    return nn.Sequential(first, nn.Tanh(), S2Linear(nn.Linear(12, 4), torch.arange(3, 6), "columns"))


def five_steps(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()


def half_of_the_rows(rank: int, folder: Path) -> None:
    sent: list[int] = []

    def counted(_, bucket):
        sent.append(bucket.buffer().numel())
        dist.all_reduce(bucket.buffer().div_(2))
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    net, x, y = sliced(), torch.randn(16, 8), torch.randn(16, 4)
    model = DistributedDataParallel(net)
    model.register_comm_hook(None, counted)
    five_steps(model, x[rank::2], y[rank::2])
    if rank == 0:
        alone = sliced()
        five_steps(alone, x, y)
        assert torch.allclose(alone(x), net(x), atol=1e-6), (alone(x) - net(x)).abs().max()
        assert sum(sent) == 5 * (2 * 8 + 4 * 3), sent


def test_two_processes_train_as_one_and_send_only_what_is_trained(tmp_path):
    on_two_processes(half_of_the_rows, tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_the_exported_lora_and_it_is_the_merged_model(family, tmp_path):
    model = wrap(family)
    train(model, 4)
    model.save_pretrained(tmp_path / "s2ft")
    to_peft_lora(model, tmp_path / "lora")
    to_peft_lora(tmp_path / "s2ft", tmp_path / "again")
    slices = model.adapter().slices
    merged = logits(model.merge_and_unload())
    for folder in ("lora", "again"):
        loaded = peft.PeftModel.from_pretrained(make(family), tmp_path / folder)
        assert torch.allclose(logits(loaded), merged, atol=1e-5)
        about = loaded.peft_config["default"]
        assert about.rank_pattern == about.alpha_pattern == {path: len(part.index) for path, part in slices.items()}
        adapted = {
            name.removeprefix("base_model.model.") for name, each in loaded.named_modules() if hasattr(each, "lora_A") and len(each.lora_A)
        }
        assert adapted == set(slices)


class Int8Linear(nn.Module):
    """Weights in eight bits, as quantising libraries keep them."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("scale", linear.weight.detach().abs().amax(1, keepdim=True) / 127)
        self.weight = nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.scale)


def test_quantised_weights_are_trained_beside_and_refused_inside():
    def quantised():
        model = make()
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and "layers" in name:
                model.set_submodule(name, Int8Linear(module))
        return model.requires_grad_(False)

    with pytest.raises(TypeError, match="Int8Linear of torch.int8, which cannot be trained in place; expected .*in_place=False"):
        get_s2ft_model(quantised(), S2FTConfig(**EVERY))
    model = get_s2ft_model(quantised(), S2FTConfig(**EVERY, in_place=False))
    before = loss_of(model).item()
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    for _ in range(10):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    assert loss_of(model).item() < before - 0.1
    with pytest.raises(TypeError, match="is quantised, its adapter cannot be merged"):
        model.merge_and_unload()
