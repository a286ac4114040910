"""The papers whose claims several studies ask about."""

LLAMA3 = "arXiv 2412.09952"
NVIDIA = "arXiv 2410.07524"
SPARSE_UPCYCLING = "arXiv 2212.05055"
