"""Megatron's GPT dataset, with indices keyed to the content of the data."""

import contextlib
import copy
import json
import os
import tempfile
from collections.abc import Iterator
from hashlib import md5
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset as MegatronGPTDataset

from nemo_upcycle.data.index import read_index
from nemo_upcycle.errors import UpcyclingError

CONTENT = "content"
"""Key of the content among the fields that identify an index."""

DESCRIPTION = "-description.txt"
NO_TOKEN = -1


class GPTDataset(MegatronGPTDataset):
    """Megatron's dataset.

    Megatron keys an index of samples to the path of the data, and reuses the index after the data
    have changed. Here the key includes the content. An index is written completely or not at all,
    and indices of other content are removed.

    Megatron replaces the tokenizer's padding token by token 0 and masks it in the loss. If padding
    is the eos token, the ends of all documents are lost. Here no token is padding.

    Raises:
        UpcyclingError: The corpus is too small for the split; Megatron's own loops forever over a
            split without documents.
    """

    def __init__(
        self,
        indexed_dataset: Any,
        dataset_path: str,
        indexed_indices: np.ndarray,
        num_samples: int,
        index_split: Any,
        config: Any,
    ) -> None:
        if len(indexed_indices) == 0:
            documents = self.numel_low_level_dataset(indexed_dataset)
            raise UpcyclingError(
                f"{dataset_path} has {documents} documents, which leaves none for the "
                f"{index_split.name} split of {config.split}. Use a larger corpus, or another "
                "data.split."
            )
        super().__init__(
            indexed_dataset, dataset_path, indexed_indices, num_samples, index_split, config
        )
        self._pad_token_id = NO_TOKEN

    def _build_document_sample_shuffle_indices(self) -> Any:
        """Build the indices, or load indices that were built from the same data."""
        index = Path(f"{self.dataset_path}.idx")
        if self.config.mock or not index.is_file():  # mock data or an object store
            return super()._build_document_sample_shuffle_indices()
        self.unique_identifiers[CONTENT] = read_index(index).sha256
        self.unique_description = json.dumps(
            self.unique_identifiers, indent=4, default=lambda each: each.unique_identifiers
        )
        self.unique_description_hash = md5(
            self.unique_description.encode(), usedforsecurity=False
        ).hexdigest()
        place = Path(self.config.path_to_cache or cache_directory(self.dataset_path))
        name = f"{self.unique_description_hash}-{type(self).__name__}-{self.index_split.name}"
        built = (place / f"{name}{DESCRIPTION}").is_file()
        if built or (torch.distributed.is_initialized() and torch.distributed.get_rank()):
            return super()._build_document_sample_shuffle_indices()
        place.mkdir(parents=True, exist_ok=True)
        _remove_others(place, self.dataset_path, self.unique_identifiers[CONTENT])
        with tempfile.TemporaryDirectory(dir=place, prefix=".building-") as new:
            with _config(self, path_to_cache=new):
                indices = super()._build_document_sample_shuffle_indices()
            # The description comes last and marks the index as complete.
            for file in sorted(
                Path(new).iterdir(), key=lambda file: file.name.endswith(DESCRIPTION)
            ):
                os.replace(file, place / file.name)
        return indices


def cache_directory(prefix: str) -> Path:
    """Return Megatron's directory for the indices of a dataset."""
    return Path(prefix) / "cache" / f"{MegatronGPTDataset.__name__}_indices"


@contextlib.contextmanager
def _config(dataset: Any, **values: Any) -> Iterator[None]:
    """Change a dataset's config temporarily; other datasets share the same object."""
    shared = dataset.config
    dataset.config = copy.copy(shared)
    vars(dataset.config).update(values)
    try:
        yield
    finally:
        dataset.config = shared


def _remove_others(place: Path, dataset_path: str, content: str) -> None:
    """Remove indices of a dataset's former content, and of blends with that content."""
    for description in place.glob(f"*{DESCRIPTION}"):
        try:
            said = json.loads(description.read_text())
        except (OSError, ValueError):
            continue
        datasets = said.get("datasets", [said])
        if any(
            each.get("dataset_path") == dataset_path and each.get(CONTENT, content) != content
            for each in datasets
        ):
            for file in place.glob(f"{description.name.removesuffix(DESCRIPTION)}-*"):
                file.unlink(missing_ok=True)
