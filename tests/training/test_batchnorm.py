"""Running statistics of layers that are used in other ways than once in every forward, against the formula and torch.

The formula itself, for k workers, is tested in test_trainer.py; several processes in tests/optim/ranks/checks.py.
"""

import copy
from functools import partial

import pytest
import torch
from together import together
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.checkpoint import checkpoint

from hvd_lb.training.batchnorm import RunningStatistics, allow_single_values, running_statistics
from hvd_lb.training.together.group import Group
from hvd_lb.world import World
from hvd_lb.world.solo import Solo


@pytest.fixture(params=[None, 16], ids=["float", "fixed point"])
def terms(request: pytest.FixtureRequest) -> int | None:
    return request.param


def views(count: int, features: int = 2, mean: float = 5.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, features, generator=generator) + mean for _ in range(count)]


def step(statistics: RunningStatistics, workers: int = 1) -> None:
    statistics.synchronize()
    statistics.step(workers)


def close(a: Tensor | None, b: Tensor | None) -> bool:
    assert a is not None
    assert b is not None
    return torch.allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.1, None, 0.0, 1.0])
@pytest.mark.parametrize("frozen_after", [0, 2, 9])
def test_one_worker_equals_torch(terms: int | None, momentum: float | None, frozen_after: int) -> None:
    layer = nn.BatchNorm1d(2, momentum=momentum)
    plain = copy.deepcopy(layer)
    statistics = running_statistics(nn.Sequential(layer), Solo(), terms)
    for number, x in enumerate(views(4)):
        for one in (layer, plain):
            one.train(number < frozen_after)
            one(x)
        statistics.after_forward()
        step(statistics)
        if number == 2:
            statistics.publish()  # in the midst: it goes on as it would have
    statistics.publish(steps=4)
    assert close(layer.running_mean, plain.running_mean)
    assert close(layer.running_var, plain.running_var)
    assert layer.num_batches_tracked == plain.num_batches_tracked == min(4, frozen_after)
    layer.train()
    plain.train()
    for x in views(2):  # and after a new start from the buffers
        plain(x)
    again = running_statistics(nn.Sequential(layer), Solo(), terms)
    for x in views(2):
        layer(x)
        again.after_forward()
        step(again)
    again.publish()
    assert close(layer.running_mean, plain.running_mean)


def test_a_momentum_that_changes_on_the_way(terms: int | None) -> None:
    layer, plain = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    statistics = running_statistics(nn.Sequential(layer), Solo(), terms)
    for momentum, x in zip((0.5, 0.1, 0.9), views(3), strict=True):
        layer.momentum = plain.momentum = momentum
        layer(x)
        plain(x)
        statistics.after_forward()
        step(statistics)
    statistics.publish()
    assert close(layer.running_mean, plain.running_mean)


@pytest.mark.parametrize("times", [2, 3])
def test_forwards_of_a_microbatch_count_alike(terms: int | None, times: int) -> None:
    layer = nn.BatchNorm1d(2)
    statistics = running_statistics(nn.Sequential(layer), Solo(), terms)
    mean, var = torch.zeros(2), torch.ones(2)
    for first, second in zip(views(4)[::2], views(4)[1::2], strict=True):
        scaled = [x * (i + 1) for x in (first, second) for i in range(times)]
        for number, x in enumerate(scaled):
            layer(x)
            if number % times == times - 1:
                statistics.after_forward()
        step(statistics, workers=2)
        mean = 0.9 * mean + 0.1 * torch.stack([x.mean(0) for x in scaled]).mean(0)
        var = 0.9 * var + 0.1 * torch.stack([x.var(0) for x in scaled]).mean(0)
    statistics.publish()
    assert close(layer.running_mean, mean)
    assert close(layer.running_var, var)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_layers_keep_their_sums_in_fp32(terms: int | None, dtype: torch.dtype) -> None:
    layer, mean = nn.BatchNorm1d(2, dtype=dtype), torch.zeros(2)
    statistics = running_statistics(nn.Sequential(layer), Solo(), terms)
    for x in views(4) * 50:
        layer(x.to(dtype))
        statistics.after_forward()
        step(statistics)
        mean = 0.9 * mean + 0.1 * x.to(dtype).float().mean(0)
    statistics.publish()
    assert layer.running_mean is not None
    assert layer.running_mean.dtype == dtype
    assert ((layer.running_mean.float() - mean).abs() / mean).max() < 2**-7


