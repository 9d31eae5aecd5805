"""One forward at a time: hooks follow a single one, and a second thread in the same transformer would mix two up."""

import sys
from threading import get_ident

from torch import nn


class OneThread:
    """Refuses a forward of `transformer` while one of another thread is under way.

    Threads may take turns. A forward that fails need not be left.
    """

    def __init__(self, name: str, transformer: nn.Module) -> None:
        self._transformer = transformer
        self._problem = (
            f"{name} is called from two threads at once, and pyramid sparse attention follows one forward at a time: "
            "hold a lock around the calls"
        )
        self._owner: int | None = None

    def enter(self) -> None:
        """At the start of a forward. Raises RuntimeError if another thread is in one."""
        if self._owner not in (None, get_ident()) and self._owner_is_in_forward():
            raise RuntimeError(self._problem)
        self._owner = get_ident()

    def leave(self) -> None:
        """At the end of a forward. Raises RuntimeError if another thread has begun one at the same moment."""
        if self._owner not in (None, get_ident()):
            raise RuntimeError(self._problem)
        self._owner = None

    def _owner_is_in_forward(self) -> bool:
        """Whether the owner still is in its forward, not only was in one that failed."""
        frame = None if self._owner is None else sys._current_frames().get(self._owner)
        while frame is not None:
            if frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals.get("self") is self._transformer:
                return True
            frame = frame.f_back
        return False
