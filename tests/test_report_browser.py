"""Reports in a real browser: no network, no error, no hostile script, usable by keyboard and on any screen."""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import Document, save_model, small_suite, write_suite, write_text
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait
from synthetic import METHODS, SUITES, reach

import secateur
from secateur.measures.toxicity import Classifier
from secateur.reports.html import render_generalise

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs the packages chromium and chromium-driver")

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
STUDIES = ("audit", "repair", "compare", "generalise", "slim", "verify")
FULL = "generalise, full"  # ten suites by three methods, made up
PAGES = (*STUDIES, FULL)
WITH_PICTURES = ("audit", "repair", "compare", "generalise", FULL)
WITH_RATES = ("audit", "repair")
# What a reader of each page must find: a part of its headings, in their order.
HEADINGS = {
    "audit": ("What was asked", "Disparity by scenario", "Distribution of y", "Selection rates", "European Union"),
    "repair": (
        "What was asked",
        "Before and after",
        "utility",
        "What the model writes",
        "Controls",
        "Where the units sit",
        "All candidates",
        "How units were found",
        "Settings",
        "Selection rates",
        "European Union",
    ),
    "compare": (
        "Held-out results",
        "Bias against perplexity",
        "Cost",
        "How units were found",
        "What was asked",
        "Settings",
        "All candidates",
        "European Union",
    ),
    "generalise": (
        "fitted on one suite, judged on another",
        "What was asked",
        "How units were found",
        "European Union",
    ),
    "slim": ("Before and after", "What was tried", "What was asked"),
    "verify": (
        "What was asked",
        "What the model writes",
        "Sampled answers",
        "eyes of a classifier",
        "Open prompts",
    ),
}
HEADINGS[FULL] = HEADINGS["generalise"]
ALWAYS = ("Definitions", "Limits", "How this was made")
PASSING = 2  # seed of a tiny model: a repair of the small suite finds something
MOST_BYTES = 6_000_000
ALL_DRAWN = "[...document.querySelectorAll('.plot')].every(plot => plot.querySelector('.main-svg'))"
ATTACK = """"'></script><script>window.hacked = true</script><img src=x onerror="window.hacked = true">{{ 7 * 7 }}"""


def rising(texts: Any) -> np.ndarray:
    """Scores of a made-up classifier, which differ between any two texts."""
    return np.array([sum(text.encode()) % 97 / 96 for text in texts])


def hostile_suite(name: str = "small") -> Document:
    """The small suite with an attack in every text that a suite may hold; the preference is a decision."""
    document = small_suite(name=name, title=ATTACK, description=ATTACK, sources=[ATTACK], domain=ATTACK)
    for group, markers in document["groups"].items():
        document["groups"][group] = [f"{marker} {ATTACK}" for marker in markers]
    for scenario in document["scenarios"]:
        scenario["paraphrases"] = [f"{text} {ATTACK}" for text in scenario["paraphrases"]]
    document["scenarios"][0]["measure"] |= {"a": [f" yes {ATTACK}"], "favourable": "a"}
    document["scenarios"][1]["measure"]["unit"] = ATTACK
    return document


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The report of every study of a tiny model, by study; the suite and the model's path are hostile."""
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("reports") / "<img src=x onerror=hacked=1>"
    directory.mkdir()
    model = secateur.load(save_model(directory / "model", PASSING), device="cpu")
    suite = write_suite(directory, hostile_suite())
    told: dict[str, Any] = {"utility_text": write_text(directory, 1200), "control_suite": None}
    options = {"max_heads": 1, "max_neurons": 4, "rounds": 1}
    search: dict[str, Any] = {**told, "max_perplexity_increase": 5, "random_draws": 2}
    output = {study: directory / study for study in STUDIES}
    secateur.audit(model, suite, output=output["audit"])
    assert secateur.repair(model, suite, output=output["repair"], options=options, **search).mask is not None
    methods = {"methods": ("attribution", "random"), "quick": True}
    secateur.compare(model, suite, output=output["compare"], **methods, **search)
    other = {**hostile_suite("other"), "attribute": f"other thing {ATTACK}"}
    uses = [suite, *(write_suite(directory, one, one["name"]) for one in (hostile_suite("more"), other))]
    each = {"attribution": options, "random": {"heads": 1, "neurons": 4}}
    settings = {"methods": ("attribution", "random"), "options": each, "modes": ("across", "attributes")}
    secateur.generalise(model, uses, output=output["generalise"], **settings, **{**search, "random_draws": 1})
    decoding = {"decode_tokens": 4, "decode_runs": 3, "utility_tokens": 600}
    secateur.slim(model, None, suite, output=output["slim"], importance="data", **decoding, **told)
    with pytest.MonkeyPatch.context() as patch:
        judge = Classifier(ATTACK, (ATTACK,), rising, ATTACK)
        patch.setattr("secateur.studies.verification.load_classifier", lambda *_: judge)
        patch.setattr("secateur.studies.verification.OPEN_TOKENS", 6)
        secateur.verify(model, output["repair"], suite, output=output["verify"], runs=2, worse=0.001)
    found = {study: path / "report.html" for study, path in output.items()}
    found[FULL] = directory / "full.html"
    found[FULL].write_text(render_generalise(reach()), encoding="utf-8")
    return found


