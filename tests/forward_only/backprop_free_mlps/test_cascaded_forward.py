"""Cascaded-Forward: blocks that no error passes through, and a linear predictor on each."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from fewer.fitting import batches_of
from fewer.forward_only import CascadedForwardCNN, CascadedForwardConfig, cnn, fit_cascaded_forward
from fewer.forward_only.backprop_free_mlps.layers.block_feedback import FeedbackTrainer, random_feedback
from fewer.forward_only.backprop_free_mlps.layers.layer_training import set_projection_gradient
from fewer.forward_only.backprop_free_mlps.layers.local_loss import softmax_error
from fewer.forward_only.backprop_free_mlps.layers.ridge import fit_ridge
from fewer.meters import counting


@pytest.fixture(scope="module")
def digits():
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    x = torch.as_tensor(images[order], dtype=torch.float32).view(-1, 1, 8, 8) / 16
    return x, torch.as_tensor(labels[order])


def network(channels=(8, 16), dtype=torch.float32):
    torch.manual_seed(0)
    return CascadedForwardCNN(1, 8, channels, 10).to(dtype)


def fitted(digits, model=None, **settings):
    x, y = digits
    model = model or network()
    config = CascadedForwardConfig(**{"epochs": 15, "lr": 3e-3, "patience": 5, "block_lr": 1e-3, "block_epochs": 5} | settings)
    held_out = None if config.patience is None else (x[1200:1500], y[1200:1500])
    history = fit_cascaded_forward(
        model, x[:1200], y[:1200], validation=held_out, config=config, generator=torch.Generator().manual_seed(1)
    )
    return model, history


def accuracy(model, digits):
    x, y = digits
    return float((model(x[1500:]).argmax(1) == y[1500:]).float().mean())


@pytest.mark.parametrize("settings", [{}, {"predictor_loss": "mse"}, {"blocks": "dfa"}], ids=["random", "mse", "dfa"])
def test_it_learns_digits(digits, settings):
    model, history = fitted(digits, **settings)
    assert accuracy(model, digits) > 0.9
    assert list(history.best)[-2:] == ["predictor 1", "predictor 2"]
    assert ("blocks" in history.best) == (settings.get("blocks") == "dfa")
    first, second = 8 * 4 * 4, 16 * 2 * 2  # features of an image; while the second block's are made, the first's are still there
    assert history.cache_bytes == 4 * (first + second) * 1500


def test_blocks_halve_the_image_and_are_initialised_for_relu():
    model = CascadedForwardCNN(3, (16, 24), (32, 64), 5)
    assert [tuple(h.shape) for h in model.block_outputs(torch.zeros(2, 3, 16, 24))] == [(2, 32, 8, 12), (2, 64, 4, 6)]
    weight = model.blocks[1][0].weight
    assert model.blocks[1][0].bias is None
    assert float(weight.detach().abs().max()) == pytest.approx((6 / (32 * 9)) ** 0.5, rel=0.01)  # sqrt(2) sqrt(3 / fan_in)
    twin = cnn(3, (16, 24), (32, 64), 5)
    assert [p.shape for p in twin.parameters()][:-2] == [p.shape for p in model.blocks.parameters()]


def test_a_class_is_scored_by_the_sum_of_all_predictors_which_is_one_predictor_of_all_features(digits):
    model = network(dtype=torch.float64)
    x = digits[0][:20].double()
    features = [h.flatten(1) for h in model.block_outputs(x)]
    weight = torch.cat([predictor.weight for predictor in model.predictors], dim=1)
    bias = torch.stack([predictor.bias for predictor in model.predictors]).sum(0)
    together = torch.cat(features, dim=1) @ weight.T + bias
    assert torch.allclose(model(x), together, atol=1e-12)


def test_random_blocks_do_not_change_and_their_batch_norm_never_learns(digits):
    model = network()
    before = copy.deepcopy(model.blocks.state_dict())
    fitted(digits, model, epochs=2)
    model.train()
    model(digits[0])
    for name, value in model.blocks.state_dict().items():
        assert torch.equal(value, before[name]), name
        assert "running_mean" not in name or not value.any()


def test_prediction_never_changes_trained_blocks(digits):
    model, _ = fitted(digits, blocks="dfa", block_epochs=1, epochs=1)
    before = copy.deepcopy(model.state_dict())
    assert before["blocks.0.3.running_mean"].any()  # learnt from the training images
    model.train()
    model(digits[0][1500:] * 100)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_no_backward_pass_is_made_for_random_blocks_and_one_a_block_and_step_for_trained_ones(digits):
    with counting() as counts:
        fitted(digits)
        fitted(digits, predictor_loss="mse")
    assert counts["backward_passes"] == 0
    with counting() as counts:
        fitted(digits, blocks="dfa", block_epochs=1, epochs=1, batch_size=120)
    assert counts["backward_passes"] == 2 * 10


def test_a_later_block_changes_nothing_in_an_earlier_predictor(digits):
    one, other = network(), network()
    with torch.no_grad():
        other.blocks[1][0].weight.mul_(2)
        other.predictors[1].weight.zero_()
    fitted(digits, one, epochs=3)
    fitted(digits, other, epochs=3)
    assert torch.equal(one.predictors[0].weight, other.predictors[0].weight)
    assert not torch.equal(one.predictors[1].weight, other.predictors[1].weight)


def test_the_closed_form_equals_least_squares_on_the_augmented_system(digits):
    x, y = digits
    a = x[:300].flatten(1).double()
    predictor = nn.Linear(64, 10).double()
    fit_ridge(predictor, a, y[:300], ridge=1e-3)
    ones = np.hstack([a.numpy(), np.ones((300, 1))])
    strength = 1e-3 * (ones**2).sum(0).mean()
    augmented = np.vstack([ones, np.sqrt(strength) * np.eye(65)])
    target = np.vstack([np.eye(10)[y[:300].numpy()], np.zeros((65, 10))])
    expected = np.linalg.lstsq(augmented, target, rcond=None)[0]
    assert np.abs(predictor.weight.detach().numpy().T - expected[:-1]).max() < 1e-8
    assert np.abs(predictor.bias.detach().numpy() - expected[-1]).max() < 1e-8


def test_the_closed_form_stands_features_far_from_zero_and_a_small_ridge():
    torch.manual_seed(0)
    a = torch.rand(400, 300) * 0.01 + 10
    predictor = nn.Linear(300, 10)
    fit_ridge(predictor, a, torch.arange(400) % 10, ridge=1e-8)
    assert predictor.weight.isfinite().all()


def test_a_predictors_closed_form_gradient_is_autograds(digits):
    x, y = digits[0][:9].flatten(1).double(), digits[1][:9]
    predictor = nn.Linear(64, 10).double()
    loss = set_projection_gradient(predictor, x, y)
    true_loss = F.cross_entropy(predictor(x), y)
    true = torch.autograd.grad(true_loss, [predictor.weight, predictor.bias])
    assert torch.allclose(loss, true_loss.detach(), atol=1e-12)
    assert torch.allclose(predictor.weight.grad, true[0], atol=1e-12)
    assert torch.allclose(predictor.bias.grad, true[1], atol=1e-12)


class LinearBlock(nn.Module):
    """A block without ReLU, so that what is downstream of it has one Jacobian for all images."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out, into, dtype=torch.float64) / into**0.5)

    def forward(self, x):
        return x.flatten(1) @ self.weight.T


