"""ILQL: its loss written out, the policy that it extracts, and what it makes of a log."""

from __future__ import annotations

import dataclasses
import json
import math
from itertools import islice
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from rlhf_env.agents.ilql import ILQL, ILQLConfig
from rlhf_env.errors import ConfigError, NonFiniteError
from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.models.scoring import teacher_forced_logp
from rlhf_env.text.tokenizers import char_tokenizer
from rlhf_env.types import Rollout, SamplingLaw
from tests.agents.gradients import STILL, assert_gradient_is_that_of, read, sampled
from tests.builders import ALPHABET, EOS, random_model


def taught(policy: CausalLM, **settings: Any) -> ILQL:
    """An agent whose heads are four different random matrices, and its value head is not 0."""
    agent, draw = ILQL(policy, ILQLConfig(**settings), seed=3), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in [*agent.heads.parameters(), *agent.targets.parameters(), policy.value_head.weight]:
            p.copy_(0.3 * torch.randn(p.shape, generator=draw, dtype=p.dtype))
    return agent


def tied_llama(dtype: str = "float32") -> CausalLM:
    tokenizer = char_tokenizer(ALPHABET)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, initializer_range=0.3, tie_word_embeddings=True,
    )  # fmt: skip
    return CausalLM.from_config(config, tokenizer, seed=1, dtype=dtype)


MODELS = {
    "gpt2": lambda: random_model(seed=1),  # whose embeddings are tied
    "llama": lambda: random_model("llama", seed=1),
    "tied llama": tied_llama,
}


def log(process: bool = True) -> Rollout:
    """Six logged responses with something on every token, or on the last one only; the padding holds NaN."""
    rollout, draw = sampled(), torch.Generator().manual_seed(7)
    reward = torch.randn(rollout.reward.shape, generator=draw, dtype=torch.float64)
    if not process:
        reward[torch.arange(rollout.reward.shape[1]) < (rollout.lengths - 1).unsqueeze(1)] = 0
    return dataclasses.replace(rollout, reward=reward.masked_fill(~rollout.response_mask, torch.nan))


@pytest.mark.parametrize("process", [True, False])
def test_the_loss_is_the_paper_written_out(process):
    """Over unpadded rows: Q → r + γV(next), 0 after the last token; V → the lower of two slow Q, by expectile."""
    gamma, tau = 0.9, 0.8
    agent = taught(
        random_model(dtype="float64", seed=1),
        **STILL, batch_size=6, gamma=gamma, tau=tau, conservatism=0.3, imitation=0.7,
    )  # fmt: skip
    written = taught(random_model(dtype="float64", seed=1))
    data = log(process)
    metrics = next(agent.fit(data))
    q_losses, value_losses, conservative, nll = [], [], [], []
    for i, (logp, _, values) in enumerate(read(written.model, data)):
        n, prompt = len(logp), data.prompt_ids[i][data.prompt_mask[i]].tolist()
        tokens = data.response_ids[i, :n].tolist()
        output = written.model.model(torch.tensor([prompt + tokens]), output_hidden_states=True)  # type: ignore[operator]
        hidden = output.hidden_states[-1][0, len(prompt) - 1 : -1]
        for t, token in enumerate(tokens):
            after = values[t + 1].item() if t + 1 < n else 0.0
            target = data.reward[i, t] + gamma * after
            for head in written.heads:
                q = hidden[t] @ head.weight.T  # type: ignore[union-attr]
                q_losses.append((q[token] - target) ** 2 / 2)
                conservative.append((q.exp().sum().log() - q[token]) / 2)
            slow = min((hidden[t] @ head.weight[token]).item() for head in written.targets)  # type: ignore[union-attr]
            u = slow - values[t]
            value_losses.append((tau if u > 0 else 1 - tau) * u**2)
            nll.append(-logp[t])
    parts = [torch.stack(x).sum() / len(nll) for x in (q_losses, value_losses, conservative, nll)]
    for name, part in zip(("q_loss", "value_loss", "conservative_loss", "nll"), parts, strict=True):
        assert metrics[name] == pytest.approx(part.item()), name
    loss = parts[0] + parts[1] + 0.3 * parts[2] + 0.7 * parts[3]
    assert_gradient_is_that_of(loss, written.model, agent.model)
    for ours, theirs in zip(agent.heads, written.heads, strict=True):
        (gradient,) = torch.autograd.grad(loss, theirs.weight, retain_graph=True)  # type: ignore[arg-type]
        torch.testing.assert_close(ours.weight.grad, gradient, atol=1e-9, rtol=1e-7)
    assert all(p.grad is None for p in agent.targets.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_the_extracted_policys_logits_are_the_models_plus_what_is_worth_more(name):
    agent = taught(MODELS[name](), perturbation=2.5)
    ids, mask = torch.tensor([[0, 1, 2, 3], [9, 10, 4, 5]]), torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]]).bool()
    before = [p.clone() for p in agent.model.parameters()]
    with torch.no_grad():
        logits, hidden = agent.model.read(ids, mask, keep=2)
        found, again = agent.policy.read(ids, mask, keep=2)
        q = sum(head(hidden) for head in agent.targets) / 2
    torch.testing.assert_close(found, logits + 2.5 * q, atol=1e-5, rtol=0)
    assert torch.equal(again, hidden)  # tied or not, what reads a token is as it was
    assert all(torch.equal(a, b) for a, b in zip(before, agent.model.parameters(), strict=True))
    model: Any = agent.model.model
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (name != "llama") == model.config.tie_word_embeddings


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_policy_says_the_same_when_it_is_loaded(name, tmp_path):
    policy = taught(MODELS[name]()).policy
    policy.save_pretrained(tmp_path)
    loaded = CausalLM.from_pretrained(tmp_path)
    rollout = Rollout.of_tokens([[0, 1], [2]], [[3, 4, EOS], [5, EOS]], SamplingLaw(11, EOS))
    assert torch.equal(teacher_forced_logp(policy, rollout), teacher_forced_logp(loaded, rollout))
    assert torch.equal(policy.value_head.weight, loaded.value_head.weight)


