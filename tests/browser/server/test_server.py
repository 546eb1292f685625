"""The server as a client meets it: what it answers, whom it refuses, and that it goes on answering."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import httpx
import pytest
from starlette.testclient import TestClient as Client

from sae_italian.base.errors import UsageError
from sae_italian.base.storage import write_json
from sae_italian.browser import server
from sae_italian.browser.server import HEADERS, MAX_BODY, bind
from sae_italian.browser.source import RESULTS, LatentSource
from sae_italian.cache import FeatureCache
from sae_italian.cli import main
from sae_italian.saes import load_sae
from tests.browser.nasty import SCRIPT
from tests.browser.schema import check, check_card, check_rows

from .conftest import ADDRESS, TestClient, create_app, open_with_live
from .running import running

CLIENTS = 50


def said(response, status):
    """Check the status of a refusal and return what it says in English."""
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error_it", "error_en"} and response.json()["error_it"]
    return response.json()["error_en"]


# --- what it answers -----------------------------------------------------------------------------------------------------


def test_page_modules_and_style_come_with_their_headers(client):
    page = client.get("/")
    assert page.status_code == 200 and 'src="assets/app.js" defer' in page.text and "<script>" not in page.text
    for path in ("/assets/app.js", "/assets/app.css"):
        response = client.get(path)
        assert response.status_code == 200, path
        assert response.headers["content-type"].startswith("text/")
    for response in (page, client.get("/nothing"), client.get("/api/rows"), client.post("/api/live/tokens")):
        assert all(response.headers[name] == value for name, value in HEADERS.items())
        assert "server" not in response.headers and "access-control-allow-origin" not in response.headers
    policy = HEADERS["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy


def test_records_are_those_of_the_source(client, opened, active):
    source, _ = opened
    run = client.get("/api/run").json()
    assert check("run", run["run"])["d_sae"] == 256 and run["live"] == {
        "works": ["tokens", "steer", "ablate", "explain"],
        "llm": False,
        "near": False,
    }
    rows = check_rows(client.get("/api/rows").json())
    assert rows["latent"] == list(range(256))
    card = client.get(f"/api/card/{active}").json()
    assert check_card(card) == json.loads(json.dumps(source.card(active)))


@pytest.mark.parametrize("latent", ["256", "-1", "abc", "１２", "1e3", "99999999999", "..", "%2e%2e%2fmanifest.json"])
def test_what_is_no_latent_is_not_found(client, latent):
    said(client.get(f"/api/card/{latent}"), 404)
    said(client.get(f"/api/wide/{latent}"), 404)


def test_live_work_by_http(client, active):
    assert client.post("/api/live/tokens", json={"sentence": "La ragazza legge."}).json()["strongest"]
    assert client.post("/api/live/ablate", json={"latent": active, "prompt": "La ragazza legge"}).status_code == 200
    steered = client.post("/api/live/steer", json={"latent": active, "prompt": "La", "strengths": [2]})
    assert len(steered.json()["steered"]) == 1
    explained = client.post("/api/live/explain", json={"latent": active}).json()
    assert explained["explanations"][0]["kind"] == "rule"
    assert "latents 0 to 255" in said(client.post("/api/live/explain", json={"latent": 999}), 422)
    said(client.post("/api/live/explode", json={}), 404)
    said(client.get("/api/live/tokens"), 404)


def test_without_sae_or_model_the_records_are_served_and_live_work_is_not(opened):
    with TestClient(create_app(opened[0]), base_url=ADDRESS) as client:
        assert client.get("/api/run").json()["live"] is None and client.get("/api/card/3").status_code == 200
        assert "not on this machine" in said(client.post("/api/live/tokens", json={"sentence": "a"}), 404)


def test_new_scores_show_at_the_next_list(opened, mini, trained_sae, tmp_path):
    from sae_italian.autointerp import AutointerpConfig, run_autointerp
    from sae_italian.autointerp.store import Explanation, Store
    from sae_italian.saes import load_sae

    folder = tmp_path / "cache"
    shutil.copytree(opened[0].cache.folder, folder, ignore=shutil.ignore_patterns("*.sqlite*"))
    cache = FeatureCache.open(folder)
    store = run_autointerp(cache, mini.tokenizer, AutointerpConfig(latents=1, n_examples=10))
    app = create_app(*open_with_live(cache, mini.tokenizer, sae=load_sae(trained_sae), model=mini))
    with TestClient(app, base_url=ADDRESS) as client:
        rows = client.get("/api/rows").json()
        latent = rows["status"].index("not explained")
        with Store(store, {}) as opened_store:
            opened_store.add_explanations([Explanation(latent, "rules", "ok", "nuova", "new", None)])
            opened_store.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        os.utime(store, ns=(1, 1))
        assert client.get("/api/rows").json()["explanation_it"][latent] == "nuova"


def test_new_results_show_at_the_next_run_and_list(opened, mini, tmp_path):
    folder = shutil.copytree(opened[0].cache.folder, tmp_path / "cache")
    gold = dict.fromkeys(("label", "category", "n", "precision", "recall"), 1) | {"latent": 3, "f1": 0.9}
    cache = FeatureCache.open(folder)
    with TestClient(create_app(LatentSource(cache, mini.tokenizer)), base_url=ADDRESS) as client:
        for value in (0.7, 0.8):
            gold |= {"label": f"case={value}"}
            results = {"autointerp": {"detection": {"value": value, "lo": None, "hi": None}}, "gold": [gold]}
            write_json(folder / RESULTS, results)
            assert client.get("/api/rows").json()["gold"][3][-1] == f"case={value}"
            run = client.get("/api/run").json()["run"]
            assert run["gold"][0]["label"] == f"case={value}"
            assert {one["name"]: one["value"] for one in run["metrics"]}["detection"] == value


# --- another SAE beside it -------------------------------------------------------------------------------------------------


def test_another_sae_is_served_beside_it_with_the_matches(opened, compared, active):
    app = create_app(*opened, other=compared)
    with TestClient(app, base_url=ADDRESS, raise_server_exceptions=False) as client:
        assert client.get("/api/run").json()["compare"] == compared.name
        assert client.get("/api/other/run").json()["run"]["d_sae"] == compared.source.d_sae
        matches = client.get("/api/matches").json()
        assert matches == compared.matches and len(matches["latent"]) == opened[0].d_sae
        assert len(check_rows(client.get("/api/other/rows").json())["latent"]) == compared.source.d_sae
        match = matches["latent"][active]
        assert check_card(client.get(f"/api/other/card/{match}").json())["latent"] == match
        assert client.get(f"/api/other/wide/{match}").status_code == 200
        said(client.get(f"/api/other/card/{compared.source.d_sae}"), 404)


def test_without_another_sae_there_are_no_matches(client):
    assert client.get("/api/run").json()["compare"] is None
    said(client.get("/api/matches"), 404)
    said(client.get("/api/other/rows"), 404)


def test_an_explanation_made_now_shows_at_the_next_card_and_list(opened, live, tmp_path):
    folder = shutil.copytree(live.cache.folder, tmp_path / "cache", ignore=shutil.ignore_patterns("*.sqlite*"))
    app = create_app(*open_with_live(FeatureCache.open(folder), live.tokenizer, sae=live.sae, model=live.model))
    latent = next(i for i, e in opened[0].explanations["rules"].items() if e.status == "ok")
    with TestClient(app, base_url=ADDRESS) as client:
        assert client.get("/api/rows").json()["status"][latent] == "not explained"
        text = client.post("/api/live/explain", json={"latent": latent}).json()["explanations"][0]["text_it"]
        assert client.get(f"/api/card/{latent}").json()["explanations"][0]["text_it"] == text
        assert client.get("/api/rows").json()["explanation_it"][latent] == text


# --- whom it refuses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host, status",
    [
        ("127.0.0.1:8765", 200),
        ("localhost", 200),
        ("LOCALHOST:9000", 200),
        ("[::1]:8765", 200),
        ("evil.example", 400),
        ("127.0.0.1.evil.example", 400),
        ("localhost.evil.example:8765", 400),
        ("192.168.1.7:8765", 400),
        ("0.0.0.0:8765", 400),
        ("", 400),
        ("localhost:port", 400),
        ("user@localhost", 400),
        ("localhost/..", 400),
    ],
)
def test_only_the_names_of_this_machine_are_answered(client, host, status):
    for path in ("/", "/api/run", "/assets/app.js"):
        assert client.get(path, headers={"host": host}).status_code == status


def test_other_pages_and_forms_cannot_post(client):
    body = {"sentence": "ciao"}
    for origin in (
        "http://evil.example",
        "null",
        "https://localhost.evil.example",
        "http://evil.example@localhost",
        "http://[",
    ):
        said(client.post("/api/live/tokens", json=body, headers={"origin": origin}), 403)
    assert client.post("/api/live/tokens", json=body, headers={"origin": ADDRESS}).status_code == 200
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        said(client.post("/api/live/tokens", content=json.dumps(body), headers={"content-type": kind}), 415)
    for method in ("PUT", "DELETE", "OPTIONS", "TRACE"):
        said(client.request(method, "/api/rows"), 405)


@pytest.mark.parametrize("body", ["[1]", '"ciao"', "null", "{}", '{"sentence": 3}'])
def test_a_search_by_meaning_of_what_is_no_text_is_refused(opened, body):
    headers = {"content-type": "application/json"}
    with TestClient(create_app(*opened, encoder="x"), base_url=ADDRESS, raise_server_exceptions=False) as client:
        assert "not a text" in said(client.post("/api/live/near", content=body, headers=headers), 422)
        assert "not a text" in said(client.get("/api/near/3"), 422)


def test_live_work_asks_for_the_token_of_the_address(opened, live, active, monkeypatch):
    """It may cost money: no other process of this machine, and no page of another port, may ask for it."""
    explained: list[object] = []
    monkeypatch.setattr(type(live), "explain", lambda *_, **__: explained.append(1) or {})
    app = create_app(*opened)
    with Client(app, base_url=ADDRESS) as stranger:
        for headers in ({}, {"x-token": ""}, {"x-token": "guess"}, {"x-token": "à".encode()}):
            assert "token" in said(stranger.post("/api/live/explain", json={"latent": active}, headers=headers), 403)
        assert explained == [] and stranger.get(f"/api/card/{active}").status_code == 200  # reading is free
        for wrong in ("/", "/?token=guess", "/?token=%C3%A0"):
            assert app.token not in stranger.get(wrong).text
        assert f'<meta name="token" content="{app.token}">' in stranger.get(f"/?token={app.token}").text
        known = {"x-token": app.token}
        for origin in ("http://127.0.0.1:3000", "http://localhost:8765", "http://127.0.0.1"):
            body = {"json": {"latent": active}, "headers": {**known, "origin": origin}}
            said(stranger.post("/api/live/explain", **body), 403)
        assert explained == []
        assert stranger.post("/api/live/explain", json={"latent": active}, headers=known).status_code == 200
    assert explained == [1] and create_app(*opened).token != app.token


def test_no_path_leads_to_a_file(client, opened):
    folder = opened[0].cache.folder
    for path in (
        "/assets/../live.py",
        "/assets/%2e%2e/live.py",
        "/assets/..%2f..%2f..%2fetc%2fpasswd",
        "/assets//etc/passwd",
        "/assets/page.html",
        "/assets/fields.yaml",
        f"/assets/{folder}/manifest.json",
        "/manifest.json",
        "/..%5c..%5cetc%5cpasswd",
        "/assets/app.js%00.css",
        "/assets/main.js",
        "/static/main.js",
    ):
        response = client.get(path)
        assert response.status_code == 404, path
        assert "root:" not in response.text and "schema_version" not in response.text


def test_bodies_are_small_and_json(client):
    headers = {"content-type": "application/json"}
    assert "larger" in said(client.post("/api/live/tokens", content=b" " * (MAX_BODY + 1), headers=headers), 413)
    for body in (b"", b"{", b"\xff", b"[" * 50_000, b'{"sentence": "a"'):
        said(client.post("/api/live/tokens", content=body, headers=headers), 400)
    for body in (b'{"sentence": NaN}', b"[]", b'"a"', b"null"):
        said(client.post("/api/live/tokens", content=body, headers=headers), 422)
    assert client.post("/api/live/tokens", content=b'{"sentence": "\\ud800 a"}', headers=headers).status_code == 200


def test_an_upload_that_is_broken_off_is_no_defect(opened, capfd):
    app = create_app(*opened)
    head = f"X-Token: {app.token}\r\nContent-Type: application/json\r\nContent-Length: 99"
    with running(app) as address:
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as half:
            half.sendall(f"POST /api/live/tokens HTTP/1.1\r\nHost: {host}\r\n{head}\r\n\r\n{{".encode())
            assert httpx.get(f"{address}/api/run").status_code == 200  # by then the half is being read
        assert httpx.get(f"{address}/api/run").status_code == 200
    assert capfd.readouterr().err == ""


def test_a_defect_shows_no_insides(opened, monkeypatch):
    source, live = opened
    monkeypatch.setattr(type(source), "card", lambda *_: 1 / 0)
    with TestClient(create_app(source, live), base_url=ADDRESS, raise_server_exceptions=False) as client:
        response = client.get("/api/card/1")
        assert "ZeroDivisionError" in said(response, 500) and "Traceback" not in response.text
        assert response.headers["x-content-type-options"] == "nosniff"
        assert client.get("/api/run").status_code == 200


# --- a cache that changes --------------------------------------------------------------------------------------------------


def test_a_cache_replaced_while_serving_is_said_to_be(opened, tmp_path):
    folder = shutil.copytree(opened[0].cache.folder, tmp_path / "cache")
    source, _ = open_with_live(FeatureCache.open(folder), opened[1].tokenizer, sae=opened[1].sae, model=opened[1].model)
    manifest = folder / "manifest.json"
    with TestClient(create_app(source, opened[1]), base_url=ADDRESS) as client:
        assert client.get("/api/card/1").status_code == 200
        os.utime(manifest, ns=(5, 5))  # touched, the same: goes on
        assert client.get("/api/card/1").status_code == 200
        text = manifest.read_text(encoding="utf-8")
        manifest.write_text(text + "\n", encoding="utf-8")
        for response in (client.get("/api/rows"), client.get("/api/card/1")):
            assert "replaced" in said(response, 409)
        assert "replaced" in said(client.post("/api/live/tokens", json={"sentence": "a"}), 409)
        assert client.get("/").status_code == 200
        shutil.rmtree(folder)
        said(client.get("/api/run"), 409)


# --- many at once ------------------------------------------------------------------------------------------------------------


def test_fifty_clients_at_once_are_all_answered(opened, active):
    """Counts answers, of live work, cards and the list at once; how long they take is not asked."""
    app = create_app(*opened)
    token = {"x-token": app.token}
    with running(app) as address, httpx.Client(base_url=address, headers=token, timeout=120) as client:

        def ask(number: int) -> int:
            if number % 5 == 0:
                return client.get(f"/api/card/{number}").status_code
            if number % 5 == 1:
                return client.get("/api/rows").status_code
            return client.post("/api/live/tokens", json={"sentence": f"La frase numero {number}."}).status_code

        with ThreadPoolExecutor(CLIENTS) as pool:
            assert list(pool.map(ask, range(CLIENTS))) == [200] * CLIENTS
        assert client.get("/api/run").status_code == 200


def test_paths_are_taken_as_they_are(client):
    for path in ("/api/rows/", "/api/run/", "//api/run"):
        assert client.get(path, follow_redirects=False).status_code == 404


def test_what_takes_too_long_is_given_up_and_what_had_not_begun_never_does(opened, monkeypatch):
    release, begun = threading.Event(), []

    def wait(number: int) -> None:
        begun.append(number)
        release.wait(60)

    async def scenario():
        monkeypatch.setattr(server, "SECONDS", 0.05)
        asked = (app.done(app.worker, wait, number) for number in range(3))
        found = await asyncio.gather(*asked, return_exceptions=True)
        assert [error.status for error in found] == [504] * 3  # pyright: ignore
        release.set()
        monkeypatch.setattr(server, "SECONDS", 60)
        assert await app.done(app.worker, lambda: "again") == "again"

    app = create_app(*opened)
    asyncio.run(scenario())
    assert begun == [0]


# --- nasty texts -----------------------------------------------------------------------------------------------------------------


def test_nasty_texts_leave_as_json_only(nasty):
    with TestClient(create_app(*nasty), base_url=ADDRESS) as client:
        assert SCRIPT not in client.get("/").text
        for latent in range(0, 300, 50):
            card = client.get(f"/api/card/{latent}")
            assert card.status_code == 200 and card.headers["content-type"] == "application/json"
            check_card(card.json())
        found = client.post("/api/live/tokens", json={"sentence": SCRIPT}).json()
        assert "".join(piece["text"] for piece in found["tokens"]) == SCRIPT


# --- the port and the command ------------------------------------------------------------------------------------------------


def test_only_loopback_is_bound_and_a_taken_port_names_a_free_one(cache, capsys):
    with bind(0) as taken:
        host, port = taken.getsockname()
        assert host == "127.0.0.1"
        with pytest.raises(UsageError, match=f"port {port} is in use. Port ") as caught:
            bind(port)
        free = int(str(caught.value).rsplit(" ", 1)[1])
        bind(free).close()
        assert main(["browse", str(cache.folder), "--serve", "--port", str(port)]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(UsageError, match="1 to 65535"):
        bind(70_000)


@pytest.mark.parametrize("package", ["uvicorn", "starlette"])
def test_without_the_extra_one_line_says_what_to_install(cache, monkeypatch, capsys, package):
    for module in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "sae_italian.browser.server")
    monkeypatch.delattr("sae_italian.browser.server")
    assert main(["browse", str(cache.folder), "--serve"]) == 2
    error = capsys.readouterr().err
    assert "sae-italian[serve]" in error and package in error and error.count("\n") == 1


def test_the_command_serves_the_cache_with_live_work(cache, monkeypatch, capsys):
    served = []
    monkeypatch.setattr(server, "serve", lambda app, port, ready: (served.append(app), ready("http://127.0.0.1:1/")))
    assert main(["browse", str(cache.folder), "--serve", "--port", "0"]) == 0
    assert "http://127.0.0.1:1/   Ctrl-C ends" in capsys.readouterr().out
    with TestClient(served[0], base_url=ADDRESS) as client:
        assert client.get("/api/run").json()["live"]["llm"] is False
    assert main(["browse", str(cache.folder), "--serve", "--endpoint", "http://localhost:1/v1"]) == 2
    assert "--llm-model" in capsys.readouterr().err


def test_the_command_compares_and_refuses_what_does_not_go_together(cache, compared, monkeypatch, capsys):
    served = []
    monkeypatch.setattr(server, "serve", lambda app, port, ready: served.append(app))
    monkeypatch.setattr("sae_italian.browser.opening.loaded_sae", lambda *_: load_sae(cache.manifest.sae))
    other = compared.source.cache.folder
    assert main(["browse", str(cache.folder), "--compare", str(other), "--serve", "--port", "0"]) == 0
    with TestClient(served[0], base_url=ADDRESS) as client:
        assert client.get("/api/run").json()["compare"] and client.get("/api/matches").status_code == 200
    for arguments, said in (
        (["--latent", "3", "--serve"], "leave out --serve"),
        (["--latent", "3", "--out", "x"], "and --out"),
        ([str(other)], f"{str(other)!r} is no setting here"),
        (["timeot=5", "--serve"], "'timeot=5' is no setting here"),
        (["encoder=nowhere/none", "--serve", "--port", "0"], "model2vec" if find_spec("model2vec") is None else "none"),
        (["other_sae=x"], "--compare CACHE"),
        (["--compare", str(cache.folder / "none"), "--serve", "--port", "0"], "not a feature cache"),
        (["--serve", "--endpoint", "ftp://x", "--llm-model", "m"], "a URL"),
        (["key_env=NO_SUCH_KEY", "--serve", "--endpoint", "http://x/v1", "--llm-model", "m"], "NO_SUCH_KEY"),
    ):
        assert main(["browse", str(cache.folder), *arguments]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


def test_the_address_is_free_again_after_a_stop(opened):
    with running(create_app(*opened)) as address:
        port = int(address.rsplit(":", 1)[1])
        assert httpx.get(address + "/api/run").status_code == 200
    with pytest.raises(httpx.ConnectError):
        httpx.get(address + "/api/run")
    bind(port).close()
    assert socket.gethostbyname("localhost").startswith("127.")
