"""Expert initialisers by name, with options, from this package and from others.

A registered function checks the options and returns the initialiser, which is then called with
every block of neurons:

    from nemo_upcycle.initializers import Initializer, Neurons, register

    @register("flip")
    def flip(fraction: float = 0.5) -> Initializer:
        def initialize(neurons: Neurons) -> None:
            neurons.values["down"][neurons.choose(fraction)] *= -1

        return initialize

Recipes find the initialiser in every process if the package declares an entry point:

    [project.entry-points."nemo_upcycle.initializers"]
    flip = "my_package.my_module:flip"
"""

import ast
import inspect
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, TypeVar

from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.initializers.neurons import Neurons

GROUP = "nemo_upcycle.initializers"
"""Group of entry points for initialisers of other packages."""

Initializer = Callable[[Neurons], None]
Maker = Callable[..., Initializer]
F = TypeVar("F", bound=Maker)

_NO_NUMBERS = ("nan", "-nan", "inf", "-inf")
"""Float values that are not Python literals; initialisers refuse them with the option's name."""

_makers: dict[str, Maker] = {}


def register(name: str) -> Callable[[F], F]:
    """Register a function that makes an initialiser from options."""

    def decorate(maker: F) -> F:
        _makers[name] = maker
        return maker

    return decorate


def names() -> list[str]:
    """Return the names of all initialisers."""
    return sorted({*_makers, *(point.name for point in entry_points(group=GROUP))})


def make_initializer(text: str) -> Initializer:
    """Make an initialiser from a recipe's text.

    Args:
        text: A name, or a name with options in parentheses, such as `drop(ratio=0.3)` or
            `hybrid(copy, noise(std=0.01))`. The text is parsed, not executed. Semicolons mean
            commas, because NeMo-Run's command line splits the arguments of a factory at commas.

    Returns:
        The initialiser.

    Raises:
        UpcyclingError: There is no such initialiser, or the options are invalid.
    """
    try:
        tree = ast.parse(text.strip().replace(";", ","), mode="eval").body
    except (SyntaxError, ValueError, RecursionError):
        raise _unreadable(text) from None
    return _make(tree, text)


def _make(node: ast.expr, text: str) -> Initializer:
    call = node if isinstance(node, ast.Call) else ast.Call(func=node, args=[], keywords=[])
    if not isinstance(call.func, ast.Name):
        raise _unreadable(text)
    maker = _maker(call.func.id)
    arguments = [_value(argument, text) for argument in call.args]
    options = {keyword.arg or "**": _value(keyword.value, text) for keyword in call.keywords}
    try:
        inspect.signature(maker).bind(*arguments, **options)
    except TypeError as error:
        raise UpcyclingError(
            f"initializer {text!r}: {error}; expected {call.func.id}{_options(maker)}."
        ) from None
    return maker(*arguments, **options)


def _options(maker: Maker) -> str:
    return str(inspect.signature(maker).replace(return_annotation=inspect.Signature.empty))


def _value(node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.Name | ast.UnaryOp) and ast.unparse(node).lower() in _NO_NUMBERS:
        return float(ast.unparse(node))
    if isinstance(node, ast.Name | ast.Call):
        return _make(node, text)
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise _unreadable(text) from None


def _maker(name: str) -> Maker:
    if name not in _makers:
        for point in entry_points(group=GROUP, name=name):
            _makers[name] = point.load()
    if name not in _makers:
        raise UpcyclingError(
            f"There is no initializer {name!r}; expected one of: {', '.join(names())}. "
            f"Initializers of other packages need an entry point in the group {GROUP!r}."
        )
    return _makers[name]


def _unreadable(text: str) -> UpcyclingError:
    return UpcyclingError(
        f"initializer is {text!r}; expected a name, or a name with options, such as "
        "drop(ratio=0.3)."
    )
