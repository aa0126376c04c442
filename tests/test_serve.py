"""The page of `parrot serve`, driven in a headless browser, and by its API where there is no browser."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

soundfile = pytest.importorskip("soundfile")

from parrot import encoders  # noqa: E402 (they need what is asked for above)
from parrot.cli import main  # noqa: E402
from parrot.model import build  # noqa: E402
from parrot.prediction import Predictor  # noqa: E402

pytestmark = pytest.mark.skipif(find_spec("gradio") is None, reason="needs gradio")  # whose import takes seconds

RATE, LABELS = 16000, ["angry", "calm", "sad"]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models, untrained, and three recordings."""
    folder = tmp_path_factory.mktemp("serve")
    pair = [encoders.load(spec) for spec in ("ssam-demo", "hubert-demo")]
    dims = [encoder.embedding_dim for encoder in pair]
    facts = [{"spec": e.name, "name": e.name, "fingerprint": e.fingerprint, "random": True} for e in pair]
    for name in ("parrot", "parrot-reference", "parrot-frames", "fcn-0"):
        torch.manual_seed(0)
        model = build(name, dims, len(LABELS))
        if name == "parrot-reference":
            model.set_reference(*(torch.randn(31, dim) for dim in dims))
        model.description = {
            "labels": LABELS, "encoders": facts, "batch_size": 4, "system": name, "corpus": "tones"
        }  # fmt: skip
        model.save_pretrained(folder / name)
    (folder / "clips").mkdir()
    time = np.arange(RATE) / RATE
    for pitch in (150, 220, 330):
        sound = 0.3 * np.sin(2 * np.pi * pitch * time) * (1 + 0.8 * np.sin(20 * time))
        soundfile.write(folder / "clips" / f"{pitch}.wav", sound, RATE)
    return folder


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture
def served():
    """Launches pages and closes them."""
    from parrot import app

    pages = []

    def serve(predictor, among=()):
        pages.append(app.page(predictor, among))
        return app.launch(pages[-1], free_port())

    yield serve
    for page in pages:
        page.close()


def ask(address, path):
    from gradio_client import Client, handle_file

    client = Client(address, verbose=False, analytics_enabled=False)
    return client.predict(None if path is None else handle_file(path), api_name="/analyse")


def test_the_page_answers_as_predict_does(folder, served):
    predictor = Predictor.load(folder / "parrot-reference")
    clip = folder / "clips" / "220.wav"
    shares, waveform, plan, note = ask(served(predictor), str(clip))
    (wanted,) = predictor.files([clip])
    assert shares["label"] == wanted["label"]
    found = {entry["label"]: entry["confidence"] for entry in shares["confidences"]}
    assert found == pytest.approx(wanted["probabilities"])
    assert "base64" in str(waveform)
    assert "base64" in str(plan)
    assert "among 31 stored training clips" in note


def test_the_plan_is_that_of_the_answer(folder):
    clips = sorted((folder / "clips").glob("*.wav"))
    references, batch = Predictor.load(folder / "parrot-reference"), Predictor.load(folder / "parrot")
    assert Predictor.load(folder / "fcn-0").plan([references.embed_file(clips[0])]) is None
    plan = references.plan([references.embed_file(clip) for clip in clips])
    assert plan.shape == (32, 32)
    np.testing.assert_allclose(plan.sum(0), 1 / 32, atol=1e-4)
    plan = batch.plan([batch.embed_file(clip) for clip in clips])
    assert plan.shape == (3, 3)
    np.testing.assert_allclose(plan.sum(0), 1 / 3, atol=1e-4)


def test_a_clip_alone_and_among_others_in_the_paper_s_mode(folder, served):
    predictor = Predictor.load(folder / "parrot")
    first, *others = sorted((folder / "clips").glob("*.wav"))
    *_, note = ask(served(predictor), str(first))
    assert "One clip alone is a batch of one" in note
    shares, _, plan, note = ask(served(predictor, [predictor.embed_file(path) for path in others]), str(first))
    assert "depends on the 2 recordings" in note
    assert "base64" in str(plan)
    wanted = next(predictor.files([first, *others]))
    assert {e["label"]: e["confidence"] for e in shares["confidences"]} == pytest.approx(wanted["probabilities"])


def test_transport_between_frames_is_told_as_such(folder, served):
    from parrot import app

    clip = folder / "clips" / "220.wav"
    *_, plan, note = ask(served(Predictor.load(folder / "parrot-frames")), str(clip))
    assert note == app.FRAMES
    assert "base64" in str(plan)


