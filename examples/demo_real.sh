#!/usr/bin/env bash
# A real model on a laptop: SmolLM2-135M → MoE, the same function → a few steps → Hugging Face.
#
#   examples/demo_real.sh   writes to demo/real/ in the current directory
#
# Every third layer gets 4 experts, so that weights, gradients and Adam fit into 8 GiB. Finished steps
# are skipped; an interrupted training continues from its last checkpoint.
set -euo pipefail

DEMO=demo/real
# shellcheck source=examples/steps.sh
source "$(dirname "$0")/steps.sh"

PROMPT="The capital of France is"

step "1 model: SmolLM2-135M-Instruct, a real Llama" "$DEMO/dense/config.json" \
  python "$(dirname "$0")/smollm2.py" $DEMO/dense

step "2 MoE: 4 experts in every third layer, without training" "$DEMO/moe/config.json" \
  nemo-upcycle upcycle $DEMO/dense $DEMO/moe --experts 4 --layers 3

step "3 verify: is it the dense model?" "$DEMO/verified.txt" \
  bash -c "nemo-upcycle verify $DEMO/dense $DEMO/moe --tokens 256 | tee $DEMO/verified.part && mv $DEMO/verified.part $DEMO/verified.txt"

step "4 text: the standard library's documentation and sources" "$DEMO/text/documentation.jsonl" \
  nemo-upcycle data sample --out $DEMO/text

step "5 data: Megatron .bin/.idx files" "$DEMO/data/documentation.idx" \
  nemo-upcycle data tokenize $DEMO/text/documentation.jsonl --tokenizer $DEMO/dense --out $DEMO/data

step "6 train: upcycle online, and take a few steps" "$DEMO/runs/moe/checkpoints/*-last/weights/metadata.json" \
  nemo llm pretrain --yes --factory "upcycle(dense_checkpoint='$DEMO/dense',num_moe_experts=4,moe_layer_freq=3,data_paths='$DEMO/data/documentation',seq_length=128,global_batch_size=2,max_steps=6,dir='$DEMO/runs',name='moe')"

step "7 out: write the trained MoE as a Hugging Face checkpoint" "$DEMO/trained/config.json" \
  nemo-upcycle export $DEMO/runs/moe $DEMO/trained

step "8 ask: $PROMPT" "$DEMO/answer.txt" \
  nemo-upcycle generate $DEMO/trained "$PROMPT" --max-new-tokens 12 --out $DEMO/answer.txt

step "9 report: one page about the run" "$DEMO/report.html" \
  nemo-upcycle report $DEMO/runs/moe --out $DEMO/report.html

echo
sed 's/^/   /' $DEMO/verified.txt
echo
sed 's/^/   /' $DEMO/answer.txt
echo
echo "Report: $PWD/$DEMO/report.html, for any browser   ($((SECONDS - STARTED)) s)"
