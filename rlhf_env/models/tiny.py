"""Configurations of models small enough for tests and toy worlds."""

from __future__ import annotations

from typing import Any, Literal

from transformers import GPT2Config, LlamaConfig, PreTrainedConfig

from rlhf_env.errors import ConfigError


def tiny_config(
    family: Literal["gpt2", "llama"],
    vocab_size: int,
    *,
    n_layer: int = 2,
    n_embd: int = 64,
    n_head: int = 4,
    n_positions: int = 128,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
) -> PreTrainedConfig:
    """A small GPT-2 (absolute positions, tied embeddings) or Llama (rotary) without dropout."""
    if n_embd % n_head or (family == "llama" and n_embd // n_head % 2):
        raise ConfigError(f"n_embd={n_embd} does not split into {n_head} heads" + " of even size" * (family == "llama"))
    tokens: dict[str, Any] = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
    if family == "gpt2":
        return GPT2Config(
            vocab_size=vocab_size,
            n_layer=n_layer,
            n_embd=n_embd,
            n_head=n_head,
            n_positions=n_positions,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            summary_first_dropout=0.0,
            **tokens,
        )
    if family == "llama":
        return LlamaConfig(
            vocab_size=vocab_size,
            num_hidden_layers=n_layer,
            hidden_size=n_embd,
            intermediate_size=4 * n_embd,
            num_attention_heads=n_head,
            max_position_embeddings=n_positions,
            **tokens,
        )
    raise ConfigError(f"family must be 'gpt2' or 'llama', got {family!r}")
