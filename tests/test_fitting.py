"""What methods that train share: the best state comes back, the last finite one where numbers overflow, steps are as torch takes them."""

import math

import pytest
import torch
from torch import nn

from fewer.fitting import BestState, History, LastState, MovingAverage, fit_stages, fit_steps, over_batches


def counting_layer():
    layer = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(layer.weight)
    return layer


def fit(validation_losses, **how):
    """A weight that grows by 1 an epoch, judged by the given losses; (kept weight, history)."""
    layer, history, losses = counting_layer(), History(), iter(validation_losses)

    def epoch():
        layer.weight.data += 1
        return [0.5]

    state = BestState([layer], how.pop("patience", None))
    fit_stages(
        ["network"],
        epoch,
        lambda: [((loss := next(losses)), math.nan if math.isnan(loss) else 0.5)],
        state=state,
        epochs=len(validation_losses),
        history=history,
        **how,
    )
    return layer.weight.item(), history


def test_the_best_epochs_state_comes_back():
    weight, history = fit([3.0, 1.0, 2.0])
    assert (weight, history.best, [line.epoch for line in history.epochs]) == (2.0, {"network": 2}, [1, 2, 3])


def test_patience_counts_epochs_without_improvement_and_one_is_not_none():
    assert len(fit([1.0, 2.0, 2.0, 0.5], patience=2)[1].epochs) == 3
    weight, history = fit([2.0, 1.0, 3.0], patience=1)
    assert (weight, len(history.epochs)) == (2.0, 3), "the first epoch is an improvement on nothing"


def test_without_validation_the_last_state_is_kept():
    assert fit([math.nan, math.nan])[0] == 2.0


def test_a_loss_that_is_not_finite_gives_the_last_finite_state_back():
    layer = counting_layer()

    def epoch():
        layer.weight.data += 1
        return [math.nan if layer.weight.item() == 3 else 0.5]

    with pytest.raises(FloatingPointError, match="the loss of network is nan in epoch 3"):
        fit_stages(["network"], epoch, lambda: [(1.0, 0.5)], state=BestState([layer], None), epochs=5, history=History())
    assert layer.weight.item() == 2.0


def test_the_last_state_is_put_back_only_where_numbers_overflow():
    layer = counting_layer()

    def overflow():
        with LastState([layer]):
            layer.weight.data += 1
            raise FloatingPointError

    with pytest.raises(FloatingPointError):
        overflow()
    assert layer.weight.item() == 0.0
    with LastState([layer]):
        layer.weight.data += 1
    assert layer.weight.item() == 1.0


def test_an_epochs_loss_is_the_mean_over_rows():
    batches = [(torch.ones(3, 1), torch.zeros(3)), (torch.ones(1, 1), torch.zeros(1))]
    losses = iter([torch.tensor(1.0), torch.tensor(5.0)])
    assert over_batches(lambda x, y: next(losses), lambda: batches)() == [2.0]
    both = iter([torch.tensor([1.0, 0.0]), torch.tensor([5.0, 4.0])])
    assert over_batches(lambda x, y: next(both), lambda: batches)() == [2.0, 1.0]


def test_steps_equal_torchs_own_loop_with_schedule_and_clipping():
    def made():
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    batches = [(torch.randn(4, 3), torch.randn(4, 2)) for _ in range(3)]
    ours, optimizer = made()
    told = []
    losses = fit_steps(
        optimizer,
        lambda x, y: (ours(x) - y).square().mean(),
        batches,
        7,
        schedule=lambda step: 1 / (1 + step),
        clip=0.5,
        tell=lambda *said: told.append(said),
    )
    theirs, optimizer = made()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(7):
        x, y = batches[step % 3]
        loss = (theirs(x) - y).square().mean()
        assert loss.item() == losses[step]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        optimizer.step()
        schedule.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert [step for step, _ in told] == list(range(1, 8))


def test_a_step_whose_loss_is_not_finite_is_not_taken():
    weight = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(FloatingPointError, match="the loss is nan in step 2"):
        fit_steps(torch.optim.SGD([weight], lr=0.5), lambda x: weight * x, [torch.tensor(1.0), torch.tensor(math.nan)], 4)
    assert weight.item() == 0.5


def test_batches_that_end_too_early_are_told():
    weight = nn.Parameter(torch.tensor(1.0))
    for batches in ([], iter([torch.tensor(1.0)])):
        with pytest.raises(ValueError, match="there are no batches left"):
            fit_steps(torch.optim.SGD([weight], lr=0.5), lambda x: weight * x, batches, 4)


def test_the_moving_average_is_the_written_recursion_and_takes_buffers_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    average, expected = MovingAverage(model, 0.5), [each.detach().clone() for each in model.parameters()]
    for n in range(12):
        with torch.no_grad():
            for weight in model.parameters():
                weight.normal_()
        model(torch.randn(4, 3, dtype=torch.float64))
        average.update(model)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = [decay * mean + (1 - decay) * weight for mean, weight in zip(expected, model.parameters(), strict=True)]
    for mean, right in zip(average.model.parameters(), expected, strict=True):
        torch.testing.assert_close(mean, right.detach(), rtol=0, atol=1e-14)
    assert torch.equal(average.model[1].running_mean, model[1].running_mean)
    assert not average.model.training
    assert not any(each.requires_grad for each in average.model.parameters())


def test_a_model_is_trained_even_where_its_caller_records_no_gradients() -> None:
    weight = torch.nn.Parameter(torch.tensor(1.0))
    with torch.no_grad():
        assert fit_steps(torch.optim.SGD([weight], lr=0.25), lambda x: (weight * x) ** 2, [torch.tensor(1.0)], 2) == [1.0, 0.25]
