"""Every behaviour of a server ends in one of three ways: the right answer, a verdict with its reason, one line and exit 2.

`python -m tests.autointerp.llm.test_conformance > docs/endpoints.md` writes the table that people read.
"""

import asyncio
import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from sae_italian.autointerp.explainita import read_split
from sae_italian.autointerp.llm.askers import LLMJudge
from sae_italian.cli import main
from tests.autointerp.explainita.test_explainita import jsonl_of, task2_row
from tests.autointerp.explainita.test_predict import marked_row
from tests.autointerp.llm.behaviours import BEHAVIOURS, RIGHT, Behaviour, as_json, completion
from tests.autointerp.llm.conftest import an_example, an_explanation
from tests.autointerp.llm.endpoint import FakeEndpoint

PAGE = Path(__file__).parents[3] / "docs" / "endpoints.md"
SAID = {
    "answered": "the right answer",
    "unreadable": "kept as unreadable: {words}",
    "stopped": "stops in one line, exit code 2: … {words} …",
}
HEAD = """# What servers do, and what becomes of it

Any OpenAI-compatible server will do (`--endpoint URL --llm-model NAME`). Each row is a habit of real servers, played by
a server of the tests; what becomes of it is tested (tests/autointerp/llm/test_conformance.py prints this page). There
are three ends: the right answer; a verdict that the answer is unreadable, kept with its reason, while the run goes on;
one line with the server's own sentence, and exit code 2. What was answered is kept and never paid for twice: a rerun goes
on from there, and asks again only what failed, what was refused and, with more room, what the token limit cut off.

The commands print how many questions were asked, answered, refused and failed, how many answers could not be used or were
cut, and why. docs/exit-codes.md has the exit codes. Rows that begin with `detection` or `simulation` are of a judge's
questions, three passages or three tokens; a judge asks about the passages of an unreadable answer once more, one by one.

| the server | what becomes of it | requests |
|---|---|---:|
"""


class Playing(FakeEndpoint):
    """Plays one behaviour."""

    def __init__(self, behaviour: Behaviour):
        super().__init__()
        self.behaviour = behaviour

    async def _respond(self, body, writer):
        number = len(self.requests)
        self.requests.append(body)
        sent = self.behaviour.serve(number, body)
        if sent is None:
            return False
        await asyncio.sleep(sent.late)
        head = [f"HTTP/1.1 {sent.status} X", *sent.headers, *[f"Content-Length: {len(sent.body)}"][: sent.length]]
        parts = ["\r\n".join([*head, "Connection: close", "", ""]).encode(), sent.body[: len(sent.body) - sent.cut]]
        for part, slow in zip(parts, (sent.slow_head, not sent.slow_head), strict=True):
            size = sent.piece if sent.drip and slow else len(part)
            for piece in [part[i : i + size] for i in range(0, len(part), size or 1)]:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(sent.drip)
        return False


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rows = [marked_row(1, [f"gli amici <<{verb}>> domani" for verb in ("partiranno", "canteranno", "vedranno")])]
    return jsonl_of(tmp_path_factory.mktemp("data") / "one.jsonl", rows)


@pytest.fixture
def without_long_waits(monkeypatch):
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.01)


def of(question: str) -> list[Behaviour]:
    return [behaviour for behaviour in BEHAVIOURS if behaviour.question == question]


@pytest.mark.parametrize("behaviour", of("explanation"), ids=lambda behaviour: behaviour.name)
def test_what_becomes_of(behaviour, data, tmp_path, capsys, without_long_waits):
    out = tmp_path / "out.jsonl"
    with Playing(behaviour) as endpoint:
        words = ["timeout=0.6", "attempts=2", "concurrency=1", *behaviour.settings]
        where = ["--task", "1", "--explainer", "llm", "--llm-model", "m", "--endpoint", endpoint.url, "--json"]

        def run():
            code = main(["explainita", "predict", str(data), str(out), *words, *where])
            return code, *capsys.readouterr()

        code, told, error = run()
        asked = len(endpoint.requests)
        if behaviour.asked is not None:
            assert asked == behaviour.asked
        if behaviour.outcome == "stopped":
            assert code == 2 and told == "" and not out.exists()
            assert behaviour.words in error and error.count("\n") == 1
            return
        assert code == 0, error
        result = json.loads(told)
        (latent,) = read_split(out, 1)
        counts = result["calls"]
        assert counts["answered"] >= 1 and counts["asked"] == counts["answered"] + counts["refused"] + counts["failed"]
        if behaviour.outcome == "answered":
            assert latent.explanation == RIGHT and (result["unanswered"], result["why"]) == (0, [])
        else:
            assert latent.explanation != "nomi" and result["unanswered"] == 1 == counts["unreadable"]
            assert behaviour.words in result["why"][0]
        assert run()[0] == 0 and len(endpoint.requests) == asked  # what was paid for is not asked again


