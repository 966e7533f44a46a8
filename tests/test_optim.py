"""Rates are functions of the step; decay reaches weights only; averages forget their start."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sparsenet import create_model
from sparsenet.optim import epoch_rates, sgd, update_average
from sparsenet.schedule import OptimConfig, ema_rate, learning_rate


def test_the_papers_schedule():
    config = OptimConfig()
    rates = [
        learning_rate(config, epoch * 782 + step, 782, 300)
        for epoch in range(300)
        for step in (0, 781)
    ]
    assert rates[:300] == [0.1] * 300
    assert rates[300:450] == pytest.approx([0.01] * 150)
    assert rates[450:] == pytest.approx([0.001] * 150)


@given(
    st.sampled_from(["step", "cosine", "onecycle"]),
    st.integers(1, 50),
    st.integers(1, 40),
    st.floats(0, 5),
)
def test_rates_stay_between_0_and_the_peak(schedule, steps, epochs, warmup):
    config = OptimConfig(
        schedule=schedule, lr=0.3, drop_1=epochs // 2, drop_2=epochs, warmup=warmup
    )
    rates = [learning_rate(config, step, steps, epochs) for step in range(steps * epochs)]
    assert all(0 <= rate <= 0.3 * (1 + 1e-9) for rate in rates)


@given(st.integers(2, 30), st.integers(4, 40))
def test_smooth_schedules_rise_then_fall_to_nothing(steps, epochs):
    for name in ("cosine", "onecycle"):
        config = OptimConfig(schedule=name, warmup=1.0)
        rates = [learning_rate(config, step, steps, epochs) for step in range(steps * epochs)]
        peak = rates.index(max(rates))
        assert rates[: peak + 1] == sorted(rates[: peak + 1])
        assert rates[peak:] == sorted(rates[peak:], reverse=True)
        assert max(rates) == pytest.approx(config.lr, rel=0.05)
        assert rates[-1] < 0.1 * max(rates)


def test_an_epochs_schedule_is_that_of_its_steps():
    config = OptimConfig(schedule="onecycle", ema=0.9)
    rates, ema_rates = epoch_rates(config, 2, 7, 5, torch.device("cpu"))
    assert rates.tolist() == pytest.approx(
        [learning_rate(config, step, 7, 5) for step in range(14, 21)]
    )
    assert ema_rates.tolist() == pytest.approx([ema_rate(0.9, step) for step in range(14, 21)])


def test_an_update_is_nesterovs_at_the_rate_in_the_tensor():
    config, model = OptimConfig(momentum=0.8, weight_decay=0.1), nn.Linear(3, 2).double()
    optimizer, velocity, expected = sgd(model, config), None, model.weight.detach().clone()
    for step in range(4):
        gradient, rate = torch.randn(2, 3, dtype=torch.float64), torch.tensor(0.5 / (1 + step))
        model.weight.grad, model.bias.grad = gradient.clone(), torch.zeros(2, dtype=torch.float64)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        decayed = gradient + 0.1 * expected
        velocity = decayed if velocity is None else 0.8 * velocity + decayed
        expected = expected - rate.double() * (decayed + 0.8 * velocity)
        assert torch.allclose(model.weight, expected, rtol=1e-12, atol=1e-12)


def test_decay_on_convolution_and_linear_weights_only():
    model = create_model("sparsenet_40_12")
    decayed, free = sgd(model, OptimConfig()).param_groups
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert {id(p) for p in decayed["params"]} == {id(w) for w in weights}
    assert len(decayed["params"]) + len(free["params"]) == len(list(model.parameters()))
    assert (decayed["weight_decay"], free["weight_decay"], decayed["nesterov"]) == (1e-4, 0.0, True)


def test_the_average_is_the_exponential_one_and_includes_running_statistics():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average, decay = copy.deepcopy(model), 0.9
    expected = 0.0
    with torch.no_grad():
        for tensor in (*average.parameters(), average[1].running_mean):
            tensor.zero_()
    for step in range(30):
        with torch.no_grad():
            for tensor in (*model.parameters(), model[1].running_mean):
                tensor.fill_(step)
        model[1].num_batches_tracked.fill_(step)
        update_average(average, model, torch.tensor(ema_rate(decay, step)))
        now = min(decay, (1 + step) / (10 + step))
        expected = now * expected + (1 - now) * step
    assert average[0].weight[0, 0].item() == pytest.approx(expected, rel=1e-5)
    assert average[1].running_mean[0].item() == pytest.approx(expected, rel=1e-5)
    assert average[1].num_batches_tracked.item() == 29


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": 0},
        {"schedule": "linear"},
        {"drop_1": 9, "drop_2": 3},
        {"momentum": 1.0},
        {"ema": 1.0},
    ],
)
def test_out_of_range_settings_are_named(wrong):
    with pytest.raises(ValueError, match=rf"^{next(reversed(wrong))}: expected .*found"):
        OptimConfig(**wrong)
