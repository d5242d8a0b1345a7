"""WER and CER as `evaluate.Metric`, for training loops and `evaluate.combine`.

`evaluate.load("wer")` fetches a script from the Hub; these classes need no network. They live apart from `metrics`
because importing `evaluate` takes seconds. Needs `pip install "hf-speechllm[train]"`.
"""

import datasets
import evaluate

from .metrics import word_errors

_CITATION = """\
@inproceedings{morris2004,
  author = {Morris, Andrew and Maier, Viktoria and Green, Phil},
  title = {From {WER} and {RIL} to {MER} and {WIL}: improved evaluation measures for connected speech recognition},
  booktitle = {Interspeech},
  year = {2004}
}"""
_INPUTS = """\
Args:
    predictions: list of recognised texts.
    references: list of spoken texts, in the same order.
"""


def _metric_info(description: str, inputs_description: str) -> evaluate.MetricInfo:
    return evaluate.MetricInfo(
        description=description,
        citation=_CITATION,
        inputs_description=inputs_description,
        features=datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")}),
    )


class WER(evaluate.Metric):
    """`WER().compute(predictions=[...], references=[...])` -> {"wer": float, "substitutions": int, ...}."""

    def _info(self) -> evaluate.MetricInfo:
        return _metric_info(
            "Word error rate: substitutions, deletions and insertions per reference word.",
            _INPUTS + "Returns:\n    wer (fraction), substitutions, deletions, insertions, reference_words.\n",
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float | int]:
        errors = word_errors(references, predictions)
        return {
            "wer": errors.wer,
            "substitutions": errors.substitutions,
            "deletions": errors.deletions,
            "insertions": errors.insertions,
            "reference_words": errors.reference_words,
        }


class CER(evaluate.Metric):
    """`CER().compute(predictions=[...], references=[...])` -> {"cer": float}."""

    def _info(self) -> evaluate.MetricInfo:
        return _metric_info(
            "Character error rate: character edits per reference character, spaces included.",
            _INPUTS + "Returns:\n    cer (fraction).\n",
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        return {"cer": word_errors(references, predictions).cer}
