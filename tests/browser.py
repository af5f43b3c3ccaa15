"""How a browser lays pages out: what sticks out at the side, and which pictures are missing."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
PHONE, DESKTOP = 390, 1280  # pixels
HARNESS = "look.html"
# Frames without scripts: the layout is the style sheet's.
SCRIPT = """<!doctype html><body style="margin:0"><script>
const found = [];
async function look(page) {
  const frame = document.createElement("iframe");
  frame.sandbox = "allow-same-origin";
  frame.style = `border:0;height:900px;width:${WIDTHS[0]}px`;
  const loaded = new Promise(resolve => frame.onload = resolve);
  frame.src = page;
  document.body.append(frame);
  await loaded;
  const inside = frame.contentDocument;
  for (const width of WIDTHS) {
    frame.style.width = `${width}px`;
    const wide = inside.documentElement.scrollWidth;
    if (wide > width) found.push(`${page} at ${width}: ${wide} pixels wide`);
  }
  for (const image of inside.images) if (!image.complete || !image.naturalWidth) found.push(`${page}: no ${image.src}`);
  if (!inside.body.innerText.trim()) found.push(`${page}: empty`);
  frame.remove();
}
(async () => {
  const left = [...PAGES];
  const work = async () => { while (left.length) await look(left.shift()); };
  await Promise.all([work(), work(), work()]);
  found.sort();
  document.body.innerHTML = "<pre id=found></pre>";
  document.getElementById("found").textContent = JSON.stringify(found);
})();
</script>"""


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Nothing."""


@contextmanager
def _served(folder: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _command(profile: Path, *flags: str) -> list[str]:
    return [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}", *flags
    ]  # fmt: skip


def layout_problems(
    folder: Path, pages: Sequence[str], scratch: Path, widths: Sequence[int] = (PHONE, DESKTOP)
) -> list[str]:
    """Pages that are wider than the window, that miss a picture, or that are empty.

    Args:
        folder: what they and their pictures lie in; a page that looks at them is there for as long as it takes.
        pages: names in it.
        scratch: for the browser's profile.
        widths: of the window, in pixels.
    """
    text = SCRIPT.replace("PAGES", json.dumps(list(pages))).replace("WIDTHS", json.dumps(list(widths)))
    (folder / HARNESS).write_text(text, encoding="utf-8")
    try:
        with _served(folder) as address:
            command = _command(scratch / "profile", "--virtual-time-budget=60000", "--dump-dom", f"{address}/{HARNESS}")
            done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    finally:
        (folder / HARNESS).unlink()
    (found,) = re.findall(r'<pre id="found">(.*)</pre>', done.stdout, flags=re.DOTALL)
    problems: list[str] = json.loads(html.unescape(found))
    return problems


def screenshot(page: Path, picture: Path, *, is_dark: bool = False, width: int = DESKTOP) -> None:
    """What a page looks like, as PNG; scripts run, as they do for a reader.

    Args:
        page: an HTML file.
        picture: the file to write; the browser's profile goes beside it.
        is_dark: whether the reader's system is.
        width: of the window, in pixels.
    """
    scheme = f"--blink-settings=preferredColorScheme={0 if is_dark else 1}"
    flags = (scheme, f"--window-size={width},900", f"--screenshot={picture}", page.as_uri())
    command = _command(picture.with_suffix(".profile"), *flags)
    subprocess.run(command, check=True, capture_output=True, timeout=120)
