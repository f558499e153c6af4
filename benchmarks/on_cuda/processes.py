"""`cuda_acceptance.py processes`: several processes, NCCL, and too little memory on a GPU.

The checks start this file as programs of their own, which do one after the other what `PROGRAMS` says.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as groups

from llama import Llama, Tokenizer
from llama.checkpoint import save_checkpoint
from on_cuda.models import answering, copy_to, prepare, random_model, write_tokenizer
from on_cuda.report import Check, Context, Skipped, require

PROMPTS = ("The quick brown fox", "The")
DIALOG: Any = [{"role": "user", "content": "Who are you?"}]
N_TOKENS = 12
PROGRAM_SECONDS = 100
END_SECONDS = 60  # in which all processes must have ended after one has failed

# What each program does, and the number of its processes under torchrun; None: one without torchrun.
PROGRAMS: dict[tuple[str, ...], int | None] = {
    ("serve", "fine_tune"): 1,
    ("refuse_same_gpu", "refuse_missing_gpu", "share_gpu", "raise_on_one"): 2,
    ("kill_one",): 2,
    ("no_memory_to_build", "no_memory_to_generate"): None,
}
DRY_PROGRAMS: dict[tuple[str, ...], int | None] = {  # fewer, since starting them takes most of the time
    ("serve", "fine_tune", "no_memory_to_build", "no_memory_to_generate"): 1,
    ("refuse_same_gpu", "refuse_missing_gpu", "share_gpu", "raise_on_one"): 2,
    ("kill_one",): 2,
}


class Finished(NamedTuple):
    """A program that has ended.

    Attributes:
        results: of each thing that it did, what rank 0 has found, or {"error": …}.
        status: its exit status.
        seconds: from a rank's failure to the end; None if none was to fail.
        output: what it printed.
    """

    results: dict[str, Any]
    status: int
    seconds: float | None
    output: str


_finished: dict[tuple[str, ...], Finished] = {}  # several checks look at what one program does


def run_program(job: str, context: Context) -> Finished:
    """Run the program that does a job, unless it has run already."""
    programs = DRY_PROGRAMS if context.dry else PROGRAMS
    jobs = next(jobs for jobs in programs if job in jobs)
    if jobs not in _finished:
        _finished[jobs] = start_program(jobs, programs[jobs], context)
    return _finished[jobs]


def start_program(jobs: tuple[str, ...], n_ranks: int | None, context: Context) -> Finished:
    """Run a program to its end; AssertionError if it goes on for too long."""
    folder, command = context.folder, [sys.executable]
    write_model(context)
    if n_ranks is not None:
        command += ["-m", "torch.distributed.run", "--standalone", "--local_addr", "127.0.0.1"]
        command += ["--nproc_per_node", str(n_ranks)]
    command += [__file__, str(folder), *jobs, *["--dry"] * context.dry]
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=PROGRAM_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"{jobs} did not end in {PROGRAM_SECONDS} s:\n{output[-3000:]}") from None
    failing, end = folder / "failing", time.time()
    return Finished(
        results={job: json.loads(path.read_text()) for job in jobs if (path := folder / f"{job}.json").exists()},
        status=process.returncode,
        seconds=end - failing.stat().st_mtime if failing.exists() else None,
        output=output,
    )


def write_model(context: Context) -> None:
    """Write the tiny model in float32, with a tokenizer, and examples to train it on."""
    prepare(context)
    path = context.folder / "tokenizer.model"
    write_tokenizer(path)
    save_checkpoint(context.folder / "model", random_model("tiny", context, torch.device("cpu")), Tokenizer(path))
    lines = [{"prompt": f"What is {i}?", "completion": f"{i} is {i}."} for i in range(16)]
    (context.folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))


def result(job: str, context: Context) -> Any:
    """What rank 0 has found in a job; AssertionError if it was not done."""
    program = run_program(job, context)
    found = program.results.get(job, {"error": f"exit status {program.status}: {program.output[-3000:]}"})
    require("error" not in found, f"{job}: {found.get('error')}")
    return found


def tokens_of_one_process(context: Context) -> list[list[int]]:
    """The greedy tokens of the tiny model, computed in this process, without torchrun."""
    device = prepare(context)
    model = copy_to(random_model("tiny", context, torch.device("cpu")), device)
    path = context.folder / "tokenizer.model"
    write_tokenizer(path)
    return answering(model).generate(encoded(Tokenizer(path)), N_TOKENS, 0)[0]


def encoded(tokenizer: Any) -> list[list[int]]:
    """Two prompts of different lengths."""
    return [tokenizer.encode(prompt, bos=True, eos=False) for prompt in PROMPTS]


# The checks.


def check_one_rank(context: Context) -> None:
    """torchrun with one rank: NCCL, greedy tokens as without it, a dialog, a saved model that loads again."""
    found = result("serve", context)
    context.record("backend", found["backend"])
    require(found["backend"] == ("gloo" if context.dry else "nccl"), f"the backend is {found['backend']}")
    expected = tokens_of_one_process(context)
    require(found["tokens"] == expected, f"{found['tokens']} are other tokens than without torchrun, {expected}")
    require(found["saved"] == expected, f"the saved model gives {found['saved']}")
    require(isinstance(found["answer"], str), f"the answer to a dialog is {found['answer']!r}")


def check_fine_tuning(context: Context) -> None:
    """torchrun with one rank: the loss falls, and the result loads."""
    found = result("fine_tune", context)
    before, *_, after = found["losses"]
    context.record("validation loss", after, before=before)
    require(after < before, f"the loss doesn't fall: {found['losses']}")
    require(found["n_tokens"] > 0, "the result generates nothing")


def check_shared_gpu(context: Context) -> None:
    """Groups that the caller has made, of gloo, let two ranks share a GPU; the tokens are those of one process."""
    found, expected = result("share_gpu", context), tokens_of_one_process(context)
    require(found["tokens"] == expected, f"{found['tokens']} are other tokens than in one process, {expected}")
    require(found["sampled"] == found["sampled_again"], "the same seed gives other tokens")


def check_refused(job: str, context: Context) -> None:
    """All ranks get the error."""
    messages = result(job, context)["messages"]
    context.record("the error", messages[0])
    for rank, message in enumerate(messages):
        require("cuda" in message, f"rank {rank}: {message!r}")


def check_missing_gpu(context: Context) -> None:
    if not context.dry and torch.cuda.device_count() > 1:
        raise Skipped("there are several GPUs")
    check_refused("refuse_missing_gpu", context)


def check_failing_rank(job: str, context: Context) -> None:
    """A rank that fails within a call ends all processes, soon."""
    program = run_program(job, context)
    require(program.seconds is not None, f"no rank has come to its failure:\n{program.output[-3000:]}")
    seconds = program.seconds or 0.0
    context.record("all processes had ended after", seconds, "s")
    require(program.status != 0, "torchrun's exit status is 0")
    require(seconds < END_SECONDS, f"the processes went on for {seconds:.0f} s")


def check_no_memory(job: str, advice: str, context: Context) -> None:
    """The error says what to do, and the next thing works, which takes less memory."""
    found = result(job, context)
    context.record("the error", found["message"])
    require(advice in found["message"], f"{advice!r} is not in {found['message']!r}")
    require(found["n_tokens"] == N_TOKENS, "afterwards there was no answer")


CHECKS = [
    Check("one rank: generate, chat, save", check_one_rank, 120),
    Check("one rank: fine-tune", check_fine_tuning, 120),
    Check("cuda:0 on two ranks is refused", lambda context: check_refused("refuse_same_gpu", context), 120),
    Check("more ranks than GPUs are refused", check_missing_gpu, 120),
    Check("two ranks on one GPU, in the caller's gloo groups", check_shared_gpu, 120),
    Check("a rank that raises ends all", lambda context: check_failing_rank("raise_on_one", context), 120),
    Check("a rank that is killed ends all", lambda context: check_failing_rank("kill_one", context), 120),
    Check(
        "out of memory at build",
        lambda context: check_no_memory("no_memory_to_build", "a lower max_batch_size or max_seq_len", context),
        120,
    ),
    Check(
        "out of memory in generate",
        lambda context: check_no_memory("no_memory_to_generate", "fewer prompts", context),
        120,
    ),
]


# What the programs do, in their processes.


def build(folder: Path, device: str | None, max_seq_len: int = 128, max_batch_size: int = 2) -> Llama:
    return Llama.build(folder, None, max_seq_len, max_batch_size, device=device, dtype=torch.float32)


def serve(folder: Path, device: str) -> dict[str, Any]:
    llama = build(folder / "model", device)
    model: Any = llama.model
    tokenizer: Any = llama.tokenizer
    (answer,) = llama.chat_completion([DIALOG], max_gen_len=N_TOKENS)
    tokens, _ = llama.generate(encoded(tokenizer), N_TOKENS, 0)
    save_checkpoint(folder / "saved", model, tokenizer)
    return {
        "backend": dist.get_backend(),
        "tokens": tokens,
        "answer": answer["generation"]["content"],
        "saved": build(folder / "saved", device).generate(encoded(tokenizer), N_TOKENS, 0)[0],
    }


def fine_tune(folder: Path, device: str) -> dict[str, Any]:
    from llama.finetune import finetune

    options: dict[str, Any] = {"batch_size": 4, "lr": 1e-3, "epochs": 4, "max_seq_len": 96, "val_fraction": 0.2}
    finetune(str(folder / "data.jsonl"), str(folder / "tuned"), str(folder / "model"), **options)
    lines = (folder / "tuned" / "metrics.jsonl").read_text().splitlines()
    tokens, _ = build(folder / "tuned", device).generate([[1, 2, 3]], N_TOKENS)
    losses = [entry["validation_loss"] for entry in map(json.loads, lines) if "validation_loss" in entry]
    return {"losses": losses, "n_tokens": len(tokens[0])}


def refuse_same_gpu(folder: Path, device: str) -> dict[str, Any]:
    return refusals(folder, "cuda:0", "same")


def refuse_missing_gpu(folder: Path, device: str) -> dict[str, Any]:
    return refusals(folder, "cuda", "missing")


def refusals(folder: Path, device: str, name: str) -> dict[str, Any]:
    """The errors of two ranks that both ask for this device."""
    message = "it was accepted"
    try:
        build(folder / "model", device)
    except ValueError as error:
        message = str(error)
    paths = [folder / f"{name}-{rank}" for rank in range(2)]
    ours = paths[int(os.environ["RANK"])]
    ours.with_suffix(".part").write_text(message)
    ours.with_suffix(".part").replace(ours)
    deadline = time.time() + 30
    while not all(path.exists() for path in paths) and time.time() < deadline:
        time.sleep(0.05)
    return {"messages": [path.read_text() if path.exists() else "nothing in 30 s" for path in paths]}


def share_gpu(folder: Path, device: str) -> dict[str, Any]:
    llama = build_shared(folder, device)
    prompts = encoded(llama.tokenizer)
    sampled = [llama.generate(prompts, N_TOKENS, 1.0, seed=4)[0] for _ in range(2)]
    tokens, _ = llama.generate(prompts, N_TOKENS, 0)
    return {"tokens": tokens, "sampled": sampled[0], "sampled_again": sampled[1]}


def build_shared(folder: Path, device: str) -> Llama:
    """A model that is split over ranks which have the same GPU."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
        groups.initialize_model_parallel(dist.get_world_size())
    return build(folder / "model", "cuda:0" if device == "cuda" else device)