def feedback_trainer(blocks, width):
    trainer = FeedbackTrainer(blocks, nn.Linear(width, 10).double(), lr=1e-3, weight_decay=0.0)
    return trainer


def test_with_the_true_jacobian_as_feedback_the_gradients_are_backpropagations(digits):
    torch.manual_seed(0)
    x, y = digits[0][:32].double(), digits[1][:32]
    blocks = [LinearBlock(64, 30), LinearBlock(30, 20)]
    trainer = feedback_trainer(blocks, 20)
    jacobian = trainer.auxiliary.weight.detach() @ blocks[1].weight.detach()
    trainer.feedback = [jacobian / len(y)]  # the feedback is not divided by the batch's size, the loss is
    loss = trainer.set_gradients(x, y)
    gradients = [p.grad.clone() for block in blocks for p in block.parameters()] + [p.grad.clone() for p in trainer.auxiliary.parameters()]
    parameters = [p for block in blocks for p in block.parameters()] + list(trainer.auxiliary.parameters())
    true_loss = F.cross_entropy(trainer.auxiliary(blocks[1](blocks[0](x))), y)
    true = torch.autograd.grad(true_loss, parameters)
    assert float(loss) == pytest.approx(float(true_loss.detach()), abs=1e-12)
    for ours, theirs in zip(gradients, true, strict=True):
        assert (ours - theirs).abs().max() < 1e-8


