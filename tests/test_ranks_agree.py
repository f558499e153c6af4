"""Ranks whose calls differ end with the reason, and go on with the next call; those that have lost torchrun end."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forked import fork_python

SCRIPT = """
import json, os, sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from conftest import ScriptedTokenizer, tiny_args
from llama import Llama, Transformer, distributed
distributed.setup("cpu", None)
rank = int(os.environ["RANK"])
torch.manual_seed(0)
llama = Llama(Transformer(tiny_args()), ScriptedTokenizer(()))
drafts = [Llama(Transformer(tiny_args(n_layers=n)), ScriptedTokenizer(())) for n in (1, 3)]
PROMPTS = [[5, 6, 7], [8, 9]]
n_calls = 0

def fails(input_ids, scores):
    global n_calls
    n_calls += 1
    if rank == 1 and n_calls % 3 == 0:
        raise KeyError("on rank 1 alone")
    return scores

def not_a_number(input_ids, scores):
    return scores * torch.nan if rank == 1 else scores

def other(value, others):
    return others if rank == 1 else value

def stream(prompts, *arguments, **options):
    return list(llama.generate_stream(prompts, *arguments, **options))

CALLS = {
    "prompts": lambda: llama.generate([[5, 6, other(7, 8)], [8, 9]], 5),
    "lengths": lambda: llama.generate([[5, 6, 7], [8, 9, *other([], [1])]], 5),
    "number of prompts": lambda: llama.generate(PROMPTS[: other(2, 1)], 5),
    "seed": lambda: llama.generate(PROMPTS, 5, seed=other(1, 2)),
    "temperature": lambda: llama.generate(PROMPTS, 5, other(0.6, 0.7)),
    "max_gen_len": lambda: llama.generate(PROMPTS, other(5, 6)),
    "beams": lambda: llama.generate(PROMPTS, 5, num_beams=other(1, 2)),
    "method": lambda: other(llama.generate, stream)(PROMPTS, 5),
    "refused on one": lambda: llama.generate(other(PROMPTS, [[]]), 5),
    "processor raises": lambda: llama.generate(PROMPTS, 5, logits_processor=fails),
    "processor raises in beams": lambda: llama.generate(PROMPTS, 5, num_beams=2, logits_processor=fails),
    "processor raises in a stream": lambda: stream(PROMPTS, 5, logits_processor=fails),
    "NaN": lambda: llama.generate(PROMPTS, 5, logits_processor=not_a_number),
    "lookup": lambda: llama.generate(PROMPTS, 5, prompt_lookup_num_tokens=other(None, 4)),
    "draft": lambda: llama.generate(PROMPTS, 5, draft_model=other(*drafts)),
}
results = {}
for name, call in CALLS.items():
    n_calls = 0
    try:
        call()
        results[name] = "nothing was raised"
    except Exception as error:
        results[name] = f"{type(error).__name__}: {error}"
    results[name, "next"] = llama.generate(PROMPTS, 4, 0, logits_processor=lambda input_ids, scores: scores)[0]
Path(sys.argv[2] + str(rank)).write_text(json.dumps([[str(key), value] for key, value in results.items()]))
"""

REASONS = {
    "prompts": "prompts is 2 of 5 tokens with the checksum",
    "lengths": "prompts is 2 of 5 tokens",
    "number of prompts": "prompts is 2 of 5 tokens",
    "seed": "seed is 1 and 2",
    "temperature": "temperature is 0.6 and 0.7",
    "max_gen_len": "max_gen_len is 5 and 6",
    "beams": "num_beams is 1 and 2",
    "method": "method is generate and generate_stream",
    "refused on one": "InputError: prompt 0 is empty",
    "processor raises": "KeyError: 'on rank 1 alone'",
    "processor raises in beams": "KeyError: 'on rank 1 alone'",
    "processor raises in a stream": "KeyError: 'on rank 1 alone'",
    "NaN": "rows for which the logits_processor leaves a token to choose",
    "lookup": "prompt_lookup_num_tokens is None and 4",
    "draft": "draft_model is {",
}


@pytest.mark.slow
def test_all_ranks_end_with_the_reason(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    begin = time.monotonic()
    process = fork_python(script, Path(__file__).parent, tmp_path / "rank", ranks=2)
    assert process.returncode == 0, process.stderr
    assert time.monotonic() - begin < 100  # none waited for a timeout
    ranks = [dict(json.loads((tmp_path / f"rank{rank}").read_text())) for rank in range(2)]
    for name, reason in REASONS.items():
        for results in ranks:
            assert reason in results[name], (name, results[name])
    after = [results for results in ranks[0].values() if isinstance(results, list)]
    assert len(after) == len(REASONS)
    assert all(tokens == after[0] for tokens in after)
    assert ranks[0] == ranks[1]


LOOP = """
import os, sys, time
from pathlib import Path
from llama import distributed
distributed.setup("cpu", None)
Path(sys.argv[1] + os.environ["RANK"]).write_text(str(os.getpid()))
while True:
    time.sleep(0.1)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at /proc")
def test_processes_end_when_torchrun_is_killed(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(LOOP)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
    process = subprocess.Popen([*command, tmp_path / "pid"])
    files = [tmp_path / "pid0", tmp_path / "pid1"]
    wait_until(lambda: all(file.exists() and file.read_text() for file in files), 60)
    process.kill()
    process.wait()
    pids = [int(file.read_text()) for file in files]
    try:
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 10)
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def wait_until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)
