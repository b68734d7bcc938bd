"""What differs between two plans, or two checkpoints."""

import pickle

from attrs import evolve

from funcmodel.core import build
from funcmodel.plan.diff import Change, Diff, diff
from funcmodel.records.checkpoint import CheckpointSpec, FileSpec, StoredTensor
from funcmodel.records.expressions import FileRef
from funcmodel.records.plans import StateDictPlan
from funcmodel.records.tensors import TensorSpec

FILE = FileRef("a/model.safetensors", "safetensors", 4096, "0" * 32)
W, B = TensorSpec([4, 8], "float32"), TensorSpec([4], "float32")


def plan(**entries: object) -> StateDictPlan:
    return StateDictPlan(entries)


def test_two_plans() -> None:
    w, b = build.read(FILE, "w", W, 128), build.read(FILE, "b", B, 64)
    before = plan(gone=b, shape=w, dtype=w, expression=w, moved=w, same=w, equal=b)
    after = plan(
        equal=build.read(FILE, "b", B, 64),
        same=w,
        moved=build.read(evolve(FILE, path="b/model.safetensors"), "w", W, 128),
        expression=build.take(w, (0, 1, 2, 2)),
        dtype=build.cast(w, "bfloat16"),
        shape=build.narrow(w, 0, 0, 2),
        new=b,
    )
    assert diff(before, after) == Diff(
        added=("new",),
        removed=("gone",),
        moved=("moved",),
        changed=(
            Change("expression", "expression", W, W),
            Change("dtype", "dtype", W, TensorSpec([4, 8], "bfloat16")),
            Change("shape", "shape", W, TensorSpec([2, 8], "float32")),
        ),
        unchanged=2,
    )


def test_a_plan_does_not_differ_from_itself() -> None:
    one = plan(w=build.read(FILE, "w", W, 128), b=build.noise(B))
    assert diff(one, pickle.loads(pickle.dumps(one))) == Diff(unchanged=2)
    assert diff(plan(), plan()) == Diff()


def checkpoint(folder: str, files: dict[str, dict[str, TensorSpec]], header: int = 100) -> CheckpointSpec:
    specs = []
    for name, tensors in files.items():
        at, held = header, {}
        for key, spec in tensors.items():
            held[key] = StoredTensor(spec, at, at + spec.nbytes)
            at += spec.nbytes
        specs.append(FileSpec(path=f"{folder}/{name}", nbytes=at, tensors=held, fingerprint=str(header)))
    return CheckpointSpec(path=folder, files=tuple(specs))


def test_two_checkpoints_compare_by_content_of_their_headers() -> None:
    one = checkpoint("a", {"1.safetensors": {"w": W, "b": B}, "2.safetensors": {"x": W}})
    assert diff(
        one, checkpoint("elsewhere", {"1.safetensors": {"w": W, "b": B}, "2.safetensors": {"x": W}}, 160)
    ) == Diff(unchanged=3)
    other = checkpoint("a", {"1.safetensors": {"w": W}, "2.safetensors": {"x": B, "b": B, "y": W}})
    assert diff(one, other) == Diff(added=("y",), moved=("b",), changed=(Change("x", "shape", W, B),), unchanged=1)
