"""Rates are functions of the step; decay reaches weights only; averages forget their start."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sparsenet import create_model
from sparsenet.optim import MUON_SHARE, epoch_rates, new_optimizer, orthogonal, update_average
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
    optimizer, velocity, expected = (
        new_optimizer(model, config),
        None,
        model.weight.detach().clone(),
    )
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
    decayed, free = new_optimizer(model, OptimConfig()).param_groups
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert {id(p) for p in decayed["params"]} == {id(w) for w in weights}
    assert len(decayed["params"]) + len(free["params"]) == len(list(model.parameters()))
    assert (decayed["weight_decay"], free["weight_decay"], decayed["nesterov"]) == (1e-4, 0.0, True)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 999))
def test_orthogonal_matrices_keep_singular_vectors_and_make_values_alike(rows, columns, seed):
    random = torch.Generator().manual_seed(seed)
    matrices = torch.randn(3, rows, columns, generator=random, dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    shares = values / values.norm(dim=1, keepdim=True)
    alike = shares
    for _ in range(5):
        alike = 3.4445 * alike - 4.7750 * alike**3 + 2.0315 * alike**5
    factor = max(1, rows / columns) ** 0.5
    found = torch.stack(orthogonal(list(matrices)))
    torch.testing.assert_close(found, factor * (left * alike[:, None]) @ right, rtol=0, atol=1e-9)
    assert ((alike > 0.65) & (alike < 1.25))[shares > 0.01].all()


def test_a_kernel_without_a_gradient_has_no_step_by_muon():
    assert torch.equal(orthogonal([torch.zeros(3, 5)])[0], torch.zeros(3, 5))


def layers_of_all_kinds():
    torch.manual_seed(0)
    kernels = nn.Conv2d(2, 3, 3, bias=False), nn.Conv2d(2, 3, 3, bias=False), nn.Conv2d(3, 4, 1)
    return nn.Sequential(*kernels, nn.BatchNorm2d(4), nn.Linear(4, 2)).double()


def test_muon_makes_the_steps_of_kernels_orthogonal_and_those_of_all_else_as_sgd_does():
    sgd, muon = (OptimConfig(weight_decay=0.1, optimizer=name) for name in ("sgd", "muon"))
    models = [layers_of_all_kinds() for _ in range(2)]
    optimizers = [new_optimizer(*pair) for pair in zip(models, (sgd, muon), strict=True)]
    expected = [parameter.detach().clone() for parameter in models[0].parameters()]
    velocities = [torch.zeros_like(each) for each in expected]
    for step in range(4):
        rate = torch.tensor(0.5 / (1 + step), dtype=torch.float64)
        for index, pair in enumerate(zip(*(model.parameters() for model in models), strict=True)):
            gradient = torch.randn_like(pair[0])
            for parameter in pair:
                parameter.grad = gradient.clone()
            velocity = velocities[index] = 0.9 * velocities[index] + gradient
            if gradient.ndim == 4:
                (direction,) = orthogonal([(gradient + 0.9 * velocity).flatten(1)])
                direction = direction.view_as(gradient)
                decayed = expected[index] * (1 - rate * 0.1 / (1 - 0.9))
                expected[index] = decayed - rate * MUON_SHARE * direction
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["share"]
            optimizer.step()
    for by_sgd, by_muon, kernel in zip(*(m.parameters() for m in models), expected, strict=True):
        wanted = kernel if by_muon.ndim == 4 else by_sgd
        torch.testing.assert_close(by_muon, wanted, rtol=1e-6, atol=1e-7)


def test_muon_is_an_optimizer_like_any_other():
    """A closure, hooks and an error within a step meet all groups, once."""
    new_optimizer(layers_of_all_kinds(), OptimConfig())  # after which SGD's steps call hooks
    found = []
    for way in ("plain", "closure"):
        model = layers_of_all_kinds()
        optimizer = new_optimizer(model, OptimConfig(optimizer="muon"))
        seen = []
        optimizer.register_step_pre_hook(
            lambda by, *_, seen=seen: seen.append(len(by.param_groups))
        )
        images = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(1)).double()

        def loss(model=model, optimizer=optimizer, images=images):
            optimizer.zero_grad()
            features = model[0](images) + model[1](images)
            result = model[4](model[3](model[2](features)).mean((2, 3))).square().sum()
            result.backward()
            return result

        for _ in range(3):
            if way == "closure":
                assert optimizer.step(loss) > 0
            else:
                loss()
                optimizer.step()
        groups = len(optimizer.param_groups)
        assert seen == [groups] * 3
        with pytest.raises(ZeroDivisionError):
            optimizer.step(lambda: 1 / 0)
        assert len(optimizer.param_groups) == groups
        found.append([parameter.detach().clone() for parameter in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_a_gradient_scaler_skips_steps_of_muon():
    model = layers_of_all_kinds().float()
    optimizer = new_optimizer(model, OptimConfig(optimizer="muon"))
    scaler = torch.amp.GradScaler("cpu")
    before = [parameter.detach().clone() for parameter in model.parameters()]
    scaler.scale(sum(p.sum() for p in model.parameters())).backward()
    model[0].weight.grad.fill_(math.inf)
    scaler.step(optimizer)
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))


def test_a_decay_that_leaves_nothing_of_a_kernel_is_refused():
    assert OptimConfig(lr=0.2, weight_decay=0.5).weight_decay == 0.5
    for more in ({"lr": 0.2}, {"backbone_lr": 0.2}):
        with pytest.raises(
            ValueError, match=r"weight_decay: expected with muon less than .*0\.5\)"
        ):
            OptimConfig(optimizer="muon", weight_decay=0.5, **more)


def test_weight_decay_shrinks_kernels_alike_with_both_optimizers():
    lengths = []
    for name in ("sgd", "muon"):
        model = layers_of_all_kinds()
        optimizer = new_optimizer(model, OptimConfig(weight_decay=0.001, optimizer=name))
        before = model[0].weight.norm().item()
        for _ in range(1000):
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            for group in optimizer.param_groups:
                group["lr"] = torch.tensor(0.1 * group["share"])
            optimizer.step()
        lengths.append(model[0].weight.norm().item() / before)
    assert lengths[1] == pytest.approx(math.exp(-1000 * 0.1 * 0.001 / (1 - 0.9)), rel=1e-3)
    assert math.log(lengths[0]) == pytest.approx(math.log(lengths[1]), rel=0.02)


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
        {"optimizer": "adam"},
        {"schedule": "linear"},
        {"drop_1": 9, "drop_2": 3},
        {"momentum": 1.0},
        {"ema": 1.0},
    ],
)
def test_out_of_range_settings_are_named(wrong):
    with pytest.raises(ValueError, match=rf"^{next(reversed(wrong))}: expected .*found"):
        OptimConfig(**wrong)
