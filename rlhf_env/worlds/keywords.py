"""`rlhf_env/Keywords-v0`: known are gold of any response and the exact optimum of a learned proxy, not gold's.

Responses are 16 of 12 letters. Four of these are keywords, best written three times each, and the reference writes most
of them less often. A proxy learned from the reference's own responses sees that more is better and not where it ends:
optimizing it far enough lowers gold (Gao et al. 2022, arXiv 2210.10760).
"""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from rlhf_env.envs.single import TextGenerationEnv
from rlhf_env.envs.vector import TextGenerationVectorEnv
from rlhf_env.errors import ConfigError, RewardError
from rlhf_env.functional import bradley_terry_loss
from rlhf_env.text.tokenizers import char_tokenizer
from rlhf_env.types import RewardModel
from rlhf_env.worlds.small_policies import BigramPolicy, ResidualGRUPolicy

LETTERS = string.ascii_lowercase[:12]
LENGTH = 16
KEYWORDS = 4
WANTED = 3  #: times that each keyword is best written
BETA = 0.1
PROMPT = "a"  #: stands before every response, as a BOS would

_BONUS = 0.3  # standard deviation of what a pair of neighbouring letters is worth, before gold is standardised
_NORMALISING = 2**17  # responses of the reference that a score is standardised on
_STEPS, _BATCH, _CHANNELS, _LEARNING_RATE = 600, 256, 32, 3e-3


