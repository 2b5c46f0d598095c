"""SGD against torch.optim.SGD (form 9) for every schedule, in float64."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hvd_lb.optim import SGD, by_group
from hvd_lb.optim.lamb import LAMB
from hvd_lb.optim.lars import LARS

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


@pytest.mark.parametrize(
    "make",
    [
        lambda params: SGD(params, form=9, weight_decay=0.1),
        lambda params: SGD(params, form=10, weight_decay=0.1),
        lambda params: SGD(params, fused=True, weight_decay=0.1),
        lambda params: LARS(params, weight_decay=0.1),
        lambda params: LAMB(params, weight_decay=0.1),
    ],
)
def test_gradients_are_left_as_they_are(make) -> None:  # type: ignore[no-untyped-def]
    params = weights()
    grads = [torch.randn_like(p) for p in params]
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad.clone()
    optimizer = make(params)
    for _ in range(2):
        optimizer.step()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(params, grads, strict=True))


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


@settings(max_examples=40)
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


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("make", [SGD, LARS, LAMB])
def test_the_state_of_another_optimizer_is_refused(
    make: type[torch.optim.Optimizer], momentum: float
) -> None:
    params = weights()
    other = torch.optim.SGD(params, 0.1, momentum) if make is SGD else SGD(params, 0.1, momentum)
    train(other, [0.1])
    mine = make(params, 0.1)
    before = copy.deepcopy(mine.state_dict())
    with pytest.raises(
        ValueError, match=rf"without '\w+' is another optimizer's.* hvd_lb's {make.__name__} has"
    ):
        mine.load_state_dict(other.state_dict())
    assert mine.state_dict() == before


@pytest.mark.parametrize("make", [SGD, LARS, LAMB])
def test_a_state_is_loaded_again_and_into_copies(make: type[torch.optim.Optimizer]) -> None:
    mine = make(weights(), 0.1)
    train(mine, [0.1])
    state = copy.deepcopy(mine.state_dict())
    for other in (mine, make(weights(), 0.1), copy.deepcopy(mine)):
        for _ in range(2):
            other.load_state_dict(copy.deepcopy(state))
        assert str(other.state_dict()) == str(state)


def test_a_state_without_options_is_as_foreign() -> None:
    """torch's AdamW has an `lr` and a `weight_decay`, too."""
    params = weights()
    with pytest.raises(ValueError, match="without 'momentum' is another optimizer's"):
        SGD(params).load_state_dict(torch.optim.AdamW(params).state_dict())


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


@pytest.mark.parametrize("form", [9, 10])
@pytest.mark.parametrize("weight_decay", [0.0, 1e-2])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_fused_equals_the_plain_form(schedule: str, nesterov: bool, weight_decay: float, form: int) -> None:
    """To rounding, in all schedules; and torch's fused SGD in every bit."""
    options = {"momentum": 0.9, "nesterov": nesterov, "weight_decay": weight_decay}
    fused = SGD(weights(), form=form, fused=True, **options)
    found = train(fused, SCHEDULES[schedule], skip=0.2)
    plain = SGD(weights(), form=form, **options)
    assert largest_difference(found, train(plain, SCHEDULES[schedule], skip=0.2)) < 1e-12
    for state, other in zip(fused.state.values(), plain.state.values(), strict=True):
        rate = other.get("reference_lr", 1.0)
        assert largest_difference([state["velocity"] * rate], [other["velocity"]]) < 1e-11
    # torch's fails where a gradient is missing in the first step.
    reference = torch.optim.SGD(weights(), 0.1, **options, fused=True)
    found = train(SGD(weights(), form=form, fused=True, **options), SCHEDULES[schedule])
    assert all(map(torch.equal, found, train(reference, SCHEDULES[schedule])))


@pytest.mark.parametrize("first", [False, True])
def test_a_run_may_change_between_fused_and_plain(first: bool) -> None:
    rates = SCHEDULES["zeros inside"]
    whole, one = SGD(weights()), SGD(weights(), fused=first)
    train(one, rates[:10])
    two = SGD([p.detach().clone().requires_grad_() for p in one.param_groups[0]["params"]], fused=not first)
    two.load_state_dict(one.state_dict())
    train(whole, rates[:10])
    assert largest_difference(train(two, rates[10:20]), train(whole, rates[10:20])) < 1e-13


def test_fused_goes_on_bitwise_from_its_state_and_in_copies() -> None:
    rates = SCHEDULES["step decay"]
    whole, first = SGD(weights(), fused=True), SGD(weights(), fused=True)
    train(whole, rates[:60])
    train(first, rates[:60])
    second = SGD([p.detach().clone().requires_grad_() for p in first.param_groups[0]["params"]], fused=True)
    second.load_state_dict(first.state_dict())
    copied = copy.deepcopy(first)
    expected = train(whole, rates[60:70])
    for other in (second, copied):
        assert all(map(torch.equal, train(other, rates[60:70]), expected))


