"""Streams that drop and come back, from servers on this machine."""

import re
import socket
import threading
import time
from contextlib import suppress

import pytest

from gdino_hf.video.decoding import VideoError
from gdino_hf.video.frame_sources import open_source
from gdino_hf.video.live_streams import LiveStream, is_live_address
from video_clips import flat_frames, number_of, write_clip


class DroppingServer:
    """A server that sends one file to each connection and hangs up; after the last it stops listening."""

    def __init__(self, parts, scheme="tcp"):
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.scheme, self.address = scheme, f"{scheme}://127.0.0.1:{self.socket.getsockname()[1]}"
        self.thread = threading.Thread(target=self.serve, args=(parts,), daemon=True)
        self.thread.start()

    def serve(self, parts):
        for part in parts:
            connection, _ = self.socket.accept()
            with connection:
                if self.scheme == "http":
                    connection.recv(65536)
                    connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Type: video/mp2t\r\n\r\n")
                connection.sendall(part)
        self.socket.close()


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    frames = flat_frames(12)
    first = write_clip(folder / "first.ts", frames[:6], gop=1)
    second = write_clip(folder / "second.ts", frames[6:], gop=1)
    return [first.read_bytes(), second.read_bytes()]


@pytest.mark.parametrize("scheme", ["tcp", "http"])
def test_a_stream_that_drops_comes_back_and_is_given_up_after_a_while(parts, monkeypatch, scheme):
    monkeypatch.setattr("gdino_hf.video.live_streams._WAITING", 100)
    server = DroppingServer(parts, scheme)
    source = open_source(server.address, patience=1.0)
    assert source.is_live
    assert source.expected is None
    frames = list(source)
    assert [number_of(frame.image) for frame in frames] == list(range(12))
    assert [frame.number for frame in frames] == list(range(12))
    seconds = [frame.seconds for frame in frames]
    assert seconds == sorted(seconds)
    # The clock went on between the connections.
    assert seconds[6] > 0.2
    assert source.reconnections >= 2
    assert "did not come back within 1 seconds; 12 frames were received" in source.remark


def test_a_video_of_an_address_that_breaks_off_is_told(tmp_path):
    video = write_clip(
        tmp_path / "whole.mp4", flat_frames(60, (320, 240)), gop=1, container={"movflags": "+faststart"}
    ).read_bytes()
    server = socket.create_server(("127.0.0.1", 0))

    def serve():
        with suppress(OSError):
            while True:
                connection, _ = server.accept()
                with connection:
                    connection.recv(4096)
                    head = f"HTTP/1.0 200 OK\r\nContent-Type: video/mp4\r\nContent-Length: {len(video)}\r\n\r\n"
                    connection.sendall(head.encode() + video[: len(video) // 2])

    threading.Thread(target=serve, daemon=True).start()
    source = open_source(f"http://127.0.0.1:{server.getsockname()[1]}/whole.mp4")
    assert not source.is_live
    count = len(list(source))
    server.close()
    assert 10 < count < 50
    assert re.search(rf"broke off \(.+\) after {count} of about 60 frames; these were read", source.remark)


def test_a_slow_reader_gets_the_newest_frames(parts):
    server = DroppingServer(parts[:1])
    source = LiveStream(server.address, patience=0.5)
    frames = []
    for frame in source:
        frames.append(frame.number)
        if len(frames) == 1:
            # Long enough for the rest to arrive.
            source_ended = time.monotonic() + 5
            while source.remark is None and time.monotonic() < source_ended:
                threading.Event().wait(0.02)
    assert frames[-1] == 5
    assert len(frames) <= 5


def test_a_stream_that_is_not_there_is_refused_at_once():
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"tcp://user:secret@127.0.0.1:{free.getsockname()[1]}"
    begin = time.monotonic()
    with pytest.raises(VideoError, match=r"tcp://127\.0\.0\.1:\d+ cannot be opened .*check the address"):
        open_source(address)
    assert time.monotonic() - begin < 5


def test_leaving_a_stream_ends_its_thread(parts):
    server = DroppingServer([parts[0]] * 50)
    frames = iter(LiveStream(server.address))
    next(frames)
    frames.close()
    deadline = time.monotonic() + 5
    while any(thread.name == "gdino_hf-stream" for thread in threading.enumerate()) and time.monotonic() < deadline:
        threading.Event().wait(0.02)
    assert not any(thread.name == "gdino_hf-stream" for thread in threading.enumerate())


def test_addresses_are_told_from_paths():
    assert is_live_address("rtsp://camera/1")
    assert is_live_address("HTTPS://host/a.mp4")
    assert not is_live_address("clip.mp4")
    assert not is_live_address("C://clip.mp4")
    assert not is_live_address("rtsp")