@pytest.mark.parametrize("behaviour", of("detection"), ids=lambda behaviour: behaviour.name)
def test_what_becomes_of_yes_and_no(behaviour, tmp_path, capsys, without_long_waits):
    """Through the command. An answer that stays unreadable has its passages asked one by one, which this server answers."""
    row, out = task2_row(1, [True, False, True]), tmp_path / "out.jsonl"
    words = ("libri", "case", "pere")
    for example, word in zip(row["examples"], words, strict=True):
        example["str_tokens"][2] = word
    data = jsonl_of(tmp_path / "two.jsonl", [row])
    alone = as_json(completion({"role": "assistant", "content": "[1]"}))
    playing = behaviour._replace(
        serve=lambda n, body: behaviour.serve(n, body) if n < (behaviour.asked or 0) else alone
    )
    with Playing(playing) as endpoint:
        command = ["explainita", "predict", str(data), str(out), "--task", "2", "--judge", "llm", "--llm-model", "m"]
        command += ["--explainer", "llm", "--endpoint", endpoint.url, "concurrency=1", "--json"]
        assert main(command) == 0
        result = json.loads(capsys.readouterr().out)
        unreadable = behaviour.outcome == "unreadable"
        said = [sequence.activating for sequence in read_split(out, 2)[0].sequences]
        # The judge mixes the order; the first of those asked and the last are what this server's answer names.
        prompt = json.dumps(endpoint.requests[0], ensure_ascii=False)
        order = sorted(range(3), key=lambda number: prompt.rindex(words[number]))
        assert said == ([True] * 3 if unreadable else [number != order[1] for number in range(3)])
        assert result["calls"]["unreadable"] == unreadable and (not unreadable or behaviour.words in result["why"][0])
        asked = len(endpoint.requests)
        assert asked == (behaviour.asked or 0) + 3 * unreadable
        assert main(command) == 0 and len(endpoint.requests) == asked


@pytest.mark.parametrize("behaviour", of("simulation"), ids=lambda behaviour: behaviour.name)
def test_what_becomes_of_numbers(behaviour, client_of, without_long_waits):
    with Playing(behaviour) as endpoint:
        for _ in range(2):
            with client_of(endpoint, concurrency=1) as client:
                (found,) = LLMJudge(client).simulate(an_explanation(), [an_example("due pere rosse", {"pere": 1.0})])
                if behaviour.outcome == "answered":
                    assert found.tolist() == [1, 0, 1]
                else:
                    assert found is None and behaviour.words in next(iter(client.reasons))
        assert len(endpoint.requests) == behaviour.asked  # once


def printed() -> str:
    rows = [
        (one.name, SAID[one.outcome].format(words=one.words), "" if one.asked is None else one.asked)
        for one in BEHAVIOURS
        if "GMT" not in one.words
    ]
    text = "".join(f"| {' | '.join(str(cell).replace('|', '¦') for cell in row)} |\n" for row in rows)
    return HEAD + text.replace("<", "\\<")


def test_the_page_says_what_the_table_holds():
    assert PAGE.read_text(encoding="utf-8") == printed()


def test_there_is_enough_of_each():
    assert len(BEHAVIOURS) >= 60 and max(Counter(one.name for one in BEHAVIOURS).values()) == 1
    assert min(Counter(one.outcome for one in BEHAVIOURS).values()) >= 15


if __name__ == "__main__":
    sys.stdout.write(printed())
