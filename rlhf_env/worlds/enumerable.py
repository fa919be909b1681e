"""`rlhf_env/Enumerable-v0`: every response is listed, so optimum, frontier, KL, best-of-n and gain are known exactly.

With N listed responses a policy is a vector of N log-probabilities and the objective of RLHF a finite sum,
J(π) = E_π[r] − β KL(π ‖ ref). What maximises it is π* ∝ π_ref exp(r/β), and its value is β log E_ref[exp(r/β)]
(Korbak et al. 2022, arXiv 2205.11275; Rafailov et al. 2023, arXiv 2305.18290, eq. 4).
"""

from __future__ import annotations

import copy
import dataclasses
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GPT2Config

from rlhf_env.envs.single import TextGenerationEnv
from rlhf_env.envs.vector import TextGenerationVectorEnv
from rlhf_env.errors import ConfigError, RewardError
from rlhf_env.functional import gather_logp, kl_full
from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.text.tokenizers import char_tokenizer
from rlhf_env.types import Policy, Rollout, SamplingLaw
from rlhf_env.worlds.small_policies import BigramPolicy, ResidualGRUPolicy

PROMPT = "a"  #: stands before every response, as a BOS would
MAX_SEQUENCES = 2**20
_PREFIXES_PER_PASS = 512
_INIT_RANGE = 0.18  # entropy per token of about 3/4 log V: a reference that knows something
_HIDDEN = 16

Language = Literal["transformer", "bigram"]

# --- distributions over N listed responses ---------------------------------------------------------


def log_z(ref_log_probs: Tensor, reward: Tensor, beta: float) -> Tensor:
    """log E_ref[exp(r/β)] from `ref_log_probs` [N] and `reward` [N]; β times it is the optimum's value."""
    if not beta > 0:
        raise ConfigError(f"beta must be positive, got {beta}: without a price on KL the optimum is a single response")
    return torch.logsumexp(ref_log_probs + reward / beta, 0)


def gibbs_log_probs(ref_log_probs: Tensor, reward: Tensor, beta: float) -> Tensor:
    """Log-probabilities [N] of π* ∝ π_ref exp(r/β), which maximises E_π[r] − β KL(π ‖ ref)."""
    return ref_log_probs + reward / beta - log_z(ref_log_probs, reward, beta)


def best_of_n_log_probs(ref_log_probs: Tensor, reward: Tensor, n: int) -> Tensor:
    """Log-probabilities [N] of the best of `n` draws from the reference, ties drawn alike.

    With F the reference's distribution function of the reward, the best is r with probability F(r)ⁿ − F(r⁻)ⁿ. Its KL
    is at most log n − (n − 1)/n (Beirami et al. 2024, arXiv 2401.01879).
    """
    if n < 1:
        raise ConfigError(f"best of n needs n of at least 1, got {n}")
    levels, level = reward.unique(return_inverse=True)  # sorted
    mass = torch.zeros_like(levels).index_add(0, level, ref_log_probs.exp())
    below = torch.nn.functional.pad(mass.cumsum(0), (1, 0)) ** n
    return ref_log_probs + (below.diff() / mass).log()[level]


