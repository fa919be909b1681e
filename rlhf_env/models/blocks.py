"""The transformer of the common families, block by block: the same modules and weights without the library around them.

A Hugging Face forward builds masks, caches and output objects anew at every token; for a small model that costs more
than its arithmetic. Here a block is its norms, projections and activation, and attention is one call. Every projection
is still the model's own module, so adapters and frozen layers are what they are there. `Body.of` says which models are
understood; for all others, and as the oracle in the tests, there is the model's own forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import GPT2LMHeadModel, LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM
from transformers.activations import NewGELUActivation

from rlhf_env.models.sharding import own_class
from rlhf_env.types import Rollout

_CHUNK = 64  # episodes that frozen blocks read at once
_FIXED_ROTATIONS = ("default", "linear", "llama3")  # those whose angles depend on nothing but the position

Rotation = tuple[Tensor, Tensor]  # cos and sin of the angles at some positions, [..., 1, head size]


class GPT2:
    """Learned positions, one projection for query, key and value, layer norms."""

    def __init__(self, model: Any) -> None:
        self.body, self.blocks = model.transformer, model.transformer.h
        self.embeddings = (self.body.wte, self.body.wpe)
        self.heads = self.kv_heads = model.config.num_attention_heads

    @staticmethod
    def understood(config: Any) -> bool:
        """Whether nothing unusual is asked of the family."""
        return not config.add_cross_attention

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Token and position embeddings."""
        return self.body.wte(ids) + self.body.wpe(positions)

    def rotation(self, x: Tensor, positions: Tensor) -> None:
        """None: positions are embedded."""

    def project(self, block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of a block's input, [..., heads, size]."""
        q, k, v = block.attn.c_attn(block.ln_1(x)).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        return q, k, v

    def finish(self, block: Any, x: Tensor, attended: Tensor) -> Tensor:
        """What the block makes of its input and of what it attended to."""
        x = x + block.attn.c_proj(attended)
        inner, act = block.mlp.c_fc(block.ln_2(x)), block.mlp.act
        # The same function as one operation; spelled out it is eight, and a third of a small model's forward.
        inner = gelu(inner, approximate="tanh") if type(act) is NewGELUActivation else act(inner)
        return x + block.mlp.c_proj(inner)

    def norm(self, x: Tensor) -> Tensor:
        """The last norm."""
        return self.body.ln_f(x)

    def scale(self, block: Any) -> float:
        """What queries times keys are multiplied by."""
        return block.attn.scaling

    def window(self, block: Any) -> None:
        """None: every earlier token is seen."""


class Llama:
    """Llama, Mistral and Qwen2: rotated queries and keys, root-mean-square norms, gated activations."""

    def __init__(self, model: Any) -> None:
        self.body, self.blocks = model.model, model.model.layers
        self.embeddings = (self.body.embed_tokens,)
        self.heads, self.kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads

    @staticmethod
    def understood(config: Any) -> bool:
        """Whether the angles depend on nothing but the position."""
        return (config.rope_parameters or {}).get("rope_type", "default") in _FIXED_ROTATIONS

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Token embeddings."""
        return self.body.embed_tokens(ids)

    def rotation(self, x: Tensor, positions: Tensor) -> Rotation:
        """Cos and sin of the angles at `positions` [...], in the dtype of `x`."""
        # As a batch of one: not every release of Transformers takes another shape.
        cos, sin = (y[0].unflatten(0, positions.shape) for y in self.body.rotary_emb(x, positions.reshape(1, -1)))
        return cos.unsqueeze(-2), sin.unsqueeze(-2)

    def project(self, block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [..., heads, size], keys and values [..., kv heads, size] of a block's input."""
        x, attn = block.input_layernorm(x), block.self_attn
        k, v = (projection(x).unflatten(-1, (self.kv_heads, -1)) for projection in (attn.k_proj, attn.v_proj))
        return attn.q_proj(x).unflatten(-1, (self.heads, -1)), k, v

    def finish(self, block: Any, x: Tensor, attended: Tensor) -> Tensor:
        """What the block makes of its input and of what it attended to."""
        x = x + block.self_attn.o_proj(attended)
        return x + block.mlp(block.post_attention_layernorm(x))

    def norm(self, x: Tensor) -> Tensor:
        """The last norm."""
        return self.body.norm(x)

    def scale(self, block: Any) -> float:
        """What queries times keys are multiplied by."""
        return block.self_attn.scaling

    def window(self, block: Any) -> int | None:
        """How many tokens back a token sees, itself included; None: all."""
        attn = block.self_attn
        if hasattr(attn, "sliding_window"):  # Qwen2, layer by layer
            return attn.sliding_window
        return getattr(attn.config, "sliding_window", None) if type(attn).__name__ == "MistralAttention" else None


_FAMILIES: dict[type, type[GPT2] | type[Llama]] = {
    GPT2LMHeadModel: GPT2,
    LlamaForCausalLM: Llama,
    MistralForCausalLM: Llama,
    Qwen2ForCausalLM: Llama,
}


@dataclass(frozen=True)
class Begun:
    """What the first `depth` blocks make of some episodes: states [B, L, D], each episode's from column 0 on."""

    depth: int
    states: Tensor

    def __getitem__(self, rows: Tensor) -> Begun:
        return Begun(self.depth, self.states[rows])


@dataclass(frozen=True)
class Body:
    """A model's transformer without its output layer."""

    family: GPT2 | Llama
    checkpointed: bool = False  # whether a block's activations are made again in the backward pass

    @classmethod
    def of(cls, model: nn.Module, *, checkpointed: bool = False) -> Self | None:
        """The body of a Hugging Face model; None where its own forward has to do.

        That is: another family, an attention other than "sdpa", rotations that depend on the length, and modules with
        hooks, which would not be called.
        """
        family, config = _FAMILIES.get(own_class(model)), model.config
        if family is None or config._attn_implementation != "sdpa" or not family.understood(config):  # type: ignore[union-attr]
            return None
        body = cls(family(model), checkpointed)
        inside = (m for block in body.family.blocks for m in (block, *block.children()) if list(m.children()))
        return None if any(_hooked(m) for m in (model, *model.children(), *inside)) else body

    def __call__(self, ids: Tensor, keep: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Last hidden states [B, L, D] of rows of ids [B, L], all of which begin in column 0.

        What comes after a row's end may hold anything: no token looks ahead. `keep` chooses what is wanted of [B, L, D]
        before the last norm.
        """
        x = self.output(self.embed(ids), self.family.blocks)
        return self.family.norm(x if keep is None else keep(x))

    @property
    def frozen(self) -> int:
        """How many of the first blocks no gradient step changes, nor what they are given; adapters are part of them."""
        parts = (nn.ModuleList(self.family.embeddings), *self.family.blocks)
        still = takewhile(lambda part: not any(p.requires_grad for p in part.parameters()), parts)
        return max(0, sum(1 for _ in still) - 1)

    @torch.no_grad()
    def begin(self, rollout: Rollout) -> Begun | None:
        """What the frozen blocks make of a rollout, for `states_before`; None where no block is frozen.

        It takes B · L · D numbers in the body's dtype, of L the longest episode's tokens and D the width.
        """
        if (depth := self.frozen) == 0:
            return None
        lengths, found = rollout.attention_mask.sum(1), None
        for rows in (part for group in buckets(lengths) for part in group.split(_CHUNK)):
            x = self.output(self.embed(_flush_left(rollout, rows)), self.family.blocks[:depth])
            found = x.new_zeros(len(lengths), int(lengths.max()), x.shape[2]) if found is None else found
            found[rows, : x.shape[1]] = x
        return None if found is None else Begun(depth, found)

    def states_before(self, rollout: Rollout, begun: Begun | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Last hidden states [M, D] before each of a rollout's M response tokens, and each one's row and t, int64 [M].

        Where the lengths are uneven, the episodes are read a few at a time, so that none is padded to the longest.
        `begun` is what `begin` said of these very episodes.
        """
        lengths, blocks, found = rollout.attention_mask.sum(1), self.family.blocks, []
        for rows in buckets(lengths):
            if begun is None:
                x = self.output(self.embed(_flush_left(rollout, rows)), blocks)
            else:
                x = self.output(begun.states[rows, : int(lengths[rows].max())], blocks[begun.depth :])
            row, t = rollout.response_mask[rows].nonzero(as_tuple=True)
            at = t + rollout.prompt_mask[rows].sum(1)[row] - 1
            found.append((self.family.norm(x[row, at]), rows[row], t))
        hidden, row, t = found[0] if len(found) == 1 else map(torch.cat, zip(*found, strict=True))
        return hidden, row, t

    def embed(self, ids: Tensor) -> Tensor:
        """What the first block is given for rows of ids [B, L] that begin in column 0: [B, L, D]."""
        return self.family.embed(ids, torch.arange(ids.shape[1], device=ids.device))

    def output(self, x: Tensor, blocks: Sequence[Any]) -> Tensor:
        """What the last of successive `blocks` makes of x [B, L, D]."""
        for _, _, made in self.run(x, blocks):
            x = made
        return x

    def run(self, x: Tensor, blocks: Sequence[Any]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Keys and values [B, kv heads, L, size] of each of successive `blocks` for x [B, L, D], and its output."""
        rotation = self.family.rotation(x, torch.arange(x.shape[1], device=x.device).unsqueeze(0))
        for block in blocks:
            if self.checkpointed and torch.is_grad_enabled():
                k, v, x = checkpoint(self._block, block, x, rotation, use_reentrant=False)  # type: ignore[misc]
            else:
                k, v, x = self._block(block, x, rotation)
            yield k, v, x

    def _block(self, block: Any, x: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values of a block, and what it makes of x [B, L, D]."""
        family, length = self.family, x.shape[1]
        q, k, v = (y.transpose(1, 2) for y in self.qkv(block, x, rotation))
        window = family.window(block)
        seen = None if window is None or window >= length else _band(length, window, x.device)
        attended = scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=seen,
            is_causal=seen is None,
            scale=family.scale(block),
            enable_gqa=family.heads != family.kv_heads,
        )
        return k, v, family.finish(block, x, attended.transpose(1, 2).flatten(2))

    def qkv(self, block: Any, x: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [..., heads, size], keys and values [..., kv heads, size] of a block's input [..., D], rotated."""
        q, k, v = self.family.project(block, x)
        return (q, k, v) if rotation is None else (rotate(q, rotation), rotate(k, rotation), v)


def _flush_left(rollout: Rollout, rows: Tensor) -> Tensor:
    """The ids of these episodes [n, L], each from column 0 on, L the length of the longest; then anything."""
    mask = rollout.attention_mask[rows]
    before = mask.to(torch.uint8).argmax(1, keepdim=True)  # [n, 1] padding before the prompt
    kept = torch.arange(int(mask.sum(1).max()), device=mask.device)
    return rollout.input_ids[rows].gather(1, (kept + before).clamp(max=mask.shape[1] - 1))


def buckets(lengths: Tensor) -> list[Tensor]:
    """The rows of `lengths` [B] in groups of like length: one, or two or four of at least 8 rows against much padding.

    Much is more than a third of all columns.
    """
    groups = [torch.arange(len(lengths), device=lengths.device)]
    for count in (2, 4):
        columns = sum(len(rows) * int(lengths[rows].max()) for rows in groups)
        if int(lengths.sum()) > columns * 2 / 3 or len(lengths) < 8 * count:
            break
        groups = list(lengths.argsort(stable=True).tensor_split(count))
    return groups


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864) of [..., heads, size], halves paired."""
    cos, sin = rotation
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """Which earlier tokens each token sees, bool [L, L]."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril().triu(1 - window)


def _hooked(module: nn.Module) -> bool:
    # A model whose weights are spread comes here while they are gathered, when the hooks that gather them need not run.
    none_of_ours = ("transformers.utils.output_capturing", "torch.distributed.fsdp")
    own = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return not all(getattr(hook, "__module__", "").startswith(none_of_ours) for hook in own)
