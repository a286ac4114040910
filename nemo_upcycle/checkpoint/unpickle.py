"""Read pickles without running what they ask for.

A pickle is a program: it names functions, which unpickling imports and calls. Here nothing that it
names is imported. What it would have made is an `Inert` object that only remembers what it was to
be made of, so that a file from anywhere can be looked into.
"""

import io
import pickle
from typing import Any

from nemo_upcycle.errors import UpcyclingError


class Inert:
    """Stands for what a pickle names: nothing was imported, nothing called.

    Attributes:
        path: What the pickle calls it, such as `argparse.Namespace`.
        args: What it was to be called with.
        state: What it was to be filled with.
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

    # What unpickling calls to fill a list, a dict, a set, or the result of a function.
    append = extend = add = __setitem__ = __call__ = _ignore


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        if (module, name) == ("torch", "Size"):
            return tuple
        return type("Inert", (Inert,), {"path": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> Any:
        return pid  # torch.save's reference to a storage: a tuple


def unpickle(data: bytes, where: object) -> Any:
    """Return what a pickle holds, an `Inert` for every object that is not plain data.

    Args:
        data: The pickle.
        where: What it is, for the error.

    Returns:
        Numbers, text, lists, tuples, dicts; torch.Size as a tuple; the rest inert.

    Raises:
        UpcyclingError: It is damaged.
    """
    try:
        return _Unpickler(io.BytesIO(data)).load()
    except Exception as error:  # bytes that are no pickle can make it raise anything
        raise UpcyclingError(
            f"{where} cannot be read ({type(error).__name__}: {error}). "
            "It is damaged or incomplete; get it again."
        ) from error
