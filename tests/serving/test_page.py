"""The page in a real browser: what a user does with it, by mouse, by keyboard, and on a phone."""

import base64
import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.serving.server import PATIENCE, Blocked, FakeEngine, png, running, wait_until
from tests.serving.test_app import bomb
from tests.tiny_config import COLOURS

pytestmark = pytest.mark.slow

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
DRIVER = shutil.which("chromedriver")

PICTURE = np.zeros((60, 90, 3), np.uint8)
PICTURE[:, 30:60], PICTURE[:, 60:] = (120, 90, 60), (230, 230, 230)
THIRDS = ("ground", "box", "disc")


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    if not (CHROMIUM and DRIVER):
        pytest.skip("no browser: needs chromium and chromedriver (apt install chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    downloads = tmp_path_factory.mktemp("downloads")
    for argument in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--window-size=1280,900", "--use-fake-device-for-media-stream",
        "--use-fake-ui-for-media-stream",
    ):  # fmt: skip
        options.add_argument(argument)
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(DRIVER)
    driver = webdriver.Chrome(options=options, service=service)
    driver.downloads = downloads
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def server():
    with running(FakeEngine(max_megapixels=4.0), examples=[png(PICTURE)]) as server:
        yield server


class Page:
    """What a user sees and does."""

    def __init__(self, driver, server):
        self.driver = driver
        driver.get(f"http://127.0.0.1:{server.port}/")
        wait_until(lambda: self.all("body[data-ready]"))

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def one(self, selector):
        (found,) = self.all(selector)
        return found

    def shown(self, selector):
        return any(x.is_displayed() for x in self.all(selector))

    def upload(self, path, done=True):
        self.one("#file").send_keys(str(path))
        if done:
            self.wait_for_result()

    def wait_for_result(self):
        wait_until(lambda: self.shown("#panel") and not self.all("body.busy"))

    def over(self, column, row, click=False):
        """Moves the mouse to a place of the picture, in shares of its sides."""
        from selenium.webdriver import ActionChains

        picture = self.one("#picture")
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", picture)
        size = picture.size
        x, y = int((column - 0.5) * size["width"]), int((row - 0.5) * size["height"])
        moved = ActionChains(self.driver, duration=0).move_to_element_with_offset(picture, x, y)
        (moved.click() if click else moved).perform()

    def here(self):
        return self.one("#here-name").text, self.one("#here-confidence").text

    def overlay_pixel(self, row, column):
        """Colour and alpha of the overlay's canvas."""
        script = (
            "return [...document.getElementById('overlay').getContext('2d')"
            ".getImageData(arguments[1], arguments[0], 1, 1).data]"
        )
        return self.driver.execute_script(script, row, column)

    def errors(self):
        """What has failed on the page since the last time; answers that refuse are no failure."""
        entries = self.driver.get_log("browser")
        return [x for x in entries if x["level"] == "SEVERE" and x["source"] != "network"]


@pytest.fixture
def page(driver, server):
    page = Page(driver, server)
    yield page
    assert page.errors() == []


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "my picture.png"
    path.write_bytes(png(PICTURE))
    return path


def test_upload_hover_and_click(page, picture):
    assert page.shown("#empty")
    assert not page.shown("#panel")
    page.upload(picture)
    assert not page.shown("#empty")
    for number, name in enumerate(THIRDS):
        page.over((number + 0.5) / 3, 0.5)
        assert page.here() == (name, "75%")
        assert name in page.one("#tip").text
    page.over(0.5, 0.5, click=True)
    wait_until(lambda: page.shown("#look li"))
    assert [x.text.split() for x in page.all("#look li")] == [
        ["box", "75%"], ["ground", "20%"], ["disc", "5.0%"],
    ]  # fmt: skip
    assert page.shown("#pin")
    assert [x.text.split() for x in page.all("#read li")] == [["disc", "90%"], ["box", "10%"]]
    classes, memory, image = page.all("[name=layer]")
    assert (memory.is_enabled(), image.is_enabled()) == (True, False)
    memory.click()
    least, most = page.overlay_pixel(0, 0)[3], page.overlay_pixel(59, 89)[3]
    assert (least, most) == (0, 255)
    classes.click()
    assert page.overlay_pixel(30, 45) == [*COLOURS[1], 255]


def test_classes_can_be_hidden_and_the_overlay_be_made_fainter(page, picture):
    page.upload(picture)
    assert page.overlay_pixel(30, 45) == [*COLOURS[1], 255]
    boxes = page.all("#classes input")
    assert [x.text for x in page.all("#classes .number")] == ["33%"] * 3
    (box,) = (x for x in boxes if x.get_attribute("data-class-id") == "1")
    box.click()
    assert page.overlay_pixel(30, 45)[3] == 0
    assert page.overlay_pixel(30, 10) == [*COLOURS[0], 255]
    page.one("#all").click()
    assert page.overlay_pixel(30, 10)[3] == 0
    assert not any(x.is_selected() for x in boxes)
    page.one("#all").click()
    assert page.overlay_pixel(30, 45) == [*COLOURS[1], 255]
    page.one("#opacity").send_keys("\ue010\ue012")  # End, left
    wait_until(lambda: page.one("#overlay").value_of_css_property("opacity") == "0.99")
    assert page.one("#opacity-shown").text == "99%"


