"""Laws 36 to 40, and pain-law 13: what is saved is what is read, whoever reads it, and always the same bytes."""

import os
import random
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from funcmodel.errors import TieConflictError
from funcmodel.plan.saving import plan_save
from funcmodel.records.expressions import Expr, Live
from funcmodel.records.module import TiedGroup
from funcmodel.records.plans import StateDictPlan
from funcmodel.records.tensors import TensorSpec
from funcmodel.run.evaluate import materialize
from funcmodel.run.existing import existing_checkpoint
from funcmodel.run.scan import scan, scan_checkpoint
from funcmodel.run.tensors import TORCH_DTYPES, tensor_spec
from funcmodel.run.write import write

STORABLE = sorted((t for d, t in TORCH_DTYPES.items() if d.safetensors and d.pack == 1), key=str)
NAMES = st.one_of(
    st.lists(st.sampled_from(["model", "layers", "0", "9", "10", "weight", "bias"]), min_size=1, max_size=4).map(
        ".".join
    ),
    st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1, max_size=8).filter(
        lambda name: name != "__metadata__"
    ),
)
LIMITS = st.one_of(st.none(), st.integers(0, 400))


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """A tensor of any storable dtype with random bits, contiguous or not."""
    kind = draw(st.sampled_from(STORABLE))
    shape = draw(st.lists(st.integers(0, 5), max_size=3))
    count = int(torch.Size(shape).numel())
    width = torch.empty((), dtype=kind).element_size()
    bits = draw(st.binary(min_size=count * width, max_size=count * width))
    if kind is torch.bool:
        bits = bytes(b & 1 for b in bits)
    flat = torch.frombuffer(bytearray(bits), dtype=torch.uint8).view(kind) if bits else torch.empty(0, dtype=kind)
    tensor = flat.reshape(shape)
    match draw(st.sampled_from(["plain", "turned", "parameter"])):
        case "turned":
            return tensor.reshape(shape[::-1]).permute(tuple(reversed(range(len(shape)))))
        case "parameter" if kind.is_floating_point and width > 1:
            return torch.nn.Parameter(tensor)
    return tensor


STATE_DICTS = st.dictionaries(NAMES, tensors(), max_size=8)


def plan_of(state: Mapping[str, Tensor]) -> StateDictPlan:
    return StateDictPlan({key: Live(key, tensor_spec(tensor)) for key, tensor in state.items()})


def save(state: Mapping[str, Tensor], into: Path, limit: int | None) -> None:
    write(
        plan_save(plan_of(state), max_shard_size=limit, existing=existing_checkpoint(into)),
        into,
        live=state,
        durability="none",
    )


def reshard(source: Path, into: Path, limit: int | None) -> None:
    plan = plan_save(scan(source), max_shard_size=limit, existing=existing_checkpoint(into))
    write(plan, into, durability="none")


def by_safetensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in scan_checkpoint(folder).files:
        held = safetensors.torch.load_file(file.path)
        assert not found.keys() & held.keys()
        found |= held
    return found


