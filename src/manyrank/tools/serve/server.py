"""The HTTP server: a thread for each connection, of which one at a time generates. No torch.

GET  /health                  whether it listens; needs no key
GET  /v1/models, /v1/models/NAME
POST /v1/chat/completions     a whole answer, or server-sent events
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import re
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from ...errors import UserError, in_one_line
from .model import ServedModel
from .protocol import ApiError, ChatRequest, Reply, model_card, read_request, usage

MOST_BYTES = 32 * 2**20  # of a request
GRACE = 10.0  # seconds that the running request has to end when the server does; a long prompt ends no sooner


class Server(ThreadingTCPServer):
    """Listens from its beginning, and answers once it runs with a model.

    Args:
        api_key: what requests must bear; empty: nothing.

    Attributes:
        closing: set when a signal has come.

    Raises:
        UserError: the address cannot be taken.
    """

    allow_reuse_address = daemon_threads = True
    request_queue_size = 128
    model: ServedModel

    def __init__(self, host: str, port: int, *, api_key: str = "") -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.api_key, self.created, self.closing = api_key, int(time.time()), threading.Event()
        self._generating = threading.Lock()
        try:
            super().__init__((host, port), Handler)
        except OSError as error:
            what = f"cannot listen at {host}, port {port}: {error.strerror or error}"
            fix = "give another --port (0: a free one), or an address of this machine as --host"
            raise UserError(what, where=f"--host {host} --port {port}", fix=fix) from None

    @property
    def url(self) -> str:
        """The base URL for clients."""
        host, port = self.server_address[:2]
        return f"http://{f'[{host}]' if ':' in str(host) else host}:{port}/v1"

    def run(self, model: ServedModel) -> None:
        """Answer until SIGINT or SIGTERM; the running request ends after its token."""
        self.model = model
        before = {number: signal.signal(number, self._end) for number in (signal.SIGINT, signal.SIGTERM)}
        self.serve_forever(poll_interval=0.2)
        if not self._generating.acquire(timeout=GRACE):
            os._exit(0)  # the interpreter cannot end while a thread computes
        for number, handler in before.items():
            signal.signal(number, handler)

    def _end(self, number: int, frame: object) -> None:
        self.closing.set()
        threading.Thread(target=self.shutdown, daemon=True).start()  # it waits for the thread that this interrupts

    @contextlib.contextmanager
    def turn(self, check: Callable[[], None]) -> Iterator[None]:
        """Wait until no other request generates.

        Args:
            check: raises where the request is no longer to be answered.
        """
        while not self._generating.acquire(timeout=1.0):
            check()
        try:
            check()
            yield
        finally:
            self._generating.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that are gone."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            traceback.print_exc()


class Handler(BaseHTTPRequestHandler):
    """Answers one request and closes the connection."""

    server: Server
    protocol_version, server_version, sys_version = "HTTP/1.1", "manyrank", ""
    timeout = 60.0  # seconds that a client may take to send or to read
    disable_nagle_algorithm = True  # a piece of text is sent at once
    streams = False

    def do_GET(self) -> None:
        """Answer, also with an error."""
        try:
            body = self._body() if self.command == "POST" else b""  # closed with unread data, the client sees no answer
            self._answer(urlsplit(self.path).path, body)
        except ApiError as error:
            self._send_problem(error)
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        except Exception as error:
            traceback.print_exc()
            self._send_problem(ApiError(in_one_line(error), status=500))

    do_POST = do_GET

    def _answer(self, path: str, body: bytes) -> None:
        models, model = "/v1/models", self.server.model
        if path == "/health":
            return self._send({"status": "ok"})
        self._check_key()
        if self.command == "POST" and path == "/v1/chat/completions":
            request = read_request(body)
            self._check_name(request.model)
            with self.server.turn(self._check_wanted):
                return self._complete(request, model.prompt(request))
        if self.command == "GET" and path == models:
            return self._send({"object": "list", "data": [model_card(model.name, self.server.created)]})
        if self.command == "GET" and path.startswith(f"{models}/"):
            self._check_name(unquote(path.removeprefix(f"{models}/")))
            return self._send(model_card(model.name, self.server.created))
        raise ApiError(f"there is no {self.command} {path}", status=404, code="unknown_url")

    def _complete(self, request: ChatRequest, prompt: list[int]) -> None:
        model, with_usage = self.server.model, request.stream_options.include_usage
        reply = Reply(model.name, **({"usage": None} if with_usage else {}))
        pieces: list[str] = []
        if request.stream:
            self._begin_events()
            self._event(reply.chunk(role="assistant", content=""))

        def show(piece: str) -> None:
            self._event(reply.chunk(content=piece)) if request.stream else pieces.append(piece)

        completion = model.complete(prompt, request, show=show, stopped=self._stopped)
        self._check_wanted()
        counts = usage(len(prompt), len(completion.tokens))
        if not request.stream:
            return self._send(reply.whole("".join(pieces), completion.finish, counts))
        self._event(reply.chunk(finish=completion.finish))
        if with_usage:
            self._event(reply.last_chunk(counts))
        self.wfile.write(b"data: [DONE]\n\n")

    # What a request must have

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length")
        if length is None:
            raise ApiError("the request has no Content-Length", status=411)
        if not re.fullmatch("[0-9]{1,9}", length) or int(length) > MOST_BYTES:
            raise ApiError(f"more than {MOST_BYTES:,} bytes", status=413)
        return self.rfile.read(int(length))

    def _check_key(self) -> None:
        expected, given = f"Bearer {self.server.api_key}", self.headers.get("Authorization", "")
        if self.server.api_key and not hmac.compare_digest(given.encode("latin-1"), expected.encode()):
            raise ApiError("the API key is missing or wrong", status=401, code="invalid_api_key")

    def _check_name(self, name: str | None) -> None:
        if name not in (None, self.server.model.name):
            what = f"the model {name!r} does not exist; this server has {self.server.model.name!r}"
            raise ApiError(what, status=404, param="model", code="model_not_found")

    def _stopped(self) -> bool:
        return self.server.closing.is_set() or self._gone()

    def _check_wanted(self) -> None:
        if self.server.closing.is_set():
            raise ApiError("the server is shutting down", status=503)
        if self._gone():
            raise ConnectionAbortedError

    def _gone(self) -> bool:
        """Return whether the client has closed the connection."""
        poll = select.poll()
        poll.register(self.connection, select.POLLRDHUP)
        return bool(poll.poll(0))

    # Writing

    def _begin(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Connection": "close"}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def _send(self, body: dict[str, Any], status: int = 200) -> None:
        content = json.dumps(body, ensure_ascii=False).encode(errors="replace")
        self._begin(status, Content_Type="application/json", Content_Length=str(len(content)))
        self.wfile.write(content)

    def _begin_events(self) -> None:
        self.streams = True
        self._begin(200, Content_Type="text/event-stream", Cache_Control="no-cache")

    def _event(self, body: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(body, ensure_ascii=False).encode(errors="replace") + b"\n\n")

    def _send_problem(self, error: ApiError) -> None:
        """Send an error as the answer, or as the last event of one that has begun."""
        with contextlib.suppress(ConnectionError, TimeoutError):
            self._event(error.body) if self.streams else self._send(error.body, error.status)
        self.close_connection = True

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Send what the parser of HTTP refuses in the form of the API."""
        self._send_problem(ApiError(message or "the request cannot be read", status=code))
