"""The paper's model, its mapping and its GPUs, for tests of the planner."""

from dataclasses import replace
from typing import Any

from nemo_upcycle_recipes.expectations import mapping, workload
from nemo_upcycle_recipes.numbers import LLAMA3_8B_E8T2

from nemo_upcycle.planner.hardware import hardware
from nemo_upcycle.planner.workload import Mapping

H100 = hardware("h100")
QUICK_HOST = replace(H100, host_slowness=1e-6)
"""H100 whose host never keeps them waiting."""
PAPER = workload(LLAMA3_8B_E8T2)


def paper_mapping(**changes: Any) -> Mapping:
    """Return the paper's mapping with some of its fields changed."""
    return replace(mapping(LLAMA3_8B_E8T2), **changes)