@dataclass(frozen=True, eq=False)
class KeywordsWorld:
    """A random table of bigrams as reference, and a gold reward that counts letters and pairs of letters.

    Gold has mean 0 and variance 1 under the reference, as measured on 131,072 fixed responses of it: the mean is off by
    a standard error of 0.003, the standard deviation by about as much.
    """

    seed: int
    beta: float  # reward per nat
    keywords: str  # the four letters
    reference: BigramPolicy = dataclasses.field(repr=False)
    bonus: NDArray[np.float64] = dataclasses.field(repr=False)  # [12, 12], of each letter after each letter
    mean: float = dataclasses.field(repr=False, default=0.0)  # of the reward under the reference before standardising
    deviation: float = dataclasses.field(repr=False, default=1.0)  # its standard deviation

    @classmethod
    def make(cls, seed: int = 0, beta: float = BETA) -> Self:
        """The world number `seed`, the same to the bit every time."""
        rng = np.random.default_rng([seed, 1])
        keywords = "".join(LETTERS[i] for i in sorted(rng.choice(len(LETTERS), KEYWORDS, replace=False)))
        bonus = _BONUS * rng.standard_normal((len(LETTERS), len(LETTERS)))
        reference = BigramPolicy.random(char_tokenizer(LETTERS, special=False), seed=seed).requires_grad_(False)
        world = cls(seed, beta, keywords, reference, bonus)
        reward = world._gold(_draw(world.ref_log_probs, _NORMALISING, np.random.default_rng([seed, 2])))
        return dataclasses.replace(world, mean=float(reward.mean()), deviation=float(reward.std()))

    # --- as a task --------------------------------------------------------------------------------

    def policy(self) -> ResidualGRUPolicy:
        """A trainable policy that is the reference to begin with; its value head is zero."""
        return ResidualGRUPolicy(self.reference, seed=self.seed)

    def gold(self, prompts: Sequence[str], responses: Sequence[str]) -> NDArray[np.float64]:
        """The true reward of each response [B]: −Σ_k |count_k − 3| / 1.5 + Σ_t bonus(x_t, x_{t+1}), standardised.

        Raises `RewardError` for what is no response of this world.
        """
        return self._gold(_ids(responses))

    def env_kwargs(self) -> dict[str, Any]:
        """Keywords for the environments, with gold as the reward; others may join or replace them."""
        return {
            "prompts": (PROMPT,),
            "tokenizer": self.reference.tokenizer,
            "reward_model": self.gold,
            "reference": self.reference,
            "max_new_tokens": LENGTH,
            "stop_at_eos": False,
            "beta": self.beta,
        }

    # --- policies that are tables [T, V, V]: of the next letter at each position after each last one --

    @property
    def ref_log_probs(self) -> NDArray[np.float64]:
        """The reference as such a table."""
        table = self.reference.logits.detach().double().log_softmax(1).numpy()
        return np.broadcast_to(table, (LENGTH, *table.shape))

    def optimal_log_probs(self, proxy: LearnedProxy, beta: float | None = None) -> NDArray[np.float64]:
        """π* ∝ π_ref exp(proxy/β): the most of a proxy that any policy of the same KL can have.

        It is a table because proxy and log π_ref are sums over neighbouring letters; gold is none.
        """
        beta = self.beta if beta is None else beta
        if not beta > 0:
            raise ConfigError(f"beta must be positive, got {beta}: without a price on KL the optimum is one response")
        log_probs, ahead = np.empty_like(self.ref_log_probs), np.zeros(len(LETTERS))
        for t in reversed(range(LENGTH)):
            joint = self.ref_log_probs[t] + (proxy.worth / beta if t > 0 else 0) + ahead  # the prompt is no part of it
            ahead = np.logaddexp.reduce(joint, 1)
            log_probs[t] = joint - ahead[:, None]
        return log_probs

    def kl(self, log_probs: NDArray[np.floating]) -> float:
        """KL(π ‖ ref) in nats per sequence of the policy with this table, exactly."""
        here, total = np.eye(len(LETTERS))[LETTERS.index(PROMPT)], 0.0
        for policy, reference in zip(log_probs, self.ref_log_probs, strict=True):
            each = np.where(policy > -np.inf, policy - reference, 0.0)
            total += float(here @ (np.exp(policy) * each).sum(1))
            here = here @ np.exp(policy)
        return total

    def sample(self, count: int, seed: int = 0, log_probs: NDArray[np.floating] | None = None) -> list[str]:
        """`count` responses of the policy with this table, or of the reference.

        A larger sample of the same seed begins with the smaller one.
        """
        table = self.ref_log_probs if log_probs is None else log_probs
        return _texts(_draw(table, count, np.random.default_rng([self.seed, 3, seed])))

    # --- what can be learned from comparisons -------------------------------------------------------

    def learned_proxy(self, comparisons: int, seed: int = 0) -> LearnedProxy:
        """A reward model learned from so many pairs of the reference's responses, labelled by Bradley–Terry on gold.

        The first is preferred with probability σ(gold of the first − gold of the second). The model is a convolution
        over neighbouring letters with a linear head on its mean, after 600 steps of AdamW, and scores the reference's
        responses with mean 0 and variance 1. More comparisons of the same `seed` begin with the same ones.
        """
        if comparisons < 1:
            raise ConfigError(f"a proxy is learned from at least 1 comparison, got {comparisons}")
        pairs, labels, batches, fresh, weights = (
            np.random.default_rng([self.seed, stream, seed]) for stream in range(4, 9)
        )
        ids = _draw(self.ref_log_probs, 2 * comparisons, pairs).reshape(comparisons, 2, LENGTH)
        gold = self._gold(ids.reshape(-1, LENGTH)).reshape(comparisons, 2)
        preferred = labels.random(comparisons) < 1 / (1 + np.exp(gold[:, 1] - gold[:, 0]))
        worth = _fit(ids, preferred, batches, int(weights.integers(2**31)))
        score = _pairs(worth, _draw(self.ref_log_probs, _NORMALISING, fresh))
        return LearnedProxy((worth - score.mean() / (LENGTH - 1)) / score.std())

    # --- inside ---------------------------------------------------------------------------------

    def _gold(self, ids: NDArray[np.int64]) -> NDArray[np.float64]:
        missed = sum(np.abs((ids == LETTERS.index(k)).sum(1) - WANTED) for k in self.keywords)
        return (_pairs(self.bonus, ids) - missed / 1.5 - self.mean) / self.deviation


@dataclass(frozen=True, eq=False)
class LearnedProxy:
    """What a convolution of width 2 with a linear head on its mean has learned: what each pair of letters is worth."""

    worth: NDArray[np.float64]  # [12, 12], of each letter after each letter

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> NDArray[np.float64]:
        """The sum over the neighbouring letters of each response, [B]."""
        return _pairs(self.worth, _ids(responses))


