"""What is not finite stops a run before it is learned from: the sample is named, and the last checkpoint stays."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

from rlhf_env.errors import NonFiniteError, RewardError
from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.records.checkpoint import latest_checkpoint, load_checkpoint
from rlhf_env.records.config import to_dict
from rlhf_env.records.run import Run
from rlhf_env.training import loop
from rlhf_env.training.config import TrainConfig
from rlhf_env.training.run import run_training
from rlhf_env.types import Policy, Rollout
from tests.tiny_files import write_rows, write_tiny_files
from tests.tiny_training import tiny_training

#: Each breaks something in its third update, those that can in one episode, after it noted what all of them were asked.
_FAULTS = """
from dataclasses import replace

import torch
from rlhf_env.agents.dpo import DPO, DPOConfig
from rlhf_env.agents.ppo import PPO, PPOConfig
from tests.builders import letter_score

ROW, asked, before, calls = 5, [], [], []

def note(policy, rollout):
    prompts = zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)
    asked.extend(policy.tokenizer.decode(ids[mask].tolist()) for ids, mask in prompts)
    before.extend(p.detach().clone() for p in policy.parameters())

class Faulty(PPO):
    def __init__(self, policy, config: PPOConfig, *, seed=0):
        super().__init__(policy, config, seed=seed)

    def update(self, rollout, progress=0.0):
        calls.append(self)
        if len(calls) == 3:
            note(self.policy, rollout)
            rollout = self.fault(rollout)
        return super().update(rollout, progress)

class OldLogProbability(Faulty):
    def fault(self, rollout):
        rollout.logp[ROW, 0] = float("-inf")
        return rollout

class LogProbability(Faulty):
    def fault(self, rollout):
        evaluate, here = self.policy.evaluate, rollout.response_ids[ROW]
        def broken(batch):
            logp, values, entropy = evaluate(batch)
            hit = (batch.response_ids == here).all(1) & (batch.logp == rollout.logp[ROW]).all(1)
            return torch.where(hit[:, None], logp * float("nan"), logp), values, entropy
        self.policy.evaluate = broken
        return rollout

class Loss(Faulty):
    def fault(self, rollout):
        evaluate = self.policy.evaluate
        def broken(batch):
            logp, values, entropy = evaluate(batch)
            return logp, values + float("inf"), entropy
        self.policy.evaluate = broken
        return rollout

class Gradient(Faulty):
    def fault(self, rollout):
        next(self.policy.parameters()).register_hook(lambda gradient: gradient * float("nan"))
        return rollout

class OfPairs(DPO):
    def __init__(self, policy, config: DPOConfig, *, seed=0):
        super().__init__(policy, config, seed=seed)

    def fit(self, data, *, updates=None, start=0):
        for metrics in super().fit(data, updates=updates, start=start):
            yield metrics
            calls.append(self)
            if len(calls) == 2:
                note(self.policy, data.first)
                next(self.policy.parameters()).register_hook(lambda gradient: gradient * float("nan"))

def reward(prompts, responses):
    scores = letter_score(prompts, responses)
    calls.append(1)
    if len(calls) == 5:  # the policy and its reference before training, then updates 1, 2, 3
        asked.extend(responses)
        scores[ROW] = float("inf")
    return scores
