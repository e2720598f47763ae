"""Names on the hub, with a server of this machine in its place."""

import http.server
import threading

import pytest
from huggingface_hub import constants

from manyrank.errors import UserError
from manyrank.runs import hub


class Answers(http.server.BaseHTTPRequestHandler):
    """Gives the model there/model, the gated one, and says of all others that they are not there."""

    asked: list[str] = []

    def do_HEAD(self):
        if self.path.endswith("config.json"):
            self.asked.append(self.path)
        self.send_response(
            200 if "/there/" in self.path else 403 if "/gated/" in self.path else 503 if "/busy/" in self.path else 404
        )
        codes = {"gated": "GatedRepo", "adapter": "EntryNotFound", "other": "RepoNotFound"}
        self.send_header("X-Error-Code", codes.get(self.path.split("/")[1], ""))
        self.send_header("ETag", '"1"')
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    served = http.server.HTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    at(monkeypatch, tmp_path, served.server_port)
    Answers.asked.clear()
    yield
    served.shutdown()


def at(monkeypatch, tmp_path, port: int) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        f"http://127.0.0.1:{port}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.check_model.cache_clear()


def error(name: str) -> UserError:
    with pytest.raises(UserError) as caught:
        hub.check_model(name)
    return caught.value


def test_what_the_hub_says_of_a_model(server, tmp_path):
    hub.check_model("there/model")
    hub.check_model("adapter/model")  # without a config.json
    hub.check_model("busy/model")  # the libraries ask again
    hub.check_model("there/model")
    assert [path.split("/")[1] for path in Answers.asked] == ["there", "adapter", "busy"]  # asked once
    assert error("other/model").what.endswith("the model other/model is not on the hub")
    assert "accept the terms" in error("gated/model").fix and "HF_TOKEN" in error("gated/model").fix


def test_what_needs_no_hub(tmp_path, monkeypatch):
    at(monkeypatch, tmp_path, 9)  # where nobody listens
    cached = tmp_path / "models--org--cached" / "snapshots" / "abc"
    cached.mkdir(parents=True)
    (cached / "config.json").touch()
    for name in ("org/cached", "embedded", str(tmp_path), "/no/folder", "./none", "a/b/c"):
        hub.check_model(name)
    caught = error("org/other")
    assert "no answer of the hub" in caught.what and "`embedded`" in caught.fix
