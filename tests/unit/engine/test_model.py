"""Changes to Megatron's models that no field makes."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nemo_upcycle.engine.model import multiply
from nemo_upcycle.families import architecture_of
from tests.tiny import tokens, write_dense

IDS = tokens(rows=2, length=16)
ROOT = 48**0.5  # 6.928, and 6.9375 in bf16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["gemma", "granite"])
def test_embeddings_are_multiplied_as_transformers_does(
    tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    """Bit for bit: a Gemma's factor is rounded to the embeddings' dtype first, a Granite's not."""
    from transformers import AutoModelForCausalLM

    config = {"embedding_multiplier": ROOT} if family == "granite" else {}
    dense = write_dense(tmp_path, family, hidden_size=48, **config)
    theirs = AutoModelForCausalLM.from_pretrained(dense, dtype=dtype).model
    inputs: list[torch.Tensor] = []
    theirs.layers[0].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    arch = architecture_of(json.loads((dense / "config.json").read_text()))
    embedding = torch.nn.Embedding.from_pretrained(theirs.embed_tokens.weight.detach())
    model = SimpleNamespace(pre_process=True, post_process=False, embedding=embedding)
    model.decoder = SimpleNamespace(layers=[])
    multiply(model, arch.multipliers)
    with torch.no_grad():
        theirs(IDS)
    assert torch.equal(embedding(IDS), inputs[0])