def test_the_keyboard_alone(page):
    from selenium.webdriver import ActionChains, Keys

    def press(*keys):
        ActionChains(page.driver, duration=0).send_keys(*keys).perform()

    def focused():
        return page.driver.switch_to.active_element.get_attribute("id")

    for _ in range(4):  # API, choose, camera, the example
        press(Keys.TAB)
    press(Keys.ENTER)
    page.wait_for_result()
    page.driver.execute_script("document.activeElement.blur()")
    for _ in range(20):
        press(Keys.TAB)
        if focused() == "picture":
            break
    assert focused() == "picture"
    press(Keys.ARROW_RIGHT)
    assert page.here() == ("box", "75%")  # from the middle
    assert page.shown("#pointer")
    page.driver.switch_to.active_element.send_keys(Keys.SHIFT, *[Keys.ARROW_RIGHT] * 2)
    assert page.here()[0] == "disc"
    press(Keys.ENTER)
    wait_until(lambda: page.shown("#look li"))
    assert page.all("#look li")[0].text.split()[0] == "disc"


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        (b"this is no picture", "not an image file"),
        (png(PICTURE)[:70], "damaged"),
        (bomb(3000, 2000), "at most 4 megapixels"),
        (bomb(30000, 30000), "far too large"),
        (bytes(20_000_001), "This server takes 20 MB at most"),
    ],
    ids=["text", "truncated", "large", "huge", "heavy"],
)
def test_a_file_that_cannot_be_taken(page, tmp_path, picture, content, answer):
    bad = tmp_path / "bad.png"
    bad.write_bytes(content)
    page.upload(bad, done=False)
    wait_until(lambda: answer in page.one("#status").text)
    assert "wrong" in page.one("#status").get_attribute("class")
    page.upload(picture)  # and another one is
    assert not page.shown("#status")


def test_downloads(page, picture):
    page.upload(picture)
    for kind, ending in (("overlay", "png"), ("png", "png"), ("polygons", "json"), ("rle", "json")):
        page.one(f"[data-save={kind}]").click()
        path = page.driver.downloads / f"my picture_{kind}.{ending}"
        wait_until(path.is_file)
        content = path.read_bytes()
        if ending == "json":
            names = [x["name"] for x in json.loads(content)["segments"]]
            assert names == list(THIRDS)
        else:
            with Image.open(io.BytesIO(content)) as saved:
                assert saved.size == (90, 60)
                assert saved.mode == ("RGBA" if kind == "overlay" else "P")


def test_a_dropped_picture_and_a_pasted_one(page):
    script = """
        const bytes = Uint8Array.from(atob(arguments[1]), (x) => x.charCodeAt(0));
        const data = new DataTransfer();
        data.items.add(new File([bytes], "a.png", { type: "image/png" }));
        const options = { dataTransfer: data, clipboardData: data, bubbles: true };
        const Kind = arguments[0] === "paste" ? ClipboardEvent : DragEvent;
        document.body.dispatchEvent(new Kind(arguments[0], options));
    """
    for event in ("drop", "paste"):
        page.driver.refresh()
        wait_until(lambda: page.all("body[data-ready]"))
        page.driver.execute_script(script, event, base64.b64encode(png(PICTURE)).decode())
        page.wait_for_result()


def test_the_camera(page):
    page.one("#camera").click()
    wait_until(
        lambda: page.driver.execute_script("return document.getElementById('video').videoWidth")
    )
    page.one("#snap").click()
    page.wait_for_result()
    assert not page.shown("#camera-dialog")
    assert page.driver.execute_script("return document.getElementById('video').srcObject") is None


def test_a_busy_server_is_asked_again(driver, picture):
    engine = Blocked(queue=1)
    with running(engine) as server:
        page, other = Page(driver, server), None
        page.upload(picture, done=False)
        assert engine.begun.wait(PATIENCE)
        driver.switch_to.new_window("tab")
        try:
            other = Page(driver, server)
            other.upload(picture, done=False)
            wait_until(lambda: "Trying again" in other.one("#status").text)
            engine.go.set()
            other.wait_for_result()
        finally:
            driver.close()
            driver.switch_to.window(driver.window_handles[0])
        page.wait_for_result()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_width_of_a_phone(page, scheme):
    device = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    feature = {"name": "prefers-color-scheme", "value": scheme}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", device)
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    try:
        page.one("#examples button").click()
        page.wait_for_result()
        width = "return document.documentElement.scrollWidth"
        assert page.driver.execute_script(width) == 360
        text, ground = (
            np.array(
                json.loads("[" + page.one("body").value_of_css_property(x).split("(")[1][:-1] + "]")
            )
            for x in ("color", "background-color")
        )
        assert (text[:3].mean() < ground[:3].mean()) == (scheme == "light")
        for button in page.all("button"):
            if button.is_displayed() and "small" not in button.get_attribute("class"):
                assert button.size["height"] >= 44  # what a finger hits
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_the_page_about_the_api(driver, server):
    driver.get(f"http://127.0.0.1:{server.port}/docs")
    headings = lambda: [x.text for x in driver.find_elements("css selector", "article h2")]  # noqa: E731
    wait_until(lambda: len(headings()) == 5)
    assert headings()[:2] == ["POST/segment", "POST/look"]


def test_nothing_is_asked_of_other_hosts(driver, server, picture):
    page = Page(driver, server)
    page.upload(picture)
    script = "return performance.getEntriesByType('resource').map((x) => x.name)"
    asked = driver.execute_script(script)
    assert len(asked) >= 5
    assert all(x.startswith((f"http://127.0.0.1:{server.port}/", "blob:")) for x in asked), asked
