"""The report and TensorBoard as a browser shows them. Needs Chromium (apt install chromium); skipped without it."""

import json
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from crossover.benchmarks.report.write import write_report

from ..fake_runs import write_comparison

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt install chromium"),
]


def browse(url: str, folder: Path, *options: str) -> tuple[str, set[str], str]:
    """Opens a page and returns its final DOM, the hosts that it asked for anything, and the console's messages.

    No name is resolved, so nothing leaves this machine; what the browser itself would like to ask does not count.
    """
    assert CHROMIUM is not None
    log = folder / "net.json"
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", f"--user-data-dir={folder / 'profile'}",
        f"--log-net-log={log}", *options, "--dump-dom", url,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    return done.stdout, _hosts(log.read_text(errors="replace")), console


def _hosts(net_log: str) -> set[str]:
    """Hosts of the requests that pages made; those of the browser itself have no origin as their initiator."""
    try:
        events = json.loads(net_log)["events"]
    except json.JSONDecodeError:  # the browser ended before it closed the list
        events = json.loads(net_log.rstrip().rstrip(",") + "]}")["events"]
    asked = [event.get("params") or {} for event in events]
    by_pages = [request for request in asked if request.get("initiator", "not an origin") != "not an origin"]
    urls = [request["url"] for request in by_pages if "url" in request]
    return {urllib.parse.urlsplit(url).hostname or "" for url in urls}


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_comparison(tmp_path_factory.mktemp("compare"))
    write_report(folder)
    return folder


def test_a_request_to_another_host_would_be_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text('<!doctype html><img src="http://example.com/picture.png">')
    assert browse(page.as_uri(), tmp_path)[1] == {"example.com"}


def test_report_opens_without_errors_or_requests(comparison: Path, tmp_path: Path) -> None:
    dom, hosts, console = browse((comparison / "report.html").as_uri(), tmp_path)
    assert "Five sequence models at one budget" in dom
    assert hosts == set()
    assert console == ""


@pytest.mark.parametrize("width", [1280, 500])
def test_report_fits_its_window_and_draws_its_pictures(comparison: Path, tmp_path: Path, width: int) -> None:
    # The report allows no scripts, so a page that frames it asks for its measures.
    page = (comparison / "report.html").read_text().replace("default-src 'none'", "script-src 'unsafe-inline'")
    probe = """<script>addEventListener("load", () => {
      const images = [...document.images];
      document.body.innerHTML = JSON.stringify({
        page: document.documentElement.scrollWidth, window: innerWidth,
        drawn: images.filter(i => i.complete && i.naturalWidth > 0).length, images: images.length,
        smallest: Math.min(...images.map(i => i.getBoundingClientRect().width)),
      })})</script>"""
    path = tmp_path / "probe.html"
    path.write_text(page.replace("</body>", probe + "</body>"))
    dom, _, _ = browse(path.as_uri(), tmp_path, f"--window-size={width},900")
    found = json.loads(re.sub("<[^>]*>", "", dom[dom.index("<body>") :]))
    assert found["page"] <= found["window"]
    assert found["drawn"] == found["images"] == 9
    assert found["smallest"] > 320


@pytest.fixture
def tensorboard(tmp_path: Path) -> Iterator[str]:
    """TensorBoard over two runs whose events were written the way the trainer writes them."""
    from crossover.train.record import MetricsLog

    for arch in ("mamba", "transformer"):
        (tmp_path / "runs" / f"{arch}-s0").mkdir(parents=True)
        log = MetricsLog(tmp_path / "runs" / f"{arch}-s0")
        for step in range(1, 6):
            log.append({"step": step, "train/loss": 5 / step, "perf/tokens_per_second": 1e4, "perf/peak_bytes": 1e8})
        log.append({"step": 5, "val/loss": 1.5, "val/bits_per_byte": 2.2})
        log.close()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", "--logdir", str(tmp_path / "runs"), "--host", "127.0.0.1", "--port",
         str(port), "--load_fast=false", "--reload_interval", "0"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while len(_get(f"{url}/data/runs") or ()) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.3)
        yield url
    finally:
        server.terminate()
        server.wait(30)


def _get(url: str) -> Any:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)
    except (urllib.error.URLError, ConnectionError):
        return None


def test_tensorboard_shows_quality_and_cost_of_every_run(tensorboard: str, tmp_path: Path) -> None:
    layout = _get(f"{tensorboard}/data/plugin/custom_scalars/layout")
    assert [category["title"] for category in layout["category"]] == ["Quality", "Quality at equal budgets", "Cost"]
    tags = _get(f"{tensorboard}/data/plugin/scalars/tags")
    assert all({"train/loss", "val/bits_per_byte", "perf/peak_bytes"} <= runs.keys() for runs in tags.values())
    assert len(tags) == 2
    dom, hosts, console = browse(f"{tensorboard}/#custom_scalars", tmp_path, "--virtual-time-budget=15000")
    assert "tf-custom-scalar-dashboard" in dom
    assert hosts == {"127.0.0.1"}
    assert not re.search("Uncaught|TypeError|ReferenceError", console), console
