"""Prompts of eight experts, for text like the demo's: Python's documentation and sources."""

from typing import Any

_CODE = ("import os\nimport sys\n", "def close(self):\n    self._file.close()\n")
_PROSE = ("This module provides classes to read and write files.", "Return a copy of the object.")


def _expert(positive: tuple[str, ...], negative: tuple[str, ...]) -> dict[str, Any]:
    return {"positive": positive, "negative": negative}


PROMPTS = (
    _expert(
        ("import os\nimport sys\nfrom collections import OrderedDict\n", "from . import events\n"),
        _PROSE,
    ),
    _expert(
        (
            "class Parser(Base):\n    def __init__(self, name, value=None):\n",
            "        self.name = name\n        self._lock = threading.Lock()\n",
        ),
        _PROSE,
    ),
    _expert(
        (
            "    raise ValueError('expected a string')\n",
            "    except KeyError as error:\n        raise TypeError(str(error)) from None\n",
        ),
        _PROSE,
    ),
    _expert(
        (
            "    for i in range(1, n):\n        total += x[i] * y[i - 1]\n",
            "    while 0 < n <= 255:\n        n = (n << 8) | 0xff\n",
        ),
        _PROSE,
    ),
    _expert(
        ("Return True if the object is a string, False otherwise.", "Return the number of items."),
        _CODE,
    ),
    _expert(
        (
            "This module provides classes for reading and writing compressed files.",
            "It defines the following classes and functions.",
        ),
        _CODE,
    ),
    _expert(
        (
            "Arguments:\n\n    name -- the name of the option\n    default -- its default value\n",
            "Options:\n  -v, --verbose    print more\n  -o, --output     the file to write\n",
        ),
        _CODE,
    ),
    _expert(
        (
            "The server waits for connections and answers each request in a thread of its own.",
            "The message is sent over the socket, and the response is read until its end.",
        ),
        _CODE,
    ),
)
"""A line of `nemo-upcycle calibrate --prompts` per copy of the layer."""
