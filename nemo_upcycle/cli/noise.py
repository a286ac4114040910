"""What other libraries say about themselves goes to a debug log instead of the screen.

NeMo, Megatron-Core, torch and transformers print dozens of lines while they are imported, such as
optional packages that are missing. None of them is about the user's model. Nothing is hidden with
`-v` or NEMO_UPCYCLE_VERBOSE=1, and the hidden lines are printed before the traceback of a crash.

Three rules decide, and whatever matches no rule is shown:

- Text that is written while a module is being imported is hidden. An error at import is raised.
- Records and warnings of libraries that never speak about the user's model (`LIBRARIES`).
- Texts that are known (`KNOWN`).

Warnings of this package and errors are always shown.
"""

import logging
import os
import re
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TextIO

import typer

from nemo_upcycle.errors import UpcyclingError

VERBOSE = "NEMO_UPCYCLE_VERBOSE"
"""If set to anything but 0: nothing is hidden, also not by the ranks that a command starts."""

LIBRARIES = {
    *("datasets", "fiddle", "lightning", "lightning_fabric", "lm_eval", "lm-eval", "megatron"),
    *("modelopt", "nemo", "nemo_logger", "nemo_run", "nv_one_logger", "nvidia_resiliency_ext"),
    *("pynvml", "torchao", "torchx", "urllib3", "fsspec", "absl"),
}
"""Loggers and packages whose warnings are not about the user's model.

torch and transformers may warn about the model; of theirs, deprecations and `KNOWN` are hidden.
"""

_OURS = r"\b(Upcycling|Tokenizer)Warning\b"

KNOWN = re.compile(
    "The pynvml package is deprecated"
    "|Failed to create unified memory mempool"
    "|has reached end of life"
    "|Transformer Engine and Apex are not installed"
    "|Apex is not installed"
    "|transformer_engine not installed"
    "|^OneLogger:|^No exporters were provided"
    "|Cannot import zarr"
    "|module could not be imported: cannot import name '(deploy|evaluate)'"
    "|You are using the default legacy behaviour of the"
    "|Special tokens have been added in the vocabulary"
    "|Setting `pad_token_id` to `eos_token_id`"
)
"""Texts that libraries print whatever the model is."""

RECORDS = re.compile(
    rf"{KNOWN.pattern}"
    r"|^\[NeMo I |^(INFO|DEBUG):[\w.]+:"
    r"|^\[NeMo W [^]]* (__init__|nemo_logger|rerun_state_machine):\d+\]"
    rf"|^(\[NeMo W [^]]*\] )?\S*site-packages/({'|'.join(sorted(LIBRARIES))})/\S*:\d+: "
    rf"(?!.*{_OURS})"
    r"|^(\[NeMo W [^]]*\] )?\S*site-packages/\S*:\d+: (Future|Deprecation)Warning: "
    r"|^\[NeMo W .* Cannot save the \w+ indexes because path_to_cache is None"
    # Lightning's words about itself, and its table of the model's modules.
    r"|^(GPU|TPU|HPU) available: |^`Trainer[.(]|^distributed_backend=|^Initializing distributed: "
    r"|^All distributed processes registered|^-{20,}$|^💡 Tip"
    r"|^ +\| Name +\| |^\d+ +\| \w+ +\| .*\| (train|eval)\b"
    r"|^[\d.]+ *[KMBT]? +(Trainable|Non-trainable|Total|Modules in)\b",
    re.MULTILINE,
)
"""What NeMo, Megatron and Lightning print in a run, besides the steps."""

_NOTHING = re.compile("(?!)")
_LINES = 10_000

_log: deque[str] = deque(maxlen=_LINES)


def verbose() -> bool:
    """Return whether everything is shown."""
    return os.environ.get(VERBOSE, "0") not in ("", "0")


