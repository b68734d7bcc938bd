"""The way back: from what was loaded to exactly the names that were read."""

import pytest

from funcmodel.core import build
from funcmodel.core.shapes import spec_of
from funcmodel.errors import RuleError
from funcmodel.plan.convert import convert
from funcmodel.plan.restored import restored
from funcmodel.records.expressions import Expr, FileRef, Stack
from funcmodel.records.plans import StateDictPlan
from funcmodel.records.rules import Merge, Rename, Rule, Split, Stacked, Transpose, Unstacked
from funcmodel.records.tensors import TensorSpec
from property_tests.strategies.rules import FILE, stored


def live(plan: StateDictPlan) -> StateDictPlan:
    """What a module holds after loading `plan`."""
    return StateDictPlan({key: build.live(key, spec_of(expr)) for key, expr in plan.items()})


RULES: list[Rule] = [
    Rename("model.{*p}", "{*p}"),
    Merge(("{i}.q", "{i}.k"), "{i}.qk", sizes=(4, 2)),
    Split("{i}.gate_up", ("{i}.gate", "{i}.up"), dim=1),
    Stacked("{i}.e.{n}.w", "{i}.e", over="n", dim=1),
    Unstacked("lora", "lora.{n}", over="n"),
    Transpose("{i}.qk"),
]


def theirs() -> StateDictPlan:
    layers = {"q": (4, 8), "k": (2, 8), "gate_up": (8, 6), "e.0.w": (3, 2), "e.1.w": (3, 2), "norm": (8,)}
    return stored({f"model.{i}.{n}": s for i in (0, 1) for n, s in layers.items()} | {"lora": (3, 4, 5)})


def test_a_plan_goes_back_to_the_plan_that_was_scanned() -> None:
    scanned = theirs()
    mine = convert(*RULES)(scanned)
    assert restored(mine)(mine) == scanned


def test_what_is_saved_has_the_names_shapes_and_dtypes_of_what_was_read() -> None:
    scanned = theirs()
    mine = convert(*RULES)(scanned)
    back = restored(mine)(live(mine))
    assert {key: spec_of(expr) for key, expr in back.items()} == {key: spec_of(expr) for key, expr in scanned.items()}
    assert back["model.1.k"] == build.narrow(
        build.transpose(build.live("1.qk", TensorSpec([8, 6], "float32"))), 0, 4, 6
    )
    assert back["lora"] == Stack(tuple(build.live(f"lora.{n}", TensorSpec([4, 5], "float32")) for n in range(3)), 0)


def test_a_key_that_rules_left_alone_and_that_looks_like_a_target_is_left_alone() -> None:
    plan = stored({"model.a": (2,), "b": (2,)})
    mine = convert(Rename("model.{*p}", "{*p}"))(plan)
    assert restored(mine)(mine) == plan


def read(shape: list[int], dtype: str = "float32", name: str = "w") -> Expr:
    return build.read(FILE, name, TensorSpec(shape, dtype), 128)


def box(x: Expr, *at: object) -> Expr:
    return build.index(x, at)


X = read([4, 6])
ROUND_THE_END = (5, 6, 7, 13, 14, 15, 21, 22, 23)
FAR = FileRef("other.safetensors", "safetensors", 1 << 20, "1" * 32)


