"""Your own reward: any function of (prompts, responses). This one counts the words that begin with "e".

    python examples/your_own_reward.py      # about a quarter of a minute

The model knows nothing at the start, and it learns what the function says rather than what was meant: look at the
samples, and at what they cost in KL.
"""

from __future__ import annotations

import argparse

import torch

from rlhf_env import CausalLM, TextGenerationVectorEnv, evaluate, train
from rlhf_env.agents import PPO, PPOConfig
from rlhf_env.models.tiny import tiny_config
from rlhf_env.records.safe_text import safe_text
from rlhf_env.text.tokenizers import char_tokenizer

PROMPTS = ["a tale of ", "once upon a ", "the sea and ", "we saw the "]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=30, help="of 64 episodes each")
    updates = parser.parse_args().updates
    torch.set_num_threads(1)

    tokenizer = char_tokenizer("abcdefghijklmnopqrstuvwxyz ")
    policy = CausalLM.from_config(tiny_config("gpt2", len(tokenizer)), tokenizer, seed=0)
    envs = TextGenerationVectorEnv(
        num_envs=64,
        prompts=PROMPTS,
        tokenizer=tokenizer,
        reward_model=lambda prompts, responses: [sum(w[0] == "e" for w in r.split()) for r in responses],
        reference=policy.frozen_copy(),
        beta=0.02,
        max_new_tokens=20,
    )
    before = evaluate(policy, envs, episodes=256)
    agent = PPO(policy, PPOConfig(learning_rate=3e-3, batch_size=64))
    print("update   score      kl  length")
    for row in train(agent, envs, updates=updates):
        if row["update"] % max(1, updates // 10) == 0:
            print(f"{row['update']:>6}  {row['score']:>6.2f}  {row['kl']:>6.2f}  {row['length']:>6.1f}", flush=True)
    after = evaluate(policy, envs, episodes=256)

    print(f"\nscore of 256 responses: {before.metrics['score']:.2f} before, {after.metrics['score']:.2f} after")
    print(f"KL to the start:        {after.metrics['kl']:.2f} nats per response\n")
    for old, new in list(zip(before.samples, after.samples, strict=True))[:4]:
        print(f"{safe_text(old['prompt'])}| before: {safe_text(old['response'])}")
        print(f"{' ' * len(old['prompt'])}| after:  {safe_text(new['response'])}")


if __name__ == "__main__":
    main()
