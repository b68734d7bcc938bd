"""The command `funcmodel`: look into checkpoints, compare, verify and re-shard them, see the demo."""

import argparse
import sys
from collections.abc import Sequence

from funcmodel.errors import FuncmodelError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: the words after `funcmodel`; None takes them from the command line.

    Returns:
        The exit status: 0, or 1 after an error, which is printed as one message.

    Example:
        >>> main(["scan", "/nonexistent"])
        1
    """
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options) or 0)
    except FuncmodelError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="funcmodel", description="The weights of any nn.Module, as plans.")
    commands = parser.add_subparsers(required=True, metavar="command")

    demo = commands.add_parser("demo", help="load, check, re-shard and reload two real trained checkpoints")
    demo.set_defaults(run=_demo)

    scan = commands.add_parser("scan", help="say what a checkpoint holds; reads headers only")
    scan.add_argument("path", help="a file or folder")
    scan.add_argument("--variant", help="as in model.fp16.safetensors")
    scan.add_argument("--json", action="store_true", help="print the whole record as JSON")
    scan.set_defaults(run=_scan)

    diff = commands.add_parser("diff", help="compare two checkpoints by their headers; exits with 1 where they differ")
    diff.add_argument("old", help="a file or folder")
    diff.add_argument("new", help="a file or folder")
    diff.set_defaults(run=_diff)

    verify = commands.add_parser(
        "verify", help="compare every tensor with its recorded digest; exits with 0 if each has one and is what it says"
    )
    verify.add_argument("path", help="a file or folder")
    verify.add_argument("--variant", help="as in model.fp16.safetensors")
    verify.set_defaults(run=_verify)

    reshard = commands.add_parser("reshard", help="rewrite a checkpoint, streaming, without a model")
    reshard.add_argument("source", help="a file or folder")
    reshard.add_argument("into", help="a folder")
    reshard.add_argument("--max-shard-size", default="5GB", help="most bytes of tensors per file (5GB)")
    reshard.add_argument("--dtype", help="cast floating-point tensors, for example bfloat16")
    reshard.add_argument("--digests", choices=("none", "sha256"), default="none", help="record digests (none)")
    reshard.set_defaults(run=_reshard)
    return parser


def _demo(options: argparse.Namespace) -> int:
    from funcmodel.demo import demo

    return demo()


def _scan(options: argparse.Namespace) -> None:
    import funcmodel as fm

    checkpoint = fm.scan_checkpoint(options.path, variant=options.variant)
    print(fm.to_json(checkpoint) if options.json else fm.describe(checkpoint))


def _diff(options: argparse.Namespace) -> int:
    import funcmodel as fm

    found = fm.diff(fm.scan_checkpoint(options.old), fm.scan_checkpoint(options.new))
    print(fm.describe(found))
    return int(bool(found.added or found.removed or found.changed))


def _verify(options: argparse.Namespace) -> int:
    import funcmodel as fm

    found = fm.verify(options.path, variant=options.variant)
    print(fm.describe(found))
    return int(bool(found.unrecorded))


def _reshard(options: argparse.Namespace) -> None:
    import funcmodel as fm

    plan = fm.scan(options.source)
    if options.dtype:
        plan = fm.cast(options.dtype)(plan)
    config = fm.scan_checkpoint(options.source).config
    limit, digests = options.max_shard_size, options.digests
    print(fm.describe(fm.save(plan, options.into, max_shard_size=limit, config=config, digests=digests)))
