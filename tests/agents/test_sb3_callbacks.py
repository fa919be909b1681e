"""What SB3's logger and the terminal tell of finished episodes."""

from __future__ import annotations

import re

import numpy as np
import pytest
from stable_baselines3.common.callbacks import CallbackList, ConvertCallback
from stable_baselines3.common.vec_env import VecMonitor

from rlhf_env.agents.sb3 import RLHFMetrics, SB3VecEnv, TokenView
from rlhf_env.agents.sb3.callbacks import episode_means
from tests.agents.sb3 import make_model
from tests.builders import letter_score, make_envs

ANSI = re.compile(r"\x1b\[[0-9;]*m")


def test_means_are_over_finished_episodes_and_named_as_ours():
    infos = [
        {"score": 1.0, "kl": 2.0, "penalty": 0.0, "beta": 0.5, "response_length": 3, "stop_reason": "eos"},
        {"score": 3.0, "kl": 0.0, "penalty": 1.0, "beta": 0.5, "response_length": 6, "stop_reason": "length"},
    ]
    means = {"score": 2.0, "kl": 1.0, "penalty": 0.5, "beta": 0.5, "length": 4.5, "eos_rate": 0.5}
    assert episode_means(infos, charged=True) == {**means, "return": 1.0}  # (1 − 0.5 · 2 − 0) and (3 − 0 − 1)
    assert episode_means(infos, charged=False) == means
    assert episode_means([], charged=True) == {}


@pytest.mark.parametrize("kl_mode", ["reward", "observe"])
def test_the_return_is_what_episodes_were_paid(kl_mode):
    """Only where the KL is charged is it score − penalty − β·KL."""

    class Watched(RLHFMetrics):
        def _on_rollout_end(self):
            super()._on_rollout_end()
            logged.update({k: v for k, v in self.logger.name_to_value.items() if k.startswith("rlhf/")})

    logged: dict[str, float] = {}
    env = VecMonitor(SB3VecEnv(make_envs(4, kl_mode=kl_mode)))
    model = make_model(env).learn(32, callback=Watched())
    paid = np.mean([episode["r"] for episode in model.ep_info_buffer])
    if kl_mode == "reward":
        assert logged["rlhf/return"] == pytest.approx(paid, abs=1e-5)
    else:
        assert "rlhf/return" not in logged
        assert logged["rlhf/score"] - logged["rlhf/penalty"] == pytest.approx(paid, abs=1e-5) and logged["rlhf/kl"] != 0


def test_metrics_are_logged_for_every_rollout():
    def parts(prompts, responses):
        return {"letters": letter_score(prompts, responses), "short": [-0.1 * len(r) for r in responses]}

    told, logged = [], []

    class Watched(RLHFMetrics):
        def _on_step(self):
            told.append([i for i, over in zip(self.locals["infos"], self.locals["dones"], strict=True) if over])
            return super()._on_step()

        def _on_rollout_end(self):
            super()._on_rollout_end()
            logged.append({k: v for k, v in self.logger.name_to_value.items() if k.startswith("rlhf/")})

    make_model(SB3VecEnv(make_envs(4, reward_model=parts))).learn(64, callback=Watched())
    assert len(logged) == 2
    for rollout, values in enumerate(logged):
        infos = [info for step in told[8 * rollout : 8 * rollout + 8] for info in step]
        assert values["rlhf/kl"] == pytest.approx(np.mean([info["kl"] for info in infos]))
        assert values["rlhf/length"] == pytest.approx(np.mean([info["response_length"] for info in infos]))
        assert values["rlhf/score"] == pytest.approx(values["rlhf/score_letters"] + values["rlhf/score_short"])
        assert values["rlhf/beta"] == pytest.approx(0.3)
        assert values["rlhf/kl_k3"] >= 0 and 0 <= values["rlhf/eos_rate"] <= 1


def test_the_token_view_shows_a_finished_episode(capsys):
    ended = []

    def keep(found, _):
        ended.extend(info for info, over in zip(found["infos"], found["dones"], strict=True) if over)
        return True

    env = SB3VecEnv(make_envs(4))
    make_model(env).learn(96, callback=CallbackList([ConvertCallback(keep), TokenView(every=40)]))
    shown = [ANSI.sub("", text) for text in capsys.readouterr().out.split("stop_reason")[:-1]]
    assert len(shown) == 2, "one after 40 steps and one 40 later"
    codec = env.core.task.codec
    for text in shown:
        (info,) = (i for i in ended if f"score {i['score']:.4g} · kl {i['kl']:.4g} " in text)
        last = info["terminal_observation"]
        whole = last["input_ids"][last["attention_mask"] > 0].tolist()
        assert "".join(codec.pieces(whole)) in text
        kl = next(line for line in text.splitlines() if line.startswith("kl")).split()[1:]
        assert sum(map(float, kl)) == pytest.approx(info["kl"], abs=0.005 * len(kl) + 1e-6)
