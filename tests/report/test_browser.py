"""What a real browser makes of a page; skipped where there is none."""

import json
import re
import shutil
import subprocess
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from rlhf_env.records.safe_text import safe_text
from rlhf_env.report.content import Report, Response, Sample
from rlhf_env.report.page import render_report
from tests.report.pages import HOSTILE, SCRIPT, Page, hostile_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--virtual-time-budget=2000"),
)
MEASURE = """<script>
const colours = () => [...document.querySelectorAll('.t')].map(token => getComputedStyle(token).backgroundColor)
const keys = () => [...document.querySelectorAll('.key')].filter(key => key.offsetParent).map(key => key.innerText)
const found = [...document.querySelectorAll('input')].map(input => {
  input.focus()
  const reachable = document.activeElement === input && input.tabIndex === 0
  document.querySelector(`label[for=${input.id}]`).click()
  return {colours: colours(), keys: keys(), reachable, checked: document.querySelectorAll('input:checked').length}
})
const too_wide = document.documentElement.scrollWidth - document.documentElement.clientWidth
document.body.innerHTML = ''
document.body.dataset.found = JSON.stringify({found, too_wide})
</script>"""

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH")


def show(html: str, folder: Path, *flags: str) -> Page:
    """The page as the browser holds it after two seconds of its clock."""
    file = folder / "report.html"
    file.write_text(html, encoding="utf-8")
    command = [BROWSER, *FLAGS, *flags, f"--user-data-dir={folder / 'profile'}", "--dump-dom", file.as_uri()]
    return Page(subprocess.run(command, capture_output=True, timeout=60, check=True).stdout.decode("utf-8"))


def without_policy(html: str) -> str:
    html, count = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)
    assert count == 1
    return html


def measure(report: Report, folder: Path, *flags: str) -> dict:
    """What a script finds that works the switch of a page, in a copy of it that allows scripts."""
    page = show(without_policy(render_report(report)).replace("</body>", MEASURE + "</body>"), folder, *flags)
    return json.loads(page.values("data-found")[0])


class Server(ThreadingHTTPServer):
    """What anything that calls home would reach."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.calls = 0


class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.calls += 1
        self.send_error(404)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with Server() as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def beacons(server: Server) -> tuple[str, ...]:
    url = f"http://127.0.0.1:{server.server_port}/"
    return (
        f'"><img src="{url}"><link rel=stylesheet href="{url}">',
        f"background:url({url})}}*{{background:url({url})}}",
    )


@pytest.mark.parametrize("protected", [True, False], ids=["as it is", "without its content security policy"])
def test_hostile_text_does_nothing_and_is_shown(tmp_path, server, protected):
    payloads = HOSTILE + beacons(server)
    html = render_report(hostile_report(payloads))
    html = html if protected else without_policy(html)
    page = show(html, tmp_path)
    shown = [safe_text(payload, multiline=True) for payload in payloads]
    assert page.text["title"][0] == " ".join(shown)
    assert page.values("id") == ["q0", "q1", "q2"]
    assert not {"script", "img", "iframe", "link", "b", "object", "embed"} & set(page.tags)
    assert page.tags == Page(html).tags
    assert page.tokens == [text.replace("\n", "⏎\n").replace("\t", "⇥\t") for text in shown] * 3
    assert server.calls == 0


def test_the_traps_work(tmp_path, server):
    page = show(f"<title>free</title><body>{''.join(beacons(server))}<script>{SCRIPT}</script>", tmp_path)
    assert page.text["title"] == ["owned"]
    assert page.values("id") == ["owned"]
    assert server.calls > 0


def test_the_policy_refuses_scripts_and_requests_by_itself(tmp_path, server):
    html = render_report(Report("free", footer="FOOTER"))
    page = show(html.replace("FOOTER", f"{''.join(beacons(server))}<script>{SCRIPT}</script>"), tmp_path)
    assert page.tags["script"] == page.tags["img"] == 1
    assert page.text["title"] == ["free"]
    assert "owned" not in page.values("id")
    assert server.calls == 0


def test_the_switch_colours_the_tokens(tmp_path):
    numbers = {"reward": [1.0, -0.5, 0.0], "kl": [float("nan"), 0.1, 0.2], "ratio": [0.5, 2.0, 1.0]}
    report = Report("r", samples=(Sample("p", None, Response(("a", " b", "<eos>"), numbers, {})),))
    found = measure(report, tmp_path, "--blink-settings=preferredColorScheme=1")["found"]  # light
    blue, orange = "rgba(62, 130, 222, {})", "rgba(236, 132, 34, {})"
    reward, kl, ratio = (choice["colours"] for choice in found)
    assert reward == [blue.format(0.7), orange.format(0.35), orange.format(0)]
    assert kl == ["rgba(0, 0, 0, 0)", blue.format(0.35), blue.format(0.7)]
    assert ratio == [orange.format(0.7), blue.format(0.7), orange.format(0)]
    assert [choice["keys"][0].split("\n")[:3] for choice in found] == [
        ["−1", "0", "1"],
        ["−0.2", "0", "0.2"],
        ["0.5", "1", "2"],
    ]
    assert all(choice["reachable"] and choice["checked"] == len(choice["keys"]) == 1 for choice in found)


@pytest.mark.parametrize("width", [1200, 500])
def test_nothing_makes_the_page_wider_than_the_window(tmp_path, width):
    assert measure(hostile_report(), tmp_path, f"--window-size={width},2400")["too_wide"] == 0
