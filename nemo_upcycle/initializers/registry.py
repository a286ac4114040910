"""Initializers by name, with options, from this package and from others.

A registered function checks the options and returns the initializer, which is then called with
every block of neurons:

    from nemo_upcycle.initializers import Initializer, Neurons, register

    @register("flip")
    def flip(fraction: float = 0.5) -> Initializer:
        def initialize(neurons: Neurons) -> None:
            neurons.values["down"][neurons.choose(fraction)] *= -1

        return initialize

Initializers of routers are registered alike, and return the router's rows:

    from nemo_upcycle.initializers import RouterInitializer, RouterRows, Values, register_router

    @register_router("orthogonal")
    def orthogonal(scale: float = 1.0) -> RouterInitializer:
        def initialize(rows: RouterRows) -> Values:
            return scale * np.linalg.qr(rows.normal().T)[0].T

        return initialize

Recipes find both in every process if the package declares an entry point:

    [project.entry-points."nemo_upcycle.initializers"]
    flip = "my_package.my_module:flip"

    [project.entry-points."nemo_upcycle.router_initializers"]
    orthogonal = "my_package.my_module:orthogonal"

An initializer that needs a file can be an object with a method `check(target: Target)`, which is
called on every rank before anything is written.
"""

import ast
import inspect
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.initializers.neurons import Neurons
from nemo_upcycle.initializers.rows import RouterRows, Values

Initializer = Callable[[Neurons], None]
RouterInitializer = Callable[[RouterRows], Values]
Made = TypeVar("Made")
F = TypeVar("F", bound=Callable[..., Any])

_NO_NUMBERS = ("nan", "-nan", "inf", "-inf")
"""Float values that are not Python literals; initializers refuse them with the option's name."""


class Registry(Generic[Made]):
    """Initializers of one kind.

    Args:
        kind: The kind in errors; also what the field of `UpcyclingConfig` is called.
        group: Group of entry points for initializers of other packages.
        example: An initializer with options, for errors.
    """

    def __init__(self, kind: str, group: str, example: str) -> None:
        self._kind = kind
        self._group = group
        self._example = example
        self._makers: dict[str, Callable[..., Made]] = {}

    def register(self, name: str) -> Callable[[F], F]:
        """Register a function that makes an initializer from options."""

        def decorate(maker: F) -> F:
            self._makers[name] = maker
            return maker

        return decorate

    def names(self) -> list[str]:
        """Return the names of all initializers."""
        points = entry_points(group=self._group)
        return sorted({*self._makers, *(point.name for point in points)})

    def make(self, text: str) -> Made:
        """Make an initializer from a recipe's text.

        Args:
            text: A name, or a name with options in parentheses, such as `drop(ratio=0.3)` or
                `hybrid(copy, noise(std=0.01))`. The text is parsed, not executed. Semicolons mean
                commas, because NeMo-Run's command line splits the arguments of a factory at commas.

        Returns:
            The initializer.

        Raises:
            UpcyclingError: There is no such initializer, or the options are invalid.
        """
        try:
            tree = ast.parse(text.strip().replace(";", ","), mode="eval").body
        except (SyntaxError, ValueError, RecursionError):
            raise self._unreadable(text) from None
        return self._make(tree, text)

    def _make(self, node: ast.expr, text: str) -> Made:
        call = node if isinstance(node, ast.Call) else ast.Call(func=node, args=[], keywords=[])
        if not isinstance(call.func, ast.Name):
            raise self._unreadable(text)
        maker = self._maker(call.func.id)
        arguments = [self._value(argument, text) for argument in call.args]
        options = {
            keyword.arg or "**": self._value(keyword.value, text) for keyword in call.keywords
        }
        try:
            inspect.signature(maker).bind(*arguments, **options)
        except TypeError as error:
            raise UpcyclingError(
                f"{self._kind} {text!r}: {error}; expected {call.func.id}{_options(maker)}."
            ) from None
        return maker(*arguments, **options)

    def _value(self, node: ast.expr, text: str) -> Any:
        if isinstance(node, ast.Name | ast.UnaryOp) and ast.unparse(node).lower() in _NO_NUMBERS:
            return float(ast.unparse(node))
        if isinstance(node, ast.Name | ast.Call):
            return self._make(node, text)
        try:
            return ast.literal_eval(node)
        except ValueError:
            raise self._unreadable(text) from None

    def _maker(self, name: str) -> Callable[..., Made]:
        if name not in self._makers:
            for point in entry_points(group=self._group, name=name):
                self._makers[name] = point.load()
        if name not in self._makers:
            raise UpcyclingError(
                f"There is no {self._kind} {name!r}; expected one of: {', '.join(self.names())}. "
                f"Initializers of other packages need an entry point in the group "
                f"{self._group!r}."
            )
        return self._makers[name]

    def _unreadable(self, text: str) -> UpcyclingError:
        return UpcyclingError(
            f"{self._kind} is {text!r}; expected a name, or a name with options, such as "
            f"{self._example}."
        )


def _options(maker: Callable[..., Any]) -> str:
    return str(inspect.signature(maker).replace(return_annotation=inspect.Signature.empty))


EXPERTS: Registry[Initializer] = Registry(
    "initializer", "nemo_upcycle.initializers", "drop(ratio=0.3)"
)
ROUTERS: Registry[RouterInitializer] = Registry(
    "router_initializer", "nemo_upcycle.router_initializers", "centroids(stats='FILE')"
)
register = EXPERTS.register
names = EXPERTS.names
make_initializer = EXPERTS.make
register_router = ROUTERS.register
router_names = ROUTERS.names
make_router_initializer = ROUTERS.make
