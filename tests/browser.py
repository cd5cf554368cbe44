"""A headless Chromium, driven over a pair of pipes: what a page logs, asks for and cannot show."""

import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

CHROMIUM = next(
    (
        found
        for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
        if (found := shutil.which(name))
    ),
    None,
)

SECONDS = 60.0
"""A page that has not loaded by then hangs."""

BROKEN = "[...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src)"


MOVED = """import os, sys
for number, there in zip(sys.argv[1:3], (3, 4)):
    os.dup2(int(number), there)
os.execv(sys.argv[3], sys.argv[3:])"""


class Browser:
    """One browser without a network; `faults` opens a page."""

    def __init__(self, profile: Path):
        assert CHROMIUM is not None
        to_read, self.to = os.pipe()
        self.back, to_write = os.pipe()
        # Chromium's protocol on descriptors 3 and 4: JSON, each message ended by a zero.
        theirs = [fcntl.fcntl(each, fcntl.F_DUPFD, 10) for each in (to_read, to_write)]
        options = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
        local = ("--disable-background-networking", "--no-first-run", "--proxy-server=127.0.0.1:9")
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-c", MOVED, *map(str, theirs), CHROMIUM, *options, *local),
                *(f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"),
            ],
            pass_fds=theirs,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for each in (to_read, to_write, *theirs):
            os.close(each)
        self.held, self.count, self.seen = b"", 0, []
        self.session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        found = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = found["sessionId"]
        for domain in ("Page", "Log", "Runtime", "Network"):
            self.call(f"{domain}.enable")

    def faults(self, page: Path) -> list[str]:
        """What is wrong with a page: errors in the console, failed and foreign requests, images."""
        self.seen = []
        self.call("Page.navigate", url=page.as_uri())
        self.until(lambda: any(m.get("method") == "Page.loadEventFired" for m in self.seen))
        value = self.call("Runtime.evaluate", expression=BROKEN, returnByValue=True)
        found = [f"image {source}" for source in value["result"]["value"]]
        for message in self.seen:
            told, method = message.get("params", {}), message.get("method")
            if method == "Log.entryAdded" and told["entry"]["level"] == "error":
                found.append(f"{told['entry']['text']} {told['entry'].get('url', '')}")
            elif method == "Runtime.exceptionThrown":
                found.append(str(told["exceptionDetails"].get("exception", told)))
            elif method == "Runtime.consoleAPICalled" and told["type"] == "error":
                found.append(str(told["args"]))
            elif method == "Network.requestWillBeSent":
                url = told["request"]["url"]
                if not url.startswith(("file:", "data:", "blob:", "about:")):
                    found.append(f"asks for {url}")
        return found

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(SECONDS)
        os.close(self.to)
        os.close(self.back)

    def call(self, method: str, **params: object) -> dict:
        self.count += 1
        number, answers = self.count, []
        message = {"id": number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        self.until(lambda: answers, lambda m: m.get("id") == number and answers.append(m))
        assert "error" not in answers[0], answers[0]
        return answers[0]["result"]

    def until(self, done, look=lambda message: None) -> None:
        """Read messages until ``done``; each goes to ``look`` and to ``seen``."""
        stop = time.monotonic() + SECONDS
        while not done():
            assert time.monotonic() < stop, "the browser does not answer"
            while b"\0" not in self.held:
                ready, _, _ = select.select([self.back], [], [], SECONDS)
                assert ready, "the browser does not answer"
                more = os.read(self.back, 1 << 16)
                assert more, "the browser has ended"
                self.held += more
            one, self.held = self.held.split(b"\0", 1)
            message = json.loads(one)
            look(message)
            self.seen.append(message)
