"""Every use of gradio's undocumented internals, collected in one file.

Tried with gradio 6.31. Each part below says what happens when a later release changes it: the page starts and its API
works all the same, and this file is the only one to mend. The rest of the page uses gradio's documented components,
events and launch options.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from .safety import Refused

logger = logging.getLogger(__name__)

NOT_UPLOADED = "This file was not uploaded to this page; upload it."

try:
    # Raised for a path outside the folders that gradio may read. Without it, such a path gets the sentence for any
    # other failure; it is refused all the same.
    from gradio.exceptions import InvalidPathError
except ImportError:

    class InvalidPathError(Exception):  # type: ignore[no-redef]
        """Stand-in for gradio's exception where gradio lacks it; never raised."""


def write_no_stubs() -> None:
    """Stop gradio from writing a .pyi file beside every module that defines a component.

    Relies on `gradio.component_meta.create_or_modify_pyi`. If it is renamed, the files appear, which harms nothing.
    """
    with contextlib.suppress(ImportError):
        from gradio import component_meta

        component_meta.create_or_modify_pyi = lambda *_: None


# Must run before the first subclass of a component is defined, below.
write_no_stubs()


def upload_folder() -> Path:
    """Return the folder in which gradio stores uploads and files to download.

    Follows the rule of `gradio.utils.get_upload_folder`: the environment variable GRADIO_TEMP_DIR, which the page sets,
    or a folder of the system's temporary files. If gradio stores uploads elsewhere, they are refused as not uploaded.
    """
    return Path(os.environ.get("GRADIO_TEMP_DIR") or Path(tempfile.gettempdir()) / "gradio").resolve()


def files_of_page(app: gr.Blocks) -> set[str]:
    """Return the files that belong to the page itself, such as examples, and must not be removed.

    Relies on the attribute `keep_in_cache` of components. Without it, the pictures of the examples are removed with old
    uploads, and the examples stay without pictures until the page is started again.
    """
    kept = (getattr(block, "keep_in_cache", None) or () for block in getattr(app, "blocks", {}).values())
    return {str(Path(path)) for paths in kept for path in paths}


def functions_of_page(app: Any) -> dict[int, tuple[str | None, int]]:
    """Return the functions that the API can call: by number, the name and the least number of values to send.

    Relies on `fns` of Blocks, and on `api_name` and `inputs` of its functions. Without them, a request for a function
    that does not exist gets gradio's own answer, status 500.

    Args:
        app: gradio's FastAPI application.
    """
    try:
        functions = dict(app.get_blocks().fns)
        # Clients leave out states, which the server keeps.
        return {
            number: (
                function.api_name if isinstance(function.api_name, str) else None,
                sum(not isinstance(block, gr.State) for block in function.inputs),
            )
            for number, function in functions.items()
        }
    except AttributeError:
        return {}


@dataclass(frozen=True)
class Connection:
    """A connection of a client to the page's server.

    Attributes:
        state: Changes whenever a request on this connection was answered.
        waits: Whether the server waits for the client: to complete a request, or to end the connection.
        close: Ends the connection, from any thread.
    """

    state: Hashable
    waits: bool
    close: Callable[[], Any]


def connections_of(app: gr.Blocks) -> list[Connection]:
    """Return the open connections of the page's server.

    Relies on `Blocks.server`, and on what uvicorn keeps of a connection: `cycle` (the last request), `transport` and
    `loop`. Without them, connections that send nothing stay open.
    """
    state = getattr(getattr(app, "server", None), "server_state", None)
    found = []
    # Other threads open and close connections meanwhile.
    for protocol in list(getattr(state, "connections", ())):
        with contextlib.suppress(AttributeError):
            cycle, transport = protocol.cycle, protocol.transport
            waits = cycle is None or cycle.response_complete or transport.is_closing()
            close = partial(protocol.loop.call_soon_threadsafe, transport.abort)
            found.append(Connection((id(protocol), id(cycle)), waits, close))
    return found