def test_feedback_is_the_error_times_a_fixed_matrix_back_through_the_block_alone(digits):
    torch.manual_seed(0)
    x, y = digits[0][:16].double(), digits[1][:16]
    model = network(dtype=torch.float64)
    trainer = FeedbackTrainer(model.blocks, model.predictors[-1], lr=1e-3, weight_decay=0.0)
    trainer.set_gradients(x, y)
    h = model.blocks[0](x)
    error = softmax_error(trainer.auxiliary(model.blocks[1](h.detach()).flatten(1)), y).detach()
    (expected,) = torch.autograd.grad(h, [model.blocks[0][0].weight], grad_outputs=(error @ trainer.feedback[0]).view_as(h))
    assert torch.allclose(model.blocks[0][0].weight.grad, expected, atol=1e-10)
    assert torch.allclose(trainer.feedback[0].norm(dim=1), torch.ones(10, dtype=torch.float64))


def test_feedback_rows_have_length_one_and_no_preferred_direction():
    rows = random_feedback(1000, 50, torch.zeros(1), torch.Generator().manual_seed(0))
    assert torch.allclose(rows.norm(dim=1), torch.ones(1000))
    assert rows.mean(0).abs().max() < 0.03


def test_nothing_reaches_an_earlier_block_but_its_feedback(digits):
    model = network()
    trainer = FeedbackTrainer(model.blocks, model.predictors[-1], lr=1e-3, weight_decay=0.0)
    trainer.feedback = [torch.zeros(10, 8 * 4 * 4)]
    trainer.set_gradients(digits[0][:8], digits[1][:8])
    assert all(not parameter.grad.any() for parameter in model.blocks[0].parameters())
    assert all(parameter.grad.any() for parameter in model.blocks[1].parameters())


def test_no_graph_spans_two_blocks(digits):
    """What a block saves for its own backward pass carries no gradient on into the block before."""
    model = network()
    trainer = FeedbackTrainer(model.blocks, model.predictors[-1], lr=1e-3, weight_decay=0.0)
    inputs = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    trainer.set_gradients(digits[0][:8], digits[1][:8])
    assert len(inputs) == 2
    assert not any(given.requires_grad for given in inputs)
    changed = copy.deepcopy(model.blocks[0][0].weight.grad)
    model.blocks[1][0].weight.data += 1.0
    trainer.auxiliary.weight.data[:] = 0.0
    trainer.auxiliary.bias.data[:] = 0.0
    error = softmax_error(torch.zeros(8, 10), digits[1][:8])
    model.zero_grad()
    trainer.set_gradients(digits[0][:8], digits[1][:8])
    h = model.blocks[0](digits[0][:8])
    (alone,) = torch.autograd.grad(h, [model.blocks[0][0].weight], grad_outputs=(error @ trainer.feedback[0]).view_as(h))
    assert torch.equal(model.blocks[0][0].weight.grad, alone)  # given the error, the later block and the read-out play no part
    assert not torch.equal(alone, changed)


@pytest.mark.parametrize("rows", [101, 102])
def test_a_single_row_at_the_end_joins_the_batch_before(digits, rows):
    """Batch norm cannot train on one row, of images of one pixel."""
    x, y = digits[0][:rows], digits[1][:rows]
    model = network((4, 4, 4))
    config = CascadedForwardConfig(blocks="dfa", batch_size=50, block_epochs=1, epochs=1, patience=None)
    fit_cascaded_forward(model, x, y, validation=None, config=config)
    sizes = [len(labels) for _, labels in batches_of(x, y, 50, shuffle=True)]
    assert sizes == {101: [50, 51], 102: [50, 50, 2]}[rows]
    assert [len(labels) for _, labels in batches_of(x[:3], y[:3], 1)] == [1, 1, 1]
    assert [len(labels) for _, labels in batches_of(x[:1], y[:1], 50)] == [1]


def test_a_closed_form_without_a_solution_names_its_predictor(digits):
    x, y = digits
    with pytest.raises(FloatingPointError, match=r"predictor 1 .*epoch 1.*ridge"):
        fit_cascaded_forward(
            network().double(), x.double() * 1e200, y, validation=None, config=CascadedForwardConfig(predictor_loss="mse", patience=None)
        )


def test_batches_of_any_size_and_order_give_the_same_predictions(digits):
    model, _ = fitted(digits, blocks="dfa", block_epochs=1, epochs=2)
    x = digits[0][1500:1600]
    whole = model(x).argmax(1)
    assert torch.equal(torch.cat([model(one[None]) for one in x]).argmax(1), whole)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(3))
    assert torch.equal(model(x[order]).argmax(1), whole[order])


