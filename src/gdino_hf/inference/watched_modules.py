"""Notice what would make a recorded computation wrong: weights that moved, parts that were replaced, hooks."""

from collections.abc import Iterable
from typing import Any

from torch import nn

# Hooks of these packages do nothing in a plain forward: transformers' record states that the caller asked for.
_HARMLESS = ("transformers.", "gdino_hf.inference.")


class WatchedModules:
    """Modules as they were when a computation that reads their weights was recorded.

    A check costs a fraction of a millisecond, because it reads the modules' dictionaries rather than walking the tree.
    Weights that change in place need no new recording: a replay reads them where they are.

    Args:
        modules: The modules to watch, each by itself: name the modules below them as well.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        modules = list(modules)
        self._instances = [vars(module) for module in modules]
        self._tensors = [x for module in modules for x in (module._parameters, module._buffers) if x]
        self._children = [module._modules for module in modules if module._modules]
        self._hooks = [x for module in modules for x in (module._forward_hooks, module._forward_pre_hooks)]
        self._state = self._read()

    def changed(self) -> bool:
        """Return whether a weight lies elsewhere in memory, or a module below the watched ones is another one."""
        return self._read() != self._state

    def intercepted(self) -> bool:
        """Return whether something runs beside a module's own forward, which a replay would leave out."""
        return any("forward" in instance for instance in self._instances) or any(
            not str(getattr(hook, "__module__", "")).startswith(_HARMLESS)
            for hooks in self._hooks
            if hooks
            for hook in hooks.values()
        )

    def _read(self) -> tuple[Any, ...]:
        addresses = [x.data_ptr() for tensors in self._tensors for x in tensors.values() if x is not None]
        return addresses, [id(child) for children in self._children for child in children.values()]
