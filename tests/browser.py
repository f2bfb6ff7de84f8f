"""A real browser without a window, for the pages that are handed out."""

import html
import json
import re
import shutil
import subprocess
from typing import Any

import pytest


def chromium() -> str:
    """The browser's command; skips the test where there is none."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    return found or pytest.skip("no chromium is installed")


def seen(address: str, profile, *more: str) -> str:
    """The page as the browser has it in the end."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom", *more]
    command = [chromium(), *flags, f"--user-data-dir={profile}", address]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False).stdout


def told(folder, page: str) -> Any:
    """What the scripts of a page found, which they leave as JSON in `document.body.dataset.found`.

    The page is written into `folder`, where the files lie that it frames.
    """
    (folder / "frame.html").write_text(page, encoding="utf-8")
    dom = seen((folder / "frame.html").as_uri(), folder / "profile")
    return json.loads(html.unescape(re.findall(r'data-found="([^"]*)"', dom)[0]))
