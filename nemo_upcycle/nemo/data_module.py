"""NeMo's data module with checks of the datasets before training."""

import sys
from functools import wraps
from pathlib import Path
from typing import Any

from nemo.collections import llm
from nemo.utils import AppState
from nemo.utils.get_rank import is_global_rank_zero
from transformers import PreTrainedTokenizerBase

from nemo_upcycle.data.checks import (
    Dataset,
    TokenizerCheck,
    check_random_ids_fit,
    check_there,
    check_tokenizer_fits,
    check_vocabulary,
)
from nemo_upcycle.data.paths import DataPath, of_words, words_of
from nemo_upcycle.engine.ranks import Ranks
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.files import check_writable
from nemo_upcycle.nemo.gpt_dataset import cache_directory


def _paths_of(paths: Any) -> dict[str, list[DataPath]]:
    """Return NeMo's `paths`, by split where they differ."""
    if isinstance(paths, dict):
        return {split: _paths_of(given)[""] for split, given in paths.items()}
    return {"": of_words(paths if isinstance(paths, (list, tuple)) else [paths])}


class MockDataModule(llm.MockDataModule):
    """NeMo's mock data, with a check that the model has embeddings for all ids.

    NeMo passes the wish for an attention mask on as the seed. Without Transformer Engine the model
    would get no mask, and refuse to run.

    Takes the arguments of NeMo's class.
    """

    def setup(self, stage: str = "") -> None:
        """Check that the model has embeddings for all ids; all ranks agree on the result.

        Raises:
            UpcyclingError: An id has no embedding.
        """
        rows = _rows_of(self)
        if rows is not None:
            check_random_ids_fit(self.tokenizer, rows)
        super().setup(stage)
        for name in ("_train_ds", "_validation_ds", "_test_ds"):
            made = getattr(self, name)
            sizes = made.name, made.length, made.seq_length
            masked = {"create_attention_mask": self.create_attention_mask}
            setattr(self, name, type(made)(self.tokenizer, *sizes, **masked))


def _rows_of(module: Any) -> int | None:
    """Return the number of embeddings of the model, without padding for TP."""
    trainer = getattr(module, "trainer", None)
    config = getattr(getattr(trainer, "lightning_module", None), "config", None)
    return getattr(config, "vocab_size", None)


class PreTrainingDataModule(llm.PreTrainingDataModule):
    """NeMo's data module for Megatron's datasets.

    Before Megatron builds indices, all ranks together check each dataset. The length must match
    index and manifest, the tokenizer must be the same, and the model must have an embedding for
    every token. Indices are written beside the data, or into the run's directory if the data's
    directory is not writable.

    Takes the arguments of NeMo's class. `paths` may begin with `~` and end with `.bin`.

    Raises:
        UpcyclingError: `paths` are malformed, or a file is missing.
    """

    # NeMo records the arguments in every checkpoint's context, by the constructor's signature.
    @wraps(llm.PreTrainingDataModule.__init__)  # type: ignore[misc]
    def __init__(self, paths: Any, *args: Any, **kwargs: Any) -> None:
        by_split = _paths_of(paths)
        self._data_paths = [path for each in by_split.values() for path in each if path.is_local]
        for path in self._data_paths:
            check_there(path)
        words = {split: words_of(each) for split, each in by_split.items()}
        super().__init__(words if isinstance(paths, dict) else words[""], *args, **kwargs)

    def setup(self, stage: str = "") -> None:
        """Check the datasets, on all ranks, and build Megatron's indices.

        Raises:
            UpcyclingError: A dataset fails a check; raised on every rank.
        """
        ranks = Ranks()
        seen = ranks.gather(ranks.on_all(lambda: self._check(ranks.rank, ranks.size)))
        rows = _rows_of(self)
        if rows is not None:
            for number, path in enumerate(self._data_paths):
                check_vocabulary(path.prefix, max(each[number] for each in seen), rows)
        error = None
        try:
            # One rank decides, because all ranks must use the same directory of indices.
            place = self._place_of_indices() if ranks.rank == 0 else None
        except UpcyclingError as failed:
            place, error = None, failed
        ranks.raise_on_all(error)
        self.index_mapping_dir = ranks.gather(place)[0]
        super().setup(stage)

    def _check(self, rank: int, ranks: int) -> list[int]:
        """Check the datasets; return the largest token id in this rank's part of each."""
        datasets = [Dataset(path) for path in self._data_paths]
        rows, tokenizer = _rows_of(self), self._transformers_tokenizer()
        if rows is not None:
            check_tokenizer_fits(self.tokenizer, rows)
        if tokenizer is not None:
            check = TokenizerCheck(tokenizer)
            for dataset in datasets:
                check.check(dataset)
        return [dataset.largest_id(rank, ranks) for dataset in datasets]

    def _transformers_tokenizer(self) -> PreTrainedTokenizerBase | None:
        tokenizer = getattr(self.tokenizer, "tokenizer", None)
        return tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else None

    def _place_of_indices(self) -> str | None:
        """Return a directory for Megatron's indices; None for those beside the data.

        Raises:
            UpcyclingError: No directory is writable.
        """
        if self.index_mapping_dir is not None:
            check_writable(Path(self.index_mapping_dir))
            return self.index_mapping_dir
        try:
            for path in self._data_paths:
                check_writable(cache_directory(path.prefix))
            return None
        except UpcyclingError as error:
            run = AppState().log_dir
            if not run:
                raise UpcyclingError(
                    f"Megatron's indices cannot be written beside the data: {error} Say where "
                    "else: data.index_mapping_dir=DIR."
                ) from error
            place = str(Path(run) / "index")
            check_writable(Path(place))
            if is_global_rank_zero():
                print(f"[data] indices are written to {place}: {error}", file=sys.stderr)
            return place
