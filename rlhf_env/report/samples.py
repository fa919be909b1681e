"""Responses side by side, every token coloured by a number that a switch chooses: CSS alone, no script."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rlhf_env.records.safe_text import safe_html, safe_text
from rlhf_env.report.content import Response, Sample
from rlhf_env.report.scales import drawable, number

_MEANINGS = {
    "reward": "what the agent receives for the token",
    "kl": "log π − log π_ref of the token, in nats",
    "value": "the critic's value of the state before the token",
    "advantage": "the reward still to come, less the value",
    "ratio": "probability after training over that under the reference",
}
_STRONGEST = 0.7  # opacity of the colour of the largest magnitude: the text stays legible


def draw_samples(samples: Sequence[Sample], note: str = "") -> str:
    """A section with a switch among the quantities that are there, their legends, and the samples."""
    responses = [r for sample in samples for r in (sample.before, sample.after) if r is not None]
    largest = largest_magnitudes(responses)
    switch = "".join(
        f'<input type="radio" name="quantity" id="q{i}"{" checked" * (i == 0)}>'
        f'<label for="q{i}">{safe_html(name)}</label>'
        for i, name in enumerate(largest)
    )
    legends = "".join(_legend(i, name, most) for i, (name, most) in enumerate(largest.items()))
    rules = "".join(
        f".samples:has(#q{i}:checked) .t{{background:var(--c{i})}}.samples:has(#q{i}:checked) .k{i}{{display:flex}}"
        for i in range(len(largest))
    )
    head = ""
    if largest:
        head = f"<style>{rules}</style>"
        head += f'<div class="switch"><fieldset><legend>Colour by</legend>{switch}</fieldset>{legends}</div>'
    note = f'<p class="note">{safe_html(note)}</p>' if note else ""
    cards = "".join(_card(sample, largest) for sample in samples)
    return f'<section class="samples"><h2>Samples</h2>{note}{head}{cards}</section>'


def largest_magnitudes(responses: Sequence[Response]) -> dict[str, float]:
    """Each quantity that has a number, the well-known ones first, with its magnitude farthest from neutral."""
    names = dict.fromkeys([*_MEANINGS, *(name for response in responses for name in response.by_token)])
    values = {name: [v for r in responses for v in r.by_token.get(name, ())] for name in names}
    placed = {name: [m for v in values[name] if (m := magnitude(name, v)) is not None] for name in names}
    return {name: max(map(abs, found)) for name, found in placed.items() if found}


def magnitude(name: str, value: float) -> float | None:
    """How far `value` is from neutral: from 0, or for a ratio the logarithm, from 1; None if that is not finite."""
    if not drawable(value):
        return None
    if name == "ratio":
        return math.log(value) if value > 0 else None
    return value


def _card(sample: Sample, largest: dict[str, float]) -> str:
    sides = [("before", sample.before), ("after", sample.after)] if sample.before else [("", sample.after)]
    columns = "".join(
        f'<div class="side">{f"<h4>{name}</h4>" if name else ""}{_response(response, largest)}</div>'
        for name, response in sides
        if response is not None
    )
    prompt = f'<p class="prompt" dir="auto">{safe_html(sample.prompt)}</p>'
    return f'<article class="card">{prompt}<div class="sides">{columns}</div></article>'


def _response(response: Response, largest: dict[str, float]) -> str:
    tokens = "".join(_token(response, t, largest) for t in range(len(response.pieces)))
    facts = "".join(
        f"<div><dt>{safe_html(name)}</dt><dd>{safe_html(number(value))}</dd></div>"
        for name, value in response.facts.items()
    )
    return f'<p class="response" dir="auto">{tokens}</p>' + (f"<dl>{facts}</dl>" if facts else "")


def _token(response: Response, t: int, largest: dict[str, float]) -> str:
    numbers = {name: values[t] for name, values in response.by_token.items()}
    colours = [
        f"--c{i}:{_colour(m / (most or 1.0))}"
        for i, (name, most) in enumerate(largest.items())
        if name in numbers and (m := magnitude(name, numbers[name])) is not None
    ]
    tooltip = "\n".join([f"“{safe_text(response.pieces[t])}”", *(f"{k}: {number(v, 4)}" for k, v in numbers.items())])
    shown = safe_html(response.pieces[t]).replace("\n", "⏎\n").replace("\t", "⇥\t")
    style = f' style="{";".join(colours)}"' if colours else ""
    return f'<span class="t" tabindex="0"{style} title="{safe_html(tooltip)}">{shown}</span>'


def _colour(position: float) -> str:
    return f"rgb(var(--{'up' if position > 0 else 'down'})/{_STRONGEST * abs(position):.2f})"


def _legend(index: int, name: str, most: float) -> str:
    ends = [math.exp(-most), 1.0, math.exp(most)] if name == "ratio" else [0.0 - most, 0.0, most]
    low, neutral, high = (number(end) for end in ends)
    meaning = f"<small>{_MEANINGS[name]}</small>" if name in _MEANINGS else ""
    return f'<p class="key k{index}"><span>{low}</span><i>{neutral}</i><span>{high}</span>{meaning}</p>'
