"""Constitutional AI: a model criticises and revises its own responses by principles, and judges which is better.

    python examples/constitution.py                                  # the small model of this package; seconds
    python examples/constitution.py --model FOLDER --principles FILE --prompts FILE

Leaves OUT/revisions.jsonl, for `rlhf-env sft`, and, where a verdict could be read, OUT/comparisons.jsonl, for `rlhf-env
reward`. The small model knows 179 words of film reviews: its critiques and revisions are nonsense, and none of its
replies is a verdict. It shows what goes where; for more, use a model that follows instructions.
"""

from __future__ import annotations

import argparse
from collections import Counter
from functools import partial
from pathlib import Path

from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.models.generation import text_generator
from rlhf_env.preferences.comparisons import write_comparisons
from rlhf_env.preferences.constitution import (
    CRITIQUE_TEMPLATE,
    PRINCIPLE_TEMPLATE,
    REVISION_TEMPLATE,
    Principle,
    critique_and_revise,
    principle_judges,
    read_principles,
    write_revisions,
)
from rlhf_env.preferences.judge import JudgeLabeler
from rlhf_env.preferences.populations import Population
from rlhf_env.records.safe_text import safe_text
from rlhf_env.text.prompts import load_prompts
from rlhf_env.training.prefer import ask
from rlhf_env.worlds.reviews import reference

PRINCIPLES = [Principle("The review is kind."), Principle("The review is fair.")]
TEMPLATES = (CRITIQUE_TEMPLATE, REVISION_TEMPLATE, PRINCIPLE_TEMPLATE)
SMALL = (  # the small model reads 64 tokens, and writes more than nothing after the beginning of a review
    "{fence}{prompt}{response}{fence}{request} the review is",
    "{fence}{response}{fence}{critique}{fence}{request} {prompt}",
    "{fence}{prompt}{fence}{first}{fence}{second}{fence}{principle}",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub name of a causal language model; none: the small one")
    parser.add_argument("--principles", help="one on each line of a .txt, or a .yaml; none: two about reviews")
    parser.add_argument("--prompts", default="builtin:reviews", help="file of prompts; the first 8 are used")
    parser.add_argument("--max-new-tokens", type=int, default=8, help="the longest text; a few hundred for real models")
    parser.add_argument("--out", type=Path, default=Path("runs/constitution"), help="folder of the files")
    args = parser.parse_args()

    model = reference() if args.model is None else CausalLM.from_pretrained(args.model)
    critique, revision, verdict = SMALL if args.model is None else TEMPLATES
    principles = PRINCIPLES if args.principles is None else read_principles(args.principles)
    generate = text_generator(model, max_new_tokens=args.max_new_tokens, greedy=False)
    prompts = load_prompts(args.prompts)[:8]
    revised = critique_and_revise(
        generate, prompts, generate(prompts), principles, critique_template=critique, revision_template=revision
    )
    args.out.mkdir(parents=True, exist_ok=True)
    written = write_revisions(args.out / "revisions.jsonl", revised, model=args.model or "reviews")
    for each in revised[:3]:
        print(safe_text(" | ".join([each.prompt, each.response, each.steps[0].critique, each.revision])))
    print(f"{written} of {len(revised)} revisions are demonstrations")

    pairs = [(each.response, each.revision) for each in revised]
    judges = principle_judges(partial(JudgeLabeler, generate), principles, template=verdict)
    comparisons = ask(Population(judges), prompts, pairs, range(len(prompts)))
    counts = sum((judge.counts for judge in judges if isinstance(judge, JudgeLabeler)), Counter[str]())
    print(
        f"{len(comparisons)} of {len(pairs)} pairs judged; {counts['unparsed']} of {counts['replies']} replies unparsed"
    )
    if comparisons:
        write_comparisons(args.out / "comparisons.jsonl", comparisons)


if __name__ == "__main__":
    main()
