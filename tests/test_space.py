"""The page of `examples/space`: its functions without a browser, and in one (`make test-browser`)."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from PIL import Image


SPACE = ROOT / "examples" / "space"
sys.path.insert(0, str(SPACE))

import less_data  # noqa: E402
import make_assets  # noqa: E402
import pictures  # noqa: E402
import prompts  # noqa: E402
import smaller  # noqa: E402

from hf_effdl import ExamplePool  # noqa: E402


def scene(number: int = 0) -> Image.Image:
    return Image.open(prompts.queries()[number])


def painting(image: Image.Image, *boxes: tuple[int, int, int, int]) -> dict:
    """What an image editor gives, a layer with an opaque box each."""
    layers = []
    for box in boxes:
        layer = Image.new("RGBA", image.size)
        layer.paste((209, 73, 91, 255), box)
        layers.append(layer)
    return {"background": image, "layers": layers}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# ---- prompts


def test_candidates_by_the_nearest_vector_are_those_of_a_search_by_hand():
    answer = prompts.ask(scene(), "nearest")
    pool = ExamplePool(prompts.POOL)
    pixels = torch.tensor(np.asarray(scene().convert("RGB")) / 255, dtype=torch.float32).permute(2, 0, 1)[None]
    with torch.no_grad():
        query = torch.nn.functional.normalize(prompts.frozen().encoder(pixels)["vector"], dim=-1)
    scores = (query @ torch.nn.functional.normalize(pool.vectors.float(), dim=-1).T)[0]
    best = scores.argsort(descending=True)[: prompts.SHOWN].tolist()
    said = re.findall(r"<figcaption>scene (\d+), score ([\d.-]+)", answer.candidates)
    assert [int(id) for id, _ in said] == [int(pool.ids[row]) for row in best]
    assert [float(score) for _, score in said] == pytest.approx(scores[best].tolist(), abs=2e-3)
    assert f"Shown to the model: scene {said[0][0]}" in answer.story and answer.story.count("<figure>") == 3


def test_the_iou_is_said_of_scenes_whose_mask_is_known_and_of_no_other():
    images = [Image.open(file) for file in prompts.queries()]
    masks = [prompts.truth(image) for image in images]
    assert len(images) == 8 and all(mask.shape == (48, 48) and 0 < mask.mean() < 0.5 for mask in masks)
    assert "IoU" in prompts.ask(images[0]).text
    other = images[0].transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert prompts.truth(other) is None and "IoU" not in prompts.ask(other).text
    assert prompts.iou(np.array([[1, 1], [0, 0]]), np.array([[True, False], [True, False]])) == pytest.approx(1 / 3)


def test_any_image_is_answered_and_none_is_refused():
    answer = prompts.ask(Image.effect_noise((1500, 300), 80).convert("RGBA"))
    assert "Confidence" in answer.text
    with pytest.raises(ValueError, match="there is no image"):
        prompts.ask(None)


def test_a_mask_is_whatever_any_layer_covers():
    image, mask = prompts.mask_of(painting(scene(), (0, 0, 10, 5), (5, 0, 20, 5)))
    wanted = np.zeros((48, 48), bool)
    wanted[:5, :20] = True
    assert (np.asarray(mask) > 0).tolist() == wanted.tolist() and image.tobytes() == scene().convert("RGB").tobytes()


@pytest.mark.parametrize(
    "given, words",
    [
        (None, "no image to paint on"),
        ({"background": None, "layers": []}, "no image to paint on"),
        ({"background": Image.new("RGB", (9, 9)), "layers": []}, "nothing is painted"),
        (painting(Image.new("RGB", (9, 9)), (0, 0, 0, 0)), "nothing is painted"),
    ],
)
def test_a_painting_without_a_mask_is_refused(given, words):
    with pytest.raises(ValueError, match=words):
        prompts.add(given)


def test_an_example_joins_the_pool_of_one_visitor_alone(monkeypatch):
    before = contents(prompts.POOL)
    paint = painting(prompts.to_paint_on(scene(3)), (30, 30, 200, 200))
    one, other = prompts.add(paint), prompts.add(painting(scene(4), (0, 0, 9, 9)))
    try:
        assert prompts.add(painting(scene(5), (0, 0, 9, 9)), one) == one != other
        sizes = [len(ExamplePool(Path(folder))) for folder in (prompts.POOL, one, other)]
        assert sizes == [60, 62, 61] and contents(prompts.POOL) == before
        assert "Shown to the model: yours" in prompts.ask(scene(3), "nearest", one).story
        assert "yours" not in prompts.ask(scene(3), "nearest").candidates
        monkeypatch.setattr(prompts, "MOST", 2)
        with pytest.raises(ValueError, match="2 examples are all"):
            prompts.add(paint, one)
    finally:
        prompts.forget(one)
        prompts.forget(other)
    assert not Path(one).exists() and not Path(other).exists()
    prompts.forget("")


# ---- smaller


def test_a_budget_is_kept_and_the_numbers_are_those_of_the_net():
    dense, path = smaller.opened()
    small, kept = smaller.cut(0.25)
    said = smaller.smaller(25)
    rows = {name: cells for name, *cells in (line.strip("| ").split(" | ") for line in said.text.splitlines()[4:])}
    assert rows["parameters"] == [f"{sum(p.numel() for p in net.parameters()):,}" for net in (dense, small)]
    whole, cut = (int(text.replace(",", "")) for text in rows["MACs"])
    assert 0.2 < cut / whole <= 0.25
    assert rows["channels of the stages"][1] == ", ".join(str(size) for size in small.config.hidden_sizes)
    assert rows["accuracy, 360 test digits"] == [f"{smaller.accuracy(net):.3f}" for net in (dense, small)]
    assert min(float(text) for text in rows["accuracy, 360 test digits"]) > 0.95  # measured 0.992 and 0.994
    assert all(float(text) > 0 for text in rows["ms for 32 digits, measured here"]) and "<img" in said.picture


def test_training_and_test_digits_are_apart():
    (train, _), (test, labels) = smaller.digits()
    assert len(train) == 1437 and len(test) == len(labels) == 360
    assert not {row.numpy().tobytes() for row in train} & {row.numpy().tobytes() for row in test}


# ---- less data


def test_suspected_label_errors_come_first_and_what_is_said_of_them_is_true():
    selection, images, truth = less_data.scored()
    table, wrong = selection.table, selection.table["label"].numpy() != truth
    suspects = less_data.ordered(selection, "suspected label errors")
    likely = table["p_label"][suspects]
    assert (table["p_clean"][suspects] < 0.5).all() and (likely.diff() >= 0).all()
    assert len(suspects) == (table["p_clean"] < 0.5).sum()
    said = less_data.look("suspected label errors", 20)
    assert f"{wrong.mean():.0%} have a wrong label" in said.text and 0.15 < wrong.mean() < 0.25
    assert f"Of the 24 rows below, {wrong[suspects[:24]].sum()} are" in said.text
    assert wrong[suspects[:24]].mean() > 2 * wrong.mean()
    captions = re.findall("<figcaption>(.*?)</figcaption>", said.rows)
    assert len(captions) == 24 and sum(", is right" not in text for text in captions) == wrong[suspects[:24]].sum()


def test_rows_are_ordered_by_uncertainty_and_a_budget_is_kept():
    selection = less_data.scored().selection
    for order, sign in (("least certain", -1), ("most certain", 1)):
        places = less_data.ordered(selection, order)
        assert sorted(places) == list(range(500)) and (sign * selection.table["u_x"][places].diff() >= 0).all()
    assert "of the 50 chosen ones" in less_data.look("most certain", 10).text


# ---- pictures and files


def test_what_is_marked_is_red_and_what_is_not_is_grey():
    image = Image.new("RGB", (4, 2), (10, 200, 30))
    result = np.asarray(pictures.painted(image, [[1, 0, 0, 0], [0, 0, 0, 0]], 8)).astype(int)
    assert result.shape == (4, 8, 3)
    assert (result[:2, :2, 0] > result[:2, :2, 1] - 60).all() and np.ptp(result[2:], axis=2).max() == 0


def test_captions_are_text_and_every_picture_says_what_it_shows():
    page = pictures.tiles([(Image.new("RGB", (2, 2)), '<b>"7" & 9')] * 2)
    assert page.count('alt="&lt;b&gt;&quot;7&quot; &amp; 9"') == 2 and "<b>" not in page


def test_the_space_says_what_it_needs():
    text = (SPACE / "README.md").read_text(encoding="utf-8")
    facts = yaml.safe_load(text.split("---")[1])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert facts["sdk"] == "gradio" and facts["sdk_version"] == pins["gradio"]
    assert (SPACE / facts["app_file"]).is_file() and facts["license"] == project["license"].lower()
    address = project["urls"]["Repository"]
    assert f"hf_effdl[examples] @ git+{address}" in (SPACE / "requirements.txt").read_text().splitlines()
    assert address in (SPACE / "app.py").read_text()
    assert sum(len(data) for data in contents(SPACE / "assets").values()) < 2e6


@pytest.mark.slow
def test_the_folder_to_push_needs_nothing_beside_it(tmp_path):
    make_assets.main(["--keep", "--out", str(tmp_path / "space")])
    code = "import prompts, smaller; prompts.ask(prompts.Image.open(prompts.queries()[0])); print(prompts.PLACES[0])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "space", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.split()[-1]).is_relative_to(tmp_path)
    assert not (tmp_path / "space" / "make_assets.py").exists() and (tmp_path / "space" / "README.md").is_file()


# ---- in a browser


def browser_at_hand() -> str:
    pytest.importorskip("gradio", reason="the page needs gradio: make test-browser")
    pytest.importorskip("playwright", reason="the browser is driven by playwright: make test-browser")
    found = shutil.which("chromium") or shutil.which("google-chrome")
    return found or pytest.skip("no chromium on this machine: make test-browser")


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The page, served by a process of its own until the last test."""
    browser_at_hand()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("space")
    env = os.environ | {"GRADIO_SERVER_PORT": str(port), "PYTHONPATH": str(ROOT), "TMPDIR": str(folder)}
    with open(folder / "log.txt", "w") as log:
        server = subprocess.Popen([sys.executable, SPACE / "app.py"], env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        start = time.monotonic()
        while "Running on local URL" not in (folder / "log.txt").read_text():
            assert server.poll() is None and time.monotonic() - start < 180, (folder / "log.txt").read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def chromium():
    path = browser_at_hand()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        # root, as in containers, has no sandbox
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(address, chromium):
    """`visit(width)` opens the page; at the end nothing may have gone wrong in it, or been asked of others."""
    contexts, troubles = [], []

    def watch(page):
        page.on("console", lambda said: troubles.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        own = (address, "data:", "blob:")
        page.on("request", lambda asked: None if asked.url.startswith(own) else troubles.append(asked.url))

    def opened(width: int = 1200):
        context = chromium.new_context(viewport={"width": width, "height": 844})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        watch(page)
        page.goto(address)
        page.locator("#answer").get_by_text("Confidence").wait_for()
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not troubles


def keep_screenshot(page, name: str) -> None:
    """Into the folder of `EFFDL_SCREENSHOTS`, to be looked at."""
    if folder := os.environ.get("EFFDL_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def fits(page) -> bool:
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def changed(page, id: str, act) -> None:
    """Does something, and waits until a part of the page shows something else."""
    before = page.locator(f"#{id}").inner_html()
    act()
    arg = [id, before]
    page.wait_for_function("([id, before]) => document.getElementById(id).innerHTML !== before", arg=arg)


@pytest.mark.browser
@pytest.mark.slow
def test_click_a_scene_and_drop_an_image(visit, tmp_path):
    page = visit()
    assert page.locator("#candidates figure").count() == prompts.SHOWN and page.locator("#story figure").count() == 3
    keep_screenshot(page, "prompts")
    changed(page, "story", page.locator("#scenes button").nth(2).click)
    assert "IoU" in page.locator("#answer").inner_text()
    file = tmp_path / "own.png"
    scene(5).transpose(Image.Transpose.FLIP_LEFT_RIGHT).resize((300, 300)).save(file)
    page.locator("#image").get_by_label("Remove").or_(page.locator("#image button[title=Clear]")).first.click()
    page.get_by_text("Click a scene, or drop an image.", exact=True).wait_for()
    page.locator("#image input[type=file]").set_input_files(file)
    page.locator("#answer").get_by_text("Confidence").wait_for()
    assert "IoU" not in page.locator("#answer").inner_text()


@pytest.mark.browser
@pytest.mark.slow
def test_paint_a_mask_that_no_other_visitor_sees(visit):
    page, other = visit(), visit()
    page.get_by_text("Add an example of your own").click()
    page.locator("#paint canvas").first.wait_for()
    page.locator("#add").click()
    page.get_by_text("nothing is painted").first.wait_for()
    canvas = page.locator("#paint canvas").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 40, y - 60)
    page.mouse.down()
    page.mouse.move(x + 40, y + 40, steps=12)
    page.mouse.up()
    keep_screenshot(page, "paint")
    page.locator("#add").click()
    page.locator("#answer").get_by_text("among 61 scenes").wait_for()
    assert "yours" in page.locator("#candidates").inner_text()
    other.get_by_label("nearest").click()
    other.locator("#answer").get_by_text("among 60 scenes, the most similar").wait_for()


@pytest.mark.browser
@pytest.mark.slow
def test_slide_a_budget_by_the_keyboard_and_look_at_rows(visit):
    page = visit()
    page.get_by_role("tab", name="Smaller").click()
    page.locator("#sizes").get_by_text("25% of the MACs").wait_for()
    keep_screenshot(page, "smaller")
    page.locator("#budget input[type=range]").focus()
    changed(page, "path", lambda: page.keyboard.press("ArrowRight"))
    page.locator("#sizes").get_by_text("30% of the MACs").wait_for()
    page.get_by_role("tab", name="Less data").click()
    page.locator("#rows figure").first.wait_for()
    assert page.locator("#rows figure").count() == 24
    keep_screenshot(page, "less_data")
    changed(page, "rows", page.get_by_label("least certain").click)


@pytest.mark.browser
@pytest.mark.slow
def test_the_keyboard_reaches_everything_and_pictures_have_texts(visit):
    page = visit()
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate(
                "(e => e.getAttribute('aria-label') || e.innerText.trim().split('\\n')[0] || e.type || e.tagName)"
                "(document.activeElement)"
            )
        )
    assert {"Prompts", "the repository", "Add an example of your own"} <= reached, reached
    assert "radio" in reached, reached
    page.get_by_role("tab", name="Prompts").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.get_by_role("tab", name="Smaller").get_attribute("aria-selected") == "true"
    shown = "#story img, #candidates img, #path img, #rows img"
    assert all(text for text in page.locator(shown).evaluate_all("all => all.map(i => i.alt)"))


@pytest.mark.browser
@pytest.mark.slow
def test_a_phone_shows_every_tab_without_scrolling_sideways(visit):
    page = visit(390)
    for name, part in (("Prompts", "#story img"), ("Smaller", "#path img"), ("Less data", "#rows img")):
        page.get_by_role("tab", name=name).click()
        page.locator(part).first.wait_for()
        assert fits(page), name
        keep_screenshot(page, f"phone_{name.split()[0].lower()}")
