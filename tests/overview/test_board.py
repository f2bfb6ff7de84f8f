"""`sslcells board`: the page, what its server answers, and both in a real browser."""

import contextlib
import http.client
import re
import shutil
import socket
import threading

import browser
import pytest
from run_folders import make

from sslcells.cli import main
from sslcells.overview import board
from sslcells.overview.board import Server
from sslcells.overview.found import runs


@pytest.fixture
def folder(tmp_path):
    """Three runs; the first has reports, the second a name and a note that HTML must not take for its own."""
    made = tmp_path / "runs"
    make(made / "a b", done=200, finished=True)
    for name in ("report.html", "comparison.html"):
        (made / "a b" / name).write_text(f"<title>{name}</title>")
    make(made / "<i>b&amp;</i>", done=40, stopped="<script>document.title = 'broken into'</script>")
    make(made / "c", done=150)
    return made


@contextlib.contextmanager
def serving(folder):
    with Server(folder, 0) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()


def asked(server, path, host=None):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
    connection.request("GET", path, headers={"Host": host} if host else {})
    answer = connection.getresponse()
    return answer.status, answer.read().decode(), answer.headers


def test_the_page_in_a_file_needs_nothing_else(folder, tmp_path, capsys):
    out = tmp_path / "board.html"
    assert main(None, ["board", str(folder), "--out", str(out)]) == 0
    text = out.read_text()
    assert capsys.readouterr().out.strip() == str(out)
    assert set(re.findall(r'(?:src|href|action)="([^"]*)"', text)) == {
        "runs/a%20b/report.html",
        "runs/a%20b/comparison.html",
    }
    assert not re.search(r"https?://|@import|url\(", text)
    assert "&lt;i&gt;b&amp;amp;&lt;/i&gt;" in text
    assert text.count("<script>") == 1
    assert text.count("<polyline") == 5  # the second has too few figures of val for a curve
    assert 'data-v="0.6"' in text
    assert "setTimeout(renew, 0)" in text


def test_the_server_answers_the_page_and_reports_and_nothing_else(folder):
    with serving(folder) as server:
        status, text, headers = asked(server, "/")
        assert status == 200
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        links = re.findall(r'href="([^"]+)"', text)
        assert links == ["/runs/a%20b/report.html", "/runs/a%20b/comparison.html"]
        status, report, headers = asked(server, links[0])
        assert (status, report) == (200, "<title>report.html</title>")
        assert "sandbox" in headers["Content-Security-Policy"]
        for path in (
            "/runs/a%20b/config.yaml",
            "/runs/../../etc/passwd",
            "/runs/%2e%2e/x",
            "/runs/c/report.html",
        ):
            assert asked(server, path)[0] == 404, path
        assert asked(server, "/", host="evil.example")[0] == 403
        assert asked(server, "/", host=f"localhost:{server.server_address[1]}")[0] == 200


def test_a_folder_that_has_gone_is_said(folder, monkeypatch):
    monkeypatch.setattr(board, "KEPT", 0.0)
    with serving(folder) as server:
        assert asked(server, "/")[0] == 200
        shutil.rmtree(folder)
        status, text, _ = asked(server, "/")
        assert (status, "no such folder" in text) == (503, True)


def test_mistakes(folder, tmp_path, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(None, ["board", str(folder), "--port", port]) == 2
    assert f"--port {port}: Address already in use; choose another" in capsys.readouterr().err
    assert main(None, ["board", str(folder), "--out", str(tmp_path / "no" / "x.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert main(None, ["board", str(tmp_path / "nothing"), "--port", "0"]) == 2
    assert "no such folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(None, ["board", "--port", "70000"])
    assert "'70000' is no port from 0 to 65535" in capsys.readouterr().err


USED = """
<iframe id="f" src="board.html" width="400" height="800" style="border:0"></iframe><script>
onload = () => {
  const d = f.contentDocument, out = {}, names = () => [...d.getElementById("runs").rows]
    .filter(row => !row.hidden).map(row => row.cells[0].firstChild.textContent.trim()).join("|");
  const heading = text => [...d.querySelectorAll("th button")].find(b => b.textContent === text);
  out.width = d.documentElement.scrollWidth <= d.documentElement.clientWidth;
  out.curve = d.querySelector("polyline").getBoundingClientRect().width > 50;
  heading("step").click(); out.up = names();
  heading("step").click(); out.down = names() + heading("step").parentNode.getAttribute("aria-sort");
  heading("run").click(); out.name = names();
  const words = d.getElementById("filter");
  words.value = "STOPPED resumes"; words.dispatchEvent(new Event("input")); out.filtered = names();
  out.title = d.title;
  document.body.dataset.found = JSON.stringify(out);
};</script>
"""


@pytest.mark.slow
def test_a_browser_sorts_and_filters_it_at_400_px(folder, tmp_path):
    main(None, ["board", str(folder), "--out", str(tmp_path / "board.html")])
    odd = "<i>b&amp;</i>"
    assert browser.told(tmp_path, USED) == {
        "width": True,
        "curve": True,
        "up": f"{odd}|c|a b",
        "down": f"a b|c|{odd}descending",
        "name": f"{odd}|a b|c",
        "filtered": "c",
        "title": "Runs in runs",
    }


@pytest.mark.slow
def test_an_open_page_renews_itself(folder, tmp_path, monkeypatch):
    asked_for = []

    def changing(below):
        asked_for.append(below)
        if len(asked_for) == 3:  # the server's own check, the page, and now its news
            make(folder / "new", done=150)
        return runs(below)

    monkeypatch.setattr(board, "runs", changing)
    monkeypatch.setattr(board, "KEPT", 0.0)
    monkeypatch.setattr(board, "REFRESH", 0.5)
    with serving(folder) as server:
        dom = browser.seen(server.address, tmp_path / "profile", "--virtual-time-budget=3000")
    assert len(asked_for) >= 3
    assert "4 runs:" in dom
    assert re.search(r"<tr><td>new</td>", dom)
    assert 'id="lost" role="status"></span>' in dom