def test_what_can_t_be_used_is_an_error_on_the_page(folder, served, tmp_path):
    address = served(Predictor.load(folder / "parrot"))
    (tmp_path / "text.wav").write_text("no recording")
    with pytest.raises(Exception, match="not a readable audio file"):
        ask(address, str(tmp_path / "text.wav"))
    with pytest.raises(Exception, match="Record or upload a clip first"):
        ask(address, None)


def test_the_page_is_local(folder, served):
    from parrot import app

    address = served(Predictor.load(folder / "parrot"))
    assert address.startswith("http://127.0.0.1:")
    with urllib.request.urlopen(address) as answer:
        assert app.TITLE in answer.read().decode()
    port = int(address.rstrip("/").rpartition(":")[2])
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--port", "0"], "--port must be from 1 to 65535"), (["--model", "/nowhere"], "is no folder")],
)
def test_wrong_use(folder, capsys, options, message):
    assert main(["serve", "--model", str(folder / "parrot"), *options]) == 2
    assert message in capsys.readouterr().err


def test_a_port_that_is_taken(folder, capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        assert main(["serve", "--model", str(folder / "fcn-0"), "--port", port]) == 2
    out, err = capsys.readouterr()
    assert port in err
    assert "Page" not in out


@pytest.mark.slow
def test_without_gradio_the_message_says_what_to_install(folder):
    program = (
        "import sys; sys.modules['gradio'] = None\n"
        "from parrot.cli import main\n"
        f"sys.exit(main(['serve', '--model', {str(folder / 'parrot')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'parrot-kernels[app]'" in done.stderr


@pytest.fixture
def browser():
    """A headless Chromium: the system's, or the one `playwright install chromium` put there."""
    api = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    with api.sync_playwright() as playwright:
        if path is None and not Path(playwright.chromium.executable_path).exists():
            pytest.skip("no Chromium: apt-get install chromium, or playwright install chromium")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.slow
def test_in_a_browser(folder, browser, tmp_path):
    """`parrot serve` in a process of its own; PARROT_SCREENSHOT names where a picture of the page goes."""
    model = os.environ.get("PARROT_SCREENSHOT_MODEL", str(folder / "parrot"))
    clips = Path(os.environ.get("PARROT_SCREENSHOT_CLIPS", folder / "clips"))
    clip = sorted(clips.rglob("*.wav"))[0]
    port = free_port()
    command = [sys.executable, "-m", "parrot", "serve", "--model", model, "--port", str(port), "--among", str(clips)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert f"http://127.0.0.1:{port}" in process.stdout.readline()
            wait_for(port)
            page = browser.new_page(viewport={"width": 1200, "height": 900})
            asked = []
            page.on("request", lambda request: asked.append(request.url))
            page.goto(f"http://127.0.0.1:{port}")
            page.locator("input[type=file]").first.set_input_files(clip)
            page.get_by_text(clip.name).or_(page.locator("audio, #waveform")).first.wait_for(state="attached")
            page.wait_for_timeout(1000)  # the upload itself
            page.get_by_role("button", name="Analyse").click()
            page.locator("#plan img").wait_for(timeout=60_000)
            page.locator("#waveform img").wait_for()
            text = page.locator("#probabilities").inner_text()
            (wanted,) = [next(Predictor.load(model).files(batch_of(model, clips, clip)))]
            assert all(label in text for label in wanted["probabilities"])
            assert text.strip().splitlines()[0] != ""
            assert f"{100 * max(wanted['probabilities'].values()):.0f}%" in text
            assert "depends on the" in page.locator("#remark").inner_text()
            outside = [url for url in asked if url.startswith("http") and f"//127.0.0.1:{port}/" not in url]
            assert not outside
            page.wait_for_timeout(500)
            page.screenshot(path=os.environ.get("PARROT_SCREENSHOT", tmp_path / "serve.png"))
        finally:
            process.terminate()


def batch_of(model, clips, clip):
    """The clip and those that `--among` puts beside it."""
    paths = sorted(clips.rglob("*.wav"))
    count = min(len(paths), Predictor.load(model).batch_size - 1)
    return [clip, *(paths[k * len(paths) // count] for k in range(count))]


def wait_for(port):
    for _ in range(300):
        with socket.socket() as one:
            if one.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    pytest.fail("the page did not open within 30 s")
