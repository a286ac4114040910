"""Items of evaluations, and a text around them that no evaluation has."""

from nemo_upcycle.data.decontamination import Item

LONG = (
    "A router that sends every token to one expert leaves the others without a gradient, and so "
    "they stay copies of the dense layer."
)
SHORT = "Which layer is copied into all eight experts"
TINY = "What is two plus two?"
ITEMS = [Item("mmlu", 3, LONG), Item("piqa", 0, SHORT), Item("gsm8k", 1, TINY)]
PADDING = "Something else entirely, of which no evaluation has ever asked. " * 5
