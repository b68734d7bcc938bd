"""Digests: recorded at a save, compared by `verify` and before a load, and never in the way of other readers."""

import hashlib
import json
import os
from collections.abc import Callable
from errno import ENOSPC
from pathlib import Path

import pytest
import torch
from attrs import evolve
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import funcmodel as fm
from funcmodel.cli import main
from funcmodel.core.folder import choose, leftovers
from funcmodel.core.wire import render_header
from funcmodel.records.actions import WriteShard
from funcmodel.records.plans import SavePlan
from funcmodel.run.files import Hashed, SourceFile
from funcmodel.run.filesystem import REAL
from funcmodel.run.formats import FORMATS, SAFETENSORS
from funcmodel.run.legacy_torch import legacy_torch
from tests.benchmarks.saving import LIMIT, anonymous, peak_of

STATE = {
    "a.weight": torch.arange(2400, dtype=torch.float32).reshape(40, 60),
    "a.half": torch.arange(7).to(torch.bfloat16),
    "eight": torch.arange(-4, 4).to(torch.float8_e4m3fn),
    "flags": torch.tensor([True, False, True]),
    "none": torch.empty(0, 3),
    "one": torch.tensor(-0.0),
    "steps": torch.tensor(7),
    "turned": torch.arange(12.0).reshape(3, 4).t(),
}
WHOLE, SHARDS = None, "5KB"


def raw(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def flip(path: str | Path, at: int, bit: int = 0) -> None:
    """Flip one bit of a file."""
    data = bytearray(Path(path).read_bytes())
    data[at] ^= 1 << bit
    Path(path).write_bytes(data)


def place(checkpoint: fm.CheckpointSpec, key: str) -> tuple[str, fm.StoredTensor]:
    return next((file.path, file.tensors[key]) for file in checkpoint.files if key in file.tensors)


def damaged(folder: Path, key: str) -> str:
    """Flip a bit in the middle of one tensor; the file in which it lies."""
    path, stored = place(fm.scan_checkpoint(folder), key)
    flip(path, (stored.start + stored.stop) // 2, 3)
    return path


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 3))


def bits(module: nn.Module) -> dict[str, tuple[int, int, bytes]]:
    return {key: (id(t), t.data_ptr(), raw(t)) for key, t in module.state_dict(keep_vars=True).items()}


# -- what is recorded --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [WHOLE, SHARDS])
def test_the_digest_is_that_of_the_bytes_that_safetensors_reads(tmp_path: Path, limit: str | None) -> None:
    saved = fm.save(STATE, tmp_path, digests="sha256", max_shard_size=limit)
    assert saved == fm.scan_checkpoint(tmp_path)
    assert len(saved.files) == (1 if limit is None else 3)
    for file in saved.files:
        tensors = load_file(file.path)
        with safe_open(file.path, "pt") as theirs:
            metadata = theirs.metadata()
        assert metadata["format"] == "pt"
        assert metadata.keys() == {"format", "sha256:", *(f"sha256:{key}" for key in tensors)}
        for key, tensor in tensors.items():
            assert raw(tensor) == raw(STATE[key])
            assert metadata[f"sha256:{key}"] == sha256(raw(tensor))


def test_equal_plans_save_equal_bytes_whatever_the_bytes_come_from(tmp_path: Path) -> None:
    fm.save(STATE, tmp_path / "live", digests="sha256", max_shard_size=SHARDS)
    fm.save(dict(reversed(STATE.items())), tmp_path / "again", digests="sha256", max_shard_size=SHARDS)
    fm.save(tmp_path / "live", tmp_path / "copied", digests="sha256", max_shard_size=SHARDS)
    held = {key: fm.expr.cast(e, fm.spec_of(e).dtype) for key, e in fm.scan(tmp_path / "live").items()}
    fm.save({key: fm.expr.concat([e], 0) if fm.spec_of(e).ndim else e for key, e in held.items()}, tmp_path / "made",
            digests="sha256", max_shard_size=SHARDS)  # fmt: skip
    first = {path.name: path.read_bytes() for path in (tmp_path / "live").iterdir()}
    for other in ("again", "copied", "made"):
        assert {path.name: path.read_bytes() for path in (tmp_path / other).iterdir()} == first


