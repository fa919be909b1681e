"""What a training run, an evaluation and a generation can be told, one sentence per setting."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from rlhf_env.errors import ConfigError

DType = Literal["float32", "float64", "bfloat16", "float16"]

DEFAULT_TOKENS = 200_000


@dataclass(frozen=True)
class EnvConfig:
    """The token MDP: what is written, when it ends, and what the KL costs."""

    beta: float = 0.05  #: KL coefficient in reward per nat; where it adapts, its first value
    target_kl: float | None = None  #: KL in nats per sequence that β is steered towards; none keeps β fixed
    beta_horizon: int = 10_000  #: episodes over which an adapting β changes by a factor of about e^0.2
    kl_placement: Literal["token", "terminal"] = "token"  #: charge the KL at each token, or all of it at the last one
    max_new_tokens: int = 48  #: the longest response, in tokens
    max_prompt_tokens: int | None = None  #: room for the prompt, in tokens; none: as much as the longest prompt needs
    min_new_tokens: int = 0  #: EOS is forbidden before this many tokens
    temperature: float = 1.0  #: divides the logits of policy and reference alike
    stop_strings: tuple[str, ...] = ()  #: a response ends once its text holds one of these
    missing_eos_penalty: float = 0.0  #: subtracted from the score of a response that the length limit ended
    chat_template: str = "auto"  #: "auto" (the tokenizer's own, if any), "none" (plain text) or a Jinja file


@dataclass(frozen=True)
class TrainConfig:
    """A training run: everything that decides its outcome, on a given machine and with given versions."""

    policy: str  #: folder or hub name of the language model to train
    prompts: str  #: file of prompts, .txt (one per line) or .jsonl (key "prompt")
    reward: str  #: what scores responses: "vader", "module:function" or the folder of a classifier
    agent: str = "ppo"  #: "ppo", "sb3:PPO" (any actor-critic of Stable-Baselines3) or your "module:Class"
    reference: str | None = None  #: the model that KL is measured to; none: the policy as it starts
    eval_prompts: str | None = None  #: file of prompts to evaluate on; none: a tenth of `prompts` is held out for it
    gold: str | None = None  #: the true reward of a synthetic experiment, evaluated but never trained on
    tokens: int | None = None  #: budget in sampled tokens (200,000 where no budget is given)
    episodes: int | None = None  #: budget in episodes
    updates: int | None = None  #: budget in updates of the agent
    seed: int = 0  #: of sampling, the order of prompts, the hold-out and the agent
    device: str = "cpu"  #: "cpu", "cuda", "cuda:1", "mps"
    dtype: DType = "float32"  #: precision of the model's weights; log-probabilities are never below float32
    freeze_layers: int = 0  #: keep the embeddings and this many of the first blocks as they are
    num_envs: int = 32  #: responses written side by side
    eval_episodes: int = 128  #: responses in each evaluation
    eval_every: int = 0  #: updates between evaluations; 0: before and after training only
    checkpoint_every: int = 10  #: updates between checkpoints; 0: after the last only
    env: EnvConfig = field(default_factory=EnvConfig)  #: the token MDP
    settings: dict[str, Any] = field(default_factory=dict)  #: the agent's own, e.g. learning_rate; see its config

    def __post_init__(self) -> None:
        given = {k: v for k in ("tokens", "episodes", "updates") if (v := getattr(self, k)) is not None}
        if len(given) > 1:
            raise ConfigError(f"a run has one budget, but {' and '.join(given)} are given: leave all but one out")
        at_least = {"num_envs": 1, "eval_episodes": 1, "eval_every": 0, "checkpoint_every": 0, "freeze_layers": 0}
        _require(self, {**at_least, **dict.fromkeys(given, 1), "seed": 0})

    @property
    def budget(self) -> dict[str, int]:
        """The one budget, by its unit: tokens, episodes or updates."""
        given = {k: v for k in ("tokens", "episodes", "updates") if (v := getattr(self, k)) is not None}
        return given or {"tokens": DEFAULT_TOKENS}


@dataclass(frozen=True)
class EvaluateConfig:
    """An evaluation of a policy on prompts."""

    policy: str  #: folder or hub name of the language model to evaluate, e.g. the model/ of a run
    prompts: str  #: file of prompts, .txt (one per line) or .jsonl (key "prompt")
    reward: str  #: what scores responses: "vader", "module:function" or the folder of a classifier
    reference: str | None = None  #: the model to measure KL and win rate against; none: neither is measured
    gold: str | None = None  #: the true reward of a synthetic experiment
    text: str | None = None  #: file of text to measure the perplexity on
    episodes: int | None = None  #: responses; none: one to each prompt
    greedy: bool = False  #: take the most probable token instead of sampling
    seed: int = 0  #: of sampling
    device: str = "cpu"  #: "cpu", "cuda", "cuda:1", "mps"
    dtype: DType = "float32"  #: precision of the model's weights
    num_envs: int = 32  #: responses written side by side
    env: EnvConfig = field(default_factory=EnvConfig)  #: the token MDP

    def __post_init__(self) -> None:
        _require(self, {"num_envs": 1, "seed": 0, **({} if self.episodes is None else {"episodes": 1})})


@dataclass(frozen=True)
class GenerateConfig:
    """Responses of a policy to prompts, unscored."""

    policy: str  #: folder or hub name of the language model
    prompts: str | None = None  #: file of prompts, .txt (one per line) or .jsonl (key "prompt")
    prompt: str | None = None  #: one prompt, as text
    greedy: bool = False  #: take the most probable token instead of sampling
    seed: int = 0  #: of sampling
    device: str = "cpu"  #: "cpu", "cuda", "cuda:1", "mps"
    dtype: DType = "float32"  #: precision of the model's weights
    num_envs: int = 32  #: responses written side by side
    env: EnvConfig = field(default_factory=EnvConfig)  #: the token MDP

    def __post_init__(self) -> None:
        if (self.prompts is None) == (self.prompt is None):
            raise ConfigError("generate needs either a file of prompts (--prompts) or one prompt (--prompt)")
        _require(self, {"num_envs": 1, "seed": 0})


def _require(config: Any, at_least: dict[str, int]) -> None:
    for name, least in at_least.items():
        if (value := getattr(config, name)) < least:
            raise ConfigError(f"{name} must be at least {least}, it is {value}")
