"""What a save plan holds: files, order, metadata, aliases, and what happens to the checkpoint that was there."""

import pytest

from funcmodel.core.index import parse_config
from funcmodel.core.wire import render_header
from funcmodel.errors import PlanError, TieConflictError
from funcmodel.plan.saving import live_plan, plan_save
from funcmodel.records.actions import Publish, WriteIndex, WriteShard, WriteText
from funcmodel.records.checkpoint import CheckpointSpec, FileSpec, IndexSpec
from funcmodel.records.dtypes import DTYPES
from funcmodel.records.expressions import Cast, FileRef, Full, Live, Read
from funcmodel.records.mapping import FrozenMap
from funcmodel.records.module import ModuleSpec, ParamSpec, TiedGroup
from funcmodel.records.plans import SavePlan, StateDictPlan
from funcmodel.records.tensors import TensorSpec


def live(key: str, *shape: int, dtype: str = "float32") -> Live:
    return Live(key, TensorSpec(shape, dtype))


def plan_of(**leaves: Live) -> StateDictPlan:
    return StateDictPlan(leaves)


def shards(plan: SavePlan) -> dict[str, WriteShard]:
    return {action.file: action for action in plan.actions if isinstance(action, WriteShard)}


def index(plan: SavePlan) -> WriteIndex:
    (found,) = [action for action in plan.actions if isinstance(action, WriteIndex)]
    return found


def publish(plan: SavePlan) -> Publish:
    (found,) = [action for action in plan.actions if isinstance(action, Publish)]
    assert plan.actions[-1] is found
    return found


SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TWO = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
AB = plan_of(a=live("a", 4), b=live("b", 4))


def stored(*names: str, weight_map: dict[str, str] | None = None, **fields: object) -> CheckpointSpec:
    """A checkpoint that a folder holds already."""
    files = tuple(
        FileSpec(path=f"out/{name}", nbytes=0, tensors=FrozenMap(), fingerprint="", **fields)  # type: ignore[arg-type]
        for name in names
    )
    found = None if weight_map is None else IndexSpec(path=f"out/{INDEX}", weight_map=FrozenMap(weight_map))
    return CheckpointSpec(path="out", files=files, index=found)


def test_one_file_is_the_commit() -> None:
    plan = plan_save(AB)
    assert list(shards(plan)) == [SINGLE]
    assert shards(plan)[SINGLE].metadata == {"format": "pt"}
    assert publish(plan) == Publish((), SINGLE, ())


def test_several_files_are_published_before_the_index_that_names_them() -> None:
    plan = plan_save(AB, max_shard_size=16)
    assert tuple(shards(plan)) == TWO
    assert index(plan).weight_map == {"a": TWO[0], "b": TWO[1]}
    assert index(plan).metadata == {"total_size": 32, "total_parameters": 8}
    assert publish(plan) == Publish(TWO, INDEX, ())


def test_inside_a_file_wide_types_come_first() -> None:
    plan = plan_save(
        plan_of(a=live("a", 1, dtype="bool"), b=live("b", 1, dtype="float16"), c=live("c", 1), d=live("d", 1))
    )
    assert list(shards(plan)[SINGLE].entries) == ["c", "d", "b", "a"]


