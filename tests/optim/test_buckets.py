"""How parameters are laid out in buckets."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hvd_lb.optim.exchange.buckets import Bucket, half, plan_buckets, squared_norm
from hvd_lb.world.solo import Solo


@given(
    st.lists(st.tuples(st.integers(0, 50), st.sampled_from([torch.float32, torch.bfloat16, torch.float64])))
)
def test_plan(described: list[tuple[int, torch.dtype]]) -> None:
    parameters = [torch.zeros(n, dtype=dtype) for n, dtype in described]
    buckets = plan_buckets(parameters, bucket_bytes=160)
    assert sorted(id(p) for bucket in buckets for p in bucket) == sorted(map(id, parameters))
    position = {id(p): i for i, p in enumerate(parameters)}
    for bucket in buckets:
        places = [position[id(p)] for p in bucket]
        assert places == sorted(places, reverse=True)
        assert len({p.dtype == torch.float64 for p in bucket}) == 1
        size = 8 if bucket[0].dtype == torch.float64 else 4
        assert len(bucket) == 1 or sum(p.numel() for p in bucket) * size <= 160


def test_the_first_bucket_is_small_and_little_is_left_for_the_last() -> None:
    parameters = [torch.empty(2**18, device="meta") for _ in range(64)]  # of 1 MiB each
    sizes = [len(bucket) for bucket in plan_buckets(parameters, bucket_bytes=25 * 2**20)]
    assert sizes == [1, 10, 10, 10, 10, 10, 6, 3, 2, 1, 1]
    assert plan_buckets(parameters[:1], 10) == [parameters[:1]]


def test_views_do_not_overlap_are_aligned_and_strided_like_the_parameters() -> None:
    parameters = [
        torch.zeros(4, 3, 3, 2).to(memory_format=torch.channels_last),
        torch.zeros(()),
        torch.zeros(5, 7).t(),
        torch.zeros(0),
        torch.zeros(3, 2, dtype=torch.bfloat16),
    ]
    bucket = Bucket(parameters, "b", Solo())
    for i, slot in enumerate(bucket.slots):
        assert slot.view.data_ptr() % 64 == bucket.flat.data_ptr() % 64
        assert slot.view.stride() == slot.parameter.stride()
        slot.view.fill_(i + 1)
    for i, slot in enumerate(bucket.slots):
        assert bool((slot.view == i + 1).all())
    assert bucket.flags.tolist() == [0.0] * 5
    assert bucket.flat.dtype == torch.float32


def test_exchange_tells_who_had_a_gradient() -> None:
    here, nowhere = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    bucket = Bucket([here, nowhere], "b", Solo())
    here.grad = torch.tensor([2.0, 4.0])
    bucket.start(Solo())
    bucket.finish()
    bucket.divide(2)
    assert here.grad.tolist() == [1.0, 2.0]
    assert nowhere.grad is None
    assert bucket.flags.tolist() == [1.0, 0.0]
    with pytest.raises(RuntimeError, match="not started"):
        bucket.finish()


def test_the_squared_norm_of_many_tensors_may_be_beyond_single_precision() -> None:
    assert squared_norm([torch.tensor([1.5e19])] * 2).item() == pytest.approx(4.5e38)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_put_in_place_of_a_sum_is_what_is_divided(dtype: torch.dtype) -> None:
    """As somebody who clips or unscales may do, with a tensor of their own or in ours."""
    replaced, edited = (nn.Parameter(torch.zeros(2, dtype=dtype)) for _ in range(2))
    bucket = Bucket([replaced, edited], "b", Solo())
    for p in (replaced, edited):
        p.grad = torch.tensor([2.0, 4.0], dtype=dtype)
    bucket.start(Solo())
    bucket.finish()
    replaced.grad = torch.tensor([6.0, 8.0], dtype=dtype)
    edited.grad.mul_(10)  # type: ignore[union-attr]
    bucket.divide(2)
    assert replaced.grad.tolist() == [3.0, 4.0]
    assert edited.grad.tolist() == [10.0, 20.0]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("images", "share"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (8192, 8192), (8193, 16384)]
)
def test_what_is_sent_in_half_precision_is_near_the_mean(images: int, share: int) -> None:
    """As a power of two: nothing is rounded by it."""
    assert half("bf16", images).scale == 1 / share
    assert half("fp16", images).scale == 256 / share
