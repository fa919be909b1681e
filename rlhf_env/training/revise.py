"""A constitution at work: responses, critiques and revisions of a language model, as data for `sft` and `reward`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from rlhf_env.errors import DataError
from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.preferences.comparisons import write_comparisons
from rlhf_env.preferences.constitution import (
    CRITIQUE_TEMPLATE,
    REVISION_TEMPLATE,
    Revised,
    critique_and_revise,
    read_principles,
    require_templates,
    write_revisions,
)
from rlhf_env.preferences.populations import Population
from rlhf_env.records.config import to_dict
from rlhf_env.records.run import Run, require_free
from rlhf_env.text.prompts import load_prompts
from rlhf_env.text.sources import read_rows
from rlhf_env.training.assemble import load_writer, parse_device
from rlhf_env.training.config import ReviseConfig
from rlhf_env.training.inference import Progress
from rlhf_env.training.labelers import build_judges, read_template, reply_counts
from rlhf_env.training.prefer import ask, saved
from rlhf_env.training.report import surroundings
from rlhf_env.types import Comparison

_REVISED_TOGETHER = 64  # responses: no more are lost with a server


def run_revise(config: ReviseConfig, out: str | Path, *, progress: Progress | None = None) -> dict[str, Any]:
    """Revise responses as `config` says; returns what summary.json says.

    `out`/revisions.jsonl are demonstrations for `rlhf-env sft`, with every step (`write_revisions`);
    `out`/comparisons.jsonl, for `rlhf-env reward`, has the response and its revision, and which is better: the
    revision or, with a judge, what that says by one of the principles. Blank revisions are left out, and of unchanged
    ones there is no comparison; both are counted. Where a server is lost, what was made before is in the files.
    """
    out = Path(out)
    require_free(out)
    began = time.perf_counter()
    parse_device(config.device)
    principles = read_principles(config.principles)
    prompts, responses = _read(config)
    load_model = cache(partial(CausalLM.from_pretrained, device=config.device, dtype=config.dtype))
    generate = load_writer(config.writer, config.seed, load_model)
    critique = read_template(config.critique_template, CRITIQUE_TEMPLATE)
    revision = read_template(config.revision_template, REVISION_TEMPLATE)
    require_templates(critique, revision)
    judges = _judges(config, load_model)
    model = config.writer.served_name or str(config.writer.model)
    run = Run.create(out, to_dict(config))

    revised: list[Revised] = []
    comparisons: list[Comparison] = []

    def save() -> str:
        if not any(each.revision.strip() for each in revised):
            return ""
        written = write_revisions(out / "revisions.jsonl", revised, model=model)
        if comparisons:
            write_comparisons(out / "comparisons.jsonl", comparisons)
        return f"{written} revisions and {len(comparisons)} comparisons were made before, and are in {out}"

    with saved(save):
        for start in range(0, len(prompts), _REVISED_TOGETHER):
            some = slice(start, start + _REVISED_TOGETHER)
            more = critique_and_revise(
                generate,
                prompts[some],
                generate(prompts[some]) if responses is None else responses[some],
                principles,
                rounds=config.rounds,
                seed=config.seed,
                start=start,
                critique_template=critique,
                revision_template=revision,
            )
            writers = ("" if responses else model, f"{model}, revised")
            comparisons += _compared(judges, more, start, config.seed, writers)
            revised += more
            if progress is not None:
                progress(len(more), len(prompts))
    if not save():
        raise DataError(
            f"all {len(revised)} revisions are blank: does {model} follow instructions, and is writer.max_new_tokens "
            "large enough?"
        )
    run.write_summary(
        {
            "responses": len(revised),
            "revisions": sum(bool(each.revision.strip()) for each in revised),
            "blank": sum(not each.revision.strip() for each in revised),
            "unchanged": sum(each.revision == each.response for each in revised),
            "comparisons": len(comparisons),
            "principles": len(principles),
            "rounds": config.rounds,
            **({} if judges is None else reply_counts(judges)),
            "seed": config.seed,
            "seconds": time.perf_counter() - began,
            **surroundings(config.device),
        }
    )
    return run.summary


def _read(config: ReviseConfig) -> tuple[list[str], list[str] | None]:
    """The prompts, and the responses to revise, where they are given."""
    if config.responses is None:
        return load_prompts(str(config.prompts)), None
    rows = [row for _, row in read_rows(config.responses, required={"prompt": str, "response": str})]
    return [row["prompt"] for row in rows], [row["response"] for row in rows]


def _judges(config: ReviseConfig, load_model: Callable[[str], CausalLM]) -> Population | None:
    """Who compares, by the principles of the revisions unless the judge has its own; none: nobody is asked."""
    if config.judge.model is None:
        return None
    judge = replace(config.judge, principles=config.judge.principles or config.principles)
    return Population(build_judges(judge, config.seed, load_model), seed=config.seed)


def _compared(
    judges: Population | None, revised: Sequence[Revised], start: int, seed: int, writers: tuple[str, str]
) -> list[Comparison]:
    """Response and revision of each, where they differ and the revision is not blank, and which is better."""
    differ = [
        (number, each)
        for number, each in enumerate(revised, start)
        if each.revision.strip() and each.revision != each.response
    ]
    pairs = [(each.response, each.revision) for _, each in differ]
    if judges is None:
        return [
            Comparison(each.prompt, pair, (1, 0), "constitution", policies=writers)
            for (_, each), pair in zip(differ, pairs, strict=True)
        ]
    said = ask(judges, [each.prompt for _, each in differ], pairs, [number for number, _ in differ], seed=seed)
    return [replace(comparison, policies=writers) for comparison in said]
