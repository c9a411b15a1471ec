"""A real browser, Debian's Chromium, in which the page is opened from the disk."""

import json
import shutil
from dataclasses import dataclass, field

import pytest
from hypothesis import settings

settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--force-device-scale-factor=1", "--window-size=1280,1000"),
)
DRAWN = "return document.documentElement.dataset.drawn || null"


@dataclass
class Opened:
    """A page in the browser, drawn.

    Attributes:
        driver: the browser.
        requests: the addresses that were asked for.
        messages: what the page said on its console.
        drawn: milliseconds from the start of its opening until all was drawn.
    """

    driver: object
    requests: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    drawn: int = 0

    def run(self, script, *arguments):
        """Run a script's body in the page, and return what it returns."""
        return self.driver.execute_script(script, *arguments)

    @property
    def text(self):
        """Everything that can be read on the page."""
        return self.run("return document.body.innerText")

    def traces(self, figure="timeline"):
        """What plotly drew of a figure: the name, axis and number of points of each curve."""
        return self.run(
            """return document.getElementById(arguments[0])._fullData.map(t => ({
                name: t.name, axis: t.yaxis, mode: t.mode, meta: t.meta, points: t._length,
                text: t.hovertext, x: Array.from(t.x), y: Array.from(t.y), visible: t.visible}))""",
            figure,
        )


@pytest.fixture(scope="session")
def driver(tmp_path_factory):
    """Start the browser, with a profile of its own."""
    from selenium import webdriver

    programs = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    missing = [name for name, path in programs.items() if path is None]
    if missing:
        pytest.fail(
            f"{' and '.join(missing)} not found, in which the page is tested: on Debian, "
            "apt-get install chromium chromium-driver"
        )
    options = webdriver.ChromeOptions()
    options.binary_location = programs["chromium"]
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    service = webdriver.ChromeService(programs["chromedriver"])
    browser = webdriver.Chrome(options=options, service=service)
    yield browser
    browser.quit()


@pytest.fixture
def open_page(driver):
    """Return what opens a page and waits until it is drawn."""
    from selenium.webdriver.support.wait import WebDriverWait

    def opened(path):
        driver.get("about:blank")
        for kind in ("performance", "browser"):
            driver.get_log(kind)
        driver.get(path.resolve().as_uri())
        drawn = WebDriverWait(driver, 30, 0.05).until(lambda d: d.execute_script(DRAWN))
        events = [json.loads(one["message"])["message"] for one in driver.get_log("performance")]
        asked = [e["params"]["request"]["url"] for e in events if e["method"] == SENT]
        said = [one["message"] for one in driver.get_log("browser")]
        return Opened(driver, asked, said, int(drawn))

    return opened


SENT = "Network.requestWillBeSent"
