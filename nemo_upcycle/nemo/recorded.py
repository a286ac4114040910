"""NeMo's record of how an object was made, which every checkpoint's context has."""

import inspect
from typing import Any

from nemo.lightning import io


class Recorded(io.IOMixin):
    """Records all arguments of the constructor, those that were not given too.

    NeMo reads a record of exactly one argument back as the name of a pickle file, and then cannot
    read any checkpoint's context. A constructor must not have exactly one argument.
    """

    def io_init(self, **given: Any) -> Any:
        """Return NeMo's record, with the defaults."""
        parameters = inspect.signature(type(self).__init__).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        return super().io_init(**(defaults | given))
