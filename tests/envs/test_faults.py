"""After something went wrong nothing wrong is charged, and what was refused has changed nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rlhf_env.envs.binding import bind_policy
from rlhf_env.errors import MissingLogProbError, PromptTooLongError
from tests.builders import EOS, make_env, make_envs, random_model


class Failing:
    """A decoder whose `append` or `start` stops half-way when told to, as one does that runs out of memory."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.fails = inner, ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def _do(self, name: str, *arguments: Any) -> None:
        if self.fails == name:
            raise MemoryError
        getattr(self.inner, name)(*arguments)

    def start(self, *arguments: Any) -> None:
        self._do("start", *arguments)

    def append(self, *arguments: Any) -> None:
        self._do("append", *arguments)


class Reference:
    """A reference whose decoder can be made to fail."""

    def __init__(self) -> None:
        self.model = random_model()
        self.tokenizer, self.evaluate, self.parameters = (
            getattr(self.model, name) for name in ("tokenizer", "evaluate", "parameters")
        )
        self.made: list[Failing] = []

    def decoder(self, num_rows: int, law: Any) -> Failing:
        self.made.append(Failing(self.model.decoder(num_rows, law)))
        return self.made[-1]


@pytest.mark.parametrize("call", ["append", "start"])
def test_no_step_is_charged_by_a_reference_that_stopped_half_way(call):
    reference = Reference()
    envs, sound = make_envs(2, reference=reference), make_envs(2)
    for each in (envs, sound):
        bind_policy(each, lambda observation, actions: np.full(2, -1.0))
        each.reset(seed=0)
    reference.made[0].fails = call
    with pytest.raises(MemoryError):
        envs.step(np.array([EOS, 3]))  # the first is begun again in the same step, the second goes on
    reference.made[0].fails = ""
    with pytest.raises(RuntimeError, match="environment 0 is over .* reset it first"):
        envs.step(np.array([1, 3]))
    envs.reset(options={"reset_mask": np.array([True, False])})
    with pytest.raises(RuntimeError, match="environment 1 is over"):  # it shared the decoder
        envs.step(np.array([1, 3]))
    for each in (envs, sound):
        each.reset(seed=1)
    for actions in ([1, 2], [3, 4]):
        np.testing.assert_allclose(envs.step(np.array(actions))[1], sound.step(np.array(actions))[1], atol=1e-6)


def test_what_was_pushed_before_a_reset_is_not_charged_after_it():
    envs = make_envs(2)
    envs.reset(seed=0)
    envs.push_logprobs([-1.0, -1.0], [3, 4])
    envs.reset(seed=5)
    with pytest.raises(MissingLogProbError, match="no log-probabilities were pushed for this step"):
        envs.step(np.array([3, 4]))


@pytest.mark.parametrize("kwargs", [{"kl_mode": "observe"}, {"beta": 0.0}], ids=["observe", "free"])
def test_a_policy_that_is_known_for_some_tokens_only_has_no_kl(kwargs):
    env = make_env(**kwargs)
    env.reset(seed=0)
    env.step(1)
    bind_policy(env, random_model())
    *_, info = env.step(EOS)
    assert {"logp", "ref_logp"} <= info.keys() and not {"kl", "kl_k2", "kl_k3"} & info.keys()
    env.reset(seed=0)
    env.step(1)
    assert env.step(EOS)[4]["kl"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("make", [make_env, make_envs])
def test_a_refused_reset_draws_no_prompt_and_no_seed(make):
    env = make()
    env.reset(seed=3)
    before = env.state_dict()
    given = "abcabcabc" if make is make_env else [None, None, "abcabcabc"]
    with pytest.raises(PromptTooLongError):
        env.reset(seed=1, options={"prompt": given})
    assert env.state_dict() == before


@pytest.mark.parametrize("make", [make_env, make_envs])
def test_an_option_that_nobody_would_read_is_refused(make):
    with pytest.raises(ValueError, match="reset knows no option 'prompts'; there are prompt"):
        make().reset(options={"prompts": "abc"})
