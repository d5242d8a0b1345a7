"""Settings and fixtures of all tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# The models are tiny: threads cost them more time than they save, many times more on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def loud_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny model that writes a text for any audio."""
    from tiny_models import loud_model, tiny_processor

    folder = tmp_path_factory.mktemp("model")
    loud_model().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def quick_data_sets() -> Iterator[None]:
    """`datasets` without progress bars, and without the pause that it makes at the end of every pass."""
    import datasets

    datasets.disable_progress_bars()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
        yield


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> list:
    """Training runs get the tiny model, always the same; the list of those that they got, in order."""
    from tiny_models import tiny_model, tiny_processor

    import training.train

    built = []

    def build(_arguments):
        built.append(tiny_model())
        return built[-1], tiny_processor()

    monkeypatch.setattr(training.train, "build_model", build)
    return built


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stage of every training step of the test, by its output folder."""
    from training.trainer import SpeechLLMTrainer

    done = []
    training_step = SpeechLLMTrainer.training_step

    def spy(self, *args, **kwargs):
        done.append(Path(self.args.output_dir).name)
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(SpeechLLMTrainer, "training_step", spy)
    return done
