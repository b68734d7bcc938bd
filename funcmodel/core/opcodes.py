"""Pickle, read and never run: opcodes to inert values. Nothing is imported, called or looked up while it works.

What a pickle would call is handed to the caller's `Vocabulary` as a name and arguments, and what that cannot vouch for
becomes an error. Lengths are compared with the bytes that are left before anything is made of them. Whatever is made is
paid for, in bytes of memory, out of 48 MiB and as much as the file has beside its pickle. A tensor, with its storage
and its name, costs some 500 bytes: 100,000 are had for the 48 MiB, and more by files whose tensors hold something.
"""

from collections.abc import Callable
from struct import Struct
from types import MappingProxyType
from typing import Any, Final, Protocol, TypeAlias

from attrs import frozen

from funcmodel.core.pickle_costs import DICT, FIRST_ITEM, FIRST_KEY, KEPT, KEY, LIST, RECORD, SLOT, cost, recalled
from funcmodel.core.strict_json import Fail

_DEEPEST: Final = 256  # open marks: torch.save needs one or two per level of nesting
_FREE: Final = 48 << 20  # bytes of memory that any pickle may take
_LONGEST_TEXT: Final = 1 << 16  # bytes of one that is made before it is paid for
_LONGEST_INT: Final = 256
_U16, _U32, _I32, _U64, _F64 = Struct("<H"), Struct("<I"), Struct("<i"), Struct("<Q"), Struct(">d")


@frozen(eq=False)
class Inert:
    """A value that nothing will be made of: whatever is put into it is dropped."""

    name: str


@frozen(eq=False)
class Global:
    """A module-level name that means something to the vocabulary which found it."""

    name: str


class Vocabulary(Protocol):
    """What the names and persistent ids of a pickle mean."""

    def find(self, name: str) -> Any:
        """The inert value that stands for a module-level name ("module.name"), or an error."""

    def call(self, function: Any, args: tuple[Any, ...]) -> Any:
        """The inert value that stands for the result of a call, or an error."""

    def stored(self, pid: Any) -> Any:
        """The inert value that stands for a persistent id, or an error."""


def unpickled(data: bytes, words: Vocabulary, fail: Fail, *, nbytes: int = 0) -> Any:
    r"""The value that a pickle describes, made of plain values and of what `words` gives.

    Dicts, lists, tuples, text, bytes and numbers are themselves; sets and instances are `Inert`. The state that a
    pickle would give to an object after making it is dropped. Of the keys of a dict that are no text, one of a type
    stands for all.

    Args:
        data: one pickle of protocol 2 to 5, and nothing behind it.
        words: what names and persistent ids mean.
        fail: makes the error that is raised, of a code and words.
        nbytes: size of the file that holds the pickle, in bytes; so much memory may pickle and values take, and 48 MiB.

    Raises:
        CheckpointError: as `fail` makes it; codes "BIN_PICKLE", "DUPLICATE_KEY", and those of `words`.

    Example:
        >>> import pickle
        >>> unpickled(pickle.dumps({"a": (1, [2.5, None])}), None, lambda code, found: ValueError(code, found))
        {'a': (1, [2.5, None])}
    """
    return _Machine(data, words, fail, _FREE + max(nbytes - len(data), 0)).run()


