"""Print how large reports are and when they are interactive in a headless Chromium.

Run with ``python benchmarks/report.py runs/reach/report.html [more pages] [--repeats 3] [--width 1280]``; without a
page it takes a made-up study of reach of ten suites by three methods. It needs the packages chromium and
chromium-driver.

Interactive is the end of the last task of more than 50 ms before the page is quiet (shorter tasks keep no reader
waiting), or the end of the load event, if that is later. Printed beside it: the load event, and the longest task after
it, which is how long a reader's click may wait while a picture is drawn. Pictures are drawn when a reader comes near.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
)
WATCH = (
    "window.longTasks = []; new PerformanceObserver(list => list.getEntries().forEach("
    "task => longTasks.push([task.startTime, task.duration]))).observe({type: 'longtask', buffered: true})"
)
LOADED = "return performance.getEntriesByType('navigation')[0].loadEventEnd"
QUIET = 5  # seconds after the load event in which all tasks are counted


def made_up(directory: Path) -> Path:
    """The report of a made-up study of reach, as the tests open it."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from synthetic import reach

    from secateur.reports.html import render_generalise

    page = directory / "reach.html"
    page.write_text(render_generalise(reach()), encoding="utf-8")
    return page


def measure(driver: webdriver.Chrome, page: Path) -> tuple[float, float, float]:
    """Milliseconds until a page is loaded and interactive, and its longest task after the load event."""
    driver.get("about:blank")
    driver.get(page.resolve().as_uri())
    time.sleep(QUIET)
    loaded, tasks = driver.execute_script(LOADED), driver.execute_script("return longTasks")
    interactive = max([loaded, *(start + length for start, length in tasks)])
    return loaded, interactive, max((length for start, length in tasks if start + length > loaded), default=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pages", nargs="*", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--width", type=int, default=1280)
    told = parser.parse_args()
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in FLAGS:
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": WATCH})
    metrics = {"width": told.width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    with tempfile.TemporaryDirectory() as directory:
        try:
            for page in told.pages or [made_up(Path(directory))]:
                print(f"{page}: {page.stat().st_size / 1e6:.2f} MB")
                for _ in range(told.repeats):
                    loaded, interactive, longest = measure(driver, page)
                    print(f"  loaded {loaded:.0f} ms, interactive {interactive:.0f} ms, longest task {longest:.0f} ms")
        finally:
            driver.quit()


if __name__ == "__main__":
    main()
