"""Reports to render and a reader of what was rendered."""

import math
from collections import Counter
from html.parser import HTMLParser

from rlhf_env.report.content import Chart, Histogram, Point, Report, Response, Sample, Series, Table

SCRIPT = "document.title='owned';document.body.insertAdjacentHTML('beforeend','<b id=owned></b>')"
HOSTILE = (
    f"</span><script>{SCRIPT}</script>",
    f'<img src=x onerror="{SCRIPT}">',
    f'"><svg onload="{SCRIPT}">',
    f"' onmouseover='{SCRIPT}' autofocus onfocus='{SCRIPT}' x='",
    f"javascript:{SCRIPT}",
    f"</title></style><script>{SCRIPT}</script>",
    f"]]></svg></text><script>{SCRIPT}</script>",
    f"--><iframe srcdoc='<script>parent.{SCRIPT}</script>'>",
    "{title} {0} %s ${x} &lt;b&gt; &#60;b&#62; ;} *{display:none} url(https://example.org/x)",
    "\x1b]0;owned\x07\x1b[2J\x9b2J\x00\x7f\r",
    "user\u202egpj.exe \u2066x\u2069 zero\u200bwidth\ufeff half \ud800 line\u2028end",
    "one\ntwo\tthree  four",
    "w" * 3000,
)


def hostile_report(payloads=HOSTILE) -> Report:
    """A report that has a payload in every field of text, all payloads in tokens."""
    every = " ".join(payloads)
    numbers = [math.sin(t) for t in range(len(payloads))]
    response = Response(
        pieces=tuple(payloads),
        by_token={"reward": numbers, "ratio": [math.exp(n) for n in numbers], every: numbers},
        facts={"score": 1.0, every: every},
    )
    points = tuple(Point(x, x * x, x * x - 1, x * x + 1, label=every) for x in range(4))
    series = tuple(Series(every, points, style) for style in ("line", "dots", "both"))
    return Report(
        title=every,
        subtitle=every,
        tables=(Table(every, (every, every), ((every, every),), note=every),),
        charts=(
            Chart(every, every, every, series, note=every, diagonal=True),
            Histogram(every, every, {every: [1, 2, 3]}, note=every),
        ),
        samples=(Sample(every, response, response), Sample(every, None, response)),
        samples_note=every,
        footer=every,
    )


class Page(HTMLParser):
    """Tags, attributes and texts of a page, as a browser that runs no script would find them."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str]] = []
        self.tokens: list[str] = []
        self.text: dict[str, list[str]] = {}
        self._open: list[str] = []
        self._in_token = False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += [(name, value or "") for name, value in attrs]
        self._open.append(tag)
        self._in_token = ("class", "t") in attrs
        if self._in_token:
            self.tokens.append("")

    def handle_endtag(self, tag):
        self._in_token = False
        if tag in self._open:
            while self._open.pop() != tag:
                pass

    def handle_data(self, data):
        if self._open:
            self.text.setdefault(self._open[-1], []).append(data)
        if self._in_token:
            self.tokens[-1] += data

    def values(self, name: str) -> list[str]:
        return [value for key, value in self.attributes if key == name]
