"""YAML files of settings: those that the package has, by name, and a user's own, by path."""

from dataclasses import fields
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

from nemo_upcycle.errors import UpcyclingError

T = TypeVar("T")


def names_in(directory: Path) -> list[str]:
    """Return the names of the files that the package has in a directory."""
    return sorted(path.stem for path in directory.glob("*.yaml"))


def find(source: str, directory: Path, what: str) -> Path:
    """Return the file that is meant: one of the package's, by name, or a user's.

    Raises:
        UpcyclingError: There is none.
    """
    path = directory / f"{source.lower()}.yaml"
    if not path.is_file():
        path = Path(source).expanduser()
    if not path.is_file():
        names = ", ".join(names_in(directory))
        raise UpcyclingError(
            f"There is no {what} {source!r}; expected one of: {names}, or a YAML file."
        )
    return path


def read(kind: type[T], path: Path, directory: Path) -> T:
    """Read a dataclass; with `base: NAME` a file says only what differs from one of the package's.

    Args:
        kind: The dataclass.
        path: The file.
        directory: Where the package has its own.

    Raises:
        UpcyclingError: A field is missing, unknown, not of its type, or not finite.
    """
    from omegaconf import OmegaConf  # 0.15 s
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        layers = _layers(path, directory)
        _check_numbers(kind, layers)
        merged = OmegaConf.merge(OmegaConf.structured(kind), *layers)
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except (OmegaConfBaseException, YAMLError, OSError) as error:
        expected = ", ".join(field.name for field in fields(kind))  # type: ignore[arg-type]
        first = str(error).splitlines()[0]
        raise UpcyclingError(f"{path}: {first}. Expected the fields {expected}.") from None
    except UpcyclingError as error:
        raise UpcyclingError(f"{path}: {error}") from None


def _check_numbers(kind: type[Any], layers: list[Any]) -> None:
    """Refuse what is no finite number where a number is expected; OmegaConf converts texts."""
    from omegaconf import DictConfig

    wanted = {field.name: field.type for field in fields(kind) if field.type in (int, float)}
    for layer in layers:
        for name in wanted if isinstance(layer, DictConfig) else ():
            if name not in layer:
                continue
            value, whole = layer[name], wanted[name] is int
            number = isinstance(value, int if whole else int | float)
            if not number or isinstance(value, bool) or not isfinite(value):
                expected = "whole number" if whole else "finite number"
                raise UpcyclingError(f"{name} is {value!r}; expected a {expected}.")


def _layers(path: Path, directory: Path) -> list[Any]:
    """Return what a file says, after what its base says."""
    from omegaconf import DictConfig, OmegaConf

    document = OmegaConf.load(path)
    base = document.pop("base", None) if isinstance(document, DictConfig) else None
    if base is None:
        return [document]
    if base not in names_in(directory):
        names = ", ".join(names_in(directory))
        raise UpcyclingError(f"base is {base!r}; expected one of: {names}.")
    return [*_layers(directory / f"{base}.yaml", directory), document]
