"""The page of ``parrot serve``: a recording in, class probabilities, waveform and transport plan out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from parrot.corpora.audio import AudioError, load_waveform
from parrot.prediction import Clip, Predictor

# Gradio reads these when it is imported; it would report its use and look for updates.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gradio as gr

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "PARROT: speech emotion"
SHOWN_RATE = 16000  # Hz, of the waveform that is drawn
ALONE = (
    "As in the paper, transport joins the clips of a batch. One clip alone is a batch of one, where there is nothing "
    "to transport: start the page with `--among FOLDER` to answer it among other recordings."
)
AMONG = "As in the paper, the answer depends on the {count} recordings that the clip, number 0, shares its batch with."
REFERENCES = (
    "The clip, number 0, is transported among {count} stored training clips; the answer depends on nothing else."
)
FRAMES = "Transport is between the frames of the clip; the answer depends on nothing else."
NOTHING = "This model solves no transport problem."


def page(predictor: Predictor, among: Sequence[Clip] = ()) -> gr.Blocks:
    """The page as a Gradio app, not yet launched.

    Args:
        predictor: what answers.
        among: for a model whose predictions depend on the batch, the other clips of every batch.
    """
    description = predictor.model.description
    names = [encoder.name for encoder in predictor.encoders]
    among = list(among) if predictor.batch_dependent else []

    def analyse(path: str | None) -> tuple[dict[str, float], Any, Any, str]:
        if path is None:
            raise gr.Error("Record or upload a clip first.")
        try:
            clips = [predictor.embed_file(path), *among]
            waveform = load_waveform(path, SHOWN_RATE)
        except AudioError as error:
            raise gr.Error(f"The recording can't be used: {error.reason}.") from None
        except ValueError as error:
            raise gr.Error(str(error)) from None
        shares = predictor.answer(predictor.probabilities(clips)[0])["probabilities"]
        plan = predictor.plan(clips)
        picture = plan_picture(plan, names) if plan is not None and plan.size > 1 else None
        return shares, waveform_picture(waveform, SHOWN_RATE), gr.Plot(picture, visible=picture is not None), note(plan)

    def note(plan: np.ndarray | None) -> str:
        if plan is None:
            return NOTHING
        if predictor.batch_dependent:
            return AMONG.format(count=len(among)) if among else ALONE
        if predictor.inputs == "frames":
            return FRAMES
        return REFERENCES.format(count=len(plan) - 1)

    with gr.Blocks(title=TITLE, analytics_enabled=False) as blocks:
        gr.Markdown(f"# {TITLE}\n`{description.get('system', 'model')}` over {' and '.join(names)}, trained on "
                    f"{description.get('corpus', 'unknown data')}.")  # fmt: skip
        with gr.Row():
            with gr.Column():
                audio = gr.Audio(
                    sources=["upload", "microphone"], type="filepath", label="Recording", buttons=["download"]
                )
                button = gr.Button("Analyse", variant="primary", elem_id="analyse")
                waveform = gr.Plot(label="Waveform", show_label=False, elem_id="waveform")
            with gr.Column():
                shares = gr.Label(label="Class probabilities", elem_id="probabilities")
                plan = gr.Plot(label="Transport plan", show_label=False, elem_id="plan")
                remark = gr.Markdown(elem_id="remark")
        button.click(analyse, audio, [shares, waveform, plan, remark], api_name="analyse")
    return blocks


def launch(blocks: gr.Blocks, port: int) -> str:
    """Serve the page on this machine alone, from a thread; returns its address.

    Raises:
        OSError: the port is taken.
    """
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # none from a font server
    _, address, _ = blocks.launch(
        server_name="127.0.0.1", server_port=port, share=False, inbrowser=False, quiet=True, theme=theme,
        prevent_thread_lock=True,
    )  # fmt: skip
    return address


def waveform_picture(waveform: np.ndarray, rate: int) -> Figure:
    """Extremes over time: at most 1000 columns, so that a long recording costs no more to draw."""
    figure, axes = _figure(6.4, 2.2)
    columns = np.array_split(waveform, min(1000, len(waveform)))
    time = np.arange(len(columns)) * len(waveform) / rate / len(columns)
    axes.fill_between(time, [c.min() for c in columns], [c.max() for c in columns], color="#35618f", step="post")
    axes.set(title="Waveform", xlabel="seconds", xlim=(0, len(waveform) / rate))
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def plan_picture(plan: np.ndarray, names: Sequence[str]) -> Figure:
    """A heat map of the plan between the points of two encoders; 1 is the plan that tells nothing apart."""
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    figure, axes = _figure(5.4, 4.4)
    mass = plan * plan.size / max(plan.sum(), np.finfo(np.float64).tiny)
    top = max(1.05, float(mass.max()))
    image = axes.imshow(mass, cmap="PuOr_r", norm=LogNorm(1 / top, top, clip=True), aspect="auto")
    axes.set(title="Transport plan", xlabel=f"as {names[1]} hears them", ylabel=f"as {names[0]} hears them")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    bar = figure.colorbar(image, ax=axes, label="mass, 1 where nothing is told apart")
    ticks = [top**power for power in (-1, -0.5, 0, 0.5, 1)]
    bar.set_ticks(ticks, labels=[f"{tick:.2f}" for tick in ticks])
    bar.minorticks_off()
    return figure


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()
