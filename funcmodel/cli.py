"""The command `funcmodel`: look into checkpoints, compare, verify and re-shard them, see the demo."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from funcmodel.errors import FuncmodelError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: the words after `funcmodel`; None takes them from the command line.

    Returns:
        The exit status: 0, or after an error, which is printed as one message, 1; 2 where an option has no meaning.

    Example:
        >>> main(["scan", "/nonexistent"])
        1
    """
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options) or 0)
    except FuncmodelError as error:
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="funcmodel", description="The weights of any nn.Module, as plans.")
    commands = parser.add_subparsers(required=True, metavar="command")

    demo = commands.add_parser("demo", help="load, check, re-shard and reload two real trained checkpoints")
    demo.set_defaults(run=_demo)

    scan = commands.add_parser("scan", help="say what a checkpoint holds; reads headers only")
    scan.add_argument("path", help="a file or folder")
    _add_reading(scan)
    scan.add_argument("--json", action="store_true", help="print the whole record as JSON")
    scan.set_defaults(run=_scan)

    diff = commands.add_parser("diff", help="compare two checkpoints by their headers; exits with 1 where they differ")
    diff.add_argument("old", help="a file or folder")
    diff.add_argument("new", help="a file or folder")
    _add_reading(diff, "old")
    _add_reading(diff, "new")
    diff.set_defaults(run=_diff)

    verify = commands.add_parser(
        "verify", help="compare every tensor with its recorded digest; exits with 0 if each has one and is what it says"
    )
    verify.add_argument("path", help="a file or folder")
    _add_reading(verify)
    verify.set_defaults(run=_verify)

    reshard = commands.add_parser("reshard", help="rewrite a checkpoint, streaming, without a model")
    reshard.add_argument("source", help="a file or folder")
    reshard.add_argument("into", help="a folder")
    _add_reading(reshard)
    reshard.add_argument("--max-shard-size", default="5GB", help="most bytes of tensors per file (5GB)")
    reshard.add_argument("--dtype", help="cast floating-point tensors, for example bfloat16")
    reshard.add_argument("--digests", choices=("none", "sha256"), default="none", help="record digests (none)")
    reshard.set_defaults(run=_reshard)
    return parser


def _add_reading(command: argparse.ArgumentParser, side: str = "") -> None:
    """The options that say how a checkpoint is read; of two checkpoints each has its own."""
    dash, where = f"--{side}-" if side else "--", f"of the {side} one: " if side else ""
    command.add_argument(f"{dash}variant", help=f"{where}as in model.fp16.safetensors")
    command.add_argument(
        f"{dash}key",
        action="append",
        help=f"{where}what leads to the state dict in files of torch.save; once more for a dict in a dict",
    )
    command.add_argument(f"{dash}suffix", help=f"{where}how its torch files end, if not in .bin, .pt or .pth")
    command.add_argument(
        f"{dash}inert",
        action="append",
        metavar="MODULE.NAME",
        help=f"{where}a class that a torch file mentions; what was made with it is left out, nothing is imported",
    )
    command.add_argument(
        f"{dash}legacy",
        action="store_true",
        help=f"{where}torch files from before version 1.6, unpickled by torch.load(weights_only=True)",
    )


def _reading(options: argparse.Namespace, side: str = "") -> dict[str, Any]:
    """The arguments of `scan` that those options mean."""
    from funcmodel.run.formats import FORMATS, torch_zip
    from funcmodel.run.legacy_torch import legacy_torch

    variant, key, suffix, inert, legacy = (
        getattr(options, f"{side}_{name}".lstrip("_")) for name in ("variant", "key", "suffix", "inert", "legacy")
    )
    if legacy and inert:
        raise ValueError("--inert and --legacy exclude each other: torch.load decides what it reads past")
    suffixes = (suffix,) if suffix else (".bin", ".pt", ".pth")
    if legacy:
        formats = tuple(legacy_torch(one) for one in suffixes)
    elif suffix or inert:
        formats = tuple(torch_zip(one, inert=tuple(inert or ())) for one in suffixes)
    else:
        formats = FORMATS
    return {"variant": variant, "key": key, "formats": formats}


def _demo(options: argparse.Namespace) -> int:
    from funcmodel.demo import demo

    return demo()


def _scan(options: argparse.Namespace) -> None:
    import funcmodel as fm

    checkpoint = fm.scan_checkpoint(options.path, **_reading(options))
    print(fm.to_json(checkpoint) if options.json else fm.describe(checkpoint))


def _diff(options: argparse.Namespace) -> int:
    import funcmodel as fm

    old = fm.scan_checkpoint(options.old, **_reading(options, "old"))
    found = fm.diff(old, fm.scan_checkpoint(options.new, **_reading(options, "new")))
    print(fm.describe(found))
    return int(bool(found.added or found.removed or found.changed))


def _verify(options: argparse.Namespace) -> int:
    import funcmodel as fm

    found = fm.verify(options.path, **_reading(options))
    print(fm.describe(found))
    return int(bool(found.unrecorded))


def _reshard(options: argparse.Namespace) -> None:
    import funcmodel as fm
    from funcmodel.run.formats import SAFETENSORS
    from funcmodel.run.scan import plan_of

    reading = _reading(options)
    checkpoint = fm.scan_checkpoint(options.source, **reading)
    plan = plan_of(checkpoint)
    if options.dtype:
        plan = fm.cast(options.dtype)(plan)
    saved = fm.save(
        plan,
        options.into,
        max_shard_size=options.max_shard_size,
        config=checkpoint.config,
        digests=options.digests,
        formats=(*reading["formats"], SAFETENSORS),
    )
    print(fm.describe(saved))