class _Machine:
    """Stack, marks and memo of one pickle."""

    def __init__(self, data: bytes, words: Vocabulary, fail: Fail, room: int) -> None:
        self.data, self.words, self.fail = data, words, fail
        self.at = 0
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.under = 0  # values in `below`
        self.paid = self.highest = 64  # values on all stacks that were paid for; on this one, before more are
        self.room = room
        self.recalled = recalled(data)
        self.memo: dict[int, Any] = {}
        self.kept: set[int] = set()  # identities of what the memo holds
        self.counted, self.numbered = 0, False  # values remembered without a number; whether one was with it
        self.globals: dict[str, Any] = {}
        self.keys: dict[type, Inert] = {}

    def run(self) -> Any:
        data, size = self.data, len(self.data)
        if data[:1] != b"\x80" or size < 2 or not 2 <= data[1] <= 5:
            raise self.wrong("does not start as a pickle of protocol 2 to 5")
        while self.at < size:
            code = data[self.at]
            self.at += 1
            if code == _STOP:
                return self.result()
            operation = _OPERATIONS.get(code)
            if operation is None:
                raise self.wrong(f"has the opcode {bytes([code])!r}, which torch.save does not write")
            try:
                operation(self)
            except IndexError:
                raise self.wrong("takes more values than it made") from None
            if len(self.stack) > self.highest:
                self.grown()
        raise self.wrong("ends without an end mark")

    def result(self) -> Any:
        if len(self.stack) != 1 or self.below:
            raise self.wrong("ends with values left over")
        if self.at != len(self.data):
            raise self.wrong(f"goes on for {len(self.data) - self.at} bytes after its end mark")
        return self.stack[0]

    def wrong(self, found: str) -> Exception:
        return self.fail("BIN_PICKLE", f"its pickle {found} (at byte {self.at})")

    # -- bytes -----------------------------------------------------------------------------------------------------

    def take(self, count: int) -> bytes:
        stop = self.at + count
        if stop > len(self.data):
            raise self.wrong(f"announces {count} bytes and has {len(self.data) - self.at}")
        found = self.data[self.at : stop]
        self.at = stop
        return found

    def number(self, kind: Struct) -> Any:
        return kind.unpack(self.take(kind.size))[0]

    def line(self) -> str:
        stop = self.data.find(b"\n", self.at, self.at + 4096)
        if stop < 0:
            raise self.wrong("has a name without an end")
        found = self.text(self.take(stop - self.at), "strict")
        self.at += 1
        return found

    def blob(self, count: int) -> bytes:
        if count > _LONGEST_TEXT:
            self.spend(0, ahead=count)
        found = self.take(count)
        self.spend(cost(found))
        return found

    def string(self, count: int) -> str:
        if count > _LONGEST_TEXT:  # one character beyond 16 bits makes 4 bytes of every other
            self.spend(0, ahead=count + 4 * min(count, len(self.data)))
        found = self.text(self.take(count))
        self.spend(cost(found))
        return found

    def text(self, data: bytes, errors: str = "surrogatepass") -> str:
        try:
            return data.decode("utf-8", errors)
        except UnicodeDecodeError:
            raise self.wrong("has text that is no UTF-8") from None

    # -- values ----------------------------------------------------------------------------------------------------

    def spend(self, price: int, *, ahead: int = 0) -> None:
        """Pay for what was made, in bytes; `ahead` must be there too, for what is about to be."""
        self.room -= price
        if self.room < ahead:
            raise self.wrong("makes more values than a file of its size can mean")

    def dropped(self, value: Any) -> None:
        """Give back what a value cost that nothing holds any more, if the memo does not."""
        if id(value) not in self.kept:
            self.room += DICT if type(value) is dict and not value else cost(value)

    def grown(self) -> None:
        """Pay for a stack that is longer than any before."""
        paid = self.under + len(self.stack) + len(self.stack) // 4
        self.spend((paid - self.paid) * SLOT)
        self.paid = paid
        self.highest = self.paid - self.under

    def push_new(self, value: Any, price: int) -> None:
        self.spend(price)
        self.stack.append(value)

    def marked(self) -> list[Any]:
        """What was pushed since the last mark, taken off."""
        items = self.stack
        self.stack = self.below.pop()
        self.under -= len(self.stack)
        self.highest = self.paid - self.under
        return items

    def mark(self) -> None:
        if len(self.below) >= _DEEPEST:
            raise self.wrong(f"is nested more than {_DEEPEST} deep")
        self.below.append(self.stack)
        self.under += len(self.stack)
        self.highest = self.paid - self.under
        self.stack = []

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError
        items = tuple(self.stack[-count:])
        del self.stack[-count:]
        self.push_new(items, cost(items))

    def marked_tuple(self) -> None:
        items = self.marked()
        self.spend(0, ahead=64 + 8 * len(items))
        made = tuple(items)
        self.push_new(made, cost(made))

    def remember(self, index: int) -> None:
        self.numbered = True
        self.keep(index)

    def memoize(self) -> None:
        if self.numbered:
            raise self.wrong("remembers values with numbers and without")
        self.keep(self.counted)
        self.counted += 1

    def keep(self, index: int) -> None:
        value = self.stack[-1]
        if index < 256 or self.recalled is None or index in self.recalled:
            if index in self.memo:
                raise self.wrong(f"remembers two values as {index}")
            self.spend(KEPT)
            self.memo[index] = value
            self.kept.add(id(value))

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise self.wrong(f"recalls value {index}, which it did not store")
        self.stack.append(self.memo[index])

    def integer(self, count: int) -> None:
        if not 0 <= count <= _LONGEST_INT:
            raise self.wrong(f"has an integer of {count} bytes")
        self.push_new(int.from_bytes(self.take(count), "little", signed=True), 48 + count)

    # -- into containers -------------------------------------------------------------------------------------------

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is list:
            self.spend(len(items) * SLOT + (0 if target else FIRST_ITEM))
            target.extend(items)
        elif type(target) is not Inert:
            raise self.wrong(f"appends to a {type(target).__name__}")

    def add(self) -> None:
        self.marked()
        if type(self.stack[-1]) is not Inert:
            raise self.wrong(f"adds members to a {type(self.stack[-1]).__name__}")

    def frozen_set(self) -> None:
        self.marked()
        self.stack.append(_SET)

    def update(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if len(items) % 2:
            raise self.wrong("sets a key without a value")
        if type(target) is not dict:
            if type(target) is Inert:
                return
            raise self.wrong(f"sets keys of a {type(target).__name__}")
        one_by_one = iter(items)
        for key, value in zip(one_by_one, one_by_one, strict=True):
            if type(key) is not str:  # integers can be chosen to collide, and hashing a nested tuple recurses in C
                key = self.keys.setdefault(type(key), Inert(type(key).__name__))
            elif key in target:
                raise self.fail("DUPLICATE_KEY", f"its pickle sets the key {key[:80]!r} twice")
            self.spend(KEY if target else FIRST_KEY)
            target[key] = value

    # -- what a pickle would call ------------------------------------------------------------------------------------

    def found(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise self.wrong("names a global by something that is no text")
        name = f"{module}.{name}"
        if name not in self.globals:
            found = self.words.find(name)
            self.spend(cost(name) + RECORD + KEY)
            self.globals[name] = found
        self.stack.append(self.globals[name])

    def named(self) -> None:
        module = self.line()
        self.found(module, self.line())

    def named_by_values(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.found(module, name)

    def instance(self) -> None:
        """The opcode of old classes names what it calls; torch.save never writes it."""
        raise self.fail("BIN_GLOBAL_FORBIDDEN", f"its pickle makes an instance of {self.line()}.{self.line()}")

    def extension(self) -> None:
        raise self.fail("BIN_GLOBAL_FORBIDDEN", "its pickle calls an extension of the copyreg module")

    def reduce(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        if type(args) is not tuple:
            raise self.wrong(f"calls with a {type(args).__name__} for arguments")
        made = self.words.call(function, args)
        self.dropped(args)
        if id(args) not in self.kept:
            for value in args:
                if type(made) is Inert or type(value) is dict:  # of a tensor's arguments, an empty dict is left out
                    self.dropped(value)
        self.push_new(made, 0 if made is function else cost(made) or RECORD)

    def new(self, arguments: int) -> None:
        for _ in range(arguments):
            self.stack.pop()
        made = self.stack.pop()
        if type(made) is not Inert:
            raise self.wrong(f"makes an instance of {getattr(made, 'name', type(made).__name__)}")
        self.stack.append(made)

    def build(self) -> None:
        self.stack.pop()
        if type(self.stack[-1]) not in (dict, Inert):
            raise self.wrong(f"gives a state to a {type(self.stack[-1]).__name__}")

    def persistent(self) -> None:
        pid = self.stack.pop()
        made = self.words.stored(pid)
        self.dropped(pid)
        self.push_new(made, RECORD)


_SET = Inert("set")
_Operation: TypeAlias = Callable[[_Machine], object]
_STOP: Final = ord(".")
_TABLE: Final[dict[bytes, _Operation]] = {
    b"\x80": lambda m: m.take(1),  # PROTO
    b"\x95": lambda m: m.number(_U64),  # FRAME
    b"(": _Machine.mark,
    b"0": lambda m: m.stack.pop() if m.stack else m.marked(),  # POP
    b"1": _Machine.marked,  # POP_MARK
    b"N": lambda m: m.stack.append(None),
    b"\x88": lambda m: m.stack.append(True),
    b"\x89": lambda m: m.stack.append(False),
    b"J": lambda m: m.push_new(m.number(_I32), 48),
    b"K": lambda m: m.stack.append(m.take(1)[0]),
    b"M": lambda m: m.push_new(m.number(_U16), 48),
    b"\x8a": lambda m: m.integer(m.take(1)[0]),  # LONG1
    b"\x8b": lambda m: m.integer(m.number(_I32)),  # LONG4
    b"G": lambda m: m.push_new(m.number(_F64), 32),
    b"X": lambda m: m.stack.append(m.string(m.number(_U32))),  # BINUNICODE
    b"\x8c": lambda m: m.stack.append(m.string(m.take(1)[0])),  # SHORT_BINUNICODE
    b"\x8d": lambda m: m.stack.append(m.string(m.number(_U64))),  # BINUNICODE8
    b"B": lambda m: m.stack.append(m.blob(m.number(_U32))),  # BINBYTES
    b"C": lambda m: m.stack.append(m.blob(m.take(1)[0])),  # SHORT_BINBYTES
    b"\x8e": lambda m: m.stack.append(m.blob(m.number(_U64))),  # BINBYTES8
    b"\x96": lambda m: m.stack.append(m.blob(m.number(_U64))),  # BYTEARRAY8
    b")": lambda m: m.stack.append(()),
    b"\x85": lambda m: m.tuple_of(1),
    b"\x86": lambda m: m.tuple_of(2),
    b"\x87": lambda m: m.tuple_of(3),
    b"t": _Machine.marked_tuple,
    b"]": lambda m: m.push_new([], LIST),
    b"}": lambda m: m.push_new({}, DICT),
    b"\x8f": lambda m: m.stack.append(_SET),  # EMPTY_SET
    b"\x91": _Machine.frozen_set,  # FROZENSET
    b"a": lambda m: m.extend([m.stack.pop()]),  # APPEND
    b"e": lambda m: m.extend(m.marked()),  # APPENDS
    b"s": lambda m: m.update([m.stack.pop(-2), m.stack.pop()]),  # SETITEM
    b"u": lambda m: m.update(m.marked()),  # SETITEMS
    b"\x90": _Machine.add,  # ADDITEMS
    b"q": lambda m: m.remember(m.take(1)[0]),  # BINPUT
    b"r": lambda m: m.remember(m.number(_U32)),  # LONG_BINPUT
    b"\x94": _Machine.memoize,  # MEMOIZE
    b"h": lambda m: m.recall(m.take(1)[0]),  # BINGET
    b"j": lambda m: m.recall(m.number(_U32)),  # LONG_BINGET
    b"c": _Machine.named,  # GLOBAL
    b"\x93": _Machine.named_by_values,  # STACK_GLOBAL
    b"i": _Machine.instance,  # INST
    b"\x82": _Machine.extension,
    b"\x83": _Machine.extension,
    b"\x84": _Machine.extension,
    b"R": _Machine.reduce,
    b"\x81": lambda m: m.new(1),  # NEWOBJ
    b"\x92": lambda m: m.new(2),  # NEWOBJ_EX
    b"b": _Machine.build,
    b"Q": _Machine.persistent,  # BINPERSID
}
_OPERATIONS: Final = MappingProxyType({code[0]: operation for code, operation in _TABLE.items()})
