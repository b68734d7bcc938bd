"""The words of a torch checkpoint's pickle: tensors and storages become records, everything else stays inert."""

from collections.abc import Container
from types import MappingProxyType
from typing import Any, Final, Protocol

from attrs import frozen

from funcmodel.core.opcodes import Global, Inert, unpickled
from funcmodel.errors import CheckpointError
from funcmodel.records import dtypes
from funcmodel.records.dtypes import DType


@frozen(eq=False)
class PickledStorage:
    """A storage as a pickle names it; `dtype` is None where `numel` counts bytes."""

    key: str
    dtype: DType | None
    numel: int
    location: str


@frozen(eq=False)
class PickledTensor:
    """A tensor as a pickle describes it; nothing of it was checked.

    Attributes:
        storage: where its elements are.
        dtype: of the elements.
        offset: of the first element in the storage, in elements.
        shape: sizes, in elements of torch.
        strides: distances between neighbors, in elements of torch.
        lazy: what must be done to the elements when they are read ("conj", "neg", ...), empty for nothing.
    """

    storage: PickledStorage
    dtype: DType
    offset: Any
    shape: Any
    strides: Any
    lazy: str = ""


_STORAGES: Final = MappingProxyType(
    {
        f"torch.{name}Storage": dtype
        for name, dtype in {
            **{"Bool": dtypes.BOOL, "Byte": dtypes.UINT8, "Char": dtypes.INT8, "Short": dtypes.INT16},
            **{"Int": dtypes.INT32, "Long": dtypes.INT64, "Half": dtypes.FLOAT16, "BFloat16": dtypes.BFLOAT16},
            **{"Float": dtypes.FLOAT32, "Double": dtypes.FLOAT64},
            **{"ComplexFloat": dtypes.COMPLEX64, "ComplexDouble": dtypes.COMPLEX128},
        }.items()
    }
)
_UNTYPED: Final = frozenset({"torch.UntypedStorage", "torch.storage.UntypedStorage"})
_DTYPES: Final = MappingProxyType({f"torch.{d.torch}": d for d in dtypes.DTYPES if d.torch})
_DICTS: Final = frozenset({"collections.OrderedDict", "collections.defaultdict"})
_TENSOR_CLASSES: Final = frozenset({"torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"})
_SIZE: Final = "torch.Size"
_TENSOR: Final = "torch._utils._rebuild_tensor"
_TENSOR_2: Final = "torch._utils._rebuild_tensor_v2"
_TENSOR_3: Final = "torch._utils._rebuild_tensor_v3"
_PARAMETER: Final = "torch._utils._rebuild_parameter"
_PARAMETER_STATE: Final = "torch._utils._rebuild_parameter_with_state"
_FROM_TYPE: Final = "torch._tensor._rebuild_from_type_v2"
_GLOBALS: Final = frozenset(
    {
        *(*_STORAGES, *_UNTYPED, *_DICTS, *_TENSOR_CLASSES, _SIZE),
        *(_TENSOR, _TENSOR_2, _TENSOR_3, _PARAMETER, _PARAMETER_STATE, _FROM_TYPE),
    }
)
_BUILTINS: Final = ("bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "object")
# Values that training scripts put beside the weights. They are never made: their names are read past.
_INERT: Final = frozenset(
    {
        *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in _BUILTINS),
        *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("range", "set", "slice", "str")),
        *(f"builtins.{name}" for name in ("tuple", "type")),
        *("_codecs.encode", "argparse.Namespace", "types.SimpleNamespace", "collections.Counter", "collections.deque"),
        *("datetime.date", "datetime.datetime", "datetime.time", "datetime.timedelta", "datetime.timezone"),
        *("decimal.Decimal", "fractions.Fraction", "uuid.UUID"),
        *(
            f"{module}.{name}"
            for module in ("pathlib", "pathlib._local")
            for name in ("Path", "PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath")
        ),
        *("numpy.dtype", "numpy.ndarray", "numpy.random._pickle.__randomstate_ctor"),
        *(
            f"numpy.{core}.{name}"
            for core in ("core", "_core")
            for name in ("multiarray.scalar", "multiarray._reconstruct", "numeric._frombuffer")
        ),
        *(f"numpy.dtypes.{n}DType" for n in ("Bool", "Bytes", "Complex64", "Complex128", "Float16", "Float32")),
        *(f"numpy.dtypes.{n}DType" for n in ("Float64", "Int8", "Int16", "Int32", "Int64", "Str", "Object")),
        *(f"numpy.dtypes.UInt{bits}DType" for bits in (8, 16, 32, 64)),
        *("torch.device", "torch.strided", "torch.serialization._get_layout", "torch._C.Generator"),
        *("torch.contiguous_format", "torch.channels_last", "torch.preserve_format"),
    }
)