class PlainErrorBlocks(gr.Blocks):
    """Blocks that turn every failure into one sentence for the visitor and a line in the log for the host.

    Overrides `process_api`, through which gradio calls the functions of a page. If it is renamed, visitors see gradio's
    own messages, and the page works as before.
    """

    async def process_api(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Run a function as gradio does, and translate what it raises."""
        try:
            return await super().process_api(*args, **kwargs)
        except Refused:
            raise
        except InvalidPathError:
            raise Refused(NOT_UPLOADED) from None
        except gr.Error as error:
            raise Refused(str(error.message)) from error
        except Exception as error:
            cause = error.__cause__ or error
            if isinstance(cause, Refused):
                raise cause from None
            logger.exception("A request failed")
            raise Refused("Something went wrong while working on this; the page goes on, try again.") from error


def offer_tools_only() -> None:
    """Have gradio's MCP server offer those functions alone that are marked by `gradio.mcp.tool`.

    The others take uploaded files, which agents cannot send: gradio would fetch and store what they name instead.

    Relies on `gradio.mcp.GradioMCPServer.get_tool_to_endpoint`. If it is renamed, agents see the page's other functions
    too; files that they name are refused, except for pictures within a message, which are stored outside of the page's
    folder.
    """
    from gradio import mcp

    original = mcp.GradioMCPServer
    if not hasattr(original, "get_tool_to_endpoint"):
        logger.warning(
            "gradio %s offers more functions to agents than the page's tools; use gradio 6.31", gr.__version__
        )
        return

    class ToolsOnly(original):  # type: ignore[misc, valid-type]
        """gradio's MCP server without the functions that are not marked as tools."""

        def get_tool_to_endpoint(self) -> dict[str, str]:
            """Return the endpoint of each tool, by the tool's name."""
            every: dict[str, str] = super().get_tool_to_endpoint()
            found = {name: self.get_block_fn_from_endpoint_name(endpoint) for name, endpoint in every.items()}
            return {name: every[name] for name, each in found.items() if getattr(each.fn, "_mcp_type", None) == "tool"}

    if original.__name__ != ToolsOnly.__name__:
        mcp.GradioMCPServer = ToolsOnly


class ShownAsOriginal:
    """Mixin that makes the browser show a subclass of a gradio component as that component.

    Overrides `get_block_name` and `get_block_class`, by which gradio picks the browser's code. If they are renamed, a
    warning is logged, and the browser does not show the fields of these classes; the API works as before.
    """

    def get_block_name(self) -> str:
        """Return the name of gradio's component in lower case."""
        original = next(each for each in type(self).__mro__ if each.__module__.startswith("gradio."))
        return original.__name__.lower()

    get_block_class = get_block_name


class UploadsOnly(ShownAsOriginal):
    """Mixin for file components: they accept uploaded files, but not web addresses in place of a file name.

    Overrides `async_move_resource_to_block_cache`, in which gradio downloads such an address without a limit of size or
    time. If it is renamed, a warning is logged when the page starts, and gradio's own protection against addresses of
    private networks is what remains.
    """

    async def async_move_resource_to_block_cache(self, url_or_file_path: Any) -> str | None:
        """Refuse web addresses, and move other files as gradio does."""
        if str(url_or_file_path or "").lower().startswith(("http:", "https:")):
            raise Refused("Files are not fetched from web addresses here; upload it or use the field for addresses.")
        return await super().async_move_resource_to_block_cache(url_or_file_path)  # type: ignore[misc]


if not hasattr(gr.Image, "get_block_name"):
    logger.warning("gradio %s cannot show the page's fields for files and numbers; use gradio 6.31", gr.__version__)
if not hasattr(gr.Image, "async_move_resource_to_block_cache"):
    logger.warning(
        "gradio %s may fetch web addresses given as file names without limits; use gradio 6.31 on a public server",
        gr.__version__,
    )
