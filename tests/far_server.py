"""A web server on this machine that hands out a folder, in parts if asked, and fails as servers do."""

import re
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Far:
    """What a server did and does wrong. Each `fail_every`-th request of the shards gets 503; each `cut_every`-th answer
    ends in its middle; `pause` seconds pass before each."""

    def __init__(self, folder):
        self.folder, self.asked, self.ranges, self.sent = folder, Counter(), [], Counter()
        self.fail_every = self.cut_every = 0
        self.pause, self.knows_ranges = 0.0, True
        self._count, self._lock = 0, threading.Lock()

    def next(self, name):
        with self._lock:
            self.asked[name] += 1
            self._count += 1
            return self._count

    @property
    def shards_asked(self):
        return {name: count for name, count in self.asked.items() if ".tar" in name}


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        far, name = self.server.far, self.path.partition("?")[0].strip("/")
        number, path = far.next(name), far.folder / name
        time.sleep(far.pause)
        if far.fail_every and number % far.fail_every == 0:
            return self.send_error(503)
        if not path.is_file():
            return self.send_error(404)
        data, start = path.read_bytes(), 0
        if far.knows_ranges and (match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))):
            start = int(match[1])
            far.ranges.append((name, start))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        data = data[start:]
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if far.cut_every and number % far.cut_every == 0:
            data = data[: len(data) // 2]
        self.wfile.write(data)
        far.sent[name] += len(data)

    def log_message(self, *_):
        pass


@contextmanager
def far_server(folder):
    """(its address, Far)."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.far = Far(folder)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.far
    finally:
        server.shutdown()
        server.server_close()
