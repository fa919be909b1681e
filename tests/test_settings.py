"""What each stage can be told: a setting that cannot work is refused when it is given, by name."""

import math
import subprocess
import sys
from dataclasses import replace

import pytest

from rlhf_env.errors import ConfigError
from rlhf_env.records.config import documented
from rlhf_env.settings import BradleyTerryConfig, LabelerConfig, SFTConfig
from rlhf_env.training.config import (
    EvaluateConfig,
    FineTuneConfig,
    GenerateConfig,
    MemberConfig,
    PipelineConfig,
    PreferConfig,
    RewardConfig,
    TrainConfig,
)

STAGES = {
    FineTuneConfig: FineTuneConfig("texts.txt"),
    PreferConfig: PreferConfig("policy", "prompts.txt", "vader"),
    RewardConfig: RewardConfig("comparisons.jsonl"),
    TrainConfig: TrainConfig("policy", "prompts.txt", "vader"),
    EvaluateConfig: EvaluateConfig("policy", "prompts.txt", "vader"),
    GenerateConfig: GenerateConfig("policy", prompt="a"),
    PipelineConfig: PipelineConfig(),
}


def test_help_needs_no_torch():
    code = "import sys, rlhf_env.settings, rlhf_env.training.config; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "rlhf_env.training.config" in loaded and not {"torch", "transformers"} & set(loaded)


@pytest.mark.parametrize(
    "kind", [*STAGES, MemberConfig, SFTConfig, LabelerConfig, BradleyTerryConfig], ids=lambda k: k.__name__
)
def test_every_setting_has_its_sentence(kind):
    sentences = documented(kind)
    assert sentences and [key for key, sentence in sentences.items() if not sentence] == []


@pytest.mark.parametrize("kind", [SFTConfig, BradleyTerryConfig])
@pytest.mark.parametrize(
    ("name", "wrong", "right"),
    [
        ("learning_rate", [0.0, -1.0, math.nan, math.inf], [1e-9, 10.0]),
        ("epochs", [0, -1], [1]),
        ("batch_size", [0, -1], [1]),
        ("weight_decay", [-0.1, math.nan, math.inf], [0.0, 1.0]),
    ],
)
def test_how_something_is_learned(kind, name, wrong, right):
    for value in wrong:
        with pytest.raises(ConfigError, match=f"^{name} must be .* it is {value}$"):
            kind(**{name: value})
    assert [getattr(kind(**{name: value}), name) for value in right] == right


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"margin": -1.0}, "BradleyTerry needs margin of at least 0, it is -1.0"),
        ({"center": math.inf}, "needs center of at least 0, it is inf"),
        ({"l2": -0.1}, "needs l2 of at least 0"),
        ({"freeze_layers": -1}, "needs freeze_layers of at least 0"),
        ({"lora_rank": -1}, "needs lora_rank of at least 0"),
        ({"label_smoothing": 0.5}, "label_smoothing must be at least 0 and below 0.5, .* it is 0.5"),
        ({"flip_rate": math.nan}, "flip_rate must be .* it is nan"),
        ({"label_smoothing": 0.1, "flip_rate": 0.1}, "at equal rates they cancel out; leave one of them out"),
        ({"loss": "best", "margin": 1.0}, "margin say what a pair costs: they need loss=pairs, not best"),
        ({"loss": "plackett_luce", "ties": "davidson", "flip_rate": 0.1}, "ties and flip_rate say what a pair costs"),
        ({"tie_parameter": 1.0}, "tie_parameter needs ties=davidson or rao_kupper, it is 1.0"),
        ({"ties": "davidson", "tie_parameter": 0.0}, "of davidson must be above 0, it is 0.0"),
        ({"ties": "rao_kupper", "tie_parameter": 1.0}, "of rao_kupper must be above 1, it is 1.0"),
        ({"loss": "pair"}, "loss must be one of pairs, plackett_luce, best; it is 'pair'"),
        ({"ties": "none"}, "ties must be one of half, davidson, rao_kupper; it is 'none'"),
        ({"freeze_layers": 1, "lora_rank": 2}, "leave freeze_layers out"),
    ],
)
def test_what_makes_no_sense_of_comparisons_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        BradleyTerryConfig(**change)


def test_what_goes_together_of_comparisons():
    BradleyTerryConfig(ties="rao_kupper", tie_parameter=1.5, margin=1.0, label_smoothing=0.1, center=0.01, l2=0.1)
    BradleyTerryConfig(loss="plackett_luce", center=0.01, lora_rank=4)


@pytest.mark.parametrize(
    ("name", "wrong", "right"),
    [
        ("temperature", [-0.1, math.nan, math.inf], [0.0, 5.0]),
        ("flip_rate", [-0.1, 1.1, math.nan], [0.0, 0.5, 1.0]),
    ],
)
def test_how_a_labeler_errs(name, wrong, right):
    for value in wrong:
        with pytest.raises(ConfigError, match=f"labeler's {name} must be .* it is {value}$"):
            LabelerConfig(**{name: value})
    assert [getattr(LabelerConfig(**{name: value}), name) for value in right] == right


@pytest.mark.parametrize(
    ("kind", "name", "value", "least"),
    [
        *((kind, "seed", -1, 0) for kind in STAGES),
        *((kind, "num_envs", 0, 1) for kind in STAGES if kind is not FineTuneConfig),
        (FineTuneConfig, "freeze_layers", -1, 0),
        (PreferConfig, "comparisons", 0, 1),
        (PreferConfig, "responses", 1, 2),
        (PreferConfig, "overlap", 0, 1),
        (RewardConfig, "normalize_on", 1, 2),
        (TrainConfig, "freeze_layers", -1, 0),
        (TrainConfig, "eval_episodes", 0, 1),
        (TrainConfig, "eval_every", -1, 0),
        (TrainConfig, "checkpoint_every", -1, 0),
        (TrainConfig, "updates", 0, 1),
        (EvaluateConfig, "episodes", 0, 1),
        (EvaluateConfig, "best_of", -1, 0),
        (PipelineConfig, "opening_words", 0, 1),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_counts_have_a_least_value(kind, name, value, least):
    with pytest.raises(ConfigError, match=f"^{name} must be at least {least}, it is {value}$"):
        replace(STAGES[kind], **{name: value})
    assert getattr(replace(STAGES[kind], **{name: least}), name) == least


@pytest.mark.parametrize("kind", [FineTuneConfig, RewardConfig])
@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_something_is_held_out_and_something_learned(kind, share):
    with pytest.raises(ConfigError, match=f"held_out must be a share between 0 and 1, it is {share}"):
        replace(STAGES[kind], held_out=share)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (RewardConfig, {"reference": "policy"}, "give both reference and prompts, or neither"),
        (RewardConfig, {"prompts": "prompts.txt"}, "give both reference and prompts, or neither"),
        (EvaluateConfig, {"best_of": 4}, "give a reference, or best_of=0"),
        (TrainConfig, {"tokens": 10, "updates": 1}, "one budget, but tokens and updates are given"),
        (GenerateConfig, {"prompts": "prompts.txt"}, "either a file of prompts .* or one prompt"),
        (GenerateConfig, {"prompt": None}, "either a file of prompts .* or one prompt"),
    ],
)
def test_settings_that_contradict_each_other(kind, change, message):
    with pytest.raises(ConfigError, match=message):
        replace(STAGES[kind], **change)