@pytest.mark.parametrize("name", MODELS)
def test_nothing_ties_the_extracted_policy_again(name, tmp_path):
    """Its config says what it is, to whoever loads it, and to those who tie weights by what a config says."""
    policy = taught(MODELS[name]()).policy
    rollout = Rollout.of_tokens([[0, 1], [2]], [[3, 4, EOS], [5, EOS]], SamplingLaw(11, EOS))
    before = teacher_forced_logp(policy, rollout)
    model: Any = policy.model
    model.tie_weights()
    assert torch.equal(teacher_forced_logp(policy, rollout), before)
    policy.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["tie_word_embeddings"] is False


def test_without_a_perturbation_it_is_the_logs_own_policy():
    agent = taught(random_model(seed=1), perturbation=0.0)
    rollout = Rollout.of_tokens([[0, 1], [2]], [[3, 4, EOS], [5, EOS]], SamplingLaw(11, EOS))
    assert torch.equal(teacher_forced_logp(agent.policy, rollout), teacher_forced_logp(agent.model, rollout))


def test_the_targets_follow_after_every_gradient_step():
    agent = taught(random_model(dtype="float64", seed=1), learning_rate=1e-2, batch_size=3, target_rate=0.25)
    slow = [p.clone() for p in agent.targets.parameters()]
    for _ in islice(agent.fit(log()), 2):
        slow = [0.75 * old + 0.25 * new for old, new in zip(slow, agent.heads.parameters(), strict=True)]
    for found, wanted in zip(agent.targets.parameters(), slow, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)


def test_what_stands_in_the_padding_reaches_nothing():
    data, results = log(), []
    padding = ~data.response_mask
    for poison in (0.0, 1e6, math.nan):
        fields = ("logp", "ref_logp", "reward", "values")
        ids = data.response_ids.masked_fill(padding, 3 if poison else 10)
        floats = {name: getattr(data, name).masked_fill(padding, poison) for name in fields}
        agent = taught(random_model(dtype="float64", seed=1), learning_rate=1e-2, batch_size=4, epochs=2)
        rows = list(agent.fit(dataclasses.replace(data, response_ids=ids, **floats)))
        results.append((rows, [*agent.model.parameters(), *agent.heads.parameters()]))
    for rows, weights in results[1:]:
        assert rows == results[0][0]
        assert all(torch.equal(a, b) for a, b in zip(weights, results[0][1], strict=True))