@pytest.mark.parametrize("settings", [{}, {"blocks": "dfa", "block_epochs": 2}, {"predictor_loss": "mse"}])
def test_one_seed_gives_one_result_and_a_state_dict_all_of_it(digits, settings):
    one, _ = fitted(digits, epochs=2, **settings)
    other, _ = fitted(digits, epochs=2, **settings)
    copied = network()
    copied.load_state_dict(one.state_dict())
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
        assert torch.equal(value, copied.state_dict()[name])
    assert torch.equal(copied(digits[0][:50]), one(digits[0][:50]))


def test_the_generator_alone_decides_whatever_torchs_own_state(digits):
    results = []
    for seed in (1, 2):
        model = network()
        torch.manual_seed(seed)
        results.append(fitted(digits, model, blocks="dfa", block_epochs=1, epochs=1)[0].state_dict())
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_early_stopping_keeps_the_best_state(digits):
    x, y = digits
    model = network()
    losses = []

    def follow(line):
        if line.stage == "predictor 2":
            losses.append(line.validation_loss)

    config = CascadedForwardConfig(epochs=30, lr=0.1, patience=4, min_delta=0.0)
    history = fit_cascaded_forward(model, x[:300], y[:300], validation=(x[1200:1500], y[1200:1500]), config=config, callbacks=[follow])
    scores = model.predictors[1](model.block_outputs(x[1200:1500])[1].flatten(1))
    assert float(F.cross_entropy(scores, y[1200:1500])) == pytest.approx(min(losses), rel=1e-5)
    assert losses[history.best["predictor 2"] - 1] == min(losses)
    assert len(losses) == min(30, history.best["predictor 2"] + 4)


def test_a_data_loader_gives_what_the_tensors_give(digits):
    x, y = digits
    loader = DataLoader(TensorDataset(x[:1200], y[:1200]), batch_size=100)
    config = CascadedForwardConfig(predictor_loss="mse")
    one, other = network(), network()
    fit_cascaded_forward(one, loader, None, validation=DataLoader(TensorDataset(x[1200:], y[1200:]), batch_size=50), config=config)
    fit_cascaded_forward(other, x[:1200], y[:1200], validation=(x[1200:], y[1200:]), config=config)
    assert torch.equal(one.predictors[1].weight, other.predictors[1].weight)


# Bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; expected a whole number of at least 1"),
        ({"lr": 0.0}, "lr is 0.0; expected a finite number above 0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"block_lr": -1.0}, "block_lr is -1.0"),
        ({"ridge": 0.0}, "ridge is 0.0"),
        ({"blocks": "dense"}, "blocks is 'dense'; expected one of random, dfa"),
        ({"predictor_loss": "hinge"}, "predictor_loss is 'hinge'; expected one of cross_entropy, mse"),
        ({"epochs": 0}, "epochs is 0"),
        ({"patience": 0}, "patience is 0"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        CascadedForwardConfig(**settings)


def test_networks_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="an image of 8x7 pixels is too small for 3 blocks; expected at least 8 a side: use fewer blocks"):
        CascadedForwardCNN(1, (8, 7), (4, 8, 16), 10)
    for channels in ((), (0,), (4, -1)):
        with pytest.raises(ValueError, match="expected at least one whole number above 0"):
            CascadedForwardCNN(1, 8, channels, 10)


def test_data_that_cannot_be_used_are_refused_and_change_nothing(digits):
    x, y = digits
    model = network()
    before = copy.deepcopy(model.state_dict())
    broken = x.clone()
    broken[7, 0, 0, 0] = float("nan")
    for bad_x, bad_y, held_out, message in [
        (x, y + 5, (x, y), "y holds labels 5..14; expected 0..9"),
        (x, y.float(), (x, y), "expected an integer tensor"),
        (broken, y, (x, y), "NaN or infinite value in row 7"),
        (x[:, :, :4], y, (x, y), r"x holds images of shape \(1, 4, 8\); expected \(1, 8, 8\)"),
        (x, y, None, "validation is empty while early stopping is on"),
        (x, y, (x[:0], y[:0]), "validation is empty while early stopping is on"),
    ]:
        with pytest.raises(ValueError, match=message):
            fit_cascaded_forward(model, bad_x, bad_y, validation=held_out)
    with pytest.raises(ValueError, match=r"expected \(1, 8, 8\): the model was built for that shape"):
        model(x[:, :, :4])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_finite_state(digits):
    x, y = digits
    model = network()
    with pytest.raises(FloatingPointError, match=r"predictor 1.*epoch \d.*last finite state is kept"):
        fit_cascaded_forward(model, x * 1e30, y, validation=None, config=CascadedForwardConfig(lr=1e30, patience=None, epochs=50))
    assert all(value.isfinite().all() for value in model.state_dict().values())
