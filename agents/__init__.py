"""Algorithms, one per file; each has a frozen dataclass of settings beside it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_env.agents.a2c import A2C as A2C
    from rlhf_env.agents.a2c import A2CConfig as A2CConfig
    from rlhf_env.agents.best_of_n import BestOfN as BestOfN
    from rlhf_env.agents.best_of_n import BestOfNConfig as BestOfNConfig
    from rlhf_env.agents.bon_distillation import BonDistillation as BonDistillation
    from rlhf_env.agents.bon_distillation import BonDistillationConfig as BonDistillationConfig
    from rlhf_env.agents.dpo import DPO as DPO
    from rlhf_env.agents.dpo import DPOConfig as DPOConfig
    from rlhf_env.agents.grpo import GRPO as GRPO
    from rlhf_env.agents.grpo import GRPOConfig as GRPOConfig
    from rlhf_env.agents.ilql import ILQL as ILQL
    from rlhf_env.agents.ilql import ILQLConfig as ILQLConfig
    from rlhf_env.agents.ipo import IPO as IPO
    from rlhf_env.agents.ipo import IPOConfig as IPOConfig
    from rlhf_env.agents.kto import KTO as KTO
    from rlhf_env.agents.kto import KTOConfig as KTOConfig
    from rlhf_env.agents.nlpo import NLPO as NLPO
    from rlhf_env.agents.nlpo import NLPOConfig as NLPOConfig
    from rlhf_env.agents.online_dpo import OnlineDPO as OnlineDPO
    from rlhf_env.agents.online_dpo import OnlineDPOConfig as OnlineDPOConfig
    from rlhf_env.agents.ppo import PPO as PPO
    from rlhf_env.agents.ppo import PPOConfig as PPOConfig
    from rlhf_env.agents.reinforce import Reinforce as Reinforce
    from rlhf_env.agents.reinforce import ReinforceConfig as ReinforceConfig
    from rlhf_env.agents.rejection_sampling import RejectionSampling as RejectionSampling
    from rlhf_env.agents.rejection_sampling import RejectionSamplingConfig as RejectionSamplingConfig
    from rlhf_env.agents.remax import ReMax as ReMax
    from rlhf_env.agents.remax import ReMaxConfig as ReMaxConfig
    from rlhf_env.agents.rloo import RLOO as RLOO
    from rlhf_env.agents.rloo import RLOOConfig as RLOOConfig
    from rlhf_env.agents.soft_q import SoftQ as SoftQ
    from rlhf_env.agents.soft_q import SoftQConfig as SoftQConfig

_MODULES = {
    "A2C": "a2c",
    "BestOfN": "best_of_n",
    "BonDistillation": "bon_distillation",
    "DPO": "dpo",
    "GRPO": "grpo",
    "ILQL": "ilql",
    "IPO": "ipo",
    "KTO": "kto",
    "NLPO": "nlpo",
    "OnlineDPO": "online_dpo",
    "PPO": "ppo",
    "Reinforce": "reinforce",
    "RejectionSampling": "rejection_sampling",
    "ReMax": "remax",
    "RLOO": "rloo",
    "SoftQ": "soft_q",
}


def __getattr__(name: str) -> Any:
    module = _MODULES.get(name.removesuffix("Config"))
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"rlhf_env.agents.{module}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES, *(f"{name}Config" for name in _MODULES)])
