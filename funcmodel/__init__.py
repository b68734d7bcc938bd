"""funcmodel: the weights of any `nn.Module`, as pure functions on frozen records.

Plans are values. Planning is arithmetic. Applying is the only thing that happens.
"""

from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

__version__ = "0.1.0"

if TYPE_CHECKING:
    pass

# Names are imported on first use, so that `import funcmodel` costs little and L0 to L2 work without torch.
_HOMES: Final = MappingProxyType(
    {
        "funcmodel.records.mapping": ("FrozenMap",),
    }
)
_HOME_OF: Final = MappingProxyType({name: home for home, names in _HOMES.items() for name in names})
__all__ = ["__version__"]


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'funcmodel' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
