"""The tables of docs/families.md, from the package and from what the tests cover.

`python -m tests.families_page docs/families.md` writes the tables anew.
"""

import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from nemo_upcycle.config import UpcyclingConfig
from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families import FAMILIES, Architecture
from nemo_upcycle.families.model import upcycled_model
from nemo_upcycle.families.moe import moe_family_of
from nemo_upcycle.families.moe_config import MOE_FAMILIES
from nemo_upcycle.families.unfit import DENSE, MOE
from tests import tiny

TABLE = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- end -->)", re.S)
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "llama3": tiny.LLAMA31_ROPE,
    "yarn": {**tiny.YARN, "attention_factor": 1.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
    },
}


def with_tables(page: str) -> str:
    """Return a page with its tables written anew."""
    tables = {"families": _families, "moe": _moe, "refused": _refused}
    return TABLE.sub(lambda m: m[1] + "".join(f"{row}\n" for row in tables[m[2]]()) + m[3], page)


def _read(family: str, **config: object) -> Architecture:
    said = {**tiny.CONFIG, "pad_token_id": 0, "model_type": family, **config}
    return FAMILIES[family].architecture(said)


def reads(family: str, **config: object) -> bool:
    """Return whether a family is read with these keys."""
    try:
        _read(family, **config)
    except UpcyclingError:
        return False
    return True


def export_of(family: str) -> str:
    """Return the class that computes a family's plain upcycled model, or why there is none."""
    multipliers = tiny.FAMILIES["granite"] if family == "granite" else {}
    try:
        model = upcycled_model(_read(family, **multipliers), UpcyclingConfig())
        return moe_family_of(model).class_name
    except UpcyclingError as error:
        found = re.search("The model has (.*?), which no", str(error))
        assert found
        return f"none: {found[1]}"


def _families() -> Iterator[str]:
    yield "| `model_type` | models | upcycled, control | exports as | RoPE | window |"
    yield "|---|---|---|---|---|---|"
    for family in FAMILIES:
        doc = import_module(f"nemo_upcycle.families.{family}").__doc__ or ""
        models = re.split(r" \(`|:", doc)[0]
        rope = [
            "plain",
            *(kind for kind, said in SCALINGS.items() if reads(family, rope_scaling=said)),
        ]
        if _read(family).nope_layers:
            rope.append("none in some layers")
        if reads(family, partial_rotary_factor=0.5):
            rope.append("of a part of a head")
        windows = {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 0}
        windows |= {"no_rope_layers": [0] * 4}
        has_window = reads(family, **windows) and _read(family, **windows).sliding_window
        yield (
            f"| `{family}` | {models} | yes | {export_of(family)} | {', '.join(rope)} | "
            f"{'in all layers' if has_window else 'no'} |"
        )


def _moe() -> Iterator[str]:
    yield "| `model_type` | exported | read back | without experts |"
    yield "|---|---|---|---|"
    for family in MOE_FAMILIES.values():
        yield f"| `{family.model_type}` | yes | yes | a {family.dense.model_type} |"


def _refused() -> Iterator[str]:
    yield "| `model_type` | why not |"
    yield "|---|---|"
    for title, features in (("dense", DENSE), ("MoE", MOE)):
        for name, feature in features.items():
            yield f"| `{name}` ({title}) | {feature} |"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(with_tables(path.read_text()))
