"""Versions of libraries that do not fit each other, as fakes: what is mended, and what is left."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nemo_upcycle.engine import versions


@pytest.mark.skipif(np.__version__ < "2", reason="numpy 1 has product")
def test_the_numpy_of_this_environment_has_product() -> None:
    assert np.product((2, 3)) == 6


def test_numpy_2_gets_product_and_numpy_1_keeps_its_own() -> None:
    two = SimpleNamespace(prod=np.prod)
    versions.give_product(two)
    assert two.product((2, 3)) == 6
    one = SimpleNamespace(prod=np.prod, product="its own")
    versions.give_product(one)
    assert one.product == "its own"


class Evaluated:
    """What `triton.constexpr_function` makes of a function."""

    def __init__(self, function: Any) -> None:
        self.function = function


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A stand-in for `triton.language.core`, imported under that name."""
    core = ModuleType("triton.language.core")
    core.get_int_dtype = lambda bitwidth, signed: f"int{bitwidth}"
    core.other = object()
    monkeypatch.setitem(sys.modules, core.__name__, core)
    return core


def permutation(core: ModuleType | None, **triton: Any) -> SimpleNamespace:
    own = {} if core is None else {"core": core}
    return SimpleNamespace(triton=SimpleNamespace(**triton), **own)


def test_triton_evaluates_get_int_dtype_for_transformer_engine_alone(core: ModuleType) -> None:
    function = core.get_int_dtype
    module = permutation(core, constexpr_function=Evaluated)
    versions.mend_permutation(module)
    assert module.core.get_int_dtype.function is function
    assert module.core.other is core.other
    assert core.get_int_dtype is function
    assert type(module.core) is ModuleType  # other types Triton copies, and cannot
    mended = module.core
    versions.mend_permutation(module)
    assert module.core is mended


def test_other_versions_of_triton_and_transformer_engine_are_left(core: ModuleType) -> None:
    older_triton, newer_engine = permutation(core), permutation(None, constexpr_function=Evaluated)
    for module in (older_triton, newer_engine):
        before = dict(vars(module))
        versions.mend_permutation(module)
        assert vars(module) == before


@pytest.fixture
def compiling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module that compiles when imported, in the way of Megatron's unified memory."""
    name = "compiles_at_import"
    (tmp_path / f"{name}.py").write_text(
        "import warnings\n"
        "from torch.utils.cpp_extension import load_inline\n"
        "try:\n"
        "    load_inline(name='x', cpp_sources=['no code'])\n"
        "    compiled = True\n"
        "except (RuntimeError, ImportError, OSError):\n"
        "    compiled = False\n"
        "    warnings.warn('Failed to create unified memory mempool.')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    sys.modules.pop(name, None)


def test_nothing_is_compiled_at_import(
    compiling: str, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    from torch.utils import cpp_extension

    calls: list[Any] = []
    monkeypatch.setattr(cpp_extension, "load_inline", lambda **given: calls.append(given))
    finders = [versions.Mender({compiling: versions.without_compiler}), *sys.meta_path]
    monkeypatch.setattr(sys, "meta_path", finders)
    assert not __import__(compiling).compiled
    assert not calls
    assert not [one for one in recwarn if "mempool" in str(one.message)]
    cpp_extension.load_inline(name="others compile")
    assert len(calls) == 1


def test_a_module_that_fails_or_is_missing_stays_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered = []

    @contextmanager
    def around(module: ModuleType) -> Iterator[None]:
        entered.append(module.__name__)
        yield

    (tmp_path / "fails_at_import.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    names = ("fails_at_import", "is_not_there")
    finder = versions.Mender(dict.fromkeys(names, around))
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    with pytest.raises(ZeroDivisionError):
        __import__("fails_at_import")
    with pytest.raises(ModuleNotFoundError):
        __import__("is_not_there")
    assert entered == ["fails_at_import"]


def test_importing_the_engine_mends_once() -> None:
    versions.mend()
    assert len([each for each in sys.meta_path if isinstance(each, versions.Mender)]) == 1
