"""Pages in a real browser: what is drawn, and what pointing, sliding and clicking do."""

import functools
import shutil

import numpy as np
import pytest

from memseg_jax import reporting
from tests.reporting.runs import HOSTILE, evaluated

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not program or not driver:
        pytest.skip("there is no Chromium with its driver: apt-get install chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "window-size=1200,900"):
        options.add_argument(f"--{argument}")
    options.add_argument("--force-prefers-reduced-motion")  # nothing moves while it is clicked
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options, webdriver.ChromeService(driver))
    chrome.set_script_timeout(120)
    yield chrome
    chrome.quit()


def opened(browser, page):
    browser.get(page.as_uri())
    # The pictures are drawn when they are decoded.
    browser.execute_async_script("ready.then(arguments[0])")
    assert browser.get_log("browser") == []
    return browser.execute_script


POINT = """
const [element, x, y] = arguments, box = element.getBoundingClientRect();
element.dispatchEvent(new PointerEvent("pointermove", {
  bubbles: true, clientX: box.left + x * box.width, clientY: box.top + y * box.height}));
const tip = document.getElementById("tip");
return tip.hidden ? "" : tip.textContent;
"""


def find(browser, selector):
    return browser.find_element("css selector", selector)


def test_the_report(browser, tmp_path):
    workdir = evaluated(tmp_path, HOSTILE)
    script = opened(browser, reporting.write_report(workdir))
    point = functools.partial(browser.execute_script, POINT)

    # Charts and the matrix say their values.
    assert point(find(browser, "[data-chart='0'] svg"), 0.95, 0.5).split("\n")[1] == "total: 1.5"
    assert point(find(browser, "#heat svg"), 0.01, 0.5) == ""  # the names beside it
    said = point(find(browser, "#heat svg"), 0.5, 0.5)
    assert any(name in said for name in HOSTILE)
    assert "pixels" in said

    # The other normalisation has other numbers: columns sum to 100 %.
    before = script("return document.querySelector('#heat svg').outerHTML")
    find(browser, "input[value=column]").click()
    assert script("return document.querySelector('#heat svg').outerHTML") != before

    # A heading sorts, and sorts the other way.
    order = (
        "return [...document.querySelectorAll('#classes tbody tr')]"
        ".map(row => Number(row.cells[1].dataset.value))"
    )
    buttons = browser.find_elements("css selector", "#classes thead button")
    buttons[1].click()
    assert script(order) == sorted(script(order), reverse=True)
    buttons[1].click()
    assert script(order) == sorted(script(order))

    # Panels: the colours of classes come and go.
    pixels = (
        "return [...document.querySelectorAll('#images canvas')].map(canvas => canvas.toDataURL())"
    )
    shown = script(pixels)
    assert len(shown) == 9 * 5
    assert script("return document.querySelectorAll('#toggles label').length") == 3
    script("document.querySelector('#toggles input').click()")
    redrawn = "requestAnimationFrame(() => requestAnimationFrame(arguments[0]))"
    browser.execute_async_script(redrawn)
    changed = [a != b for a, b in zip(shown, script(pixels))]
    assert np.reshape(changed, (9, 5)).all(axis=0).tolist() == [False, True, True, False, False]
    script(
        "const slider = document.getElementById('opacity'); slider.value = 0;"
        "slider.dispatchEvent(new Event('input'))"
    )
    browser.execute_async_script(redrawn)
    image, truth, prediction = script(pixels)[:3]
    assert image == truth == prediction
    said = point(find(browser, "#images canvas"), 0.01, 0.01)
    assert said.startswith("truth: not labelled\nprediction: ")
    assert "confidence: " in said

    # The text of a hostile name is text.
    assert script("return document.querySelectorAll('#classes tbody script').length") == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_reports_ask_nobody_and_fit_a_phone(browser, tmp_path, scheme):
    names = tuple(f"a class with a long name {k}" for k in range(50))
    page = reporting.write_report(evaluated(tmp_path, names))
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    phone = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    script = opened(browser, page)
    wide = script("return document.documentElement.scrollWidth")
    assert wide <= 360
    colour = script("return getComputedStyle(document.body).backgroundColor")
    brightness = np.mean([int(x) for x in colour.strip("rgb()").split(",")])
    assert (brightness > 128) == (scheme == "light")
    loaded = script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [name for name in loaded if not name.startswith("data:")] == []
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert browser.execute_cdp_cmd("Page.printToPDF", {})["data"]


def test_the_comparison(browser, tmp_path):
    one, two = evaluated(tmp_path / "one"), evaluated(tmp_path / "two", right=0.9)
    page = reporting.write_comparison([one, two], tmp_path / "comparison.html")
    script = opened(browser, page)
    assert script("return document.querySelectorAll('.range').length") == 2
    assert script("return document.querySelectorAll('[data-chart] path').length") == 2 * 4
