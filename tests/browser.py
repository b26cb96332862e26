"""Debian's Chromium without a window, driven by Playwright, for the tests marked `browser`."""

import shutil

import pytest

INSTALL = "pip install playwright; apt-get install chromium"
WIDTHS = (1400, 400)


def chromium() -> str:
    """Path of the system's Chromium."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip(f"no Chromium is installed: {INSTALL}")
    return found


@pytest.fixture(scope="module")
def browser():
    """A browser without a window."""
    playwright = pytest.importorskip("playwright.sync_api", reason=f"Playwright is not installed: {INSTALL}")
    path = chromium()
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield running
        running.close()
