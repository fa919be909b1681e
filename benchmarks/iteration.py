"""One iteration of PPO: ours, and Stable-Baselines3's through the bridge, beside a floor written by hand.

    python benchmarks/iteration.py                     # models of 1 M and 6 M parameters, 32 responses of 32 tokens
    python benchmarks/iteration.py --sizes 1M --tokens 16 32 64 128 256 --rounds 2
    python benchmarks/iteration.py --sizes 1M --batch 8 32 128 256 --rounds 2
    python benchmarks/iteration.py --memory            # the peak of each in a process of its own
    python benchmarks/iteration.py --peers .bench      # TRL, too, in environments that are made in that folder

Prompts of 16 tokens, responses that all have the same number of tokens; a reference and a reward model of the policy's
size; four passes in four minibatches. All in one thread; process time, medians of alternated rounds; ratios are taken
within a round. `parts` is where ours takes its time. TRL's PPO has a value network of its own, which the others lack;
RLOO takes one step on all responses, here and there.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from floor import Floor, Weights
from paired import Cost, Peer, begin, peak, row, seconds, table, take_turns
from stable_baselines3 import PPO as SB3PPO
from stable_baselines3.common.callbacks import CallbackList
from stable_baselines3.common.logger import Logger
from transformers import AutoModelForSequenceClassification

from rlhf_env import TextGenerationVectorEnv, collect
from rlhf_env.agents import PPO, PPOConfig
from rlhf_env.agents.sb3 import EpisodeRolloutBuffer, LMActorCriticPolicy, SB3VecEnv, attach_sb3
from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.models.tiny import tiny_config
from rlhf_env.reward_models.classifier import ClassifierReward
from rlhf_env.text.tokenizers import word_tokenizer
from rlhf_env.training.agents import agent_class, agent_config
from rlhf_env.training.loop import train

PROMPT = 16
SIZES = {"1M": (1000, 128, 4, 4), "6M": (5000, 256, 6, 8)}  # vocabulary, width, layers, heads
PARTS: tuple[str, ...] = ("sampling", "reference", "reward model", "update")

TRL = {
    "TRL 1.12's PPO": ("1.12.0", "ppo"),
    "TRL 1.16's GRPO": ("1.16.0", "grpo"),
    "TRL 1.16's RLOO, one step": ("1.16.0", "rloo"),
}
HERE = Path(__file__).parent

Iterate = Callable[[], object]


class Work:
    """Models, prompts and the contestants of one shape."""

    def __init__(self, size: str, batch: int, tokens: int) -> None:
        self.vocab, self.width, self.layers, self.heads = SIZES[size]
        self.batch, self.tokens = batch, tokens
        self.tokenizer = word_tokenizer(f"w{i}" for i in range(self.vocab - 4))
        self.prompts = np.random.default_rng(0).integers(0, self.vocab - 4, (batch, PROMPT))
        self.texts = [" ".join(f"w{i}" for i in row) for row in self.prompts.tolist()]

    def config(self) -> Any:
        positions = PROMPT + self.tokens
        sizes = {"n_layer": self.layers, "n_embd": self.width, "n_head": self.heads, "n_positions": positions}
        return tiny_config("gpt2", self.vocab, **sizes)

    def lm(self) -> CausalLM:
        return CausalLM.from_config(self.config(), self.tokenizer)

    def reward(self) -> Any:
        config = self.config()
        config.num_labels, config.pad_token_id = 1, self.tokenizer.pad_token_id
        torch.manual_seed(1)
        return AutoModelForSequenceClassification.from_config(config).eval().requires_grad_(False)

    def envs(self, **settings: Any) -> TextGenerationVectorEnv:
        usual: dict[str, Any] = {
            "prompts": self.texts,
            "tokenizer": self.tokenizer,
            "reference": self.lm().requires_grad_(False),
            "reward_model": ClassifierReward.from_model(self.reward(), self.tokenizer),
            "max_new_tokens": self.tokens,
            "stop_at_eos": False,
            "beta": 0.05,
        }
        return TextGenerationVectorEnv(self.batch, **usual | settings)

    def floor(self) -> Iterate:
        policy, reference, reward = self.lm(), self.lm().requires_grad_(False), self.reward()
        weights = [Weights.of(lm.model.transformer, lm.value_head) for lm in (policy, reference)]
        floor = Floor(weights[0], weights[1], Weights.of(reward.transformer, reward.score), list(policy.parameters()))
        prompts = torch.from_numpy(self.prompts)
        return lambda: floor.iterate(prompts, self.tokens)

    def ours(
        self,
        agent: str = "ppo",
        *,
        policy: CausalLM | None = None,
        envs: TextGenerationVectorEnv | None = None,
        **settings: Any,
    ) -> Iterate:
        cls = agent_class(agent)
        config = agent_config(cls, {"learning_rate": 1e-4, "batch_size": self.batch, **settings})
        rows = train(cls(policy or self.lm(), config), envs or self.envs(), updates=10**6)
        return lambda: next(rows)

    def sb3(self, reference: str = "auto") -> Iterate:
        transitions = self.batch * self.tokens
        model = SB3PPO(
            LMActorCriticPolicy,
            SB3VecEnv(self.envs(reference_backend=reference)),
            gamma=1.0,
            learning_rate=1e-4,
            n_steps=self.tokens,
            batch_size=transitions // 4,
            n_epochs=4,
            device="cpu",
            policy_kwargs={"model": self.lm},
            rollout_buffer_class=EpisodeRolloutBuffer,
        )
        attach_sb3(model)
        model.set_logger(Logger(None, []))
        model._setup_learn(transitions)
        callback = CallbackList([])
        callback.init_callback(model)

        def iterate() -> None:
            assert model.env is not None
            model.collect_rollouts(model.env, callback, model.rollout_buffer, self.tokens)
            model.train()

        return iterate

    def parts(self, rounds: int) -> dict[str, float]:
        """Seconds that each part of ours takes, and `the rest`: texts, tensors, rewards, checks."""
        from rlhf_env.training import collect as module

        taken: dict[str, list[float]] = {name: [] for name in (*PARTS, "the rest")}
        spent: dict[str, float] = dict.fromkeys(PARTS, 0.0)  # in one round

        def timed(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                began = time.process_time()
                found = work(*args, **kwargs)
                spent[name] += time.process_time() - began
                return found

            return wrapped

        envs, policy = self.envs(), self.lm()
        agent = PPO(policy, PPOConfig(learning_rate=1e-4, batch_size=self.batch))
        reward: Any = envs.core.task.reward_model
        reward.model.forward = timed("reward model", reward.model.forward)
        whole = module.sample_responses, module.teacher_forced_logp
        module.sample_responses = timed("sampling", whole[0])
        module.teacher_forced_logp = timed("reference", whole[1])
        update = timed("update", agent.update)
        for _ in range(rounds):
            spent.update(dict.fromkeys(PARTS, 0.0))
            began = time.process_time()
            update(collect(policy, envs, episodes=self.batch))
            whole_round = time.process_time() - began
            for name, some in (*spent.items(), ("the rest", whole_round - sum(spent.values()))):
                taken[name].append(some)
        module.sample_responses, module.teacher_forced_logp = whole
        return {name: statistics.median(seconds) for name, seconds in taken.items()}


CONTESTANTS: dict[str, Callable[[Work], Iterate]] = {
    "floor": Work.floor,
    "PPO": Work.ours,
    "SB3's PPO, bridge": Work.sb3,
    "SB3's PPO, deferred reference": lambda work: work.sb3("deferred"),
}
BESIDE_TRL: dict[str, Callable[[Work], Iterate]] = {
    "GRPO": lambda work: work.ours("grpo", epochs=4, minibatches=4, group_size=8, kl="k3"),
    "RLOO, one step": lambda work: work.ours("rloo", group_size=4),
}


class PeerAt(Peer):
    """TRL at the same work, in an environment of its own, which is made where it is missing."""

    def __init__(self, work: Work, version: str, algorithm: str, folder: Path) -> None:
        python = folder / f"trl-{version}" / "bin" / "python"
        if not python.exists():
            print(f"making {python.parents[1]} …", file=sys.stderr)
            subprocess.run([sys.executable, "-m", "venv", str(python.parents[1])], check=True)
            constraints = ("-c", str(HERE.parent / "constraints.txt"))
            install = ("-m", "pip", "install", "--quiet", *constraints, "torch", f"trl=={version}")
            subprocess.run([str(python), *install], check=True)
        self.files = tempfile.TemporaryDirectory()
        place = Path(self.files.name)
        work.lm().save_pretrained(place / "policy")
        work.reward().save_pretrained(place / "reward")
        work.tokenizer.save_pretrained(place / "reward")
        (place / "prompts.txt").write_text("\n".join(work.texts) + "\n", encoding="utf-8")
        super().__init__(python, algorithm, place, work.tokens)


def compare(work: Work, rounds: int, peers: Path | None) -> dict[str, tuple[float, float]]:
    """Median seconds of each contestant, and median of its ratio to the floor."""
    ours = CONTESTANTS if peers is None else CONTESTANTS | BESIDE_TRL
    contestants: dict[str, Cost] = {name: seconds(make(work)) for name, make in ours.items()}
    if peers is not None:
        contestants |= {name: PeerAt(work, *which, peers) for name, which in TRL.items()}
    found = take_turns(contestants, rounds)
    for contestant in contestants.values():
        if isinstance(contestant, Peer):
            contestant.peak()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--batch", type=int, nargs="+", default=[32])
    parser.add_argument("--tokens", type=int, nargs="+", default=[32])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory", action="store_true", help="peak memory of each, instead of time")
    parser.add_argument(
        "--peers", type=Path, metavar="FOLDER", help="compare with TRL; its environments are made there"
    )
    parser.add_argument(
        "--only", choices=CONTESTANTS | BESIDE_TRL, help="run two iterations of one and print its peak memory"
    )
    args = parser.parse_args()
    shapes = [(size, batch, tokens) for size in args.sizes for batch in args.batch for tokens in args.tokens]
    if args.only:
        torch.set_num_threads(1)
        iterate = (CONTESTANTS | BESIDE_TRL)[args.only](Work(*shapes[0]))
        for _ in range(2):
            iterate()
        print(peak())
        return
    begin()
    table("model", "responses", "tokens each", "", *(["peak memory, MB"] if args.memory else ["seconds", "ratio"]))
    for size, batch, tokens in shapes:
        place = (size, batch, tokens)
        if args.memory:
            words = ("--sizes", size, "--batch", str(batch), "--tokens", str(tokens), "--only")
            for name in CONTESTANTS | BESIDE_TRL:
                done = subprocess.run([sys.executable, __file__, *words, name], check=True, capture_output=True)
                row(*place, name, int(done.stdout))
            for name, which in TRL.items() if args.peers else ():
                peer = PeerAt(Work(size, batch, tokens), *which, args.peers)
                for _ in range(2):
                    peer()
                row(*place, name, peer.peak())
            continue
        work = Work(size, batch, tokens)
        for name, (middle, ratio) in compare(work, args.rounds, args.peers).items():
            row(*place, name, f"{middle:.3f}", f"{ratio:.2f}")
        parts = work.parts(args.rounds)
        whole = sum(parts.values())
        row(*place, "parts of PPO: " + ", ".join(f"{name} {x / whole:.0%}" for name, x in parts.items()), "", "")


if __name__ == "__main__":
    main()
