"""Converters and validators at the edge of the records."""

import pytest
import torch

import funcmodel as fm
from funcmodel.records.devices import CPU


def test_a_spec_takes_what_users_write() -> None:
    spec = fm.TensorSpec(torch.Size([4, 8]), torch.bfloat16)
    assert spec == fm.TensorSpec((4, 8), "BF16") == fm.TensorSpec([4, 8], "bfloat16")
    assert (spec.ndim, spec.numel, spec.nbytes) == (2, 32, 64)


def test_half_bytes_are_counted_exactly() -> None:
    assert fm.TensorSpec([6], "F4").nbytes == 3
    assert fm.TensorSpec([4], "F6_E2M3").nbytes == 3


def test_a_negative_dimension_is_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        fm.TensorSpec([-1], "float32")


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("5GB", 5 * 10**9), ("1KiB", 1024), ("1.5MB", 1_500_000), ("12", 12), (7, 7), (" 2 gib ", 2**31), ("0", 0)],
)
def test_sizes(text: int | str, nbytes: int) -> None:
    assert fm.parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "-1", "5XB", "1e400GB", "nan", "1 2", -3, True])
def test_what_is_no_size_is_refused(text: int | str) -> None:
    with pytest.raises(ValueError, match="size"):
        fm.parse_size(text)


def test_devices_take_what_users_write() -> None:
    assert fm.device("cuda:1") == fm.device(1) == fm.device(torch.device("cuda", 1)) == fm.Device("cuda", 1)
    assert fm.device_map("cpu").entries == {"": CPU}
    assert fm.DeviceMap({"": 0, "head": "cpu"}).entries["head"] == CPU
    assert fm.Budget({0: "1KB"}).entries == {fm.Device("cuda", 0): 1000}


@pytest.mark.parametrize("text", ["", "cuda:", "cuda:x", "a b", True])
def test_what_is_no_device_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="device"):
        fm.device(text)


def test_a_mesh_has_distinct_axes_and_a_permutation_of_ranks() -> None:
    assert fm.Mesh({"pp": 2, "tp": 4}).size == 8
    assert fm.Mesh([("dp", 2)], ranks=(1, 0)).ranks == (1, 0)
    for wrong in ({"axes": [("a", 2), ("a", 2)]}, {"axes": {"a": 0}}, {"axes": {"a": 2}, "ranks": (0, 0)}):
        with pytest.raises(ValueError, match=r"mesh|permutation"):
            fm.Mesh(**wrong)  # type: ignore[arg-type]


def test_a_layout_keeps_the_order_in_which_cuts_are_made() -> None:
    tp, dp = ("tp", fm.Shard(0)), ("dp", fm.Shard(0))
    assert fm.Layout(order=(tp, dp)) != fm.Layout(order=(dp, tp))


def test_policies_refuse_unknown_words() -> None:
    with pytest.raises(ValueError, match="missing"):
        fm.LoadPolicy(missing="ignore")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="waiver"):
        fm.LoadPolicy(allow=("surplus:x",))  # type: ignore[arg-type]
    assert fm.LoadPolicy(allow=("missing:a.{i}",)).allow == (fm.Waiver("missing", "a.{i}"),)  # type: ignore[arg-type]


def test_plans_say_what_they_are_in_one_line() -> None:
    assert repr(fm.StateDictPlan({})) == "<StateDictPlan: 0 keys>"
    assert repr(fm.LoadPlan()) == "<LoadPlan: 0 actions>"
    assert repr(fm.SavePlan()) == "<SavePlan: 0 actions>"