def take_option(arguments: list[str]) -> list[str]:
    """Return the arguments without `-v` and `--verbose`, which are taken wherever they are."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    kept = [word for word in arguments[:end] if word not in ("-v", "--verbose")]
    if len(kept) < end:
        os.environ[VERBOSE] = "1"
    return kept + arguments[end:]


def hush(records: bool = True) -> Callable[[], None]:
    """Hide the noise of libraries from here on; do nothing if everything is shown.

    Args:
        records: Whether to hide log records as well, from files too. Otherwise only what reaches
            the screen is hidden.

    Returns:
        A function that undoes it.
    """
    if verbose() or isinstance(sys.stderr, _Screen):
        return lambda: None
    before = sys.stdout, sys.stderr, warnings.showwarning, logging.Logger.callHandlers
    if records:  # what a command prints is never compared with known texts
        sys.stdout, sys.stderr = _Screen(sys.stdout, _NOTHING), _Screen(sys.stderr, KNOWN)
    else:
        sys.stdout, sys.stderr = _Screen(sys.stdout, RECORDS), _Screen(sys.stderr, RECORDS)
    warnings.showwarning = partial(_show_warning, warnings.showwarning)
    if records:
        logging.Logger.callHandlers = _call_handlers  # type: ignore[method-assign,assignment]
        # Also of transformers, which asks the hub's library.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        if "datasets" in sys.modules:  # which has read its environment already
            sys.modules["datasets"].disable_progress_bars()

    def undo() -> None:
        sys.stdout, sys.stderr, warnings.showwarning, handlers = before
        logging.Logger.callHandlers = handlers  # type: ignore[method-assign]

    return undo


@contextmanager
def hushed() -> Iterator[None]:
    """Hide the noise of libraries; before an error that has a traceback, show what was hidden."""
    undo = hush()
    try:
        yield
    except (UpcyclingError, OSError, ModuleNotFoundError, typer.Exit):
        raise  # one line, or none
    except Exception:
        undo()
        show_log()
        raise
    finally:
        undo()


def show_log(file: TextIO | None = None) -> None:
    """Print what was hidden, before the traceback of a crash."""
    if _log:
        print("".join(_log).rstrip("\n"), file=file or sys.stderr)
        _log.clear()


def importing() -> bool:
    """Return whether this thread is importing a module."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


class _Screen:
    """A stream that passes on what is not noise."""

    def __init__(self, stream: Any, known: re.Pattern[str]) -> None:
        self._stream, self._known = stream, known
        self._open = False  # whether the last line was hidden, and lacks its end

    def write(self, text: str) -> int:
        known = self._known.search(text) and "Error" not in text
        hidden = importing() or known or (self._open and text == "\n")
        if not hidden:
            self._open = False
            return self._stream.write(text)
        self._open = not text.endswith("\n")
        _log.append(text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __iter__(self) -> Any:
        return iter(self._stream)


def _show_warning(
    show: Callable[..., None],
    message: Any,
    category: Any,
    filename: str,
    lineno: int,
    file: Any = None,
    line: Any = None,
) -> None:
    ours = str(category.__module__).startswith("nemo_upcycle")
    deprecated = issubclass(category, FutureWarning | DeprecationWarning)
    theirs = _package(filename) in LIBRARIES or (deprecated and "site-packages" in filename)
    if file is None and not ours and (importing() or theirs):
        _log.append(warnings.formatwarning(message, category, filename, lineno, line))
    else:
        show(message, category, filename, lineno, file, line)


def _package(filename: str) -> str:
    """Return the package of a file under site-packages."""
    return re.split(r"[\\/]", filename.rpartition("site-packages")[2].lstrip("\\/"))[0]


_call_handlers_before = logging.Logger.callHandlers


def _call_handlers(logger: logging.Logger, record: logging.LogRecord) -> None:
    text = record.getMessage()
    noise = logger.name.partition(".")[0] in LIBRARIES or KNOWN.search(text) or importing()
    if record.levelno < logging.ERROR and noise and not re.search(_OURS, text):
        _log.append(f"{logger.name}: {text}\n")
    else:
        _call_handlers_before(logger, record)
