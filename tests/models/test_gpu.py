"""The same on a GPU: skipped where there is none."""

from __future__ import annotations

import copy
import os
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.models.scoring import teacher_forced_logp
from rlhf_env.records.run import Run
from rlhf_env.reward_models.classifier import ClassifierReward
from rlhf_env.training.agents import AGENTS
from rlhf_env.training.collect import collect
from rlhf_env.training.reward import run_reward
from rlhf_env.training.reward_kinds import KINDS
from rlhf_env.training.run import run_training
from rlhf_env.types import SamplingLaw
from tests.builders import PATHS, make_envs, random_model, read_by
from tests.models.test_blocks import FAMILIES, grow_restart_and_leave
from tests.models.test_blocks import model as blocks_model
from tests.processes import run_together
from tests.test_processes import numbers, trained_together
from tests.tiny_training import left_by, tiny_training
from tests.training.test_reward_kinds import TEXTS, files  # noqa: F401 (a fixture)
from tests.training.test_reward_kinds import config as reward_config

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic products ask for

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def on_gpu(policy: CausalLM) -> CausalLM:
    return policy.to("cuda")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("path", PATHS)
def test_a_gpu_reads_and_writes_what_the_cpu_does(family, path):
    here = read_by(random_model(family, dtype="float64"), path)
    there = on_gpu(read_by(random_model(family, dtype="float64"), path))
    envs = make_envs(reference=random_model(family, dtype="float64", seed=2))
    a, b = (collect(policy, envs, episodes=16, seed=3) for policy in (here, there))
    assert b.logp.is_cuda and torch.equal(a.response_ids, b.response_ids.cpu())
    within = 1e-9 if family == "gpt2" else 1e-5  # Llama's angles are in float32 whatever its weights are in
    for name in ("logp", "ref_logp", "values", "reward"):
        torch.testing.assert_close(getattr(b, name).cpu(), getattr(a, name), atol=within, rtol=0)
    torch.testing.assert_close(teacher_forced_logp(there, b), b.logp * b.response_mask, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_steps_that_are_replayed_are_those_of_the_cpu(name):
    law = SamplingLaw(11, 9, temperature=0.7, min_new_tokens=2, banned_tokens=(8,))
    there, here = (
        policy.decoder(4, law) for policy in (on_gpu(blocks_model(name, "float64")), blocks_model(name, "float64"))
    )
    grow_restart_and_leave([there, here], 1e-10 if name == "GPT2" else 1e-5)
    assert there.replays and not here.replays


def test_a_decoder_that_has_replayed_can_be_copied():
    decoder = on_gpu(random_model("llama")).decoder(2, SamplingLaw(8, None))
    decoder.start([0, 1], [[1, 2], [3]])
    decoder.append(np.array([4, 5]), [0, 1])
    copies = (decoder, copy.deepcopy(decoder), pickle.loads(pickle.dumps(decoder)))
    for one in copies:
        one.append(np.array([6, 7]), [0, 1])
        torch.testing.assert_close(one.log_probs, decoder.log_probs)


def test_a_hook_that_comes_while_it_replays_is_noticed():
    policy = on_gpu(random_model("llama"))
    decoder = policy.decoder(1, SamplingLaw(8, None))
    decoder.start([0], [[1, 2]])
    decoder.append(np.array([4]), [0])
    policy.model.register_forward_hook(lambda *_: None)
    with pytest.raises(AssertionError, match="hooks"):
        decoder.append(np.array([4]), [0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_cache_says_what_a_whole_pass_says(dtype):
    policy = on_gpu(random_model("llama", dtype=dtype))
    rollout = collect(policy, make_envs(reference=on_gpu(random_model("llama", dtype=dtype, seed=2))), episodes=16)
    assert rollout.logp.dtype == torch.float32
    difference = (teacher_forced_logp(policy, rollout) - rollout.logp)[rollout.response_mask].abs()
    assert difference.max() < (1e-4 if dtype == "float32" else 0.2)  # bfloat16 has three digits, of logits around 10


@pytest.mark.parametrize("agent", AGENTS)
def test_every_agent_trains_and_goes_on_there(agent, tmp_path):
    """In float64 as on the CPU; and interrupted and resumed as it was not, to the bit."""
    config = replace(tiny_training(tmp_path, agent), updates=4, checkpoint_every=2, dtype="float64")
    run_training(config, tmp_path / "cpu")
    torch.use_deterministic_algorithms(True)
    try:
        run_training(replace(config, device="cuda"), tmp_path / "gpu")

        def stop(row: dict[str, Any]) -> None:
            if row["update"] == 3:
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            run_training(replace(config, device="cuda"), tmp_path / "stopped", on_update=stop)
        run_training(replace(config, device="cuda"), tmp_path / "stopped", resume=True)
    finally:
        torch.use_deterministic_algorithms(False)
    without = {"accuracy"} if agent == "online_dpo" else ()
    for row, other in zip(*(numbers(Run(tmp_path / n).metrics, without) for n in ("cpu", "gpu")), strict=True):
        assert other == pytest.approx(row, abs=1e-6, rel=1e-6)
    assert left_by(tmp_path / "stopped") == left_by(tmp_path / "gpu")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_reward_model_learns_there(kind, files, tmp_path):  # noqa: F811 (a fixture)
    config = replace(reward_config(files, kind), dtype="float64")
    here, there = (
        run_reward(replace(config, device=device), tmp_path / device) | {"seconds": 0} for device in ("cpu", "cuda")
    )
    measured = {name: value for name, value in here.items() if isinstance(value, float)}
    assert {name: there[name] for name in measured} == pytest.approx(measured, abs=1e-6, rel=1e-6)
    scores = [
        ClassifierReward(tmp_path / device / "model", device=device, dtype=torch.float64).score(["p "] * 4, TEXTS)
        for device in ("cpu", "cuda")
    ]
    np.testing.assert_allclose(*scores, atol=1e-6)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two GPUs")
@pytest.mark.parametrize("spread", [False, True])
def test_two_gpus_train_as_one_does(spread, tmp_path):
    config = replace(tiny_training(tmp_path), device="cuda", dtype="float64", updates=3)
    trained_together({"one": config}, tmp_path)
    run_together(2, trained_together, {"two": replace(config, spread_weights=spread)}, tmp_path, err=tmp_path / "err")
    for row, other in zip(*(numbers(Run(tmp_path / n).metrics) for n in ("one", "two")), strict=True):
        assert other == pytest.approx(row, abs=1e-6, rel=1e-6)
