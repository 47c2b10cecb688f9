"""The page at /: its files, and a real browser that talks to a real server, stops, loses it and finds it again."""

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2 as httpx
import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException, TimeoutException
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from tests.support.server_process import PATIENCE_S, ROOT, ServerProcess, running_server

PAGE = ROOT / "serve" / "page"
# No connections of its own: the page is to need nothing from outside, nor is the test.
ARGUMENTS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1280,900"),
)
SLOW = ("--step-s", "0.03", "--num-slots", "8", "--capacity", "1024")


def test_nothing_comes_from_outside() -> None:
    files = sorted(PAGE.iterdir())
    assert {"index.html", "app.js", "style.css", "icon.svg"} <= {file.name for file in files}
    for file in files:
        text = file.read_text().replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert not re.findall(r"https?:|//[a-z]+\.[a-z]+|@import|innerHTML|\beval\b| style=| on[a-z]+=", text), (
            file.name
        )
        assert text.count("\n") < 400


def test_every_file_that_the_page_names_is_there() -> None:
    text = "".join(file.read_text() for file in PAGE.iterdir())
    named = set(re.findall(r'"/page/([\w.]+)"', text))
    assert named | {"index.html"} == {file.name for file in PAGE.iterdir()}


class Page:
    """The page in a browser, by what a person sees."""

    def __init__(self, browser: webdriver.Chrome, url: str) -> None:
        self.browser = browser
        browser.get("about:blank")
        browser.get(url)

    def find(self, selector: str) -> WebElement:
        return self.browser.find_element("css selector", selector)

    def texts(self, selector: str) -> list[str]:
        return [element.text for element in self.browser.find_elements("css selector", selector)]

    def until(self, is_true: Callable[[], bool], what: str) -> None:
        wait = WebDriverWait(self.browser, PATIENCE_S, 0.05, [StaleElementReferenceException])
        try:
            wait.until(lambda _: is_true())
        except TimeoutException:
            pytest.fail(f"not within {PATIENCE_S} s: {what}; the page says {self.find('body').text!r}")

    def until_state(self, state: str) -> None:
        self.until(lambda: self.find("#state").get_attribute("data-state") == state, f"the state is {state}")

    def ask(self, text: str) -> None:
        self.find("#question").send_keys(text + Keys.ENTER)

    def is_answering(self) -> bool:
        return self.find("#stop").is_displayed()

    def set(self, name: str, value: str) -> None:
        field = self.find(f"#{name}")
        field.clear()
        field.send_keys(value)

    def errors(self) -> list[str]:
        """What the console has, without the network's own words for a server that is not there or refuses."""
        entries = [entry["message"] for entry in self.browser.get_log("browser")]  # type: ignore[no-untyped-call]
        return [entry for entry in entries if "net::ERR_" not in entry and "Failed to load resource" not in entry]


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip(
            "the page is NOT tested: no chromium or chromedriver here (apt-get install chromium chromium-driver)"
        )
    options = Options()
    options.binary_location = binary
    for argument in ARGUMENTS:
        options.add_argument(argument)
    chrome = webdriver.Chrome(options=options, service=Service(driver))
    yield chrome
    chrome.quit()


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with running_server(*SLOW) as process:
        yield process


@pytest.fixture
def page(browser: webdriver.Chrome, server: ServerProcess) -> Iterator[Page]:
    shown = Page(browser, server.url)
    browser.execute_script("localStorage.clear()")
    browser.refresh()
    shown.until_state("ready")
    yield shown
    assert shown.errors() == []


def test_an_answer_streams_and_is_measured(page: Page, server: ServerProcess) -> None:
    page.until(lambda: "fake: fp32, 1,024 tokens of context" in page.find("#welcome-model").text, "what the model is")
    page.set("max_tokens", "240")
    page.set("stop_text", "never-comes")
    page.ask("hello")
    page.until(lambda: len(page.find(".assistant .text").text) > 3, "the first tokens")
    assert page.is_answering() and not page.find("#welcome").is_displayed()
    page.until(lambda: "1 of 8 slots" in page.find("#batch-text").text, "the batch shows the request")
    page.until(lambda: page.texts("#requests li") != [], "and the list does")
    page.until(lambda: not page.is_answering(), "the end")
    assert page.texts(".user .text") == ["hello"]
    assert page.find("#ttft").text.endswith("s") and float(page.find("#rate").text) > 0
    assert re.fullmatch(r"0 of \d+", page.find("#cached").text) and page.find("#accepted").text == "none"
    assert re.fullmatch(r"\d+ tokens in, \d+ out", page.find("#counts").text)
    # The conversation goes on with what was said.
    before = int(page.find("#counts").text.split()[0])
    page.set("max_tokens", "60")
    page.ask("and then?")
    page.until(lambda: len(page.texts(".assistant")) == 2 and not page.is_answering(), "the second answer")
    assert int(page.find("#counts").text.split()[0]) > before + 10