def test_copies_are_plain_layers_with_the_published_statistics(terms: int | None) -> None:
    layer = nn.BatchNorm1d(2)
    model = nn.Sequential(layer)
    statistics = running_statistics(model, Solo(), terms)
    average = AveragedModel(model, use_buffers=True)
    first, second, third = views(3)
    model(first)
    statistics.after_forward()
    step(statistics)
    statistics.publish()
    published = [b.clone() for b in (layer.running_mean, layer.running_var)]  # type: ignore[union-attr]
    model(second)
    statistics.after_forward()
    average.update_parameters(model)
    for twin in (copy.deepcopy(model), average.module):
        plain = nn.BatchNorm1d(2)
        plain.load_state_dict(layer.state_dict())
        assert isinstance(twin, nn.Sequential)
        assert twin[0].momentum == 0.1
        assert torch.equal(twin[0].running_mean, published[0])
        assert torch.equal(twin[0].running_var, published[1])
        assert twin[0](third) is not None
        assert torch.equal(plain(third), twin(third) * 1)
        plain(third)
        assert close(twin[0].running_mean, plain.running_mean)
    update_bn([first, second], average)
    assert close(average.module[0].running_mean, (first.mean(0) + second.mean(0)) / 2)
    step(statistics)
    statistics.publish()  # and training has not seen what the copies did
    expected = 0.9 * (0.1 * first.mean(0)) + 0.1 * second.mean(0)
    assert close(layer.running_mean, expected)


def test_backward_comes_after_it(terms: int | None) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    plain = copy.deepcopy(model)
    statistics = running_statistics(model, Solo(), terms)
    (x,) = views(1)
    loss = model(x).square().sum()
    statistics.after_forward()
    loss.backward()
    plain(x).square().sum().backward()
    assert all(
        torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), plain.parameters(), strict=True)
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_goes_forward_once(terms: int | None, reentrant: bool) -> None:
    layer = nn.BatchNorm1d(2)
    statistics = running_statistics(nn.Sequential(layer), Solo(), terms)
    mean = torch.zeros(2)
    for microbatches in zip(views(6)[::2], views(6)[1::2], strict=True):
        for x in microbatches:
            out = checkpoint(layer, x.requires_grad_(), use_reentrant=reentrant)
            statistics.after_forward()
            out.square().sum().backward()
            assert not layer.running_mean.any()  # type: ignore[union-attr]  # as it was published, or made
        step(statistics, workers=2)
        mean = 0.9 * mean + 0.1 * torch.cat(microbatches).detach().mean(0)
    statistics.publish()
    assert close(layer.running_mean, mean)


def test_a_forward_after_the_microbatches_counts_for_nothing(terms: int | None) -> None:
    """The second one of sharpness-aware minimisation, with other weights."""
    layer = nn.BatchNorm1d(2)
    statistics = running_statistics(nn.Sequential(layer), Solo(), terms)
    mean = torch.zeros(2)
    for x in views(3):
        layer(x)
        statistics.after_forward()
        layer(x * 100)
        step(statistics)
        mean = 0.9 * mean + 0.1 * x.mean(0)
    statistics.publish()
    assert close(layer.running_mean, mean)


def test_a_layer_in_some_microbatches_of_a_step_is_named(terms: int | None) -> None:
    model = nn.ModuleDict({"head": nn.BatchNorm1d(2), "body": nn.BatchNorm1d(2)})
    statistics = running_statistics(model, Solo(), terms)
    for number, x in enumerate(views(3)):
        model["body"](x)
        if number == 1:
            model["head"](x)
        statistics.after_forward()
    statistics.synchronize()
    with pytest.raises(RuntimeError, match="head went forward in 1 of the 3 microbatches"):
        statistics.step(3)
    statistics.discard()


@pytest.mark.parametrize("layer", [nn.SyncBatchNorm(2), nn.LazyBatchNorm1d()])
def test_layers_that_are_refused_are_named(layer: nn.Module) -> None:
    with pytest.raises(TypeError, match="norm (is a SyncBatchNorm|has no shape yet)"):
        RunningStatistics(nn.ModuleDict({"norm": layer}), Solo())


def test_layers_without_statistics_are_left_alone() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False), nn.GroupNorm(1, 2))
    statistics = running_statistics(model, Solo(), 4)
    model(views(1)[0])
    statistics.after_forward()
    step(statistics)
    statistics.publish()
    assert model[0].momentum == 0.1


