"""The shipped configs."""

import json


def test_shipped_configs_are_sorted_json() -> None:
    from nemo_upcycle_recipes.recipe import CONFIGS

    for path in CONFIGS.glob("*.json"):
        config = json.loads(path.read_text())
        assert list(config) == sorted(config), path.name