def raise_on_one(folder: Path, device: str) -> dict[str, Any]:
    fail_within_call(folder, device, kill=False)
    return {}


def kill_one(folder: Path, device: str) -> dict[str, Any]:
    fail_within_call(folder, device, kill=True)
    return {}


def fail_within_call(folder: Path, device: str, kill: bool) -> None:
    """Fail on the second rank, in the fourth step of a call."""
    n_steps = 0

    def processor(input_ids: object, scores: torch.Tensor) -> torch.Tensor:
        nonlocal n_steps
        n_steps += 1
        if n_steps == 4 and dist.get_rank() == 1:
            (folder / "failing").touch()
            if kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise SystemExit("raised by a logits_processor of one rank")
        return scores

    build_shared(folder, device).generate([[1, 2, 3]], 60, logits_processor=processor)


def no_memory_to_build(folder: Path, device: str) -> dict[str, Any]:
    message = "it was built"
    try:
        build(folder / "model", device, max_seq_len=8192, max_batch_size=100_000)  # 840 GB of KV cache
    except MemoryError as error:
        message = str(error)
    tokens, _ = build(folder / "model", device).generate([[1, 2, 3]], N_TOKENS)
    return {"message": message, "n_tokens": len(tokens[0])}


def no_memory_to_generate(folder: Path, device: str) -> dict[str, Any]:
    llama = build(folder / "model", device, max_seq_len=8192, max_batch_size=8)
    llama.generate([[1, 2, 3]], N_TOKENS)
    message = "an answer was generated"
    limit_memory(device, 2**24)
    try:
        llama.generate([[5] * 8000] * 8, 4)  # the vectors of its tokens alone take 33 MB
    except MemoryError as error:
        message = str(error)
    limit_memory(device, None)
    tokens, _ = llama.generate([[1, 2, 3]], N_TOKENS)
    return {"message": message, "n_tokens": len(tokens[0])}


def limit_memory(device: str, more: int | None) -> None:
    """Let this process allocate so many bytes more on the device; None for as many as there are."""
    if device == "cuda":
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(device).total_memory
        fraction = 1.0 if more is None else (torch.cuda.memory_reserved(device) + more) / total
        torch.cuda.set_per_process_memory_fraction(fraction)
        return
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (hard if more is None else used + more, hard))


def do_jobs(folder: Path, jobs: list[str], device: str) -> None:
    """Do one after the other, and write what rank 0 has found in each, or its error."""
    for job in jobs:
        try:
            found = globals()[job](folder, device)
        except Exception:
            traceback.print_exc()
            found = {"error": traceback.format_exc()[-3000:]}
        if os.environ.get("RANK", "0") == "0":
            (folder / f"{job}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    folder, *jobs = sys.argv[1:]
    dry = "--dry" in jobs
    do_jobs(Path(folder), [job for job in jobs if job != "--dry"], "cpu" if dry else "cuda")