def test_micro_batches_have_the_gradient_of_the_batch():
    found = []
    for size in (0, 1, 4):
        agent = taught(random_model(dtype="float64", seed=1), **STILL, batch_size=6, micro_batch_size=size)
        row = next(agent.fit(log()))
        grads = [p.grad for p in [*agent.model.parameters(), *agent.heads.parameters()] if p.grad is not None]
        found.append((row, grads))
    for row, grads in found[1:]:
        assert row == pytest.approx(found[0][0], abs=1e-9)
        for a, b in zip(grads, found[0][1], strict=True):
            torch.testing.assert_close(a, b, atol=1e-9, rtol=0)


def test_continued_it_is_the_run_that_was_never_interrupted():
    """Heads and targets are part of the state."""
    settings: dict[str, Any] = {"learning_rate": 1e-2, "batch_size": 4, "target_rate": 0.2}
    whole, halves = (random_model(dtype="float64", seed=1) for _ in range(2))
    straight = ILQL(whole, ILQLConfig(**settings), seed=5)
    rows = list(straight.fit(log(), updates=5))
    agent, fresh = (ILQL(halves, ILQLConfig(**settings), seed=5) for _ in range(2))
    some = list(islice(agent.fit(log(), updates=5), 3))
    fresh.load_state_dict(agent.state_dict())
    assert some + list(fresh.fit(log(), updates=5, start=3)) == rows
    for a, b in zip((straight.policy, straight.heads), (fresh.policy, fresh.heads), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_it_prefers_what_was_worth_more_among_what_was_logged():
    """Half of a log writes a and gets 1, half writes b and gets 0; c, never written, is not tried."""
    law = SamplingLaw(11, EOS)
    data = Rollout.of_tokens([[3]] * 8, [[0, EOS], [1, EOS]] * 4, law)
    reward = torch.zeros(8, 2)
    reward[::2, 1] = 1
    agent = ILQL(random_model(seed=1), ILQLConfig(learning_rate=1e-2, batch_size=8, target_rate=0.5))
    list(agent.fit(dataclasses.replace(data, reward=reward), updates=150))
    likely = teacher_forced_logp(agent.policy, Rollout.of_tokens([[3]] * 3, [[0], [1], [2]], law))[:, 0].exp().tolist()
    own = teacher_forced_logp(agent.model, Rollout.of_tokens([[3]] * 3, [[0], [1], [2]], law))[:, 0].exp().tolist()
    assert own[0] == pytest.approx(0.5, abs=0.1) and own[1] == pytest.approx(0.5, abs=0.1)
    assert likely[0] > 0.9 and likely[2] < 0.01


def test_a_log_that_is_not_finite_is_refused_by_name():
    data = log()
    data.reward[4, 0] = torch.nan
    agent = taught(random_model(dtype="float64", seed=1))
    before = [p.clone() for p in agent.model.parameters()]
    with pytest.raises(NonFiniteError, match="reward of episode 4 of the batch"):
        next(agent.fit(data))
    assert all(torch.equal(a, b) for a, b in zip(before, agent.model.parameters(), strict=True))


@pytest.mark.parametrize(
    "settings", [{"tau": 1.1}, {"gamma": -0.1}, {"conservatism": -1.0}, {"perturbation": -1.0}, {"target_rate": 2.0}]
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ConfigError, match=f"ILQL needs {next(iter(settings))}"):
        ILQLConfig(**settings)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_extracted_policy_is_the_stated_one_at_any_temperature(temperature):
    """log π = log π_log + perturbation · (Q − V), normalised: under the law that divides logits by its temperature."""
    rollout = sampled()
    rollout = dataclasses.replace(rollout, law=dataclasses.replace(rollout.law, temperature=temperature))
    agent = taught(random_model(dtype="float64", seed=1), perturbation=2.5, learning_rate=0.0, target_rate=0.0)
    next(agent.fit(rollout))
    with torch.no_grad():
        log_probs = agent.model.response_log_probs(rollout)[0]
        _, hidden = agent.model.read(rollout.input_ids, rollout.attention_mask, keep=log_probs.shape[1] + 1)
        q = sum(head(hidden[:, :-1]) for head in agent.targets) / 2
        found = agent.policy.response_log_probs(rollout)[0]
    torch.testing.assert_close(found, (log_probs + 2.5 * q).log_softmax(-1), atol=1e-9, rtol=0)
