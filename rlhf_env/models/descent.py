"""Gradient steps: guarded ones for agents, and the loop that fine-tuning and reward models share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn

from rlhf_env import processes
from rlhf_env.errors import ConfigError, NonFiniteError
from rlhf_env.models.sharding import is_part, part, part_of, whole
from rlhf_env.settings import BradleyTerryConfig, SFTConfig

_HALF = (torch.bfloat16, torch.float16)
_FUSED = ("cpu", "cuda")  # where Adam's step is one operation

#: The loss of the rows with these numbers, a mean over whatever they weigh by, and metrics that are means likewise.
LossOf = Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]


class StepSettings(Protocol):
    """What the settings of every agent say of its steps."""

    @property
    def learning_rate(self) -> float: ...  # noqa: D102 (each config says it)
    @property
    def anneal(self) -> bool: ...  # noqa: D102
    @property
    def max_grad_norm(self) -> float: ...  # noqa: D102


class Descent:
    """Adam for an agent: clipped gradients, a learning rate that may fall to 0, and no step on what is not finite.

    Of weights in half precision, in which small steps would vanish, it keeps and steps on a copy in float32.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        learning_rate: float,
        *,
        anneal: bool = True,
        max_grad_norm: float = 1.0,
        adam_eps: float = 1e-5,
    ) -> None:
        for name, value in (("max_grad_norm", max_grad_norm), ("adam_eps", adam_eps)):
            if not 0 < value:
                raise ConfigError(f"{name} must be above 0, it is {value}")
        if not 0 <= learning_rate < float("inf"):
            raise ConfigError(f"learning_rate must be at least 0 and finite, it is {learning_rate}")
        self.parameters = [p for p in parameters if p.requires_grad]
        if not self.parameters:
            raise ConfigError("no weight may change: the policy is frozen, as references are; train a copy that is not")
        self.masters = [part(p).detach().float() if p.dtype in _HALF else part(p) for p in self.parameters]
        fused = all(p.device.type in _FUSED for p in self.masters)
        self.optimizer = torch.optim.Adam(self.masters, lr=learning_rate, eps=adam_eps, fused=fused)
        self.learning_rate, self.anneal, self.max_grad_norm = learning_rate, anneal, max_grad_norm
        self.updates = 0  # begun so far

    @classmethod
    def of(cls, parameters: Iterable[nn.Parameter], config: StepSettings, *, adam_eps: float = 1e-5) -> Self:
        """The descent that an agent's settings describe."""
        rate, norm = config.learning_rate, config.max_grad_norm
        return cls(parameters, rate, anneal=config.anneal, max_grad_norm=norm, adam_eps=adam_eps)

    def begin(self, progress: float) -> int:
        """Begin an update at this part of the budget, which decides its learning rate; returns its number, from 0."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * (1 - progress if self.anneal else 1)
        self.updates += 1
        return self.updates - 1

    @property
    def current_rate(self) -> float:
        """The learning rate of the present update."""
        return self.optimizer.param_groups[0]["lr"]

    def step(
        self, loss_of: LossOf, rows: Tensor, weight: Tensor | None = None, micro_batch_size: int = 0
    ) -> dict[str, float]:
        """One step on the loss of `rows` [M], computed `micro_batch_size` rows at a time (0: all at once).

        `weight` [B] says how much each row counts in the mean that the loss is (its tokens, say; none: all alike), so
        that the gradient is that of all rows at once; where several `processes` work together, each computes its share
        of them, with the same result. Returns the metrics' means (of those called `max_…` the largest; of one that
        weighs rows differently, as a mean over tokens does without `weight`, the mean of its parts) and
        `gradient_norm`, before it was clipped. Raises `NonFiniteError`, with no weight touched, where the loss or its
        gradient is not finite.
        """
        weights = torch.ones_like(rows) if weight is None else weight[rows]
        mine, total = processes.share(len(rows)), weights.sum().item()
        most = -(-len(rows) // processes.count())
        parts = -(
            -most // (micro_batch_size or most)
        )  # as many in every process, since they may run the model together
        for p in self.parameters:
            p.grad = None
        seen = []
        for chosen, chosen_weights in zip(
            rows[mine].tensor_split(parts), weights[mine].tensor_split(parts), strict=True
        ):
            # A process without a row of its own goes through the motions with another's, which weighs nothing.
            some = chosen if len(chosen) else rows[:1]
            share = chosen_weights.sum().item() / total
            loss, metrics = processes.agreed(partial(self._finite, loss_of, some))
            (loss * share).backward()
            seen.append((share, {name: value.item() for name, value in metrics.items()}))
        found = _over_parts([each for those in processes.gather(seen) for each in those])
        norm = self._take_gradients()
        if not torch.isfinite(norm):
            raise NonFiniteError(
                f"the gradient of {_named(rows)} became non-finite in update {self.updates}; the step was not taken"
            )
        if norm > self.max_grad_norm:
            nn.utils.clip_grads_with_norm_(self.masters, self.max_grad_norm, norm)
        self.optimizer.step()
        with torch.no_grad():
            for master, p in zip(self.masters, self.parameters, strict=True):
                if p.dtype in _HALF:
                    part(p).copy_(master)
        return {**found, "gradient_norm": norm.item()}

    def _finite(self, loss_of: LossOf, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = loss_of(rows)
        if not torch.isfinite(loss):
            raise NonFiniteError(
                f"the loss of {_named(rows)} became non-finite in update {self.updates}; the step was not taken"
            )
        return loss, metrics

    def _take_gradients(self) -> Tensor:
        """Lay the gradients of all processes' rows where the optimizer looks for them; returns their norm."""
        for master, p in zip(self.masters, self.parameters, strict=True):
            master.grad = None if p.grad is None else part(p.grad).to(master.dtype)
            if p.dtype in _HALF:
                p.grad = None  # there is one in float32 now
        spread, single = ([], [])
        for master, p in zip(self.masters, self.parameters, strict=True):
            if master.grad is not None:
                (spread if is_part(p) else single).append(master.grad)
        processes.add_up(single)
        if not spread:
            return nn.utils.get_total_norm(single)
        for gradient in spread:
            gradient.mul_(processes.count())  # what is there is their mean
        processes.add_up([squares := nn.utils.get_total_norm(spread).square()])
        return (squares + nn.utils.get_total_norm(single).square()).sqrt()

    def state_dict(self) -> dict[str, Any]:
        """Adam's state, the copies in float32 if there are any, and the number of updates begun."""
        copies = [whole(m, p) for m, p in self._copies]
        optimizer = _moved(self.optimizer.state_dict(), self.parameters, whole)
        return {"optimizer": optimizer, "copies": copies, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.optimizer.load_state_dict(_moved(state["optimizer"], self.parameters, part_of))
        for (copy, p), saved in zip(self._copies, state["copies"], strict=True):
            copy.copy_(part_of(saved, p))
        self.updates = state["updates"]

    @property
    def _copies(self) -> list[tuple[Tensor, Tensor]]:
        """The float32 copies, each with the weight that it is of."""
        return [(m, p) for m, p in zip(self.masters, self.parameters, strict=True) if p.dtype in _HALF]


def _moved(
    state: dict[str, Any], weights: Sequence[Tensor], move: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, Any]:
    """Adam's state with every tensor of it as `move` makes it for its weight."""
    by_weight = {
        number: {name: move(value, weights[number]) for name, value in those.items()}
        for number, those in state["state"].items()
    }
    return {**state, "state": by_weight}


def require_finite_logp(logp: Tensor, mask: Tensor, rows: Tensor) -> None:
    """Raise `NonFiniteError` naming the first of the episodes `rows` [M] whose `logp` [M, T] is not finite."""
    if (broken := (~torch.isfinite(logp) & mask).any(1)).any():
        raise NonFiniteError(
            f"the log-probabilities of episode {rows[broken][0]} of the batch became non-finite; the step was not taken"
        )


def minibatches(
    size: int, count: int, shuffle: np.random.Generator, device: torch.device | str = "cpu"
) -> Iterator[Tensor]:
    """The numbers 0 … size − 1 in a random order, as `count` int64 tensors of nearly equal length, or fewer."""
    for rows in np.array_split(shuffle.permutation(size), min(count, size)):
        yield torch.from_numpy(rows).to(device)


def passes(
    size: int, batch_size: int, seed: int, *, epochs: int, updates: int | None = None, start: int = 0
) -> Iterator[tuple[int, int, Tensor]]:
    """(step, steps, rows [M]) of each gradient step over `size` fixed examples, from step number `start` on.

    Every epoch shuffles anew, by (seed, epoch) alone. There are as many steps as `epochs` hold, or `updates`.
    """
    per_epoch = -(-size // batch_size)
    steps = epochs * per_epoch if updates is None else updates
    for step in range(start, steps):
        epoch, part = divmod(step, per_epoch)
        order = np.random.default_rng([seed, epoch]).permutation(size)
        yield step, steps, torch.from_numpy(order[part * batch_size : (part + 1) * batch_size])


def _is_max(name: str) -> bool:
    return name.startswith("max_")


def _over_parts(parts: Sequence[tuple[float, dict[str, float]]]) -> dict[str, float]:
    """The metrics of all rows from those of their parts, each with its share of the rows."""
    return {
        name: max(metrics[name] for _, metrics in parts)
        if _is_max(name)
        else sum(metrics[name] * share for share, metrics in parts)
        for name in parts[0][1]
    }


def mean_metrics(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric over gradient steps; the largest of those called `max_…`."""
    return {
        name: float((np.max if _is_max(name) else np.mean)([step[name] for step in steps]))
        for name in (steps[0] if steps else {})
    }


def _named(rows: Tensor) -> str:
    first = ", ".join(map(str, rows[:8].tolist()))
    return f"episode{'s' if len(rows) > 1 else ''} {first}{', …' if len(rows) > 8 else ''} of the batch"


def descend(
    parameters: Sequence[nn.Parameter],
    examples: int,
    loss_of: Callable[[list[int]], tuple[Tensor, dict[str, float]]],
    config: SFTConfig | BradleyTerryConfig,
    seed: int,
) -> Iterator[dict[str, float]]:
    """AdamW with a learning rate that falls linearly to 0 and gradients clipped at norm 1, yielding a row per step.

    `loss_of` gives the loss of a batch of example numbers, and what else its row shall say. The order depends on
    (seed, epoch) alone. Raises `NonFiniteError`, with the weights as they were, where a gradient breaks.
    """
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    for step, steps, rows in passes(examples, config.batch_size, seed, epochs=config.epochs):
        loss, facts = loss_of(rows.tolist())
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * (1 - step / steps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        if not torch.isfinite(norm):
            raise NonFiniteError(f"the gradient became non-finite in step {step}; the step was not taken")
        optimizer.step()
        yield {"step": step + 1, "steps": steps, "loss": loss.item(), **facts, "gradient_norm": norm.item()}
