"""Constitutional AI: principles in a file, by which a model criticises and revises responses, and judges them.

Bai et al. 2022, *Constitutional AI: harmlessness from AI feedback* (arXiv 2212.08073): revisions are demonstrations for
supervised fine-tuning (§3), and judgements by a principle drawn for each query are comparisons (§4).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from rlhf_env.errors import ConfigError, DataError
from rlhf_env.preferences.judge import ASKED_VERDICT, SHOWN_PAIR, Generate, fill_template
from rlhf_env.records.config import build, read_layer
from rlhf_env.records.jsonl import write_jsonl
from rlhf_env.text.sources import read_lines
from rlhf_env.types import Labeler

_PRINCIPLE_STREAM = 7  # apart from those of labelers and populations

_SHOWN = """\
Each text stands between lines of {fence}.

Prompt:
{fence}
{prompt}
{fence}

Response:
{fence}
{response}
{fence}

"""
#: What asks for a critique, of prompt, response and request.
CRITIQUE_TEMPLATE = _SHOWN + "{request}\n\nCritique:"
#: What asks for a revision, of prompt, response, critique and request.
REVISION_TEMPLATE = _SHOWN + "Critique:\n{fence}\n{critique}\n{fence}\n\n{request}\n\nRevision:"
#: What a judge by a principle is asked.
PRINCIPLE_TEMPLATE = f"{SHOWN_PAIR}Which response follows this principle better? {{principle}}\n{ASKED_VERDICT}"
#: What a judge by a principle is asked whose next word is the verdict.
PRINCIPLE_NEXT_WORD_TEMPLATE = (
    f"{SHOWN_PAIR}Which response follows this principle better, A or B? {{principle}}\nThe better response is"
)


@dataclass(frozen=True)
class Principle:
    """What a response should be, and how a model is asked to make it so."""

    principle: str  #: such as: The response is polite.
    critique: str = ""  #: the request for a critique; none: made of the principle
    revision: str = ""  #: the request for a revision; none: made of the principle

    def __post_init__(self) -> None:
        if not self.principle.strip():
            raise ConfigError("a principle must say something, it is blank")

    @property
    def critique_request(self) -> str:
        """What the model is asked first."""
        return self.critique or f"Say how the response falls short of this principle: {self.principle}"

    @property
    def revision_request(self) -> str:
        """What the model is asked then."""
        return self.revision or f"Rewrite the response so that it follows this principle: {self.principle}"


@dataclass(frozen=True)
class _Constitution:
    principles: tuple[Principle, ...]


def read_principles(path: str | Path) -> list[Principle]:
    """The principles of a file: one on each line of a `.txt`, or the list `principles` of a `.yaml`.

    An entry of that list has `principle` and, where other words are wanted, `critique` and `revision`, the requests.
    """
    if Path(path).suffix not in (".yaml", ".yml"):
        return [Principle(line) for _, line in read_lines(path)]
    try:
        principles = list(build(_Constitution, read_layer(path)).principles)
    except ConfigError as error:
        raise DataError(f"{error}. A .yaml holds the list `principles`; one on each line is a .txt") from error
    if not principles:
        raise DataError(f"{path}: the list of principles is empty")
    return principles


@dataclass(frozen=True)
class Step:
    """One critique and what was made of it."""

    principle: str
    critique: str
    revision: str


@dataclass(frozen=True)
class Revised:
    """A response, and how it was revised step by step."""

    prompt: str
    response: str  #: as it was at first
    steps: tuple[Step, ...]

    @property
    def revision(self) -> str:
        """What the last step left."""
        return self.steps[-1].revision


def critique_and_revise(
    generate: Generate,
    prompts: Sequence[str],
    responses: Sequence[str],
    principles: Sequence[Principle],
    *,
    rounds: int = 1,
    seed: int = 0,
    start: int = 0,
    critique_template: str = CRITIQUE_TEMPLATE,
    revision_template: str = REVISION_TEMPLATE,
) -> list[Revised]:
    """Each response criticised and rewritten `rounds` times, each time by a principle drawn anew, with replacement.

    The principle of response i in round n depends on (seed, `start` + i, n) alone, so that many may be revised in
    parts. The model is asked for all critiques of a round in one call, then for all revisions. White space around its
    texts is left out; a revision begins with that of the response, which may be what stands between prompt and
    response.
    """
    if rounds < 1 or not principles or len(prompts) != len(responses):
        raise ConfigError(
            f"a revision needs a round, a principle, and a prompt for each response; got {rounds} rounds, "
            f"{len(principles)} principles, {len(prompts)} prompts and {len(responses)} responses"
        )
    current, steps = list(responses), [()] * len(responses)
    for n in range(rounds):
        drawn = [_draw(principles, seed, start + i, n) for i in range(len(responses))]
        about = [{"prompt": prompt, "response": text} for prompt, text in zip(prompts, current, strict=True)]
        critiques = _asked(generate, critique_template, about, [p.critique_request for p in drawn])
        about = [{**texts, "critique": critique} for texts, critique in zip(about, critiques, strict=True)]
        revisions = _asked(generate, revision_template, about, [p.revision_request for p in drawn])
        current = [_lead(response) + text for response, text in zip(responses, revisions, strict=True)]
        done = [Step(p.principle, c, r) for p, c, r in zip(drawn, critiques, current, strict=True)]
        steps = [(*before, step) for before, step in zip(steps, done, strict=True)]
    return [Revised(*row) for row in zip(prompts, responses, steps, strict=True)]


def require_templates(critique: str, revision: str) -> None:
    """`ConfigError` where one of `critique_and_revise`'s templates lacks one of its places."""
    fill_template(critique, prompt="", response="", request="")
    fill_template(revision, prompt="", response="", critique="", request="")


