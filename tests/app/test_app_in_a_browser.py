"""The Space, which is `hf-msn app`, in headless Chromium: `make test-app`. `make test` has no Gradio and skips it.

With APP_PICTURES=docs it also takes the pictures of docs/app.md.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio")
sync_playwright = pytest.importorskip("playwright.sync_api").sync_playwright
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")]


@pytest.fixture
def served(tmp_path):
    """Run the Space in folders of its own. Yield its address, its process and these folders."""
    folders = {name: tmp_path / name for name in ("tmp", "home", "work")}
    for folder in folders.values():
        folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        **{"PYTHONPATH": str(ROOT), "HOME": str(folders["home"]), "TMPDIR": str(folders["tmp"])},
        **{"GRADIO_SERVER_PORT": str(port), "GRADIO_SERVER_NAME": "127.0.0.1"},
    }
    script = ROOT / "spaces" / "low_shot" / "app.py"
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, str(script)], cwd=folders["work"], env=environment, stdout=log, stderr=log
        )
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 200
    try:
        while True:
            try:
                urllib.request.urlopen(address, timeout=5).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.3)
        yield address, process, folders
    finally:
        process.kill()
        process.wait()


def colored(folder: Path, name: str, color: tuple[int, int, int], count: int) -> list[str]:
    """Return files of noisy images of a colour."""
    random, paths = np.random.RandomState(len(name)), []
    for number in range(count):
        pixels = np.clip(np.array(color) + random.randint(-20, 20, (12, 12, 3)), 0, 255).astype(np.uint8)
        paths.append(str(folder / f"{name}_{number}.png"))
        Image.fromarray(pixels).save(paths[-1])
    return paths


def test_a_few_images_become_a_classifier_and_nothing_else_stays(served, tmp_path):
    address, process, folders = served
    dark, light = (colored(tmp_path, name, (level,) * 3, 4) for name, level in (("dark", 30), ("light", 220)))
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    huge = tmp_path / "huge.png"
    huge.write_bytes(bytes(11_000_000))
    odd = "<b>dark</b> ${1+1} {{value}}"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1180, "height": 900})
        page.set_default_timeout(60_000)
        requests = []
        page.on("request", lambda request: requests.append(request.url))
        page.goto(address)

        def add(name: str, files: list[str]) -> None:
            page.fill("#class-name textarea, #class-name input", name)
            page.set_input_files("#examples input[type=file]", files)
            page.wait_for_selector(f"#examples :text('{Path(files[0]).stem[:4]}')")
            page.click("#add")
            page.wait_for_selector(f"#labelled section:has-text('{name}')")

        add(odd, [*dark[:3], str(broken)])
        assert page.inner_text("#labelled h4").split("\n") == [odd, "3"]
        assert "'broken.png' is left out" in page.inner_text("#messages")
        add("light", light[:3])
        assert page.inner_text("#messages").strip() == ""

        page.set_input_files("#others input[type=file]", [dark[3], light[3]])
        page.wait_for_selector("#answers article >> nth=1")
        answers = [page.inner_text(f"#answers article >> nth={row}") for row in (0, 1)]
        assert answers[0].startswith(odd) and answers[1].startswith("light")
        assert page.locator("#answers article >> nth=0 >> figure img").count() == 3

        page.get_by_role("tab", name="Map").click()
        page.wait_for_selector("#map svg[aria-label*='6 labelled and 2 new']")
        page.get_by_role("tab", name="Accuracy").click()
        assert page.locator("#accuracy svg .curve circle").count() == 2
        page.get_by_role("tab", name="Export").click()
        page.click("#export")
        with page.expect_download() as download:
            page.click("#exported a")
        download.value.save_as(tmp_path / "classifier.zip")
        assert "model.safetensors" in zipfile.ZipFile(tmp_path / "classifier.zip").namelist()

        page.fill("#class-name textarea, #class-name input", "nothing")
        page.click("#remove")
        page.wait_for_selector("#messages :text(\"no class 'nothing'\")")
        page.fill("#class-name textarea, #class-name input", "light")
        page.click("#remove")
        page.wait_for_selector("#labelled section:has-text('light')", state="detached")
        assert page.locator("#labelled section").count() == 1
        page.set_input_files("#examples input[type=file]", str(huge))
        page.wait_for_selector("text=/maximum allowed size of 10/i")
        page.click("#clear")
        page.wait_for_selector("#labelled :text('No labelled images')")
        page.click("#digits")
        page.get_by_role("tab", name="Answers").click()
        page.wait_for_selector("#answers article >> nth=19")
        assert page.locator("#labelled section").count() == 10
        if pictures := os.environ.get("APP_PICTURES"):
            page.reload()
            page.click("#digits")
            page.wait_for_selector("#answers article >> nth=19")
            page.screenshot(path=Path(pictures, "app_answers.png"))
            page.get_by_role("tab", name="Map").click()
            page.locator("#map svg").screenshot(path=Path(pictures, "app_map.png"))
        browser.close()
    assert all(url.startswith((address, "data:", "blob:")) for url in requests)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=30)
    left = [path for folder in folders.values() for path in folder.rglob("*") if path.is_file()]
    assert [path for path in left if "matplotlib" not in path.parts] == []  # its list of fonts
