"""The operator's page, in a real browser, on a real daemon with real calls."""

import asyncio
import base64
import contextlib
import hashlib
import os
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest
from aiohttp import web
from browser import CHROMIUM, DRIVER, Browser, chromium
from conftest import PATIENCE, SCRIPT, Daemon, Gate, Request, Server, StartDaemon, answer, ask, free_address, run
from jetstream import StartHost
from selenium import webdriver
from selenium.webdriver.common.keys import Keys

SETTINGS = """
[functions.it]
url = "{url}"
[functions.shell]
command = ["sh", "-c", "cat; echo told >&2"]
[functions.talks]
command = ["sh", "-c", "while echo line; do sleep 0.02; done"]
queue = "loud"
[functions.later]
url = "{url}"
queue = "slow"
[queues.slow]
max_inflight = 2
rate = "100/1m"
[functions.a_name_that_is_as_long_as_names_may_be_and_has_no_place_to_b]
command = ["sh", "-c", "printf %0200d >&2; exit 3"]
queue = "a-queue-whose-name-is-just-as-long-but-has-many-places-to-break"
retry.attempts = 1
[schedules.nightly]
function = "it"
cron = "0 3 * * *"
[retry]
attempts = 2
min_wait = "1ms"
"""

LONG = "a_name_that_is_as_long_as_names_may_be_and_has_no_place_to_b"

# Controls that are less than 44 px high, or wide where they are no words.
SMALL_TARGETS = """
const controls = [...document.querySelectorAll("button, input, .button, .run, nav a, td > a, th > a")];
const target = (one) => (one.closest("label") ?? one).getBoundingClientRect();
const isNarrow = (one) => !one.matches("td > a:not(.run), th > a") && target(one).width < 44;
const isSmall = (one) => target(one).height < 44 || isNarrow(one);
return controls.filter((one) => one.checkVisibility() && isSmall(one)).map((one) => one.outerHTML);
"""

# What moves, or would if something changed.
MOTION = """
const moves = (style) => style.animationName !== "none" || parseFloat(style.transitionDuration) > 0;
const styles = (one) => [null, "::before", "::after"].map((part) => getComputedStyle(one, part));
const all = [...document.querySelectorAll("*")].filter((one) => styles(one).some(moves));
return all.map((one) => one.outerHTML);
"""

BUTTONS = "return document.querySelectorAll('#view [data-do]:not(input)').length"

AXE = SCRIPT.parent / "node_modules" / "axe-core" / "axe.min.js"
SHOTS = os.environ.get("FAASD_ASYNC_SHOTS")  # a folder for pictures of what the tests saw


class Page:
    """The operator's page of one daemon."""

    def __init__(self, browser: Browser, gateway: Daemon) -> None:
        self.browser = browser
        self.gateway = gateway

    async def open(self, place: str = "", at: str = "") -> None:
        """Show a view, as if its address was typed in; another one than the daemon's, if that is given."""
        await self.browser.open("about:blank")  # else what is loaded stays, and what is on it for a moment
        await self.browser.open(f"{at or self.gateway.url}/ui/{place}")
        view = place.strip("#").partition("?")[0] or "calls"
        await self.browser.until(f"document.title.startsWith({view!r})")

    async def rows(self, number: int, table: str = "calls") -> None:
        """Wait until a table has so many rows."""
        await self.browser.until(f"document.querySelectorAll('#{table} tbody tr').length === {number}")

    async def states(self) -> list[str]:
        """The states of the calls on screen, from the top."""
        script = "return [...document.querySelectorAll('#calls tbody .state')].map(one => one.innerText)"
        shown: list[str] = await self.browser.run(script)
        return shown

    async def picture(self, name: str) -> None:
        """Keep a picture, where somebody wants to look at it."""
        if SHOTS:
            await self.browser.do(self.browser.driver.save_screenshot, str(Path(SHOTS) / f"{name}.png"))


class Relay:
    """A proxy before a daemon, as a server behaves; it may cut streams of events, or keep them to itself."""

    def __init__(self, gateway: Daemon) -> None:
        self.gateway = gateway
        self.told = ""  # by streams, whether it was passed on or not
        self.keeps = False
        self.cuts = False  # streams that are asked for, too
        self.closed = asyncio.Event()  # a stream has ended
        self.streams: set[asyncio.Transport] = set()  # that are open

    async def __call__(self, request: web.BaseRequest, seen: Request) -> web.StreamResponse:
        """Ask the daemon, and pass on what it says."""
        transport = request.transport
        assert transport
        is_stream = seen.target == "/system/events"
        if is_stream and self.cuts:
            transport.abort()
        headers = {name: seen.headers[name] for name in ("Accept", "Last-Event-ID") if name in seen.headers}
        async with self.gateway.http.get(self.gateway.url + seen.target, headers=headers) as reply:
            response = web.StreamResponse(status=reply.status, headers={"Content-Type": reply.headers["Content-Type"]})
            await response.prepare(request)
            if is_stream:
                self.streams.add(transport)
            try:
                async for piece in reply.content.iter_any():
                    self.told += piece.decode() if is_stream else ""
                    if not (is_stream and self.keeps):
                        await response.write(piece)
            finally:
                if is_stream:
                    self.streams.discard(transport)
                    self.closed.set()
        return response

    async def tells(self, text: str) -> None:
        """Wait until a stream has told this. The page may know already: it looks by itself, too."""
        async with asyncio.timeout(PATIENCE):
            while text not in self.told:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    def cut(self) -> None:
        """Break off what there is, and what will be tried."""
        self.cuts = True
        for transport in self.streams:
            transport.abort()


