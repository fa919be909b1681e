"""The first stage: from demonstrations to a policy that reinforcement learning can start from."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_env.errors import ConfigError, DataError
from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.models.sft import EncodedDemonstration, encode_demonstrations, fit_demonstrations, mean_nll
from rlhf_env.models.tiny import tiny_config
from rlhf_env.records.config import to_dict
from rlhf_env.records.run import Run, require_free
from rlhf_env.text.codec import Codec
from rlhf_env.text.demonstrations import Demonstration, load_demonstrations
from rlhf_env.text.tokenizers import bpe_tokenizer, byte_tokenizer, char_tokenizer, word_tokenizer
from rlhf_env.training.assemble import parse_device, read_chat_template
from rlhf_env.training.config import FineTuneConfig, NewModelConfig
from rlhf_env.training.report import surroundings

OnStep = Callable[[dict[str, Any]], None]

_HOLD_OUT_STREAM = 2
_SPECIAL = ("bos", "eos", "pad")


def run_sft(config: FineTuneConfig, out: str | Path, *, on_step: OnStep | None = None) -> dict[str, Any]:
    """Fine-tune as `config` says and leave the run, with the policy in `out`/model; returns what summary.json says.

    `loss` is in nats per token that is learned (the responses and their EOS), on demonstrations held out.
    """
    out = Path(out)
    require_free(out)
    parse_device(config.device)
    began = time.perf_counter()
    demonstrations = load_demonstrations(config.demonstrations)
    policy, rows, held_out, dropped = prepare_sft(config, demonstrations)

    run = Run.create(out, to_dict(config))
    before = mean_nll(policy, held_out)
    for row in fit_demonstrations(policy, rows, config.fit, seed=config.seed):
        run.log(row)
        if on_step is not None:
            on_step(row)
    policy.save_pretrained(out / "model")
    run.write_summary(
        {
            "loss_before": before,
            "loss_after": mean_nll(policy, held_out),
            "demonstrations": len(rows),
            "held_out": len(held_out),
            "dropped": dropped,
            "parameters": sum(p.numel() for p in policy.model.parameters()),
            "seed": config.seed,
            "seconds": time.perf_counter() - began,
            **surroundings(config.device),
        }
    )
    return run.summary


def prepare_sft(
    config: FineTuneConfig, demonstrations: Sequence[Demonstration]
) -> tuple[CausalLM, list[EncodedDemonstration], list[EncodedDemonstration], int]:
    """The policy to start from, what it learns from, what is held out, and how many demonstrations were too long.

    Every mistake in settings and demonstrations shows here, before anything is learned.
    """
    if config.policy is None:
        texts = [demonstration.prompt + demonstration.response for demonstration in demonstrations]
        policy = new_model(config.new, texts, config.seed, config.device, config.dtype)
    else:
        policy = CausalLM.from_pretrained(config.policy, device=config.device, dtype=config.dtype)
    return policy.freeze_layers(config.freeze_layers), *_encoded(config, policy, demonstrations)


def new_model(config: NewModelConfig, texts: Sequence[str], seed: int, device: str, dtype: str) -> CausalLM:
    """A model of random weights whose tokenizer is made from `texts`."""
    match config.tokenizer:
        case "bpe":
            tokenizer = bpe_tokenizer(texts, config.vocab_size)
        case "word":
            tokenizer = word_tokenizer(texts)
        case "char":
            tokenizer = char_tokenizer("".join(sorted(set("".join(texts)))))
        case "byte":
            tokenizer = byte_tokenizer()
        case other:
            raise ConfigError(f"tokenizer must be 'bpe', 'word', 'char' or 'byte', got {other!r}")
    special: dict[str, Any] = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in _SPECIAL}
    architecture = tiny_config(
        config.family,
        len(tokenizer),
        n_layer=config.n_layer,
        n_embd=config.n_embd,
        n_head=config.n_head,
        n_positions=config.n_positions,
        **special,
    )
    return CausalLM.from_config(architecture, tokenizer, seed=seed, device=device, dtype=dtype)


def _encoded(
    config: FineTuneConfig, policy: CausalLM, demonstrations: Sequence[Demonstration]
) -> tuple[list[EncodedDemonstration], list[EncodedDemonstration], int]:
    """What is learned from, what is held out, and how many demonstrations were dropped for being too long."""
    codec = Codec(policy.tokenizer, chat_template=read_chat_template(config.chat_template))
    rows = encode_demonstrations(codec, demonstrations, context_length=policy.context_length, too_long=config.too_long)
    distinct = list(dict.fromkeys(rows))  # what occurs several times is on one side only
    count = max(1, round(config.held_out * len(distinct)))
    if count >= len(distinct):
        raise DataError(
            f"{config.demonstrations}: of {len(distinct)} different demonstrations a share of {config.held_out} is "
            "held out, and none is left; at least 2 are needed, one to learn from and one to measure on"
        )
    order = np.random.default_rng([config.seed, _HOLD_OUT_STREAM]).permutation(len(distinct))
    chosen = {distinct[i] for i in order[:count]}
    learned, held_out = ([row for row in rows if (row in chosen) == held] for held in (False, True))
    return learned, held_out, len(demonstrations) - len(rows)