def test_what_is_computed_is_hashed_as_it_is_written(tmp_path: Path) -> None:
    fm.save(STATE, tmp_path / "a")
    plan = fm.cast("float16")(fm.scan(tmp_path / "a"))
    fm.save(plan, tmp_path / "b", digests="sha256")
    assert set(fm.verify(tmp_path / "b").verified) == set(STATE)
    metadata = fm.scan_checkpoint(tmp_path / "b").files[0].metadata
    assert metadata["sha256:a.weight"] == sha256(raw(STATE["a.weight"].half()))


def test_large_tensors_are_hashed_over_many_batches(tmp_path: Path) -> None:
    state = {"big": torch.arange(5 << 20, dtype=torch.int32).t(), "small": torch.ones(3), "wide": torch.ones(1 << 20)}
    state["turned"] = torch.arange(3 << 20, dtype=torch.int32).reshape(3, -1).t()
    fm.save(state, tmp_path / "a", digests="sha256", durability="none")
    fm.save(tmp_path / "a", tmp_path / "b", digests="sha256", durability="none")
    for folder in ("a", "b"):
        metadata = fm.scan_checkpoint(tmp_path / folder).files[0].metadata
        assert {key: metadata[f"sha256:{key}"] for key in state} == {k: sha256(raw(t)) for k, t in state.items()}


def test_transformers_reads_a_model_with_digests(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    model = transformers.BertModel(config)
    fm.save(model, tmp_path, digests="sha256", max_shard_size="2KB", config=json.loads(config.to_json_string()))
    again, info = transformers.BertModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key])


