"""Laws 23 to 26: sharding."""

from itertools import pairwise

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from hypothesis import given
from hypothesis import strategies as st

from funcmodel.plan.sharding import plan_shards
from funcmodel.records.plans import ShardPlan

SIZES = st.lists(st.integers(0, 60), max_size=40).map(lambda sizes: {f"k{i}": n for i, n in enumerate(sizes)})
LIMITS = st.integers(0, 120)


def shards(plan: ShardPlan) -> list[tuple[str, ...]]:
    return list(plan.files.values())


@given(SIZES, LIMITS)
def test_law_23_shards_cover_exactly_and_in_order(sizes: dict[str, int], limit: int) -> None:
    """concat(shards(sizes, limit)) = keys(sizes)."""
    plan = plan_shards(sizes, limit)
    assert [key for members in shards(plan) for key in members] == list(sizes)
    assert all(shards(plan)) or not sizes
    assert dict(plan.sizes) == {file: sum(sizes[k] for k in members) for file, members in plan.files.items()}


@given(SIZES, LIMITS)
def test_law_24_a_shard_is_within_the_limit_or_one_tensor(sizes: dict[str, int], limit: int) -> None:
    """size(shard) <= limit or |shard| = 1."""
    for members in shards(plan_shards(sizes, limit)):
        assert sum(sizes[k] for k in members) <= limit or len(members) == 1


@given(SIZES, LIMITS)
def test_law_25_shards_are_greedy_maximal(sizes: dict[str, int], limit: int) -> None:
    """size(shard i) + size(first tensor of shard i + 1) > limit."""
    for here, there in pairwise(shards(plan_shards(sizes, limit))):
        assert sum(sizes[k] for k in here) + sizes[there[0]] > limit


@given(SIZES, LIMITS, LIMITS)
def test_law_26_sharding_is_monotone_in_the_limit(sizes: dict[str, int], a: int, b: int) -> None:
    """a <= b implies |shards(a)| >= |shards(b)|."""
    low, high = sorted((a, b))
    assert len(shards(plan_shards(sizes, low))) >= len(shards(plan_shards(sizes, high)))
    assert len(shards(plan_shards(sizes, None))) == 1


@given(SIZES, LIMITS)
def test_shards_are_those_of_huggingface_hub_where_no_tensor_is_over_the_limit(
    sizes: dict[str, int], extra: int
) -> None:
    """shards(sizes, limit) = hub's, names included, where limit >= max(sizes)."""
    limit = max(sizes.values(), default=0) + extra
    tensors = {key: torch.zeros(n, dtype=torch.uint8) for key, n in sizes.items() if n}
    if not tensors:
        return
    theirs = split_torch_state_dict_into_shards(tensors, max_shard_size=limit).filename_to_tensors
    ours = plan_shards({key: n for key, n in sizes.items() if n}, limit)
    assert {file: list(members) for file, members in ours.files.items()} == theirs
    assert list(ours.files) == list(theirs)


@given(SIZES, st.integers(1, 12))
def test_a_number_of_shards_takes_the_smallest_limit_that_gives_it(sizes: dict[str, int], count: int) -> None:
    """|shards(sizes, n)| <= n, and every smaller limit gives more than n."""
    found = shards(plan_shards(sizes, None, shards=count))
    assert len(found) <= count
    largest = max((sum(sizes[k] for k in members) for members in found), default=0)
    if largest:
        assert len(shards(plan_shards(sizes, largest - 1))) > count or largest == max(sizes.values())
