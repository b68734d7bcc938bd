"""Law 47, and the machine: whatever is done to a folder, `scan` finds in it what a dict says should be there."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from attrs import frozen
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

import funcmodel as fm
from funcmodel.errors import CheckpointError, SaveError
from funcmodel.run.faults import Crash, faulty
from funcmodel.run.filesystem import FileSystem
from funcmodel.run.scan import plan_of, scan_checkpoint
from tests.transitions import LEFT, MEMORY, NONE_THERE, QUICK, content, folder

WIDTH = 4
VARIANTS = (None, "ema")
LIMITS = st.sampled_from([None, 40, 100, 200])
CALLS = st.integers(1, 45)  # a save of a few shards makes about so many

SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=5)


def tensors(sizes: list[int], base: float) -> dict[str, Tensor]:
    return {f"t{i}": torch.arange(size, dtype=torch.float32) + base + 100 * i for i, size in enumerate(sizes)}


def found(where: Path, variant: str | None = None) -> object:
    """What a scan leads to; "none" where there is no checkpoint of that variant."""
    try:
        return content(fm.materialize(fm.scan(where, variant=variant)))
    except CheckpointError as error:
        if error.code in NONE_THERE:
            return "none"
        raise


# -- law 47 ------------------------------------------------------------------------------------------------------------


@given(st.none() | SIZES, SIZES, LIMITS, LIMITS, st.sampled_from(VARIANTS), CALLS, st.sampled_from(["die", 5, 28]))
def test_law_47_a_crash_after_any_prefix_of_a_save_leaves_the_old_or_the_new_checkpoint(
    before: list[int] | None,
    after: list[int],
    old_limit: int | None,
    new_limit: int | None,
    variant: str | None,
    at: int,
    fault: int | str,
) -> None:
    """scan(crash(save(new, f), n)) in {scan(f), new}, and scan(save(next, crash(...))) = next."""
    old, new = tensors(before or [], 0), tensors(after, 1000)
    with folder() as root:
        where = root / "ckpt"
        if before is not None:
            fm.save(old, where, max_shard_size=old_limit, variant=variant, filesystem=QUICK)
        try:
            filesystem = faulty(QUICK, at, fault, persistent=True)  # type: ignore[arg-type]
            fm.save(new, where, max_shard_size=new_limit, variant=variant, filesystem=filesystem)
            expected = {content(new)}
        except SaveError as error:
            expected = {"no": {None}, "yes": {content(new)}, "unknown": {None, content(new)}}[error.committed]
        except Crash:
            expected = {None, content(new)}
        assert found(where, variant) in {
            (content(old) if before is not None else "none") if e is None else e for e in expected
        }
        following = tensors(after[::-1], 5000)
        fm.save(following, where, max_shard_size=old_limit, variant=variant, filesystem=QUICK)
        assert found(where, variant) == content(following)
        assert not [name for name in os.listdir(where) if name.startswith(LEFT)]


# -- the machine -------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """An embedding and a head that may be one tensor."""

    def __init__(self, rows: int, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(rows, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, rows, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    @property
    def tied(self) -> bool:
        return self.head.weight is self.embed.weight


@frozen
class Saved:
    """What a checkpoint should hold: a state dict without the second name of a tied tensor."""

    values: dict[str, Tensor]
    tied: bool

    @property
    def rows(self) -> int:
        return len(self.values["embed.weight"])


class Folder(RuleBasedStateMachine):
    """Saves, loads and accidents in one folder; `held` is what it should hold, by variant."""

    def __init__(self) -> None:
        super().__init__()
        self.where = Path(tempfile.mkdtemp(dir=MEMORY), "ckpt")
        self.held: dict[str | None, Saved | None] = dict.fromkeys(VARIANTS)
        self.damaged: set[str | None] = set()
        self.saves = 0

    def teardown(self) -> None:
        shutil.rmtree(self.where.parent)

    @initialize(rows=st.integers(1, 6), tied=st.booleans())
    def start(self, rows: int, tied: bool) -> None:
        self.net = Net(rows, tied)

    # -- the module

    def renewed(self) -> Saved:
        """The module with values that no save has had yet, as it is to be found."""
        self.saves += 1
        with torch.no_grad():
            for i, parameter in enumerate(self.net.parameters()):
                parameter.copy_(torch.arange(parameter.numel()).view_as(parameter) + 1000 * self.saves + 100 * i)
        state = {key: tensor.clone() for key, tensor in self.net.state_dict().items()}
        if self.net.tied:
            del state["head.weight"]
        return Saved(state, self.net.tied)

    @rule()
    def tie(self) -> None:
        self.net.head.weight = self.net.embed.weight

    @rule()
    def untie(self) -> None:
        self.net.head.weight = nn.Parameter(self.net.head.weight.detach().clone())

    # -- saves

    def write(self, source: object, variant: str | None, limit: int | None, filesystem: FileSystem = QUICK) -> None:
        fm.save(source, self.where, max_shard_size=limit, variant=variant, filesystem=filesystem)
        self.damaged.discard(variant)
        if filesystem is QUICK:  # a lock that could not be removed is nobody's
            assert not [name for name in os.listdir(self.where) if name.startswith(LEFT)]

    @rule(variant=st.sampled_from(VARIANTS), limit=LIMITS)
    def save(self, variant: str | None, limit: int | None) -> None:
        saved = self.renewed()
        self.write(self.net, variant, limit)
        self.held[variant] = saved

    @rule(
        variant=st.sampled_from(VARIANTS),
        limit=LIMITS,
        at=CALLS,
        fault=st.sampled_from(["die", 5, 28]),
        persistent=st.booleans(),
    )
    def crash(self, variant: str | None, limit: int | None, at: int, fault: int | str, persistent: bool) -> None:
        saved = self.renewed()
        try:
            self.write(self.net, variant, limit, faulty(QUICK, at, fault, persistent=persistent))  # type: ignore[arg-type]
            committed = "yes"
        except Crash:
            committed = "unknown"
        except SaveError as error:
            committed = error.committed
        if committed == "unknown":
            committed = "yes" if self.reads(variant) == content(saved.values) else "no"
        if committed == "yes":
            self.held[variant] = saved
            self.damaged.discard(variant)

    def healthy(self) -> list[str | None]:
        return [variant for variant in VARIANTS if self.held[variant] and variant not in self.damaged]

    @precondition(lambda self: self.healthy())
    @rule(data=st.data(), limit=LIMITS)
    def reshard(self, data: st.DataObject, limit: int | None) -> None:
        variant = data.draw(st.sampled_from(self.healthy()))
        self.write(fm.scan(self.where, variant=variant), variant, limit)

    @precondition(lambda self: self.healthy())
    @rule(data=st.data(), limit=LIMITS, rows=st.integers(1, 9))
    def resize(self, data: st.DataObject, limit: int | None, rows: int) -> None:
        variant = data.draw(st.sampled_from(self.healthy()))
        saved = self.held[variant]
        assert saved is not None
        keys = [key for key in ("embed.weight", "head.weight") if key in saved.values]
        steps = [fm.resize_rows(key, rows, fill=0.5) for key in keys]
        self.write(fm.pipe(fm.scan(self.where, variant=variant), *steps), variant, limit)
        more = torch.full((max(0, rows - saved.rows), WIDTH), 0.5)
        grown = {key: torch.cat([saved.values[key][:rows], more]) for key in keys}
        self.held[variant] = Saved({**saved.values, **grown}, saved.tied)

    # -- loads and damage

    @precondition(lambda self: self.healthy())
    @rule(data=st.data())
    def load(self, data: st.DataObject) -> None:
        variant = data.draw(st.sampled_from(self.healthy()))
        saved = self.held[variant]
        assert saved is not None
        self.net = fm.load(Net(saved.rows, saved.tied), fm.scan(self.where, variant=variant))
        assert self.net.tied == saved.tied
        assert all(
            torch.equal(tensor, saved.values[key])
            for key, tensor in self.net.state_dict().items()
            if key in saved.values
        )

    @precondition(lambda self: self.healthy())
    @rule(data=st.data())
    def corrupt(self, data: st.DataObject) -> None:
        """A file of the checkpoint loses its second half."""
        variant = data.draw(st.sampled_from(self.healthy()))
        checkpoint = scan_checkpoint(self.where, variant=variant)
        files = [file.path for file in checkpoint.files] + ([checkpoint.index.path] if checkpoint.index else [])
        file = data.draw(st.sampled_from(files))
        os.truncate(file, os.path.getsize(file) // 2)
        self.damaged.add(variant)

    # -- the model

    def reads(self, variant: str | None) -> object:
        try:
            return content(fm.materialize(plan_of(scan_checkpoint(self.where, variant=variant))))
        except CheckpointError as error:
            return "none" if error.code in NONE_THERE else error.code

    @invariant()
    def the_folder_holds_what_it_should(self) -> None:
        for variant in VARIANTS:
            saved = self.held[variant]
            if variant in self.damaged:
                with pytest.raises(CheckpointError):
                    fm.scan(self.where, variant=variant)
            else:
                assert self.reads(variant) == (content(saved.values) if saved else "none")


TestFolder = Folder.TestCase
TestFolder.settings = settings(stateful_step_count=20)