@pytest.fixture(scope="module")
def driver() -> Iterator[webdriver.Chrome]:
    """One Chromium for all tests here."""
    if not Path(CHROMIUM).exists() or not Path(DRIVER).exists():
        pytest.skip("needs Debian's chromium and chromium-driver")
    with chromium() as one:
        yield one


@pytest.fixture
async def browser(driver: webdriver.Chrome) -> AsyncIterator[Browser]:
    """Its window, which shows nothing yet."""
    window = Browser(driver)
    await window.complaints()
    yield window
    await window.open("about:blank")


@pytest.fixture
async def page(browser: Browser, daemon: StartDaemon, function: Server) -> Page:
    """The page of a daemon whose function `it` is the test's server."""
    kept = f'{SETTINGS.format(url=function.url)}[gateway]\nlisten = "{free_address()}"\n'
    return Page(browser, await daemon(kept, before="faasd_async.PING_S = 0.1"))


@pytest.fixture
async def hurried(browser: Browser) -> AsyncIterator[None]:
    """What a page does every few seconds it does twenty times as often."""
    source = "const wait = setInterval; window.setInterval = (step, period) => wait(step, period / 20);"
    script = await browser.cdp("Page.addScriptToEvaluateOnNewDocument", source=source)
    yield
    await browser.cdp("Page.removeScriptToEvaluateOnNewDocument", **script)


