"""`rlhf_env/Reviews-v0`: film reviews by a small GPT-2; the reward is a learned proxy of their sentiment (VADER)."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rlhf_env.envs.single import TextGenerationEnv
from rlhf_env.envs.spaces import unshared
from rlhf_env.envs.vector import TextGenerationVectorEnv
from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.reward_models.classifier import ClassifierReward
from rlhf_env.reward_models.vader import VaderReward
from rlhf_env.text.corpus import review_openings
from rlhf_env.training.config import EnvConfig, PipelineConfig
from rlhf_env.training.pipeline import run_pipeline
from rlhf_env.training.stages import Watch

ASSETS = Path(__file__).parent / "assets" / "reviews"
MAX_NEW_TOKENS = 24
BETA = 0.1


def make_env(**kwargs: Any) -> TextGenerationEnv:
    """One environment; keywords are those of `TextGenerationEnv`."""
    return TextGenerationEnv(**_with_defaults(kwargs))


def make_vector_env(num_envs: int = 1, **kwargs: Any) -> TextGenerationVectorEnv:
    """`num_envs` environments in one batch; keywords are those of `TextGenerationVectorEnv`."""
    return TextGenerationVectorEnv(num_envs, **_with_defaults(kwargs))


@cache
def reference() -> CausalLM:
    """The GPT-2 that writes the reviews: one frozen object, shared; `copy.deepcopy` it to train."""
    return CausalLM.from_pretrained(ASSETS / "reference").requires_grad_(False)


@cache
def proxy() -> ClassifierReward:
    """The reward model learned from simulated comparisons: the reference's reviews score mean 0, variance 1."""
    return ClassifierReward(ASSETS / "proxy")


def gold() -> VaderReward:
    """What the simulated labelers went by, and what the proxy is a guess of: VADER's sentiment of the response."""
    return VaderReward()


def pipeline_config(seed: int = 0) -> PipelineConfig:
    """The whole pipeline on film reviews, from nothing: what `rlhf-env demo` runs."""
    return PipelineConfig(
        demonstrations="builtin:reviews",
        prompts="builtin:reviews",
        eval_share=0.25,
        gold="vader",
        seed=seed,
        num_envs=128,
        env=EnvConfig(beta=BETA, max_new_tokens=MAX_NEW_TOKENS),
        sft={"new": {"tokenizer": "word", "n_positions": 64}, "fit": {"learning_rate": 2e-3, "epochs": 4}},
        prefer={"comparisons": 4000, "labeler": {"temperature": 0.25, "flip_rate": 0.05}},
        reward={"fit": {"learning_rate": 1e-3, "epochs": 2}},
        train={"updates": 60, "eval_every": 10, "settings": {"learning_rate": 5e-4, "batch_size": 256, "epochs": 1}},
        evaluate={"episodes": 512, "best_of": 64},
    )


def build(folder: Path = ASSETS, *, watch: Watch | None = None) -> Path:
    """Make again what the package ships, reference and proxy, in `folder`: the models of the pipeline with seed 0."""
    with TemporaryDirectory() as scratch:
        out = Path(scratch) / "reviews"
        run_pipeline(pipeline_config(), out, watch=watch, until="reward")
        for name, stage in (("reference", "sft"), ("proxy", "reward")):
            beside = folder / f".{name}.tmp"
            shutil.rmtree(beside, ignore_errors=True)
            shutil.copytree(out / stage / "model", beside)
            shutil.rmtree(folder / name, ignore_errors=True)
            beside.rename(folder / name)
    return folder


def _with_defaults(kwargs: dict[str, Any]) -> dict[str, Any]:
    defaults = {
        "prompts": review_openings(),
        "tokenizer": reference().tokenizer,
        "reference": reference(),
        "reward_model": proxy(),
        "beta": BETA,
        "max_new_tokens": MAX_NEW_TOKENS,
    }
    return defaults | unshared(kwargs)