# --- the world -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class EnumerableWorld:
    """A random small language model, a random reward, and everything there is to know about the two.

    Responses are all V^T strings of exactly T letters; there is no EOS. Log-probabilities over responses are float64
    [N = V^T], in counting order: the last letter changes fastest. Methods take a β, or use the world's own.
    """

    seed: int
    vocab_size: int  # V
    length: int  # T
    beta: float  # reward per nat
    language: Language  # what the reference is
    reference: CausalLM | BigramPolicy = dataclasses.field(repr=False)
    sequences: Tensor = dataclasses.field(repr=False)  # int64 [N, T]
    ref_log_probs: Tensor = dataclasses.field(repr=False)  # float64 [N]
    gold: Tensor = dataclasses.field(repr=False)  # float64 [N], mean 0 and variance 1 under the reference

    @classmethod
    def make(
        cls, seed: int = 0, vocab_size: int = 8, length: int = 5, beta: float = 0.5, language: Language = "transformer"
    ) -> Self:
        """The world number `seed` of its size and language, the same to the bit every time.

        The reference is a random GPT-2 of two layers ("transformer") or a random table of bigrams ("bigram").
        """
        if not 2 <= vocab_size <= len(string.ascii_lowercase) or length < 1 or vocab_size**length > MAX_SEQUENCES:
            raise ConfigError(
                f"vocab_size={vocab_size}, length={length}: an enumerable world has 2 to 26 letters, and at most "
                f"{MAX_SEQUENCES} responses of one letter or more"
            )
        if not beta > 0:
            raise ConfigError(f"beta must be positive, got {beta}")
        reference = _random_reference(language, seed, vocab_size, length)
        sequences = torch.cartesian_prod(*[torch.arange(vocab_size)] * length).reshape(-1, length)
        world = cls(seed, vocab_size, length, beta, language, reference, sequences, torch.empty(0), torch.empty(0))
        ref_log_probs = world.sequence_log_probs(reference)
        gold = _random_gold(sequences, vocab_size, ref_log_probs.exp(), np.random.default_rng(seed))
        return dataclasses.replace(world, ref_log_probs=ref_log_probs, gold=gold)

    # --- as a task --------------------------------------------------------------------------------

    @property
    def law(self) -> SamplingLaw:
        """Every letter is allowed at every position, at temperature 1."""
        return SamplingLaw(self.vocab_size, eos_token_id=None)

    def policy(self) -> CausalLM | ResidualGRUPolicy:
        """A trainable policy that is the reference to begin with: a copy of it, or a GRU on top of the bigrams.

        Its value head is zero.
        """
        if isinstance(self.reference, BigramPolicy):
            return ResidualGRUPolicy(self.reference, seed=self.seed)
        return copy.deepcopy(self.reference).requires_grad_(True)

    def reward_model(self, prompts: Sequence[str], responses: Sequence[str]) -> NDArray[np.float64]:
        """Gold of each response [B], looked up by its text. Raises `RewardError` for what is no response here."""
        return self.gold[[self._row(i, text) for i, text in enumerate(responses)]].numpy()

    def env_kwargs(self) -> dict[str, Any]:
        """Keywords for the environments.

        Other keywords may join them, but what changes the law (`temperature`, `banned_tokens`, `top_k`, `top_p`) makes
        another task than the one listed here.
        """
        return {
            "prompts": (PROMPT,),
            "tokenizer": self.reference.tokenizer,
            "reward_model": self.reward_model,
            "reference": self.reference,
            "max_new_tokens": self.length,
            "stop_at_eos": False,
            "beta": self.beta,
        }

    # --- what is true of any distribution over the responses ----------------------------------------

    def expected_gold(self, log_probs: Tensor) -> Tensor:
        """E_π[gold] of the policy with these `log_probs` [N]."""
        return (log_probs.exp() * self.gold).sum()

    def kl(self, log_probs: Tensor) -> Tensor:
        """KL(π ‖ ref) in nats per sequence, of the policy with these `log_probs` [N]."""
        return kl_full(log_probs, self.ref_log_probs)

    def objective(self, log_probs: Tensor, beta: float | None = None) -> Tensor:
        """J(π) = E_π[gold] − β KL(π ‖ ref) of the policy with these `log_probs` [N]."""
        return self.expected_gold(log_probs) - self._beta(beta) * self.kl(log_probs)

    # --- the optimum --------------------------------------------------------------------------------

    def log_z(self, beta: float | None = None) -> Tensor:
        """log E_ref[exp(gold/β)]."""
        return log_z(self.ref_log_probs, self.gold, self._beta(beta))

    def optimal_log_probs(self, beta: float | None = None) -> Tensor:
        """Log-probabilities [N] of π*, the policy of the highest objective."""
        return gibbs_log_probs(self.ref_log_probs, self.gold, self._beta(beta))

    def optimal_value(self, beta: float | None = None) -> Tensor:
        """J(π*) = β log E_ref[exp(gold/β)]: no policy's objective is higher."""
        return self._beta(beta) * self.log_z(beta)

    def frontier(self, betas: Sequence[float]) -> tuple[Tensor, Tensor]:
        """KL and expected gold of the optimum at each β, [K] each: no policy of the same KL has more gold."""
        optima = [self.optimal_log_probs(beta) for beta in betas]
        return torch.stack([self.kl(x) for x in optima]), torch.stack([self.expected_gold(x) for x in optima])

    def best_of_n(self, n: int) -> Tensor:
        """Log-probabilities [N] of the best, by gold, of `n` draws from the reference."""
        return best_of_n_log_probs(self.ref_log_probs, self.gold, n)

    def best_deterministic(self, beta: float | None = None) -> tuple[int, float]:
        """The row of the response of the highest gold + β log ref, and that objective.

        It is the most that a policy can reach that always does the same in a state, as the greedy one of a learned
        Q function does (`kl_mode="reference"`): its log π is 0.
        """
        objective = self.gold + self._beta(beta) * self.ref_log_probs
        row = int(objective.argmax())
        return row, objective[row].item()

    # --- what is true of a policy -------------------------------------------------------------------

    def sequence_log_probs(self, policy: Policy) -> Tensor:
        """log π of every response, [N], tokens added up in float64; with gradient where gradients are on.

        Raises `ValueError` where the probabilities do not add up to 1.
        """
        return _normalised(torch.cat(list(self._passes(policy))))

    def observations(self) -> dict[str, NDArray[Any]]:
        """Every state in which a letter is to be chosen, as the environment shows it: arrays [S, 1 + T].

        S = (V^T − 1) / (V − 1): the empty response first, then those of one letter, of two letters …, each in counting
        order.
        """
        beginnings = [self.sequences[:: self.vocab_size ** (self.length - t), :t] for t in range(self.length)]
        lengths = np.repeat(np.arange(self.length), [len(x) for x in beginnings])[:, None]  # [S, 1] letters so far
        column = np.arange(1 + self.length)
        ids = np.zeros((len(lengths), 1 + self.length), dtype=np.int64)  # the prompt's id and the padding's are both 0
        first = 0
        for t, letters in enumerate(beginnings):
            ids[first : first + len(letters), 1 : 1 + t] = letters.numpy()
            first += len(letters)
        return {
            "input_ids": ids,
            "attention_mask": (column <= lengths).astype(np.int8),
            "response_mask": ((column >= 1) & (column <= lengths)).astype(np.int8),
        }

    def from_states(self, log_probs: Tensor | NDArray[np.floating]) -> Tensor:
        """log π of every response, [N], from next-letter log-probabilities [S, V] in the states of `observations()`.

        So any policy at all can be measured: a neural network of one's own, a table, a deterministic one (0 and −∞).
        Raises `ValueError` naming the first state whose probabilities do not add up to 1.
        """
        log_probs = torch.as_tensor(log_probs).double()
        v, states = self.vocab_size, (self.vocab_size**self.length - 1) // (self.vocab_size - 1)
        if log_probs.shape != (states, v):
            raise ValueError(
                f"log-probabilities of the next letter have shape {list(log_probs.shape)}, expected [{states}, {v}]: a "
                "row for each state of observations(), a column for each letter"
            )
        total = log_probs.detach().exp().sum(1)
        if (broken := ~((total - 1).abs() < 1e-3)).any():
            row = int(broken.nonzero()[0])
            raise ValueError(f"the probabilities of the next letter in state {row} add up to {total[row]:.4g}, not 1")
        so_far = log_probs.new_zeros(1)
        for letters in log_probs.log_softmax(1).split([v**t for t in range(self.length)]):
            so_far = (so_far.unsqueeze(1) + letters).flatten()
        return so_far

    def regret(self, policy: Policy | Tensor, beta: float | None = None) -> float:
        """J(π*) − J(π) = β KL(π ‖ π*), of a policy or of log-probabilities [N]."""
        return float(self.optimal_value(beta) - self.objective(self._listed(policy), beta))

    def gain(self, policy: Policy | Tensor, beta: float | None = None) -> float:
        """(J(π) − J(ref)) / (J(π*) − J(ref)): 0 is the reference, 1 the optimum. As for `regret`."""
        start = self.objective(self.ref_log_probs, beta)
        return float((self.objective(self._listed(policy), beta) - start) / (self.optimal_value(beta) - start))

    def exact_gradient(self, policy: Policy, beta: float | None = None) -> tuple[float, list[Tensor]]:
        """J(π) and its gradient with respect to each of the policy's parameters that require one.

        By the chain rule through log π, so that only one pass's activations are in memory at a time.
        """
        with torch.no_grad():
            log_probs = torch.cat(list(self._passes(policy)))
        objective = self.objective(_normalised(log_probs.requires_grad_()), beta)
        (weights,) = torch.autograd.grad(objective, log_probs)
        parameters = [p for p in policy.parameters() if p.requires_grad]
        gradient = [torch.zeros_like(p) for p in parameters]
        first = 0
        for part in self._passes(policy):
            weighted = part @ weights[first : first + len(part)]
            first += len(part)
            for total, more in zip(gradient, torch.autograd.grad(weighted, parameters, allow_unused=True), strict=True):
                if more is not None:
                    total += more
        return objective.item(), gradient

    # --- inside ---------------------------------------------------------------------------------

    def _beta(self, beta: float | None) -> float:
        return self.beta if beta is None else beta

    def _listed(self, policy: Policy | Tensor) -> Tensor:
        if isinstance(policy, Tensor):
            return policy.detach()
        with torch.no_grad():
            return self.sequence_log_probs(policy)

    def _passes(self, policy: Policy) -> Iterator[Tensor]:
        """log π of all responses, a block at a time, in order."""
        whole_distributions = getattr(policy, "response_log_probs", None)
        for block in self.sequences.split(_PREFIXES_PER_PASS * self.vocab_size):
            if whole_distributions is None:
                logp, _, _ = policy.evaluate(self._rollout(block, policy))
                yield logp.cpu().double().sum(1)
            else:  # V responses differ in the last letter only, so one pass does for all of them
                prefixes = block[:: self.vocab_size]
                log_probs, _ = whole_distributions(self._rollout(prefixes, policy))
                log_probs = log_probs.cpu().double()  # [n, T, V]
                before = gather_logp(log_probs, prefixes)[:, :-1].sum(1, keepdim=True)
                yield (before + log_probs[:, -1]).flatten()

    def _rollout(self, responses: Tensor, policy: Policy) -> Rollout:
        """The responses as finished episodes, of which only the token ids mean anything."""
        rollout = Rollout.of_tokens([[0]] * len(responses), responses.tolist(), self.law)
        return rollout.to(next(iter(policy.parameters())).device)

    def _row(self, i: int, text: str) -> int:
        """Where a response stands in the list: its number in base V."""
        letters = string.ascii_lowercase[: self.vocab_size]
        if len(text) != self.length or not set(text) <= set(letters):
            raise RewardError(
                f"response {i} is {text[:60]!r}, but this world's responses are {self.length} of the letters {letters}"
            )
        row = 0
        for letter in text:
            row = row * self.vocab_size + letters.index(letter)
        return row