@pytest.mark.parametrize(
    "parts",
    [
        [X],
        [box(X, 0), box(X, (1, 3)), box(X, 3)],
        [box(X, (0, 2), (0, 3)), box(X, (0, 2), (3, 6)), box(X, (2, 4))],
        # A pinwheel: no line crosses it without cutting a piece.
        [
            box(X, (0, 1), (0, 5)),
            box(X, (0, 3), (5, 6)),
            box(X, (3, 4), (1, 6)),
            box(X, (1, 4), (0, 1)),
            box(X, (1, 3), (1, 5)),
        ],
        [box(X, n, m) for m in range(6) for n in (2, 0, 3, 1)],
        [build.take(X, (3, 0, 2, 1))],
        [build.take(X, (0, 2)), build.take(X, (3, 1))],
        [build.concat([box(X, (2, 4)), box(X, (0, 2))])],
        [build.stack([box(X, 3), box(X, 1)], 1), build.stack([box(X, 0), box(X, 2)], 0)],
        [build.reshape(X, (24,))],
        [build.narrow(build.reshape(X, (3, 8)), 1, 0, 5), build.narrow(build.reshape(X, (3, 8)), 1, 5, 8)],
        [build.reshape(build.transpose(build.reshape(X, (2, 12))), (4, 6))],
        [build.cast(build.transpose(X), "float64")],
        [box(read([1, 1, 3]), 0, 0)],
        [read([0, 4])],
        [box(build.reshape(X, (24,)), (0, 1)), box(build.reshape(X, (24,)), (1, 24))],
        [
            build.narrow(build.reshape(X, (3, 8)), 1, 0, 5),
            *(box(X, at // 6, (at % 6, at % 6 + 1)) for at in ROUND_THE_END),
        ],
        [box(read([0, 4]), slice(None), (0, 3)), box(read([0, 4]), slice(None), (3, 4))],
        [read([])],
    ],
)
def test_whatever_holds_each_element_once_is_put_together_again(parts: list[Expr]) -> None:
    plan = StateDictPlan({f"k{n}": part for n, part in enumerate(parts)})
    (name, back), *others = restored(plan)(live(plan)).items()
    whole = next(leaf for leaf in (X, read([1, 1, 3]), read([0, 4]), read([])) if leaf in _leaves(parts[0]))
    assert (name, others, spec_of(back)) == ("w", [], spec_of(whole))


def _leaves(expr: Expr) -> set[Expr]:
    inner = [getattr(expr, "of", None), *getattr(expr, "parts", ())]
    found = {leaf for part in inner if part is not None for leaf in _leaves(part)}
    return found or {expr}


@pytest.mark.parametrize(
    "parts",
    [
        [box(X, (0, 3)), box(X, (2, 4))],
        [box(X, (0, 2))],
        [box(X, (0, 2)), box(X, (0, 2))],
        [box(X, (0, 2), (0, 3)), box(X, (2, 4), (3, 6))],
        [box(X, 0), box(X, 0), box(X, (2, 4))],
        [box(X, 0, (0, 3)), box(X, (0, 2), (3, 6)), box(X, (2, 4)), box(X, 2, (0, 3))],
        [box(X, (0, 2)), box(X, (2, 4), (0, 3)), box(X, (2, 4), (0, 3))],
        [build.take(X, (0, 1, 2))],
        [build.take(X, (0, 1, 2, 3, 3))],
        [build.narrow(build.reshape(X, (3, 8)), 1, 0, 5)],
        [build.reshape(X, (3, 8)), build.reshape(X, (3, 8))],
        [build.cast(X, "bfloat16")],
        [build.cast(X, "int64")],
        [build.concat([X, build.full(TensorSpec([2, 6], "float32"), 0.0)])],
        [build.noise(TensorSpec([2], "float32"))],
        [build.live("x", TensorSpec([2], "float32"))],
        [build.call("operator:neg", [X], TensorSpec([4, 6], "float32"))],
        [X, build.read(FAR, "w", TensorSpec([4, 6], "float32"), 128)],
    ],
)
def test_what_has_no_way_back_is_refused_before_anything_is_saved(parts: list[Expr]) -> None:
    plan = StateDictPlan({f"k{n}": part for n, part in enumerate(parts)})
    with pytest.raises(RuleError) as caught:
        restored(plan)
    assert caught.value.keys
    assert set(caught.value.keys) <= set(plan)


def test_names_of_one_stored_tensor_are_restored_each() -> None:
    """As in a `.bin` of a tied model, where both keys are a Read under the first name."""
    embed, head = read([2, 3], name="embed"), live(StateDictPlan({"head": read([2, 3])}))["head"]
    tied = StateDictPlan({"head": embed, "embed": embed, "n": read([2], name="n")})
    assert restored(tied)(tied) == tied
    assert restored(tied)(live(tied)) == live(tied)  # untied since: nothing is lost
    wide = StateDictPlan({key: build.cast(expr, "float64") for key, expr in tied.items()})
    assert restored(wide)(wide) == tied
    joined = StateDictPlan({key: build.concat([embed, read([2, 3], name="n")]) for key in ("embed", "x")})
    assert set(restored(joined)(joined)) == {"embed", "n"}
    one = StateDictPlan({**live(tied), "head": live(tied)["embed"]})
    assert restored(tied)(one) == one
    named = StateDictPlan({f"model.{key}": expr for key, expr in tied.items()})
    assert restored(named)(named) == StateDictPlan({"embed": embed, "n": tied["n"]})
    with pytest.raises(RuleError) as caught:
        restored(named)(StateDictPlan({**live(named), "model.head": head}))
    assert (set(caught.value.keys), caught.value.name) == ({"model.embed", "model.head"}, "embed")


def test_a_second_name_that_is_another_stored_tensor_s_is_refused() -> None:
    embed = read([2, 3], name="embed")
    plan = StateDictPlan({"head": embed, "embed": embed, "other": read([2, 3], name="head")})
    with pytest.raises(RuleError) as caught:
        restored(plan)
    assert set(caught.value.keys) == {"head", "other"}


def test_two_files_with_one_name_are_told_apart() -> None:
    plan = StateDictPlan({"a": X, "b": build.read(FAR, "w", TensorSpec([4, 6], "float32"), 128)})
    with pytest.raises(RuleError) as caught:
        restored(plan)
    assert (caught.value.keys, caught.value.name) == (("a", "b"), "w")


def test_the_keys_must_be_those_that_were_loaded() -> None:
    back = restored(stored({"a": (2,), "b": (2,)}))
    with pytest.raises(RuleError) as caught:
        back(live(stored({"a": (2,), "c": (2,)})))
    assert (caught.value.missing, caught.value.unknown) == (("b",), ("c",))
    with pytest.raises(RuleError) as caught:
        back(live(stored({"a": (2,), "b": (3,)})))
    assert caught.value.keys == ("b",)


def test_an_exact_cast_is_undone_and_a_rounding_one_only_when_asked() -> None:
    x = read([2, 3], "bfloat16")
    wide = StateDictPlan({"x": build.cast(x, "float32")})
    assert restored(wide)(wide) == StateDictPlan({"w": x})
    assert restored(wide)(live(wide))["w"] == build.cast(live(wide)["x"], "bfloat16")
    narrow = StateDictPlan({"x": build.cast(X, "bfloat16")})
    assert spec_of(restored(narrow, rounding="cast")(live(narrow))["w"]) == spec_of(X)


def test_a_module_in_a_wider_dtype_goes_back_to_the_stored_one() -> None:
    loaded = StateDictPlan({"w": read([2], "bfloat16")})
    wide, other = (StateDictPlan({"w": build.live("w", TensorSpec([2], d))}) for d in ("float32", "float16"))
    assert restored(loaded)(wide)["w"] == build.cast(wide["w"], "bfloat16")
    with pytest.raises(RuleError) as caught:
        restored(loaded)(other)
    assert caught.value.keys == ("w",)
    assert restored(loaded, rounding="cast")(other)["w"] == build.cast(other["w"], "bfloat16")
