"""Row-major order: what slices and reshapes do to it, and where whole bytes end."""

from collections.abc import Sequence
from math import prod

from funcmodel.errors import ShapeError
from funcmodel.records.expressions import At


def check_whole_bytes(bits: int, distances: Sequence[int], what: str) -> None:
    """Refuse to take elements narrower than a byte apart within one.

    Raises:
        ShapeError: one of `distances`, in elements, is not a whole number of bytes.

    Example:
        >>> check_whole_bytes(4, [2, 6], "two and six")
    """
    wrong = [d for d in distances if d * bits % 8]
    if wrong:
        raise ShapeError(
            f"{what}: elements of {bits} bits can be cut only between whole bytes, found a cut after {wrong[0]} "
            "elements; cut elsewhere or convert the tensor first",
            found=wrong[0],
        )


def cut_distances(shape: tuple[int, ...], at: At) -> list[int]:
    """Distances, in elements, that must be whole bytes for the slice to consist of whole bytes.

    Example:
        >>> cut_distances((4, 6), ((1, 2), (2, 6)))
        [2, 6, 6, 6, 12]
    """
    steps, stride, cut = [], 1, False
    for n, a in zip(reversed(shape), reversed(at), strict=True):
        low, high = (a, a + 1) if isinstance(a, int) else a
        if cut:
            steps.append(stride)
        if (low, high) != (0, n):
            steps += [low * stride, high * stride]
            cut = True
        stride *= n
    return steps


def common_prefix(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Length of the common prefix.

    Example:
        >>> common_prefix((2, 3, 4), (2, 3, 5))
        2
    """
    n = 0
    for p, q in zip(a, b, strict=False):
        if p != q:
            break
        n += 1
    return n


def through(below: tuple[int, ...], shape: tuple[int, ...], at: At) -> tuple[At, tuple[int, ...], At]:
    """Slicing above a reshape as slicing below it, as far as row-major order allows.

    Args:
        below: axes before they are reshaped, with nothing in common with `shape` at either end.
        shape: the same axes after.
        at: slicing of `shape`.

    Returns:
        the slicing of `below`, the shape to which its result is reshaped, and the slicing that is left to do there.

    Example:
        >>> through((12,), (3, 4), ((1, 3), (0, 2)))
        (((4, 12),), (2, 4), ((0, 2), (0, 2)))
        >>> through((3, 4), (12,), ((4, 6),))
        ((1, (0, 2)), (2,), ((0, 2),))
    """
    if len(below) <= 1:
        return _through_split(below, shape, at)
    if len(shape) <= 1:
        return _through_joined(below, at)
    return tuple([(0, n) for n in below]), shape, at


def _through_split(below: tuple[int, ...], shape: tuple[int, ...], at: At) -> tuple[At, tuple[int, ...], At]:
    block = prod(shape)
    start, length = 0, 1
    between: list[int] = []
    left: list[int | tuple[int, int]] = []
    for i, a in enumerate(at):
        block //= shape[i]
        if isinstance(a, int):
            start += a * block
            continue
        count = a[1] - a[0]
        start += a[0] * block
        between.append(count)
        left.append((0, count))
        if count > 1:
            length = count * block
            between += shape[i + 1 :]
            left += at[i + 1 :]
            break
    if not below:
        return (), tuple(between), tuple(left)
    return ((start, start + length),) if between else (start,), tuple(between), tuple(left)


def _through_joined(below: tuple[int, ...], at: At) -> tuple[At, tuple[int, ...], At]:
    if not at:
        return (0,) * len(below), (), ()
    low, high = (at[0], at[0] + 1) if isinstance(at[0], int) else at[0]
    block = prod(below)
    pushed: list[int | tuple[int, int]] = []
    for i, n in enumerate(below):
        block //= n
        first, last = low // block, -(-high // block)
        low, high = low - first * block, high - first * block
        if last - first > 1 or (i == len(below) - 1 and not isinstance(at[0], int)):
            pushed += [(first, last), *[(0, m) for m in below[i + 1 :]]]
            return tuple(pushed), ((last - first) * block,), ((low, high),)
        pushed.append(first)
    return tuple(pushed), (), ()