def _random_reference(language: Language, seed: int, vocab_size: int, length: int) -> CausalLM | BigramPolicy:
    tokenizer = char_tokenizer(string.ascii_lowercase[:vocab_size], special=False)
    if language == "bigram":
        return BigramPolicy.random(tokenizer, seed=seed).requires_grad_(False)
    if language != "transformer":
        raise ConfigError(f"language must be transformer or bigram, got {language!r}")
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=1 + length,
        n_embd=64,
        n_layer=2,
        n_head=2,
        initializer_range=_INIT_RANGE,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    return CausalLM.from_config(config, tokenizer, seed=seed).requires_grad_(False)


def _normalised(log_probs: Tensor) -> Tensor:
    """Without the 1e-7 by which a float32 model's probabilities miss 1, which would be false KL."""
    total = log_probs.detach().exp().sum().item()
    if not abs(total - 1) < 1e-3:
        raise ValueError(
            f"the policy's probabilities of all responses add up to {total:.4g}, not 1: its weights are broken, or its "
            "log-probabilities are not those of the world's sampling law"
        )
    return log_probs.log_softmax(0)


def _random_gold(sequences: Tensor, vocab_size: int, probs: Tensor, rng: np.random.Generator) -> Tensor:
    """A linear function plus a tanh network of the one-hot tokens, in equal parts; mean 0, variance 1 under `probs`."""
    length = sequences.shape[1]
    one_hot = torch.nn.functional.one_hot(sequences, vocab_size).flatten(1).double()  # [N, T·V]
    linear, w_in, w_out = (
        torch.from_numpy(rng.standard_normal(shape))
        for shape in (length * vocab_size, (length * vocab_size, _HIDDEN), _HIDDEN)
    )
    hidden = torch.tanh(one_hot @ w_in / length**0.5)
    return _standardised(_standardised(one_hot @ linear, probs) + _standardised(hidden @ w_out, probs), probs)


def _standardised(x: Tensor, probs: Tensor) -> Tensor:
    centred = x - (probs * x).sum()
    return centred / (probs * centred.square()).sum().sqrt()


# --- as registered environments --------------------------------------------------------------------


def make_env(
    world_seed: int = 0, vocab_size: int = 8, length: int = 5, language: Language = "transformer", **env: Any
) -> TextGenerationEnv:
    """`rlhf_env/Enumerable-v0`: the world as a Gymnasium environment; `env` are the environment's own keywords."""
    return TextGenerationEnv(**(_shared(world_seed, vocab_size, length, language).env_kwargs() | env))


def make_vector_env(
    world_seed: int = 0, vocab_size: int = 8, length: int = 5, language: Language = "transformer", **env: Any
) -> TextGenerationVectorEnv:
    """The same, batched: `num_envs` and `autoreset_mode` are among the keywords."""
    return TextGenerationVectorEnv(**(_shared(world_seed, vocab_size, length, language).env_kwargs() | env))


@lru_cache(maxsize=4)
def _shared(seed: int, vocab_size: int, length: int, language: Language) -> EnumerableWorld:
    # Many environments of one process are the same world, and its reference never changes.
    return EnumerableWorld.make(seed, vocab_size, length, language=language)
