"""SGD against torch.optim.SGD (form 9) for every schedule, in float64."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hvd_lb.optim import SGD

SHAPES = [(5, 3), (7,), (2, 3, 2, 2)]
STEPS = 200
SCHEDULES = {
    "constant": [0.1] * STEPS,
    "step decay": [0.4 * 0.1 ** (t // 60) for t in range(STEPS)],
    "warmup from zero": [0.4 * min(t / 50, 1) for t in range(STEPS)],
    "zeros inside": [(0.0, 0.3, 0.1, 0.0, 0.0, 0.05)[t % 6] for t in range(STEPS)],
    "decay to zero": [0.2 * (1 - t / (STEPS - 1)) ** 2 for t in range(STEPS)],
}


def weights() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_() for s in SHAPES]


def train(optimizer: torch.optim.Optimizer, rates: Sequence[float], skip: float = 0.0) -> list[Tensor]:
    """Gradients depend on the weights, so that errors do not cancel; some are missing in some steps."""
    generator = torch.Generator().manual_seed(1)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for rate in rates:
        for group in optimizer.param_groups:
            group["lr"] = rate
        for p in params:
            noise = torch.randn(p.shape, dtype=p.dtype, generator=generator)
            missing = torch.rand((), generator=generator) < skip
            p.grad = None if missing else 0.5 * p.detach() + noise
        optimizer.step()
    return [p.detach() for p in params]


def largest_difference(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((x - y).abs().max() / y.abs().max()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("weight_decay", [0.0, 1e-2])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_against_torch(schedule: str, nesterov: bool, weight_decay: float) -> None:
    def trained(optimizer: torch.optim.Optimizer) -> list[Tensor]:
        return train(optimizer, SCHEDULES[schedule], skip=0.2)

    options = {"momentum": 0.9, "nesterov": nesterov, "weight_decay": weight_decay}
    reference = trained(torch.optim.SGD(weights(), 0.1, **options, foreach=True))
    assert largest_difference(trained(SGD(weights(), form=9, **options)), reference) <= 1e-15
    assert largest_difference(trained(SGD(weights(), **options)), reference) < 1e-12
    uncorrected = trained(SGD(weights(), momentum_correction=False, **options))
    assert (largest_difference(uncorrected, reference) < 1e-12) == (schedule == "constant")


@settings(max_examples=40, deadline=None)
@given(
    rates=st.lists(st.one_of(st.just(0.0), st.floats(1e-4, 1.0)), min_size=1, max_size=30),
    momentum=st.floats(0, 0.99),
    nesterov=st.booleans(),
    skip=st.sampled_from([0.0, 0.5]),
)
def test_correction_for_any_schedule(
    rates: list[float], momentum: float, nesterov: bool, skip: float
) -> None:
    ours = train(SGD(weights(), momentum=momentum, nesterov=nesterov), rates, skip)
    form_9 = train(SGD(weights(), momentum=momentum, nesterov=nesterov, form=9), rates, skip)
    assert largest_difference(ours, form_9) < 1e-11


def test_uncorrected_form_10_is_the_literal_formula() -> None:
    (w,) = parameters = [torch.ones(1, dtype=torch.float64, requires_grad=True)]
    optimizer = SGD(parameters, nesterov=False, momentum_correction=False)
    v, expected = 0.0, 1.0
    for rate in (0.1, 0.4, 0.0, 0.2):
        w.grad = torch.full_like(w, 3.0)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        v = 0.9 * v + rate * 3.0
        expected -= v
    assert w.item() == pytest.approx(expected, rel=1e-15)


def test_weights_stay_at_zero_rate_and_the_velocity_gathers() -> None:
    (w,) = parameters = [torch.ones(1, dtype=torch.float64, requires_grad=True)]
    optimizer = SGD(parameters, nesterov=False)
    for rate in (0.5, 0.0):
        w.grad = torch.full_like(w, 2.0)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    assert w.item() == 0.0
    assert optimizer.state[w]["velocity"].item() == pytest.approx(0.9 * 1.0 + 0.5 * 2.0)
    assert optimizer.state[w]["reference_lr"] == 0.5


def test_state_dict_round_trip_continues_bitwise_and_keeps_the_memory_format() -> None:
    def fresh() -> Tensor:
        w = torch.linspace(-1, 1, 48, dtype=torch.float64).reshape(2, 4, 3, 2)
        return w.to(memory_format=torch.channels_last).requires_grad_()

    whole, first = SGD([fresh()]), SGD([fresh()])
    rates = SCHEDULES["zeros inside"]
    train(whole, rates[:10])
    train(first, rates[:10])
    state = first.state_dict()
    state["state"][0]["velocity"] = state["state"][0]["velocity"].contiguous()
    second = SGD([first.param_groups[0]["params"][0].detach().clone().requires_grad_()])
    second.load_state_dict(state)
    (w,) = second.param_groups[0]["params"]
    assert second.state[w]["velocity"].stride() == w.stride()
    assert torch.equal(train(second, rates[10:20])[0], train(whole, rates[10:20])[0])


def test_closure_is_called_once_with_gradients_enabled() -> None:
    w = torch.ones(2, requires_grad=True)
    calls = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        loss = (w * w).sum()
        loss.backward()
        return loss

    assert SGD([w]).step(closure).item() == 2.0
    assert calls == [True]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"form": 9, "momentum_correction": False}, "no meaning with form 9"),
        ({"form": 8}, "must be 9 or 10"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"momentum": 1.0}, r"in \[0, 1\)"),
        ({"weight_decay": -1e-4}, "weight_decay"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SGD(weights(), **options)
    with pytest.raises(ValueError, match=words):
        SGD([{"params": weights(), **options}])


def test_sparse_gradients_are_refused() -> None:
    embedding = torch.nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        SGD(embedding.parameters()).step()


def test_groups_without_parameters_or_gradients() -> None:
    w = torch.ones(2, requires_grad=True)
    SGD([{"params": []}, {"params": [w]}]).step()
    assert w.tolist() == [1.0, 1.0]
