"""Llama 3 8B upcycled into 8 experts, top-2: the run of arXiv 2412.09952, and its control."""

from nemo_upcycle_recipes.numbers import LLAMA3_8B_DENSE, LLAMA3_8B_E8T2
from nemo_upcycle_recipes.upcycled import pretrain_recipe_of

NAME = LLAMA3_8B_E8T2.name

pretrain_recipe = pretrain_recipe_of(
    LLAMA3_8B_E8T2,
    "Upcycle Llama 3 8B into 8 experts, top-2, and train it on 100B tokens: arXiv 2412.09952.",
)

dense_recipe = pretrain_recipe_of(
    LLAMA3_8B_DENSE,
    "Train Llama 3 8B on over the tokens of `llama3_8b_e8t2`, in the same order: its control.",
)
