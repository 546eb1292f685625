"""A sweep as W&B's own agent runs it: the shipped file, the real `wandb agent`, and a server that stands in for W&B's."""

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sae_italian.training.config import configs_folder
from tests.standing_in import Quiet, StandIn

pytest.importorskip("wandb", reason="needs wandb[sweeps]")
LONG = {"sae.k": 16, "training_tokens": 50_000_000}
GRID: dict[str, dict[str, int]] = {"r1": {"sae.k": 4}, "r2": {"sae.k": 8}, "r3": LONG}


class Server(Quiet):
    """W&B's GraphQL, as far as its agent and an online run ask: it hands out GRID and stops what runs too long."""

    def do_PUT(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer({})

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
        if self.path == "/graphql":
            asked = json.loads(body)
            name = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])
            assert name is not None
            return self.answer({"data": self.stand_in.asked(name[1], asked.get("variables") or {})})
        if self.path.endswith("file_stream"):
            run, files = self.path.split("/")[-2], json.loads(body).get("files") or {}
            lines = files.get("wandb-history.jsonl", {}).get("content", [])
            self.stand_in.history.setdefault(run, []).extend(json.loads(line) for line in lines)
        return self.answer({"exitcode": None, "limits": {}})

    def answer(self, told):
        body = json.dumps(told).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class WeightsAndBiases(StandIn):
    def __init__(self, config: str):
        super().__init__(Server)
        self.config, self.left, self.beats = config, dict(GRID), 0
        self.history: dict[str, list[dict]] = {}
        self.artifacts: list[tuple[str, str]] = []
        self.sweep_of: dict[str, str | None] = {}

    def asked(self, name, given):
        return getattr(self, name, lambda **_: {})(**given)

    def Viewer(self):
        return {"viewer": {"id": "1", "entity": "us", "username": "us", "flags": "{}", "teams": {"edges": []}}}

    def ServerFeaturesQuery(self):
        return {"serverInfo": {"features": []}}

    def SweepWithRuns(self, **_):
        sweep = {
            "id": "S",
            "name": "s1",
            "method": "grid",
            "state": "RUNNING",
            "description": "",
            "config": self.config,
        }
        times = dict.fromkeys(("createdAt", "heartbeatAt"), "2026-01-01T00:00:00Z")
        others = dict.fromkeys(("earlyStopJobRunning", "bestLoss", "controller", "scheduler"))
        return {"project": {"sweep": sweep | times | others | {"runs": {"edges": []}}}}

    def CreateAgent(self, **_):
        return {"createAgent": {"agent": {"id": "A"}}}

    def Heartbeat(self, runState, **_):
        running, commands = json.loads(runState), []
        if not running and self.left:
            run = next(iter(self.left))
            args = {key: {"value": value} for key, value in self.left.pop(run).items()}
            commands = [{"type": "run", "run_id": run, "program": yaml.safe_load(self.config)["program"], "args": args}]
        elif not running:
            commands = [{"type": "exit"}]
        elif "r3" in running and len(self.history.get("r3", [])) > 2:  # as when it falls behind
            commands = [{"type": "stop", "run_id": "r3"}]
        return {"agentHeartbeat": {"agent": {"id": "A"}, "commands": json.dumps(commands)}}

    def UpsertBucket(self, name, sweep=None, **_):
        self.sweep_of.setdefault(name, sweep)
        project = {"id": "P", "name": "sae-italian", "entity": {"id": "E", "name": "us"}}
        run = {
            "id": name,
            "name": name,
            "displayName": name,
            "description": None,
            "config": "{}",
            "historyLineCount": 0,
        }
        return {"upsertBucket": {"bucket": run | {"sweepName": sweep, "project": project}, "inserted": True}}

    def CreateRunFiles(self, files, **_):
        told = [{"name": file, "uploadUrl": f"{self.url}/{file}"} for file in files]
        return {"createRunFiles": {"runID": "R", "uploadHeaders": [], "files": told}}

    def ArtifactType(self, **_):
        return {"project": {"artifact": None}}

    def CreateArtifact(self, input):
        self.artifacts.append((input["artifactTypeName"], input["artifactCollectionName"]))
        known = {"id": "A", "state": "COMMITTED", "artifactSequence": {"latestArtifact": None}}
        return {"createArtifact": {"artifact": known}}


@pytest.mark.slow
def test_the_agent_of_wandb_runs_a_shipped_sweep(tmp_path):
    """Two runs to the end, each in its folder and told to the server; one stopped early, which keeps a checkpoint."""
    shipped = (configs_folder() / "sweeps" / "topk-k.yaml").read_text(encoding="utf-8")
    few = "wandb=online, training_tokens=20000, evaluate_tokens=2000"
    server = WeightsAndBiases(shipped.replace("wandb=online", few))
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    told = {
        "WANDB_BASE_URL": server.url,
        "WANDB_API_KEY": 40 * "a",
        "WANDB_ENTITY": "us",
        "WANDB_AGENT_REPORT_INTERVAL": "1",
    }
    beside = Path(sys.executable).parent
    folders = {f"WANDB_{name}_DIR": str(tmp_path / name) for name in ("CONFIG", "CACHE", "DATA")}
    env = clean | told | folders | {"PATH": f"{beside}{os.pathsep}{clean['PATH']}", "HF_HUB_OFFLINE": "1"}
    agent = [str(beside / "wandb"), "agent", "us/sae-italian/s1"]
    try:
        done = subprocess.run(agent, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=400)
    finally:
        server.close()
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "Traceback" not in said
    assert server.sweep_of == dict.fromkeys(GRID, "s1")
    for run in ("r1", "r2"):
        folder = tmp_path / "runs" / "topk" / run
        assert json.loads((folder / "cfg.json").read_text())["k"] == GRID[run]["sae.k"]
        rows = {key: value for row in server.history[run] for key, value in row.items()}
        card = json.loads((folder / "card.json").read_text())
        assert rows["eval/l0"] == pytest.approx(card["l0"]["value"])
        assert {"metrics/explained_variance", "eval/ce_loss_recovered"} <= rows.keys()
        assert ("sae", f"sae-{run}") in server.artifacts
    assert "stopped; saved at" in said
    assert list((tmp_path / "runs" / "topk" / "r3" / "checkpoints").iterdir())
