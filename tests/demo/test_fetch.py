"""Downloads from the web, with a server on this machine in place of public ones."""

import http.server
import socket
import threading
import time
import urllib.parse

import pytest
from gdino_demo import fetch as module
from gdino_demo.fetch import fetch, is_public
from gdino_demo.safety import LARGEST_PICTURE, Refused

PUBLIC = "93.184.216.34"
NOT_PUBLIC = "not on the public internet"


class Handler(http.server.BaseHTTPRequestHandler):
    """Server whose answer depends on the path."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.asked.append((self.headers["Host"], self.path))
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", urllib.parse.unquote(self.path.removeprefix("/to/")))
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif self.path == "/slow":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            try:
                for _ in range(1000):
                    self.wfile.write(b"x")
                    time.sleep(0.05)
            except OSError:
                pass
        elif self.path == "/large":
            self.send_response(200)
            self.send_header("Connection", "close")
            self.end_headers()
            try:
                for _ in range(LARGEST_PICTURE // 2**20 + 2):
                    self.wfile.write(b"\0" * 2**20)
            except OSError:
                pass
        else:
            status = 404 if self.path == "/missing" else 200
            self.send_response(status)
            self.send_header("Content-Length", "4")
            self.end_headers()
            self.wfile.write(b"data")

    def log_message(self, *args):
        pass


@pytest.fixture
def web(monkeypatch):
    """A fake web: example.org is public and answered by `Handler`; `names` gives the addresses of other names."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.asked, server.names, server.looked_up, server.reached = [], {"example.org": [[PUBLIC]]}, [], []
    # By default it looks twice a second whether it shall end, for which every test would wait.
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    look_up, connect = socket.getaddrinfo, socket.create_connection

    def fake_look_up(host, port, *args, **kwargs):
        server.looked_up.append(host)
        if host not in server.names:
            return look_up(host, port, *args, **kwargs)
        answers = server.names[host]
        addresses = answers.pop(0) if len(answers) > 1 else answers[0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    def fake_connect(address, *args, **kwargs):
        server.reached.append(address[0])
        assert address[0] == PUBLIC, "a connection to another address than the one that was checked"
        return connect(("127.0.0.1", server.server_port), *args, **kwargs)

    monkeypatch.setattr(module.socket, "getaddrinfo", fake_look_up)
    monkeypatch.setattr(module.socket, "create_connection", fake_connect)
    yield server
    server.shutdown()
    server.server_close()


def test_the_connection_goes_to_the_address_that_was_checked(web):
    assert fetch("http://example.org/a%20cat.jpg?x=1&y=ü") == b"data"
    assert web.asked == [("example.org", "/a%20cat.jpg?x=1&y=%C3%BC")]
    assert web.reached == [PUBLIC]


def test_a_name_is_looked_up_once_so_that_it_cannot_change_its_address(web):
    web.names["rebind.example"] = [[PUBLIC], ["127.0.0.1"]]
    assert fetch("http://rebind.example/") == b"data"
    assert web.looked_up.count("rebind.example") == 1


def test_redirects_are_followed_to_public_addresses_only(web):
    assert fetch("http://example.org/to//cat.jpg") == b"data"
    web.names["inside.example"] = [["10.1.2.3"]]
    for place in ("http://127.0.0.1/", "http://inside.example/", "http://[::1]/", "//169.254.169.254/latest/"):
        with pytest.raises(Refused, match=NOT_PUBLIC):
            fetch("http://example.org/to/" + place)
    with pytest.raises(Refused, match="begin with http"):
        fetch("http://example.org/to/file:///etc/passwd")
    assert set(web.reached) == {PUBLIC}


def test_too_many_redirects_are_refused(web):
    with pytest.raises(Refused, match="redirected more than 5 times"):
        fetch("http://example.org/to/" * 7)


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1/",
        "http://127.1:80/",
        "http://2130706433/",
        "http://0x7f000001/",
        "http://0177.0.0.1/",
        "http://0/",
        "http://localhost/",
        "http://[::1]/",
        "http://[::]/",
        "http://[::ffff:127.0.0.1]/",
        "http://[::ffff:a9fe:a9fe]/",
        "http://[64:ff9b::7f00:1]/",
        "http://[2002:7f00:1::]/",
        "http://[fe80::1]/",
        "http://[fd00::1]/",
        "http://169.254.169.254/latest/meta-data/",
        "http://10.0.0.1/",
        "http://172.16.0.1/",
        "http://192.168.1.1/",
        "http://100.64.0.1/",
        "http://224.0.0.1/",
        "http://255.255.255.255/",
        "http://[fec0::1]/",
        "http://[feff::1]/",
        "http://[4000::1]/",
        "http://[64:ff9b:1::1]/",
        "http://[64:ff9b::192.88.99.1]/",
        "http://[2002:808:808::1]/",
        "http://[2001::1]/",
        "http://[2001:20::1]/",
        "http://[3fff::1]/",
        "http://[5f00::1]/",
        "http://[100::1]/",
        "http://[2606:4700::5efe:10.0.0.1]/",
        "http://[::8.8.8.8]/",
        "http://192.88.99.1/",
        "http://168.63.129.16/",
        "http://192.0.0.9/",
        "http://192.175.48.1/",
        "http://198.18.0.1/",
        "http://203.0.113.5/",
        "http://240.0.0.1/",
        "https://127.0.0.1/",
    ],
)
def test_addresses_that_are_not_public_are_refused(web, address):
    with pytest.raises(Refused, match=NOT_PUBLIC):
        fetch(address)
    assert web.reached == []


