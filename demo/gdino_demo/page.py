"""The whole page: its tabs, its server, its limits."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from . import batch_tab, compare_tab, detect_tab, video_tab
from .engine import Models
from .guard import Border, GuardedBlocks, Sweeper
from .parts import Desk
from .safety import KEPT_SECONDS, LARGEST_REQUEST

TITLE = "gdino: name it, find it"
_STYLE = Path(__file__).with_name("style.css")
_EXAMPLES = (("cat.jpg", "cat"), ("person.jpg", "person, helmet"), ("cup.jpg", "cup, spoon"))
# A request that finds this many before it is told so and may try again.
_LONGEST_QUEUE = 100
# A visitor's session is gradio's copy of the fields; the oldest goes when there are more.
_MOST_SESSIONS = 200
_INTRO = f"""# {TITLE}
Name what you look for in plain words and get boxes. Everything runs on this server; pictures are removed
{KEPT_SECONDS // 60} minutes after they were last used."""
# gdino-nano scores lower than the published models, as its card says.
_NANO_THRESHOLD, _THRESHOLD, _NMS = 0.2, 0.3, 0.5


class Page:
    """The page of some models, with a folder of its own for files.

    Args:
        loaded: For each name a GDinoForObjectDetection and its GDinoProcessor; the first is the default.
        files_kept: Seconds after which an unused file is removed.
    """

    def __init__(self, loaded: Mapping[str, tuple[Any, Any]], files_kept: float = KEPT_SECONDS) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="gdino-demo-"))
        atexit.register(shutil.rmtree, self.folder, ignore_errors=True)
        # gradio reads it for every component and every upload.
        os.environ["GRADIO_TEMP_DIR"] = str(self.folder)
        self.models = Models(loaded)
        threshold = _NANO_THRESHOLD if self.models.names[0] == "nano" else _THRESHOLD
        self.desk = Desk(self.models, threshold, _NMS, examples=_find_examples())
        self.blocks = self._lay_out()
        self.sweeper = Sweeper(self.folder, self.blocks, files_kept, also=self.desk.kept.sweep)

    def _lay_out(self) -> gr.Blocks:
        with GuardedBlocks(title=TITLE, analytics_enabled=False, delete_cache=None) as blocks:
            gr.Markdown(_INTRO)
            with gr.Tab("Detect"):
                detect_tab.build(self.desk)
            with gr.Tab("Batch"):
                batch_tab.build(self.desk)
            with gr.Tab("Video"):
                video_tab.build(self.desk)
            with gr.Tab("Compare"):
                compare_tab.build(self.desk)
        blocks.queue(max_size=_LONGEST_QUEUE, default_concurrency_limit=4)
        return blocks

    def launch(self, *, port: int | None = None, share: bool = False, wait: bool = True, quiet: bool = False) -> str:
        """Serve the page.

        Args:
            port: None takes the first free one from 7860 on, or GRADIO_SERVER_PORT.
            share: Also through a public address of gradio's.
            wait: Do not return before the server was stopped.
            quiet: Print no address.

        Returns:
            The page's address on this machine.

        Raises:
            OSError: The port is taken.
        """
        if wait:
            # A host that ends the server asks for it in this way; files are removed then too.
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        self.sweeper.start()
        _, address, _ = self.blocks.launch(
            server_port=port,
            share=share,
            prevent_thread_lock=not wait,
            quiet=quiet,
            max_file_size=LARGEST_REQUEST,
            app_kwargs={"middleware": [Middleware(Border)]},
            state_session_capacity=_MOST_SESSIONS,
            enable_monitoring=False,
            run_history=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            footer_links=["api", "settings"],
            theme=_theme(),
            css_paths=[_STYLE],
        )
        return address

    def close(self) -> None:
        """Stop the server and remove its files."""
        self.sweeper.stop()
        self.blocks.close(verbose=False)
        shutil.rmtree(self.folder, ignore_errors=True)


def _theme() -> gr.themes.Base:
    """Fonts of the visitor's system, so that nothing is asked of other servers, and every text at 4.5:1 or more."""
    soft = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return soft.set(
        background_fill_primary="*neutral_50",  # as in Soft; gradio's set would make it white
        body_text_color_subdued="*neutral_600",
        block_label_text_color="*primary_700",
        block_title_text_color="*primary_700",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        checkbox_label_background_fill_selected="*primary_600",
        color_accent="*primary_600",
    )


def _find_examples() -> list[list[str]]:
    """The photographs beside the package, where they were not left out."""
    folder = Path(__file__).resolve().parents[1] / "examples"
    return [[str(folder / name), labels] for name, labels in _EXAMPLES if (folder / name).is_file()]
