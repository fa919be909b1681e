"""Agents by name."""

import pytest

from rlhf_env.agents.ppo import PPO, PPOConfig
from rlhf_env.errors import ConfigError
from rlhf_env.training.agents import AGENTS, agent_class, agent_config, agent_settings, check_agent, describe_agents
from rlhf_env.training.config import EnvConfig, TrainConfig

_MINE = """
from dataclasses import dataclass

@dataclass(frozen=True)
class Config:
    rate: float = 0.5  #: how fast

class Mine:
    '''Learns nothing.'''
    def __init__(self, policy, config: Config = Config(), *, seed=0):
        self.policy, self.config, self.batch_size = policy, config, 4
    def update(self, rollout, progress=0.0):
        return {}
    def state_dict(self):
        return {}
    def load_state_dict(self, state):
        pass

class Bare(Mine):
    def __init__(self, policy):
        pass

class Half:
    def update(self, rollout, progress=0.0):
        return {}

class Reader:
    learns_from = "pairs"
    __init__, state_dict, load_state_dict = Mine.__init__, Mine.state_dict, Mine.load_state_dict
    def fit(self, data, *, updates=None, start=0):
        yield {}

class Unsaid:
    fit = state_dict = load_state_dict = None

class Gossip(Reader):
    learns_from = "hearsay"
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "my_agents.py").write_text(_MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "my_agents", raising=False)


def test_every_registered_agent_exists_and_is_described():
    descriptions = describe_agents()
    for name in AGENTS:
        assert agent_class(name).__doc__.partition("\n")[0] == descriptions[name] != ""


@pytest.mark.parametrize("name", AGENTS)
def test_every_setting_of_every_agent_has_its_sentence(name):
    settings = agent_settings(agent_class(name))
    assert settings and all(settings.values()), [key for key, sentence in settings.items() if not sentence]


def test_our_agents_are_imported_from_one_place():
    from rlhf_env import agents

    assert (agents.PPO, agents.PPOConfig) == (PPO, PPOConfig)


def test_settings_become_the_agents_own_config():
    assert agent_config(PPO, {"learning_rate": "3e-4", "epochs": 2}) == PPOConfig(learning_rate=3e-4, epochs=2)
    with pytest.raises(ConfigError, match=r"no setting settings\.learning_rte; did you mean settings\.learning_rate\?"):
        agent_config(PPO, {"learning_rte": 1})
    with pytest.raises(ConfigError, match=r"settings\.epochs must be a whole number, it is 'two'"):
        agent_config(PPO, {"epochs": "two"})


def test_your_own_class_is_an_agent(mine):
    found = agent_class("my_agents:Mine")
    assert agent_config(found, {"rate": 1}).rate == 1.0
    assert agent_settings(found) == {"settings.rate=0.5": "how fast"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"agent": "my_agents:Mine", "data": "x"}, "my_agents:Mine learns from what it samples itself: leave data out"),
        ({"agent": "my_agents:Reader"}, "my_agents:Reader samples nothing: it needs data, a file of comparisons, for"),
        ({"agent": "my_agents:Reader", "tokens": 9}, "it needs data"),
        (
            {"agent": "my_agents:Reader", "data": "x", "queries": 9},
            "samples nothing, so queries cannot be its budget: give updates",
        ),
        ({"agent": "my_agents:Reader", "data": "x", "settings": {"rte": 1}}, "did you mean settings.rate"),
        (
            {"agent": "my_agents:Reader", "data": "x", "env": EnvConfig(target_kl=6.0)},
            "samples nothing, so env.target_kl has no β to change: leave it out",
        ),
        ({"agent": "my_agents:Reader", "data": "x", "env": EnvConfig(final_beta=0.1)}, "env.final_beta has no β"),
        ({"agent": "sb3:PPO", "data": "x"}, "sb3:PPO learns from what it samples itself"),
        ({"agent": "sb3:PPo"}, "did you mean sb3:PPO"),
    ],
)
def test_what_an_agent_is_told_must_make_sense_to_it(mine, settings, message):
    with pytest.raises(ConfigError, match=message):
        check_agent(TrainConfig(policy="p", prompts="p", reward="r", **settings))


def test_an_agent_that_learns_from_data_may_have_updates_or_no_budget(mine):
    paths = {"policy": "p", "prompts": "p", "reward": "r", "agent": "my_agents:Reader", "data": "x"}
    check_agent(TrainConfig(**paths))
    check_agent(TrainConfig(**paths, updates=3))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pppo", "unknown agent 'pppo'; did you mean 'ppo'"),
        ("zzz", "known are ppo, .*sb3:PPO"),
        ("no_such_module:X", "cannot import 'no_such_module'"),
        ("my_agents:Mime", "has no class of that name; did you mean 'Mine'"),
        ("my_agents:Half", r"is no agent: it lacks state_dict, load_state_dict \(see rlhf_env\.types\.Agent\)"),
        ("my_agents:Unsaid", r"is no agent: it lacks learns_from \(see rlhf_env\.types\.OfflineAgent\)"),
        ("my_agents:Gossip", "learns from 'hearsay'; learns_from must be one of pairs, log"),
    ],
)
def test_an_agent_that_is_none_is_refused(mine, name, message):
    with pytest.raises(ConfigError, match=message):
        agent_class(name)


def test_an_agent_without_a_config_says_how_agents_are_made(mine):
    with pytest.raises(ConfigError, match=r"must be made as Bare\(policy, config, \*, seed\)"):
        agent_config(agent_class("my_agents:Bare"), {})