def test_single_values_beside_it(terms: int | None) -> None:
    layer = nn.BatchNorm1d(2)
    allow_single_values(nn.Sequential(layer))
    statistics = running_statistics(nn.Sequential(layer), Solo(), terms)
    layer(torch.tensor([[3.0, 4.0]]))
    statistics.after_forward()
    step(statistics)
    statistics.publish()
    assert close(layer.running_mean, torch.tensor([0.3, 0.4]))
    assert close(layer.running_var, torch.tensor([0.9, 0.9]))
    assert copy.deepcopy(layer)(torch.ones(1, 2)) is not None


def test_single_values_of_two_workers_together(terms: int | None) -> None:
    layer, group = nn.BatchNorm1d(2), Group()
    allow_single_values(nn.Sequential(layer))
    statistics = running_statistics(nn.Sequential(layer), Solo(), terms, group)
    group.begin([1, 1], [0, 0])
    layer(torch.tensor([[3.0, 4.0], [5.0, 8.0]]))
    statistics.after_forward()
    step(statistics, workers=2)
    statistics.publish()
    assert close(layer.running_mean, torch.tensor([0.4, 0.6]))
    assert close(layer.running_var, torch.tensor([0.9, 0.9]))


def test_processes_go_on_from_what_was_published_as_from_a_checkpoint() -> None:
    """To the bit: with what each of them then has of r and of its average."""

    def alike(world: World) -> bool:
        layer = nn.BatchNorm1d(2)
        statistics = RunningStatistics(nn.Sequential(layer), world)
        statistics.keep_average()
        layer(views(2)[world.rank])
        statistics.after_forward()
        step(statistics, workers=2)
        statistics.average(0.5)
        statistics.publish()
        shares = [of.clone() for of in (*statistics._share, *statistics._averages)]
        statistics.adopt()
        statistics.adopt_average(statistics.averaged())
        return all(map(torch.equal, shares, [*statistics._share, *statistics._averages]))

    assert together(2, alike) == [True, True]


@pytest.mark.slow
def test_compiled() -> None:
    torch.compiler.reset()
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        statistics = RunningStatistics(model, Solo())
        forward = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        for x in views(3):
            for part in (x[:4], x[4:]):
                loss = forward(part).square().sum()
                if part is not x:
                    forward(3 * part)
                statistics.after_forward()
                loss.backward()
            step(statistics, workers=2)
        statistics.publish()
        results.append(model[1].running_mean)
    assert close(results[0], results[1])


def test_to_add_no_forward_of_a_step_is_an_error(terms: int | None) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    statistics = running_statistics(model, Solo(), terms)
    first, second = views(2)
    model(first)
    for update in (partial(statistics.step, 1), partial(statistics.replace, 1.0)):
        with pytest.raises(RuntimeError, match=r"^1 went forward .* call after_forward\(\) after"):
            update()
    statistics.after_forward()
    step(statistics)
    model(second)
    statistics.forget_forward()
    step(statistics)  # a process without images: its layers are in use
    statistics.publish()
    assert close(model[1].running_mean, 0.9 * 0.1 * model[0](first).mean(0))


@pytest.mark.parametrize("through", ["the model", "the layer", "a part", "assignment"])
def test_statistics_that_are_loaded_are_gone_on_from(terms: int | None, through: str) -> None:
    """Also when they equal what was published last, and other layers go on as they were."""
    model = nn.Sequential(nn.Sequential(nn.BatchNorm1d(2)), nn.BatchNorm1d(2, momentum=None))
    plain = copy.deepcopy(model)
    statistics = running_statistics(model, Solo(), terms)

    def train(x: Tensor, *models: nn.Module) -> None:
        for one in models:
            one(x)
        statistics.after_forward()
        step(statistics)

    xs = views(4)
    train(xs[0], model, plain)
    statistics.publish()
    kept = copy.deepcopy(plain.state_dict())
    train(xs[1], model, plain)
    for one in (model, plain):
        if through == "the layer":
            one[0][0].load_state_dict({key[4:]: kept[key] for key in kept if key.startswith("0.0")})
        elif through == "a part":
            one.load_state_dict({key: kept[key] for key in kept if key.startswith("1.")}, strict=False)
        else:
            one.load_state_dict(copy.deepcopy(kept), assign=through == "assignment")
    train(xs[2], model, plain)
    statistics.publish()
    for name, value in plain.state_dict().items():
        assert close(model.state_dict()[name].double(), value.double()), name
    twin = copy.deepcopy(model)  # loads by itself
    twin.load_state_dict(kept)
    train(xs[3], model, plain)
    statistics.publish()
    assert close(model[1].running_mean, plain[1].running_mean)
