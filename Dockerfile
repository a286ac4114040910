# NVIDIA's PyTorch image has CUDA, Transformer Engine and a torch built for them.
#
#   docker build -t nemo-upcycle .
#   docker build -t nemo-upcycle --build-arg BASE_IMAGE=nvcr.io/nvidia/pytorch:25.10-py3 .
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:25.09-py3
FROM ${BASE_IMAGE}

WORKDIR /opt/nemo-upcycle
COPY pyproject.toml README.md ./
COPY nemo_upcycle nemo_upcycle
COPY recipes recipes
COPY examples examples

# The image's torch stays: pip is held to the versions that are there, and the build fails if
# torch is another one afterwards.
RUN python -c "import torch; print(torch.__version__)" > /tmp/torch-before \
 && pip freeze --exclude-editable | grep -iE '^(torch|transformer[-_]engine|numpy|triton|flash[-_]attn)[^@]*==' > /tmp/image.txt \
 && pip install --no-cache-dir --constraint /tmp/image.txt '.[nemo,eval]' \
 && python -c "import torch; print(torch.__version__)" | diff /tmp/torch-before - \
 && nemo-upcycle --help > /dev/null \
 && rm /tmp/torch-before /tmp/image.txt

WORKDIR /workspace
