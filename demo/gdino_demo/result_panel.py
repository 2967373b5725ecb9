"""The column with results of one picture: boxes, presence, thresholds that filter stored outputs, and downloads."""

from __future__ import annotations

from typing import Any

import gradio as gr

from . import components, formats, render
from .components import PageState
from .outputs import Outputs, Settings
from .request_limits import CheckedSlider
from .safety import Picture, Refused, read_picture


class ResultPanel:
    """The components that show the results of one picture, and what keeps them up to date.

    Args:
        state: The state of the page.
        prefix: Beginning of the element ids.
        empty: Text to show before the first result.
        named: What the switches choose, "Labels" or "Phrases".

    Attributes:
        status: The status line, on which progress is shown.
        outputs: The components that `show` gives values for.
        thresholds: The sliders of the score, overlap and word thresholds.
        key: State with the key of the stored outputs.
    """

    def __init__(self, state: PageState, prefix: str, empty: str, named: str) -> None:
        self._state = state
        self.key = gr.State(None)
        self.status = components.html_field(f"{prefix}-status", f'<div class="gd-status"><p>{empty}</p></div>')
        figure = components.figure_field(f"{prefix}-figure", "Boxes")
        presence = components.html_field(f"{prefix}-presence")
        shown = gr.CheckboxGroup([], value=[], label=f"{named} shown", visible=False, elem_id=f"{prefix}-shown")
        score = components.threshold_field(state.threshold)
        score.elem_id = f"{prefix}-threshold"
        with gr.Accordion("Every box, overlap, word threshold", open=False, elem_id=f"{prefix}-details"):
            table = components.html_field(f"{prefix}-table")
            nms = components.nms_field(state)
            info = "Show only labels whose best word has at least this score."
            word = CheckedSlider(0, 1, value=0.0, step=0.01, label="Word threshold", info=info)
        self.thresholds = [score, nms, word]
        settings = [self.key, *self.thresholds, shown]
        with gr.Row(elem_classes="gd-downloads"):
            components.download_button("Download picture", self._picture, settings, f"{prefix}-png")
            components.download_button("Download JSON", self._json, settings, f"{prefix}-json")
            format_name = components.format_field(f"{prefix}-format")
            components.download_button("Download format", self._format, [format_name, *settings], f"{prefix}-download")
        views = [self.status, figure, presence, table]
        self.outputs = [self.key, *views, shown]
        gr.on(
            [*(slider.change for slider in self.thresholds), shown.input],
            self._refresh,
            settings,
            views,
            api_visibility="private",
            **components.FILTERS,
        )

    def show(
        self, outputs: Outputs, picture: Picture, key: str | None, score: float, nms: float, word: float
    ) -> tuple[Any, ...]:
        """Store new outputs, and return the values of `self.outputs`.

        Args:
            outputs: The model's outputs.
            picture: The picture they are of.
            key: Key of the outputs that were shown before.
            score: Score threshold.
            nms: Overlap limit.
            word: Word threshold.
        """
        text, boxes, presence, table = render.result(outputs, components.read_settings(score, nms, word))
        names = list(outputs.labels)
        return (
            self._state.kept.put(outputs, replaces=key),
            text,
            gr.HTML(value=boxes, **render.photograph(picture.image, f"The picture {outputs.name}")),
            presence,
            table,
            gr.CheckboxGroup(choices=names, value=names, visible=len(names) > 1),
        )

    def _refresh(self, key: str | None, score: float, nms: float, word: float, shown: list[str]) -> tuple[Any, ...]:
        outputs = self._state.kept.get(key)
        if outputs is None:
            return (components.GONE if key else gr.skip(), gr.skip(), gr.skip(), gr.skip())
        return render.result(outputs, _settings(outputs, score, nms, word, shown))

    def _kept(self, key: str | None, *values: Any) -> tuple[Outputs, Settings]:
        outputs = self._state.kept.get(key)
        if outputs is None:
            raise Refused("There is nothing to download, or the results have expired; press the button again.")
        return outputs, _settings(outputs, *values)

    def _picture(self, key: str | None, score: float, nms: float, word: float, shown: list[str]) -> str:
        outputs, settings = self._kept(key, score, nms, word, shown)
        image = read_picture(outputs.data, outputs.name).image
        return components.write_file("detections.png", formats.png(image, outputs.detections(settings)))

    def _json(self, key: str | None, score: float, nms: float, word: float, shown: list[str]) -> str:
        outputs, settings = self._kept(key, score, nms, word, shown)
        report = render.report(outputs, outputs.detections(settings), settings)
        return components.write_file("detections.json", render.to_text(report))

    def _format(
        self, format_name: str, key: str | None, score: float, nms: float, word: float, shown: list[str]
    ) -> str:
        outputs, settings = self._kept(key, score, nms, word, shown)
        return components.write_file(*formats.format_file(format_name, [outputs.detections(settings)]))


def _settings(outputs: Outputs, score: float, nms: float, word: float, shown: list[str]) -> Settings:
    """Return the settings of sliders and switches; labels that are not shown are hidden."""
    return components.read_settings(score, nms, word, frozenset(outputs.labels) - set(shown))
