#!/usr/bin/env bash
# The whole pipeline on a laptop: real text → tokenizer → dense Llama → 8-expert MoE → comparison →
# Hugging Face → lm-eval → a page about the run.
#
#   examples/demo.sh        writes to demo/ in the current directory
#
# The commands are those of docs/demo.md. Finished steps are skipped; an interrupted training
# continues from its last checkpoint.
set -euo pipefail

DEMO=demo
# shellcheck source=examples/steps.sh
source "$(dirname "$0")/steps.sh"

CPU2="run.executor=cpu run.executor.ntasks_per_node=2"

step "1 text: the standard library's documentation and sources" "demo/data/sources.jsonl" \
  nemo-upcycle data sample --out demo/data

step "2 tokenizer: byte-level BPE, 2048 tokens" "demo/tokenizer/tokenizer.json" \
  nemo-upcycle data tokenizer demo/data/documentation.jsonl demo/data/sources.jsonl \
  --vocab-size 2048 --out demo/tokenizer

step "3 data: Megatron .bin/.idx files" "demo/data/sources.idx" \
  nemo-upcycle data tokenize demo/data/documentation.jsonl demo/data/sources.jsonl \
  --tokenizer demo/tokenizer --out demo/data

# shellcheck disable=SC2086  # CPU2 is two arguments
step "4 dense: pre-train a Llama on a 7:3 blend" "demo/dense/checkpoints/*-step=249-*-last/weights/metadata.json" \
  nemo llm pretrain --factory llama_tiny $CPU2 --yes

step "5 export: write it as a Hugging Face checkpoint" "demo/dense_hf/tokenizer.json" \
  nemo llm export path="$(echo demo/dense/checkpoints/*-step=249-*-last)" \
  target=hf output_path=demo/dense_hf overwrite=true --yes

# shellcheck disable=SC2086
step "6 MoE: upcycle it online into 8 experts on 2 ranks, and train on" "demo/e8t2/checkpoints/*-step=99-*-last/weights/metadata.json" \
  nemo llm pretrain --factory "llama_tiny_e8t2(expert_model_parallel_size=2)" $CPU2 --yes

# shellcheck disable=SC2086
step "7 control: train the dense model on for the same tokens" "demo/dense_continued/checkpoints/*-step=99-*-last/weights/metadata.json" \
  nemo llm pretrain --factory \
  "llama_tiny(name='dense_continued',dense_checkpoint='demo/dense_hf',max_steps=100)" $CPU2 --yes

step "8 comparison: loss of both over tokens" "demo/comparison.png" \
  nemo-upcycle compare --dense demo/tb_logs/dense_continued --moe demo/tb_logs/e8t2 \
  --tokens-per-step 4096 --out demo

step "9 out: write the MoE as a Hugging Face checkpoint" "demo/e8t2_hf/config.json" \
  nemo-upcycle export demo/e8t2 demo/e8t2_hf

step "10 sample: let it go on from a line" "demo/sample.txt" \
  nemo-upcycle generate demo/e8t2_hf "def __init__(self" --out demo/sample.txt

step "11 task: which line comes next, in text held out" "demo/task/next_line.yaml" \
  nemo-upcycle data choices demo/data/documentation.jsonl demo/data/sources.jsonl --out demo/task

step "12 score: lm-eval on the MoE on 2 ranks, and on the dense model trained on" "demo/evaluation/scores.md" \
  nemo-upcycle evaluate demo/e8t2 --ep 2 \
  --dense demo/dense_continued \
  --tasks next_line --include-path demo/task --limit 200 --out demo/evaluation

step "13 report: one page about the run" "demo/report.html" \
  nemo-upcycle report demo/e8t2 --dense demo/dense_continued --out demo/report.html

echo
cat demo/comparison.md
echo
echo "The MoE goes on from a line:"
sed 's/^/   /' demo/sample.txt
echo
cat demo/evaluation/scores.md
echo
echo "Picture: demo/comparison.png   ($((SECONDS - STARTED)) s)"
echo "Report:  $PWD/demo/report.html, for any browser"
