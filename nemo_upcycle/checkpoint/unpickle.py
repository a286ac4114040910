"""Read pickles without executing them.

A pickle is a program: it names functions, which unpickling imports and calls. Here nothing named in
a pickle is imported. Each object becomes an `Inert`, which only remembers the arguments, so that
files from any source can be inspected.
"""

import io
import pickle
from typing import Any

from nemo_upcycle.errors import UpcyclingError


class Inert:
    """A placeholder for an object of a pickle: nothing was imported or called.

    Attributes:
        path: The name in the pickle, such as `argparse.Namespace`.
        args: The arguments of the call.
        state: The state of the object.
    """

    path = "unknown"
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any, **kwargs: Any) -> "Inert":
        self = super().__new__(cls)
        self.args = args
        self.state = {}
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def _ignore(self, *args: Any) -> "Inert":
        return Inert()

    # Methods that unpickling calls to fill a list, a dict, a set, or the result of a function.
    append = extend = add = __setitem__ = __call__ = _ignore


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        if (module, name) == ("torch", "Size"):
            return tuple
        return type("Inert", (Inert,), {"path": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> Any:
        return pid  # torch.save's reference to a storage: a tuple


def unpickle(data: bytes, where: object) -> Any:
    """Return the contents of a pickle, with an `Inert` for every object that is not plain data.

    Args:
        data: The pickle.
        where: Description of the file, for the error.

    Returns:
        Numbers, text, lists, tuples, dicts; torch.Size as a tuple; all else as `Inert`.

    Raises:
        UpcyclingError: The pickle is damaged.
    """
    try:
        return _Unpickler(io.BytesIO(data)).load()
    except Exception as error:  # bytes that are not a pickle can raise anything
        raise UpcyclingError(
            f"{where} cannot be read ({type(error).__name__}: {error}). "
            "The file is damaged or incomplete; get the file again."
        ) from error