@pytest.mark.parametrize("form", [9, 10])
def test_fused_divides_first_where_it_is_told_by_how_much(form: int) -> None:
    one, two = SGD(weights(), form=form, fused=True), SGD(weights(), form=form, fused=True)
    for step in range(3):
        for p, q in zip(one.param_groups[0]["params"], two.param_groups[0]["params"], strict=True):
            p.grad = torch.full_like(p, 6.0 + step)
            q.grad = p.grad / 3
        one.grad_scale = torch.tensor(3.0)
        one.step()
        two.step()
        for p, q in zip(one.param_groups[0]["params"], two.param_groups[0]["params"], strict=True):
            assert torch.equal(p, q)
            assert torch.equal(p.grad, q.grad)  # it is divided in place


@pytest.mark.parametrize("form", [9, 10])
@pytest.mark.parametrize("scale", [None, 4.0])
def test_memory_that_the_fused_kernel_would_mistake(form: int, scale: float | None) -> None:
    """It goes through memory whatever the strides: of a transposed gradient, a slice, a layout that was changed.

    Steps that GradScaler would have skipped leave all as it was.
    """

    def odd(fused: bool) -> tuple[SGD, list[Tensor]]:
        base = torch.arange(24.0, dtype=torch.float64).reshape(4, 6)
        parameters = [
            torch.arange(12.0, dtype=torch.float64).reshape(3, 4).requires_grad_(),
            base[:, ::2].requires_grad_(),
            torch.arange(48.0, dtype=torch.float64).reshape(2, 4, 3, 2).requires_grad_(),
            torch.ones(3, dtype=torch.float64, requires_grad=True),
        ]
        optimizer = SGD(parameters, form=form, weight_decay=0.1, fused=fused)
        if fused and scale:
            optimizer.grad_scale = torch.tensor(scale)
        for step in range(4):
            if step == 2:
                parameters[2].data = parameters[2].data.contiguous(memory_format=torch.channels_last)
            optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
            for p in parameters:
                p.grad = torch.arange(p.numel(), dtype=torch.float64).reshape(p.shape)
                p.grad *= scale if fused and scale else 1
            parameters[0].grad = parameters[0].grad.t().contiguous().t()
            for skipped in (1.0, 0.0) if fused else (0.0,):
                if fused:
                    optimizer.found_inf = torch.tensor(skipped)
                optimizer.step()
        return optimizer, [*parameters, base]

    (_, found), (_, expected) = odd(fused=True), odd(fused=False)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fused": True, "momentum_correction": False}, "which equals it"),
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
    fused = options.pop("fused", False)
    with pytest.raises(ValueError, match=words):
        SGD([{"params": weights(), **options}], fused=fused)  # type: ignore[arg-type]


def test_sparse_gradients_are_refused() -> None:
    embedding = torch.nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        SGD(embedding.parameters()).step()


def test_groups_without_parameters_or_gradients() -> None:
    w = torch.ones(2, requires_grad=True)
    SGD([{"params": []}, {"params": [w]}]).step()
    assert w.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("piece", [7, 64, 1 << 30])
def test_on_a_cpu_an_update_in_pieces_has_the_bits_of_one_pass_after_the_other(
    monkeypatch: pytest.MonkeyPatch, piece: int, threads: int
) -> None:
    shapes = [(33, 5, 3, 3), (), (0,), (1,), (257,), (64, 32)]

    def trained(**options: Any) -> list[Tensor]:
        torch.manual_seed(0)
        params = [torch.randn(shape) for shape in shapes]
        params[0] = params[0].to(memory_format=torch.channels_last)
        params[-1] = torch.randn(64, 64)[:, ::2]  # does not fill its memory
        optimizer = SGD(params, 0.1, **options)
        for lr in (0.1, 0.3, 0.0, 0.3):
            optimizer.param_groups[0]["lr"] = lr
            for p in params:
                p.grad = torch.randn_like(p)
            params[4].grad = torch.randn(514)[::2]  # other strides than the weights'
            optimizer.step()
        return [*params, *(optimizer.state[p]["velocity"] for p in params)]

    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for options in (
        {"weight_decay": 1e-2},
        {"form": 9, "weight_decay": 1e-2},
        {"nesterov": False, "momentum_correction": False},
        {"form": 9, "nesterov": False},
    ):
        monkeypatch.setattr(by_group, "_PIECE", 1 << 30)
        whole = trained(**options)
        monkeypatch.setattr(by_group, "_PIECE", piece)
        for ours, expected in zip(trained(**options), whole, strict=True):
            assert torch.equal(ours, expected), options


def test_parts_are_small_on_a_cpu_and_hold_every_element_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_group, "_PIECE", 10)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    tensors = [torch.arange(float(count)) + 100 * count for count in (3, 45, 4, 20, 17, 1)]
    parts = list(by_group.in_pieces(tensors, tensors))
    assert all(sum(of.numel() for of in pieces) <= 20 for _, (pieces, _) in parts)
    assert len(parts) == 6  # 3, 20; 20; 5 and 4; 20; 17 and 1: of 90 elements
    found = [
        (place, piece) for places, (pieces, _) in parts for place, piece in zip(places, pieces, strict=True)
    ]
    for place, tensor in enumerate(tensors):
        assert torch.equal(torch.cat([piece for at, piece in found if at == place]), tensor)
    on_meta = [tensor.to("meta") for tensor in tensors]
    ((places, (whole,)),) = by_group.in_pieces(on_meta)
    assert places == list(range(6))
    assert all(a is b for a, b in zip(whole, on_meta, strict=True))
