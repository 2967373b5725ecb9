"""Tracking measured: identities on generated videos with exact truth, speed beside the Detector's own loop, and memory.

python tests/benchmarks/bench_tracking.py identities --nano   # minutes: the model looks at every frame
python tests/benchmarks/bench_tracking.py speed
python tests/benchmarks/bench_tracking.py memory --minutes 20
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import av
import numpy as np
import psutil
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gdino_hf import Detector
from gdino_hf.recipes.moving_scenes import KINDS, MovingScenes
from gdino_hf.video.decoding import VideoFile
from gdino_hf.video.track_run import Stop, TrackRun
from gdino_hf.video.tracking import TRACKERS, Tracker
from tracking_figures import cutouts, figures, perfect, scenes
from video_clips import write_clip

RATE = 25.0


def identities(args: argparse.Namespace) -> None:
    """Print IDF1, MOTA and switches: of perfect boxes for every tracker, and of the model's boxes."""
    print("boxes    tracker    kind        IDF1   MOTA  switches  ids  objects")
    for name in args.trackers:
        for kind in KINDS:
            for seed in range(args.seeds):
                scene = scenes(kind, seed, frames=args.frames)
                tracker = Tracker(name, rate=RATE)
                frames = [
                    (truth, tracker.update(perfect(truth, scene.labels, scene.size), number / RATE, image))
                    for number, (image, truth) in enumerate(scene)
                ]
                show("perfect", name, kind, figures(frames), tracker)
    if not args.nano:
        return
    detector = Detector("nano", device="cpu")
    for kind in KINDS:
        options = {"kind": kind, "frames": args.frames, "size": (480, 360), "objects": 2, "labels": 2, "scale": 0.5}
        # The video of examples/draw_a_video.py: gdino-nano hardly knows a cup.
        known = [(name, picture) for name, picture in cutouts() if name != "cup"]
        scene = MovingScenes([Image.new("RGB", (480, 360), (60, 70, 90))], known, **options)
        truths = [truth for _, truth in scene]
        tracker = Tracker(rate=RATE)
        found = detector.track((image for image, _ in scene), list(scene.labels), tracker=tracker, rate=RATE)
        frames = [(truth, frame.found) for truth, frame in zip(truths, found, strict=True)]
        show("nano", tracker.name, kind, figures(frames), tracker)


def show(boxes: str, name: str, kind: str, found: dict[str, float], tracker: Tracker) -> None:
    print(
        f"{boxes:8} {name:10} {kind:11} {found['idf1']:.3f} {found['mota']:6.3f} {found['num_switches']:9.0f} "
        f"{tracker.count:4} {found['num_unique_objects']:8.0f}",
        flush=True,
    )


def speed(args: argparse.Namespace) -> None:
    """Print frames in a second of `Detector.stream`, on pictures in memory and on a video, and of tracking."""
    detector = Detector("nano", device="cpu")
    vocabulary = detector.vocabulary(["cat", "cup", "person"])
    with tempfile.TemporaryDirectory() as place:
        clip = make_clip(Path(place), args.frames)
        pictures = [frame.image for frame in VideoFile(clip)]
        options = {"threshold": 0.15, "nms_threshold": 0.7}

        def alone() -> None:
            for _ in detector.stream(pictures, vocabulary, **options):
                pass

        def decoded() -> None:
            for _ in detector.stream((frame.image for frame in VideoFile(clip)), vocabulary, **options):
                pass

        def tracked() -> None:
            for _ in detector.track(clip, vocabulary):
                pass

        def written() -> None:
            source = VideoFile(clip)
            run = TrackRun(Path(place), source, vocabulary.labels, video=Path(place) / "out.mp4")
            assert run.write(detector.track(source, vocabulary), Stop())

        alone()
        names = ("Detector.stream", "the same, decoding", "Detector.track", "with all files")
        times: dict[str, list[float]] = {name: [] for name in names}
        # In turn, because a shared machine is never equally busy for long.
        for _ in range(args.repeats):
            for name, function in zip(times, (alone, decoded, tracked, written), strict=True):
                begin = time.perf_counter()
                function()
                times[name].append(time.perf_counter() - begin)
    rates = {name: len(pictures) / statistics.median(each) for name, each in times.items()}
    print("                   frames/s  of the first  of the second")
    for name, rate in rates.items():
        print(f"{name:18} {rate:8.2f} {rate / rates[names[0]]:13.2f} {rate / rates[names[1]]:14.2f}")


