"""Megatron's GPT dataset, which says so when a split has nothing in it."""

from typing import Any

import numpy as np
from megatron.core.datasets.gpt_dataset import GPTDataset as MegatronGPTDataset

from nemo_upcycle.errors import UpcyclingError


class GPTDataset(MegatronGPTDataset):
    """Megatron's dataset; over a split without documents Megatron's own loops for ever.

    Raises:
        UpcyclingError: The corpus is too small for the split.
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
