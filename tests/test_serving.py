"""docs/serving.md: its server answers many clients, and notices those that leave."""

import asyncio
import json
import os
import re
import subprocess
import sys

import httpx
import pytest
import torch
from conftest import ROOT

from llama import Llama

# The server of the page, with a count of the model's steps, which can be slowed down.
COUNTED = """
import time
from serve import app, llama

steps, delay, forward = 0, 0.0, llama.model.forward

def counted(*args):
    global steps
    steps += 1
    time.sleep(delay)
    return forward(*args)

llama.model.forward = counted

@app.get("/steps")
async def count(slower: float):
    global delay
    delay = slower
    return steps
"""
# At each step of their answers, the two largest logits differ by 0.002 or more: no rounding decides.
PROMPTS = [f"user {i} {words}" for i in range(25) for words in ("an", "he was in the inner house, thinking")]
MAX_NEW_TOKENS = 32


@pytest.fixture(scope="module")
def server(tiny_checkpoint, tmp_path_factory):
    """The address of a server in a process of its own."""
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    folder = tmp_path_factory.mktemp("server")
    (folder / "serve.py").write_text("".join(re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)))
    (folder / "counted.py").write_text(COUNTED)
    process = subprocess.Popen(
        [sys.executable, "-m", "uvicorn", "counted:app", "--port", "0", "--log-level", "info", "--no-access-log"],
        env=os.environ | {"CKPT_DIR": str(tiny_checkpoint), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
    )
    log = []
    for line in process.stderr:
        log.append(line)
        if address := re.search(r"running on (http://127\.0\.0\.1:\d+)", line):
            break
    else:
        pytest.fail("".join(log))
    yield address[1]
    process.terminate()
    process.communicate(timeout=20)


@pytest.fixture(scope="module")
def expected(tiny_checkpoint):
    """What the plain call returns for each prompt."""
    llama = Llama.build(tiny_checkpoint, None, max_seq_len=256, max_batch_size=1, dtype=torch.float32)
    calls = (llama.text_completion([prompt], temperature=0, max_gen_len=MAX_NEW_TOKENS) for prompt in PROMPTS)
    return [prediction["generation"] for (prediction,) in calls]


async def read_events(client: httpx.AsyncClient, path: str, prompt: str, leave_after: int = 1000) -> list[dict]:
    """The events of an answer; those until the client leaves."""
    events = []
    async with client.stream("POST", path, json={"prompt": prompt}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        async for line in response.aiter_lines():
            if line:
                assert line.startswith("data: ")
                events.append(json.loads(line.removeprefix("data: ")))
            if len(events) == leave_after:
                break
    return events


async def steps(client: httpx.AsyncClient, delay: float = 0.0) -> int:
    """How many steps the model has made; each takes so many seconds longer from now on."""
    response = await client.get("/steps", params={"slower": delay})
    return response.json()


def with_client(server, work):
    async def main():
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=server, timeout=60, limits=limits) as client:
            return await work(client)

    return asyncio.run(main())


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/alone", "/together"])
def test_fifty_clients_at_once(server, expected, path):
    async def answer_all(client):
        before = await steps(client)
        answers = await asyncio.gather(*(read_events(client, path, prompt) for prompt in PROMPTS))
        return answers, await steps(client) - before

    answers, n_steps = with_client(server, answer_all)
    assert len(answers) == 50
    assert ["".join(event["text"] for event in events) for events in answers] == expected
    assert all(events[-1]["ended"] in ("stop", "length") for events in answers)
    assert all(not event["ended"] for events in answers for event in events[:-1])
    assert sum(map(len, answers)) > 50 * 8  # they come in pieces
    if path == "/together":
        assert n_steps <= 8 * MAX_NEW_TOKENS  # of 4 calls, or somewhat more if some clients come late


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/alone", "/together"])
def test_production_stops_when_the_clients_have_left(server, expected, path):
    async def leave(client):
        before = after = await steps(client, delay=0.05)
        await asyncio.gather(*(read_events(client, path, prompt, leave_after=2) for prompt in PROMPTS[:2]))
        while True:
            await asyncio.sleep(0.3)
            last, after = after, await steps(client, delay=0.05)
            if after == last:
                break
        await steps(client)
        return after - before, await read_events(client, path, PROMPTS[0])

    n_steps, events = with_client(server, leave)
    assert n_steps <= MAX_NEW_TOKENS // 2
    assert "".join(event["text"] for event in events) == expected[0]


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/alone", "/together"])
def test_a_prompt_that_is_too_long(server, path):
    response = httpx.post(server + path, json={"prompt": "the user " * 200})
    assert response.status_code == 422
    assert "max_seq_len=256" in response.json()["detail"]
