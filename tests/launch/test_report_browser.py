"""The report in a real browser: its policy lets its own style through, nothing is refused, the switches work."""

import json
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from poise.launch import report

pytestmark = pytest.mark.effects

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
PAGE, DARK_PAGE = (246, 246, 243), (21, 23, 26)


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, NAMES)), None)
    assert found, f"this test needs a browser on PATH ({', '.join(NAMES)}), such as Debian's package chromium"
    return found


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    for seed, name in enumerate(("first", "<script>alert(1)</script>".replace("/", "\N{DIVISION SLASH}"))):
        run = folder / name
        run.mkdir()
        noise = np.random.default_rng(seed).normal(size=2000) / 10
        rows = [
            {"phase": "train", "step": i + 1, "loss": float(np.exp(-i / 300) + 0.3 + noise[i] / 5)} for i in range(2000)
        ]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (run / "config.json").write_text(
            json.dumps({"seed": seed, "note": "</style><script>document.title=1</script>"})
        )
        (run / "report.json").write_text(json.dumps({"a": {"score": 0.5}, "b": {"score": 0.25 * seed}}))
        Image.new("RGB", (300, 100), (1, 2, 254)).save(run / "picture.png")
    output = folder / "page.html"
    assert report.main([*(str(run) for run in sorted(folder.iterdir())), f"--output={output}"]) == 0
    return output.read_text(encoding="utf-8")


def shot(browser, folder, text, *flags, width=1200, height=2600):
    """The page as pixels, and what the browser has to say about it."""
    source, target = folder / "page.html", folder / "page.png"
    source.write_text(text, encoding="utf-8")
    target.unlink(missing_ok=True)
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--force-device-scale-factor=1",
        f"--user-data-dir={folder}/profile",
        "--enable-logging=stderr",
        f"--window-size={width},{height}",
        f"--screenshot={target}",
        *flags,
        source.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert target.is_file(), done.stderr
    pixels = np.asarray(Image.open(target).convert("RGB"))
    assert pixels.shape == (height, width, 3)
    return pixels, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def share(pixels, colour):
    return (np.abs(pixels.astype(int) - colour).max(-1) <= 2).mean()


def test_the_page_has_its_style_and_its_pictures_and_nothing_is_refused(browser, page, tmp_path):
    pixels, said = shot(browser, tmp_path, page)
    assert said == []
    assert tuple(pixels[5, 5]) == PAGE
    assert share(pixels, (1, 2, 254)) > 0.01  # both pictures
    for colour in ((0, 114, 178), (213, 94, 0)):
        assert share(pixels, colour) > 1e-4  # both runs' curves


def test_a_style_that_is_not_the_pages_own_is_refused(browser, page, tmp_path):
    """The policy is in force: what the test above doesn't hear would be heard."""
    changed = page.replace("body{margin:0", "body{margin:1px")
    assert changed != page
    pixels, said = shot(browser, tmp_path, changed)
    assert any("Content Security Policy" in line for line in said)
    assert tuple(pixels[5, 5]) == (255, 255, 255)
    script = page.replace(
        "</body>", "<script>document.body.remove()</script><img src='https://example.org/x.png'></body>"
    )
    pixels, said = shot(browser, tmp_path, script)
    assert len(said) == 2
    assert all("Content Security Policy" in line for line in said)
    assert share(pixels, (1, 2, 254)) > 0.01


@pytest.mark.parametrize(
    ("name", "checked"), [("log", False), ("smooth", True), ("run0", True)], ids=["log", "smooth", "run"]
)
def test_the_switches_switch(browser, page, tmp_path, name, checked):
    before, after = f'id="{name}" class="toggle" checked="checked"', f'id="{name}" class="toggle"'
    if not checked:
        before, after = after, before
    assert page.count(before) == 1
    first, _ = shot(browser, tmp_path, page)
    second, said = shot(browser, tmp_path, page.replace(before, after))
    assert said == []
    assert (first != second).any(-1).mean() > 3e-4  # far more than the mark of the switch
    if name == "run0":
        blue = (0, 114, 178)
        assert share(second, blue) < 0.5 * share(first, blue)


def test_it_is_dark_where_that_is_preferred_and_fits_a_phone(browser, page, tmp_path):
    pixels, said = shot(browser, tmp_path, page, "--blink-settings=preferredColorScheme=0")
    assert said == []
    assert tuple(pixels[5, 5]) == DARK_PAGE
    pixels, said = shot(browser, tmp_path, page, width=500)
    assert said == []
    assert tuple(pixels[5, 5]) == PAGE
    assert share(pixels[:, -6:], PAGE) > 0.95  # nothing runs over the margin
