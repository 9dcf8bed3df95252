"""Whole models: operands that make autograd's products, layers against brute force, divergence against a loop, packed weights."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from tiny_llamas import ids, tiny_llama
from torch import nn
from torch.nn import functional as F

from fewer.lowbit import fake_quantize, hadamard
from fewer.lowbit.int_vs_fp import (
    Quantiser,
    QuantLinear,
    Reference,
    analyse_model,
    analyse_tensor,
    capture,
    convert,
    divergence,
    load_packed,
    packed_weights,
    revert,
    save_packed,
)
from fewer.lowbit.int_vs_fp.theory import compared


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 32), nn.ReLU(), nn.Linear(32, 5))


def test_captured_operands_reproduce_autograd():
    net = small_net()
    x, y = torch.randn(24, 64, requires_grad=True), torch.randint(5, (24,))
    seen: dict[tuple[str, str], torch.Tensor] = {(layer, operand): t for layer, operand, t in capture(net, [(x.detach(), y)])}
    assert len(seen) == 18
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}
    for name in ("0", "2", "4"):

        def keep(_: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor, name: str = name) -> None:
            inputs[name], outputs[name] = args[0], out

        net.get_submodule(name).register_forward_hook(keep)
    loss = F.cross_entropy(net(x), y)
    for name in ("0", "2", "4"):
        layer = net.get_submodule(name)
        dx, dw = torch.autograd.grad(loss, [inputs[name], layer.weight], retain_graph=True)
        made = seen[name, "X"] @ seen[name, "W"].T + layer.bias
        torch.testing.assert_close(made, outputs[name], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(seen[name, "dY"] @ seen[name, "W^T"].T, dx, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(seen[name, "dY^T"] @ seen[name, "X^T"].T, dw, rtol=1e-5, atol=1e-6)


def test_operands_are_cut_along_their_contraction():
    net = nn.Sequential(nn.Linear(64, 32))
    x, y = torch.randn(64, 64), torch.randint(32, (64,))
    clean = {operand: analyse_rows(t) for _, operand, t in capture(net, [(x, y)])}
    x[7] *= 1000  # an outlying token
    struck = {operand: analyse_rows(t) for _, operand, t in capture(net, [(x, y)])}
    changed = (struck["X"] - clean["X"]).abs().amax(1) > 0
    assert changed.nonzero().flatten().tolist() == [7]  # its own row's blocks alone
    beside = (struck["X^T"] - clean["X^T"])[:, [*range(7), *range(8, 32)]].abs().amax(1) > 0
    assert beside.all()  # and by tokens every channel's first block
    assert not (struck["X^T"] - clean["X^T"])[:, 32:].any()


def analyse_rows(t: torch.Tensor) -> torch.Tensor:
    return fake_quantize(t, "mxfp4").contiguous()


def test_a_models_report():
    model, batch = tiny_llama(), ids()
    report = analyse_model(model, [{"input_ids": batch, "labels": batch}])
    assert len(report.layers) == 14
    assert len(report.rows) == 14 * 6
    assert not any("lm_head" in layer for layer in report.layers)
    layer = model.model.layers[1].mlp.down_proj
    row = next(each for name, operand, each in report.rows if name == "model.layers.1.mlp.down_proj" and operand == "W")
    assert row.qsnr == analyse_tensor(layer.weight.detach()).qsnr
    assert report.win_rate("mx8") == 1
    assert report.recommended[report.layers[0]]["mx8"] == "mxint8"
    assert 0 <= report.agreement("nv4") <= 1
    forward = analyse_model(model, [batch], rotate="block", backward=False)
    assert {operand for _, operand, _ in forward.rows} == {"X", "W"}
    assert not model.training


def test_quant_linear_is_the_cast_of_both_operands():
    x, linear = torch.randn(5, 7, 96), nn.Linear(96, 40)
    for name in ("mxint8", "nvfp4"):
        fmt = compared(name)
        layer = QuantLinear.from_linear(linear, name, name)
        expected = F.linear(fake_quantize(x.reshape(-1, 96), fmt), fake_quantize(linear.weight, fmt), linear.bias).view(5, 7, 40)
        with torch.no_grad():
            assert torch.equal(layer(x), expected)
        turned = QuantLinear.from_linear(linear, name, name, rotate=32, seed=3, name="a")
        signs = turned.signs
        with torch.no_grad():
            left, right = (fake_quantize(hadamard(each, 32, signs=signs), fmt) for each in (x.reshape(-1, 96), linear.weight.detach()))
            assert torch.equal(turned(x), F.linear(left, right, linear.bias).view(5, 7, 40))
        assert set(turned.state_dict()) == {"weight", "bias"}
        assert not torch.equal(signs, QuantLinear.from_linear(linear, name, name, rotate=32, seed=4, name="a").signs)


def test_gradients_go_straight_through_where_nothing_is_trained_in_few_bits():
    x = torch.randn(6, 64, requires_grad=True)
    layer = QuantLinear(64, 8, rotate=16)
    layer(x).sum().backward()
    plain = F.linear(torch.ones(6, 8), layer.weight.detach().T)
    torch.testing.assert_close(x.grad, plain, rtol=0.1, atol=0.1)
    assert layer.weight.grad is not None


@pytest.mark.parametrize("name", ["mxint8", "mxfp8_e4m3"])
def test_training_products_are_brute_forces(name):
    fmt = compared(name)
    linear = nn.Linear(48, 40)
    layer = QuantLinear.from_linear(linear, name, name, train=True)
    x = torch.randn(36, 48, requires_grad=True)
    y = layer(x)
    dy = torch.randn_like(y)
    dx, dw, db = torch.autograd.grad(y, [x, layer.weight, layer.bias], dy)
    w, given = linear.weight.detach(), x.detach()
    torch.testing.assert_close(y.detach(), fake_quantize(given, fmt, 1) @ fake_quantize(w, fmt, 1).T + linear.bias, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dx, fake_quantize(dy, fmt, 1) @ fake_quantize(w, fmt, 0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dw, fake_quantize(dy, fmt, 0).T @ fake_quantize(given, fmt, 0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(db, dy.sum(0))


def test_the_kept_cast_follows_its_weight():
    layer, x = QuantLinear(64, 16), torch.randn(3, 64)
    with torch.no_grad():
        before = layer(x)
        kept = layer.cast_weight
        layer(x)
        assert layer.cast_weight is kept
        layer.weight.mul_(2)
        torch.testing.assert_close(layer(x) - layer.bias, 2 * (before - layer.bias))
        other = QuantLinear(64, 16)
        other.load_state_dict(layer.state_dict())
        assert torch.equal(other(x), layer(x))
        for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(copied(x), layer(x))
            copied.weight.zero_()
            assert torch.equal(copied(x), layer.bias.expand(3, -1))
        wide = copy.deepcopy(layer).double()
        assert wide(x.double()).dtype == torch.float64
        torch.testing.assert_close(wide(x.double()).float(), layer(x))
        for dtype in (torch.bfloat16, torch.float16):
            short = copy.deepcopy(layer).to(dtype)
            torch.testing.assert_close(short(x.to(dtype)).float(), layer(x), rtol=0.05, atol=0.05)
        assert layer(x[:0]).shape == (0, 16)
        assert torch.equal(layer(x[0]), layer(x)[0])


def test_a_weight_whose_memory_is_exchanged_is_cast_anew():
    layer = QuantLinear(32, 8, bias=False)
    x = torch.randn(2, 32)
    with torch.no_grad():
        layer(x)
        layer.weight.data = torch.zeros(8, 32)
        assert not layer(x).any()


def test_a_weight_that_was_loaded_and_then_changed_is_cast_anew(tmp_path):
    net = convert(nn.Sequential(nn.Linear(32, 8, bias=False)), "mxint8")
    save_packed(net, tmp_path / "packed")
    loaded = load_packed(nn.Sequential(nn.Linear(32, 8, bias=False)), tmp_path / "packed")
    x = torch.randn(2, 32)
    with torch.no_grad():
        for each in (loaded, copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
            assert torch.equal(each(x), net(x))
            each[0].weight.zero_()
            assert not each(x).any()


def test_an_ablation_of_the_input_is_not_packed_as_its_plain_cast(tmp_path):
    asymmetric = Quantiser(compared("mxint8"), clip="asymmetric")
    net = nn.Sequential(QuantLinear(32, 8, fmt_x=asymmetric))
    with pytest.raises(ValueError, match="0 is cast by an ablation"):
        save_packed(net, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_a_layer_in_two_places_is_cast_in_both():
    net = nn.ModuleDict({"one": nn.Linear(32, 32)})
    net["two"] = net["one"]
    convert(net, "mxint8")
    assert isinstance(net["two"], QuantLinear)
    assert net["two"] is net["one"]


def test_convert_and_revert_leave_the_parameters():
    model, batch = tiny_llama(), ids()
    before = dict(model.named_parameters())
    with torch.no_grad():
        plain = model(batch).logits
        convert(model, {"*.mlp.*": "mxfp4", "*.q_proj": "mxint8"})
        names = [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]
        assert len(names) == 8
        assert not torch.equal(model(batch).logits, plain)
        revert(model)
        assert torch.equal(model(batch).logits, plain)
    assert all(model.get_parameter(name) is parameter for name, parameter in before.items())


def test_rotation_alone_changes_nothing():
    model, batch = tiny_llama(), ids()
    with torch.no_grad():
        plain = model(batch).logits
        for name in [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]:
            layer = QuantLinear.from_linear(model.get_submodule(name), "mxint8", "mxint8", rotate=32, name=name)
            layer.fmt_w = layer.fmt_x = lambda x, dim=-1: x  # pyright: ignore[reportAttributeAccessIssue]
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, layer)
        torch.testing.assert_close(model(batch).logits, plain, rtol=1e-4, atol=1e-4)


def test_divergence_is_a_loop_over_25_entries():
    model, batch = tiny_llama(), ids()
    cast = convert(copy.deepcopy(model), "mxfp4")
    found = divergence(model, cast, [batch])
    with torch.no_grad():
        p, q = model(batch).logits.double().view(-1, 128), cast(batch).logits.double().view(-1, 128)
    total, every, logs = 0.0, [], []
    for token in range(len(p)):
        top = p[token].topk(25).indices
        left, right = p[token, top].softmax(0), q[token, top].softmax(0)
        total += sum((a * (a / b).log()).item() for a, b in zip(left, right, strict=True))
        every.append(left)
        logs.append(right.log())
    assert found.kl == pytest.approx(total / len(p), rel=1e-6)
    released = 1e6 * F.kl_div(torch.stack(logs), torch.stack(every))
    assert found.kl_released == pytest.approx(released.item(), rel=1e-6)
    loss = F.cross_entropy(p.view(2, 32, 128)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
    assert found.perplexity_ref == pytest.approx(math.exp(loss), rel=1e-5)
    assert found.perplexity != found.perplexity_ref


def test_a_model_does_not_diverge_from_itself_and_padding_does_not_count():
    model, batch = tiny_llama(), ids()
    same = divergence(model, copy.deepcopy(model), [batch])
    assert same.kl == same.kl_released == 0
    assert same.perplexity == same.perplexity_ref
    cast = convert(copy.deepcopy(model), "mxfp4")
    short = divergence(model, cast, [batch[:, :20]])
    padded = torch.cat([batch[:, :20], torch.full((2, 12), 5)], 1)
    mask = (torch.arange(32) < 20).long().expand(2, -1)
    longer = divergence(model, cast, [{"input_ids": padded, "attention_mask": mask}])
    assert longer.kl == pytest.approx(short.kl, rel=1e-4)
    assert longer.perplexity == pytest.approx(short.perplexity, rel=1e-4)
    kept = Reference.of(model, [batch])
    assert divergence(kept, convert(model, "mxfp4")) == divergence(tiny_llama(), cast, [batch])
    cast.train()
    divergence(kept, cast)
    assert cast.training


@pytest.mark.parametrize("rotate", [None, "block"])
def test_packed_weights_come_back_bit_for_bit(rotate, tmp_path):
    model, batch = tiny_llama(), ids()
    convert(model, {"*.mlp.*": "nvfp4", "*": "mxint8"}, rotate, seed=2)
    save_packed(model, tmp_path / "packed")
    loaded = load_packed(tiny_llama(), tmp_path / "packed")
    with torch.no_grad():
        assert torch.equal(loaded(batch).logits, model(batch).logits)
        assert torch.equal(copy.deepcopy(loaded)(batch).logits, model(batch).logits)
    first = packed_weights(model)["model.layers.0.mlp.up_proj"]
    assert torch.equal(first.dequantize(), model.model.layers[0].mlp.up_proj.cast_weight)
    with pytest.raises(ValueError, match="layers that the model has not"):
        load_packed(small_net(), tmp_path / "packed")
    with pytest.raises(ValueError, match="expected.*as the model has it"):
        load_packed(tiny_llama(intermediate=128), tmp_path / "packed")
    with pytest.raises(FileExistsError):
        save_packed(model, tmp_path / "packed")


def test_a_width_that_is_no_multiple_of_the_block():
    net = convert(nn.Sequential(nn.Linear(50, 7), nn.ReLU(), nn.Linear(7, 3)), "mxint8")
    plain = revert(copy.deepcopy(net))
    x = torch.randn(4, 50)
    torch.testing.assert_close(net(x), plain(x), rtol=0.1, atol=0.05)
    trained = convert(plain, "mxint8", train=True)
    trained(x).sum().backward()
    assert all(parameter.grad is not None for parameter in trained.parameters())


class Overflowing(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, x):
        return self.second(self.first(x) * math.inf)


def refused():
    model, batch = tiny_llama(), ids()
    quantised = nn.Sequential(nn.Linear(32, 4))
    yield lambda: list(capture(model, [batch])), ValueError, "a batch has no labels.*backward=False"
    yield lambda: convert(tiny_llama(intermediate=80), "mxint8", 32), ValueError, "down_proj has 80 inputs, which a rotation of 32"
    yield lambda: convert(model, "mxint8", 32, train=True), ValueError, "expected one of them"
    yield lambda: convert(model, {"nothing": "mxint8"}), ValueError, "no linear layer to cast"
    yield lambda: convert(convert(quantised, "mxint8"), "mxint8"), TypeError, "0 is a QuantLinear"
    yield lambda: divergence(model, copy.deepcopy(model), [batch], 129), ValueError, "top_k is 129 and the vocabulary has 128"
    yield lambda: divergence(model, model, [batch]), ValueError, "model_ref and model_q are one object"
    yield lambda: divergence(model, copy.deepcopy(model), []), ValueError, "there is no batch"
    yield lambda: convert(Overflowing(), "mxint8")(torch.ones(2, 32)), FloatingPointError, "second: its input has a NaN"
    yield lambda: analyse_model(Overflowing(), [torch.ones(2, 32)], backward=False), FloatingPointError, "second: its input"
    yield lambda: analyse_model(nn.ReLU(), [torch.ones(2)], backward=False), ValueError, "no linear layer"
    yield lambda: packed_weights(model), ValueError, "no layer is converted"
    yield lambda: packed_weights(convert(copy.deepcopy(model), biased())), ValueError, "an ablation"


def biased() -> Quantiser:
    return Quantiser(compared("mxint8"), "asymmetric", torch.bfloat16)


@pytest.mark.parametrize(("act", "error", "words"), list(refused()))
def test_what_is_refused(act, error, words):
    with pytest.raises(error, match=words):
        act()


def test_a_model_of_torchaos_tensors_is_refused():
    quantization = pytest.importorskip("torchao.quantization")
    net = small_net()
    quantization.quantize_(net, quantization.Int8WeightOnlyConfig())
    with pytest.raises(TypeError, match="0 is a .*expected a plain nn.Linear"):
        convert(net, "mxint8")
