"""The tokenizer of a dense checkpoint."""

import atexit
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_upcycle.checkpoint.huggingface import resolve_directory
from nemo_upcycle.checkpoint.megatron import find_layout
from nemo_upcycle.checkpoint.run_directory import resolve_trained
from nemo_upcycle.checkpoint.tokenizer_files import NEEDED, copy_tokenizer, find_tokenizer
from nemo_upcycle.errors import UpcyclingError

if TYPE_CHECKING:
    from nemo.collections.common.tokenizers import AutoTokenizer


def checkpoint_tokenizer(source: str) -> "AutoTokenizer":
    """Load the tokenizer of a dense checkpoint, never from the network.

    Args:
        source: A directory of Hugging Face's or NeMo 2's, or a hub name that is in the local cache.

    Returns:
        NeMo's tokenizer.

    Raises:
        UpcyclingError: There is no such directory, or no tokenizer in it.
    """
    found = tokenizer_directory(source)
    if found is None:
        raise UpcyclingError(
            f"{resolve_directory(source)} holds no tokenizer; expected one of {', '.join(NEEDED)}. "
            "Put the model's tokenizer there, or name its directory: tokenizer=DIR."
        )
    from nemo.collections.common.tokenizers import AutoTokenizer

    return AutoTokenizer(str(_alone(found)))


def tokenizer_directory(source: str | Path) -> Path | None:
    """Return where the tokenizer of a checkpoint is, None if it has none.

    Args:
        source: What `checkpoint_tokenizer` takes, or a trained checkpoint.

    Raises:
        UpcyclingError: There is no such checkpoint.
    """
    directory = resolve_trained(source)
    layout = None if (directory / "config.json").is_file() else find_layout(directory)
    return find_tokenizer(directory, layout.context if layout else None)


def _alone(directory: Path) -> Path:
    """Return a directory with the tokenizer's files alone, which lives as long as the process.

    NeMo copies the whole directory of a tokenizer into every checkpoint's context: beside weights,
    these too.
    """
    scratch = Path(tempfile.mkdtemp(prefix="nemo-upcycle-"))
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    (scratch / "tokenizer").mkdir()
    copy_tokenizer(directory, scratch / "tokenizer")
    return scratch / "tokenizer"
