"""Python processes that start quickly: forks of one that has imported what takes long and is not ours.

A process that loads a model spends some eight seconds of CPU time in the imports of torch and of what transformers
takes from it. The forks share these, and import transformers and gdino_hf anew.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

import gdino_hf

# None of them imports transformers or huggingface_hub, which read environment variables when they are imported. Modules
# that are not installed are left out.
PRELOADED = (
    *("numpy", "PIL.Image", "scipy.optimize", "torch", "torch._dynamo", "torch.distributed.tensor", "torch.utils.data"),
    *("pandas", "pyarrow", "yaml", "matplotlib.pyplot", "safetensors.torch"),
)
COMMAND = "import sys\nfrom gdino_hf.cli import main\nsys.exit(main())"
"""Code that does what `python -m gdino_hf` does."""
SCRIPT = "import runpy, sys\ndel sys.argv[0]\nrunpy.run_path(sys.argv[0], run_name='__main__')"
"""Code that runs the script of its first argument with the others."""

SERVER = """
import contextlib, importlib, json, os, sys, types

for name in json.loads(sys.argv[1]):
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
assert not {"transformers", "huggingface_hub", "gdino_hf"} & sys.modules.keys()
for line in sys.stdin:
    request = json.loads(line)
    if "wait" in request:
        answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
    else:
        answer = os.fork()
        if answer == 0:
            break
    print(json.dumps(answer), flush=True)
else:
    sys.exit()
for number, path in enumerate((os.devnull, request["out"], request["err"])):
    os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
os.environ.clear()
os.environ.update(request["environment"])
os.chdir(request["folder"])
sys.argv[:] = request["arguments"]
sys.modules["__main__"] = types.ModuleType("__main__")
exec(compile(request["code"], "<code of a test>", "exec"), vars(sys.modules["__main__"]))
"""


@dataclass
class Process:
    """A process that has been started.

    Attributes:
        number: Its process id.
        server: The process that started it.
        folder: Folder of the files that it writes its output to.
    """

    number: int
    server: FreshPython
    folder: Path

    def runs(self) -> bool:
        """Return whether the process has not ended."""
        return psutil.Process(self.number).status() != psutil.STATUS_ZOMBIE

    def wait(self) -> subprocess.CompletedProcess[str]:
        """Wait for its end and return its status and output, like subprocess.run."""
        status = self.server.ask(wait=self.number)
        output = [(self.folder / name).read_text(encoding="utf-8") for name in ("out", "err")]
        return subprocess.CompletedProcess("python", status, *output)


class FreshPython:
    """Starts processes; use `fresh_python()`.

    Args:
        server: The process that forks.
        folder: Folder for output.
    """

    def __init__(self, server: subprocess.Popen[str], folder: Path) -> None:
        self._server, self._folder, self._count = server, folder, 0

    def ask(self, **request: Any) -> int:
        """Send the server a request and return its answer."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return int(json.loads(self._server.stdout.readline()))

    def start(
        self, code: str, *arguments: object, folder: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> Process:
        """Start code in a process of its own.

        Args:
            code: Python code, which runs as the main module.
            arguments: Arguments for `sys.argv`, behind the program's name.
            folder: Working directory; by default that of the tests.
            environment: Environment variables beside those of the tests. Python's own have no effect.
        """
        self._count += 1
        place = self._folder / str(self._count)
        place.mkdir()
        number = self.ask(
            code=code,
            arguments=["gdino", *map(str, arguments)],
            folder=str(folder or Path.cwd()),
            environment={**os.environ, **(environment or {})},
            out=str(place / "out"),
            err=str(place / "err"),
        )
        return Process(number, self, place)

    def run(self, code: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run code in a process of its own to its end; for the arguments, see `start`."""
        return self.start(code, *arguments, **options).wait()


@contextmanager
def fresh_python() -> Iterator[FreshPython]:
    """Provide a `FreshPython` with a server of its own."""
    path = os.pathsep.join([str(Path(gdino_hf.__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")])
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(
            [sys.executable, "-c", SERVER, json.dumps(PRELOADED)],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as server,
    ):
        yield FreshPython(server, Path(folder))
