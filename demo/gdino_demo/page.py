"""The page as a whole: its tabs, its server and its theme."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import gradio as gr
from starlette.middleware import Middleware

from gdino_hf import Detector
from gdino_hf.segmentation import Segmenter

from . import batch_tab, caption_tab, compare_tab, detect_tab, tools, video_tab
from .components import PageState
from .connection_limits import ConnectionWatcher
from .engine import Models
from .gradio_internals import PlainErrorBlocks, files_of_page, offer_tools_only
from .queries import PHRASES, WHOLE
from .request_limits import RequestLimits, Sweeper
from .safety import KEPT_SECONDS, LARGEST_REQUEST

TITLE = "gdino: name it, find it"
_STYLE = Path(__file__).with_name("style.css")
_EXAMPLES = (("cat.jpg", "cat"), ("person.jpg", "person, helmet"), ("cup.jpg", "cup, spoon"))
_CAPTIONS = (("cup.jpg", "a cup of coffee with a spoon"), ("person.jpg", "a man in front of a wall"))
# Requests beyond this queue length are rejected with a message.
_LONGEST_QUEUE = 100
# gradio stores the field values of this many visitors; beyond it, the oldest are removed.
_MOST_SESSIONS = 200
_INTRO = f"""# {TITLE}
Name what you are looking for in plain words and get boxes around it. Everything runs on this server, and pictures are
deleted {KEPT_SECONDS // 60} minutes after their last use."""
# gdino-nano gives lower scores than the published models, as its model card says.
_NANO_THRESHOLD, _THRESHOLD, _NMS = 0.2, 0.3, 0.5


# Pages of this process that are open. gradio has one folder for the files of all pages of a process, so they share it.
_open: list[Page] = []


class Page:
    """The web page for some models, and a folder for its files, which it shares with other open pages of the process.

    Args:
        detectors: Model name -> Detector; the first is the default of the page.
        segmenters: Name -> Segmenter, which visitors can choose to make masks; without any, the page has no such menu.
        files_kept: Seconds after its last use for which a file is kept.
        mcp: Whether to offer tools to agents by the Model Context Protocol too; `tools.available` says whether the
            package for it is installed.
    """

    def __init__(
        self,
        detectors: Mapping[str, Detector],
        segmenters: Mapping[str, Segmenter] | None = None,
        files_kept: float = KEPT_SECONDS,
        *,
        mcp: bool = False,
    ) -> None:
        self.folder: Path = _open[0].folder if _open else _make_folder()
        # gradio reads this variable each time a component is created or a file is uploaded.
        os.environ["GRADIO_TEMP_DIR"] = str(self.folder)
        self.models = Models(detectors, segmenters)
        self.mcp = mcp
        is_nano = self.models.names[0] == "nano"
        self.state = PageState(
            self.models,
            _NANO_THRESHOLD if is_nano else _THRESHOLD,
            _NMS,
            # gdino-nano was trained on names, and scores a phrase within a sentence far below any threshold.
            PHRASES if is_nano else WHOLE,
            examples=_find_examples(_EXAMPLES),
            caption_examples=_find_examples(_CAPTIONS),
        )
        self.blocks = self._lay_out()
        self.sweeper = Sweeper(self.folder, _files_of_open_pages, files_kept, also=self.state.kept.sweep)
        self.watcher = ConnectionWatcher(self.blocks)
        _open.append(self)

    def _lay_out(self) -> gr.Blocks:
        with PlainErrorBlocks(title=TITLE, analytics_enabled=False, delete_cache=None) as blocks:
            gr.Markdown(_INTRO)
            with gr.Tab("Detect"):
                detect_tab.build(self.state)
            with gr.Tab("Caption"):
                caption_tab.build(self.state)
            with gr.Tab("Batch"):
                batch_tab.build(self.state)
            with gr.Tab("Video"):
                video_tab.build(self.state)
            with gr.Tab("Compare"):
                compare_tab.build(self.state)
            if self.mcp:
                tools.build(self.state)
        blocks.queue(max_size=_LONGEST_QUEUE, default_concurrency_limit=4)
        return blocks

    def launch(self, *, port: int | None = None, share: bool = False, wait: bool = True, quiet: bool = False) -> str:
        """Serve the page.

        Args:
            port: Port to serve on; None takes GRADIO_SERVER_PORT, otherwise the first free port from 7860 on.
            share: Whether to serve through a public address of gradio's too.
            wait: Whether to return only when the server is stopped.
            quiet: Whether to print no address.

        Returns:
            Address of the page on this machine.

        Raises:
            OSError: The port is taken.
        """
        if wait:
            # Hosts stop a server with SIGTERM; turned into KeyboardInterrupt, it lets `close` remove the files.
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        self.sweeper.start()
        self.watcher.start()
        if self.mcp:
            offer_tools_only()
        _, address, _ = self.blocks.launch(
            server_port=port,
            share=share,
            prevent_thread_lock=not wait,
            quiet=quiet,
            max_file_size=LARGEST_REQUEST,
            app_kwargs={"middleware": [Middleware(RequestLimits)]},
            state_session_capacity=_MOST_SESSIONS,
            enable_monitoring=False,
            run_history=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=self.mcp,
            footer_links=["api", "settings"],
            theme=_theme(),
            css_paths=[_STYLE],
        )
        return address

    def close(self) -> None:
        """Stop the server, and remove the folder of files if no other page uses it."""
        self.sweeper.stop()
        self.watcher.stop()
        self.blocks.close(verbose=False)
        if self in _open:
            _open.remove(self)
        if not _open:
            shutil.rmtree(self.folder, ignore_errors=True)


def _make_folder() -> Path:
    """Return a new folder for uploads and results, which is removed at the latest when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="gdino-demo-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _files_of_open_pages() -> set[str]:
    """Return the files that belong to an open page itself."""
    return set().union(*(files_of_page(page.blocks) for page in _open))


def _theme() -> gr.themes.Base:
    """Return a theme without fonts from other servers, in which every text has a contrast of at least 4.5:1."""
    soft = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return soft.set(
        background_fill_primary="*neutral_50",  # as in Soft; without it, set() would reset it to white
        body_text_color_subdued="*neutral_600",
        block_label_text_color="*primary_700",
        block_title_text_color="*primary_700",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_hover_dark="*primary_700",
        link_text_color_dark="*primary_300",
        link_text_color_active_dark="*primary_300",
        link_text_color_hover_dark="*primary_200",
        link_text_color_visited_dark="*primary_300",
        checkbox_label_background_fill_selected="*primary_600",
        color_accent="*primary_600",
    )


def _find_examples(examples: Sequence[tuple[str, str]]) -> list[list[str]]:
    """Return the example pictures that are present beside the package, with their labels or captions."""
    folder = Path(__file__).resolve().parents[1] / "examples"
    return [[str(folder / name), text] for name, text in examples if (folder / name).is_file()]