def bits(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    """Equality of bits: NaNs too."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return tensor.dtype, tuple(tensor.shape), bytes(flat.tolist())


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(bits(a[key]) == bits(b[key]) for key in a)


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in os.listdir(folder)}


def test_the_strategy_draws_every_dtype_and_layout() -> None:
    seen: set[object] = set()

    @settings(max_examples=400, database=None, derandomize=True)
    @given(tensors())
    def draw(tensor: Tensor) -> None:
        seen.update((tensor.dtype, tensor.is_contiguous(), type(tensor), tensor.ndim, tensor.numel() == 0))

    draw()
    assert seen >= {*STORABLE, True, False, torch.nn.Parameter, Tensor, 2, 3}


@given(STATE_DICTS)
def test_law_36_two_values_for_one_tie_raise(state: dict[str, Tensor]) -> None:
    """plan_save(d, tied=(a, b)) raises where d[a] != d[b], and drops b where they are equal."""
    entries: dict[str, Expr] = dict(plan_of(state))
    leaf = Live("x", TensorSpec((2,), "float32"))
    group = TiedGroup(("tie.a", "tie.b"))
    tied = plan_save({**entries, "tie.a": leaf, "tie.b": leaf}, tied=[group], max_shard_size=None).actions[0]
    assert set(tied.entries) == {*entries, "tie.a"}  # type: ignore[union-attr]
    for aliases in ("alias", "copy", "raise"):
        with pytest.raises(TieConflictError):
            plan_save({**entries, "tie.a": leaf, "tie.b": Live("y", leaf.spec)}, tied=[group], aliases=aliases)  # type: ignore[arg-type]


@given(STATE_DICTS, LIMITS)
def test_law_37_load_after_save_is_the_identity(state: dict[str, Tensor], limit: int | None) -> None:
    """materialize(scan(save(d, limit))) ~ d."""
    with tempfile.TemporaryDirectory() as folder:
        save(state, Path(folder), limit)
        assert same(materialize(scan(folder)), state)


@given(STATE_DICTS, LIMITS, LIMITS)
def test_law_38_resharding_forgets(state: dict[str, Tensor], a: int | None, b: int | None) -> None:
    """save(b) . load . save(a) = save(b), byte for byte."""
    with tempfile.TemporaryDirectory() as folder:
        first, second, direct = (Path(folder) / name for name in ("first", "second", "direct"))
        save(state, first, a)
        reshard(first, second, b)
        save(state, direct, b)
        assert contents(second) == contents(direct)


@given(STATE_DICTS, LIMITS, st.randoms(use_true_random=False))
def test_law_39_the_same_content_is_the_same_bytes(
    state: dict[str, Tensor], limit: int | None, shuffled: random.Random
) -> None:
    """save(d, fresh) = save(reordered d, fresh); saving again gives the same tensor bytes under other names."""
    items = list(state.items())
    shuffled.shuffle(items)
    with tempfile.TemporaryDirectory() as folder:
        one, two = Path(folder) / "one", Path(folder) / "two"
        save(state, one, limit)
        save(dict(items), two, limit)
        fresh = contents(two)
        assert contents(one) == fresh
        reshard(two, two, limit)
        again = contents(two)
        assert sorted(v for k, v in again.items() if k.endswith(".safetensors")) == sorted(
            v for k, v in fresh.items() if k.endswith(".safetensors")
        )


@given(STATE_DICTS, LIMITS)
def test_law_40_safetensors_reads_what_we_write(state: dict[str, Tensor], limit: int | None) -> None:
    """safetensors.load(save(d)) ~ d."""
    with tempfile.TemporaryDirectory() as folder:
        save(state, Path(folder), limit)
        assert same(by_safetensors(Path(folder)), state)


@given(STATE_DICTS)
def test_law_40_and_we_read_what_safetensors_writes(state: dict[str, Tensor]) -> None:
    """materialize(scan(safetensors.save(d))) ~ d, and both write the same data."""
    plain = {key: tensor.detach().contiguous() for key, tensor in state.items()}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "theirs.safetensors"
        safetensors.torch.save_file(plain, file, {"format": "pt"})
        assert same(materialize(scan(file)), state)
        save(state, Path(folder) / "ours", None)
        ours = (Path(folder) / "ours" / "model.safetensors").read_bytes()
        assert data(ours) == data(file.read_bytes())


def data(file: bytes) -> bytes:
    return file[8 + struct.unpack("<Q", file[:8])[0] :]


@given(STATE_DICTS, LIMITS)
def test_equal_plans_are_saved_equally(state: dict[str, Tensor], limit: int | None) -> None:
    """a = b implies plan_save(a) = plan_save(b), although equality of plans does not see the order of keys."""
    plan = plan_of(state)
    turned = StateDictPlan(dict(reversed(plan.items())))
    assert turned == plan
    assert plan_save(turned, max_shard_size=limit) == plan_save(plan, max_shard_size=limit)


@given(STATE_DICTS, LIMITS, LIMITS)
def test_a_save_never_reuses_a_name_of_the_old_shards(
    state: dict[str, Tensor], before: int | None, after: int | None
) -> None:
    """names(new shards) and names(old checkpoint) are disjoint, and what is left is what the new one lists."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(state, folder, before)
        old = set(os.listdir(folder))
        plan = plan_save(plan_of(state), max_shard_size=after, existing=existing_checkpoint(folder))
        written = {file.path.rpartition("/")[2] for file in write(plan, folder, live=state, durability="none").files}
        assert not written & old - {"model.safetensors"}
        assert set(os.listdir(folder)) - {"model.safetensors.index.json"} == written
        assert same(by_safetensors(folder), state)
