"""A real server: `transformers serve` on the embedded model answers explainer and judge over HTTP."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from sae_italian.autointerp.llm import LLMSettings
from sae_italian.autointerp.llm.askers import LLMExplainer, LLMJudge
from sae_italian.autointerp.llm.calls import Request
from sae_italian.autointerp.llm.client import Client
from tests.autointerp.llm.conftest import a_latent, an_example, an_explanation

TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


@pytest.fixture(scope="module")
def served(mini, tmp_path_factory):
    """The URL of a server of the embedded model, and the name to ask it for."""
    pytest.importorskip("fastapi", reason="transformers serve needs transformers[serving]")
    folder = tmp_path_factory.mktemp("served") / "mini"
    mini.save_pretrained(folder)
    mini.tokenizer.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "chat_template": TEMPLATE}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "transformers.cli.transformers",
        "serve",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    log = (folder.parent / "log").open("w")
    server = subprocess.Popen([*command, "--device", "cpu"], env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 240
        while True:
            assert server.poll() is None, (folder.parent / "log").read_text()[-2000:]
            assert time.monotonic() < deadline, "the server did not start"
            try:
                urllib.request.urlopen(f"{url}/health", timeout=2)
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.3)
        yield f"{url}/v1", str(folder)
    finally:
        server.terminate()
        server.wait(120)
        log.close()


def test_a_real_server_answers_explainer_and_judge(served, mini, tmp_path):
    """The embedded model writes no JSON: its answers are rows that failed, never errors; the calls are in the ledger."""
    url, model = served
    where = {"explainer": "llm", "endpoint": url, "llm_model": model, "llm_tokenizer": "sae-italian-mini"}
    settings = LLMSettings(**where, n_shown=3, concurrency=2, timeout=240)
    with Client(settings, tmp_path / "s.sqlite") as client:
        question = Request(({"role": "user", "content": "La festa di Perugia"},), "prova", 8)
        (reply,) = client.ask([question])
        assert reply.ok and reply.text.strip()
        (explanation,) = LLMExplainer(client).explain(a_latent())
        # Usable, unusable, or cut off by the limit of its length: then a rerun with more room asks again.
        assert explanation.status in ("ok", "failed", "no answer") and explanation.notes["examples"] == 3
        verdicts = LLMJudge(client).detect(an_explanation(), [an_example("la pera", marked=False)])
        assert verdicts.said.tolist()[0] in (-2, -1, 0, 1)  # -2: cut off, to be asked again
        asked = client.counts["asked"]
        assert asked >= 3 and client.counts["failed"] == 0
    with Client(settings, tmp_path / "s.sqlite") as client:
        assert client.ask([question])[0] == type(reply)("ok", reply.text, reply.finish)
        assert client.counts["asked"] == 0