def test_every_tensor_is_aligned_to_its_own_width() -> None:
    kinds = [d for d in DTYPES if d.safetensors is not None]
    leaves = {d.name: Live(d.name, TensorSpec((8 if d.bits % 8 else 3,), d)) for d in kinds}
    (shard,) = shards(plan_save(StateDictPlan(leaves))).values()
    _, offsets = render_header({key: leaf.spec for key, leaf in shard.entries.items()}, shard.metadata)  # type: ignore[union-attr]
    for d in kinds:
        assert offsets[d.name] % max(1, (d.bits // 2 if d.kind == "complex" else d.bits) // 8) == 0


def test_shards_follow_the_natural_order_of_names() -> None:
    keys = ["l.10.w", "l.9.w", "l.1.w", "a"]
    plan = plan_save(StateDictPlan({key: live(key, 1) for key in keys}), max_shard_size=8)
    assert [list(shard.entries) for shard in shards(plan).values()] == [["a", "l.1.w"], ["l.10.w", "l.9.w"]]


def test_nothing_is_saved_as_an_empty_file() -> None:
    plan = plan_save(StateDictPlan())
    assert dict(shards(plan)[SINGLE].entries) == {}
    assert publish(plan).commit == SINGLE


def test_metadata_is_sorted_and_says_pt() -> None:
    plan = plan_save(AB, metadata={"zoo": "1", "epoch": "2"})
    assert list(shards(plan)[SINGLE].metadata.items()) == [("epoch", "2"), ("format", "pt"), ("zoo", "1")]
    with pytest.raises(PlanError):
        plan_save(AB, metadata={"epoch": 2})  # type: ignore[dict-item]


def test_a_config_is_written_byte_for_byte() -> None:
    text = '{\n  "model_type": "bert",\n  "mine": null\n}\n'
    plan = plan_save(AB, config=parse_config(text))
    assert WriteText("config.json", text) in plan.actions
    assert publish(plan) == Publish(("config.json",), SINGLE, ())


def test_a_variant_has_names_of_its_own() -> None:
    plan = plan_save(AB, max_shard_size=16, variant="fp16")
    assert list(shards(plan)) == ["model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"]
    assert publish(plan).commit == "model.safetensors.index.fp16.json"


def test_without_a_limit_there_is_exactly_the_named_file() -> None:
    plan = plan_save(AB, max_shard_size=None, name="weights")
    assert publish(plan) == Publish((), "weights.safetensors", ())


# -- aliases ---------------------------------------------------------------------------------------------------------


def test_tied_keys_are_written_once_and_the_other_name_is_recorded() -> None:
    w = live("embed", 2, 2)
    plan = plan_save(plan_of(head=w, embed=w, bias=live("bias", 2)), tied=[TiedGroup(("embed", "head"))])
    assert set(shards(plan)[SINGLE].entries) == {"embed", "bias"}
    assert shards(plan)[SINGLE].metadata == {"format": "pt", "head": "embed"}


def test_equal_expressions_over_tensors_are_one_tensor() -> None:
    ref = FileRef("f", "safetensors", 100, "")
    spec = TensorSpec((2,), "float32")
    read = Read(ref, "w", spec, 8)
    plan = plan_save(StateDictPlan({"x": read, "y": read, "z": Read(ref, "v", spec, 16)}))
    assert set(shards(plan)[SINGLE].entries) == {"x", "z"}
    half = Cast(read, "float16")
    assert set(shards(plan_save(StateDictPlan({"x": half, "y": Cast(read, "float16")})))[SINGLE].entries) == {"x"}


def test_equal_constants_are_not_one_tensor() -> None:
    zeros = Full(TensorSpec((2,), "float32"), 0)
    assert set(shards(plan_save(StateDictPlan({"x": zeros, "y": zeros})))[SINGLE].entries) == {"x", "y"}


def test_an_alias_is_recorded_in_the_index_and_in_the_shard_of_its_tensor() -> None:
    w = live("w", 4)
    plan = plan_save(plan_of(a=live("a", 4), w=w, x=w), max_shard_size=16)
    assert index(plan).metadata["x"] == "w"
    assert "x" not in index(plan).weight_map
    assert [shard.metadata.get("x") for shard in shards(plan).values()] == [None, "w"]


def test_copy_writes_every_name() -> None:
    w = live("w", 4)
    assert set(shards(plan_save(plan_of(w=w, x=w), aliases="copy"))[SINGLE].entries) == {"w", "x"}


def test_raise_names_the_aliases() -> None:
    w = live("w", 4)
    with pytest.raises(PlanError) as raised:
        plan_save(plan_of(w=w, x=w), aliases="raise")
    assert raised.value.keys == ("x",)
    plan_save(AB, aliases="raise")


def test_an_alias_that_the_metadata_cannot_record_is_written() -> None:
    w = live("w", 4)
    plan = plan_save(plan_of(w=w, format=w))
    assert set(shards(plan)[SINGLE].entries) == {"w", "format"}
    assert shards(plan)[SINGLE].metadata == {"format": "pt"}


def test_one_tie_with_two_values_is_an_error() -> None:
    group = TiedGroup(("a", "b"))
    with pytest.raises(TieConflictError) as raised:
        plan_save(AB, tied=[group])
    assert raised.value.keys == ("a", "b")
    assert raised.value.tied == group


def test_aliases_of_aliases_lead_to_what_is_written() -> None:
    w = live("w", 4)
    groups = [TiedGroup(("a", "b")), TiedGroup(("c", "d"))]
    plan = plan_save(plan_of(a=w, b=w, c=w, d=w), tied=groups)
    assert shards(plan)[SINGLE].metadata == {"format": "pt", "b": "a", "c": "a", "d": "a"}


# -- the module ------------------------------------------------------------------------------------------------------


def test_a_live_plan_holds_what_a_state_dict_holds() -> None:
    w, spec = ParamSpec(spec=TensorSpec((2,), "float32")), TensorSpec((), "int64")
    module = ModuleSpec(
        name="Net",
        params={
            "scratch": ParamSpec(spec=w.spec, kind="buffer", persistent=False),
            "a.weight": w,
            "steps": ParamSpec(spec=spec, kind="buffer"),
            "b.weight": w,
        },
        tied=(TiedGroup(("scratch", "a.weight", "b.weight")),),
    )
    plan = live_plan(module)
    assert list(plan) == ["a.weight", "steps", "b.weight"]
    assert plan["b.weight"] == plan["a.weight"] == Live("a.weight", w.spec)
    assert plan["steps"] == Live("steps", spec)


# -- what the format cannot hold -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["__metadata__", "", "a\nb", "a\x7f", "x" * 5000, "\ud800"])
def test_a_name_that_no_reader_takes_is_refused(name: str) -> None:
    with pytest.raises(PlanError) as raised:
        plan_save(StateDictPlan({"ok": live("ok", 1), name: live("x", 1)}))
    assert raised.value.keys == (name,)


@pytest.mark.parametrize("dtype", ["complex128", "complex32"])
def test_a_dtype_without_a_name_in_the_format_is_refused(dtype: str) -> None:
    with pytest.raises(PlanError) as raised:
        plan_save(plan_of(ok=live("ok", 1), z=live("z", 1, dtype=dtype)))
    assert raised.value.keys == ("z",)


def test_a_tensor_that_ends_inside_a_byte_is_refused() -> None:
    with pytest.raises(PlanError) as raised:
        plan_save(plan_of(f=live("f", 3, dtype="F4")))
    assert raised.value.keys == ("f",)
    plan_save(plan_of(f=live("f", 4, dtype="F4")))


# -- the checkpoint that is there ------------------------------------------------------------------------------------


def test_a_single_file_is_replaced_by_its_own_name() -> None:
    assert publish(plan_save(AB, existing=stored(SINGLE))) == Publish((), SINGLE, ())


def test_from_a_single_file_to_shards_the_single_file_goes() -> None:
    plan = plan_save(AB, max_shard_size=16, existing=stored(SINGLE))
    assert publish(plan) == Publish(TWO, INDEX, (SINGLE,))


def test_from_shards_to_a_single_file_the_index_goes_first() -> None:
    old = stored(*TWO, weight_map={"a": TWO[0], "b": TWO[1]})
    assert publish(plan_save(AB, existing=old)) == Publish((), SINGLE, (INDEX, *TWO))


def test_names_that_the_old_shards_have_are_not_reused() -> None:
    old = stored(*TWO, weight_map={"a": TWO[0], "b": TWO[1]})
    plan = plan_save(AB, max_shard_size=16, existing=old)
    names = tuple(shards(plan))
    assert not {*names} & {*TWO}
    assert publish(plan) == Publish(names, INDEX, TWO)
    assert set(index(plan).weight_map.values()) == {*names}
    assert all(
        name.startswith("model-") and name.endswith(f"-0000{i}-of-00002.safetensors") for i, name in enumerate(names, 1)
    )
    assert plan_save(AB, max_shard_size=16, existing=old) == plan


def test_saving_again_returns_to_the_conventional_names() -> None:
    old = stored(*TWO, weight_map={"a": TWO[0], "b": TWO[1]})
    tagged = tuple(shards(plan_save(AB, max_shard_size=16, existing=old)))
    again = stored(*tagged, weight_map={"a": tagged[0], "b": tagged[1]})
    assert tuple(shards(plan_save(AB, max_shard_size=16, existing=again))) == TWO


def test_a_tag_that_is_taken_too_is_followed_by_another() -> None:
    old = stored(*TWO, weight_map={"a": TWO[0], "b": TWO[1]})
    tagged = tuple(shards(plan_save(AB, max_shard_size=16, existing=old)))
    both = CheckpointSpec(path="out", files=old.files, index=old.index, ignored=tagged)
    third = tuple(shards(plan_save(AB, max_shard_size=16, existing=both)))
    assert not {*third} & {*TWO, *tagged}


def test_the_tag_is_nowhere_in_the_shards() -> None:
    old = stored(*TWO, weight_map={"a": TWO[0], "b": TWO[1]})
    plain, tagged = plan_save(AB, max_shard_size=16), plan_save(AB, max_shard_size=16, existing=old)
    assert [(s.entries, s.metadata) for s in shards(plain).values()] == [
        (s.entries, s.metadata) for s in shards(tagged).values()
    ]


@pytest.mark.parametrize(
    "other",
    [
        CheckpointSpec(path="out", files=stored("model.fp16.safetensors").files, variant="fp16"),
        stored("adapter_model.safetensors"),
        stored(SINGLE, format="other"),
    ],
)
def test_another_variant_name_or_format_stays(other: CheckpointSpec) -> None:
    assert publish(plan_save(AB, max_shard_size=16, existing=other)).removes == ()


def test_an_index_that_huggingface_hub_named_is_replaced_too() -> None:
    name = "model.fp16.safetensors.index.json"
    files = stored("model.fp16-00001-of-00001.safetensors").files
    old = CheckpointSpec(
        path="out",
        files=files,
        index=IndexSpec(path=f"out/{name}", weight_map=FrozenMap({"a": "model.fp16-00001-of-00001.safetensors"})),
        variant="fp16",
    )
    plan = plan_save(AB, max_shard_size=16, variant="fp16", existing=old)
    assert publish(plan).commit == "model.safetensors.index.fp16.json"
    assert publish(plan).removes == (name, "model.fp16-00001-of-00001.safetensors")


def test_the_source_is_left_as_it_was() -> None:
    source = {"b": live("b", 4), "a": live("a", 4)}
    metadata = {"epoch": "1"}
    plan_save(source, metadata=metadata, max_shard_size=16)
    assert list(source) == ["b", "a"]
    assert metadata == {"epoch": "1"}