"""


@pytest.fixture
def faults(tmp_path, monkeypatch):
    (tmp_path / "faults.py").write_text(_FAULTS, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "faults", raising=False)
    yield lambda: sys.modules["faults"]
    sys.modules.pop("faults", None)


def config_of(folder: Path, agent: str, **settings: object) -> TrainConfig:
    config = tiny_training(folder, agent)
    return replace(config, eval_every=0, checkpoint_every=1, settings={**config.settings, **settings})


def require_two_good_updates(out: Path) -> None:
    assert [row["update"] for row in Run(out).metrics] == [1, 2] and not Run(out).finished
    checkpoint = load_checkpoint(latest_checkpoint(out / "checkpoints"))
    assert checkpoint.step == 2
    assert all(torch.isfinite(p).all() for p in CausalLM.from_pretrained(checkpoint.path / "model").parameters())


@pytest.mark.parametrize(
    ("agent", "message"),
    [
        ("OldLogProbability", "logp of episode 5 of the batch is not finite; nothing was learned from it"),
        ("LogProbability", "the log-probabilities of episode 5 of the batch became non-finite; the step was not taken"),
    ],
)
def test_the_step_is_refused_and_its_sample_named(faults, agent, message, tmp_path):
    config = config_of(tmp_path, f"faults:{agent}", minibatches=1)
    with pytest.raises(NonFiniteError, match=f"^{message}; episode 5 was asked ") as caught:
        run_training(config, tmp_path / "run")
    broken: ModuleType = faults()
    episode, prompt = re.search(r'episode (\d) was asked "(.+)"$', str(caught.value)).groups()
    assert prompt == broken.asked[int(episode)]
    require_two_good_updates(tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(broken.calls[0].policy.parameters(), broken.before, strict=True))


@pytest.mark.parametrize("what", ["Loss", "Gradient"])
def test_of_several_none_is_blamed(faults, what, tmp_path):
    config = config_of(tmp_path, f"faults:{what}", minibatches=1)
    message = f"^the {what.lower()} of episodes .* of the batch became non-finite in update 3; the step was not taken$"
    require_refused(config, faults, message, tmp_path / "run")


def require_refused(config: TrainConfig, faults: Any, message: str, out: Path) -> None:
    """The third step is refused with this message, and the weights are those of two good ones."""
    with pytest.raises(NonFiniteError, match=message):
        run_training(config, out)
    broken: ModuleType = faults()
    require_two_good_updates(out)
    assert all(torch.equal(a, b) for a, b in zip(broken.calls[0].policy.parameters(), broken.before, strict=True))


@pytest.mark.parametrize("agent", ["remax", "soft_q", "bon_distillation", "rejection_sampling", "grpo"])
def test_every_agents_own_samples_are_named(agent, tmp_path, monkeypatch):
    def broken(policy: Policy, envs: Any, **kwargs: Any) -> Rollout:
        rollout = collect(policy, envs, **kwargs)
        own = not kwargs["greedy"] and not kwargs["stream"]
        calls.extend([1] if own else [])
        if own and len(calls) == 3:
            rollout.logp[5, 0] = float("-inf")
            asked.append(envs.task.codec.decode(rollout.prompt_ids[5][rollout.prompt_mask[5]].tolist()))
        return rollout

    calls, asked, collect = [], [], loop.collect
    monkeypatch.setattr(loop, "collect", broken)
    with pytest.raises(NonFiniteError, match="^logp of episode 5 of the batch is not finite; nothing was") as caught:
        run_training(config_of(tmp_path, agent), tmp_path / "run")
    assert str(caught.value).endswith(f'; episode 5 was asked "{asked[0]}"')


def test_a_row_of_what_was_chosen_is_none_of_the_batch(tmp_path, monkeypatch):
    def refuse(*_: Any) -> None:
        raise NonFiniteError("the log-probabilities of episode 1 of the batch became …; the step was not taken")

    monkeypatch.setattr("rlhf_env.agents.rejection_sampling.require_finite_logp", refuse)
    with pytest.raises(NonFiniteError, match="the step was not taken$"):
        run_training(config_of(tmp_path, "rejection_sampling"), tmp_path / "run")


def test_of_data_too(faults, tmp_path):
    config = config_of(tmp_path, "faults:OfPairs", batch_size=1)
    message = r'^the gradient of episode \d+ of the data became .* in update 3; .*; episode \d+ was asked "d"$'
    require_refused(config, faults, message, tmp_path / "run")


def test_a_score_is_refused_with_its_response(faults, tmp_path):
    config = replace(config_of(tmp_path, "ppo"), reward="faults:reward")
    with pytest.raises(RewardError, match="the first is inf in row 5, for the response") as caught:
        run_training(config, tmp_path / "run")
    assert str(caught.value).endswith(f'for the response "{faults().asked[5]}"')
    require_two_good_updates(tmp_path / "run")


def test_a_prompt_is_shown_safely(faults, tmp_path):
    folder, config = write_tiny_files(tmp_path / "words"), config_of(tmp_path, "faults:OldLogProbability")
    prompts = write_rows(tmp_path / "hostile.jsonl", *[{"prompt": f"{start} film\x1b[2J"} for start in ("the", "a")])
    with pytest.raises(NonFiniteError, match=r'was asked "(the|a) film‹U\+001B›\[2J"$'):
        run_training(replace(config, policy=str(folder / "policy"), prompts=prompts), tmp_path / "run")


@pytest.mark.parametrize("fault", [{"agent": "faults:Gradient"}, {"reward": "faults:reward"}])
def test_the_command_says_so_in_one_line(faults, command, fault, tmp_path):
    config = replace(config_of(tmp_path, fault.get("agent", "ppo")), **fault)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(config)), encoding="utf-8")
    code, out, err = command("train", "--config", tmp_path / "config.yaml", "--out", tmp_path / "run")
    assert (code, out, err.count("error")) == (1, "", 1) and err.splitlines()[-1].startswith("error: the ")
    require_two_good_updates(tmp_path / "run")