def _draw(log_probs: NDArray[np.floating], count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Responses [count, T] of the policy with the table [T, V, V], as ids."""
    up_to = np.exp(log_probs).cumsum(2)[..., :-1]
    uniform = rng.random((count, LENGTH))
    ids = np.empty((count, LENGTH), dtype=np.int64)
    last = np.full(count, LETTERS.index(PROMPT))
    for t in range(LENGTH):
        last = ids[:, t] = (up_to[t, last] <= uniform[:, t : t + 1]).sum(1)
    return ids


def _pairs(table: NDArray[np.float64], ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """Sum of the table's entries at the neighbouring letters of each row, [B, T] → [B]."""
    return table[ids[:, :-1], ids[:, 1:]].sum(1)


def _fit(
    ids: NDArray[np.int64], preferred: NDArray[np.bool_], rng: np.random.Generator, seed: int
) -> NDArray[np.float64]:
    """What each pair of letters is worth [12, 12], fitted to comparisons [m, 2, T] and whether the first won [m]."""
    v, count = len(LETTERS), LENGTH - 1
    # A linear head on a mean is the mean of the head on each pair, so the convolution runs over the 144 pairs only.
    number = torch.from_numpy(ids[..., :-1] * v + ids[..., 1:])  # [m, 2, T − 1]
    share = torch.zeros(*number.shape[:2], v * v).scatter_add_(2, number, torch.full(number.shape, 1 / count))
    won = torch.from_numpy(preferred).float()
    pairs = nn.functional.one_hot(torch.cartesian_prod(torch.arange(v), torch.arange(v)), v).float().flatten(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        scorer = nn.Sequential(nn.Linear(2 * v, _CHANNELS), nn.ReLU(), nn.Linear(_CHANNELS, 1))
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=_LEARNING_RATE)
    for _ in range(_STEPS):
        batch = torch.from_numpy(rng.permutation(len(won))[:_BATCH])
        first, second = (share[batch] @ scorer(pairs)).squeeze(2).T
        loss = bradley_terry_loss(first - second, won[batch]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return scorer(pairs).double().numpy().reshape(v, v) / count


def _texts(ids: NDArray[np.int64]) -> list[str]:
    letters = (ids + ord("a")).astype(np.uint8).tobytes().decode()
    return [letters[i : i + LENGTH] for i in range(0, len(letters), LENGTH)]


def _ids(responses: Sequence[str]) -> NDArray[np.int64]:
    """The letters of each response as numbers [B, 16]."""
    for i, text in enumerate(responses):
        if len(text) != LENGTH or text.strip(LETTERS):
            raise RewardError(
                f"response {i} is {text[:60]!r}, but this world's responses are {LENGTH} of the letters {LETTERS}"
            )
    letters = "".join(responses).encode()
    return np.frombuffer(letters, dtype=np.uint8).reshape(-1, LENGTH).astype(np.int64) - ord("a")


# --- as registered environments --------------------------------------------------------------------


def make_env(world_seed: int = 0, proxy_comparisons: int = 0, **env: Any) -> TextGenerationEnv:
    """`rlhf_env/Keywords-v0`; the reward is a proxy of so many comparisons, or with 0 gold itself.

    `env` are the environment's own keywords.
    """
    return TextGenerationEnv(**(_defaults(world_seed, proxy_comparisons) | env))


def make_vector_env(world_seed: int = 0, proxy_comparisons: int = 0, **env: Any) -> TextGenerationVectorEnv:
    """The same, batched: `num_envs` and `autoreset_mode` are among the keywords."""
    return TextGenerationVectorEnv(**(_defaults(world_seed, proxy_comparisons) | env))


def _defaults(seed: int, comparisons: int) -> dict[str, Any]:
    kwargs = _shared(seed).env_kwargs()
    return kwargs | {"reward_model": _shared_proxy(seed, comparisons)} if comparisons else kwargs


@lru_cache(maxsize=4)
def _shared(seed: int) -> KeywordsWorld:
    # Many environments of one process are the same world, and nothing in it ever changes.
    return KeywordsWorld.make(seed)


@lru_cache(maxsize=4)
def _shared_proxy(seed: int, comparisons: int) -> RewardModel:
    return _shared(seed).learned_proxy(comparisons)
