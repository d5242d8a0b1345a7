"""Recognise one data set of the Open ASR Leaderboard with a speech LLM and write the manifest that is scored.

To be run in a checkout of the leaderboard's repository, whose package `normalizer` reads the data and writes the
manifest. The model brings its own code (`trust_remote_code`, pinned by --revision); its decoding options are those in
its generation_config, the same for all data sets.
"""

import argparse
import os
import time

import torch
from datasets import IterableDataset
from normalizer import data_utils
from tqdm import tqdm
from transformers import pipeline


def load_transcriber(args):
    """The pipeline of the model."""
    transcriber = pipeline(
        "automatic-speech-recognition",
        model=args.model_id,
        revision=args.revision,
        trust_remote_code=True,
        device=f"cuda:{args.device}" if args.device >= 0 else "cpu",
        dtype=getattr(torch, args.dtype),
    )
    parameters = sum(parameter.numel() for parameter in transcriber.model.parameters())
    print(f"Model size: {parameters / 1e9:.2f}B parameters")
    return transcriber


def load_dataset(args, sampling_rate, num_samples):
    """The data set as the leaderboard prepares it; the first `num_samples` of it, all if that is not positive."""
    dataset = data_utils.load_data(args)
    if num_samples > 0:
        # Sets in pieces are never streamed.
        is_stream = isinstance(dataset, IterableDataset)
        dataset = dataset.take(num_samples) if is_stream else dataset.select(range(min(num_samples, len(dataset))))
    return data_utils.prepare_data(dataset, sampling_rate=sampling_rate)


def main(args):
    """Warm up, recognise, write the manifest."""
    transcriber = load_transcriber(args)
    sampling_rate = transcriber.feature_extractor.sampling_rate

    def benchmark(batch):
        waveforms = [audio["array"] for audio in batch["audio"]]
        batch["audio_length_s"] = [len(waveform) / sampling_rate for waveform in waveforms]
        batch["audio_filepath"] = data_utils.extract_audio_filepaths_from_batch(batch, len(waveforms))
        inputs = [{"raw": waveform, "sampling_rate": sampling_rate} for waveform in waveforms]

        if args.device >= 0:
            torch.cuda.synchronize(args.device)
        start = time.perf_counter()
        outputs = transcriber(inputs, batch_size=args.batch_size)
        if args.device >= 0:
            torch.cuda.synchronize(args.device)
        runtime_s = time.perf_counter() - start

        batch["transcription_time_s"] = [runtime_s / len(waveforms)] * len(waveforms)
        # Both as they are: they are normalised when they are scored.
        batch["predictions"] = [output["text"] for output in outputs]
        batch["references"] = batch["original_text"]
        return batch

    mapped = {"batch_size": args.batch_size, "batched": True, "remove_columns": ["audio"]}
    if args.warmup_steps > 0:
        warmup = load_dataset(args, sampling_rate, args.warmup_steps * args.batch_size)
        for _ in tqdm(iter(warmup.map(benchmark, **mapped)), desc="Warming up..."):
            pass

    fields = ["references", "predictions", "audio_length_s", "transcription_time_s", "audio_filepath"]
    # Pieces of recordings are put together again when they are scored.
    piece_fields = data_utils.CHUNK_METADATA_KEYS if data_utils.is_chunked_dataset(args.dataset_path) else []
    results = {field: [] for field in [*fields, *piece_fields]}
    dataset = load_dataset(args, sampling_rate, args.max_eval_samples)
    for row in tqdm(iter(dataset.map(benchmark, **mapped)), desc="Samples..."):
        for field, values in results.items():
            values.append(row[field])

    manifest_path = data_utils.write_manifest(
        results["references"],
        results["predictions"],
        args.model_id,
        args.dataset_path,
        args.dataset,
        args.split,
        audio_length=results["audio_length_s"],
        transcription_time=results["transcription_time_s"],
        audio_filepaths=results["audio_filepath"],
        extra_fields={field: results[field] for field in piece_fields} or None,
    )
    print("Results saved at path:", os.path.abspath(manifest_path))
    print("RTFx:", round(sum(results["audio_length_s"]) / sum(results["transcription_time_s"]), 2))


def build_parser():
    """The parser of the command line, with the options that the leaderboard's scripts have."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model_id", required=True, help="on the Hub, or a folder")
    add("--revision", help="commit of the model")
    add("--dataset_path", default="hf-audio/open-asr-leaderboard", help="repository on the Hub (default: %(default)s)")
    add("--dataset", required=True, help="configuration; empty for a data set in a repository of its own")
    add("--split", default="test", help="of the data set (default: %(default)s)")
    add("--device", type=int, default=-1, help="number of the GPU; -1 for the CPU (default: %(default)s)")
    dtypes = ["float32", "bfloat16", "float16"]
    add("--dtype", default="float32", choices=dtypes, help="of weights and computation (default: %(default)s)")
    add("--batch_size", type=int, default=16, help="recordings per batch (default: %(default)s)")
    add("--max_eval_samples", type=int, default=-1, help="only the first ones, for a trial (default: all)")
    add("--warmup_steps", type=int, default=2, help="batches before the timed ones (default: %(default)s)")
    add("--streaming", action="store_true", help="read over the network instead of downloading everything first")
    return parser


if __name__ == "__main__":
    main(build_parser().parse_args())
