import math
import re

import pytest

from rlhf_env.errors import DataError
from rlhf_env.report.content import Response, Sample
from rlhf_env.report.samples import draw_samples, largest_magnitudes
from tests.report.pages import Page


def response(*pieces: str, facts=None, **by_token) -> Response:
    return Response(pieces, by_token, facts or {})


def styles(html: str) -> list[str]:
    return re.findall(r'<span class="t" tabindex="0"(?: style="([^"]*)")?', html)


def test_one_scale_per_quantity_over_all_samples():
    a, b = response("x", "y", kl=[0.6, -2.0]), response("z", kl=[1.0], reward=[4.0])
    assert largest_magnitudes([a, b]) == {"reward": 4.0, "kl": 2.0}
    assert styles(draw_samples([Sample("p", a, b)])) == [
        "--c1:rgb(var(--up)/0.21)",  # 0.7 × 0.6 / 2
        "--c1:rgb(var(--down)/0.70)",
        "--c0:rgb(var(--up)/0.70);--c1:rgb(var(--up)/0.35)",
    ]


def test_a_ratio_is_as_far_from_one_as_its_inverse():
    html = draw_samples([Sample("p", None, response("a", "b", "c", ratio=[4.0, 0.25, 1.0]))])
    assert styles(html) == ["--c0:rgb(var(--up)/0.70)", "--c0:rgb(var(--down)/0.70)", "--c0:rgb(var(--down)/0.00)"]
    assert re.findall(r'<p class="key k0"><span>(.*?)</span><i>(.*?)</i><span>(.*?)</span>', html) == [
        ("0.25", "1", "4")
    ]


def test_numbers_that_are_not_finite_have_no_colour():
    html = draw_samples([Sample("p", None, response("a", "b", "c", kl=[math.nan, 1.0, -math.inf], ratio=[0.0, -1, 2]))])
    assert styles(html) == ["", "--c0:rgb(var(--up)/0.70)", "--c1:rgb(var(--up)/0.70)"]
    assert Page(html).values("title")[0] == "“a”\nkl: —\nratio: 0"


def test_a_quantity_without_a_number_is_no_choice():
    html = draw_samples([Sample("p", None, response("a", kl=[math.nan], value=[0.0]))])
    assert Page(html).text["label"] == ["value"]
    assert styles(html) == ["--c0:rgb(var(--down)/0.00)"]


def test_the_known_quantities_come_first_and_the_first_is_chosen():
    html = draw_samples([Sample("p", None, response("a", entropy=[1], ratio=[1], advantage=[1], reward=[1]))])
    assert Page(html).text["label"] == ["reward", "advantage", "ratio", "entropy"]
    assert re.findall(r'id="q(\d)"( checked)?', html) == [("0", " checked"), ("1", ""), ("2", ""), ("3", "")]


def test_without_quantities_there_is_no_switch():
    page = Page(draw_samples([Sample("p", None, response("a", "b"))]))
    assert page.tokens == ["a", "b"]
    assert page.tags["input"] == page.tags["style"] == 0


def test_white_space_is_kept_and_line_breaks_and_tabs_are_marked():
    page = Page(draw_samples([Sample("p", None, response(" a", "\n", "\t", "  ", "", "b\n\nc"))]))
    assert page.tokens == [" a", "⏎\n", "⇥\t", "  ", "", "b⏎\n⏎\nc"]


def test_a_token_tells_all_its_numbers():
    page = Page(draw_samples([Sample("p", None, response(" great\n", kl=[0.12345], reward=[-1.0]))]))
    assert page.values("title") == ["“ great⏎”\nkl: 0.1235\nreward: −1"]


def test_before_stands_beside_after_and_alone_it_has_no_heading():
    r = response("a", facts={"score": 1.25, "stop": "eos", "gold": math.nan})
    page = Page(draw_samples([Sample("p", r, r), Sample("q", None, r)]))
    assert page.text["h4"] == ["before", "after"]
    assert page.text["dt"] == ["score", "stop", "gold"] * 3
    assert page.text["dd"] == ["1.25", "eos", "—"] * 3


def test_one_value_per_token():
    with pytest.raises(DataError, match="a response of 2 tokens has 1 values of 'kl'"):
        response("a", "b", kl=[0.0])