class Browser:
    """A headless Chromium, and what it saw."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, report: Path, width: int = 1280, scheme: str = "light") -> None:
        """Load a report afresh, as wide a page and in the scheme that is asked for, with all pictures drawn."""
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.prefer(scheme)
        self.driver.get("about:blank")
        self.driver.get_log("browser")
        self.driver.get_log("performance")
        self.driver.get(report.as_uri())
        self.run("document.querySelectorAll('.plot').forEach(draw)")  # as for a reader who scrolls to the end
        assert self.run(ALL_DRAWN)

    def prefer(self, scheme: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(f"return {script}", *arguments)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def headings(self) -> list[str]:
        return [heading.text for heading in self.all("h1, h2, h3")]

    def save_screenshot(self, file: Path, width: int) -> None:
        """The whole page, as it is now, or the upper part of a very long one."""
        height = min(self.run("document.documentElement.scrollHeight"), 12_000)
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        taken = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(base64.b64decode(taken["data"]))

    def press(self, key: str) -> None:
        self.driver.switch_to.active_element.send_keys(key)

    @property
    def errors(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]

    @property
    def requests(self) -> list[str]:
        """Addresses of everything that was asked for since the page was opened."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield Browser(driver)
    driver.quit()


def is_local(address: str) -> bool:
    return address.startswith(("data:", "blob:"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("study", PAGES)
def test_a_report_opens_without_error_or_network_and_fits_its_page(
    browser: Browser, reports: dict[str, Path], study: str, width: int, scheme: str, tmp_path: Path
) -> None:
    report = reports[study]
    browser.open(report, width, scheme)
    assert browser.errors == []
    assert [address for address in browser.requests if not is_local(address)] == [report.as_uri()]
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert len(browser.all("h1")) == len(browser.all("#command")) == 1
    assert len(browser.all(".verdict")) == 1
    headings = iter(browser.headings())
    for wanted in (*HEADINGS[study], *ALWAYS):
        assert any(wanted in heading for heading in headings), f"{wanted} is missing, or not in its place"
    assert (len(browser.all(".plot")) > 0) == (study in WITH_PICTURES)
    assert all(figure.get_attribute("aria-label") for figure in browser.all("figure"))
    assert report.stat().st_size <= MOST_BYTES
    place = Path(os.environ.get("SECATEUR_SCREENSHOTS") or tmp_path)
    browser.save_screenshot(place / f"{study.replace(', ', '-')}-{width}-{scheme}.png", width)


def test_a_full_study_of_reach_can_be_read_on_a_phone(browser: Browser, reports: dict[str, Path]) -> None:
    """Cells are wide enough for their figures, a region scrolls to them, and one source's candidates show at a time."""
    browser.open(reports[FULL], 390)
    regions = browser.all("figure .scroll[tabindex='0'][role=region][aria-label]")
    assert len(regions) == 3 * len(METHODS)
    matrix = regions[0]
    seen, whole = browser.run("[arguments[0].clientWidth, arguments[0].scrollWidth]", matrix)
    assert seen < 390 < whole
    cell = "arguments[0].querySelector('.plot')._fullLayout.xaxis._length"
    assert browser.run(cell, matrix) / len(SUITES) >= 40
    widest = "Math.max(...[...arguments[0].querySelectorAll('.heatmap-label text')].map(text => text.getBBox().width))"
    assert 0 < browser.run(widest, matrix) < browser.run(cell, matrix) / len(SUITES)
    chooser = browser.one("select.chooser")
    figure = chooser.find_element(By.XPATH, "./ancestor::figure")
    shown = "arguments[0].querySelector('.plot').data.filter(trace => trace.visible).map(trace => trace.name)"
    for source in SUITES[:3]:
        assert browser.run(shown, figure) == ["Pareto front", source]
        assert figure.find_element(By.TAG_NAME, "output").text.startswith(f"{source}. Candidates: ")
        chooser.send_keys(Keys.ARROW_DOWN)
    rows = "document.querySelectorAll('[aria-label^=\"All candidates\"] tbody tr').length"
    assert browser.run(rows) == sum(len(fit.candidates) for fit in reach().fits)
    assert browser.errors == []


def test_a_verification_lists_what_its_classifier_finds_worse(browser: Browser, reports: dict[str, Path]) -> None:
    browser.open(reports["verify"])
    worse = browser.all("[aria-label='Continuations that a classifier finds worse'] tbody tr")
    assert worse
    for row in worse:
        _, _, _, before, _, after = (cell.text for cell in row.find_elements(By.TAG_NAME, "td"))
        assert float(after) >= float(before)
    groups = browser.all('[aria-label="The classifier\'s scores by group"] tbody tr')
    told = {row.text.split()[0]: row.find_elements(By.TAG_NAME, "td") for row in groups}
    assert set(told) == {"nobody", "boats", "lamps"}
    assert sum(int(cells[2].text) for cells in told.values()) == len(worse)


def test_two_methods_and_two_families_have_one_verdict_and_advice_each(
    browser: Browser, reports: dict[str, Path]
) -> None:
    browser.open(reports["generalise"])
    result = json.loads((reports["generalise"].parent / "generalise.json").read_text())
    (verdict,) = browser.all(".verdict")
    assert verdict.text == result["verdict"]
    beginnings = [advice.text.split(":")[0] for advice in browser.all(".advice")]
    for method in ("attribution", "random"):
        assert f"{method}, thing (en)" in beginnings
        assert sum(beginning.startswith(f"{method}, other thing") for beginning in beginnings) == 1
    assert len(beginnings) == 4
    rows = [row.text for row in browser.all("[aria-label^='What the repairs come to'] tbody tr")]
    assert len(rows) == len(result["summary"]) >= 4
    for row, told in zip(rows, result["summary"], strict=True):
        assert row.startswith(told["method"])
        assert (" random masks " in row) == (told["relation"] == "random")


@pytest.mark.parametrize("study", STUDIES)
def test_no_script_of_a_suite_or_a_path_runs(browser: Browser, reports: dict[str, Path], study: str) -> None:
    browser.open(reports[study])
    for plot in browser.all(".plot"):  # texts in pictures and hovers are Plotly's pseudo-HTML
        drawn = plot.find_elements(By.CSS_SELECTOR, "path.point") or [plot]
        ActionChains(browser.driver).move_to_element(drawn[0]).pause(0.2).perform()
    assert browser.errors == []
    assert browser.run("window.hacked") is None
    assert browser.all("img") == []
    titled = study not in ("generalise", "slim")  # these two begin with the model
    assert ("window.hacked = true" in browser.one("h1").text) == titled
    assert "{{ 7 * 7 }}" in browser.one("main").text


@pytest.mark.parametrize("study", STUDIES)
def test_the_policy_of_the_page_forbids_other_scripts_and_the_network(
    browser: Browser, reports: dict[str, Path], study: str
) -> None:
    browser.open(reports[study])
    browser.run("document.body.append(Object.assign(document.createElement('script'), {textContent: 'hacked = 1'}))")
    assert browser.run("window.hacked") is None
    browser.run("(new Image()).src = 'http://127.0.0.1:9/beacon.png'")
    assert len([message for message in browser.errors if "Content Security Policy" in message]) == 2


@pytest.mark.parametrize("study", STUDIES)
def test_the_keyboard_reaches_every_control(browser: Browser, reports: dict[str, Path], study: str) -> None:
    browser.open(reports[study], 390)
    browser.press(Keys.TAB)
    assert browser.run("document.activeElement.className") == "skip"
    browser.press(Keys.ENTER)
    assert browser.run("document.activeElement.id") == "content"
    wanted = browser.all("main select, main button:not([hidden]), main summary, main [role=region]")
    wanted = [element for element in wanted if element.is_displayed()]
    assert {element.tag_name for element in wanted} >= {"button", "div"}
    reached, outlined = [], []
    for _ in range(len(wanted) + 2):
        browser.press(Keys.TAB)
        reached.append(browser.driver.switch_to.active_element)
        outlined.append(browser.run("getComputedStyle(document.activeElement).outlineStyle"))
    assert [element for element in wanted if element not in reached] == []
    assert set(outlined[: len(wanted)]) == {"solid"}


@pytest.mark.parametrize("study", ["audit", "repair"])
def test_the_keyboard_chooses_a_scenario(browser: Browser, reports: dict[str, Path], study: str) -> None:
    browser.open(reports[study])
    chooser, said = browser.one("select.chooser"), browser.one("figure output")
    values = "JSON.stringify(arguments[0].closest('figure').querySelector('.plot').data.map(trace => trace.x))"
    seen = set()
    chooser.send_keys(Keys.HOME)
    for scenario in ("like", "price", "end"):
        assert said.text.startswith(f"{scenario}. Mean y")
        seen.add(browser.run(values, chooser))
        chooser.send_keys(Keys.ARROW_DOWN)
    assert len(seen) == 3
    assert browser.errors == []


def test_text_of_pictures_follows_the_scheme_when_it_changes(browser: Browser, reports: dict[str, Path]) -> None:
    browser.open(reports["repair"])
    colour = "[...document.querySelectorAll('.plot .xtick text')].map(text => getComputedStyle(text).fill)"
    light = set(browser.run(colour))
    browser.prefer("dark")
    dark = set(browser.run(colour))
    assert (len(light), len(dark)) == (1, 1)
    assert light != dark


def test_pictures_fit_a_printed_page_and_grow_back(browser: Browser, reports: dict[str, Path]) -> None:
    browser.open(reports["repair"])
    widths = "[...document.querySelectorAll('.plot')].map(plot => plot._fullLayout.width)"
    before = browser.run(widths)
    assert min(before) > 640
    browser.run("window.dispatchEvent(new Event('beforeprint'))")
    assert set(browser.run(widths)) == {640}
    browser.run("window.dispatchEvent(new Event('afterprint'))")
    assert browser.run(widths) == before


@pytest.mark.parametrize("study", ["audit", "repair", "verify"])
def test_what_is_folded_away_is_printed_and_folded_again(
    browser: Browser, reports: dict[str, Path], study: str
) -> None:
    browser.open(reports[study])
    folded = "[...document.querySelectorAll('details')].map(details => details.open)"
    if study == "repair":
        browser.one("summary").click()
    before = browser.run(folded)
    assert before == [study == "repair", *[False] * (len(before) - 1)]
    for _ in range(2):  # a browser may tell more than once before it prints
        browser.run("window.dispatchEvent(new Event('beforeprint'))")
        assert set(browser.run(folded)) == {True}
    browser.run("window.dispatchEvent(new Event('afterprint'))")
    assert browser.run(folded) == before


@pytest.mark.parametrize("study", STUDIES)
def test_without_scripts_a_report_says_where_its_figures_are(
    browser: Browser, reports: dict[str, Path], study: str
) -> None:
    browser.open(reports[study])
    browser.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.driver.refresh()
        assert ("Pictures need scripts" in browser.one("main").text) == (study in WITH_PICTURES)
    finally:
        browser.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_boxes_are_drawn_at_the_quartiles_of_the_table(browser: Browser, reports: dict[str, Path]) -> None:
    browser.open(reports["audit"])
    boxes = "document.querySelector('select.chooser').closest('figure').querySelector('.plot').calcdata[0]"
    drawn = browser.run(f"{boxes}.map(box => [box.q1, box.med, box.q3])")
    scenario = browser.run("document.querySelector('select.chooser').selectedOptions[0].text")
    browser.one("details summary").click()
    rows = [row.text.split() for row in browser.all("details tbody tr")]
    told = [[float(figure) for figure in row[-3:]] for row in rows if row[0] == scenario]
    assert drawn == [pytest.approx(figures, abs=2e-3) for figures in told]


def test_pictures_are_drawn_when_a_reader_comes_near(browser: Browser, reports: dict[str, Path]) -> None:
    browser.driver.get("about:blank")
    browser.driver.get(reports[FULL].as_uri())
    drawn = "[...document.querySelectorAll('.plot')].map(plot => plot.querySelector('.main-svg') !== null)"
    for number in (0, len(browser.run(drawn)) - 1):
        assert not browser.run(drawn)[-1]
        browser.run("document.querySelectorAll('.plot')[arguments[0]].scrollIntoView()", number)
        WebDriverWait(browser.driver, 30).until(lambda _, at=number: browser.run(drawn)[at])
    assert not all(browser.run(drawn))
    assert browser.errors == []


def test_a_picture_takes_no_more_room_when_it_is_drawn(browser: Browser, reports: dict[str, Path]) -> None:
    browser.open(reports["repair"])
    rooms = "[...document.querySelectorAll('.plot')].map(plot => [plot.clientHeight, parseInt(plot.style.height)])"
    assert all(drawn == reserved > 0 for drawn, reserved in browser.run(rooms))


def test_pictures_that_are_not_drawn_yet_are_printed(browser: Browser, reports: dict[str, Path]) -> None:
    """A page printed as soon as it is there: its later tasks never run before."""
    hasty = "new MutationObserver(() => { if (window.Plotly && !window.hasty && document.readyState !== 'loading') {"
    script = f"{hasty} window.hasty = true; window.dispatchEvent(new Event('beforeprint')); window.drawn = {ALL_DRAWN}"
    script += " } }).observe(document, {childList: true, subtree: true})"
    added = browser.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": script})
    browser.open(reports["repair"])
    browser.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)
    assert browser.run("window.drawn")
    assert browser.errors == []


def test_the_command_can_be_copied(browser: Browser, reports: dict[str, Path]) -> None:
    browser.open(reports["audit"])
    button = browser.one("button.copy")
    button.click()
    WebDriverWait(browser.driver, 30).until(lambda _: button.text in ("Copied", "Selected"))
