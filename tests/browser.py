"""A real Chromium, and hands that use it as a person does.

What the driver does blocks, and the function that a test calls lives in the test's event loop, so
each step runs in a thread. No step waits for time: the page tells when it has changed.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from conftest import PATIENCE
from selenium import webdriver
from selenium.common.exceptions import TimeoutException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.remote.webelement import WebElement

T = TypeVar("T")

CHROMIUM, DRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"

# It asks nobody but the daemon, and root has to do without the sandbox.
ARGUMENTS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--window-size=1280,900", "--hide-scrollbars"),
    "--host-resolver-rules=MAP *.example 127.0.0.1",  # names that an attacker has made point here
)

# Ends with the value of an expression as soon as that is true: it is looked at again at each change.
UNTIL = """
const done = arguments[0];
const value = () => { try { return %s; } catch { return null; } };
const look = () => { if (value()) { observer.disconnect(); done(value()); } };
const observer = new MutationObserver(look);
observer.observe(document, { subtree: true, childList: true, attributes: true, characterData: true });
look();
"""


# An element by its selector, or the button or link with the text after "=".
PLACE = """((wanted) => wanted.startsWith("=")
    ? [...document.querySelectorAll("button, a")].find((one) => one.innerText.trim() === wanted.slice(1))
    : document.querySelector(wanted))"""


class Browser:
    """One window."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    async def do(self, step: Callable[..., T], *arguments: Any) -> T:
        """One step of the driver."""
        return await asyncio.to_thread(step, *arguments)

    async def open(self, url: str) -> None:
        """Load a page as if its address was typed in."""
        await self.do(self.driver.get, url)

    async def run(self, script: str, *arguments: Any) -> Any:
        """What a script in the page returns."""
        return await self.do(self.driver.execute_script, script, *arguments)

    async def until(self, expression: str) -> Any:
        """The value of an expression once it is true."""
        try:
            return await self.do(self.driver.execute_async_script, UNTIL % expression)
        except TimeoutException:
            text = await self.run("return document.body.innerText")
            raise AssertionError(f"waited in vain for {expression}; the page shows\n{text}") from None

    async def shows(self, text: str, where: str = "body") -> None:
        """Wait until a part of the page has this text."""
        await self.until(f"document.querySelector({where!r}).innerText.includes({text!r})")

    async def text(self, selector: str) -> str:
        """What a person reads there."""
        shown: str = await self.run("return document.querySelector(arguments[0]).innerText", selector)
        return shown

    async def find(self, selector: str) -> WebElement:
        """An element by its selector, or a button or link by "=" and what stands on it, once it is there."""
        element: WebElement = await self.until(f"{PLACE}({selector!r})")
        return element

    async def click(self, selector: str) -> None:
        """Click there with the mouse."""
        element = await self.find(selector)
        await self.do(element.click)

    async def press(self, *keys: str) -> None:
        """Press keys one after the other, wherever the focus is."""
        await self.do(ActionChains(self.driver, duration=0).send_keys(*keys).perform)

    async def cdp(self, command: str, **parameters: Any) -> Any:
        """A command of Chromium's DevTools protocol."""
        return await self.do(self.driver.execute_cdp_cmd, command, parameters)

    async def complaints(self) -> list[str]:
        """What the console has told of since the last time."""
        entries: list[dict[str, str]] = await self.do(self.driver.get_log, "browser")
        return [entry["message"] for entry in entries]


@contextlib.contextmanager
def chromium() -> Iterator[webdriver.Chrome]:
    """A Chromium that has just been started."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ARGUMENTS:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        driver.set_script_timeout(PATIENCE)
        yield driver
    finally:
        driver.quit()
