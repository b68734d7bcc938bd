"""How keys are cut into files, and how the files are called."""

import pytest

from funcmodel.errors import PlanError
from funcmodel.plan.sharding import index_name, plan_shards, shard_name, single_name


def test_files_are_filled_in_order_up_to_the_limit() -> None:
    plan = plan_shards({"a": 3, "b": 3, "c": 3, "d": 3}, 6)
    assert dict(plan.files) == {
        "model-00001-of-00002.safetensors": ("a", "b"),
        "model-00002-of-00002.safetensors": ("c", "d"),
    }
    assert list(plan.sizes.values()) == [6, 6]


def test_a_tensor_over_the_limit_has_a_file_of_its_own_in_its_place() -> None:
    assert list(plan_shards({"a": 1, "big": 9, "b": 1}, 4).files.values()) == [("a",), ("big",), ("b",)]


def test_what_fits_into_one_file_is_not_numbered() -> None:
    assert dict(plan_shards({"a": 4, "b": 4}, 8).files) == {"model.safetensors": ("a", "b")}
    assert dict(plan_shards({"a": 10**15}, None).files) == {"model.safetensors": ("a",)}


def test_nothing_is_one_empty_file() -> None:
    plan = plan_shards({}, "5GB")
    assert dict(plan.files) == {"model.safetensors": ()}
    assert dict(plan.sizes) == {"model.safetensors": 0}


def test_the_limit_is_bytes_or_text() -> None:
    sizes = {"a": 600, "b": 600}
    assert plan_shards(sizes, "1KB") == plan_shards(sizes, 1000) != plan_shards(sizes, "2KB")
    with pytest.raises(ValueError):  # noqa: PT011
        plan_shards(sizes, "much")


def test_names_follow_the_conventions_of_transformers() -> None:
    assert single_name() == "model.safetensors"
    assert single_name(variant="fp16") == "model.fp16.safetensors"
    assert shard_name(1, 3) == "model-00002-of-00003.safetensors"
    assert shard_name(1, 3, variant="fp16") == "model.fp16-00002-of-00003.safetensors"
    assert index_name() == "model.safetensors.index.json"
    assert index_name(variant="fp16") == "model.safetensors.index.fp16.json"
    assert index_name("diffusion_pytorch_model") == "diffusion_pytorch_model.safetensors.index.json"


def test_the_names_are_those_that_transformers_looks_for() -> None:
    from transformers.modeling_utils import _add_variant
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

    for variant in (None, "fp16", "ema"):
        assert single_name(variant=variant) == _add_variant(SAFE_WEIGHTS_NAME, variant)
        assert index_name(variant=variant) == _add_variant(SAFE_WEIGHTS_INDEX_NAME, variant)


def test_a_tag_is_in_the_names_of_shards_only() -> None:
    assert list(plan_shards({"a": 4, "b": 4}, 4, tag="9f3c01ab").files) == [
        "model-9f3c01ab-00001-of-00002.safetensors",
        "model-9f3c01ab-00002-of-00002.safetensors",
    ]
    assert list(plan_shards({"a": 4}, 4, tag="9f3c01ab").files) == ["model.safetensors"]


@pytest.mark.parametrize("word", ["", "../up", "/abs", "a\\b", "c:x", ".hidden", "a\nb"])
def test_a_name_cannot_be_a_path(word: str) -> None:
    with pytest.raises(PlanError):
        plan_shards({"a": 1}, 1, name=word)
    with pytest.raises(PlanError):
        index_name(variant=word)


def test_a_number_of_files_is_kept_and_the_files_are_about_equal() -> None:
    sizes = {f"w{i}": 10 for i in range(10)}
    assert [*plan_shards(sizes, None, shards=3).sizes.values()] == [40, 40, 20]
    assert len(plan_shards(sizes, 20, shards=3).files) == 5  # the limit makes more
    assert [*plan_shards(sizes, "5GB", shards=1).files] == ["model.safetensors"]
    assert len(plan_shards({"w": 10}, None, shards=4).files) == 1


def test_for_speed_there_are_four_to_eight_files_from_two_gib_on() -> None:
    def count(gib: float) -> int:
        return len(plan_shards({f"w{i}": int(gib * 2**30) // 64 for i in range(64)}, None, shards="auto").files)

    assert [count(gib) for gib in (1.9, 2, 9, 12, 100)] == [1, 4, 4, 6, 8]


@pytest.mark.parametrize("shards", [0, -1, 2.0, True, "fast"])
def test_what_is_no_number_of_files_is_refused(shards: object) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        plan_shards({"w": 1}, None, shards=shards)  # type: ignore[arg-type]