async def test_the_page_is_one_document_that_may_load_nothing_else(daemon: StartDaemon) -> None:
    """Its policy names the one script and the one style that it has, by what is in them."""
    gateway = await daemon("")
    reply = await ask(gateway.url, "/ui/")
    text = reply.body.decode()
    policy = dict(rule.partition(" ")[::2] for rule in reply.headers["Content-Security-Policy"].split("; "))
    for kind in ("script", "style"):
        (content,) = re.findall(rf"<{kind}[^>]*>(.*?)</{kind}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy.pop(f"{kind}-src") == f"'sha256-{digest}'"
    assert policy == {
        "default-src": "'none'",
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    assert reply.headers["X-Content-Type-Options"] == "nosniff"
    assert reply.headers["Referrer-Policy"] == "no-referrer"
    assert not re.search(r"<[^>]+ on\w+=|https?://(?!www\.w3\.org/)", text)
    assert len(reply.body) <= 40 * 1024


async def test_the_page_is_loaded_again_only_when_it_has_changed(daemon: StartDaemon) -> None:
    """The browser asks by its tag, and gets it packed if it likes."""
    gateway = await daemon("")
    first = await ask(gateway.url, "/ui/", "Accept-Encoding: gzip")
    assert first.headers["Content-Encoding"] == "gzip"
    assert len(first.body) < 16 * 1024
    again = await ask(gateway.url, "/ui/", f"If-None-Match: {first.headers['ETag']}")
    assert (again.status, again.body) == (304, b"")
    assert again.headers["Content-Security-Policy"] == first.headers["Content-Security-Policy"]
    home = await ask(gateway.url, "/")
    assert (home.status, home.headers["Location"]) == (302, "/ui/")


async def test_calls_are_listed_by_state_with_counts(page: Page, function: Server) -> None:
    """A tab shows the calls of a state; the address says what is shown, so going back works."""
    browser, gateway = page.browser, page.gateway
    await gateway.final(await gateway.submit("it"))
    function.behaviour = answer(400)
    await gateway.final(await gateway.submit("it"))
    await gateway.submit("it", X_Delay="1h")
    await page.open()
    await page.rows(3)
    assert await page.states() == ["delayed", "error", "success"]
    tabs = (await browser.text("nav[aria-label=States]")).split()
    assert " ".join(tabs) == "All delayed 1 queued 0 running 0 success 1 error 1 timeout 0 cancelled 0"
    await browser.click("nav[aria-label=States] a:nth-child(6)")
    await page.rows(1)
    assert await page.states() == ["error"]
    assert (await browser.run("return location.hash")) == "#calls?status=error"
    assert (await browser.run("return document.querySelector('#words').value")) == "status:error"
    await browser.shows("answered 400", "#calls")
    await browser.do(browser.driver.back)
    await page.rows(3)
    await page.picture("calls")


async def test_a_filter_is_one_line(page: Page) -> None:
    """Names with values, and an id; what does not match is said, and what is wrong, too."""
    browser, gateway = page.browser, page.gateway
    ids = [await gateway.submit("it", X_Delay="1h") for _ in range(2)]
    await gateway.submit("later", X_Delay="1h")
    await page.open()
    await page.rows(3)
    await browser.press("/")
    for words, number in (("queue:slow", 1), ("function:it status:delayed", 2), (ids[0], 1)):
        await browser.press(Keys.ESCAPE, words, Keys.ENTER)
        await page.rows(number)
    await page.open("#calls?function=nobody")
    await browser.shows("No call matches")
    await browser.open(f"{gateway.url}/ui/#calls?status=wrong")
    await browser.shows('status: "wrong": expected one of', "#notice")


async def test_a_change_shows_by_itself(page: Page, function: Server) -> None:
    """The stream tells of it; nothing is loaded anew, and where the reader is stays as it is."""
    browser, gateway = page.browser, page.gateway
    await gateway.final(await gateway.submit("it"))
    await page.open()
    await browser.shows("live", "#live")
    await browser.press("j")
    await browser.run("document.activeElement.closest('tr').witness = true")
    function.behaviour = gate = Gate()
    await gateway.submit("it")
    await page.rows(2)
    await browser.until("document.querySelector('#calls tbody .running')")
    gate.open()
    await browser.until("document.querySelectorAll('#calls tbody .success').length === 2")
    assert await browser.run("return document.activeElement.closest('tr').witness")


async def test_a_daemon_that_comes_back_is_shown_again(page: Page) -> None:
    """That it is away is said; what was on screen stays there until there is news."""
    browser, gateway = page.browser, page.gateway
    await gateway.submit("it", X_Delay="1h")
    await page.open()
    await browser.shows("live", "#live")
    await gateway.terminate()
    await browser.shows("doesn't answer", "#notice")
    assert await page.states() == ["delayed"]
    await gateway.start()
    await gateway.submit("it", X_Delay="1h")
    await page.rows(2)
    await browser.shows("live", "#live")
    assert await browser.run("return document.querySelector('#notice').hidden")


@pytest.mark.usefixtures("hurried")
async def test_without_a_stream_the_page_looks_by_itself(page: Page) -> None:
    """As many streams as there may be are open: one more page still shows what happens."""
    browser, gateway = page.browser, page.gateway
    async with contextlib.AsyncExitStack() as streams:
        for _ in range(8):
            await streams.enter_async_context(gateway.http.get(f"{gateway.url}/system/events"))
        await page.open()
        await browser.shows("every 5 s", "#live")
        await browser.shows(f"No calls yet. Queue one: curl -d hello {gateway.url}/async-function/it")
        await gateway.submit("it", X_Delay="1h")
        await page.rows(1)


@pytest.mark.usefixtures("hurried")
async def test_a_stream_that_a_proxy_keeps_to_itself_is_none(page: Page, sink: Server) -> None:
    """It is open, and silent: the page does not claim to be live, and looks by itself."""
    browser, gateway = page.browser, page.gateway
    sink.behaviour = relay = Relay(gateway)
    relay.keeps = True
    await page.open(at=sink.url)
    call = await gateway.submit("it", X_Delay="1h")
    await page.rows(1)
    await relay.tells(call)
    assert "every 5 s" in await browser.text("#live")


async def test_a_stream_that_was_cut_goes_on_where_it_was(page: Page, sink: Server) -> None:
    """What has happened meanwhile is on screen, once, and so is what was there before."""
    browser, gateway = page.browser, page.gateway
    sink.behaviour = relay = Relay(gateway)
    calls = [await gateway.submit("it", X_Delay="1h")]
    await page.open(at=sink.url)
    calls.append(await gateway.submit("it", X_Delay="1h"))
    await page.rows(2)
    await browser.shows("live", "#live")
    relay.cut()
    await browser.shows("every 5 s", "#live")
    last = re.findall("^id: (.*)$", relay.told, re.MULTILINE)[-1]
    calls.append(await gateway.submit("it", X_Delay="1h"))
    relay.told = ""
    relay.cuts = False
    await browser.shows("live", "#live")
    await page.rows(3)
    assert (
        await browser.run("return [...document.querySelectorAll('#calls tbody tr')].map(one => one.id)") == calls[::-1]
    )
    streams = [request.headers.get("Last-Event-ID") for request in sink.requests if request.target == "/system/events"]
    assert (streams[0], set(streams[1:])) == (None, {last})
    assert '"resumed": true' in relay.told
    assert relay.told.count("event: call") == 1


async def test_a_page_that_nobody_sees_asks_for_nothing(page: Page, sink: Server) -> None:
    """Its stream ends; as soon as it is seen again it shows what has happened."""
    browser, gateway = page.browser, page.gateway
    sink.behaviour = relay = Relay(gateway)
    await page.open(at=sink.url)
    await browser.shows("live", "#live")
    window = browser.driver.current_window_handle
    await browser.do(browser.driver.switch_to.new_window, "tab")
    await relay.closed.wait()
    number = len(sink.requests)
    await gateway.submit("it", X_Delay="1h")
    await page.open()
    await page.rows(1)  # Here it is seen. There it would be, too.
    assert (len(sink.requests), relay.streams) == (number, set())
    await browser.do(browser.driver.close)
    await browser.do(browser.driver.switch_to.window, window)
    await page.rows(1)
    await browser.shows("live", "#live")


# Notes when the view was updated. Ages, which grow by themselves, are no updates.
UPDATES = """
window.updates = [];
const counts = ({ target }) => !(target.closest ? target : target.parentElement)?.closest("time");
const note = (changes) => { if (changes.some(counts)) window.updates.push(performance.now()); };
const all = { subtree: true, childList: true, attributes: true, characterData: true };
new MutationObserver(note).observe(document.querySelector("#view"), all);
"""


@pytest.mark.unmeasured
async def test_a_burst_updates_the_screen_twice_a_second_at_most(page: Page) -> None:
    """However much is written and however many calls change."""
    browser, gateway = page.browser, page.gateway
    call = await gateway.submit("talks")
    await page.open(f"#call?id={call}")
    await browser.shows("line", "#view > section pre")
    await browser.run(UPDATES)

    async def burst() -> None:
        while True:
            await gateway.submit("it")

    task = asyncio.create_task(burst())
    await browser.until("window.updates.length > 5")
    task.cancel()
    await ask(gateway.url, f"/async-function/{call}", method="DELETE")
    first, *_, last = (await browser.run("return window.updates"))[:6]
    assert last - first > 4.5 * 500, "milliseconds for five updates"


async def test_what_is_selected_is_retried(page: Page, function: Server) -> None:
    """The question says how many, that many are done, and no others."""
    browser, gateway = page.browser, page.gateway
    function.behaviour = answer(400)
    for _ in range(3):
        await gateway.final(await gateway.submit("it"))
    await gateway.submit("it", X_Delay="1h")
    function.behaviour = answer(200)
    await page.open()
    await page.rows(4)
    for row in (1, 2, 3):
        await browser.click(f"#calls tbody tr:nth-child({row}) input")
    await browser.shows("3 calls selected")
    await browser.click("=Retry these…")
    await browser.shows("Retry 2 calls?", "#dialog")  # for the first, which waits, it can't be done
    await browser.click("=Retry 2 calls")
    await browser.shows("2 calls queued again", "#notice")
    await browser.until("document.querySelectorAll('#calls tbody .success').length === 2")
    assert await page.states() == ["delayed", "success", "success", "error"]


async def test_all_that_match_are_done_at_once_as_many_as_was_said(page: Page, function: Server) -> None:
    """More than a page shows; what comes after the question was asked is not meant."""
    browser, gateway = page.browser, page.gateway
    await asyncio.gather(*(gateway.submit("it", X_Delay="1h") for _ in range(60)))
    await gateway.submit("later", X_Delay="1h")
    await page.open("#calls?function=it&status=delayed")
    await page.rows(50)
    await browser.click("=Cancel all that match…")
    await browser.shows("Cancel 60 calls?", "#dialog")
    kept = await gateway.submit("it", X_Delay="1h")
    await browser.click("=Leave it")
    await browser.click("=Cancel all that match…")
    await browser.shows("Cancel 61 calls?", "#dialog")
    another = await gateway.submit("it", X_Delay="1h")
    await browser.click("=Cancel 61 calls")
    await browser.shows("61 calls of 61 cancelled", "#notice")
    assert (await gateway.record(kept))["status"] == "cancelled"
    assert (await gateway.record(another))["status"] == "delayed"
    await page.open("#calls?status=cancelled")
    await page.rows(50)
    await browser.click("=Older")
    await page.rows(11)


async def test_callbacks_that_are_tried_again_can_all_be_given_up(page: Page, sink: Server) -> None:
    """They are what a filter for them means; the calls have ended."""
    browser, gateway = page.browser, page.gateway
    sink.behaviour = answer(500)
    calls = [await gateway.submit("it", X_Callback_Url=sink.url) for _ in range(2)]
    await sink.wait_for(2)
    await page.open("#calls?callback=pending")
    await page.rows(2)
    await browser.click("=Cancel all that match…")
    await browser.click("=Cancel 2 calls")
    await browser.shows("2 calls of 2 cancelled", "#notice")
    assert {(await gateway.record(call))["callback"]["status"] for call in calls} == {"failed"}


async def test_queues_are_paused_resumed_and_purged(page: Page, function: Server) -> None:
    """Each with its figures; a purge says how many first."""
    browser, gateway = page.browser, page.gateway
    await gateway.submit("later", X_Delay="1h")
    await gateway.final(await gateway.submit("it"))
    await page.open("#queues")
    await page.rows(5, "queues")
    slow = "document.querySelector('#queue-slow').innerText"
    await browser.click("#queue-slow td:last-child button:last-child")
    await browser.until(f"{slow}.includes('paused')")
    assert "0 of 2, rate 100/1m" in await browser.text("#queue-slow")
    await page.picture("queues")
    await browser.click("#queue-slow td:last-child button:last-child")
    await browser.until(f"{slow}.includes('open')")
    await browser.click("#queue-slow .danger")
    await browser.shows("Cancel 1 waiting call of slow?", "#dialog")
    await browser.click("=Cancel 1 waiting call")
    await browser.shows("1 call of slow cancelled", "#notice")
    await browser.until(f"!{slow}.includes('Purge')")


async def test_a_schedule_is_run_now_and_paused(page: Page) -> None:
    """When it runs next, and what became of its runs."""
    browser = page.browser
    await page.open("#schedules")
    await page.rows(1, "schedules")
    await browser.click("=Run now")
    await browser.until("document.querySelector('#schedules a.run .success')")
    await browser.click("=Pause")
    await browser.shows("paused", "#schedules")
    assert "Missed" in await browser.text("#schedules thead")
    await page.picture("schedules")
    await browser.click("=Resume")
    await browser.until("!document.querySelector('#schedules .paused')")
    await browser.click("#schedules a.run")
    await browser.shows("nightly", "#view .facts")
    await browser.click("=nightly")
    await page.rows(1)
    assert await browser.run("return location.hash") == "#calls?schedule=nightly"


async def test_the_host_is_shown_with_what_is_wrong(browser: Browser, daemon: StartDaemon) -> None:
    """Figures, the guarantee, and the warnings of the configuration."""
    gateway = await daemon('[functions.gone]\ncommand = ["/no/such/program"]')
    await Page(browser, gateway).open("#host")
    for text in ("Version", "Up for", "a call is on disk before its 202", "there is no program /no/such/program"):
        await browser.shows(text)
    assert await browser.text("#views") == "Calls\nQueues\nSchedules\nHost\n⚠ 1"


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_axe_finds_nothing_that_keeps_people_out(page: Page, function: Server, scheme: str) -> None:
    """Contrast, names, roles and order, in every view, and in a dialog."""
    if not AXE.exists():
        pytest.skip("needs axe-core: npm install --no-save axe-core")
    browser, gateway = page.browser, page.gateway
    function.behaviour = answer(400, b'{"why": "no"}', Content_Type="application/json")
    call = await gateway.submit("it", b'{"a": 1}', X_Callback_Url=f"{function.url}/gone")
    await gateway.until(call, lambda record: record["callback"]["attempts"] > 0)
    await gateway.submit("later", X_Delay="1h")
    await gateway.final(await gateway.submit(LONG))
    await browser.cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    found: dict[str, list[str]] = {}
    for place in ("#calls", f"#call?id={call}", "#queues", "#schedules", "#host", "?"):
        if place == "?":
            await browser.press("?")
        else:
            await page.open(place)
            assert await browser.run("return document.documentElement.scrollWidth <= innerWidth"), place
        await browser.run(AXE.read_text())
        script = "axe.run().then((result) => arguments[0](result.violations))"
        violations = await browser.do(browser.driver.execute_async_script, script)
        found[place] = [f"{one['id']}: {node['html']}" for one in violations for node in one["nodes"]]
        await page.picture(f"{scheme}-{place.strip('#?').partition('?')[0] or 'help'}")
    assert found == {place: [] for place in found}
    await browser.cdp("Emulation.setEmulatedMedia", features=[])


async def test_a_call_is_told_from_its_beginning(page: Page, function: Server, sink: Server) -> None:
    """How long it waited, each attempt and each delivery with its reason; request and result as they are."""
    browser, gateway = page.browser, page.gateway
    answers = iter([answer(503, b"busy"), answer(200, b'{"big": 12345678901234567890}')])
    function.behaviour = lambda request, seen: next(answers)(request, seen)
    replies = iter([answer(500), answer(200)])
    sink.behaviour = lambda request, seen: next(replies)(request, seen)
    call = await gateway.submit("it", b"<b>hello</b>", X_Callback_Url=f"{sink.url}/done")
    await gateway.final(call)
    await page.open(f"#call?id={call}")
    happened = (await browser.text("#view .line")).split("\n")
    assert [line for line in happened if re.match("waited|attempt|callback|function|the|http", line)] == [
        "waited",
        "attempt 1",
        "function it answered 503",
        "attempt 2",
        "callback 1",
        "the callback URL answered 500",
        "callback 2",
        f"{sink.url}/done",
    ]
    assert await browser.text("#view .sides section:first-child pre") == "<b>hello</b>"
    assert await browser.text("#view .sides section:last-child pre") == '{\n  "big": 12345678901234567890\n}'
    await page.picture("call")


async def test_a_call_is_run_again_cancelled_and_called_back_again(page: Page, function: Server, sink: Server) -> None:
    """Where it is shown, with its buttons."""
    browser, gateway = page.browser, page.gateway
    function.behaviour = gate = Gate()
    call = await gateway.submit("it", b"1", X_Callback_Url=sink.url)
    await function.wait_for(1)
    await page.open(f"#call?id={call}")
    await browser.click("=Cancel…")
    await browser.shows("Cancel 1 call?", "#dialog")
    await browser.click("=Cancel 1 call")
    await browser.shows("cancelled", "#view h2")
    gate.open()
    await browser.click("=Run again")
    await browser.shows("success", "#view h2")
    await browser.click("=Send callback again")
    await sink.wait_for(2)
    assert [request.body for request in function.requests] == [b"1", b"1"]


async def test_a_call_is_run_with_another_body(page: Page, function: Server) -> None:
    """As a new call of the same function, with the same path, type and queue."""
    browser, gateway = page.browser, page.gateway
    call = await gateway.submit("later/way?x=1", b"\xc3\xa9", Content_Type="text/x-mine")
    await gateway.final(call)
    await page.open(f"#call?id={call}")
    await browser.click("=Run with another body…")
    await browser.press("two")
    await browser.click("=Queue it")
    await function.wait_for(2)
    one, two = function.requests
    assert (one.target, two.target) == ("/way?x=1", "/way?x=1")
    assert two.body.decode() == "étwo"
    assert two.headers["Content-Type"] == "text/x-mine"
    await browser.until(f"document.title.startsWith('call') && !location.hash.includes({call!r})")
    await browser.shows("slow", "#view .facts")


async def test_a_call_is_copied_as_a_command(page: Page, function: Server) -> None:
    """Which does the same when a shell runs it: quotes mean nothing, nor does what curl looks for."""
    browser, gateway = page.browser, page.gateway
    body = b'@/etc/hostname it\'s "quoted" $HOME `x` \\ \xc3\xa9\n'
    path, kind = "/a/../{x,y}/[1-3]/%27/b?x=1&y='", "text/x-mine; a='$(x)'"
    call = (
        await ask(gateway.url, f"/async-function/it{path}", f"Content-Type: {kind}", method="POST", body=body)
    ).headers
    await gateway.final(call["X-Call-Id"])
    await page.open(f"#call?id={call['X-Call-Id']}")
    await browser.run("navigator.clipboard.writeText = (text) => { window.copied = text; }")
    await browser.click("=Copy as curl")
    await browser.shows("Copied", "#notice")
    await run("sh", "-c", await browser.run("return window.copied"))
    one, two = await function.wait_for(2)
    assert (one.target, one.body) == (path, body)
    assert (two.target, two.body, two.headers["Content-Type"]) == (path, body, kind)
    # A browser would send it to what the dots lead to, which may be another function.
    await browser.click("=Run with another body…")
    await browser.shows("A browser would change its path", "#notice")


HOSTILE = "<img src=x onerror=\"document.title='hit'\"><script>document.title='hit'</script>javascript:alert(1)"


async def test_what_functions_and_callers_say_is_text(page: Page, function: Server, sink: Server) -> None:
    """In errors, bodies, ids, filters and headers: nothing of it becomes an element or a script."""
    browser, gateway = page.browser, page.gateway
    function.behaviour = answer(400, HOSTILE.encode(), Content_Type="text/html")
    headers = {"Content_Type": "text/html", "X_Call_Id": HOSTILE.replace(" ", "/")}
    await gateway.submit(f"it/{quote(HOSTILE)}", HOSTILE.encode(), **headers, X_Callback_Url=f"{sink.url}/<svg>")
    await sink.wait_for(1)
    async with gateway.http.get(f"{gateway.url}/system/calls") as response:
        (record,) = (await response.json())["calls"]
    for place in ("", f"#call?id={record['id']}", f"#calls?call_id={quote(HOSTILE)}"):
        await page.open(place)
        assert await browser.run("return document.querySelectorAll('img, iframe, body script:not([type])').length") == 0
        assert "hit" not in await browser.run("return document.title")
    await page.open(f"#call?id={record['id']}")
    for part in ("first", "last"):
        assert await browser.text(f"#view .sides section:{part}-child pre") == HOSTILE
    assert await browser.complaints() == []


async def test_a_result_that_is_opened_by_itself_can_do_nothing(page: Page, function: Server) -> None:
    """Also where it is a page with scripts that its function has made."""
    browser, gateway = page.browser, page.gateway
    script = b"<title>kept</title><script>document.title = 'ran'; fetch('/system/calls')</script>"
    function.behaviour = answer(200, script, Content_Type="text/html")
    call = await gateway.submit("it", script, Content_Type="text/html")
    await gateway.final(call)
    for what in ("result", "request", "log"):
        await browser.open(f"{gateway.url}/system/calls/{call}/{what}")
        assert await browser.run("return document.title") in ("kept", "")


async def test_a_page_from_elsewhere_can_neither_act_nor_frame_nor_read(page: Page, function: Server) -> None:
    """Whatever it tries, in a browser that is at home on the daemon's page."""
    browser, gateway = page.browser, page.gateway
    waiting = await gateway.submit("it", X_Delay="1h")
    await page.open()
    target = f"{gateway.url}/system/calls/cancel?status=delayed"
    attack = f"""<!doctype html><title>attack</title><iframe src="{gateway.url}/ui/"></iframe>
        <form method=post action="{target}" target=sink><button>go</button></form><iframe name=sink></iframe>
        <script>
        const seen = (promise) => promise.then((answer) => answer.text()).catch(() => "refused");
        Promise.all([
            seen(fetch("{target}", {{ method: "POST" }})),
            seen(fetch("{target}", {{ method: "POST", mode: "no-cors" }})),
            seen(fetch("{gateway.url}/system/calls")),
            seen(fetch("{gateway.url}/ui/")),
        ]).then((all) => {{ document.body.append(`tried: ${{all.join()}}`); }});
        </script>"""
    function.behaviour = answer(200, attack.encode(), Content_Type="text/html")
    await browser.open(function.url.replace("127.0.0.1", "attacker.example"))
    await browser.shows("tried: refused,,refused,refused")
    await browser.click("=go")
    await browser.until("document.querySelector('iframe').contentDocument === null")
    for number in (0, 1):
        await browser.do(browser.driver.switch_to.frame, number)
        text = await browser.run("return document.body.innerText")
        assert "faasd-async" not in text
        await browser.do(browser.driver.switch_to.default_content)
    assert (await gateway.record(waiting))["status"] == "delayed"


async def test_a_name_that_was_made_to_point_here_shows_nothing(page: Page) -> None:
    """DNS rebinding: the browser takes it for the attacker's own site."""
    browser, gateway = page.browser, page.gateway
    await browser.open(gateway.url.replace("127.0.0.1", "attacker.example") + "/ui/")
    await browser.shows("attacker.example")
    assert "gateway.hosts" in await browser.text("body")


async def test_all_of_it_is_done_by_keyboard(page: Page, function: Server) -> None:
    """Find, look, go back, select, retry, cancel, get help: without a mouse, and the focus is never lost."""
    browser, gateway = page.browser, page.gateway
    function.behaviour = answer(400)
    for _ in range(2):
        await gateway.final(await gateway.submit("it"))
    waiting = await gateway.submit("later", X_Delay="1h")
    function.behaviour = answer(200)
    await page.open()
    await page.rows(3)
    await browser.press("?")
    await browser.shows("next call", "#dialog")
    await browser.press(Keys.ESCAPE)
    await browser.until("!document.querySelector('#dialog').open")
    await browser.press("j", "j", "j", "k", "c")  # the second has ended
    await browser.shows("can't be cancelled", "#notice")
    await browser.press("x", "j", "x")
    await browser.shows("2 calls selected")
    await browser.press("r")
    await browser.shows("Retry 2 calls?", "#dialog")
    await browser.press(Keys.TAB, Keys.ENTER)
    await browser.until("document.querySelectorAll('#calls tbody .success').length === 2")
    await browser.press("/", "queue:slow", Keys.ENTER)
    await page.rows(1)
    await browser.press(Keys.TAB, Keys.TAB)
    await browser.run("document.activeElement.blur()")
    await browser.press("j", Keys.ENTER)
    await browser.shows("later", "#view h2")
    await browser.shows("for its time, in 59 min", "#view .line")
    await browser.press("c")
    await browser.shows("Cancel 1 call?", "#dialog")
    await browser.press(Keys.TAB, Keys.ENTER)
    await browser.shows("cancelled", "#view h2")
    assert (await gateway.record(waiting))["status"] == "cancelled"


async def test_a_phone_shows_all_of_it(page: Page, function: Server) -> None:
    """360 pixels wide nothing is cut off, a thumb hits what it wants, and nothing moves."""
    browser, gateway = page.browser, page.gateway
    function.behaviour = answer(400)
    call = await gateway.submit("it", X_Callback_Url=f"{function.url}/a/rather/long/path/to/somewhere/else")
    await gateway.submit("later", X_Delay="1h")
    await gateway.final(call)
    for _ in range(2):
        await gateway.final(await gateway.submit(LONG))
    await ask(gateway.url, "/system/schedules/nightly/run", method="POST")
    await browser.cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-reduced-motion", "value": "reduce"}])
    screen = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    await browser.cdp("Emulation.setDeviceMetricsOverride", **screen)
    await browser.cdp("Emulation.setTouchEmulationEnabled", enabled=True)
    try:
        for place in ("#calls?queue=slow", "#calls", f"#call?id={call}", "#queues", "#schedules", "#host"):
            await page.open(place)
            await page.picture(f"phone-{place.strip('#').partition('?')[0]}")
            assert await browser.run("return document.documentElement.scrollWidth") == 360, place
            assert await browser.run(SMALL_TARGETS) == [], place
            assert await browser.run(MOTION) == [], place
        await page.open(f"#calls?function={LONG}")
        await page.rows(2)
        await browser.click("thead label")
        await browser.shows("2 calls selected")
    finally:
        await browser.cdp("Emulation.setEmulatedMedia", features=[])
        await browser.cdp("Emulation.clearDeviceMetricsOverride")
        await browser.cdp("Emulation.setTouchEmulationEnabled", enabled=False)


async def test_a_host_that_shares_its_queue_shows_the_same(
    browser: Browser, hosts: StartHost, function: Server
) -> None:
    """What happens on it, by a stream; and that others keep the calls, and how well, also on a phone."""
    page = Page(browser, await hosts(SETTINGS.format(url=function.url)))
    await page.open()
    await browser.shows("live", "#live")
    await page.gateway.submit("it")
    await browser.until("document.querySelector('#calls tbody .success')")
    assert (await browser.text("nav[aria-label=States] a:nth-child(5)")).split() == ["success", "1"]
    screen = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    await browser.cdp("Emulation.setDeviceMetricsOverride", **screen)
    await page.open("#host")
    await page.picture("phone-nats-host")
    assert "nats://" in await browser.text(".facts")
    assert await browser.run("return document.documentElement.scrollWidth") == 360
    await browser.cdp("Emulation.clearDeviceMetricsOverride")


async def test_output_shows_while_it_is_written(browser: Browser, daemon: StartDaemon, tmp_path: Path) -> None:
    """Line by line, until the function has ended; then the result stands beside the request."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    script = f"echo first >&2; cat {pipe} >&2; echo result"
    gateway = await daemon(f"[functions.talks]\ncommand = {['sh', '-c', script]}")
    page = Page(browser, gateway)
    call = await gateway.submit("talks")
    await page.open(f"#call?id={call}")
    await browser.shows("first", "#view")
    await browser.shows("running", "#view h2")
    await asyncio.to_thread(pipe.write_text, "second\n")
    await browser.shows("second", "#view")
    await browser.shows("success", "#view h2")
    await browser.shows("result", "#view .sides section:last-child pre")
    await browser.shows("result\nfirst\nsecond", "#view > section pre")


async def test_who_may_only_look_gets_no_buttons(browser: Browser, daemon: StartDaemon, tmp_path: Path) -> None:
    """But for what acts on nothing; with the other login there are all of them."""
    auth = {"user": "admin", "password": "secret", "view_user": "guest", "view_password": "open"}
    for name in auth.values():
        (tmp_path / name).write_text(name)
    files = [f"{key}_file = '{tmp_path / name}'" for key, name in auth.items()]
    settings = "[functions.it]\ncommand = ['true']\n[auth]\n"
    gateway = await daemon(settings + "\n".join(files))
    call = await gateway.submit("it", b"1")
    port = urlsplit(gateway.url).port
    logins = {"guest:open": (0, 1, 0), "admin:secret": (2, 3, 1)}
    for login, numbers in logins.items():
        name = login.partition(":")[0]
        await browser.open(f"http://{login}@{name}.localhost:{port}/ui/#calls?status=success")
        await browser.until("document.querySelectorAll('#calls tbody tr').length === 1")
        assert ("read-only" in await browser.text("#live")) == (name == "guest")
        found = [await browser.run(BUTTONS)]
        for place in (f"call?id={call}", "queues"):
            await browser.run("location.hash = arguments[0]", place)
            await browser.until(f"document.title.startsWith({place.partition('?')[0] + ' '!r})")
            found.append(await browser.run(BUTTONS))
        assert tuple(found) == numbers