def memory(args: argparse.Namespace) -> None:
    """Track a long video with all files, and print the process's memory every two minutes of it."""
    detector = Detector("nano", device="cpu")
    with tempfile.TemporaryDirectory() as place:
        clip = loop(
            make_clip(Path(place), 10 * args.rate, args.rate, sound=True), Path(place) / "long.mp4", args.minutes
        )
        source = VideoFile(clip)
        run = TrackRun(
            Path(place),
            source,
            ("cat", "cup", "person"),
            video=Path(place) / "out.mp4",
            lines=[((160, 0), (160, 120))],
        )
        process, begin, levels = psutil.Process(), time.perf_counter(), []

        def watched():
            for frame in detector.track(source, ["cat", "cup", "person"], every=args.every):
                if frame.number % round(120 * source.rate) == round(60 * source.rate):
                    levels.append(process.memory_info().rss / 2**20)
                    print(
                        f"{frame.seconds / 60:5.1f} minutes: {levels[-1]:.0f} MiB, "
                        f"{frame.number / (time.perf_counter() - begin):.0f} frames/s, "
                        f"{len(run.files.tracks)} tracks",
                        flush=True,
                    )
                yield frame

        assert run.write(watched(), Stop())
        written = sum(1 for _ in VideoFile(Path(place) / "out.mp4"))
        print(f"{run.files.frames} frames, {written} in the annotated video, after the first minute: ", end="")
        print(f"{min(levels):.0f} to {max(levels):.0f} MiB; last to first {levels[-1] / levels[0]:.3f}")


def make_clip(folder: Path, frames: int, rate: int = 25, sound: bool = False) -> Path:
    """A cat, a cup and a person that move over a plain ground."""
    size = (160, 120) if sound else (480, 360)
    ground = [Image.new("RGB", size, (120, 140, 120))]
    scene = MovingScenes(ground, cutouts(), frames=frames, size=size, objects=3, labels=3, scale=0.4)
    return write_clip(folder / "clip.mp4", [image for image, _ in scene], rate=rate, sound=sound, gop=rate)


def loop(clip: Path, target: Path, minutes: float) -> Path:
    """Repeat a video for some minutes, without encoding it anew."""
    with av.open(str(clip)) as source:
        # Sound begins before zero and ends after the pictures, so turns need a pause between them.
        length = float(source.duration / av.time_base) + 0.2
    with av.open(str(target), "w") as output:
        streams = {}
        for turn in range(int(np.ceil(60 * minutes / length))):
            with av.open(str(clip)) as source:
                if not streams:
                    streams = {stream.index: output.add_stream_from_template(stream) for stream in source.streams}
                for packet in source.demux():
                    if packet.dts is None:
                        continue
                    shift = round(turn * length / packet.time_base)
                    packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                    packet.stream = streams[packet.stream.index]
                    output.mux(packet)
    return target


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(required=True)
    one = verbs.add_parser("identities")
    one.add_argument("--frames", type=int, default=100)
    one.add_argument("--seeds", type=int, default=1)
    one.add_argument("--trackers", nargs="*", choices=TRACKERS, default=["bytetrack"])
    one.add_argument("--nano", action="store_true", help="also track what gdino-nano finds")
    one.set_defaults(run=identities)
    two = verbs.add_parser("speed")
    two.add_argument("--frames", type=int, default=300)
    two.add_argument("--repeats", type=int, default=3)
    two.set_defaults(run=speed)
    three = verbs.add_parser("memory")
    three.add_argument("--minutes", type=float, default=20)
    three.add_argument("--every", type=int, default=30)
    three.add_argument("--rate", type=int, default=25, help="frames per second")
    three.set_defaults(run=memory)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