def write_revisions(path: str | Path, revised: Iterable[Revised], *, model: str = "") -> int:
    """Write revisions as demonstrations (`load_demonstrations`) that also say where they are from; returns how many.

    A row has prompt, response (the revision), first_response, steps (principle, critique and revision of each) and
    `model`, what wrote it. A blank revision cannot be learned and is left out; `DataError` where nothing is left.
    """
    rows = [
        {
            "prompt": each.prompt,
            "response": each.revision,
            "first_response": each.response,
            "steps": [asdict(step) for step in each.steps],
            "model": model,
        }
        for each in revised
        if each.revision.strip()
    ]
    if not rows:
        raise DataError(f"{path}: there is no revision to write that is not blank")
    write_jsonl(path, rows)
    return len(rows)


def principle_judges(
    judge: Callable[..., Labeler],
    principles: Sequence[Principle],
    *,
    template: str = PRINCIPLE_TEMPLATE,
    name: str = "principle: ",
) -> list[Labeler]:
    """AI labels: a judge for each principle, called `name` and the principle.

    A `Population` of them puts each query to one. `judge` is `JudgeLabeler` or `LogOddsJudge` with its model, such as
    `partial(JudgeLabeler, generate)`; `template` has the place `{principle}` besides.
    """
    return [judge(template=template, texts={"principle": p.principle}, name=name + p.principle) for p in principles]


def _draw(principles: Sequence[Principle], seed: int, i: int, n: int) -> Principle:
    return principles[int(np.random.default_rng([seed, i, n, _PRINCIPLE_STREAM]).integers(len(principles)))]


def _lead(text: str) -> str:
    return text[: len(text) - len(text.lstrip())]


def _asked(generate: Generate, template: str, about: Sequence[dict[str, str]], requests: Sequence[str]) -> list[str]:
    asked = [fill_template(template, **texts, request=request) for texts, request in zip(about, requests, strict=True)]
    texts = generate(asked)
    if len(texts) != len(asked):
        raise DataError(f"the model gave {len(texts)} texts to {len(asked)} prompts")
    return [text.strip() for text in texts]
