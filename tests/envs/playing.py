"""Stepping environments through given responses, for the tests of the token MDP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode

from rlhf_env.envs.binding import bind_policy
from rlhf_env.envs.single import TextGenerationEnv
from rlhf_env.types import Rollout
from tests.builders import make_envs


def action_of(env: TextGenerationEnv, observation: dict[str, Any], token: int) -> int:
    """The action that writes `token`: its id, or its rank among the candidates."""
    if env.task.action == "token":
        return token
    return observation["candidates"].tolist().index(token)


def play(
    env: TextGenerationEnv, tokens: Sequence[int], prompt: str | None = "ab", seed: int | None = 0
) -> tuple[list[float], list[dict[str, Any]]]:
    """The rewards and infos of one episode that writes `tokens` and ends with the last of them."""
    observation, _ = env.reset(seed=seed, options={"prompt": prompt})
    rewards, infos, over = [], [], False
    for token in tokens:
        assert not over
        observation, reward, terminated, truncated, info = env.step(action_of(env, observation, token))
        over = terminated or truncated
        rewards.append(reward)
        infos.append(info)
    assert over
    return rewards, infos


def step_through(rollout: Rollout, policy: Any, **kwargs: Any) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Rewards [B, T] and last infos of the environment `make_envs(**kwargs)`, given the rollout's tokens."""
    total, width = rollout.response_ids.shape
    envs = make_envs(total, autoreset_mode=AutoresetMode.SAME_STEP, **kwargs)
    if policy is not None:
        bind_policy(envs, policy)
    decode = envs.task.codec.decode
    prompts = [decode(ids[mask].tolist()) for ids, mask in zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)]
    observation, _ = envs.reset(seed=0, options={"prompt": prompts})
    rewards, last, alive = np.zeros((total, width)), [{} for _ in range(total)], np.ones(total, dtype=bool)
    for t in range(width):
        assert (rollout.response_mask[:, t].numpy() == alive).all(), "both end at the same token"
        tokens = rollout.response_ids[:, t].numpy()
        actions = envs.action_masks().argmax(1)  # of rows that are over: anything that is allowed
        for i in np.flatnonzero(alive).tolist():
            actions[i] = tokens[i]
            if envs.task.action == "candidate":
                actions[i] = observation["candidates"][i].tolist().index(tokens[i])
        observation, reward, terminated, _, info = envs.step(actions)
        rewards[alive, t] = reward[alive]
        for i in np.flatnonzero(terminated & alive).tolist():
            final = info["final_info"]
            last[i] = {k: v[i] for k, v in final.items() if k[0] != "_" and final[f"_{k}"][i]}
        alive &= ~terminated
    assert not alive.any()
    return rewards, last
