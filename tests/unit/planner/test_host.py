"""Memory on CPU: what a rank needs, and what the machine has."""

from dataclasses import replace
from pathlib import Path

import pytest

from nemo_upcycle.config import ParallelFolding, UpcyclingConfig
from nemo_upcycle.planner.host import GIB, HostMemory, available, host_memory
from nemo_upcycle.planner.workload import Mapping, Workload
from tests.planning import PAPER


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal: 32 kB\nMemAvailable:   20971520 kB\n"}
V2 = {
    "proc/self/cgroup": "0::/job/step\n",
    "sys/fs/cgroup/job/memory.max": f"{8 * GIB}\n",
    "sys/fs/cgroup/job/memory.current": f"{5 * GIB}\n",
    "sys/fs/cgroup/job/memory.stat": f"anon 1\ninactive_file {GIB}\n",
    "sys/fs/cgroup/job/step/memory.max": "max\n",
    "sys/fs/cgroup/job/step/memory.current": "0\n",
}
V1 = {
    "proc/self/cgroup": "5:cpu:/x\n3:memory:/docker\n",
    "sys/fs/cgroup/memory/docker/memory.limit_in_bytes": f"{3 * GIB}\n",
    "sys/fs/cgroup/memory/docker/memory.usage_in_bytes": f"{GIB}\n",
}


@pytest.mark.parametrize(
    ("files", "gib"),
    [({}, None), (MEMINFO, 20), (MEMINFO | V2, 4), (MEMINFO | V1, 2), (V1, 2)],
    ids=["unknown", "no limit", "a limit further up, version 2", "version 1", "no meminfo"],
)
def test_what_is_available(tmp_path: Path, files: dict[str, str], gib: int | None) -> None:
    assert available(write(tmp_path, files)) == (None if gib is None else gib * GIB)


def on_cpu(experts: int | None, ranks: int = 1, ep: int = 1) -> HostMemory:
    upcycling = replace(PAPER.upcycling, num_moe_experts=experts)
    model = Workload(PAPER.arch, upcycling, 512, 8, "32")
    return host_memory(model, Mapping(ParallelFolding.of(ep=ep), ranks))


def test_more_experts_need_more_and_more_ranks_less() -> None:
    # Parameters, gradients and two moments in fp32, and a copy of all but the gradients.
    assert on_cpu(8).state == pytest.approx(16 * 47.5e9, rel=0.01)
    assert on_cpu(8).saving == pytest.approx(12 * 47.5e9, rel=0.01)
    # Data-parallel ranks gather the optimizer's state, their share of which is half.
    assert on_cpu(8, ranks=2).saving == pytest.approx(2 * 8 * 47.5e9, rel=0.01)
    assert on_cpu(None).total < on_cpu(4).total < on_cpu(8).total
    assert on_cpu(8, ranks=2, ep=2).total < on_cpu(8, ranks=2).total


def test_the_peak_of_a_measured_run() -> None:
    """SmolLM2-135M, 4 experts in every third layer, 4 × 128 tokens: 8.2 GiB at most, saving."""
    arch = replace(
        PAPER.arch,
        num_layers=30,
        hidden_size=576,
        ffn_hidden_size=1536,
        num_attention_heads=9,
        num_query_groups=3,
        kv_channels=64,
        vocab_size=49152,
        share_embeddings_and_output_weights=True,
    )
    upcycling = UpcyclingConfig(num_moe_experts=4, moe_layer_freq=3)
    mapping = Mapping(ParallelFolding(), 1, micro_batch_size=4)
    found = host_memory(Workload(arch, upcycling, 128, 4, "32"), mapping)
    assert 8.2 <= found.total / GIB < 8.2 * 1.1


def test_attention_scores_are_counted() -> None:
    model = Workload(PAPER.arch, PAPER.upcycling, 512, 8, "32")
    longer = Workload(PAPER.arch, PAPER.upcycling, 2048, 8, "32")
    short, long = (
        host_memory(one, Mapping(ParallelFolding(), 1)).activations for one in (model, longer)
    )
    assert long > 5 * short  # more than the 4 times as many tokens
