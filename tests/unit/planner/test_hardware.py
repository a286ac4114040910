"""Hardware that is shipped, and hardware of one's own."""

from pathlib import Path

import pytest
from nemo_upcycle_recipes.expectations import workload
from nemo_upcycle_recipes.numbers import LLAMA_TINY_E8T2

from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.planner.hardware import device_peak_tflops, hardware, measured_hardware, shipped
from nemo_upcycle.planner.tuning import tune

TINY = workload(LLAMA_TINY_E8T2)


@pytest.mark.parametrize("name", shipped())
def test_shipped_hardware(name: str) -> None:
    kind = hardware(name)
    assert device_peak_tflops(f"NVIDIA {kind.name} 80GB") == kind.peak_tflops
    assert tune(TINY, kind.gpus_per_node, kind).best


def test_unknown_devices_have_no_peak() -> None:
    assert device_peak_tflops("Tesla T4") is None


BAD: list[tuple[str, str]] = [
    ("base: h100\nmemory_gib: -3", "memory_gib is -3.0; expected more than 0"),
    ("name: mine", "missing mandatory value: peak_tflops"),
    ("base: h100\nspeed: 3", "Key 'speed' not in 'Hardware'"),
    ("base: h100\nmemory_gib: 0", "memory_gib is 0.0; expected more than 0"),
    *(
        (f"base: h100\nmemory_gib: {value}", "memory_gib is .*; expected a finite number")
        for value in (".inf", "-.inf", ".nan", "lots", '"80"', "true", "null", "[1]")
    ),
    *(
        (f"base: h100\ngpus_per_node: {value}", "gpus_per_node is .*; expected a whole number")
        for value in ("8.0", "8.5", ".inf", ".nan", '"8"', "true", "~", "{a: 1}")
    ),
    ("base: h100\ngpus_per_node: -8", "gpus_per_node is -8; expected more than 0"),
    ("base: nosuch", "base is 'nosuch'; expected one of: a100"),
    ("- 1", "Expected the fields name, peak_tflops"),
    ("a: [1", "Expected the fields name, peak_tflops"),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_bad_hardware_is_one_error(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UpcyclingError, match=message) as raised:
        hardware(str(tmp_path / "mine.yaml"))
    assert "mine.yaml" in str(raised.value)


def test_a_file_need_not_know_the_host(tmp_path: Path) -> None:
    fields = vars(hardware("h100"))
    path = tmp_path / "mine.yaml"
    path.write_text(
        "\n".join(
            f"{name}: {value}" for name, value in fields.items() if value and "host" not in name
        )
    )
    mine = hardware(str(path))
    assert mine.peak_tflops == fields["peak_tflops"]
    for name in ("host_memory_gib", "host_memory_bandwidth", "host_link_bandwidth"):
        assert 0 < getattr(mine, name) < fields[name]


def test_measured_hardware_says_what_was_measured(tmp_path: Path) -> None:
    file = tmp_path / "hardware.yaml"
    with pytest.raises(
        UpcyclingError, match=r"expected the hardware\.yaml that `nemo-upcycle check"
    ):
        measured_hardware(str(tmp_path))
    file.write_text("base: h100\nnvlink_bandwidth: 300\n")
    with pytest.raises(UpcyclingError, match="has no measured values; expected what"):
        measured_hardware(str(file))
    file.write_text("base: h100\nnvlink_bandwidth: 300\nmeasured: nvlink_bandwidth\n")
    assert measured_hardware(str(tmp_path)) == measured_hardware(str(file)) == hardware(str(file))
    file.write_text("base: h100\nmeasured: speed\n")
    with pytest.raises(UpcyclingError, match="measured has 'speed'; expected names of: gpus_per"):
        measured_hardware(str(file))
