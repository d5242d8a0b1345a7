#!/usr/bin/env bash
# Recognise all public English sets in Hugging Face Jobs, one job a set, and score what they wrote.
#   HF_TOKEN=... MODEL_ID=org/name REVISION=commit RESULTS_BUCKET=org/bucket bash submit_jobs_speechllm.sh
# SPACE is the environment: a duplicate of the leaderboard's own for transformers. ORG_NAME is who pays, FLAVOR the GPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
: "${HF_TOKEN:?set HF_TOKEN to a token with the right to write}"
: "${MODEL_ID:?set MODEL_ID to the id of the model on the Hub}"
: "${REVISION:?set REVISION to a commit of it, since its code is run}"
: "${RESULTS_BUCKET:?set RESULTS_BUCKET to a bucket of yours on the Hub}"
source datasets.sh
space="${SPACE:-hf-audio/open-asr-leaderboard-transformers}"
folder="${MODEL_ID//\//-}"
namespace=()
if [[ -n "${ORG_NAME:-}" ]]; then
    namespace=(--namespace "$ORG_NAME")
fi
# Jobs get script, requirements and normaliser of this checkout, so that they run what is reviewed.
bundle=$(tar --exclude=__pycache__ -czf - -C .. speechllm/run_eval.py requirements/requirements_speechllm.txt normalizer |
    base64 -w0)

pids=()
for entry in "${DATASETS[@]}"; do
    read -r path configuration split batch_size <<< "$entry"
    echo "submitting $path ${configuration#-} $split"
    hf jobs run --flavor "${FLAVOR:-h200}" --timeout 8h --secrets HF_TOKEN ${namespace[@]+"${namespace[@]}"} \
        --volume "hf://buckets/$RESULTS_BUCKET:/results" "hf.co/spaces/$space" bash -c "
            set -euo pipefail
            mkdir -p /tmp/leaderboard /results/$folder && cd /tmp/leaderboard
            echo '$bundle' | base64 -d | tar -xzf -
            pip install --quiet -r requirements/requirements_speechllm.txt
            PYTHONPATH=. python speechllm/run_eval.py --model_id '$MODEL_ID' --revision '$REVISION' \
                --dataset_path '$path' --dataset '${configuration#-}' --split '$split' \
                --batch_size $batch_size --device 0
            cp results/*.jsonl /results/$folder/
        " &
    pids+=($!)
done
failed=0
for pid in "${pids[@]}"; do
    wait "$pid" || failed=$((failed + 1))
done
if ((failed)); then
    echo "$failed of ${#DATASETS[@]} jobs failed; see https://huggingface.co/settings/jobs" >&2
    exit 1
fi

hf buckets sync "hf://buckets/$RESULTS_BUCKET/$folder" "results/$folder"
PYTHONPATH=.. python -c "from normalizer.eval_utils import score_results; score_results('results/$folder', '$MODEL_ID', families=['public'])"
