"""How well do reward models predict real comparisons? One table, from word counts to transformers.

    python examples/reward_models/hh.py FILE
    python examples/reward_models/hh.py FILE --body all-MiniLM-L6-v2 --rate 2e-5

FILE holds comparisons in any form that is read, say Anthropic's hh-rlhf. Each model learns five times from four fifths
of the prompts and is measured on the last fifth, so that every comparison is predicted once by a model that never saw
its prompt. A body (a Hugging Face folder) has two rows: frozen, where what lies after its blocks learns, and tuned.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence

from rlhf_env.intervals import rate_interval
from rlhf_env.models.freezing import layers_of
from rlhf_env.preferences.comparisons import distinct, read_comparisons
from rlhf_env.preferences.splits import folds_by_prompt
from rlhf_env.records.safe_text import safe_text
from rlhf_env.reward_models.bradley_terry import (
    HasLogits,
    fit_comparisons,
    measure_comparisons,
    new_reward_model,
    usable,
)
from rlhf_env.reward_models.linear import LengthReward, fit_linear
from rlhf_env.settings import BradleyTerryConfig
from rlhf_env.training.config import NewModelConfig
from rlhf_env.training.sft import new_model
from rlhf_env.types import Comparison

Learner = Callable[[Sequence[Comparison]], HasLogits]


def from_nothing(epochs: int) -> Learner:
    """A small GPT-2 of random weights, and a tokenizer made of the responses that are learned from."""

    def learn(learned: Sequence[Comparison]) -> HasLogits:
        texts = [response for c in learned for response in c.responses]
        with tempfile.TemporaryDirectory() as folder:
            new_model(NewModelConfig(), texts, 0, "cpu", "float32").save_pretrained(folder)
            return fitted(folder, learned, BradleyTerryConfig(epochs=epochs))

    return learn


def on_body(folder: str, rate: float, epochs: int, *, frozen: bool) -> Learner:
    """A body of others, of which all weights learn, or what lies after its blocks."""

    def learn(learned: Sequence[Comparison]) -> HasLogits:
        blocks = len(layers_of(new_reward_model(folder).model)) if frozen else 0
        learning_rate = 1e-3 if frozen else rate
        return fitted(folder, learned, BradleyTerryConfig(learning_rate, epochs, 16, freeze_layers=blocks))

    return learn


def fitted(body: str, learned: Sequence[Comparison], config: BradleyTerryConfig) -> HasLogits:
    model = new_reward_model(body, max_length=128)
    for _ in fit_comparisons(model, usable(model, learned)[0], config):
        pass
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="comparisons")
    parser.add_argument("--body", nargs="*", default=[], help="folders of pretrained models")
    parser.add_argument("--rate", type=float, default=5e-5, help="learning rate of tuned bodies")
    parser.add_argument("--epochs", type=int, default=2, help="passes of transformers over the comparisons")
    parser.add_argument("--folds", type=int, default=5, help="how often to learn")
    args = parser.parse_args()

    comparisons, _ = distinct(read_comparisons(args.file))
    learners: dict[str, Learner] = {
        "longer wins": lambda _: LengthReward(),
        "shorter wins": lambda _: LengthReward(-1),
        "linear in words and pairs of words": fit_linear,
        "small transformer from nothing": from_nothing(args.epochs),
    }
    for body in args.body:
        for kind in ("frozen", "tuned"):
            name = f"{safe_text(body.rstrip('/').rpartition('/')[2])}, {kind}"
            learners[name] = on_body(body, args.rate, args.epochs, frozen=kind == "frozen")
    print(f"{len(comparisons)} comparisons, held out by prompt in {args.folds} folds")
    for name, learn in learners.items():
        began, right, count, loss = time.perf_counter(), 0.0, 0, 0.0
        for learned, held_out in folds_by_prompt(comparisons, args.folds):
            measured = measure_comparisons(learn(learned), held_out)
            right, count = right + measured["accuracy"] * len(held_out), count + len(held_out)
            loss += measured["log_loss"] * len(held_out)
        accuracy, low, high = rate_interval("x", right, count).values()
        seconds = time.perf_counter() - began
        nats = f"{loss / count:8.3f}" if "wins" not in name else f"{'–':>8}"  # lengths are no log-odds
        print(f"{name:36} {accuracy:6.1%}  [{low:.1%}, {high:.1%}]  log loss {nats}  {seconds:6.0f} s", flush=True)


if __name__ == "__main__":
    main()
