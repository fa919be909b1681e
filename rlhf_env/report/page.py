"""The report page: one HTML file that needs nothing else, runs no script and loads nothing."""

from __future__ import annotations

import re

from rlhf_env.records.safe_text import safe_html
from rlhf_env.report.charts import draw_chart, draw_histogram
from rlhf_env.report.content import Chart, Report, Table
from rlhf_env.report.samples import draw_samples

_NUMBER = re.compile(r"\W*(\d[^A-Za-z]*([A-Za-z]{1,4}[^A-Za-z]*){0,2})?")  # "−0.5", "98 %", "2.1 to 2.6", "3 min 2 s"


def render_report(report: Report) -> str:
    """The whole page as HTML, which is UTF-8 on disk. Every text in it is shown, never interpreted."""
    parts = [f"<header><h1>{safe_html(report.title)}</h1>{_paragraph(report.subtitle)}</header>"]
    if report.tables:
        parts.append(f'<section class="tables">{"".join(map(_draw_table, report.tables))}</section>')
    if report.charts:
        drawn = [draw_chart(c) if isinstance(c, Chart) else draw_histogram(c) for c in report.charts]
        parts.append(f'<section class="charts">{"".join(drawn)}</section>')
    if report.samples:
        parts.append(draw_samples(report.samples, report.samples_note))
    if report.footer:
        parts.append(f"<footer>{_paragraph(report.footer)}</footer>")
    return _PAGE.format(title=safe_html(report.title), style=_STYLE, body="\n".join(parts))


def _draw_table(table: Table) -> str:
    columns = range(max(map(len, [table.columns, *table.rows])))
    numeric = [
        bool(table.rows) and all(_NUMBER.fullmatch(row[i]) for row in table.rows if i < len(row)) for i in columns
    ]

    def cells(tag: str, row: tuple[str, ...]) -> str:
        marked = zip(row, numeric, strict=False)
        return "".join(f"<{tag}{' class=n' * right}>{safe_html(cell)}</{tag}>" for cell, right in marked)

    head = f"<thead><tr>{cells('th', table.columns)}</tr></thead>"
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in table.rows)
    grid = f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'
    note = f'<p class="note">{safe_html(table.note)}</p>' if table.note else ""
    return f'<div class="card"><h3>{safe_html(table.title)}</h3>{grid}{note}</div>'


def _paragraph(text: str) -> str:
    return f"<p>{safe_html(text)}</p>" if text else ""


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""

