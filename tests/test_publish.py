"""Publishing, offline, with tiny random models: what is written, that it works alone, and what is refused."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import soundfile as sf
import torch
import yaml
from huggingface_hub import EvalResultEntry, ModelCard, eval_result_entries_to_yaml
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from test_assembly import language_model_folder, trained_folder
from tiny_models import feature_extractor, lively, noise, tiny_model, tiny_processor
from transformers import MoonshineConfig, MoonshineModel, pipeline

from hf_speechllm.assembly import load_trained_parts
from hf_speechllm.modeling_speechllm import SpeechLLMForConditionalGeneration
from training import publish
from training.arguments import TuningArguments
from training.evaluation_data import UsageError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
BASES = ["--base-models", "UsefulSensors/moonshine-tiny", "somebody/tiny-llm"]
APACHE = ["--license", "apache-2.0"]
RATES = dict.fromkeys(("wer_low", "wer_high", "cer", "substitutions", "deletions", "insertions", "rtfx"), 1.0)
ROW = {"dataset": "Clips", "mode": "joint", "options": {}, "utterances": 3, "duration_min": 1, "wer": 12.345, **RATES}


@dataclasses.dataclass
class FakeHub:
    """The calls of `HfApi` that publishing makes; keeps what was uploaded in `folder`."""

    folder: Path
    error: Exception | None = None
    calls: list = dataclasses.field(default_factory=list)

    def whoami(self) -> dict:
        self.calls.append("whoami")
        if self.error is not None:
            raise self.error
        return {"name": "me"}

    def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> None:
        self.calls.append(("create_repo", repo_id, private, exist_ok))

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str, delete_patterns: list[str]):
        self.calls.append(("upload_folder", repo_id))
        shutil.copytree(folder_path, self.folder)
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/{COMMIT}")

    def snapshot_download(self, repo_id: str, *, cache_dir: Path) -> None:
        self.calls.append(("snapshot_download", repo_id))
        repository = Path(cache_dir) / f"models--{repo_id.replace('/', '--')}"
        shutil.copytree(self.folder, repository / "snapshots" / COMMIT)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(COMMIT)


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "clip.wav"
    sf.write(path, noise(0.6, seed=3)[0], 16000)
    return path


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """A folder of trained parts with a LoRA."""
    root = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 32}
    heads = {f"{side}_num_attention_heads": 2 for side in ("encoder", "decoder")}
    config = MoonshineConfig(**sizes, **heads, encoder_num_hidden_layers=3, decoder_num_hidden_layers=1)
    lively(MoonshineModel(config)).save_pretrained(root / "audio")
    feature_extractor("moonshine").save_pretrained(root / "audio")
    tuning = TuningArguments(encoder="full", encoder_layers=1, llm="lora", lora_r=3, lora_alpha=5)
    trained_folder(root / "parts", str(root / "audio"), language_model_folder(root / "lm"), [tuning])
    generation = json.loads((root / "parts" / "generation_config.json").read_text())
    (root / "parts" / "generation_config.json").write_text(json.dumps({**generation, "max_new_tokens": 6}))
    return root / "parts"


@pytest.fixture
def heard_here(monkeypatch):
    """Transcribe in this process, where a process of its own would prove nothing more."""

    def transcribe(model, clip, scratch, hub_cache=None):
        return pipeline("automatic-speech-recognition", model=model)(str(clip))["text"]

    monkeypatch.setattr(publish, "transcribe_without_package", transcribe)


def run(api: FakeHub, *arguments: object) -> None:
    publish.publish(publish.build_parser().parse_args([*map(str, arguments)]), api)


def dry_run(folder: Path, clip: Path, checkpoint: Path, *arguments: object) -> None:
    hub = FakeHub(folder / "hub")
    run(hub, checkpoint, "--repo-id", "me/tiny", "--dry-run", folder, "--clip", clip, *arguments)
    assert hub.calls == []


@pytest.fixture(scope="module")
def published(parts, clip, tmp_path_factory) -> tuple[FakeHub, str]:
    """A model uploaded with its adapter, checked in processes of their own before and after; its messages."""
    folder = tmp_path_factory.mktemp("published")
    (folder / "results.jsonl").write_text(json.dumps(ROW) + "\n" + json.dumps({**ROW, "wer": None}) + "\n")
    hub, messages = FakeHub(folder / "hub"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(publish, "step", lambda what, detail: messages.append((what, detail)))
        arguments = [
            parts,
            "--repo-id",
            "me/tiny",
            "--results",
            folder / "results.jsonl",
            "--keep-adapter",
            "--private",
        ]
        run(hub, *arguments, *BASES, *APACHE, "--clip", clip, "--generate", '{"num_beams": 2}')
    return hub, messages


def test_the_repository_is_checked_without_the_package_before_and_after_the_upload(published):
    hub, messages = published
    assert hub.calls == [
        "whoami",
        ("create_repo", "me/tiny", True, True),
        ("upload_folder", "me/tiny"),
        ("snapshot_download", "me/tiny"),
    ]
    steps = [what for what, _ in messages]
    assert steps == ["account", "building", "checking", "heard", "uploading", "checking", "heard", "published"]
    heard = [detail for what, detail in messages if what == "heard"]
    assert heard[0] == heard[1] and len(heard[0]) > 4, "the tiny model should say something"


def test_the_repository_holds_code_processor_options_and_licence(published):
    folder = published[0].folder
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"]["AutoModelForSpeechSeq2Seq"] == "modeling_speechllm.SpeechLLMForConditionalGeneration"
    assert (folder / "modeling_speechllm.py").is_file() and (folder / "processor_config.json").is_file()
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "me/tiny"
    options = json.loads((folder / "generation_config.json").read_text())
    assert (options["ctc_weight"], options["num_beams"]) == (0.25, 2)
    assert "Apache License" in (folder / "LICENSE").read_text()
    assert {path.stat().st_mode & 0o777 for path in folder.glob("*.safetensors")} == {0o644}


def test_no_path_of_this_machine_is_published(published, parts):
    texts = [path for path in published[0].folder.rglob("*") if path.suffix in (".json", ".md", ".jinja")]
    assert len(texts) > 5
    for path in texts:
        assert str(parts.parent) not in path.read_text(), path.name
    config = json.loads((published[0].folder / "config.json").read_text())
    assert config["audio_config"]["_name_or_path"] == "UsefulSensors/moonshine-tiny"


def test_the_card_has_the_measured_figures_and_the_three_lines(published):
    card = ModelCard((published[0].folder / "README.md").read_text())
    assert card.data.base_model == ["UsefulSensors/moonshine-tiny", "somebody/tiny-llm"]
    assert (card.data.license, card.data.model_name) == ("apache-2.0", "tiny")
    assert [result.metric_value for result in card.data.eval_results] == [round(12.345, 2)]
    assert 'model="me/tiny", trust_remote_code=True' in card.text and '"num_beams": 2' in card.text
    assert "import hf_speechllm" not in card.text
    (packages,) = re.findall("`pip install (.*)`", card.text)
    assert {"peft", "soundfile", "soxr", "torch", "transformers"} <= set(packages.split())
    assert not {"json", "hf_speechllm", "dataclasses"} & set(packages.split())
    assert "LoRA 0.00 M" in card.text and "million parameters in total" in card.text


def test_the_adapter_is_added_to_the_weights(parts, clip, tmp_path, heard_here):
    dry_run(tmp_path / "new" / "out", clip, parts, *BASES, *APACHE)
    folder = tmp_path / "new" / "out"
    assert not list(folder.glob("adapter_*")) and not list(tmp_path.glob("new/.publish*"))
    model, processor = load_trained_parts(parts)
    loaded = SpeechLLMForConditionalGeneration.from_pretrained(folder)
    inputs = processor(noise(0.6, seed=3)[0], text="the thing", sampling_rate=16000)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=1e-4)
    lora = [parameter.numel() for name, parameter in model.named_parameters() if "lora_" in name]
    total = sum(parameter.numel() for parameter in model.parameters())
    assert lora and publish.count_parameters(folder) == pytest.approx(total - sum(lora), rel=0.1)


def test_a_merged_repository_says_what_combination_needs(parts, clip, tmp_path, heard_here):
    """Its language model hears: without the plain one, the combined modes would find other texts than were measured."""
    (tmp_path / "joint.jsonl").write_text(json.dumps(ROW) + "\n")
    (tmp_path / "all.jsonl").write_text("".join(json.dumps({**ROW, "mode": m}) + "\n" for m in ("joint", "rescoring")))
    common = [clip, parts, *BASES, *APACHE, "--results"]
    with pytest.raises(UsageError, match="--results: the figures of rescoring .* give --keep-adapter, or leave"):
        dry_run(tmp_path / "out", *common, tmp_path / "all.jsonl")
    assert not (tmp_path / "out").exists()
    dry_run(tmp_path / "out", *common, tmp_path / "joint.jsonl")
    assert 'give it with them, `lm="somebody/tiny-llm"`' in (tmp_path / "out" / "README.md").read_text()
    dry_run(tmp_path / "kept", *common, tmp_path / "all.jsonl", "--keep-adapter")
    card = (tmp_path / "kept" / "README.md").read_text()
    assert "rescored by the plain LLM" in card and "lm=" not in card


def test_a_relative_folder_is_checked_by_its_absolute_path(parts, clip, tmp_path, monkeypatch):
    checked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(publish, "transcribe_without_package", lambda model, *_: checked.append(model) or "")
    monkeypatch.setattr(publish, "check_text", lambda *_: None)
    dry_run(Path("out"), clip, parts, *BASES, *APACHE)
    (model,) = checked
    assert Path(model).is_absolute() and (tmp_path / "out" / "config.json").is_file()


def test_a_whole_model_with_evaluation_results_and_its_own_licence(clip, tmp_path, heard_here):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_processor().save_pretrained(tmp_path / "model")
    entries = [EvalResultEntry(dataset_id="hf-audio/open-asr-leaderboard", task_id="ami_wer", value=12.5)]
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(eval_result_entries_to_yaml(entries)))
    (tmp_path / "MIT").write_text("Do what you like.")
    arguments = ["--license", "mit", "--license-file", tmp_path / "MIT", "--eval-results", tmp_path / "eval.yaml"]
    (tmp_path / "out").mkdir()  # an empty folder is welcome
    dry_run(tmp_path / "out", clip, tmp_path / "model", *BASES, *arguments, "--training", "Learned from nothing.")
    folder = tmp_path / "out"
    assert yaml.safe_load((folder / ".eval_results/open_asr_leaderboard.yaml").read_text())[0]["value"] == 12.5
    assert (folder / "LICENSE").read_text() == "Do what you like."
    card = ModelCard((folder / "README.md").read_text())
    assert card.data.license == "mit" and card.data.eval_results is None
    assert "Learned from nothing." in card.text and "were trained" not in card.text and "## Results" not in card.text


def test_large_weights_are_sharded(parts, clip, tmp_path, heard_here, monkeypatch):
    monkeypatch.setattr(publish, "MAX_SHARD_SIZE", "20KB")
    dry_run(tmp_path / "out", clip, parts, *BASES, *APACHE)
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 1
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()


def unknown_token() -> HfHubHTTPError:
    response = SimpleNamespace(status_code=401, headers={}, request=None)
    return HfHubHTTPError("401 Client Error\nmany lines", response=response)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (LocalTokenNotFoundError("no token"), "--token: there is no access token; give --token, set HF_TOKEN or run"),
        (unknown_token(), "--token: the Hub does not know this access token; give --token"),
        (ConnectionError("no\nroute"), r"the Hub cannot be reached \(ConnectionError: no route\)"),
    ],
)
def test_without_a_valid_token_nothing_is_written(parts, clip, tmp_path, monkeypatch, error, message):
    monkeypatch.setattr(publish, "write_model", lambda *arguments: pytest.fail("the model was built"))
    hub = FakeHub(tmp_path / "hub", error)
    with pytest.raises(UsageError, match=message):
        run(hub, parts, "--repo-id", "me/tiny", "--clip", clip, *BASES, *APACHE)
    assert hub.calls == ["whoami"] and not hub.folder.exists()


def test_a_wrong_token_is_one_line_and_an_exit_status(parts, clip, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(publish, "HfApi", lambda token: FakeHub(tmp_path / token, unknown_token()))
    arguments = [parts, "--repo-id", "me/tiny", "--clip", clip, *BASES, *APACHE, "--token", "hf_wrong"]
    with pytest.raises(SystemExit) as caught:
        publish.main([*map(str, arguments)])
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("publish: error: --token: the Hub does not know") and message.count("\n") == 1


def test_a_repository_that_fails_alone_is_not_written(parts, clip, tmp_path, monkeypatch):
    monkeypatch.setattr(publish, "_TRANSCRIBE", "import hf_nothing")
    with pytest.raises(UsageError, match="does not transcribe without hf_speechllm .*No module named 'hf_nothing'"):
        dry_run(tmp_path / "out", clip, parts, *BASES, *APACHE)
    monkeypatch.setattr(publish, "transcribe_without_package", lambda *arguments: "other words")
    with pytest.raises(UsageError, match="expected the text .* as with hf_speechllm, got 'other words' without"):
        dry_run(tmp_path / "out", clip, parts, *BASES, *APACHE)
    assert list(tmp_path.iterdir()) == []


def test_failures_of_the_upload_and_after_it(parts, clip, tmp_path, heard_here, monkeypatch):
    arguments = [parts, "--repo-id", "me/tiny", "--clip", clip, *BASES, *APACHE]
    hub = FakeHub(tmp_path / "hub")
    hub.upload_folder = lambda **options: (_ for _ in ()).throw(OSError("disk\nquota"))
    with pytest.raises(UsageError, match=r"me/tiny: the upload failed \(OSError: disk quota\)"):
        run(hub, *arguments)
    hub = FakeHub(tmp_path / "hub")
    hub.snapshot_download = lambda *names, **options: (_ for _ in ()).throw(OSError("gone"))
    with pytest.raises(UsageError, match="me/tiny/commit/.* is published, but the check failed: OSError: gone"):
        run(hub, *arguments)


def write(folder: Path, name: str, content: str) -> str:
    (folder / name).write_text(content)
    return str(folder / name)


WRONG = {
    "--repo-id: expected USER/NAME, got 'tiny'": ["{parts}", *BASES, *APACHE, "--repo-id", "tiny"],
    "--repo-id: expected USER/NAME, got 'me/a b'": ["{parts}", *BASES, *APACHE, "--repo-id", "me/a b"],
    "CHECKPOINT: .*absent: no such folder": ["{tmp}/absent"],
    "expected recipe.json .* got no config.json": ["{tmp}"],
    "got that of a bert model": ["{bert}"],
    "--base-models: .* is a whole model; give the Hub ids": ["{whole}"],
    "--base-models: expected Hub ids of the base models, got '.*audio'": ["{parts}", *APACHE],
    "--license: that of somebody/tiny-llm is not known here": ["{parts}", *BASES],
    "--license-file: expected the text of mit": ["{parts}", *BASES, "--license", "mit"],
    "--license-file: .*absent: no such file": ["{parts}", *BASES, *APACHE, "--license-file", "{tmp}/absent"],
    "--generate: expected a JSON object, got '{'": ["{parts}", *BASES, *APACHE, "--generate", "{"],
    r"--generate: expected a JSON object, got '\[\]'": ["{parts}", *BASES, *APACHE, "--generate", "[]"],
    "absent.jsonl: no such file": ["{parts}", *BASES, *APACHE, "--results", "{tmp}/absent.jsonl"],
    "results.jsonl:1: field 'mode' is missing": ["{parts}", *BASES, *APACHE, "--results", "{results}"],
    "--eval-results: .*absent.yaml: expected the YAML": [
        "{parts}",
        *BASES,
        *APACHE,
        "--eval-results",
        "{tmp}/absent.yaml",
    ],
    "--eval-results: .*eval.yaml: expected the YAML": ["{parts}", *BASES, *APACHE, "--eval-results", "{eval}"],
    "--clip: .*absent.wav: no such file": ["{parts}", *BASES, *APACHE, "--clip", "{tmp}/absent.wav"],
    "--dry-run: .*full exists already": ["{parts}", *BASES, *APACHE, "--dry-run", "{tmp}/full"],
    "--dry-run: .* cannot be made": ["{parts}", *BASES, *APACHE, "--dry-run", "{results}/a/b"],
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(parts, clip, tmp_path, message):
    for name in ("bert", "whole", "full"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "file").touch()
    places = {
        "{parts}": str(parts),
        "{tmp}": str(tmp_path),
        "{bert}": str(Path(write(tmp_path, "bert/config.json", '{"model_type": "bert"}')).parent),
        "{whole}": str(Path(write(tmp_path, "whole/config.json", '{"model_type": "speechllm"}')).parent),
        "{results}": write(tmp_path, "results.jsonl", '{"dataset": "a"}\n'),
        "{eval}": write(tmp_path, "eval.yaml", "- value: 3\n"),
    }
    arguments = ["--repo-id", "me/tiny", "--dry-run", str(tmp_path / "out"), "--clip", str(clip)]
    for argument in WRONG[message]:
        for name, place in places.items():
            argument = argument.replace(name, place)
        arguments.append(argument)
    with pytest.raises(UsageError, match=message):
        run(FakeHub(tmp_path / "hub"), *arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_default_model(tmp_path):
    hub = FakeHub(tmp_path / "hub")
    run(hub, "default", "--repo-id", "me/default", "--dry-run", tmp_path / "out")
    card = ModelCard((tmp_path / "out" / "README.md").read_text())
    assert card.data.base_model == ["UsefulSensors/moonshine-tiny", "HuggingFaceTB/SmolLM2-135M-Instruct"]