@pytest.mark.parametrize("port", [1, 22, 25, 79, 81, 444, 3306, 6379, 8080, 8443, 65535])
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_other_ports_are_refused(web, scheme, port):
    with pytest.raises(Refused, match=f"names the port {port}; only 80, 443 are connected to"):
        fetch(f"{scheme}://example.org:{port}/")
    with pytest.raises(Refused, match=f"names the port {port}"):
        fetch(f"http://example.org/to/{scheme}://example.org:{port}/")
    assert len(web.reached) == 1


def test_other_ports_are_connected_to_if_the_host_allows_them(web, monkeypatch):
    monkeypatch.setenv("GDINO_DEMO_PORTS", "8080, 8443 no 99999999")
    assert fetch("http://example.org:8080/cat.jpg") == b"data"
    assert fetch("http://example.org:80/cat.jpg") == b"data"
    with pytest.raises(Refused, match="names the port 8081; only 80, 443, 8080, 8443"):
        fetch("http://example.org:8081/")


def test_a_name_with_one_private_address_is_refused(web):
    web.names["mixed.example"] = [[PUBLIC, "192.168.0.1"]]
    with pytest.raises(Refused, match=NOT_PUBLIC):
        fetch("http://mixed.example/")


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("file:///etc/passwd", "begin with http"),
        ("ftp://example.org/a", "begin with http"),
        ("gopher://example.org/", "begin with http"),
        ("data:image/png;base64,AAAA", "begin with http"),
        ("/etc/passwd", "begin with http"),
        ("", "begin with http"),
        ("http://", "not a web address"),
        ("http://user:word@example.org/", "not a web address"),
        ("http://example.org/a\r\nHost: other", "not a web address"),
        ("http://example.org:99999/", "not a web address"),
        ("http://[::1", "not a web address"),
        ("http://example.org/" + "a" * 3000, "it may have 2000"),
    ],
)
def test_malformed_addresses_are_refused(web, address, sentence):
    with pytest.raises(Refused, match=sentence):
        fetch(address)
    assert web.reached == []


def test_a_download_that_trickles_is_ended_in_time(web, monkeypatch):
    monkeypatch.setattr(module, "SECONDS", 0.5)
    start = time.monotonic()
    with pytest.raises(Refused, match="seconds"):
        fetch("http://example.org/slow")
    # The whole file would take 50 seconds; the limit leaves room for a loaded machine.
    assert time.monotonic() - start < 10


def test_a_file_that_is_too_large_is_not_read_to_its_end(web):
    with pytest.raises(Refused, match="larger than 20 MB"):
        fetch("http://example.org/large")


def test_an_error_status_is_named(web):
    with pytest.raises(Refused, match="status 404"):
        fetch("http://example.org/missing")


def test_public_addresses_are_public():
    assert all(map(is_public, ("8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8")))