_STYLE = """
:root{--bg:#f6f7f9;--card:#fff;--ink:#1b2330;--muted:#5c6777;--line:#e2e6ec;--axis:#aab3bf;--up:62 130 222;\
--down:236 132 34;--s0:#2b6cb8;--s1:#d9731a;--s2:#1f8f70;--s3:#a24e96;--s4:#8a7413;--s5:#596273}
@media screen and (prefers-color-scheme:dark){:root{--bg:#11151b;--card:#191e26;--ink:#e4e9f0;--muted:#9aa5b4;\
--line:#2b323d;--axis:#566070;--up:70 138 230;--down:226 122 34;--s0:#6aa9ee;--s1:#f0a04b;--s2:#4cc3a0;--s3:#d58bcb;\
--s4:#cbb85c;--s5:#a5afbd}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1280px;padding:28px 24px;background:var(--bg);color:var(--ink);\
font:14px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif;overflow-wrap:anywhere}
h1,h2,h3,h4,p,figure,dl,dd,fieldset{margin:0;padding:0;border:0}
h1{font-size:24px;line-height:1.25;letter-spacing:-.01em}
h2{font-size:18px;margin-bottom:4px}
h3{font-size:14px;line-height:1.35}
h4,dt,legend,th{font-size:12px;font-weight:500;color:var(--muted)}
header p,footer,.note,.label,small{color:var(--muted)}
header p{white-space:pre-line}
section{margin-top:22px}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 16px;min-width:0}
.note,.label,small{font-size:12px}
.card .note{margin-top:8px}
.tables{display:flex;flex-wrap:wrap;gap:16px}
.tables .card{flex:1 1 auto;max-width:100%}
.scroll{overflow-x:auto;background:linear-gradient(var(--card) 0 0) 0/16px 100% no-repeat local,\
linear-gradient(var(--card) 0 0) 100%/16px 100% no-repeat local,\
linear-gradient(90deg,var(--line),transparent) 0/16px 100% no-repeat,\
linear-gradient(270deg,var(--line),transparent) 100%/16px 100% no-repeat}
table{border-collapse:collapse;width:100%;margin-top:6px;font-variant-numeric:tabular-nums}
th,td{padding:5px 18px 5px 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--line);\
overflow-wrap:break-word;max-width:36em}
th{vertical-align:bottom}
tr>:last-child{padding-right:0}
tbody tr:last-child td{border-bottom:0}
.n{text-align:right}
.charts{display:grid;gap:16px;grid-template-columns:repeat(auto-fit,minmax(min(100%,340px),1fr))}
.charts .card{display:flex;flex-direction:column;max-width:620px}
.keys{display:flex;flex-wrap:wrap;gap:0 14px;margin:2px 0 4px;font-size:12px}
.keys i{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:6px;background:var(--c)}
.label.x{text-align:right}
.s0{--c:var(--s0)}.s1{--c:var(--s1)}.s2{--c:var(--s2)}.s3{--c:var(--s3)}.s4{--c:var(--s4)}.s5{--c:var(--s5)}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{font-size:11px;fill:var(--muted);font-variant-numeric:tabular-nums}
svg path{fill:none;pointer-events:none;stroke-linecap:round;stroke-linejoin:round}
.grid{stroke:var(--line)}.axis{stroke:var(--axis)}
.diagonal{stroke:var(--muted);stroke-dasharray:4 5}
.line,.steps{stroke:var(--c);stroke-width:2}.bar{stroke:var(--c);stroke-width:1.5}
svg .band{fill:var(--c);stroke:var(--c);fill-opacity:.16;stroke-opacity:.16}
svg .steps{fill:var(--c);fill-opacity:.16;stroke-width:1.5}
.dot{fill:var(--c);stroke:var(--card)}
.hit,.bin{fill:transparent}.hit:hover{fill:var(--c)}.bin:hover{fill:var(--ink);fill-opacity:.07}
.switch{display:flex;flex-wrap:wrap;align-items:center;gap:6px 20px;padding:8px 0;background:var(--bg)}
fieldset{display:flex;flex-wrap:wrap;position:relative}
legend{float:left;padding:4px 10px 0 0}
fieldset input{position:absolute;opacity:0;pointer-events:none}
label{padding:3px 12px;margin-right:-1px;border:1px solid var(--line);background:var(--card);cursor:pointer}
label:first-of-type{border-radius:7px 0 0 7px}label:last-of-type{border-radius:0 7px 7px 0}
label:only-of-type{border-radius:7px}
input:checked+label{background:var(--ink);color:var(--card);border-color:var(--ink)}
input:focus-visible+label{outline:2px solid var(--s0);outline-offset:2px}
.key{display:none;align-items:center;flex-wrap:wrap;gap:0 8px;font-variant-numeric:tabular-nums;font-size:12px}
.key i{width:140px;border-radius:4px;border:1px solid var(--line);text-align:center;font-style:normal;\
background:linear-gradient(90deg,rgb(var(--down)/.7),rgb(var(--down)/0) 50%,rgb(var(--up)/0) 50%,rgb(var(--up)/.7)),\
var(--card)}
.samples .card{margin-top:12px}
.prompt,.response{white-space:pre-wrap}
.prompt{font-weight:600;margin-bottom:10px}
.sides{display:grid;gap:14px 28px;grid-template-columns:repeat(auto-fit,minmax(min(100%,320px),1fr))}
.side{min-width:0}
.response{line-height:1.9;margin:2px 0 6px}
.response:empty::before{content:"(no tokens)";color:var(--muted)}
.t{padding:2px 0;margin-right:1px;border-radius:3px;border-bottom:1px solid var(--line);\
-webkit-box-decoration-break:clone;box-decoration-break:clone}
.t:empty::before{content:"∅";color:var(--muted)}
.t:hover,.t:focus{outline:2px solid var(--muted);outline-offset:0}
.t:focus::after{content:attr(title);position:fixed;z-index:2;left:16px;bottom:16px;max-width:calc(100vw - 32px);\
padding:8px 12px;border-radius:8px;background:var(--ink);color:var(--card);font-size:12px;line-height:1.5}
dl{display:flex;flex-wrap:wrap;gap:2px 18px;font-variant-numeric:tabular-nums}
dl div{display:flex;gap:6px;align-items:baseline}
dd{font-size:13px}
footer{margin-top:22px;font-size:12px;white-space:pre-line}
@media screen and (min-width:800px){.switch{position:sticky;top:0;z-index:1}}
@media (max-width:600px){body{padding:16px 12px}.card{padding:12px}th,td{padding-right:12px}\
legend{float:none}label{padding:3px 10px}}
@media print{body{max-width:none;padding:0;--bg:#fff;-webkit-print-color-adjust:exact;print-color-adjust:exact}\
.card,.key{break-inside:avoid}fieldset label{display:none}input:checked+label{display:inline}.switch{position:static}}
"""
