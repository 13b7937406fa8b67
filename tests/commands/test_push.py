"""`push` and `export --push_to_hub`, against a local server that answers as the hub does."""

import base64
import http.server
import json
import threading
from contextlib import contextmanager
from typing import ClassVar

import pytest

from oumi_pl.__main__ import main
from oumi_pl.commands import push as push_module


class Hub(http.server.BaseHTTPRequestHandler):
    """The parts of the hub's API that an upload of small files calls."""

    repositories: ClassVar[dict] = {}
    """Name -> {private, files}."""
    requests: ClassVar[list] = []

    def do_GET(self):
        self._answer("GET")

    def do_POST(self):
        self._answer("POST")

    def _answer(self, method):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        path = self.path.split("?")[0]
        self.requests.append((method, path))
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        name = "/".join(path.split("/")[3:5])
        if name not in self.repositories:
            return self._send(404, {"error": "not here"}, {"X-Error-Code": "RepoNotFound"})
        repository = self.repositories[name]
        rest = "/".join(path.split("/")[5:])
        if method == "GET" and rest in ("", "revision/main"):
            siblings = [{"rfilename": file} for file in repository["files"]]
            return self._send(
                200, {"id": name, "sha": "0" * 40, "private": repository["private"], "siblings": siblings}
            )
        if method == "GET" and rest.startswith("tree"):
            found = [{"type": "file", "path": f, "size": 1, "oid": "0" * 40} for f in repository["files"]]
            return self._send(200, found)
        if rest.startswith("preupload"):
            files = [file["path"] for file in json.loads(body)["files"]]
            return self._send(
                200, {"files": [{"path": f, "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        if rest.startswith("commit"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    repository["files"][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                if line["key"] == "deletedFile":
                    del repository["files"][line["value"]["path"]]
            url = f"http://{self.headers['Host']}/{name}/commit/{'1' * 40}"
            return self._send(200, {"commitUrl": url, "commitOid": "1" * 40, "success": True})
        return self._send(500, {"error": f"the stand-in knows no {method} {self.path}"})

    def _create(self, asked):
        name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
        if name in self.repositories:
            return self._send(409, {"error": "You already created this model repo", "url": f"http://hub/{name}"})
        private = asked.get("private") or asked.get("visibility") == "private"
        self.repositories[name] = {"private": bool(private), "files": {".gitattributes": b""}}
        return self._send(200, {"url": f"http://{self.headers['Host']}/{name}", "id": name, "name": name})

    def _send(self, status, value, headers=None):
        content = json.dumps(value).encode()
        self.send_response(status)
        for key, text in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, text)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@contextmanager
def serving():
    """Runs a hub without repositories; yields its address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Hub.repositories, Hub.requests = {}, []
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def hub(monkeypatch):
    """The repositories of a hub that is running."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_stand_in")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serving() as address:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        yield Hub.repositories


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run with a model, in the folder of runs."""
    folder = tmp_path / "runs" / "tickets"
    (folder / "model").mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    for name, text in FILES.items():
        (folder / "model" / name).write_text(text)
    (folder / "model" / ".cache").write_text("hidden")
    (folder / "model" / "model.safetensors.half").write_text("unfinished")
    monkeypatch.chdir(tmp_path)
    return folder


FILES = {"config.json": "{}", "model.safetensors": "weights", "README.md": "# tickets\n"}


def refused(capsys, *args):
    capsys.readouterr()
    assert main(["push", *args]) == 2
    return capsys.readouterr().err


def test_a_model_is_pushed_to_a_new_private_repository(hub, run, capsys):
    assert main(["push", "tickets", "me/tickets"]) == 0
    assert hub["me/tickets"]["private"] is True
    uploaded = {name: content.decode() for name, content in hub["me/tickets"]["files"].items()}
    assert uploaded == FILES | {".gitattributes": ""}
    assert "/me/tickets" in capsys.readouterr().out


def test_a_public_repository_has_to_be_asked_for(hub, run):
    assert main(["push", str(run / "model"), "me/open", "--public"]) == 0
    assert hub["me/open"]["private"] is False


def test_an_existing_repository_is_written_to_only_when_asked(hub, run, capsys):
    old = {"adapter_model.safetensors": b"old", ".gitattributes": b""}
    hub["me/tickets"] = {"private": True, "files": dict(old)}
    assert "me/tickets exists" in refused(capsys, "tickets", "me/tickets")
    assert hub["me/tickets"]["files"] == old
    assert main(["push", "tickets", "me/tickets", "--overwrite"]) == 0
    assert set(hub["me/tickets"]["files"]) == {*FILES, ".gitattributes"}, "what was there is another model's"


def test_an_existing_public_repository_stays_as_it_is_unless_public_is_meant(hub, run, capsys):
    hub["me/open"] = {"private": False, "files": {}}
    assert "is public" in refused(capsys, "tickets", "me/open", "--overwrite")
    assert not hub["me/open"]["files"]
    assert main(["push", "tickets", "me/open", "--overwrite", "--public"]) == 0


@pytest.mark.parametrize("flag", ["--dry_run", "--dry-run"])
def test_a_dry_run_lists_files_and_sizes_and_asks_the_hub_nothing(hub, run, capsys, flag):
    assert main(["push", "tickets", "me/tickets", flag]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:-1]] == [[str(len(FILES[name])), name] for name in sorted(FILES)]
    assert "19  bytes in 3 files" in lines[-1]
    assert "private repository me/tickets" in lines[-1]
    assert not Hub.requests


def test_what_can_not_be_pushed_is_refused_before_the_hub_is_asked(hub, run, capsys):
    assert "has no owner" in refused(capsys, "tickets", "tickets")
    assert "no run 'ticket'" in refused(capsys, "ticket", "me/x")
    (run / "model" / "config.json").unlink()
    assert "has no exported model" in refused(capsys, "tickets", "me/x")
    assert not Hub.requests


def test_export_pushes_by_the_same_rules(hub, run, monkeypatch, capsys):
    from oumi_pl.commands import export

    monkeypatch.setattr(export, "find", lambda path: path)
    monkeypatch.setattr(export, "export_checkpoint", lambda *_, **__: None)
    command = ["export", "--checkpoint", "c", "--output", str(run / "model"), "--push_to_hub", "me/tickets"]
    assert main(command) == 0
    assert hub["me/tickets"]["private"] is True
    assert main(command) == 2
    assert "--push_to_hub: the repository me/tickets exists" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
    assert export.push is push_module.push


def test_an_adapter_of_a_folder_of_this_machine_is_not_pushed(hub, run, tmp_path, capsys):
    adapter = run / "model" / "adapter_config.json"
    adapter.write_text(json.dumps({"base_model_name_or_path": str(tmp_path)}))
    assert "the base of this adapter is the folder" in refused(capsys, "tickets", "me/x")
    adapter.write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    assert main(["push", "tickets", "me/x"]) == 0
