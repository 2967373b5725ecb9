"""A static server without any header of its own making, as cheap hosts are, that remembers what was asked for."""

import functools
import threading
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer


class _Files(SimpleHTTPRequestHandler):
    def send_head(self):
        self.server.asked.append(self.path)
        return super().send_head()

    def copyfile(self, source, outputfile):
        if self.path.endswith(self.server.truncated):
            outputfile.write(source.read()[:-100])
            self.close_connection = True
            return
        super().copyfile(source, outputfile)

    def log_message(self, *args):
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """Ignore that a browser closed a connection before it had the whole file, as it does when a page is left."""


@contextmanager
def static_server(folder):
    """Serve a folder on this machine.

    Yields:
        The server, with its `address`, the paths that were `asked` for, and the ending of files that are `truncated`.
    """
    server = _Server(("127.0.0.1", 0), functools.partial(_Files, directory=str(folder)))
    server.asked, server.truncated = [], "\0"
    server.address = f"http://127.0.0.1:{server.server_port}/"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()
