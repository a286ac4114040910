"""Tensors that a checkpoint takes without the buffer around them."""

import pytest
import torch

from nemo_upcycle.engine.cpu.patches import with_storage_of_its_own


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_a_view_is_described_without_a_copy(dtype: torch.dtype) -> None:
    buffer = torch.arange(100).to(dtype)
    view = buffer[10:30].view(4, 5)
    alone = with_storage_of_its_own(view)
    assert alone.data_ptr() == view.data_ptr()
    assert alone.untyped_storage().size() == 20 * view.itemsize
    assert torch.equal(alone, view) and alone.dtype is dtype


def test_the_memory_lives_on() -> None:
    alone = with_storage_of_its_own(torch.arange(1000.0)[500:])
    assert torch.equal(alone, torch.arange(500.0, 1000.0))


def test_what_is_not_contiguous_stays() -> None:
    view = torch.arange(20.0).view(4, 5).T
    assert with_storage_of_its_own(view) is view
