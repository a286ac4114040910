"""What routers start from."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from nemo_upcycle.checkpoint.branches import open_branches
from nemo_upcycle.config import LARGEST_SEED, UpcyclingConfig
from nemo_upcycle.engine.initializers import check_initializers
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.initializers import initialize_router, make_router_initializer, router_names
from tests.calibrations import write_statistics
from tests.third_party import install_orthogonal
from tests.tiny import CONFIG, write_llama

HIDDEN = CONFIG["hidden_size"]
G4 = UpcyclingConfig(num_moe_experts=32, granularity=4, moe_router_topk=4)


@pytest.fixture(scope="module")
def statistics(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_statistics(tmp_path_factory.mktemp("statistics") / "file", dense)


def rows_of(router_initializer: str, layer: int = 0, **config: Any) -> Any:
    upcycling = UpcyclingConfig(router_initializer=router_initializer, **config)
    return initialize_router(upcycling, layer, (0, upcycling.num_moe_experts or 0), HIDDEN)


def test_seeds_up_to_the_largest_are_different_ones() -> None:
    seeds = (0, 2**53, 2**53 + 1, LARGEST_SEED - 1, LARGEST_SEED)
    drawn = {initialize_router(UpcyclingConfig(seed=s), 0, (0, 1), 4).tobytes() for s in seeds}
    assert len(drawn) == len(seeds)


def test_virtual_groups_have_equal_rows() -> None:
    upcycling = UpcyclingConfig(num_moe_experts=12, granularity=3, moe_router_topk=3)
    rows = initialize_router(upcycling, 0, (0, 12), 64)
    groups = rows.reshape(4, 3, 64)
    assert (groups == groups[:, :1]).all()
    assert len({group.tobytes() for group in groups[:, 0]}) == 4
    assert np.array_equal(initialize_router(upcycling, 0, (5, 8), 64), rows[5:8])
    each = UpcyclingConfig(
        num_moe_experts=12, granularity=3, moe_router_topk=3, router_initializer="random"
    )
    assert len({row.tobytes() for row in initialize_router(each, 0, (0, 12), 64)}) == 12


@pytest.mark.parametrize("layer", [0, 3])
def test_centroids_are_the_papers_formula(statistics: Path, layer: int) -> None:
    found = load_file(statistics)[f"layers.{layer}.clusters.centroids"].astype(float)
    paper = rows_of(f"centroids(stats={str(statistics)!r}, scale=1, center=False)", layer)
    assert np.allclose(paper, found, atol=1e-6)
    rows = rows_of(f"centroids(stats={str(statistics)!r})", layer)
    centered = found - found.mean(0)
    length = np.sqrt((centered**2).sum(1).mean())
    assert np.allclose(rows, centered / length * 0.02 * HIDDEN**0.5, atol=1e-6)
    # Softmax does not see what is subtracted, and the largest logit is that of the same centroid.
    inputs = np.random.default_rng(0).standard_normal((100, HIDDEN)) + 1
    assert np.array_equal((inputs @ rows.T).argmax(1), (inputs @ found.T).argmax(1))


def test_prompts_are_mergekits_formula(statistics: Path) -> None:
    found = load_file(statistics)
    difference = found["layers.1.prompts.positive"] - found["layers.1.prompts.negative"]
    expected = difference / np.linalg.norm(difference, axis=1, keepdims=True)
    rows = rows_of(f"prompts(stats={str(statistics)!r}, scale=1)", 1)
    assert np.allclose(rows, expected, atol=1e-6)


@pytest.mark.parametrize("penalty", [0.01, 5.0])
def test_ridge_is_the_papers_formula(dense: Path, tmp_path: Path, penalty: float) -> None:
    """For the inputs themselves, of which a file of statistics holds sums."""
    random = np.random.default_rng(0)
    x = random.standard_normal((500, HIDDEN)).astype(np.float32).astype(float)
    y = np.eye(3)[random.integers(0, 3, 500)]
    x[:, :3] += 4 * y
    texts = [{"name": "", "tokens": int(count)} for count in y.sum(0)]
    file = write_statistics(tmp_path / "file", dense, sources=3, texts=texts)
    tensors = load_file(file) | {
        "layers.0.input.second_moment": (x.T @ x / 500).astype(np.float32),
        **{
            f"layers.0.sources.{s}.input.mean": x[y[:, s] == 1].mean(0).astype(np.float32)
            for s in range(3)
        },
    }
    _replace(file, tensors)
    weights = np.linalg.solve(x.T @ x + penalty * np.eye(HIDDEN), x.T @ y).T
    expected = weights / np.linalg.norm(weights, axis=1, keepdims=True)
    rows = rows_of(f"ridge(stats={str(file)!r}, penalty={penalty}, scale=1)")
    assert np.allclose(rows[:3], expected, atol=1e-5)
    apart = np.linalg.norm(rows - expected[np.arange(8) % 3], axis=1)
    assert np.allclose(apart[3:], 0.01, atol=1e-4)
    assert ((x @ rows[:3].T).argmax(1) == y.argmax(1)).mean() > 0.9


def _replace(file: Path, tensors: dict[str, Any]) -> None:
    from safetensors import safe_open
    from safetensors.numpy import save_file

    with safe_open(file, "numpy") as opened:
        metadata = opened.metadata()
    save_file(tensors, file, metadata)


@pytest.mark.parametrize("name", ["centroids", "prompts", "ridge"])
def test_rows_have_the_length_of_random_rows(statistics: Path, name: str) -> None:
    text = f"{name}(stats={str(statistics)!r})"
    for std in (0.02, 0.1):
        squares = (rows_of(text, router_init_std=std).astype(float) ** 2).sum(1)
        near = 1e-2 if name == "ridge" else 1e-5  # further rows of a source have something added
        assert np.isclose(np.sqrt(squares.mean()), std * HIDDEN**0.5, rtol=near)


@pytest.mark.parametrize("name", ["centroids", "prompts", "ridge"])
def test_shards_of_a_copy_have_its_row(statistics: Path, name: str) -> None:
    text = f"{name}(stats={str(statistics)!r})"
    granular = initialize_router(replace(G4, router_initializer=text), 2, (0, 32), HIDDEN)
    copies = rows_of(text, 2)
    assert np.array_equal(granular, np.repeat(copies, 4, axis=0))
    part = initialize_router(replace(G4, router_initializer=text), 2, (5, 9), HIDDEN)
    assert np.array_equal(part, granular[5:9])
    assert replace(G4, router_initializer=text).exactness(True, 1).exact


def test_shards_of_one_copy_have_rows_of_their_own(dense: Path, tmp_path: Path) -> None:
    """As in LLaMA-MoE: with equal rows, the router would have nothing to choose."""
    text = f"centroids(stats={str(write_statistics(tmp_path / 'file', dense))!r})"
    split = UpcyclingConfig(num_moe_experts=8, granularity=8, router_initializer=text)
    rows = initialize_router(split, 0, (0, 8), HIDDEN)
    assert len({row.tobytes() for row in rows}) == 8
    exactness = split.exactness(True, 1)
    assert not exactness.exact and "centroids router picks 2 of 8" in exactness.reason


def test_statistics_of_another_model_are_refused(
    dense: Path, statistics: Path, tmp_path: Path
) -> None:
    def check(text: str, model: Path = dense, **config: Any) -> None:
        upcycling = UpcyclingConfig(router_initializer=text, **config)
        check_initializers(upcycling, open_branches(str(model)))

    text = f"centroids(stats={str(statistics)!r})"
    check(text)
    others = {
        "is of another dense checkpoint": write_llama(tmp_path / "weights", seed=1),
        "num_layers=4; the dense checkpoint has 2": write_llama(
            tmp_path / "2", num_hidden_layers=2
        ),
        "hidden_size=64; the dense checkpoint has 32": write_llama(tmp_path / "32", hidden_size=32),
    }
    for message, other in others.items():
        with pytest.raises(UpcyclingError, match=message):
            check(text, other)
    with pytest.raises(UpcyclingError, match=r"has 8 clusters per layer; expected 4.*--clusters 4"):
        check(text, num_moe_experts=4)
    with pytest.raises(UpcyclingError, match="prompts of 8 experts; expected 4"):
        check(f"prompts(stats={str(statistics)!r})", num_moe_experts=4)
    same = write_statistics(tmp_path / "same", dense, prompts=["a"] * 8)
    with pytest.raises(UpcyclingError, match="Two experts have the same prompts"):
        check(f"prompts(stats={str(same)!r})")
    one = write_statistics(tmp_path / "one", dense, sources=1)
    with pytest.raises(UpcyclingError, match="of 1 source of text; expected two or more"):
        check(f"ridge(stats={str(one)!r})")
    diagonal = write_statistics(tmp_path / "diagonal", dense, second_moment="diagonal")
    with pytest.raises(UpcyclingError, match="calibrate with --second-moment full"):
        check(f"ridge(stats={str(diagonal)!r})")
    with pytest.raises(UpcyclingError, match="There is no file of statistics at nowhere"):
        check("centroids(stats='nowhere')")
    with pytest.raises(UpcyclingError, match="holds no statistics"):
        check(f"centroids(stats={str(dense / 'model.safetensors')!r})")
    check(text, num_moe_experts=None)  # a dense model has no router


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "zeros",
            "no router_initializer 'zeros'; expected one of: centroids, prompts, random, rid",
        ),
        ("centroids", r"missing a required argument: 'stats'; expected centroids\(stats: str"),
        ("centroids(stats=3)", "centroids: stats is 3; expected the path of a file"),
        ("centroids(stats='a', scale=-1)", "centroids: scale is -1; expected a number of 0 or"),
        ("ridge(stats='a', penalty=nan)", "ridge: penalty is nan; expected a number"),
        ("random random", "router_initializer is 'random random'; expected a name"),
        ("drop", "no router_initializer 'drop'"),
    ],
)
def test_options_are_checked(text: str, message: str) -> None:
    with pytest.raises(UpcyclingError, match=message):
        make_router_initializer(text)


def test_another_packages_router_initializer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(install_orthogonal(tmp_path))
    assert "orthogonal" in router_names()
    rows = rows_of("orthogonal(scale=2.0)").astype(float)
    assert np.allclose(rows @ rows.T, 4 * np.eye(8), atol=1e-5)
    sys.modules.pop("orthogonals")
    monkeypatch.setattr("numpy.linalg.qr", lambda values: (values[:, :1], None))
    with pytest.raises(
        UpcyclingError, match=r"gives values of shape \[1, 64\]; expected \[8, 64\]"
    ):
        rows_of("orthogonal")
