"""One iteration of PPO written by hand for one model, with nothing around it: the time that the arithmetic takes.

A GPT-2 of plain tensors; lean cached decoding of responses of one length; one teacher-forced pass of the reference and
of the reward model; policy and value on one trunk; minibatches of whole responses; AdamW. It checks nothing, logs
nothing, and can neither stop early nor pad. `iteration.py` compares with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, gelu, layer_norm, linear, scaled_dot_product_attention

Block = tuple[Tensor, ...]


@dataclass
class Weights:
    """The tensors of a Hugging Face GPT-2, shared with it, and of a linear head on its last hidden state."""

    heads: int
    wte: Tensor
    wpe: Tensor
    blocks: list[Block]
    ln_f: tuple[Tensor, Tensor]
    head: tuple[Tensor, Tensor | None]

    @classmethod
    def of(cls, transformer: Any, head: Any) -> Weights:
        blocks = [
            tuple(
                w
                for m in (b.ln_1, b.attn.c_attn, b.attn.c_proj, b.ln_2, b.mlp.c_fc, b.mlp.c_proj)
                for w in (m.weight, m.bias)
            )
            for b in transformer.h
        ]
        ln_f = (transformer.ln_f.weight, transformer.ln_f.bias)
        heads = transformer.config.n_head
        return cls(heads, transformer.wte.weight, transformer.wpe.weight, blocks, ln_f, (head.weight, head.bias))

    def qkv(self, x: Tensor, block: Block) -> Tensor:
        """Queries, keys and values [3, rows, heads, size] of x [rows, D]."""
        y = layer_norm(x, x.shape[-1:], block[0], block[1])
        return torch.addmm(block[3], y, block[2]).view(len(x), 3, self.heads, -1).transpose(0, 1)

    def finish(self, x: Tensor, attended: Tensor, block: Block) -> Tensor:
        x = x + torch.addmm(block[5], attended, block[4])
        y = layer_norm(x, x.shape[-1:], block[6], block[7])
        return x + torch.addmm(block[11], gelu(torch.addmm(block[9], y, block[8]), approximate="tanh"), block[10])

    def trunk(self, ids: Tensor, keep: int, cache: list[tuple[Tensor, Tensor]] | None = None) -> Tensor:
        """Last hidden states [B, keep, D] of the last columns of ids [B, L]."""
        b, length = ids.shape
        x = (self.wte[ids] + self.wpe[:length]).flatten(0, 1)
        for i, block in enumerate(self.blocks):
            q, k, v = self.qkv(x, block).unflatten(1, (b, length)).transpose(2, 3)  # [B, heads, L, size]
            if cache is not None:
                cache[i][0][:, :, :length], cache[i][1][:, :, :length] = k, v
            attended = scaled_dot_product_attention(q, k, v, is_causal=True)
            x = self.finish(x, attended.transpose(1, 2).reshape(len(x), -1), block)
        return layer_norm(x.view(b, length, -1)[:, -keep:], x.shape[-1:], *self.ln_f)

    def step(self, ids: Tensor, at: int, cache: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Last hidden states [B, D] of one token more, ids [B], in column `at`."""
        x = self.wte[ids] + self.wpe[at]
        for block, (keys, values) in zip(self.blocks, cache, strict=True):
            q, keys[:, :, at], values[:, :, at] = self.qkv(x, block)
            weight = (q.unsqueeze(2) @ keys[:, :, : at + 1].transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
            x = self.finish(x, (weight @ values[:, :, : at + 1]).reshape(len(x), -1), block)
        return layer_norm(x, x.shape[-1:], *self.ln_f)

    def read(self, sequences: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """Log-probabilities [B, R] of the last R = `tokens` columns, and values of the states before them."""
        hidden = self.trunk(sequences[:, :-1], tokens)
        logits = hidden.flatten(0, 1) @ self.wte.T
        logp = -cross_entropy(logits, sequences[:, -tokens:].flatten(), reduction="none")
        return logp.view(-1, tokens), linear(hidden, *self.head).squeeze(-1)

    @torch.no_grad()
    def sample(self, prompts: Tensor, tokens: int, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Prompts [B, P] with R = `tokens` sampled tokens [B, P + R], their log-probabilities and values [B, R]."""
        (b, p), size = prompts.shape, self.wte.shape[1] // self.heads
        shape = (b, self.heads, p + tokens, size)
        cache = [(torch.empty(shape), torch.empty(shape)) for _ in self.blocks]
        hidden = self.trunk(prompts, 1, cache).squeeze(1)
        ids, logp, values = prompts.new_empty(b, tokens), torch.empty(b, tokens), torch.empty(b, tokens)
        for t in range(tokens):
            probability = (hidden @ self.wte.T).softmax(-1)
            cumulative = probability.cumsum(-1)
            drawn = torch.searchsorted(cumulative, uniform[:, t : t + 1] * cumulative[:, -1:], right=True)
            ids[:, t] = drawn.squeeze(1)
            logp[:, t] = probability.gather(1, drawn).squeeze(1).log()
            values[:, t] = linear(hidden, *self.head).squeeze(1)
            if t < tokens - 1:
                hidden = self.step(ids[:, t], p + t, cache)
        return torch.cat([prompts, ids], 1), logp, values


def gae(reward: Tensor, values: Tensor, lam: float = 0.95) -> Tensor:
    advantage, following = torch.zeros_like(reward), torch.zeros(len(reward))
    for t in reversed(range(reward.shape[1])):
        after = values[:, t + 1] if t + 1 < reward.shape[1] else 0.0
        advantage[:, t] = following = reward[:, t] + after - values[:, t] + lam * following
    return advantage


class Floor:
    """PPO for one shape of work; `iterate` does all of an iteration."""

    def __init__(self, policy: Weights, reference: Weights, reward: Weights, parameters: list[Tensor]) -> None:
        self.policy, self.reference, self.reward, self.parameters = policy, reference, reward, parameters
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, eps=1e-5, weight_decay=0.0, fused=True)
        self.draw = torch.Generator().manual_seed(0)

    def iterate(self, prompts: Tensor, tokens: int, *, epochs: int = 4, minibatches: int = 4) -> None:
        uniform = torch.rand(len(prompts), tokens, generator=self.draw)
        sequences, old, values = self.policy.sample(prompts, tokens, uniform)
        with torch.no_grad():
            ref = self.reference.read(sequences, tokens)[0]
            score = linear(self.reward.trunk(sequences, 1), *self.reward.head).flatten()
        reward = -0.05 * (old - ref)
        reward[:, -1] += score
        advantage = gae(reward, values)
        returns = advantage + values
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        for _ in range(epochs):
            for rows in torch.randperm(len(prompts), generator=self.draw).split(len(prompts) // minibatches):
                logp, value = self.policy.read(sequences[rows], tokens)
                ratio, a = (logp - old[rows]).exp(), advantage[rows]
                clipped = values[rows] + (value - values[rows]).clamp(-0.2, 0.2)
                worse = torch.max((value - returns[rows]).square(), (clipped - returns[rows]).square())
                loss = -torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a).mean() + 0.05 * worse.mean()
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
                self.optimizer.step()
