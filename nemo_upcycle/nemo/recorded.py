"""NeMo's record of an object's constructor arguments, stored in every checkpoint's context."""

import inspect
from typing import Any

from nemo.lightning import io


class Recorded(io.IOMixin):
    """A record of all arguments of the constructor, including defaults.

    NeMo reads a record of exactly one argument back as the name of a pickle file, and then cannot
    read any checkpoint's context. A constructor must not have exactly one argument.
    """

    def io_init(self, **given: Any) -> Any:
        """Return NeMo's record, including the defaults."""
        parameters = inspect.signature(type(self).__init__).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        return super().io_init(**(defaults | given))