class Refusal(Protocol):
    """Makes the error from a code, what was found, and further fields."""

    def __call__(self, code: str, found: str, /, **more: Any) -> CheckpointError:
        """The error, to be raised by the caller."""


class Everything:
    """A container that holds whatever it is asked for, for example every module-level name."""

    def __contains__(self, item: object) -> bool:
        return True


def torch_unpickled(data: bytes, fail: Refusal, *, inert: Container[str] = (), nbytes: int = 0) -> Any:
    """What a torch checkpoint's pickle holds: dicts, lists and plain values, with `PickledTensor` for tensors.

    Args:
        data: the pickle.
        fail: makes the error that is raised, of a code, words and fields: `name` where a name is forbidden.
        inert: further module-level names ("module.name") to read past. They are not imported either.
        nbytes: size of the file that holds the pickle, in bytes.

    Raises:
        CheckpointError: as `fail` makes it; codes "BIN_PICKLE", "BIN_GLOBAL_FORBIDDEN", "BIN_GEOMETRY" and
            "DUPLICATE_KEY".

    Example:
        >>> import pickle
        >>> from argparse import Namespace
        >>> torch_unpickled(pickle.dumps({"args": Namespace(lr=1)}), None)
        {'args': Inert(name='argparse.Namespace')}
    """
    return unpickled(data, _Words(fail, inert), fail, nbytes=nbytes)


@frozen
class _Words:
    """The vocabulary of `torch.save`."""

    fail: Refusal
    inert: Container[str]

    def find(self, name: str) -> Any:
        if name in _GLOBALS:
            return Global(name)
        if name in _DTYPES:
            return _DTYPES[name]
        if name in _INERT or name in self.inert:
            return Inert(name)
        found = f"its pickle names {name[:200]!r}, which no checkpoint of tensors needs"
        raise self.fail("BIN_GLOBAL_FORBIDDEN", found, name=name)

    def call(self, function: Any, args: tuple[Any, ...]) -> Any:
        if type(function) is Inert:
            return function
        name = function.name if type(function) is Global else ""
        if name in _DICTS:
            return {}
        if name == _SIZE and len(args) == 1 and type(args[0]) in (tuple, list):
            return tuple(args[0])
        if name in (_PARAMETER, _PARAMETER_STATE) and args and type(args[0]) is PickledTensor:
            return args[0]
        if name == _FROM_TYPE and len(args) == 4 and type(args[0]) is type(args[1]) is Global:
            function, kind, arguments, _ = args
            if kind.name in _TENSOR_CLASSES and function.name != _FROM_TYPE and type(arguments) is tuple:
                return self.call(function, arguments)
        if name in (_TENSOR, _TENSOR_2, _TENSOR_3):
            return self.tensor(name, args)
        raise self.fail("BIN_PICKLE", f"its pickle calls {name or type(function).__name__} as torch.save never does")

    def tensor(self, name: str, args: tuple[Any, ...]) -> PickledTensor:
        if len(args) < 4 or type(args[0]) is not PickledStorage:
            raise self.fail("BIN_PICKLE", f"its pickle makes a tensor of {len(args)} values, or of no storage")
        storage, offset, shape, strides = args[:4]
        extra = 7 if name == _TENSOR_3 else 6
        dtype = args[6] if name == _TENSOR_3 and len(args) > 6 else storage.dtype
        if type(dtype) is not DType:
            raise self.fail("BIN_PICKLE", "its pickle makes a tensor without a dtype")
        metadata = args[extra] if len(args) > extra else {}
        word = next(iter(metadata), "") if type(metadata) is dict else "" if metadata is None else "metadata"
        lazy = word if type(word) is str and len(word) <= 20 else "metadata"  # no text that was not there before
        return PickledTensor(storage, dtype, offset, shape, strides, lazy)

    def stored(self, pid: Any) -> PickledStorage:
        if type(pid) is tuple and len(pid) == 5:
            word, kind, key, location, numel = pid
            name = kind.name if type(kind) is Global else ""
            if word == "storage" and (name in _STORAGES or name in _UNTYPED) and type(key) is type(location) is str:
                if type(numel) is not int or not 0 <= numel < 2**63:
                    raise self.fail("BIN_GEOMETRY", f"its storage {key[:80]!r} does not say how many elements it has")
                return PickledStorage(key, _STORAGES.get(name), numel, location)
        raise self.fail("BIN_PICKLE", "its pickle refers to something outside that is no storage")
