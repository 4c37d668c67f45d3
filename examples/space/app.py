# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf_effdl[examples,space]",
#     "datasets>=5.1",
#     "gradio>=6",
#     "pillow>=11",
#     "scikit-learn>=1.6",
#     "torch>=2.10",
#     "transformers>=5.23,<6",
# ]
#
# [tool.uv.sources]
# hf_effdl = { path = "../.." }
# ///

"""Three tabs, one a pillar, on tiny models of digits that travel with the page: CPU only, nothing downloaded.

    python examples/space/app.py     # then open the address that it prints

This file lays out; what the tabs do stands in `prompts.py`, `smaller.py` and `less_data.py`, which know nothing of
Gradio. `make_assets.py` made the models, and makes a folder to push as a Space.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import datasets
import gradio as gr
import less_data
import prompts
import smaller
import torch
import transformers
from pictures import STYLE


TITLE = "hf_effdl: smaller models, less data, better prompts"
HEAD = f"""# {TITLE}
Three tools for the Hugging Face stack, here on tiny models of handwritten digits. Everything below is computed as you
ask, on a CPU. Code, documentation and what was measured: [the repository](https://github.com/hf-effdl/hf_effdl).
"""
PROMPTS = """A frozen model segments a scene as **one labelled example** shows it: which example should it be shown?
Click a scene, or drop an image of your own. The tiny SegGPT behind this page has seen scenes of digits only."""
SMALLER = """One training run with split LBI says in which order the data ask for the channels. **Choose how much of
the net to keep**: units in red stay, the others are taken out for good, and the rest is an ordinary smaller ResNet."""
LESS_DATA = """A fifth of the labels below were made wrong on purpose. Eight cheap probes, trained on other rows with
as many wrong labels, say how unsure they are of each row, and **which labels look wrong**."""
EMPTY = ("Click a scene, or drop an image.", "", "")
HOUR = 3600


def told(function: Callable) -> Callable:
    """What a function refuses is told on the page, which stays as it is."""

    @wraps(function)
    def wrapped(*values: Any) -> Any:
        try:
            return function(*values)
        except ValueError as error:
            gr.Warning(str(error))
            return gr.skip()

    return wrapped


def ask(image: Any, strategy: str, own: str) -> tuple:
    return EMPTY if image is None else tuple(prompts.ask(image, strategy, own))


@told
def add(painting: Any, image: Any, strategy: str, own: str) -> tuple:
    own = prompts.add(painting, own)
    return own, *ask(image, strategy, own)


def canvas(image: Any) -> Any:
    """What to paint on: the image, large enough for a brush."""
    return None if image is None else prompts.to_paint_on(image)


def prompts_tab(page: gr.Blocks) -> None:
    own = gr.State("", time_to_live=HOUR, delete_callback=prompts.forget)
    gr.Markdown(PROMPTS)
    scenes = prompts.queries()
    with gr.Row():
        with gr.Column(min_width=280):
            image = gr.Image(scenes[0], type="pil", format="png", label="Your image", height=300, elem_id="image")
            gr.Examples(scenes, image, label="Scenes of unseen digits", elem_id="scenes")
            strategy = gr.Radio(list(prompts.STRATEGIES), value="dense", label="How the example is chosen")
        with gr.Column(min_width=280, scale=2):
            text = gr.Markdown(elem_id="answer")
            story = gr.HTML(padding=False, elem_id="story")
            gr.Markdown("**Candidates of the pool**, their masks in red, best first:")
            candidates = gr.HTML(padding=False, elem_id="candidates")
    with gr.Accordion("Add an example of your own", open=False):
        gr.Markdown("Paint over the object, then add it: it joins the pool of this visit only, and is gone after it.")
        brush = gr.Brush(default_size=24, colors=["#d1495b"], default_color="#d1495b", color_mode="fixed")
        painting = gr.ImageEditor(
            type="pil", format="png", brush=brush, layers=False, transforms=(), label="Paint the mask", elem_id="paint"
        )
        button = gr.Button("Add to the pool", variant="primary", elem_id="add")
    inputs, outputs = [image, strategy, own], [text, story, candidates]
    gr.on([page.load, image.change, strategy.change], told(ask), inputs, outputs, trigger_mode="always_last")
    gr.on([page.load, image.change], canvas, image, painting)
    button.click(add, [painting, *inputs], [own, *outputs])


def smaller_tab(page: gr.Blocks) -> None:
    gr.Markdown(SMALLER)
    budget = gr.Slider(10, 100, 25, step=5, label="Share of the multiply-accumulates to keep, %", elem_id="budget")
    text = gr.Markdown(elem_id="sizes")
    path = gr.HTML(padding=False, elem_id="path")
    gr.on([page.load, budget.change], told(smaller.smaller), budget, [text, path], trigger_mode="always_last")


def less_data_tab(page: gr.Blocks) -> None:
    gr.Markdown(LESS_DATA)
    with gr.Row():
        order = gr.Radio(list(less_data.ORDERS), value=less_data.ORDERS[0], label="First show", min_width=280)
        budget = gr.Slider(5, 50, 20, step=5, label="Share of the rows to choose, %", min_width=280)
    text = gr.Markdown(elem_id="counts")
    rows = gr.HTML(padding=False, elem_id="rows")
    picture = gr.HTML(padding=False, elem_id="spread")
    events = [page.load, order.change, budget.change]
    gr.on(events, told(less_data.look), [order, budget], [text, rows, picture], trigger_mode="always_last")


def build_page() -> gr.Blocks:
    """The page; tabs are filled when it is opened."""
    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        gr.Markdown(HEAD)
        with gr.Tab("Prompts"):
            prompts_tab(page)
        with gr.Tab("Smaller"):
            smaller_tab(page)
        with gr.Tab("Less data"):
            less_data_tab(page)
    return page


def main() -> None:
    torch.set_num_threads(1)  # in nets this small, threads wait for each other for longer than they work
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    build_page().launch(css=STYLE, footer_links=["gradio"], max_file_size="5mb", ssr_mode=False)


if __name__ == "__main__":
    main()
