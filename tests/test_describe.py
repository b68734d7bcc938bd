"""Plans as text, against files in `golden/`; and folding, whose result unfolds to the keys it was made from."""

from collections.abc import Callable, Iterator
from itertools import accumulate, product
from pathlib import Path

import pytest

from funcmodel.core import build
from funcmodel.plan.describe import Described, describe, fold
from funcmodel.plan.diff import diff
from funcmodel.plan.folding import fold_paths, folder
from funcmodel.plan.loading import plan_load
from funcmodel.plan.routing import routing
from funcmodel.plan.saving import plan_save
from funcmodel.records.checkpoint import CheckpointSpec, FileSpec, IndexSpec, StoredTensor
from funcmodel.records.config import Config
from funcmodel.records.devices import CPU
from funcmodel.records.expressions import Expr, FileRef, Live, Noise, Read
from funcmodel.records.mapping import FrozenMap
from funcmodel.records.module import ModuleSpec, ParamSpec, SubmoduleSpec, TiedGroup, ViewSpec
from funcmodel.records.plans import LoadPlan, SavePlan, StateDictPlan
from funcmodel.records.routes import Machine, Routing, Storage
from funcmodel.records.tensors import TensorSpec

GOLDEN = Path(__file__).parent / "golden"
FILES = [FileRef(f"llama-7b/model-{i:05}-of-00003.safetensors", "safetensors", 10**10, "ab" * 16) for i in (1, 2, 3)]
BLOCK = {
    **{f"self_attn.{name}_proj.weight": (4096, 4096) for name in "qkvo"},
    **{f"mlp.{name}_proj.weight": (11008, 4096) for name in ("gate", "up")},
    "mlp.down_proj.weight": (4096, 11008),
    **{f"{name}_layernorm.weight": (4096,) for name in ("input", "post_attention")},
}
SHAPES = {
    "model.embed_tokens.weight": (32000, 4096),
    **{f"model.layers.{i}.{name}": shape for i in range(32) for name, shape in BLOCK.items()},
    "model.norm.weight": (4096,),
}


def llama(*, score: bool = True) -> ModuleSpec:
    leaves = {key: ParamSpec(spec=TensorSpec(shape, "bfloat16")) for key, shape in SHAPES.items()}
    leaves["model.rotary_emb.inv_freq"] = ParamSpec(
        spec=TensorSpec([64], "float32"), kind="buffer", persistent=False, device=CPU, requires_grad=False
    )
    leaves["lm_head.weight"] = leaves["model.embed_tokens.weight"]
    if score:
        leaves["score.weight"] = ParamSpec(spec=TensorSpec([2, 4096], "bfloat16"))
        leaves["score.bias"] = ParamSpec(spec=TensorSpec([2], "bfloat16"))
    modules = {"": SubmoduleSpec("LlamaForCausalLM"), "score": SubmoduleSpec("Linear", "reset_parameters")}
    tied = (TiedGroup(("model.embed_tokens.weight", "lm_head.weight")),)
    return ModuleSpec(name="LlamaForCausalLM", params=leaves, modules=modules, tied=tied)


