"""Make a model again, from nothing to its card: `python -m training.recipe CONFIG --data-dir DIR --output-dir DIR`.

The section `recipe` of the config (training/configs/tiny_en.yaml) says how the data are made, and how the trained model
is exported and measured; the stages in between are those of training/train.py:

    synthesis, pseudo-labels, real speech     folders below --data-dir
    training                                  --output-dir/STAGE
    export, evaluation, card                  --output-dir/parts, results.jsonl and NAME.md

What is complete is not done again, and what was interrupted goes on, when the same command is given again. Programs,
engines and packages that the remaining steps need are tried before the first of them begins. On several GPUs, give
`torchrun ... -m training.train` in between: its finished stages are complete here too. `--scale 0.001` makes
everything that much smaller, to see the whole chain run in minutes.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hf_speechllm.assembly import TRAINED_WEIGHTS_NAME, resolve_model
from training import estimate_prior, pseudo_labels, real_speech, train
from training.arguments import DataArguments, Stage, parse_options, read_run, reject_unknown, stages_of
from training.command_line import errors_in_one_line
from training.data_sources import read_manifests
from training.engines import ENGINES, engine_fault
from training.evaluate_asr import build_parser, evaluate
from training.export import export
from training.game_speech import GAMES
from training.model_building import base_models
from training.model_card import subject_of_parts, usage_with_package, write_card
from training.packages import Package, fetch
from training.shards import SHARD_S
from training.synthesize import num_shards, shard_name, synthesize
from training.texts import SOURCES

STATE_NAME = "recipe_state.json"
PROGRAMS = {"ancient": "apt install ancient", "ffmpeg": "apt install ffmpeg"}
_SCALED_STEPS = ("max_steps", "warmup_steps", "save_steps", "eval_steps", "logging_steps")


@dataclass(frozen=True)
class Synthesis:
    """Shards of synthetic speech (training/synthesize.py) in the folder `output`."""

    engine: str
    hours: float
    seed: int
    output: str
    split: str = "train"

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ValueError(f"engine must be one of {sorted(ENGINES)}, got {self.engine!r}.")
        if self.split not in ("train", "dev"):
            raise ValueError(f"split must be 'train' or 'dev', got {self.split!r}.")


@dataclass(frozen=True)
class PseudoLabels:
    """Shards of games (training/pseudo_labels.py) in the folders `output` and, the last of each, `dev_output`."""

    output: str
    dev_output: str
    games: tuple[str, ...] = tuple(sorted(GAMES))

    def __post_init__(self) -> None:
        if not set(self.games) <= set(GAMES):
            raise ValueError(f"games must be among {sorted(GAMES)}, got {list(self.games)}.")


@dataclass(frozen=True)
class RealSpeech:
    """Recordings to measure on (training/real_speech.py) in the folder `output`."""

    output: str


@dataclass(frozen=True)
class Evaluation:
    """A call of training/evaluate_asr.py: `manifest` below the data folder, called `name`, options of `generate`."""

    manifest: str
    name: str
    modes: tuple[str, ...] = ("joint",)
    generate: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Card:
    """The card of the model called `name`: `training` in words, a Python expression that loads it, its licence.

    `license` is by default that of the language model, if it is one of `hf_speechllm.base_model`.
    """

    name: str
    training: str = ""
    load: str = "hf_speechllm.default_model()"
    license: str | None = None


@dataclass(frozen=True)
class Recipe:
    """The section `recipe`.

    `export` holds the decoding options that are stored with the model, `prior` the manifests, patterns below the data
    folder, that the label prior of its CTC head is estimated on.
    """

    synthesis: tuple[Synthesis, ...] = ()
    pseudo_labels: PseudoLabels | None = None
    real_speech: RealSpeech | None = None
    export: dict[str, Any] = field(default_factory=dict)
    prior: tuple[str, ...] = ()
    evaluation: tuple[Evaluation, ...] = ()
    card: Card | None = None


@dataclass(frozen=True)
class Step:
    """Something to make, and what it needs: names in PROGRAMS and ENGINES, packages, models as configs name them."""

    title: str
    is_complete: Callable[[], bool]
    make: Callable[[], None]
    programs: tuple[str, ...] = ()
    engines: tuple[str, ...] = ()
    packages: tuple[Package, ...] = ()
    models: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """A recipe with everything resolved: the scaled stages, and the folders it works in."""

    recipe: Recipe
    stages: list[Stage]
    config_name: str
    data_dir: Path
    output_dir: Path
    cache: Path
    scale: float = 1.0
    workers: int = 1

    @property
    def name(self) -> str:
        """Of the model."""
        return Path(self.config_name).stem if self.recipe.card is None else self.recipe.card.name

    @property
    def final(self) -> Path:
        """What the last stage leaves."""
        return Path(self.stages[-1].training.output_dir) / "final"

    @property
    def parts(self) -> Path:
        """The trained parts that are exported."""
        return self.output_dir / "parts"

    @property
    def results(self) -> Path:
        """Measured figures."""
        return self.output_dir / "results.jsonl"

    @property
    def card(self) -> Path:
        """The model card."""
        return self.output_dir / f"{self.name}.md"


def parse_recipe(values: dict[str, Any]) -> Recipe:
    """The section `recipe` of a config.

    Raises:
        ValueError: For an unknown key or a value that makes no sense, naming it.
    """
    reject_unknown(values, set(Recipe.__dataclass_fields__), "section 'recipe'")
    parsed = dict(values)
    for name, cls in (("synthesis", Synthesis), ("evaluation", Evaluation)):
        entries = enumerate(values.get(name) or [], 1)
        parsed[name] = tuple(parse_options(cls, entry, f"recipe.{name}, entry {number}") for number, entry in entries)
    for name, cls in (("pseudo_labels", PseudoLabels), ("real_speech", RealSpeech), ("card", Card)):
        if values.get(name) is not None:
            parsed[name] = parse_options(cls, values[name], f"recipe.{name}")
    if values.get("prior") is not None:
        parsed["prior"] = tuple(values["prior"])
    return Recipe(**parsed)


def scaled_run(values: dict[str, Any], scale: float) -> dict[str, Any]:
    """The values of a config with as many times fewer training steps and evaluated utterances, at least one."""
    run = copy.deepcopy(values)
    if scale == 1.0:
        return run
    data = run.setdefault("data", {})
    data["max_eval_examples"] = _scaled(data.get("max_eval_examples", DataArguments.max_eval_examples), scale)
    run.setdefault("training", {}).setdefault("logging_steps", 1)
    for section in (run, *run.get("stages", [])):
        training = section.get("training") or {}
        training |= {name: _scaled(training[name], scale) for name in _SCALED_STEPS if name in training}
    return run


def _scaled(count: int, scale: float) -> int:
    return max(1, round(scale * count))


def load_run(
    config: Path,
    data_dir: Path,
    output_dir: Path,
    *,
    cache: Path | None = None,
    scale: float = 1.0,
    workers: int = 1,
    overrides: list[str] | None = None,
) -> Run:
    """Read a recipe and the stages of its training.

    Args:
        config: YAML file with a section `recipe`.
        data_dir, output_dir: Folders of the data and of the run.
        cache: Folder for fetched packages; `cache` in that of the data by default.
        scale: Factor on hours, steps and evaluated utterances, at most 1.
        workers: Processes that synthesise.
        overrides: As for `load_stages`.

    Raises:
        ValueError: For an unknown key or a value that makes no sense, naming it.
    """
    if not 0.0 < scale <= 1.0:
        raise ValueError(f"scale must be above 0 and at most 1, got {scale}.")
    values = read_run(config)
    if not values.get("recipe"):
        raise ValueError(f"{config}: expected a section 'recipe', got none; training/train.py needs none.")
    stages = stages_of(scaled_run(values, scale), str(config), output_dir, overrides)
    cache = data_dir / "cache" if cache is None else cache
    recipe = parse_recipe(values["recipe"])
    joint = [each.name for each in recipe.evaluation if "joint" in each.modes and not each.generate.get("ctc_weight")]
    # evaluate_asr refuses it too, after hours of training.
    if joint and stages[0].model.trained_parts is None and not recipe.export.get("ctc_weight"):
        raise ValueError(
            f"recipe.export: mode joint of {', '.join(joint)} needs the weight of CTC; set ctc_weight here."
        )
    return Run(recipe, stages, config.name, data_dir, output_dir, cache, scale, workers)


def plan(run: Run) -> list[Step]:
    """All steps, in their order."""
    recipe = run.recipe
    steps = [_synthesis_step(run, synthesis) for synthesis in recipe.synthesis]
    if recipe.pseudo_labels is not None:
        steps += [_game_step(run, recipe.pseudo_labels, game) for game in recipe.pseudo_labels.games]
    if recipe.real_speech is not None:
        steps.append(_real_speech_step(run, recipe.real_speech))
    steps.append(_training_step(run))
    steps.append(_recorded_step(run, "export", f"export to {run.parts}", lambda: _export_state(run), _export))
    if recipe.evaluation:
        title = f"evaluation, {sum(len(each.modes) for each in recipe.evaluation)} results to {run.results}"
        options = [asdict(each) for each in recipe.evaluation]
        steps.append(_recorded_step(run, "evaluation", title, lambda: [options, *_parts_state(run)], _evaluate))
    if recipe.card is not None:
        title = f"card to {run.card}"
        steps.append(_recorded_step(run, "card", title, lambda: [asdict(recipe.card), *_card_state(run)], _write_card))
    return steps


def _synthesis_step(run: Run, synthesis: Synthesis) -> Step:
    hours = run.scale * synthesis.hours
    shard_s = min(SHARD_S, 3600 * hours)
    out = run.data_dir / synthesis.output
    names = [shard_name(synthesis.engine, synthesis.seed, shard) for shard in range(num_shards(hours, shard_s))]
    has_sentences = (run.cache / "sentences.jsonl").exists()
    return Step(
        f"{3600 * hours:.0f} s of synthesis by {synthesis.engine}, seed {synthesis.seed}, to {out}",
        lambda: all((out / f"{name}.jsonl").exists() for name in names),
        lambda: synthesize(
            synthesis.engine,
            hours,
            synthesis.seed,
            out,
            run.cache,
            split=synthesis.split,
            shard_s=shard_s,
            workers=run.workers,
        ),
        engines=(synthesis.engine,),
        packages=() if has_sentences else tuple(SOURCES.values()),
    )


def _game_step(run: Run, options: PseudoLabels, game: str) -> Step:
    out, dev_out = run.data_dir / options.output, run.data_dir / options.dev_output
    return Step(
        f"pseudo-labels of {game} to {out}",
        partial(pseudo_labels.is_made, game, dev_out),
        partial(pseudo_labels.make_game, game, run.cache, out, dev_out, run.scale),
        programs=("ancient",) if game == "steelsky" else (),
        packages=(GAMES[game][0],),
        models=("base:moonshine-tiny",),
    )


def _real_speech_step(run: Run, options: RealSpeech) -> Step:
    out = run.data_dir / options.output
    return Step(
        f"real speech to {out}",
        partial(real_speech.is_made, out),
        partial(real_speech.make_manifests, out, run.cache, run.scale),
        programs=("ffmpeg",),
        packages=real_speech.PACKAGES,
    )


def _training_step(run: Run) -> Step:
    finals = [Path(stage.training.output_dir) / "final" for stage in run.stages]
    return Step(
        f"training, {len(finals)} stages",
        lambda: all(final.exists() for final in finals),
        partial(_train, run),
        models=base_models(run.stages[0].model),
    )


def _train(run: Run) -> None:
    with errors_in_one_line("recipe"):
        train.run(run.stages, run.data_dir)


# Steps whose results depend on more than their names tell: what they were made of is written down.


def _recorded_step(
    run: Run, name: str, title: str, current_state: Callable[[], Any], make: Callable[[Run, str], None]
) -> Step:
    """A step that is complete as long as `current_state` is what it was when it was made.

    `make` gets the run and a digest of that state.
    """

    def digest() -> str:
        return hashlib.sha256(json.dumps(current_state(), sort_keys=True).encode()).hexdigest()

    def make_and_record() -> None:
        made_of = digest()
        make(run, made_of)
        _write_state(run.output_dir, {**_read_state(run.output_dir), name: made_of})

    return Step(title, lambda: _read_state(run.output_dir).get(name) == digest(), make_and_record)


def _read_state(folder: Path) -> dict[str, Any]:
    path = folder / STATE_NAME
    return json.loads(path.read_text()) if path.exists() else {}


def _write_state(folder: Path, state: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / f".{STATE_NAME}"
    scratch.write_text(json.dumps(state, indent=2) + "\n")
    scratch.replace(folder / STATE_NAME)


def _digest(folder: Path) -> str | None:
    """Of the trained weights in a folder; None if there are none."""
    path = folder / TRAINED_WEIGHTS_NAME
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def _export_state(run: Run) -> list[Any]:
    return [run.recipe.export, list(run.recipe.prior), _digest(run.final)]


def _parts_state(run: Run) -> list[Any]:
    path = run.parts / "generation_config.json"
    return [_digest(run.parts), path.read_text() if path.exists() else None]


def _card_state(run: Run) -> list[Any]:
    return [*_parts_state(run), run.results.read_text() if run.results.exists() else None]


def _export(run: Run, _made_of: str) -> None:
    export(run.final, run.parts, run.recipe.export)
    if run.recipe.prior:
        estimate_prior.estimate(str(run.parts), read_manifests(list(run.recipe.prior), run.data_dir))


def _evaluate(run: Run, made_of: str) -> None:
    unfinished = run.results.with_suffix(".unfinished")
    unfinished.unlink(missing_ok=True)
    for number, evaluation in enumerate(run.recipe.evaluation):
        manifest = run.data_dir / evaluation.manifest
        limit = _scaled(len(manifest.read_text().splitlines()), run.scale)
        # An interrupted evaluation of the same model goes on from the hypotheses of this name.
        hypotheses = run.output_dir / "hypotheses" / f"{manifest.stem}-{number}-{made_of[:8]}"
        command = [manifest, "--model", run.parts, "--name", evaluation.name, "--system", run.name]
        command += ["--generate", json.dumps(evaluation.generate), "--limit", limit]
        command += ["--output", hypotheses, "--results", unfinished]
        for mode in evaluation.modes:
            command += ["--mode", mode]
        failed = evaluate(build_parser().parse_args([str(word) for word in command]))
        if failed:
            raise RuntimeError(f"{manifest}: {failed} recordings cannot be read; they would be missing in the figures.")
    unfinished.replace(run.results)


def _write_card(run: Run, _made_of: str) -> None:
    card = run.recipe.card
    results = run.results.read_text().splitlines() if run.results.exists() else []
    subject = subject_of_parts(
        card.name,
        usage_with_package(card.load),
        run.parts,
        card.training,
        run.config_name,
        license=card.license,
    )
    run.card.write_text(write_card(subject, [json.loads(line) for line in results]))


def check_scale(folder: Path, scale: float) -> None:
    """Refuse a folder whose files were made at another scale, since their names are the same.

    Raises:
        ValueError: If it was, by what it says itself; a folder that says nothing was made at the scale 1.
    """
    is_new = not folder.exists() or not any(folder.iterdir())
    found = scale if is_new else _read_state(folder).get("scale", 1.0)
    if found != scale:
        raise ValueError(f"{folder}: was made with --scale {found:g}, got {scale:g}; choose another folder.")
    _write_state(folder, {**_read_state(folder), "scale": scale})


def prepare(steps: Sequence[Step], cache: Path) -> None:
    """Try the programs and engines that `steps` need, and fetch their packages and models.

    Raises:
        RuntimeError: With one line about all that is missing.
    """
    programs, engines, packages, models = (
        dict.fromkeys(need for step in steps for need in getattr(step, kind))
        for kind in ("programs", "engines", "packages", "models")
    )
    faults = [f"{name} is not there ({PROGRAMS[name]})" for name in programs if shutil.which(name) is None]
    if engines:
        with ProcessPoolExecutor(1) as pool:  # engines leave threads behind, which forked workers cannot use
            faults += [fault for fault in pool.map(partial(engine_fault, cache=cache), engines) if fault is not None]
    if faults:
        raise RuntimeError(f"to be installed: {'; '.join(faults)}")
    for number, package in enumerate(packages, 1):
        _say(f"package {number} of {len(packages)}: {package.name}")
        fetch(package, cache)
    for number, model in enumerate(models, 1):
        _say(f"model {number} of {len(models)}: {model}")
        resolve_model(model)


def carry_out(steps: Sequence[Step]) -> None:
    """Make the steps that are not complete, a line about each."""
    for number, step in enumerate(steps, 1):
        head = f"[{number}/{len(steps)}] {step.title}"
        if step.is_complete():
            _say(f"{head}: complete")
            continue
        _say(f"{head} ...")
        started = time.monotonic()
        step.make()
        _say(f"{head}: made in {time.monotonic() - started:.0f} s")


def _say(line: str) -> None:
    print(f"recipe: {line}", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="YAML file with a section `recipe`")
    parser.add_argument("overrides", nargs="*", metavar="SECTION.KEY=VALUE", help="win over the file, in every stage")
    parser.add_argument("--data-dir", type=Path, required=True, help="folder for the data, about 4 GB")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder of the run")
    parser.add_argument("--cache", type=Path, help="folder for fetched packages (default: DATA_DIR/cache)")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="factor on hours, steps and evaluated utterances (default: 1)"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes that synthesise (default: 1)")
    arguments = vars(parser.parse_intermixed_args())
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    torch.set_float32_matmul_precision("high")
    with errors_in_one_line("recipe", RuntimeError):
        run = load_run(**arguments)
        for folder in (run.data_dir, run.output_dir):
            check_scale(folder, run.scale)
        steps = plan(run)
        _say("trying what the remaining steps need")
        prepare([step for step in steps if not step.is_complete()], run.cache)
    carry_out(steps)


if __name__ == "__main__":
    main()
