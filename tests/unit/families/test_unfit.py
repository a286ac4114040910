"""What is refused is a model of transformers or known code, and the refusal names the feature."""

import pytest

from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.families import FAMILIES, family_of
from nemo_upcycle.families.moe_config import MOE_FAMILIES, moe_model
from nemo_upcycle.families.unfit import DENSE, MOE


@pytest.mark.parametrize("model_type", DENSE)
def test_a_dense_model_is_refused_by_its_feature(model_type: str) -> None:
    assert model_type not in FAMILIES
    with pytest.raises(UpcyclingError) as error:
        family_of({"model_type": model_type})
    assert f"It has {DENSE[model_type]}, which" in str(error.value)


@pytest.mark.parametrize("model_type", MOE)
def test_an_moe_is_refused_by_its_feature(model_type: str) -> None:
    assert model_type not in MOE_FAMILIES
    with pytest.raises(UpcyclingError) as error:
        moe_model({"model_type": model_type})
    assert f"It has {MOE[model_type]}, which" in str(error.value)


def test_the_model_types_are_those_of_transformers() -> None:
    """Two come with code of their own, and three only with transformers 5."""
    from transformers import CONFIG_MAPPING

    unknown = {name for name in [*DENSE, *MOE] if name not in CONFIG_MAPPING}
    of_5 = {"ministral3", "qwen3_5", "qwen3_5_text"}
    assert unknown - of_5 == {"internlm2", "internlm3"}


def test_an_unknown_model_type_has_no_feature() -> None:
    with pytest.raises(UpcyclingError, match=r"stablelm\.$"):
        family_of({"model_type": "gpt2"})