def test_aliases_and_digests_do_not_meet(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    module = nn.Module()
    module.w, module.v = weight, weight
    fm.save(module, tmp_path, digests="sha256")
    checkpoint = fm.scan_checkpoint(tmp_path)
    assert fm.recorded(checkpoint) == (fm.TiedGroup(("w", "v")),)
    assert fm.verify(tmp_path).verified == ("w",)
    fm.load(module, tmp_path, digest="check")


def test_a_digest_that_is_a_tensor_s_name_records_no_alias(tmp_path: Path) -> None:
    name = sha256(raw(STATE["flags"]))
    saved = fm.save({"flags": STATE["flags"], name: STATE["steps"]}, tmp_path, digests="sha256")
    assert saved.files[0].metadata["sha256:flags"] == name
    assert fm.recorded(saved) == ()


@pytest.mark.parametrize("digests", ["none", "sha256"])
def test_a_name_that_looks_like_a_digest_is_stored_and_not_noted(tmp_path: Path, digests: str) -> None:
    value = fm.expr.live("w", fm.TensorSpec([2], "float32"))
    plan = fm.plan_save({"w": value, "sha256:w": value, "v": value}, aliases="alias", digests=digests)
    fm.apply(plan, tmp_path, live={"w": torch.ones(2)})
    assert fm.recorded(fm.scan_checkpoint(tmp_path)) == (fm.TiedGroup(("w", "v")),)
    assert set(load_file(tmp_path / "model.safetensors")) == {"sha256:w", "w"}
    assert set(fm.verify(tmp_path).verified) == ({"sha256:w", "w"} if digests == "sha256" else set())


def test_metadata_that_would_pass_for_a_digest_is_refused(tmp_path: Path) -> None:
    value = fm.expr.live("w", fm.TensorSpec([2], "float32"))
    with pytest.raises(fm.PlanError):
        fm.plan_save({"w": value}, metadata={"sha256:w": "0" * 64})
    *_, publish = fm.plan_save({"w": value}).actions
    shard = WriteShard("model.safetensors", fm.FrozenMap({"w": value}), fm.FrozenMap({"sha256:": "x"}), "sha256")
    with pytest.raises(fm.PlanError):
        fm.apply(SavePlan((shard, publish)), tmp_path, live={"w": torch.ones(2)})
    assert not list(tmp_path.iterdir())


def test_a_plan_knows_the_size_of_the_header(tmp_path: Path) -> None:
    state = {f"layers.{i}.weight": torch.ones(2) for i in range(300)}
    plans = {d: fm.plan_save({k: fm.expr.live(k, fm.TensorSpec([2], "float32")) for k in state}, digests=d)
             for d in ("none", "sha256")}  # fmt: skip
    fm.apply(plans["sha256"], tmp_path, live=state)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert fm.cost(plans["sha256"]).written == {"model.safetensors": size}
    assert fm.cost(plans["none"]).written["model.safetensors"] < size
    assert plans["none"] != plans["sha256"]
    assert fm.from_json(fm.to_json(plans["sha256"])) == plans["sha256"]
    assert "sha256" in fm.describe(plans["sha256"])
    assert "sha256" not in fm.describe(plans["none"])


# -- verify ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [WHOLE, SHARDS])
def test_verify_reports_what_it_compared(tmp_path: Path, limit: str | None) -> None:
    fm.save(STATE, tmp_path, digests="sha256", max_shard_size=limit)
    report = fm.verify(tmp_path)
    assert set(report.verified) == set(STATE)
    assert (report.unrecorded, report.whole) == ((), ())
    assert report.nbytes == sum(t.nbytes for t in STATE.values())
    fm.save(STATE, tmp_path / "plain")
    assert set(fm.verify(tmp_path / "plain").unrecorded) == set(STATE)


def test_verify_tells_everything_at_once(tmp_path: Path) -> None:
    fm.save(STATE, tmp_path, digests="sha256", max_shard_size=SHARDS)
    files = {key: damaged(tmp_path, key) for key in ("a.weight", "flags", "steps")}
    assert len(set(files.values())) > 1
    with pytest.raises(fm.DigestError) as caught:
        fm.verify(tmp_path)
    assert {(d.file, d.tensor) for d in caught.value.findings} == {(file, key) for key, file in files.items()}
    assert all(d.expected == sha256(raw(STATE[d.tensor])) != d.found for d in caught.value.findings)
    first = caught.value.findings[0]
    error = caught.value
    assert (error.code, error.file, error.tensor) == ("DIGEST", first.file, first.tensor)
    assert (error.path, error.expected, error.found) == (first.file, first.expected, first.found)


def test_a_header_that_still_parses_is_not_believed(tmp_path: Path) -> None:
    fm.save({"w": torch.empty(0, 4), "v": torch.ones(3)}, tmp_path, digests="sha256")
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"shape":[0,4]', b'"shape":[0,5]'))
    assert fm.scan(tmp_path)["w"].spec.shape == (0, 5)
    for act in (lambda: fm.verify(tmp_path), lambda: fm.materialize(fm.scan(tmp_path), digest="check")):
        with pytest.raises(fm.DigestError) as caught:
            act()
        assert [(d.code, d.tensor) for d in caught.value.findings] == [("DIGEST", None)]


def test_verify_holds_little_memory(tmp_path: Path) -> None:
    anonymous()
    for name, sizes in {"one": [96 << 20], "many": [12 << 20] * 8}.items():
        header, at = render_header({f"t{i}": fm.TensorSpec([n], "uint8") for i, n in enumerate(sizes)}, {})
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(header)
        os.truncate(path, len(header) + sum(sizes))  # sparse: it costs no disk
        fm.record_digests(path)
        fm.verify(path)
        assert peak_of(lambda path=path: fm.verify(path)) <= LIMIT
        assert len(fm.verify(path).verified) == len(at)


# -- loads that check --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("commit", ["swap", "in_place"])
@pytest.mark.parametrize("limit", [WHOLE, "3KB"])
def test_a_flipped_bit_leaves_the_module_untouched(tmp_path: Path, commit: str, limit: str | None) -> None:
    fm.save(net(), tmp_path, digests="sha256", max_shard_size=limit)
    module = nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 3))
    assert fm.load(module, tmp_path, commit=commit, digest="check") is module
    assert {k: raw(t) for k, t in module.state_dict().items()} == {k: raw(t) for k, t in net().state_dict().items()}
    path = damaged(tmp_path, "1.weight")
    before = bits(module)
    with pytest.raises(fm.DigestError) as caught:
        fm.load(module, tmp_path, commit=commit, digest="check")
    assert (caught.value.code, caught.value.file, caught.value.tensor) == ("DIGEST", path, "1.weight")
    assert bits(module) == before
    fm.load(module, tmp_path, commit=commit)  # nobody asked
    assert bits(module) != before


