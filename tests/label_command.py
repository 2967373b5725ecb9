"""`gdino label` run in the test's own process or in one of its own, and pictures for it."""

import contextlib
import hashlib
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
from PIL import Image

import gdino_hf
from gdino_hf import Vocabulary
from gdino_hf.cli import main
from gdino_hf.labeling.label_progress import LabelProgress
from gdino_hf.labeling.label_run import label_pictures
from gdino_hf.labeling.label_settings import LabelJob
from gdino_hf.labeling.ray_pipeline import RowLabeler
from gdino_hf.labeling.ray_workers import own_variables

# The random model scores near zero; with this every query is a result.
EVERYTHING = ("--threshold", "0.005")
LABELS = "cat, remote control, dog"
FORMATS = ("coco", "yolo", "parquet")
# Longest wait in seconds for a process, which only one that hangs exceeds, however busy the machine is.
HANGS = 600
PACKAGE = str(Path(gdino_hf.__file__).resolve().parents[1])


def make_pictures(folder, number, seed=0):
    """Small pictures of several shapes and formats, some in sub-folders; returns the folder."""
    chance = np.random.default_rng(seed)
    for index in range(number):
        size = [(90, 60), (60, 90), (80, 80), (120, 50)][index % 4]
        path = folder / ("sub" if index % 5 == 0 else ".") / f"{index:05d}{['.jpg', '.png'][index % 2]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = chance.integers(0, 256, (6, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path)
    return folder


def arguments(model, out, *rest, shard=8):
    """The arguments of a run with the tiny model."""
    options = ["--labels", LABELS, "--model", str(model), "--out", str(out), "--shard", str(shard)]
    return ["label", *options, *EVERYTHING, *map(str, rest)]


def run_label(model, out, *rest, **options):
    """Run the verb here: its status, what it printed and what it complained."""
    printed, complained = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complained):
        try:
            status = main(arguments(model, out, *rest, **options))
        except SystemExit as stopped:
            status = stopped.code
    return status, printed.getvalue(), complained.getvalue()


def start_label(model, out, *rest, environment=(), **options):
    """Start the verb in a process of its own, in a group with its workers."""
    path = os.pathsep.join([PACKAGE, os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-m", "gdino_hf", *arguments(model, out, *rest, **options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **dict(environment)},
        start_new_session=True,
    )


def _command_into(place, command):
    """Run the verb and write what it prints and complains of to a file; a target for processes."""
    with place.open("wb") as said:
        for number in (1, 2):
            os.dup2(said.fileno(), number)
    sys.exit(main(command))


class ForkedLabel:
    """A run of the verb in a process of `context`, which has torch already; its methods are those of `Popen`.

    Args:
        context: The fixture of this name.
        place: File for what the run says.
        command: Arguments from `arguments()`.
    """

    def __init__(self, context, place, command):
        self._process, self._place = context.Process(target=_command_into, args=(place, command)), place
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self):
        """The status at the end, or minus the number of the signal that ended it."""
        return self._process.exitcode

    def poll(self):
        return self._process.exitcode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def communicate(self, timeout=HANGS):
        """Wait for the end and return (nothing, what was said)."""
        self._process.join(timeout)
        assert self.returncode is not None, "the run does not end"
        return "", self._place.read_text(encoding="utf-8")


class StopsAfter(LabelProgress):
    """Stops a run by an exception once so many pictures are done."""

    def __init__(self, pictures):
        super().__init__()
        self.pictures = pictures

    def add(self, tally):
        super().add(tally)
        if self.pictures is not None and self.done.pictures >= self.pictures:
            raise ZeroDivisionError


def label_all(model, folder, out, ranks=None, after=None, segmenter=None):
    """Label a folder in small shards with three formats; a target for processes, too."""
    segmenter = None if segmenter is None else str(segmenter)
    job = LabelJob(
        str(model),
        "cpu",
        batch_size=2,
        shard_size=4,
        options={"threshold": 0.005, "nms_threshold": 1.0},
        segmenter=segmenter,
    )
    return label_pictures([folder], LABELS, out, job=job, formats=FORMATS, ranks=ranks, progress=StopsAfter(after))


def label_apart(context, *arguments):
    """Run `label_all` in a process of its own, which earlier tests cannot have changed."""
    process = context.Process(target=label_all, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0


def rows(out):
    """The rows of all shards in order."""
    return [row for file in sorted(out.glob("shards/*.parquet")) for row in parquet.read_table(file).to_pylist()]


def errors(out):
    """Source and reason of each failure."""
    return {row["source"]: row["reason"] for row in parquet.read_table(out / "errors.parquet").to_pylist()}


def digests(out):
    """The digest of each file of a folder of results, by its path inside."""
    return {
        path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file() and not path.name.startswith(".lock")
    }


def label_rows_dying(model, pictures, deadly, results):
    """Label rows as an actor of a Ray Data pipeline, in a process that dies of one of the pictures."""
    job = LabelJob(str(model), "cpu", batch_size=2, options={"threshold": 0.005, "nms_threshold": 1.0})
    labeler = RowLabeler(job, Vocabulary(LABELS), ("path", "path"), 1, own_variables(), "run")
    read = labeler._labeler._read

    def dying(item):
        if item.source == deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(item)

    labeler._labeler._read = dying
    results.put(labeler({"path": pictures}).to_pylist())


def make_deadly_site(folder):
    """Write packages with a file system, deadly://, that ends each process that opens it; returns their folder."""
    about = folder / "deadly-1.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: deadly\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[fsspec.specs]\ndeadly = deadly_files:Deadly\n")
    (folder / "deadly_files.py").write_text("import os\nos.kill(os.getpid(), 9)\n")
    return folder
