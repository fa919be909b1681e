"""Each form that is written: what it can hold comes back equal, and what it cannot is counted."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_env.errors import DataError
from rlhf_env.preferences.comparisons import FORMATS, load_comparisons, write_comparisons
from rlhf_env.types import Comparison
from tests.preferences.test_comparisons import any_comparison

HELD = {  # beside prompt, responses and which of two is better
    "ranks": {"rankings", "ties", "identical", "labeler", "policy", "order", "time", "strength", "preference"},
    "trl": {"strength"},
    "hh": set[str](),
    "pandalm": {"ties", "identical", "labeler", "policy"},
    "graded": {"ties", "identical", "labeler", "policy", "strength"},
}
COUNTED = {
    "rankings": "rankings of more than two (written as their pairs)",
    "ties": "ties",
    "identical": "pairs of identical responses",
    "labeler": "labelers",
    "policy": "policies",
    "order": "orders of presentation",
    "time": "times",
    "strength": "strengths",
    "preference": "soft labels",
}


def test_the_forms_that_are_written():
    assert set(HELD) == {name for name, form in FORMATS.items() if form.write is not None}


def test_the_table_of_forms_in_the_documentation(pytestconfig):
    page = (pytestconfig.rootpath / "docs" / "data.rst").read_text(encoding="utf-8")
    assert [name for name in FORMATS if f"   * - ``{name}``" not in page] == []


def known(c):
    """What a comparison knows, in the words of `HELD`."""
    facts = {
        "rankings": len(c.responses) > 2,
        "ties": len(c.responses) == 2 and len(set(c.ranks)) == 1 and len(set(c.responses)) == 2,
        "identical": len(c.responses) == 2 and len(set(c.responses)) == 1,
        "labeler": c.labeler,
        "policy": any(c.writers),
        "order": c.order is not None,
        "time": c.time is not None,
        "strength": c.strength is not None,
        "preference": c.preference is not None,
    }
    return {name for name, known in facts.items() if known}


def comparable(c, held):
    """What is left of a judgement of two in a form that holds `held`: the better first, but for ties."""
    (first, second), swap = c.responses, c.ranks[0] > c.ranks[1] and not {"ties"} <= held
    writers = c.writers if "policy" in held else ("", "")
    facts = (
        c.prompt,
        (second, first) if swap else (first, second),
        c.ranks[::-1] if swap else c.ranks,
        writers[::-1] if swap else writers,
    )
    return (*facts, *(getattr(c, name) for name in ("labeler", "strength") if name in held))


def pairs_of(c):
    """All pairs of a ranking, by hand."""
    for i in range(len(c.responses)):
        for j in range(i + 1, len(c.responses)):
            two = [c.ranks[i], c.ranks[j]]
            yield dataclasses.replace(
                c,
                responses=(c.responses[i], c.responses[j]),
                ranks=tuple(sorted(set(two)).index(rank) for rank in two),
                order=None if c.order is None else (0, 1),  # no form of pairs holds it
                policies=None if c.policies is None else (c.policies[i], c.policies[j]),
            )


@pytest.mark.parametrize("form", HELD)
@settings(max_examples=60, deadline=None)
@given(comparisons=st.lists(any_comparison(), min_size=1, max_size=5))
def test_what_a_form_holds_comes_back_and_the_rest_is_counted(tmp_path_factory, form, comparisons):
    file, held = tmp_path_factory.mktemp("any") / "c.jsonl", HELD[form]
    # annotators' numbers are names that PandaLM keeps, and hh keeps prompts that are transcripts
    comparisons = [
        dataclasses.replace(
            c,
            labeler=f"annotator{len(c.labeler)}" if form == "pandalm" else c.labeler,
            prompt=f"\n\nHuman: {c.prompt}\n\nAssistant:" if form == "hh" else c.prompt,
        )
        for c in comparisons
    ]
    pairs = [pair for c in comparisons for pair in pairs_of(c)]
    kept = [
        pair
        for pair in pairs
        if ("ties" in held or pair.ranks[0] != pair.ranks[1])
        and ("identical" in held or pair.responses[0] != pair.responses[1])
    ]
    try:
        _, lost = write_comparisons(file, comparisons, form)
    except DataError:
        assert not kept
        return
    back = load_comparisons(file, form)
    if form == "ranks":
        assert back.comparisons == comparisons and not lost
        return
    wanted = [comparable(c, held) for c in kept]
    found = [comparable(c, held) for c in back.comparisons]
    if form == "graded":  # a grade has a size, which is 1 where it was not known
        wanted = [(*facts, strength if strength or len(set(facts[2])) == 1 else 1) for *facts, strength in wanted]
    assert sorted(map(repr, found)) == sorted(map(repr, wanted)) if form == "pandalm" else found == wanted
    missing = {name for c in comparisons for name in known(c) if name == "rankings"}
    missing |= {name for c in pairs for name in known(c) & {"ties", "identical"}}
    missing |= {name for c in kept for name in known(c) - {"rankings", "ties", "identical"}}
    told = set(lost) - {"strengths that were not known (now 1)"}
    assert told == {COUNTED[name] for name in missing - held}


def test_a_comparison_is_turned_with_all_that_is_known_of_it(tmp_path):
    """TRL stores the better first; a margin belongs to the pair, whichever way it stands."""
    c = Comparison("p", ("bad", "good"), (1, 0), strength=0.5)
    write_comparisons(tmp_path / "c.jsonl", [c], "trl")
    assert load_comparisons(tmp_path / "c.jsonl").comparisons == [
        Comparison("p", ("good", "bad"), (0, 1), strength=0.5)
    ]
