#!/usr/bin/env bash
# Recognise all public English sets on this machine, one after the other, and score them.
#   MODEL_ID=org/name REVISION=commit bash run_speechllm.sh
# Set DEVICE (default 0, -1 for the CPU), MAX_EVAL_SAMPLES for a trial, and BATCH_SIZE to override that of datasets.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
: "${MODEL_ID:?set MODEL_ID to the id of the model on the Hub}"
: "${REVISION:?set REVISION to a commit of it, since its code is run}"
source datasets.sh
export PYTHONPATH="$PWD/..${PYTHONPATH:+:$PYTHONPATH}"

for entry in "${DATASETS[@]}"; do
    read -r path configuration split batch_size <<< "$entry"
    python run_eval.py --model_id "$MODEL_ID" --revision "$REVISION" \
        --dataset_path "$path" --dataset "${configuration#-}" --split "$split" \
        --batch_size "${BATCH_SIZE:-$batch_size}" --device "${DEVICE:-0}" \
        --max_eval_samples "${MAX_EVAL_SAMPLES:--1}"
done

python -c "from normalizer.eval_utils import score_results; score_results('results', '$MODEL_ID', families=['public'])"
