"""The commit: pointers into a module, all of them or none."""

from typing import Any, Final

import torch
from attrs import define, field, frozen
from torch import nn

# Gives two tensor objects each other's contents. Whoever holds the object (an LSTM's list of weights, an optimizer)
# then sees the new tensor, which a new object under the old name would not achieve.
exchange: Final = torch._C._swap_tensor_impl


def inherit(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Let `value` require a gradient and call the hooks of `tensor`, whose contents it is about to be."""
    value.requires_grad_()
    if tensor._backward_hooks is not None:
        value._backward_hooks = tensor._backward_hooks
    if tensor._post_accumulate_grad_hooks is not None:
        value._post_accumulate_grad_hooks = tensor._post_accumulate_grad_hooks


@define(eq=False)
class Commit:
    """Changes that are ready to be made; making them runs no code that allocates, reads or computes.

    Attributes:
        filled: tensors on meta; two columns, since there may be 100,000.
        fillings: what they become.
        exchanged: real tensors that cannot take the new data as they are, what they become, and that one's storage.
        replaced: real tensors, their new data, and their old.
        retied: a dictionary of leaves, a name in it, the new object, the old.
        states: modules and the extra state they are given.
    """

    filled: list[torch.Tensor] = field(factory=list)
    fillings: list[torch.Tensor] = field(factory=list)
    exchanged: list[tuple[torch.Tensor, torch.Tensor, int]] = field(factory=list)
    replaced: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(factory=list)
    retied: list[tuple[dict[str, Any], str, Any, Any]] = field(factory=list)
    states: list[tuple[nn.Module, torch.Tensor, "_Before"]] = field(factory=list)

    def add(self, tensor: torch.Tensor, value: torch.Tensor) -> None:
        """Let `tensor` have the contents of `value`, a fresh tensor, and keep its `requires_grad`."""
        grad = tensor.requires_grad and (value.is_floating_point() or value.is_complex())
        if tensor.is_meta:
            if grad:
                inherit(tensor, value)
            self.filled.append(tensor)
            self.fillings.append(value)
        elif grad is tensor.requires_grad and torch._has_compatible_shallow_copy_type(tensor, value):
            self.replaced.append((tensor, value, tensor.data))
        else:
            if grad:
                inherit(tensor, value)
            self.exchanged.append((tensor, value, value.untyped_storage()._cdata))

    def retie(self, leaves: dict[str, Any], name: str, value: torch.Tensor) -> None:
        """Let a name hold another object."""
        self.retied.append((leaves, name, value, leaves[name]))

    def restate(self, module: nn.Module, value: torch.Tensor) -> None:
        """Give a module its extra state."""
        self.states.append((module, value, _Before.of(module)))

    def make(self) -> None:
        """Make all changes; after any error, also an interrupt, none."""
        begun: list[_Before] = []
        try:
            for tensor, value in zip(self.filled, self.fillings, strict=True):
                exchange(tensor, value)
            for tensor, value, _ in self.exchanged:
                exchange(tensor, value)
            for tensor, value, _ in self.replaced:
                tensor.data = value
            for leaves, name, value, _ in self.retied:
                leaves[name] = value
            for module, value, before in self.states:
                begun.append(before)
                module.set_extra_state(value)
        except BaseException:
            self._undo(begun)
            raise

    def _undo(self, begun: "list[_Before]") -> None:
        # Every step looks at what is there, so that a second interrupt only starts it again.
        while True:
            try:
                for before in reversed(begun):
                    before.restore()
                for leaves, name, _, old in self.retied:
                    leaves[name] = old
                for tensor, _, data in self.replaced:
                    tensor.data = data
                for tensor, value, storage in self.exchanged:
                    if value.untyped_storage()._cdata != storage:
                        exchange(tensor, value)
                for tensor, value in zip(self.filled, self.fillings, strict=True):
                    if value.is_meta:
                        exchange(tensor, value)
            except KeyboardInterrupt:
                continue
            return


@frozen(eq=False)
class _Before:
    """A module before its `set_extra_state` ran: that is foreign code, and may fail halfway.

    Attributes:
        attributes: its attributes.
        tensors: plain tensors among them, its extra state, and what they held.
        containers: lists, dicts and sets among them, and what they held.
    """

    module: nn.Module
    attributes: dict[str, Any]
    tensors: list[tuple[torch.Tensor, torch.Tensor]]
    containers: list[tuple[Any, Any]]

    @classmethod
    def of(cls, module: nn.Module) -> "_Before":
        attributes = dict(vars(module))
        held = [*attributes.values(), module.get_extra_state()]
        return cls(
            module,
            attributes,
            [(t, t.detach().clone()) for t in held if isinstance(t, torch.Tensor)],
            [(c, c.copy()) for c in held if isinstance(c, (dict, list, set))],
        )

    def restore(self) -> None:
        own = vars(self.module)
        own.clear()
        own.update(self.attributes)
        for tensor, value in self.tensors:
            tensor.detach().copy_(value)
        for container, value in self.containers:
            container.clear()
            container.extend(value) if isinstance(container, list) else container.update(value)
