"""ILQL, implicit language Q-learning: from logged responses and their rewards to a policy better than the log.

Snell et al. 2022 (arXiv 2206.11871): Q and V of every token by expectile regression (Kostrikov et al. 2021, IQL, arXiv
2110.06169), a conservative term that keeps Q low where the log has not been, and a policy that is the log's own, with
Q − V added to its logits. All heads are linear in the language model's last hidden state.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from rlhf_env.functional import conservative_loss, expectile_loss, gather_logp, masked_mean
from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.models.descent import Descent, passes, require_finite_logp
from rlhf_env.settings import require
from rlhf_env.types import Rollout


@dataclass(frozen=True)
class ILQLConfig:
    """Settings of ILQL."""

    learning_rate: float = 1e-5  #: of Adam, at the start; models of a million parameters take 1e-3
    anneal: bool = True  #: lower the learning rate linearly to 0 over the steps
    epochs: int = 10  #: passes over the log
    batch_size: int = 64  #: responses per gradient step
    micro_batch_size: int = 0  #: responses per backward pass; 0: all at once; the gradient is the same
    tau: float = 0.7  #: expectile: ½ values what the log does on average, towards 1 the best that it ever did
    gamma: float = 1.0  #: discount; below 1, sooner is better
    conservatism: float = 0.1  #: weight of the term that lowers Q of tokens which the log did not choose (α)
    imitation: float = 1.0  #: weight of learning what the log does, the policy that Q − V is added to
    perturbation: float = 4.0  #: how much of Q − V is added to the logits (β in the paper); 0 is the log's own policy
    target_rate: float = 0.01  #: how far the target heads follow after each gradient step
    max_grad_norm: float = 1.0  #: gradients are scaled down to this norm

    def __post_init__(self) -> None:
        require(self, learning_rate=(0, None), epochs=(1, None), batch_size=(1, None), micro_batch_size=(0, None))
        require(self, tau=(0, 1), gamma=(0, 1), conservatism=(0, None), imitation=(0, None), perturbation=(0, None))
        require(self, target_rate=(0, 1))


class ILQL:
    """Offline Q-learning on tokens: the log's policy, moved towards what was worth most in the log."""

    learns_from: ClassVar[Literal["log"]] = "log"

    def __init__(self, policy: CausalLM, config: ILQLConfig = ILQLConfig(), *, seed: int = 0) -> None:  # noqa: B008 (frozen)
        self.model, self.config, self.seed = policy, config, seed
        rows, width = policy.model.get_output_embeddings().weight.shape  # type: ignore[operator]
        with torch.random.fork_rng(devices=[]):
            self.heads = nn.ModuleList(nn.Linear(width, rows, bias=False) for _ in range(2))
        for head in self.heads:
            nn.init.zeros_(head.weight)  # type: ignore[arg-type]
        self.heads.to(device=policy.device, dtype=policy.dtype)
        self.targets = copy.deepcopy(self.heads).requires_grad_(False)
        self.temperature = 1.0  # of the law that the log is read under
        self.descent = Descent.of([*policy.parameters(), *self.heads.parameters()], config)

    def fit(self, log: Rollout, *, updates: int | None = None, start: int = 0) -> Iterator[dict[str, float]]:
        """Learn from logged responses, whose `reward` [B, T] holds what each token was worth, yielding metrics by step.

        `updates` is the number of gradient steps (none: `epochs` passes), `start` that of those taken already.
        """
        c = self.config
        self.temperature = log.law.temperature
        lengths = log.require_finite().lengths  # of the log, which may be on another device than the model

        def loss_of(rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            batch = log[rows].to(self.model.device)
            m = batch.response_mask
            tokens, reward = batch.response_ids, torch.where(m, batch.reward, 0.0)
            logp, hidden = self._read(batch)  # [B, T], [B, T, H] of the state before each token
            require_finite_logp(logp, m, rows.to(m.device))
            values = torch.where(m, self.model.value_head(hidden).squeeze(-1), 0.0)
            after = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)  # V is 0 after the last token
            q_target = reward + c.gamma * after.detach()
            all_q = [head(hidden) for head in self.heads]
            q_loss = sum(masked_mean((gather_logp(q, tokens) - q_target).square(), m) for q in all_q) / 2
            with torch.no_grad():
                slow_q = torch.minimum(*(gather_logp(head(hidden), tokens) for head in self.targets))
            value_loss = masked_mean(expectile_loss(slow_q - values, c.tau), m)
            conservative = sum(masked_mean(conservative_loss(q, tokens), m) for q in all_q) / 2
            nll = -masked_mean(logp, m)
            loss = q_loss + value_loss + c.conservatism * conservative + c.imitation * nll
            named = {"q_loss": q_loss, "value_loss": value_loss, "conservative_loss": conservative, "nll": nll}
            return loss, named | {"value": masked_mean(values, m)}  # type: ignore[dict-item]

        for step, steps, rows in passes(
            len(log), c.batch_size, self.seed, epochs=c.epochs, updates=updates, start=start
        ):
            self.descent.begin(step / steps)
            metrics = self.descent.step(loss_of, rows, lengths, c.micro_batch_size)
            self._follow()
            yield {**metrics, "learning_rate": self.descent.current_rate}

    @property
    def policy(self) -> CausalLM:
        """The perturbed policy ∝ π_log exp(perturbation · (Q − V)), where V, the same for all tokens, drops out.

        Q being linear in the hidden state, it is an ordinary language model with the output layer W + perturbation · Q
        (times the law's temperature, by which logits are divided).
        """
        extracted = copy.deepcopy(self.model)
        model: Any = extracted.model
        old, (first, second) = model.get_output_embeddings(), self.targets.parameters()
        layer = nn.Linear(*reversed(old.weight.shape), bias=old.bias is not None).to(old.weight)
        with torch.no_grad():
            layer.weight.copy_(old.weight + self.temperature * self.config.perturbation * (first + second) / 2)
            if old.bias is not None:
                layer.bias.copy_(old.bias)
        model.config.tie_word_embeddings = False  # what reads a token stays as it is
        model.set_output_embeddings(layer)
        return extracted

    def _read(self, batch: Rollout) -> tuple[Tensor, Tensor]:
        """Log-probabilities [B, T] of the response's tokens, and hidden states [B, T, H] before each."""
        length = batch.response_ids.shape[1]
        logits, hidden = self.model.read(batch.input_ids, batch.attention_mask, keep=length + 1)
        positions = torch.arange(length, device=logits.device).expand(len(batch), length)
        log_probs = batch.law.log_probs(logits[:, :-1], positions)
        return gather_logp(log_probs, batch.response_ids), hidden[:, :-1].to(self.model.dtype)

    @torch.no_grad()
    def _follow(self) -> None:
        for slow, fast in zip(self.targets.parameters(), self.heads.parameters(), strict=True):
            slow.lerp_(fast, self.config.target_rate)

    def state_dict(self) -> dict[str, Any]:
        """State of the descent, and the heads."""
        return {
            "descent": self.descent.state_dict(),
            "heads": self.heads.state_dict(),
            "targets": self.targets.state_dict(),
            "temperature": self.temperature,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.descent.load_state_dict(state["descent"])
        self.heads.load_state_dict(state["heads"])
        self.targets.load_state_dict(state["targets"])
        self.temperature = state["temperature"]