def test_stop_frees_the_slot_and_keeps_what_came(page: Page, server: ServerProcess) -> None:
    page.set("max_tokens", "900")
    page.set("temperature", "0")
    page.ask("go on and on")
    page.until(lambda: len(page.find(".assistant .text").text) > 3, "the first tokens")
    page.find("body").send_keys(Keys.ESCAPE)
    page.until(lambda: not page.is_answering(), "stopped")
    assert page.texts(".assistant .note") == ["Stopped."]
    page.until(lambda: server.metric("headrace_requests_running") == 0, "the slot is free")
    page.find("#new").click()
    assert page.texts(".message") == [] and page.find("#welcome").is_displayed()


def test_a_refusal_is_shown_and_the_question_comes_back(page: Page) -> None:
    page.set("max_tokens", "100000")
    page.ask("hello")
    page.until(lambda: "maximum context length is 1024" in page.find("#notice-text").text, "the server's words")
    assert page.texts(".message") == []
    assert page.find("#question").get_attribute("value") == "hello"
    page.set("max_tokens", "5")
    page.find("#retry").click()
    page.until(lambda: len(page.texts(".assistant")) == 1 and not page.is_answering(), "the answer")
    assert not page.find("#notice").is_displayed()


def test_settings_that_cannot_be_are_said_where_they_are(page: Page) -> None:
    page.set("schema", '{"type": ')
    assert "JSON" in page.find("#schema-error").text
    page.ask("hello")
    assert page.texts(".message") == [] and page.browser.switch_to.active_element == page.find("#schema")
    page.set("schema", "[1]")
    assert page.find("#schema-error").text == "A schema is a JSON object."
    page.find("#reset").click()
    assert not page.find("#schema-error").is_displayed() and page.find("#schema").get_attribute("value") == ""


def test_a_server_that_dies_and_one_that_comes_back(browser: webdriver.Chrome) -> None:
    with running_server(*SLOW) as first:
        page = Page(browser, first.url)
        page.until_state("ready")
        page.set("max_tokens", "900")
        page.ask("go on")
        page.until(lambda: len(page.find(".assistant .text").text) > 3, "the first tokens")
        first.signal(signal.SIGKILL, is_group=True)
        page.until(lambda: "connection broke" in page.find("#notice-text").text, "the loss is said")
        page.until_state("offline")
        port = first.url.rpartition(":")[2]
    page.set("max_tokens", "10")
    with running_server(*SLOW, "--port", port):
        page.until_state("ready")
        page.find("#retry").click()
        page.until(lambda: page.texts(".assistant") != [] and not page.is_answering(), "the answer")
        assert page.texts(".user .text") == ["go on"] and len(page.texts(".assistant")) == 1
        assert page.errors() == []


def test_a_key_is_asked_for(browser: webdriver.Chrome, tmp_path: Path) -> None:
    command = [sys.executable, "headrace.py", "key", "me", "--file", str(tmp_path / "keys")]
    key = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    with running_server("--api-keys", str(tmp_path / "keys"), *SLOW) as server:
        page = Page(browser, server.url)
        page.until(lambda: page.find("#key-dialog").is_displayed(), "the dialog")
        assert page.find("#state").text == "needs a key"
        page.find("#key-input").send_keys(key)
        page.find("#key-save").click()
        page.until_state("ready")
        page.set("max_tokens", "10")
        page.ask("hello")
        page.until(lambda: page.texts(".assistant") != [] and not page.is_answering(), "the answer")
        assert httpx.get(f"{server.url}/status").status_code == 401
        assert key not in browser.execute_script("return JSON.stringify(localStorage)")
        browser.execute_script("sessionStorage.clear()")


def test_keys_and_themes(page: Page) -> None:
    def colours() -> list[str]:
        style = "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
        return list(page.browser.execute_script(style))

    light = colours()
    page.find("body").send_keys(Keys.ALT + "t")
    assert colours() != light
    page.browser.refresh()
    page.until_state("ready")
    assert colours() != light
    page.find("#theme").send_keys("/")
    assert page.browser.switch_to.active_element == page.find("#question")
    # Everything that can be done can be reached by Tab, and says what it is.
    reached = {}
    for _ in range(40):
        page.browser.switch_to.active_element.send_keys(Keys.TAB)
        active = page.browser.switch_to.active_element
        name = str(active.get_attribute("id"))
        if name in reached:
            break
        if active.tag_name in ("button", "input", "select", "textarea"):
            reached[name or active.text] = active.accessible_name
    assert {"model", "new", "key", "theme", "question", "send", "system", "schema", "reset"} <= set(reached)
    assert all(reached.values())
