"""A reader of token ids for small agents: an embedding and a GRU before SB3's own heads."""

from __future__ import annotations

import torch
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn

from rlhf_env.agents.sb3.spaces import require_token_space

_LOWEST_LOGP = -20.0  # where log-probabilities of candidates are cut: rarer is as good as never


class GRUExtractor(BaseFeaturesExtractor):
    """Features [N, `features_dim`] of a prompt and the response so far, for any algorithm with a MultiInput policy.

    PPO("MultiInputPolicy", envs, policy_kwargs={"features_extractor_class": GRUExtractor})

    A GRU (Cho et al. 2014, arXiv 1406.1078) reads the embedded tokens up to the last one, so padding is never seen; the
    number of response tokens is embedded too, because what is left to write decides what a state is worth. Where
    observations have candidates, their embeddings and log-probabilities under the reference are read in their order,
    so that values of ranks (`action="candidate"`) can be learned.
    """

    def __init__(self, observation_space: spaces.Dict, features_dim: int = 64, embedding_dim: int = 32) -> None:
        super().__init__(observation_space, features_dim)
        require_token_space(observation_space)
        length, size = observation_space["input_ids"].shape[0], int(observation_space["input_ids"].high.max()) + 1  # type: ignore[index, attr-defined]
        self.nothing = size  # the id of no token
        self.embedding = nn.Embedding(size + 1, embedding_dim, padding_idx=size)
        self.kind = nn.Embedding(2, embedding_dim)  # of the prompt, of the response
        self.position = nn.Embedding(length + 1, embedding_dim)
        self.gru = nn.GRU(embedding_dim, features_dim, batch_first=True)
        candidates = observation_space["candidates"].shape[0] if "candidates" in observation_space.spaces else 0  # type: ignore[index]
        self.head = nn.Linear(features_dim + embedding_dim + candidates * (embedding_dim + 1), features_dim)

    def forward(self, observations: dict[str, Tensor]) -> Tensor:
        """Features [N, features_dim] of observations [N, …], which SB3 gives as floats."""
        lengths, response = observations["attention_mask"].long().sum(1), observations["response_mask"].long()
        width = int(lengths.max())
        ids = observations["input_ids"].long()[:, :width]
        states, _ = self.gru(self.embedding(ids) + self.kind(response[:, :width]))
        read = states[torch.arange(len(ids), device=ids.device), lengths - 1]
        parts = [read, self.position(response.sum(1))]
        if "candidates" in observations:
            candidates = observations["candidates"].long()
            embedded = self.embedding(candidates.masked_fill(candidates < 0, self.nothing))
            logp = observations["candidate_logp"].clamp(min=_LOWEST_LOGP) / -_LOWEST_LOGP
            parts += [embedded.flatten(1), logp]
        return torch.tanh(self.head(torch.cat(parts, dim=1)))
