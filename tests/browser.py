"""Chromium for the tests of pages: start it, wait, find and click."""
import contextlib
import shutil
import time

import pytest

CHROMIUM = shutil.which("chromium")


@contextlib.contextmanager
def chromium(profile):
    """Yield a driver of Chromium at the width of a phone."""
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
                 "disable-background-networking", "disable-component-update", "disable-sync",
                 f"user-data-dir={profile}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
            "width": 360, "height": 800, "deviceScaleFactor": 1, "mobile": True})
        yield driver
    finally:
        driver.quit()


def wait_for(condition, seconds=30):
    """Return the value of a condition as soon as it is true.

    A page may replace an element while the condition reads it. Then the condition is tried again.
    """
    from selenium.common.exceptions import StaleElementReferenceException
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(StaleElementReferenceException):
            if value := condition():
                return value
        assert time.monotonic() < end
        time.sleep(0.1)


def find(browser, css):
    return browser.find_elements("css selector", css)


def click(browser, canvas, x, y):
    """Click at a position of a canvas, given as fractions of its width and height."""
    from selenium.webdriver import ActionChains
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    w, h = canvas.size["width"], canvas.size["height"]
    ActionChains(browser).move_to_element_with_offset(
        canvas, round((x - 0.5) * w), round((y - 0.5) * h)).click().perform()
