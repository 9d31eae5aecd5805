"""The arguments of a forward by name, however they were given."""

import inspect
from typing import Any


class ForwardArguments:
    """Of a transformer class: its own signature, or, where it takes `*args` to pass them on, that of its base."""

    def __init__(self, transformer_class: type) -> None:
        forwards = (inspect.signature(cls.forward) for cls in transformer_class.__mro__ if hasattr(cls, "forward"))
        declared = (list(forward.parameters.values()) for forward in forwards)
        _, *named = next(found for found in declared if all(p.kind is not p.VAR_POSITIONAL for p in found))
        self._signature = inspect.Signature(named)
        self._rest = next((p.name for p in named if p.kind is p.VAR_KEYWORD), None)
        self.names = tuple(self._signature.parameters)

    def by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Raises TypeError where the forward itself would: an argument is missing, given twice or unknown."""
        call = dict(self._signature.bind(*args, **kwargs).arguments)
        return call | call.pop(self._rest, {}) if self._rest else call