def test_a_plan_made_before_the_flip_is_refused_too(tmp_path: Path) -> None:
    module = net()
    fm.save(module, tmp_path, digests="sha256")
    plan = fm.checked(fm.plan_load(fm.module_spec(module), fm.scan(tmp_path)))
    fm.apply(plan, module, digest="check")
    path = damaged(tmp_path, "0.bias")
    with pytest.raises(fm.DigestError) as caught:
        fm.apply(plan, module, commit="in_place", digest="check", preflight="read")
    assert (caught.value.file, caught.value.tensor) == (path, "0.bias")


def test_the_whole_tensor_counts_where_a_part_is_wanted_and_no_other_does(tmp_path: Path) -> None:
    fm.save(STATE, tmp_path, digests="sha256")
    part = {"x": fm.expr.narrow(fm.scan(tmp_path)["a.weight"], 0, 0, 2)}
    path, stored = place(fm.scan_checkpoint(tmp_path), "a.weight")
    flip(path, stored.stop - 1)
    with pytest.raises(fm.DigestError) as caught:
        fm.materialize(part, digest="check")
    assert caught.value.tensor == "a.weight"
    others = fm.drop("a.weight")(fm.scan(tmp_path))
    assert fm.materialize(others, digest="check").keys() == others.keys()


def test_nothing_is_written_or_given_before_everything_was_compared(tmp_path: Path) -> None:
    fm.save(STATE, tmp_path, digests="sha256", max_shard_size=SHARDS)
    plan = fm.scan(tmp_path)
    into = {key: torch.zeros_like(t).contiguous() for key, t in STATE.items()}
    fm.fill(plan, into, digest="check")
    assert {k: raw(t) for k, t in into.items()} == {k: raw(t) for k, t in STATE.items()}
    assert {k: raw(t) for k, t in fm.stream(plan, digest="check")} == {k: raw(t) for k, t in STATE.items()}
    damaged(tmp_path, list(plan)[-1])
    into = {key: torch.zeros_like(t).contiguous() for key, t in STATE.items()}
    with pytest.raises(fm.DigestError):
        fm.fill(plan, into, digest="check")
    assert not any(any(raw(t)) for t in into.values())
    with pytest.raises(fm.DigestError):
        next(fm.stream(plan, digest="check"))


