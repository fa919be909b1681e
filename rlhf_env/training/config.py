"""What each stage of the pipeline, and the pipeline itself, can be told, one sentence per setting."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from rlhf_env.errors import ConfigError
from rlhf_env.http import is_url
from rlhf_env.preferences.queries import Rule, Schedule
from rlhf_env.records.config import Layer, build
from rlhf_env.settings import (
    REWARD_KINDS,
    BradleyTerryConfig,
    LabelerConfig,
    ServerConfig,
    SFTConfig,
)
from rlhf_env.training.labeler_config import JudgeConfig, MemberConfig, WriterConfig

DType = Literal["float32", "float64", "bfloat16", "float16"]

RewardKind = Literal["bradley_terry", "annotators", "mixture", "mean_variance", "disentangled", "ratings", "steps"]

BUDGETS = ("tokens", "episodes", "updates", "queries")
DEFAULT_TOKENS = 200_000


@dataclass(frozen=True)
class EnvConfig:
    """The token MDP: what is written, when it ends, and what the KL costs."""

    beta: float = 0.05  #: KL coefficient in reward per nat (where it adapts, the first); with data, of measuring only
    target_kl: float | None = None  #: KL in nats per sequence that β is steered towards; none keeps β fixed
    final_beta: float | None = None  #: KL coefficient after `beta_horizon` episodes, in a straight line; none: it stays
    beta_horizon: int = 10_000  #: episodes over which an adapting β changes by a factor of about e^0.2
    kl_placement: Literal["token", "terminal"] = "token"  #: charge the KL at each token, or all of it at the last one
    max_new_tokens: int = 48  #: the longest response, in tokens
    max_prompt_tokens: int | None = None  #: room for the prompt, in tokens; none: as much as the longest prompt needs
    min_new_tokens: int = 0  #: EOS is forbidden before this many tokens
    temperature: float = 1.0  #: divides the logits of policy and reference alike
    top_k: int = 0  #: only the reference's this many likeliest tokens may be written; 0: all
    top_p: float = 1.0  #: only the reference's likeliest tokens that together reach this probability may be written
    stop_strings: tuple[str, ...] = ()  #: a response ends once its text holds one of these
    missing_eos_penalty: float = 0.0  #: subtracted from the score of a response that the length limit ended
    length_penalty: float = 0.0  #: subtracted from the score for each token of the response
    group_size: int = 1  #: responses to each prompt in a row, for agents that compare them
    chat_template: str = "auto"  #: "auto" (the tokenizer's own, if any), "none" (plain text) or a Jinja file

    def __post_init__(self) -> None:
        _require(
            self,
            {
                "beta": 0,
                "beta_horizon": 1,
                "max_new_tokens": 1,
                "min_new_tokens": 0,
                "missing_eos_penalty": 0,
                "length_penalty": 0,
                "group_size": 1,
                "top_k": 0,
            },
        )
        if self.target_kl is not None and self.final_beta is not None:
            raise ConfigError("β is either steered (target_kl) or scheduled (final_beta): leave one of them out")
        if self.final_beta is not None and self.final_beta < 0:
            raise ConfigError(f"final_beta must be at least 0, it is {self.final_beta}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1, it is {self.top_p}")
        for name in ("target_kl", "temperature"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ConfigError(f"{name} must be positive, it is {value}")


@dataclass(frozen=True)
class NewModelConfig:
    """A small model of random weights, with a tokenizer made from the texts it is to learn."""

    tokenizer: Literal["bpe", "word", "char", "byte"] = "bpe"  #: what a token is; bpe: learned pieces of words
    vocab_size: int = 2000  #: tokens of a bpe tokenizer
    family: Literal["gpt2", "llama"] = "gpt2"  #: architecture
    n_layer: int = 2  #: transformer blocks
    n_embd: int = 64  #: width of the hidden state
    n_head: int = 4  #: attention heads
    n_positions: int = 128  #: context, in tokens


@dataclass(frozen=True)
class FineTuneConfig:
    """Supervised fine-tuning: from demonstrations to a policy that reinforcement learning can start from."""

    demonstrations: str  #: file: .txt, .jsonl with "text" or with "prompt" and "response", or hf:NAME
    policy: str | None = None  #: folder or hub name of the model to start from; none: a new small one, see new
    held_out: float = 0.05  #: share of the demonstrations that is measured on and never learned from
    too_long: Literal["error", "drop"] = "error"  #: what to do with demonstrations that exceed the model's context
    chat_template: str = "auto"  #: "auto" (the tokenizer's own, if any), "none" (plain text) or a Jinja file
    freeze_layers: int = 0  #: keep the embeddings and this many of the first blocks as they are
    seed: int = 0  #: of new weights, the hold-out and the order
    device: str = "cpu"  #: "cpu", "cuda", "cuda:1", "mps"
    dtype: DType = "float32"  #: precision of the model's weights
    fit: SFTConfig = field(default_factory=SFTConfig)  #: how it is learned
    new: NewModelConfig = field(default_factory=NewModelConfig)  #: the new model, where no policy is given

    def __post_init__(self) -> None:
        _require(self, {"seed": 0, "freeze_layers": 0})
        _require_share("held_out", self.held_out)


@dataclass(frozen=True)
class PreferConfig:
    """Comparisons: K responses to each prompt, ranked by simulated labelers who know gold, or by a language model."""

    policy: str  #: folder or hub name of the model that writes the responses, or a server's http://HOST:PORT/v1
    prompts: str  #: file of prompts, .txt (one per line) or .jsonl (key "prompt"), or hf:NAME
    gold: str | None = None  #: the true reward: "vader", "module:function" or a classifier's folder; judges need none
    comparisons: int = 1000  #: how many to make; labelers who skip are asked more
    responses: int = 2  #: K, ranked in each
    labeler: LabelerConfig = field(default_factory=LabelerConfig)  #: how the labeler errs
    biases: dict[str, float] = field(default_factory=dict)  #: gold per unit of log_words, markdown_marks, sycophancy
    judge: JudgeConfig = field(default_factory=JudgeConfig)  #: the language model that judges in the labeler's place
    labelers: tuple[MemberConfig, ...] = ()  #: several who share the queries, in place of the one
    overlap: int = 1  #: how many of the labelers answer each query
    seed: int = 0  #: of sampling, the order of prompts and the labeler
    device: str = "cpu"  #: "cpu", "cuda", "cuda:1", "mps"
    dtype: DType = "float32"  #: precision of the model's weights
    num_envs: int = 32  #: responses written side by side
    env: EnvConfig = field(default_factory=EnvConfig)  #: the token MDP that the responses are written in
    server: ServerConfig = field(default_factory=ServerConfig)  #: the server, where the policy is one

    def __post_init__(self) -> None:
        _require_server(self.policy, self.server, self.env)
        _require(self, {"comparisons": 1, "responses": 2, "num_envs": 1, "seed": 0, "overlap": 1})
        if self.labelers and (self.biases or self.judge.model or self.labeler != LabelerConfig()):
            raise ConfigError(
                "there is one labeler (labeler, biases; or judge) or several (labelers): give each of these its own"
            )
        if self.gold is None and any(not (each.judge.model or each.gold) for each in self.labelers or (self.one,)):
            raise ConfigError(
                "the setting gold is missing: a simulated labeler knows the true reward; a language model as judge "
                "(judge.model) needs none"
            )
        if self.overlap > max(len(self.labelers), 1):
            raise ConfigError(f"overlap is {self.overlap}, but there are {len(self.labelers) or 1} labelers to ask")

    @property
    def one(self) -> MemberConfig:
        """The one labeler, where `labelers` are none."""
        return MemberConfig(biases=self.biases, labeler=self.labeler, judge=self.judge)


@dataclass(frozen=True)
class ReviseConfig:
    """A constitution at work: responses criticised and rewritten by its principles, and which version is better."""

    principles: str  #: file of principles, .txt (one per line) or .yaml; each step goes by one of them
    prompts: str | None = None  #: file of prompts, .txt, .jsonl or hf:NAME, to which the model first responds itself
    responses: str | None = None  #: .jsonl file with "prompt" and "response", revised in place of its own
    rounds: int = 1  #: critiques and revisions of each response, one after another
    critique_template: str | None = None  #: file with {fence}, {prompt}, {response}, {request}; none: the built-in one
    revision_template: str | None = None  #: file with these and {critique}; none: the built-in one
    writer: WriterConfig = field(default_factory=WriterConfig)  #: the model that responds, criticises and revises
    judge: JudgeConfig = field(default_factory=JudgeConfig)  #: who compares; no model: the revision counts as better
    seed: int = 0  #: of the principles drawn, and of the texts
    device: str = "cpu"  #: "cpu", "cuda", "cuda:1", "mps"
    dtype: DType = "float32"  #: precision of local models' weights

    def __post_init__(self) -> None:
        _require(self, {"rounds": 1, "seed": 0})
        if (self.prompts is None) == (self.responses is None):
            raise ConfigError("revise needs either prompts, to respond to, or responses, and not both")
        if self.writer.model is None:
            raise ConfigError("the setting writer.model is missing: a folder, a hub name or a server's URL")


@dataclass(frozen=True)
class RewardConfig:
    """A reward model of some kind from what people said, normalised on responses of the reference."""

    comparisons: str  #: file of comparisons, in any form that is read, or of what `kind` learns from; or hf:NAME
    kind: RewardKind = "bradley_terry"  #: what is learned; ratings and steps have files of their own form
    settings: dict[str, Any] = field(default_factory=dict)  #: the kind's own, e.g. settings.groups=3 of mixture
    body: str | None = None  #: folder or hub name of the model that gets the reward head; none: a new one, see new
    held_out: float = 0.1  #: share of the comparisons, by prompt, that is measured on and never learned from
    eval_comparisons: str | None = None  #: file of comparisons to measure on; none: that share is held out for it
    bagging: bool = False  #: learn from as many comparisons drawn with replacement, as members of an ensemble do
    of: Literal["text", "response"] = "text"  #: what is scored: prompt and response, or the response alone
    max_length: int | None = None  #: tokens of a text that are read, its last ones; none: as many as the model can
    reference: str | None = None  #: the model whose responses shall score mean 0, variance 1; none: those compared
    prompts: str | None = None  #: file of prompts for these responses, needed with a reference
    normalize_on: int = 512  #: how many of these responses
    gold: str | None = None  #: the true reward, to measure how well labels and model agree with it
    seed: int = 0  #: of the head, the hold-out and the order
    device: str = "cpu"  #: "cpu", "cuda", "cuda:1", "mps"
    dtype: DType = "float32"  #: precision of the weights
    num_envs: int = 32  #: responses written side by side
    env: EnvConfig = field(default_factory=EnvConfig)  #: the token MDP of the reference's responses
    fit: BradleyTerryConfig = field(default_factory=BradleyTerryConfig)  #: how it is learned
    new: NewModelConfig = field(default_factory=NewModelConfig)  #: the new body, where none is given

    def __post_init__(self) -> None:
        _require(
            self,
            {"normalize_on": 2, "num_envs": 1, "seed": 0, **({} if self.max_length is None else {"max_length": 1})},
        )
        _require_share("held_out", self.held_out)
        if (self.reference is None) != (self.prompts is None):
            raise ConfigError("to normalise on responses of a reference, give both reference and prompts, or neither")
        _ = self.own
        if self.gold is not None and self.kind in ("ratings", "steps"):
            raise ConfigError(
                f"{self.kind} learns from files of its own, which compare no responses that gold could judge: learn it "
                "without gold (rlhf-env reward), and name it as the reward where it is to be used"
            )

    @property
    def own(self) -> Any:
        """The settings of the kind, checked: one of `REWARD_KINDS`."""
        return build(REWARD_KINDS[self.kind], Layer(f"the kind {self.kind}", self.settings), prefix="settings.")


@dataclass(frozen=True)
class TrainConfig:
    """A training run: everything that decides its outcome, on a given machine and with given versions."""

    policy: str  #: folder or hub name of the language model to train
    prompts: str  #: file of prompts, .txt (one per line) or .jsonl (key "prompt")
    reward: str  #: what scores responses: "vader", "module:function", a classifier's folder, recipe.yaml, URL, or A,B,C
    agent: str = "ppo"  #: a name that `rlhf-env agents` lists, any other "sb3:NAME", or your "module:Class"
    data: str | None = None  #: what an agent that samples nothing learns from: comparisons, or ilql's logged responses
    too_long: Literal["error", "drop"] = "error"  #: what to do with responses of the data beyond the length limit
    reference: str | None = None  #: the model that KL is measured to; none: the policy as it starts
    eval_prompts: str | None = None  #: file of prompts to evaluate on; none: a tenth of `prompts` is held out for it
    bonus: float = 0.0  #: with several rewards, A,B,C: training adds this times their deviation, to explore
    gold: str | None = None  #: the true reward of a synthetic experiment, evaluated but never trained on
    tokens: int | None = None  #: budget in sampled tokens (200,000 where no budget is given)
    episodes: int | None = None  #: budget in episodes
    updates: int | None = None  #: budget in updates of the agent; with data in gradient steps, none: its epochs
    queries: int | None = None  #: budget in responses that the reward model scores
    seed: int = 0  #: of sampling, the order of prompts, the hold-out and the agent
    device: str = "cpu"  #: "cpu", "cuda", "cuda:1", "mps"
    dtype: DType = "float32"  #: precision of the model's weights; log-probabilities are never below float32
    freeze_layers: int = 0  #: keep the embeddings and this many of the first blocks as they are
    gradient_checkpointing: bool = False  #: make activations again in the backward pass: less memory, more time
    spread_weights: bool = False  #: with several processes, each holds a part of weights and Adam's state (FSDP)
    num_envs: int = 32  #: responses written side by side
    eval_episodes: int = 128  #: responses in each evaluation
    eval_every: int = 0  #: updates between evaluations, the best of which stays; 0: before and after training only
    checkpoint_every: int = 10  #: updates between checkpoints; 0: after the last only
    log_to: tuple[Literal["tensorboard", "wandb"], ...] = ()  #: where else metrics go: tensorboard, wandb
    env: EnvConfig = field(default_factory=EnvConfig)  #: the token MDP
    settings: dict[str, Any] = field(default_factory=dict)  #: the agent's own, e.g. learning_rate; see its config

    def __post_init__(self) -> None:
        if is_url(self.policy):
            raise ConfigError(
                f"{self.policy} is a server, whose weights train cannot change, and a policy in training must sample "
                "from its weights as they are at the moment: give the folder or hub name of a model"
            )
        given = self._given
        if len(given) > 1:
            raise ConfigError(f"a run has one budget, but {' and '.join(given)} are given: leave all but one out")
        at_least = {"num_envs": 1, "eval_episodes": 1, "eval_every": 0, "checkpoint_every": 0, "freeze_layers": 0}
        _require(self, {**at_least, **dict.fromkeys(given, 1), "seed": 0})

    @property
    def budget(self) -> dict[str, int]:
        """The one budget, by its unit; empty where an agent learns from `data` as long as its own settings say."""
        return self._given or ({"tokens": DEFAULT_TOKENS} if self.data is None else {})

    @property
    def _given(self) -> dict[str, int]:
        return {unit: budget for unit in BUDGETS if (budget := getattr(self, unit)) is not None}


@dataclass(frozen=True)
class EvaluateConfig:
    """An evaluation of a policy on prompts."""

    policy: str  #: folder or hub name of the model to evaluate, e.g. a run's model/, or a server's http://HOST:PORT/v1
    prompts: str  #: file of prompts, .txt (one per line) or .jsonl (key "prompt")
    reward: str  #: what scores responses: "vader", "module:function", a classifier's folder, recipe.yaml, URL, or A,B,C
    reference: str | None = None  #: the model to measure KL and win rate against; none: neither is measured
    gold: str | None = None  #: the true reward of a synthetic experiment
    text: str | None = None  #: file of text to measure the perplexity on
    episodes: int | None = None  #: responses; none: one to each prompt
    best_of: int = 0  #: draws of the reference per prompt from which best-of-n is estimated; 0: it is not
    greedy: bool = False  #: take the most probable token instead of sampling
    seed: int = 0  #: of sampling
    device: str = "cpu"  #: "cpu", "cuda", "cuda:1", "mps"
    dtype: DType = "float32"  #: precision of the model's weights
    num_envs: int = 32  #: responses written side by side
    env: EnvConfig = field(default_factory=EnvConfig)  #: the token MDP
    server: ServerConfig = field(default_factory=ServerConfig)  #: the server, where the policy is one

    def __post_init__(self) -> None:
        _require_server(self.policy, self.server, self.env)
        if self.text is not None and is_url(self.policy):
            raise ConfigError(f"perplexity needs the model's weights, so text cannot be measured on {self.policy}")
        _require(self, {"num_envs": 1, "best_of": 0, "seed": 0, **({} if self.episodes is None else {"episodes": 1})})
        if self.best_of and self.reference is None:
            raise ConfigError("best-of-n chooses among the reference's responses: give a reference, or best_of=0")


@dataclass(frozen=True)
class GenerateConfig:
    """Responses of a policy to prompts, unscored."""

    policy: str  #: folder or hub name of the language model, or a server's http://HOST:PORT/v1
    prompts: str | None = None  #: file of prompts, .txt (one per line) or .jsonl (key "prompt")
    prompt: str | None = None  #: one prompt, as text
    greedy: bool = False  #: take the most probable token instead of sampling
    seed: int = 0  #: of sampling
    device: str = "cpu"  #: "cpu", "cuda", "cuda:1", "mps"
    dtype: DType = "float32"  #: precision of the model's weights
    num_envs: int = 32  #: responses written side by side
    env: EnvConfig = field(default_factory=EnvConfig)  #: the token MDP
    server: ServerConfig = field(default_factory=ServerConfig)  #: the server, where the policy is one

    def __post_init__(self) -> None:
        _require_server(self.policy, self.server, self.env)
        if (self.prompts is None) == (self.prompt is None):
            raise ConfigError("generate needs either a file of prompts (--prompts) or one prompt (--prompt)")
        _require(self, {"num_envs": 1, "seed": 0})


@dataclass(frozen=True)
class RewardEvalConfig:
    """An evaluation of a reward model, whatever it is, on comparisons that it has not learned from."""

    reward: str  #: what is evaluated: "vader", "module:function", the folder of a classifier, or several, A,B,C
    comparisons: str  #: file of comparisons, .jsonl or .json in any form that is read, or hf:NAME, or builtin:reviews
    gold: str | None = None  #: the true reward of a synthetic experiment; with builtin:reviews none is vader
    label_temperature: float | None = None  #: of the simulated labeler, in units of gold; none: not known
    label_flip_rate: float = 0.0  #: of the simulated labeler, where its temperature is known
    probes: int = 256  #: responses, at most, that each probe changes; 0: no probes
    suite: str | None = None  #: "generated" from the comparisons, or a file of RewardBench's rows; none: no suite
    policy: str | None = None  #: folder, hub name or URL of the policy that it shall train; none: no draws
    prompts: str | None = None  #: file of prompts for the policy
    best_of: int = 16  #: draws of the policy per prompt, from which variance and best-of-n are estimated
    seed: int = 0  #: of draws, probes, the generated suite and the halves that the scale is fitted and measured on
    device: str = "cpu"  #: "cpu", "cuda", "cuda:1", "mps"
    dtype: DType = "float32"  #: precision of the policy's weights
    num_envs: int = 32  #: responses written side by side
    env: EnvConfig = field(default_factory=EnvConfig)  #: the token MDP of the policy's responses
    server: ServerConfig = field(default_factory=ServerConfig)  #: the server, where the policy is one

    def __post_init__(self) -> None:
        _require(self, {"probes": 0, "best_of": 2, "num_envs": 1, "seed": 0})
        if self.label_temperature is not None:
            LabelerConfig(self.label_temperature, self.label_flip_rate)  # its limits are these
        known = self.label_temperature is not None
        if (known and self.gold is None) or (self.label_flip_rate and not known):
            raise ConfigError("what a labeler errs is told by label_temperature, in units of a gold that must be given")
        if (self.policy is None) != (self.prompts is None):
            raise ConfigError("to evaluate on a policy's responses, give both policy and prompts, or neither")
        if self.policy is not None:
            _require_server(self.policy, self.server, self.env)


@dataclass(frozen=True)
class PipelineConfig:
    """The whole pipeline: demonstrations → policy → comparisons → reward model → reinforcement learning → evaluation.

    A stage whose result is given as a file is left out: without `demonstrations` no fine-tuning, with `comparisons` no
    labeler, with `reward_model` no reward model is learned. The sections `sft`, `prefer`, `reward`, `train` and
    `evaluate` take the settings of the commands of these names, beside those that the pipeline gives them itself.
    """

    demonstrations: str | None = None  #: what to fine-tune on; none: the policy is taken as it is
    policy: str | None = None  #: folder or hub name of the model to start from; none: a new small one
    prompts: str | None = None  #: file of prompts; none: those of the demonstrations, or how their texts begin
    opening_words: int = 4  #: words of a text that make a prompt of it, where there are no other prompts
    eval_prompts: str | None = None  #: file of prompts to evaluate on; none: a share of the prompts is held out for it
    eval_share: float = 0.1  #: that share, of the distinct prompts; at most 128 of them
    comparisons: str | None = None  #: file of comparisons; none: a simulated labeler makes them
    reward_model: str | None = None  #: what scores responses, instead of a reward model that is learned here
    gold: str | None = None  #: the true reward that the simulated labeler knows; measured, never trained on
    seed: int = 0  #: of everything
    device: str = "cpu"  #: "cpu", "cuda", "cuda:1", "mps"
    dtype: DType = "float32"  #: precision of the models' weights
    num_envs: int = 32  #: responses written side by side
    env: EnvConfig = field(default_factory=EnvConfig)  #: the token MDP
    sft: dict[str, Any] = field(default_factory=dict)  #: settings of `rlhf-env sft`, e.g. fit.epochs
    prefer: dict[str, Any] = field(default_factory=dict)  #: of `rlhf-env prefer`, e.g. comparisons, labeler.flip_rate
    reward: dict[str, Any] = field(default_factory=dict)  #: of `rlhf-env reward`, e.g. fit.learning_rate
    train: dict[str, Any] = field(default_factory=dict)  #: of `rlhf-env train`, e.g. agent, tokens, settings.epochs
    evaluate: dict[str, Any] = field(default_factory=dict)  #: of `rlhf-env evaluate`, e.g. episodes, best_of

    def __post_init__(self) -> None:
        _require(self, {"opening_words": 1, "num_envs": 1, "seed": 0})
        _require_share("eval_share", self.eval_share)


@dataclass(frozen=True)
class OnlineConfig:
    """The online loop: in each round the present policy writes, a labeler compares, and the rewards are learned anew.

    The sections `reward` and `train` take the settings of the commands of these names, beside those that the loop gives
    them itself; `train`'s budget is that of all rounds together.
    """

    policy: str  #: folder or hub name of the model to start from, which is the reference in all rounds
    prompts: str  #: file of prompts, .txt (one per line) or .jsonl (key "prompt"), or hf:NAME
    gold: str  #: the true reward that the simulated labeler knows; measured, never trained on
    eval_prompts: str | None = None  #: file of prompts to evaluate on; none: a share of the prompts is held out for it
    eval_share: float = 0.1  #: that share, of the distinct prompts; at most 128 of them
    rounds: int = 4  #: how often labels are asked for, rewards learned and the policy trained
    comparisons: int = 400  #: labels to ask for, in all rounds together; a multiple of overlap
    schedule: Schedule = "constant"  #: how the rounds after the first share what it leaves
    initial: float = 0.25  #: share of the labels that the first round asks for
    pool: int = 256  #: prompts in each round to which responses are written, at most one pair of each is compared
    candidates: int = 4  #: responses to each of these prompts, of which two are compared
    rule: Rule = "bald"  #: what the ensemble goes by when it chooses pairs; the first round has none and is uniform
    members: int = 3  #: reward models in the ensemble, whose mean is trained on; one alone only with uniform or entropy
    keep: int | None = None  #: learn from this many of the latest comparisons; none: from all
    held_out: float = 0.1  #: share of the comparisons, by prompt, that no member learns from
    labeler: LabelerConfig = field(default_factory=LabelerConfig)  #: how the labeler errs
    biases: dict[str, float] = field(default_factory=dict)  #: gold per unit of log_words, markdown_marks, sycophancy
    labelers: tuple[MemberConfig, ...] = ()  #: several who share the queries, in place of the one
    overlap: int = 1  #: how many of the labelers answer each query
    seed: int = 0  #: of everything
    device: str = "cpu"  #: "cpu", "cuda", "cuda:1", "mps"
    dtype: DType = "float32"  #: precision of the models' weights
    num_envs: int = 32  #: responses written side by side
    env: EnvConfig = field(default_factory=EnvConfig)  #: the token MDP
    reward: dict[str, Any] = field(default_factory=dict)  #: of `rlhf-env reward`, e.g. fit.learning_rate
    train: dict[str, Any] = field(default_factory=dict)  #: of `rlhf-env train`, e.g. agent, tokens, settings.epochs

    def __post_init__(self) -> None:
        _require(self, {"rounds": 1, "comparisons": 2, "pool": 1, "candidates": 2, "members": 1, "num_envs": 1})
        _require(self, {"seed": 0, **({} if self.keep is None else {"keep": 2})})
        for name in ("eval_share", "initial", "held_out"):
            _require_share(name, getattr(self, name))
        who = {name: getattr(self, name) for name in ("gold", "labeler", "biases", "labelers", "overlap")}
        PreferConfig(policy="", prompts="", **who)  # which says who can label together
        if self.comparisons % self.overlap:
            raise ConfigError(
                f"each query is answered {self.overlap} times, and {self.comparisons} labels cannot be shared so: make "
                "comparisons a multiple of overlap"
            )
        if self.members == 1 and self.rounds > 1 and self.rule not in ("uniform", "entropy"):
            raise ConfigError(
                f"{self.rule} goes by what the members disagree on, and one member is an ensemble of its own opinion: "
                "raise members, or choose the rule uniform or entropy"
            )


def _require_share(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ConfigError(f"{name} must be a share between 0 and 1, it is {value}")


def _require_server(policy: str, server: ServerConfig, env: EnvConfig) -> None:
    if not is_url(policy):
        if server.model or server.tokenizer:
            raise ConfigError(f"server.model and server.tokenizer are of a policy that is a URL; {policy} is none")
    elif not (server.model and server.tokenizer):
        raise ConfigError(
            f"{policy} is a server: say server.model, the name under which it knows the model, and server.tokenizer, "
            "the folder or hub name of the model's tokenizer"
        )
    elif env.top_k or env.top_p < 1 or env.min_new_tokens:
        raise ConfigError(
            f"top_k, top_p and min_new_tokens mean other things to other servers, so {policy} is not asked for them: "
            "leave them out"
        )


def _require(config: Any, at_least: dict[str, int]) -> None:
    for name, least in at_least.items():
        if (value := getattr(config, name)) < least:
            raise ConfigError(f"{name} must be at least {least}, it is {value}")


def parse_seeds(text: str) -> list[int]:
    """The seeds that "0-4", "0,2,5" or "3" mean."""
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if match is None:
            raise ConfigError(f"seeds {text!r} is not understood: write 0-4, or 0,1,2")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ConfigError(f"seeds {text!r}: {part.strip()} names no seed; write the smaller one first")
        seeds += range(first, last + 1)
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds {text!r} names a seed twice")
    return seeds
