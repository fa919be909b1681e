import re
import subprocess
import sys
import unicodedata

import pytest

from rlhf_env.records.safe_text import safe_text
from rlhf_env.report.content import Report, Table
from rlhf_env.report.page import render_report
from tests.report.pages import HOSTILE, Page, hostile_report

OURS = {
    *("html", "head", "meta", "title", "style", "body", "header", "section", "article", "footer", "figure", "div"),
    *("h1", "h2", "h3", "h4", "p", "span", "i", "small", "dl", "dt", "dd", "fieldset", "legend", "input", "label"),
    *("table", "thead", "tbody", "tr", "th", "td", "svg", "g", "path", "text", "circle", "rect"),
}


def test_a_report_with_only_a_title():
    page = Page(render_report(Report("A run")))
    assert page.text["title"] == page.text["h1"] == ["A run"]
    assert not {"section", "footer", "p", "svg", "table", "input"} & set(page.tags)


def test_the_page_loads_nothing_and_runs_nothing():
    html = render_report(hostile_report(("harmless",)))
    assert "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'" in html
    assert not re.search(r"https?:|//|@import|url\(|<script|<link|<img|\son\w+=", html)


def test_every_text_is_there():
    words = iter("abcdefghijklmnopqrstuvwxyz")
    table = Table(next(words), (next(words), next(words)), ((next(words), next(words)),), next(words))
    html = render_report(Report("1", "2", tables=(table,), footer="3"))
    assert re.findall(r">([a-z0-9])<", html.partition("<body>")[2]) == ["1", "2", *"abcdef", "3"]


@pytest.mark.parametrize(
    ("cells", "right"),
    [
        (("0.5", "−1", "—", ""), True),
        (("98 %", "12,345", "≥ 2", "+3"), True),
        (("2.28 to 2.34", "0.1 ± 0.2", "3 min 2 s", "1e-05"), True),
        (("0.5", "sft"), False),
        (("GPT-2", "Llama"), False),
        (("2.31 nats per token", "3"), False),
    ],
)
def test_columns_of_numbers_are_set_to_the_right(cells, right):
    page = Page(render_report(Report("r", tables=(Table("t", ("", "c"), tuple(("row", cell) for cell in cells)),))))
    assert page.values("class").count("n") == (len(cells) + 1) * right


def test_uneven_tables_do_not_fail():
    table = Table("t", ("a",), (("1", "2", "3"), ()))
    assert Page(render_report(Report("r", tables=(table, Table("empty", (), ()))))).text["td"] == ["1", "2", "3"]


@pytest.mark.parametrize("payload", HOSTILE, ids=lambda text: ascii(text[:20]))
def test_hostile_text_stays_text_in_every_field(payload):
    html = render_report(hostile_report((payload,)))
    html.encode("utf-8")
    bad = {c for c in html if unicodedata.category(c) in {"Cc", "Cf", "Cs", "Zl", "Zp"}}
    assert bad <= {"\n", "\t"}
    page, harmless = Page(html), Page(render_report(hostile_report(("x",))))
    assert set(page.tags) <= OURS
    assert page.tags == harmless.tags
    assert {name for name, _ in page.attributes} == {name for name, _ in harmless.attributes}
    for name in ("id", "class", "name", "type", "style", "content", "d"):
        assert page.values(name) == harmless.values(name)
    assert page.text["style"] == harmless.text["style"]
    shown = safe_text(payload, multiline=True)
    for tag in ("title", "h1", "h3", "th", "td", "dt", "dd"):
        assert shown in page.text[tag]
    assert page.tokens == [shown.replace("\n", "⏎\n").replace("\t", "⇥\t")] * 3


def test_the_same_report_is_the_same_page():
    assert render_report(hostile_report()) == render_report(hostile_report())


def test_the_component_is_light():
    code = "import sys, rlhf_env.report.page; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "rlhf_env" in loaded
    assert not {"torch", "transformers", "matplotlib"} & set(loaded)
