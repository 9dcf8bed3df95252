"""A model of transformers or torch is converted, trained, saved and put back; what cannot be converted is named; processes agree."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

from fewer.lowbit.fp4_training import FP4Linear, FP4Recipe, convert, export, fp4_matmul, revert
from fewer.lowbit.fp4_training.casts import Casts
from fewer.tasks import micro_lm
from house import on_two_processes

RECIPE = FP4Recipe.preset("nvfp4")


def test_converting_and_reverting_leaves_everything_as_it_was():
    model = micro_lm()
    before, kinds = copy.deepcopy(model.state_dict()), {name: type(module) for name, module in model.named_modules()}
    names = convert(model, RECIPE)
    assert len(names) == 4 * 7
    assert set(model.state_dict()) == set(before)
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.model.embed_tokens.weight
    changed = {name for name, module in model.named_modules() if type(module) is not kinds[name]}
    assert changed == set(names)
    ids = torch.arange(40)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert revert(model) == names
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    rotated = convert(model, FP4Recipe.preset("paper"))
    assert set(model.state_dict()) - set(before) == {f"{name}.hadamard_signs" for name in rotated}
    model.load_state_dict(before)


def test_trainer_trains_it_and_it_generates_and_is_saved(tmp_path):
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    model = micro_lm()
    convert(model, RECIPE)
    ids = torch.randint(100, (8, 32), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(
        tmp_path / "out", per_device_train_batch_size=4, max_steps=6, learning_rate=3e-3, report_to=[], use_cpu=True, disable_tqdm=True,
        save_strategy="no", gradient_checkpointing=True,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=rows).train()
    assert model.model.layers[0].mlp.up_proj.steps == 6
    model.eval()
    out = model.generate(ids[:1, :4], max_new_tokens=3, do_sample=False)
    assert out.shape == (1, 7)
    want = model(input_ids=ids[:1]).logits
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert not torch.allclose(again(input_ids=ids[:1]).logits, want, atol=1e-4)
    convert(again, RECIPE)
    assert torch.equal(again.eval()(input_ids=ids[:1]).logits, want)


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "nvfp4-te", "follow-up"])
def test_exported_weights_are_those_that_are_used(name):
    model = nn.Sequential(nn.Linear(50, 40, bias=False), nn.Linear(40, 20, bias=False))
    recipe = FP4Recipe.preset(name)
    with torch.no_grad():  # scales that differ from tile to tile
        model[0].weight *= torch.logspace(-1, 1, 40)[:, None] * torch.logspace(-1, 0, 50)
    convert(model, recipe)
    packed = export(model)
    assert set(packed) == {"0.weight", "1.weight"}
    w = packed["0.weight"].dequantize()
    assert torch.equal(w.T, fp4_matmul(torch.eye(50), model[0].weight, recipe))
    assert packed["0.weight"].nbytes < 0.2 * 4 * 50 * 40


def test_exported_weights_of_sixteen_bits_are_rotated_in_full_precision():
    model = nn.Sequential(nn.Linear(64, 32, bias=False)).bfloat16()
    recipe = FP4Recipe.preset("paper").replace(hadamard="all")
    convert(model, recipe)
    casts = Casts(recipe, signs=model[0].hadamard_signs)
    used = casts.cast(casts.rotated(model[0].weight.detach().float(), "forward", 1), "w", "forward", 1)
    assert torch.equal(export(model)["0.weight"].dequantize(), used)


def test_a_shared_layer_is_converted_at_each_of_its_places_and_hooks_stay():
    model = nn.ModuleDict({"one": nn.Linear(16, 16), "list": nn.ModuleList()})
    model["list"].append(model["one"])
    seen = []
    handle = model["one"].register_forward_hook(lambda *_: seen.append(1))
    assert convert(model, RECIPE) == ["one"]
    assert model["one"] is model["list"][0]
    assert isinstance(model["one"], FP4Linear)
    model["one"](torch.randn(2, 16))
    assert revert(model) == ["one"]
    assert type(model["list"][0]) is nn.Linear
    model["list"][0](torch.randn(2, 16))
    assert seen == [1, 1]
    handle.remove()
    model["one"](torch.randn(2, 16))
    assert seen == [1, 1]


def test_a_weight_that_a_hook_makes_and_a_model_that_is_a_layer_are_refused():
    from torch.nn.utils import prune

    model = nn.Sequential(nn.Linear(16, 16))
    prune.random_unstructured(model[0], "weight", 0.5)
    with pytest.raises(TypeError, match="^0 is a Linear .*expected a plain nn.Linear"):
        convert(model, RECIPE)
    with pytest.raises(TypeError, match="the model is a Linear itself; .*wrap it in nn.Sequential"):
        convert(nn.Linear(16, 16), RECIPE)


def test_select_chooses_the_layers():
    model = micro_lm()
    assert all("mlp" in name for name in convert(model, RECIPE, lambda name, linear: "mlp" in name))
    with pytest.raises(TypeError, match="is a FP4Linear .*revert or dequantise it first"):
        convert(model, RECIPE)


def test_wrapped_and_quantised_layers_are_named():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(micro_lm(), LoraConfig(r=2, target_modules=["q_proj"]))
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(TypeError, match="q_proj.* belongs to an adapter .*merge the adapter first"):
        convert(model, RECIPE)
    assert [type(module) for module in model.modules()] == kinds
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantised = nn.Sequential(nn.Linear(64, 64))
    quantize_(quantised, Int8WeightOnlyConfig())
    with pytest.raises(TypeError, match="^0 is a .*expected a plain nn.Linear"):
        convert(quantised, RECIPE)


def test_not_finite_operands_are_named_by_layer_and_operand():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    convert(model, RECIPE)
    x = torch.randn(4, 16)
    x[1, 2] = float("nan")
    with pytest.raises(FloatingPointError, match="^0: the operand x of the forward product has a NaN or an infinite value at step 1"):
        model(x)
    y = model(torch.randn(4, 16))
    with pytest.raises(FloatingPointError, match="^1: the operand dy of the dgrad product"):
        y.backward(torch.full_like(y, float("inf")))
    with torch.no_grad():
        model[1].weight[0, 0] = float("inf")
    with pytest.raises(FloatingPointError, match="^1: the operand w of the forward product"):
        model(torch.randn(4, 16))
    for scale in ("e8m0", "fp32", "bf16"):
        with pytest.raises(FloatingPointError):
            fp4_matmul(x, torch.eye(16), FP4Recipe(scale=scale))
    x[1, 2] = float("inf")
    with pytest.raises(FloatingPointError, match="operand x of the forward product"):
        fp4_matmul(x, torch.eye(16), FP4Recipe(clamp=0.9))


@pytest.mark.parametrize(
    ("x", "w", "said"),
    [
        (torch.ones(2, 3), torch.ones(2, 4), "expected [..., K] and [N, K]"),
        (torch.ones(2, 3), torch.ones(3), "expected [..., K] and [N, K]"),
        (torch.ones(2, 3, dtype=torch.long), torch.ones(2, 3), "x is torch.int64"),
        (torch.ones(2, 3), torch.ones(2, 3, dtype=torch.complex64), "w is torch.complex64"),
    ],
)
def test_shapes_and_dtypes_that_do_not_meet(x, w, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        fp4_matmul(x, w, RECIPE)


def test_a_step_below_one_is_told():
    with pytest.raises(ValueError, match="step is 0; expected a whole number of at least 1"):
        fp4_matmul(torch.eye(16), torch.eye(16), RECIPE, 0)


def test_tiles_larger_than_a_weight_are_refused_before_anything_is_converted():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"weight_blocks is '2d', block 16 and the weight \(8, 8\)"):
        convert(model, RECIPE.replace(weight_blocks="2d"))
    assert [type(module) for module in model] == [nn.Linear, nn.Linear]


def test_a_rotation_that_does_not_divide_is_told_once(recwarn):
    layer = FP4Linear(24, 8, recipe=FP4Recipe(hadamard="all", block=16), name="layer 7")
    for _ in range(3):
        layer(torch.randn(16, 24))
    told = [str(each.message) for each in recwarn if "rotation" in str(each.message)]
    assert told == ["layer 7: a rotation of 16 does not divide 24; one of 8 is used"]


def work(rank, folder):
    x = torch.full((4, 16), 1.0 + 9.0 * rank)
    layers = [FP4Linear.from_linear(nn.Linear(16, 8, bias=False), RECIPE.replace(sync_amax=each)) for each in (True, False)]
    for layer in layers:
        layer(x)
    torch.save([float(layer._held["x forward"]) for layer in layers], folder / str(rank))


def test_processes_share_their_maxima_where_asked(tmp_path):
    on_two_processes(work, tmp_path)
    found = [torch.load(tmp_path / str(rank)) for rank in (0, 1)]
    assert found == [[10.0, 1.0], [10.0, 10.0]]