def test_ties_that_must_agree_are_compared_as_well(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(40, 50, bias=False)
            self.b = nn.Linear(40, 50, bias=False)
            self.b.weight = self.a.weight

    module = Tied()
    fm.save(module, tmp_path, aliases="copy", digests="sha256")
    for commit in ("swap", "in_place"):
        fm.load(module, tmp_path, commit=commit, digest="check")
    damaged(tmp_path, "b.weight")
    for commit in ("swap", "in_place"):
        before = bits(module)
        with pytest.raises(fm.DigestError) as caught:
            fm.load(module, tmp_path, commit=commit, digest="check")
        assert caught.value.tensor == "b.weight"
        assert bits(module) == before


def test_what_was_found_sound_is_hashed_again_in_a_file_that_changed(tmp_path: Path) -> None:
    fm.save(STATE, tmp_path, digests="sha256")
    plan, hashed = fm.scan(tmp_path), Hashed()
    fm.materialize(plan, digest=hashed)
    assert len(hashed.sound) == len(STATE)
    damaged(tmp_path, "flags")
    with pytest.raises(fm.DigestError):
        fm.materialize(plan, digest=hashed)


def test_nothing_recorded_is_an_error_of_its_own(tmp_path: Path) -> None:
    fm.save(net(), tmp_path)
    module = net()
    with pytest.raises(fm.DigestError) as caught:
        fm.load(module, tmp_path, digest="check")
    assert caught.value.code == "DIGEST_MISSING"
    assert {d.tensor for d in caught.value.findings} == set(net().state_dict())


def test_a_leaf_that_names_one_tensor_and_reads_another_has_no_digest(tmp_path: Path) -> None:
    fm.save({"a": torch.ones(4), "b": torch.zeros(4)}, tmp_path, digests="sha256")
    plan = fm.scan(tmp_path)
    with pytest.raises(fm.DigestError) as caught:
        fm.materialize({"x": evolve(plan["a"], offset=plan["b"].offset)}, digest="check")
    assert (caught.value.code, caught.value.tensor) == ("DIGEST_MISSING", "a")


@pytest.mark.parametrize("act", [
    lambda path: fm.load(net(), path, digest="yes"),
    lambda path: fm.materialize(fm.scan(path), digest="sha256"),
    lambda path: fm.save(path, path / "out", digest="sha256"),
    lambda path: fm.save(path, path / "out", digests="check"),
])  # fmt: skip
def test_an_unknown_choice_is_refused(tmp_path: Path, act: Callable[[Path], object]) -> None:
    fm.save(net(), tmp_path, digests="sha256")
    with pytest.raises(ValueError, match="digest"):
        act(tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_a_rewrite_checks_its_sources_first(tmp_path: Path, dtype: str | None) -> None:
    def rewrite(into: Path) -> None:
        plan = fm.scan(tmp_path)
        fm.save(fm.cast(dtype)(plan) if dtype else plan, into, max_shard_size="2KB", digests="sha256", digest="check")

    fm.save(STATE, tmp_path, digests="sha256", max_shard_size=SHARDS)
    rewrite(tmp_path / "out")
    assert set(fm.verify(tmp_path / "out").verified) == set(STATE)
    damaged(tmp_path, "a.weight")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    for into in (tmp_path, tmp_path / "new"):
        with pytest.raises(fm.DigestError) as caught:
            rewrite(into)
        assert caught.value.tensor == "a.weight"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    assert not (tmp_path / "new").exists()


# -- digests beside a file ---------------------------------------------------------------------------------------------


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A checkpoint that somebody else wrote."""
    save_file({key: t.contiguous() for key, t in STATE.items()}, tmp_path / "model.safetensors")
    return tmp_path


def beside(path: str) -> dict[str, str]:
    """The digests that a file holds, which must each be those of the bytes from their first to their last."""
    found = json.loads(Path(path).read_text("utf-8"))["sha256"]
    return {name: digest for name, (_, _, digest) in found.items()}


def test_digests_of_a_foreign_file_are_recorded_beside_it(foreign: Path) -> None:
    before = (foreign / "model.safetensors").read_bytes()
    (path,) = fm.record_digests(foreign)
    assert path == str(foreign / "model.safetensors.digests.json")
    assert sorted(p.name for p in foreign.iterdir()) == ["model.safetensors", "model.safetensors.digests.json"]
    assert (foreign / "model.safetensors").read_bytes() == before
    assert beside(path) == {k: sha256(raw(t)) for k, t in STATE.items()}
    assert set(fm.verify(foreign).verified) == set(STATE)
    assert fm.materialize(fm.scan(foreign), digest="check").keys() == STATE.keys()
    damaged(foreign, "a.weight")
    for act in (lambda: fm.verify(foreign), lambda: fm.materialize(fm.scan(foreign), digest="check")):
        with pytest.raises(fm.DigestError) as caught:
            act()
        assert [(d.code, d.tensor) for d in caught.value.findings] == [("DIGEST", "a.weight")]


def test_digests_beside_a_file_are_no_weights(foreign: Path) -> None:
    fm.record_digests(foreign)
    names = os.listdir(foreign)
    assert choose(names) == choose(["model.safetensors"])
    assert leftovers(names, ["model.safetensors"]) == ()
    found = fm.scan_checkpoint(foreign)
    assert (found.ignored, found.digests) == ((), ("model.safetensors.digests.json",))
    assert "digests" in fm.describe(found)


@pytest.mark.parametrize("limit", [WHOLE, SHARDS])
def test_a_save_over_the_file_removes_what_was_recorded_beside_it(foreign: Path, limit: str | None) -> None:
    fm.record_digests(foreign)
    (foreign / "other.safetensors.digests.json").write_text("{}")
    fm.save({key: t.clone() for key, t in STATE.items()}, foreign, max_shard_size=limit)
    left = {name for name in os.listdir(foreign) if name.endswith(".digests.json")}
    assert left == {"other.safetensors.digests.json"}
    assert set(fm.verify(foreign).unrecorded) == set(STATE)


def test_digests_of_another_file_of_that_name_are_stale(foreign: Path) -> None:
    fm.record_digests(foreign)
    save_file({"w": torch.ones(3)}, foreign / "model.safetensors")
    for act in (lambda: fm.verify(foreign), lambda: fm.materialize(fm.scan(foreign), digest="check")):
        with pytest.raises(fm.DigestError) as caught:
            act()
        assert [(d.code, d.tensor) for d in caught.value.findings] == [("DIGEST_STALE", None)]
    fm.record_digests(foreign)
    assert fm.verify(foreign).verified == ("w",)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (b"", "BAD_JSON"),
        (b"\xff", "BAD_UTF8"),
        (b"[]", "DIGEST_FIELDS"),
        (b'{"nbytes": 1, "fingerprint": "", "sha256": []}', "DIGEST_FIELDS"),
        (b'{"nbytes": 1, "fingerprint": "", "sha256": {"a": "no"}}', "DIGEST_FIELDS"),
        (b'{"nbytes": 1, "fingerprint": "", "sha256": {"a": [0, 1, "no"]}}', "DIGEST_FIELDS"),
        (b'{"nbytes": 1, "fingerprint": "", "sha256": {"a": [0, 2, "' + b"0" * 64 + b'"]}}', "DIGEST_FIELDS"),
        (b'{"nbytes": 1, "fingerprint": "", "sha256": {"a": [-1, 0, "' + b"0" * 64 + b'"]}}', "DIGEST_FIELDS"),
        (b'{"nbytes": [], "fingerprint": {}, "sha256": {}}', "DIGEST_STALE"),
        (b'{"nbytes": 1, "fingerprint": "", "sha256": {"a": 1, "a": 2}}', "DUPLICATE_KEY"),
        (b"[" * 100_000, "JSON_DEPTH"),
        (b'{"nbytes": ' + b"9" * 5000 + b"}", "INT_TOO_LONG"),
    ],
)
def test_a_malformed_record_is_a_typed_error(foreign: Path, text: bytes, code: str) -> None:
    (foreign / "model.safetensors.digests.json").write_bytes(text)
    with pytest.raises(fm.DigestError) as caught:
        fm.verify(foreign)
    assert caught.value.code == code
    stale = code == "DIGEST_STALE"
    assert caught.value.file == str(foreign / "model.safetensors") + ".digests.json" * (not stale)
    assert caught.value.found


def test_what_raised_limits_let_in_is_compared_too(tmp_path: Path) -> None:
    path, name = tmp_path / "model.safetensors", "n" * 5000
    save_file({name: torch.ones(3)}, path)
    limits = fm.Limits(name_chars=5000, ndim=65)
    (side,) = fm.record_digests(path, limits=limits)
    assert fm.materialize(fm.scan(path, limits=limits), digest="check")[name].tolist() == [1, 1, 1]
    assert fm.verify(path, limits=limits).verified == (name,)
    few = fm.Limits(name_chars=5000, index_bytes=os.path.getsize(side) - 1)
    with pytest.raises(fm.DigestError) as caught:
        fm.verify(path, limits=few)
    assert (caught.value.code, caught.value.file) == ("INDEX_TOO_LARGE", side)
    header = json.dumps({"w": {"dtype": "F32", "shape": [1] * 65, "data_offsets": [0, 4]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0\x80?")
    fm.record_digests(path, limits=limits)
    assert fm.verify(path, limits=limits).verified == ("w",)
    flip(path, path.stat().st_size - 1)
    with pytest.raises(fm.DigestError) as caught:
        fm.verify(path, limits=limits)
    assert caught.value.tensor == "w"


def test_a_record_that_is_a_link_out_of_the_folder_or_no_file_is_refused(foreign: Path) -> None:
    side = foreign / "model.safetensors.digests.json"
    for make in (lambda: side.symlink_to("/etc/passwd"), lambda: os.mkfifo(side)):
        make()
        with pytest.raises(fm.UnsafePathError):
            fm.verify(foreign)
        side.unlink()


def test_recording_is_whole_or_not_at_all(foreign: Path) -> None:
    fm.record_digests(foreign)
    side = foreign / "model.safetensors.digests.json"
    save_file({"w": torch.ones(3)}, foreign / "model.safetensors")
    before = side.read_bytes()

    def full(*_: object) -> int:
        raise OSError(ENOSPC, "full")

    for call in ("open", "pwritev", "fsync", "replace"):
        with pytest.raises(fm.SaveError) as caught:
            fm.record_digests(foreign, filesystem=evolve(REAL, **{call: full}))
        assert caught.value.committed == "no"
        assert side.read_bytes() == before
        assert len(list(foreign.iterdir())) == 2
    one_byte = evolve(REAL, pwritev=lambda fd, buffers, at: os.pwritev(fd, [buffers[0][:1]], at))
    fm.record_digests(foreign, filesystem=one_byte)
    assert fm.verify(foreign).verified == ("w",)


def test_files_that_record_digests_themselves_are_left_alone(tmp_path: Path) -> None:
    fm.save(STATE, tmp_path, digests="sha256", max_shard_size=SHARDS)
    assert fm.record_digests(tmp_path) == ()


# -- the cache of huggingface_hub, and formats with checks of their own ------------------------------------------------


def snapshot(root: Path, blob: str | None = None) -> Path:
    """A model as huggingface_hub keeps it: links in a snapshot, blobs named by their hash."""
    blobs, folder = root / "models--x" / "blobs", root / "models--x" / "snapshots" / "0a1b"
    blobs.mkdir(parents=True)
    folder.mkdir(parents=True)
    save_file({key: t.contiguous() for key, t in STATE.items()}, root / "new")
    name = blob or sha256((root / "new").read_bytes())
    (root / "new").rename(blobs / name)
    (folder / "model.safetensors").symlink_to(f"../../blobs/{name}")
    return folder


def test_a_blob_is_compared_with_its_name(tmp_path: Path) -> None:
    folder = snapshot(tmp_path)
    path = str(folder / "model.safetensors")
    report = fm.verify(folder)
    assert set(report.verified) == set(STATE)
    assert report.whole == (path,)
    assert report.nbytes == os.stat(path).st_size
    assert fm.record_digests(folder) == ()
    assert fm.materialize(fm.scan(folder), digest="check").keys() == STATE.keys()
    flip(path, os.stat(path).st_size - 1)
    for act in (lambda: fm.verify(folder), lambda: fm.materialize(fm.scan(folder), digest="check")):
        with pytest.raises(fm.DigestError) as caught:
            act()
        assert [(d.code, d.file, d.tensor) for d in caught.value.findings] == [("DIGEST", path, None)]
        assert caught.value.expected == os.path.basename(os.path.realpath(path))


def test_a_blob_with_git_s_name_is_not_compared(tmp_path: Path) -> None:
    folder = snapshot(tmp_path, "ab" * 20)
    assert set(fm.verify(folder).unrecorded) == set(STATE)
    with pytest.raises(fm.DigestError) as caught:
        fm.materialize(fm.scan(folder), digest="check")
    assert caught.value.code == "DIGEST_MISSING"


def test_a_format_s_own_check_counts(foreign: Path) -> None:
    def sound(file: SourceFile) -> tuple[fm.Damage, ...]:
        assert file.nbytes
        return ()

    def broken(file: SourceFile) -> tuple[fm.Damage, ...]:
        raise fm.CheckpointError("no", code="BIN_CRC", path=file.path, key="flags")

    report = fm.verify(foreign, formats=(evolve(SAFETENSORS, verify=sound),))
    assert set(report.verified) == set(STATE)
    assert report.whole == (str(foreign / "model.safetensors"),)
    with pytest.raises(fm.DigestError) as caught:
        fm.verify(foreign, formats=(evolve(SAFETENSORS, verify=broken),))
    assert (caught.value.code, caught.value.tensor) == ("BIN_CRC", "flags")

    def damages(file: SourceFile) -> tuple[fm.Damage, ...]:
        return tuple(fm.Damage(file.path, name, "BIN_CRC", "record 1", "record 2") for name in STATE)

    with pytest.raises(fm.DigestError) as caught:
        fm.verify(foreign, formats=(evolve(SAFETENSORS, verify=damages),))
    assert {(d.tensor, d.expected, d.found) for d in caught.value.findings} == {
        (name, "record 1", "record 2") for name in STATE
    }


def test_a_zip_of_torch_is_compared_with_its_checksums_or_with_what_is_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    base = torch.arange(600.0).reshape(20, 30)
    state = {"a": base, "b": base, "part": base[3:7], "turned": base.t(), "n": torch.arange(9)}
    torch.save({"model": state, "step": 3}, path)

    def materialized() -> dict[str, Tensor]:
        return fm.materialize(fm.scan(path, key="model"), digest="check")

    at = path.read_bytes().index(raw(base)) + 3 * 120 + 5  # in all that share the storage
    for beside in (False, True):
        if beside:
            assert fm.record_digests(path, key="model") == (f"{path}.digests.json",)
        report = fm.verify(path, key="model")
        assert set(report.verified) == state.keys()
        assert report.nbytes == path.stat().st_size
        assert {key: raw(t) for key, t in materialized().items()} == {key: raw(t) for key, t in state.items()}
        flip(path, at)
        for act in (lambda: fm.verify(path, key="model"), materialized):
            with pytest.raises(fm.DigestError) as caught:
                act()
            assert {d.tensor for d in caught.value.findings} >= {"a", "part"}
            assert "n" not in {d.tensor for d in caught.value.findings}
        flip(path, at)


def test_bytes_are_hashed_as_tensors_hold_them(foreign: Path) -> None:
    def inverted(file: SourceFile, buffer: memoryview, offset: int) -> None:
        file.read_into(buffer, offset)
        buffer[:] = bytes(255 - b for b in buffer)

    path = foreign / "model.safetensors"
    path.rename(path.with_suffix(".inverted"))
    formats = (evolve(SAFETENSORS, name="inverted", suffix=".inverted", read=inverted), *FORMATS)
    (side,) = fm.record_digests(path.with_suffix(".inverted"), formats=formats)
    values = fm.materialize(fm.scan(path.with_suffix(".inverted"), formats=formats), formats=formats, digest="check")
    assert beside(side) == {k: sha256(raw(t)) for k, t in values.items()}


def test_a_file_that_must_be_decoded_is_hashed_decoded(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    state = {"w": torch.arange(40.0).reshape(5, 8), "n": torch.arange(3)}
    torch.save(state, path, _use_new_zipfile_serialization=False)
    formats = (legacy_torch(".pt"),)
    (side,) = fm.record_digests(path, formats=formats)
    assert beside(side) == {key: sha256(raw(t)) for key, t in state.items()}
    assert set(fm.verify(path, formats=formats).verified) == state.keys()
    found = fm.materialize(fm.scan(path, formats=formats), formats=formats, digest="check")
    assert {key: raw(t) for key, t in found.items()} == {key: raw(t) for key, t in state.items()}


def test_a_report_is_a_short_table() -> None:
    report = fm.VerifyReport(path="net", verified=("a.0", "a.1"), unrecorded=("b",), whole=("net/x.bin",), nbytes=4000)
    assert fm.describe(report).splitlines() == [
        "verify net                                              3 keys, 4.00 KB",
        "  as recorded  2   a.{0, 1}",
        "  unrecorded   1   b   no digest to compare with",
        "  whole file   1   net/x.bin",
    ]
    assert fm.from_json(fm.to_json(report)) == report


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_exits_with_zero_only_where_everything_is_as_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fm.save(STATE, tmp_path / "plain")
    assert main(["verify", str(tmp_path / "plain")]) == 1
    assert main(["reshard", str(tmp_path / "plain"), str(tmp_path / "out"), "--digests", "sha256"]) == 0
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.rstrip() == fm.describe(fm.verify(tmp_path / "out"))
    path = damaged(tmp_path / "out", "a.weight")
    assert main(["verify", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert path in said
    assert "a.weight" in said
