"""transformers 5 loads what is exported, saves what is read back, and has the same defaults."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nemo_upcycle.config import ParallelFolding
from nemo_upcycle.families import FAMILIES
from nemo_upcycle.families.defaults import DEFAULTS
from nemo_upcycle.families.moe_config import MOE_FAMILIES, moe_model
from nemo_upcycle.families.rope import UNSCALED_ROPE
from nemo_upcycle.trained.export import export
from nemo_upcycle.trained.opened import open_trained
from tests.distributed import transformers5
from tests.distributed.pool import RankPool
from tests.distributed.step0 import IDS, TOLERANCE
from tests.distributed.trained import KINDS, trained
from tests.tiny import CONFIG

LINEAR = {"rope_type": "linear", "factor": 2.0}
LOAD_AND_SAVE = """
import sys, torch, transformers
assert transformers.__version__ >= "5", transformers.__version__
ids = torch.load(sys.argv[2])
model, loading = transformers.AutoModelForCausalLM.from_pretrained(
    sys.argv[1], dtype=torch.float32, output_loading_info=True
)
assert not any(loading.values()), loading
with torch.no_grad():
    torch.save(model(ids).logits, sys.argv[3])
model.save_pretrained(sys.argv[4])
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(ranks: RankPool, transformers_5: Path, tmp_path: Path, kind: str) -> None:
    saved, ((_, expected),) = trained(ranks, tmp_path, kind, ParallelFolding(), 1)
    export(saved, tmp_path / "hf")
    torch.save(IDS, tmp_path / "ids")
    arguments = [str(tmp_path / name) for name in ("hf", "ids", "logits", "again")]
    transformers5.end(transformers5.start(transformers_5, LOAD_AND_SAVE, *arguments))
    assert (torch.load(tmp_path / "logits") - expected).abs().max() <= TOLERANCE
    assert open_trained(tmp_path / "again").model == open_trained(tmp_path / "hf").model
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "again"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def configs(transformers_5: Path, given: dict[str, Any]) -> dict[str, Any]:
    """Return the defaults of families of transformers 5, and what 5 saves of given configs."""
    process = transformers5.start(transformers_5, transformers5.CONFIGS, json.dumps(given))
    return json.loads(transformers5.end(process).splitlines()[-1])


NAMES = {"glm4_moe": "n_routed_experts"}
NAMES |= {family: "num_experts" for family in DEFAULTS if family.startswith("qwen")}
"""The key for the number of experts in transformers 4, where it is not `num_local_experts`."""


def test_configs_of_transformers_5(transformers_5: Path) -> None:
    """The defaults are the same, and what 5 saves of a config of 4 is read as that one."""
    given = {
        family: CONFIG
        | {"rope_theta": 5e5, "model_type": family}
        | ({"partial_rotary_factor": 0.25} if family in UNSCALED_ROPE else {"rope_scaling": LINEAR})
        | {NAMES.get(family, "num_local_experts"): 8}
        | {"pad_token_id": 0}
        | {"moe_intermediate_size": 48, "shared_expert_intermediate_size": 1}
        for family in DEFAULTS
    }
    found = configs(transformers_5, given)
    for family, (defaults, saved) in found.items():
        ours = DEFAULTS[family]
        assert ours == {key: defaults[key] for key in ours}, family
        assert "rope_theta" not in saved and "rope_parameters" in saved
        read = moe_model if family in MOE_FAMILIES else FAMILIES[family].architecture
        assert read(saved) == read(given[family]), family
