"""`data_paths` as the recipes take them."""

from pathlib import Path

import pytest

from nemo_upcycle.errors import UpcyclingError

pytestmark = pytest.mark.usefixtures("home")


@pytest.mark.parametrize("prefix", ["my data/web", "web.bin", "~/my data/web"])
def test_the_factory_takes_them_from_the_command_line(prefix: str, home: Path) -> None:
    """As NeMo-Run parses a factory's arguments."""
    from nemo.collections import llm
    from nemo_run.cli.cli_parser import parse_factory
    from nemo_upcycle_recipes import llama_tiny

    assert llama_tiny
    for name in ("my data/web", "web"):
        write_dataset(home / name)
    text = f"llama_tiny(data_paths='1 \"{prefix}\" 2 web', tokenizer='.')"
    recipe = parse_factory(llm.pretrain, "factory", llm.pretrain, text)
    expanded = prefix.replace("~", str(home)).removesuffix(".bin")
    assert recipe.data.paths == ["1.0", expanded, "2.0", "web"]


def test_the_recipes_own_directory_may_have_a_space(home: Path) -> None:
    from nemo_upcycle_recipes.llama_tiny import dense_recipe

    paths = dense_recipe(dir="my demo").data.paths
    assert paths == ["0.7", "my demo/data/documentation", "0.3", "my demo/data/sources"]


def test_the_factory_looks_at_what_is_here(home: Path) -> None:
    from nemo_upcycle_recipes.llama_tiny import dense_recipe

    with pytest.raises(UpcyclingError, match="the weight of /a is 0"):
        dense_recipe(data_paths="0 /a")
    (home / "web.idx").write_bytes(b"not one")
    with pytest.raises(UpcyclingError, match="is no index of a Megatron dataset"):
        dense_recipe(data_paths="web")
    assert dense_recipe(data_paths="/only/on/nodes").data.paths == ["/only/on/nodes"]


def write_dataset(prefix: Path) -> None:
    import numpy as np
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", np.uint16)
    builder.document_indices = [0]
    builder.finalize(f"{prefix}.idx")