def stored(dtype: str = "bfloat16") -> dict[str, Expr]:
    specs = {key: TensorSpec(shape, dtype) for key, shape in SHAPES.items()}
    ends = accumulate((spec.nbytes for spec in specs.values()), initial=4096)
    return {
        key: Read(FILES[at * 3 // len(SHAPES)], key, spec, start)
        for at, ((key, spec), start) in enumerate(zip(specs.items(), ends, strict=False))
    }


def small() -> StateDictPlan:
    spec = TensorSpec([4, 2], "float32")
    return StateDictPlan({f"layers.{i}.{name}": Live(f"{i}.{name}", spec) for i in range(3) for name in "wb"})


def load() -> LoadPlan:
    return plan_load(llama(), stored(), device_map="cuda:0")


def load_with_findings() -> LoadPlan:
    source = stored("float32")
    source["model.embed_tokens.weight"] = Read(FILES[0], "e", TensorSpec([31990, 4096], "float32"), 4096)
    source |= {
        f"model.layers.{i}.rotary.inv_freq": Read(FILES[2], "r", TensorSpec([64], "float32"), 0) for i in range(32)
    }
    where = {"": "cpu", "model.layers.0": "disk", "model.layers.1": 0}
    return plan_load(llama(), source, device_map=where, dtype="module", init={"score.{*p}": "pkg.mod:head"})


def load_as_stored() -> LoadPlan:
    source = stored("float16")
    source["lm_head.weight"] = Read(FILES[2], "lm_head.weight", TensorSpec([32000, 4096], "float16"), 0)
    return plan_load(llama(score=False), source)


def save() -> SavePlan:
    halves = {key: build.cast(expr, "float16") for key, expr in stored().items()}
    return plan_save(StateDictPlan(halves), max_shard_size="5GB", config=Config({"model_type": "llama"}))


def state_dict() -> StateDictPlan:
    spec, entries = TensorSpec([4, 2], "float32"), dict(small().items())
    entries["fused"] = build.concat([Live("a", spec), Noise(spec, 0.0, 0.02, 1)])
    entries["half"] = build.cast(Read(FILES[0], "h", spec, 0), "float16")
    return StateDictPlan(entries)


def checkpoint() -> CheckpointSpec:
    def file(ref: FileRef, keys: list[str]) -> FileSpec:
        tensors = FrozenMap({key: StoredTensor(TensorSpec(SHAPES[key], "bfloat16"), 0, 0) for key in keys})
        return FileSpec(path=ref.path, nbytes=ref.nbytes, tensors=tensors, fingerprint=ref.fingerprint)

    keys = list(SHAPES)
    files = tuple(file(ref, keys[at::3]) for at, ref in enumerate(FILES))
    weight_map = {key: f.path.rpartition("/")[2] for f in files for key in f.tensors}
    index = IndexSpec(path="llama-7b/model.safetensors.index.json", weight_map=FrozenMap(weight_map))
    config = Config({"model_type": "llama"})
    return CheckpointSpec(
        path="llama-7b", files=files, index=index, variant="fp16", config=config, ignored=("model.safetensors",)
    )


def module() -> ModuleSpec:
    spec = llama()
    leaves = dict(spec.params) | {"score.part": ParamSpec(spec=TensorSpec([2], "bfloat16"), requires_grad=False)}
    views = {"score.part": ViewSpec("score.weight", (1,), 0)}
    return ModuleSpec(
        name=spec.name, params=leaves, modules=spec.modules, tied=spec.tied, views=views, opaque=("_extra_state",)
    )


def difference() -> Described:
    one, two = dict(small().items()), dict(small().items())
    del one["layers.0.w"], two["layers.1.w"]
    two["layers.2.w"] = build.cast(two["layers.2.w"], "bfloat16")
    two["layers.2.b"] = Live("other", TensorSpec([4, 2], "float32"))
    one["m"], two["m"] = (Read(file, "m", TensorSpec([2], "int8"), 0) for file in FILES[:2])
    return diff(StateDictPlan(one), StateDictPlan(two))


def routes() -> Routing:
    plan = StateDictPlan(stored())
    key = "model.layers.0.mlp.down_proj.weight"
    slices = {f"{key}.{i}": build.narrow(plan[key], 1, 1024 * i, 1024 * (i + 1)) for i in range(2)}
    wanted = {**plan, "half": build.cast(plan[key], "float16"), **slices}
    storage = {file.path: Storage(kind="ext4", mappable=True, cached=1.0) for file in FILES[:2]}
    storage[FILES[2].path] = Storage(kind="ext4", mappable=True, cached=0.0, direct=True)
    return routing(wanted, Machine(threads=8, storage=storage))


EXAMPLES: list[Callable[[], Described]] = [
    *(load, load_with_findings, load_as_stored, save, state_dict, routes, checkpoint, module, difference)
]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.__name__)
def test_a_description_is_what_the_golden_file_says(example: Callable[[], Described]) -> None:
    assert describe(example()) + "\n" == (GOLDEN / f"{example.__name__}.txt").read_text("utf-8")


def test_every_golden_file_is_used() -> None:
    assert {path.stem for path in GOLDEN.glob("*.txt")} == {example.__name__ for example in EXAMPLES}


@pytest.mark.parametrize("empty", [LoadPlan(), SavePlan(), StateDictPlan(), ModuleSpec(name="Net", params={})])
def test_of_nothing_there_is_one_line(empty: Described) -> None:
    assert len(describe(empty).splitlines()) == 1


# -- folding -------------------------------------------------------------------------------------------------------


def unfolded(text: str) -> Iterator[str]:
    """The keys that a folded text without `*` stands for."""
    before, brace, rest = text.partition("{")
    if not brace:
        yield text
        return
    inside, _, after = rest.partition("}")
    labels = []
    for part in inside.split(", "):
        first, dots, last = part.partition("...")
        labels += [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)] if dots else [part]
    for label, tail in product(labels, list(unfolded(after))):
        yield before + label + tail


NAMES = ["q.weight", "q.bias", "norm", "w"]
SETS = {
    "layers": [f"layers.{i}.{name}" for i in range(12) for name in NAMES],
    "gaps": [f"layers.{i}.{name}" for i in (0, 1, 2, 4, 6, 7, 9) for name in NAMES],
    "uneven": [f"layers.{i}.{name}" for i in range(5) for name in NAMES[: 1 + i % 2]],
    "nested": [f"layers.{i}.experts.{j}.w{k}" for i in range(3) for j in range(4) for k in range(3)],
    "leading zeros": [f"shard.{i:03}" for i in range(8, 12)] + [f"shard.{i}" for i in range(8, 12)],
    "mixed zeros": ["s.8", "s.09", "s.10", "t.08", "t.09", "t.10", "u.8", "u.9", "u.10"],
    "prefix and key": ["a", "a.b", "a.0", "a.0.b"],
    "odd": ["", ".", "a..b", "é.0", "é.1", "²", "٣", "x y"],
    "numbers at the top": ["0", "1", "2", "2.w"],
}


@pytest.mark.parametrize("name", SETS)
def test_folded_keys_unfold(name: str) -> None:
    keys = SETS[name]
    texts = fold(keys)
    assert sorted(key for text in texts for key in unfolded(text)) == sorted(keys)
    assert len(texts) <= len(keys)


def test_a_star_stands_for_a_whole_block_only() -> None:
    everything = [f"h.{i}.{name}.w" for i in range(4) for name in "abcdef"]
    shorten = folder(everything)
    assert shorten(everything) == ("h.{0...3}.*",)
    assert shorten(key for key in everything if ".f." not in key) == tuple(f"h.{{0...3}}.{name}.w" for name in "abcde")
    assert shorten(key for key in everything if not key.startswith("h.2")) == ("h.{0, 1, 3}.*",)


def test_files_fold_by_their_numbers() -> None:
    paths = [f"a/model-{i:05}-of-00010.safetensors" for i in range(1, 11)]
    assert fold_paths(paths) == ("a/model-{00001...00010}-of-00010.safetensors",)
    assert fold_paths(["a/x1", "b/x1"]) == ("a/x1", "b/x1")


def test_keys_of_bottomless_depth_fold_too() -> None:
    deep = ".".join("a" * 5000)
    assert fold([deep]) == (deep,)
    assert fold_paths([deep.replace("a", "1")]) == (deep.replace("a", "1"),)
