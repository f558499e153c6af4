"""lm-evaluation-harness: the same scores as with its own class for Hugging Face models, on the same weights."""

import importlib
import json
import logging
import os
import re
import runpy
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import Ranks, ScriptedModel, ScriptedTokenizer, hugging_face_twin, load, tiny_model, write_tokenizer_json

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}  # read when they are imported: no network

import lm_eval.evaluator
import lm_eval.tasks
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import simple_parse_args_string

import llama.embeddings
import llama.evaluation
from llama import Llama
from llama.chat_format import Llama3Format
from llama.embeddings import embed
from llama.errors import InputError
from llama.evaluation import LlamaLM, main

MAX_SEQ_LEN = 64
TEXTS = ["the user is in the house", "another user thinks of the river and of the weather", "he is her brother"]
LONG_TEXT = "the user thinks that the other one is in the house by the river, and then again that he is not. " * 3
TASKS = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "answers": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{question}}",
        "generation_kwargs": {"until": ["j", "us"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match"}, {"metric": "bleu"}],
    },
    "perplexity": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model in Hugging Face's layout, with a tokenizer of the 256 bytes and a few more tokens."""
    folder = tmp_path_factory.mktemp("model")
    hugging_face_twin(tiny_model(vocab_size=524)).save_pretrained(folder)
    write_tokenizer_json(folder)
    return folder


@pytest.fixture(scope="module")
def ours(folder) -> LlamaLM:
    return LlamaLM(Llama.build(folder, None, MAX_SEQ_LEN, 3, device="cpu", dtype=torch.float32))


@pytest.fixture(scope="module")
def theirs(folder) -> HFLM:
    return HFLM(str(folder), device="cpu", dtype="float32", batch_size=3, max_length=MAX_SEQ_LEN)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """A folder of three tasks, on documents in a file."""
    folder = tmp_path_factory.mktemp("tasks")
    documents = [
        {"question": text[:cut], "text": text * (cut // 4), "answer": cut % 3, "choices": [" a", " the house", " h"]}
        for text in TEXTS
        for cut in (5, 11, 17)
    ]
    (folder / "documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    for name, task in TASKS.items():
        dataset = {"data_files": {"test": str(folder / "documents.jsonl")}, "cache_dir": str(folder / "cache")}
        task = {"task": name, "dataset_path": "json", "dataset_kwargs": dataset, "test_split": "test"} | task
        (folder / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML
    return folder


@pytest.fixture(autouse=True)
def quick_harness(monkeypatch):
    """Without a report on this machine, and without an index of all tasks, which take seconds."""
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(TaskManager, include_defaults=False))


def evaluate(model, tasks: Path, **options):
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return lm_eval.simple_evaluate(model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0, **options)


def test_same_scores_as_the_class_for_hugging_face_models(ours, theirs, tasks, tmp_path, monkeypatch):
    """And with the harness's cache, what has been computed is not computed again."""
    our_results = evaluate(ours, tasks, use_cache=str(tmp_path / "cache"))
    their_results = evaluate(theirs, tasks)
    for name in TASKS:
        scores, expected = our_results["results"][name], their_results["results"][name]
        assert scores.keys() == expected.keys()
        for metric, value in expected.items():
            assert scores[metric] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value), metric
        samples = zip(our_results["samples"][name], their_results["samples"][name], strict=True)
        for sample, expected_sample in samples:
            assert_close(sample["filtered_resps"], expected_sample["filtered_resps"])
    assert our_results["results"]["choices"]["acc,none"] > 0
    monkeypatch.setattr(ours, "model", None)
    assert evaluate(ours, tasks, use_cache=str(tmp_path / "cache"))["results"] == our_results["results"]


def assert_close(ours, theirs) -> None:
    """Nested lists are equal, their numbers to 1e-4."""
    if isinstance(theirs, list | tuple):
        for our_item, their_item in zip(ours, theirs, strict=True):
            assert_close(our_item, their_item)
    else:
        assert ours == (pytest.approx(theirs, abs=1e-4) if isinstance(theirs, float) else theirs)


def instances(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, pair, i) for i, pair in enumerate(arguments)]


def test_loglikelihood(ours, theirs, caplog):
    """Contexts that are empty, end with a space, begin with BOS, spell other control tokens, or are too long."""
    greedy = ours.llama.text_completion(["another use"], temperature=0, max_gen_len=4)[0]["generation"]
    contexts = ["", "another use", "the user ", "<|begin_of_text|>the user", "is<|eot_id|>in", LONG_TEXT]
    continuations = [" the", " house by the river", "in", greedy, greedy + "x", "<|eot_id|>"]
    requests = instances("loglikelihood", [(a, b) for a in contexts for b in continuations])
    with caplog.at_level(logging.WARNING, "llama"):
        scores = ours.loglikelihood(requests, disable_tqdm=True)
    assert_close(scores, theirs.loglikelihood(requests, disable_tqdm=True))
    for context in contexts:
        assert ours.tok_encode(context) == theirs.tok_encode(context)
        assert ours.tok_encode(context, add_special_tokens=False) == theirs.tok_encode(context, False)
    assert "6 of 36 contexts don't fit into max_seq_len=64, and lose their beginning" in caplog.text
    is_greedy = {requests[i].args for i, score in enumerate(scores) if score[1]}
    assert ("another use", greedy) in is_greedy
    assert len(is_greedy) < 8


def test_rolling_loglikelihood(ours, theirs):
    """Texts of less than a token a window, of exactly one and two windows, and of several."""
    texts = ["", "x", "x" * (MAX_SEQ_LEN - 1), "x" * MAX_SEQ_LEN, "xy" * MAX_SEQ_LEN, LONG_TEXT]
    requests = instances("loglikelihood_rolling", [(text,) for text in texts])
    assert_close(ours.loglikelihood_rolling(requests, True), theirs.loglikelihood_rolling(requests, True))


def test_generate_until(ours, theirs):
    """Options that differ between requests, stop strings of several tokens, and contexts that are too long."""
    free = ours.llama.text_completion([TEXTS[0]], temperature=0, max_gen_len=20)[0]["generation"]
    options = [
        {"until": [], "max_gen_toks": 20},
        {"until": free[6:9], "max_gen_toks": 20},
        {"until": ["rs"], "max_gen_toks": 20},  # which may begin within a token
        {"until": ["e", "\n\n"], "max_gen_toks": 20, "do_sample": False, "temperature": 0.0},
        {"until": [], "max_new_tokens": 6, "num_beams": 2},
        {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 0.8, "top_k": 1},
    ]
    contexts = [*TEXTS, TEXTS[1][:17], "<|begin_of_text|>" + TEXTS[0], LONG_TEXT]
    requests = instances("generate_until", [(context, option) for context in contexts for option in options])
    # Theirs one by one: what is padded on the left may differ where two tokens are about as likely.
    expected = [theirs.generate_until([request], True)[0] for request in requests]
    assert ours.generate_until(requests, True) == expected
    for option in options[1:4]:
        assert min(len(expected[request.idx]) for request in requests if request.args[1] == option) < 6
    assert "1muse" in expected  # of "1", "m", "user", "s"


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{% endif %}"
)


def test_chat_templates(ours, theirs, folder, monkeypatch):
    """The text of transformers, which is encoded with its control tokens."""
    monkeypatch.setattr(theirs.tokenizer, "chat_template", CHAT_TEMPLATE)
    monkeypatch.setattr(ours.tokenizer, "chat_template", CHAT_TEMPLATE)
    chat = LlamaLM(Llama(ours.model, ours.tokenizer))
    contents = {"system": ["he"], "user": [" the user ", "in"], "assistant": ["is", "th"]}
    roles = ("system", "user", "assistant", "user", "assistant")
    dialog = [{"role": role, "content": contents[role].pop(0)} for role in roles]
    for n_messages, add_generation_prompt in ((2, True), (4, True), (5, False)):
        text = chat.apply_chat_template(dialog[:n_messages], add_generation_prompt)
        assert text == theirs.apply_chat_template(dialog[:n_messages], add_generation_prompt)
        assert chat.tok_encode(text) == theirs.tok_encode(text)
        assert chat.tok_encode(text).count(chat.tokenizer.eos_id) >= n_messages - 1
    assert chat.chat_template(True) == CHAT_TEMPLATE
    other = LlamaLM(Llama(ours.model, ours.tokenizer, formatter=Llama3Format(ours.tokenizer)))
    assert chat.tokenizer_name != other.tokenizer_name


@pytest.mark.parametrize("layout", ["llama3", "llama2"])
def test_chat_formats_without_a_template(layout, request):
    """As in Meta's layout. Llama 2's format begins each turn with BOS, which no text can spell."""
    tokenizer = request.getfixturevalue(layout)
    lm = LlamaLM(Llama(tiny_model(vocab_size=tokenizer.n_words), tokenizer))
    dialog = [{"role": role, "content": "the user"} for role in ("system", "user", "assistant", "user")]
    for n_messages in (2, 4):
        if layout == "llama2" and n_messages == 4:
            with pytest.raises(InputError, match="can't write this dialog as a text"):
                lm.apply_chat_template(dialog)
        else:
            text = lm.apply_chat_template(dialog[:n_messages])
            assert lm.tok_encode(text) == lm.llama.formatter.encode_dialog_prompt(dialog[:n_messages])
            begun = [*dialog[:n_messages], {"role": "assistant", "content": "he"}]
            assert lm.apply_chat_template(begun, add_generation_prompt=False) == text + "he"


def test_the_command(folder, tasks, tmp_path, monkeypatch, capsys):
    output = tmp_path / "results.json"
    arguments = f"--model_args ckpt_dir={folder},max_seq_len=64,dtype=float32 --include_path {tasks} --tasks choices"
    command = f"evaluation --model llama {arguments} --batch_size 2 --output_path {output}"
    monkeypatch.setattr(sys, "argv", command.split())
    main()
    assert "|choices|" in capsys.readouterr().out
    (written,) = tmp_path.glob("results*.json")
    assert json.loads(written.read_text())["results"]["choices"]["acc,none"] > 0


def test_what_is_refused(ours, folder):
    with pytest.raises(InputError, match="batch_size='auto' must be a number"):
        LlamaLM.create_from_arg_string(f"ckpt_dir={folder}", {"batch_size": "auto", "device": None})
    with pytest.raises(InputError, match="dtype='int3'"):
        LlamaLM.create_from_arg_obj({"ckpt_dir": folder, "dtype": "int3"})
    with pytest.raises(InputError, match=r"needs a llama\.Tokenizer, not a ScriptedTokenizer"):
        LlamaLM(Llama(ours.model, ScriptedTokenizer()))
    with pytest.raises(InputError, match="this model is a ScriptedModel"):
        LlamaLM(Llama(ScriptedModel(), ours.tokenizer))
    with pytest.raises(InputError, match="the continuation has 65 tokens, and max_seq_len=64"):
        ours.loglikelihood(instances("loglikelihood", [("x", "y" * 65)]), disable_tqdm=True)
    with pytest.raises(InputError, match="max_gen_toks=64 new tokens leave no space"):
        ours.generate_until(instances("generate_until", [("x", {"until": [], "max_gen_toks": 64})]), disable_tqdm=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"repetition_penalty": 1.2},
            "'repetition_penalty' is not an option of a task that this model has; there are",
        ),
        ({"stop": ["a"]}, "'stop' is not an option of a task that this model has; did you mean until"),
        ({"temprature": 1}, "did you mean temperature"),
        ({"num_return_sequences": 2}, "'num_return_sequences' is not an option of a task"),
        ({"num_beams": 0}, "num_beams=0 must be"),
        ({"max_gen_toks": "many"}, "generation_kwargs=.*'many'"),
        ({"do_sample": "yes"}, "do_sample='yes' must be true or false"),
        ({"do_sample": True, "temperature": 0.0}, "do_sample=True asks for sampling, and temperature=0 for"),
    ],
)
def test_options_of_a_task_that_are_refused(ours, options, message):
    requests = instances("generate_until", [("x", {"until": [], "max_gen_toks": 4} | options)])
    with pytest.raises(InputError, match=message):
        ours.generate_until(requests, disable_tqdm=True)


def test_sampling_without_a_temperature(ours):
    """Which is 1 then, as transformers has it."""
    options = {"until": [], "max_gen_toks": 20, "do_sample": True}
    context = ours.tok_encode(TEXTS[0])
    answers = []
    for seed in range(3):
        requests = instances("generate_until", [(TEXTS[0], options | {"seed": seed})])
        answers += ours.generate_until(requests, disable_tqdm=True)
        (tokens,), _ = ours.llama.generate([context], 20, temperature=1, top_p=1, seed=seed)
        ordinary = [token for token in tokens if token not in ours.tokenizer.special_tokens.values()]
        assert answers[-1] == ours.tokenizer.decode(ordinary)
    assert len(set(answers)) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "pretrained=x",
            "'pretrained' is not a model argument that this model has; did you mean ckpt_dir? There",
        ),
        (
            "ckpt_dir=x,max_length=9",
            "'max_length' is not a model argument that this model has; did you mean max_seq",
        ),
        ("ckpt_dir=x,max_seqlen=9", "did you mean max_seq_len?"),
        ("ckpt_dir=x --max_batch_size 8", "did you mean batch_size?"),
        ("max_seq_len=9", "ckpt_dir is missing, the checkpoint: --model_args ckpt_dir=FOLDER"),
        ("ckpt_dir=x,compile=yes", "compile='yes' must be true or false"),
        ("ckpt_dir=/nowhere", "ckpt_dir='/nowhere' does not exist"),
    ],
)
def test_wrong_model_arguments_are_told_in_one_line(tasks, monkeypatch, arguments, message):
    command = f"evaluation --model llama --model_args {arguments} --include_path {tasks} --tasks choices"
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code.startswith("error: ")
    assert message in ended.value.code
    assert "\n" not in ended.value.code


def test_model_arguments_that_build_has(folder, monkeypatch):
    """A seed, and whether steps are compiled and files mapped, which the command line gives as texts."""
    built = []
    monkeypatch.setattr(Llama, "build", lambda *args, **options: built.append((args, options)))
    llama.evaluation.build(folder)
    arguments = simple_parse_args_string(f"ckpt_dir={folder},seed=7,compile=True,mmap=false,max_seq_len=64")
    llama.evaluation.build(**arguments)
    (default, default_options), (args, options) = built
    assert (default[5], default_options["compile"], default_options["mmap"]) == (1, False, True)
    assert (args[2], args[5], options["compile"], options["mmap"]) == (64, 7, True, False)


def test_without_the_harness(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "llama.evaluation")
    advice = 'llama.evaluation needs the package lm-eval: pip install "llama[eval]"'
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("llama.evaluation", run_name="__main__")
    assert ended.value.code == f"error: {advice}"
    with pytest.raises(ModuleNotFoundError, match=re.escape(advice)):
        importlib.import_module("llama.evaluation")


def test_nan_is_an_error(llama3):
    model = tiny_model(vocab_size=llama3.n_words)
    with torch.no_grad():
        model.layers[1].feed_forward.w2.weight[0, 0] = torch.nan
    with pytest.raises(ArithmeticError, match="first in layer 1 of 2"):
        LlamaLM(Llama(model, llama3)).loglikelihood(instances("loglikelihood", [("a", "b")]), disable_tqdm=True)


def test_two_ranks(monkeypatch, folder, ours):
    """Each holds half of the model, and gets the results of one process."""
    requests = {
        "loglikelihood": [("the user", " is"), (LONG_TEXT, " the house"), ("", "he")],
        "loglikelihood_rolling": [(LONG_TEXT,), ("x",)],
        "generate_until": [("the user", {"until": ["j"], "max_gen_toks": 20})],
    }

    def results(lm: LlamaLM) -> list:
        scores = [getattr(lm, kind)(instances(kind, arguments), True) for kind, arguments in requests.items()]
        return [*scores, embed(lm.llama, ["the user", "a"]).tolist()]

    ranks = Ranks(monkeypatch, 2)
    facts = []
    monkeypatch.setattr(llama.embeddings, "check_ranks_agree", lambda *call: facts.append(ranks.exchange(call)))
    on_ranks = ranks.run(lambda: results(LlamaLM(Llama(load(folder, max_seq_len=MAX_SEQ_LEN), ours.tokenizer))))
    monkeypatch.undo()
    assert on_ranks[0] == on_ranks[1]
    assert_close(on_ranks[0], results(ours))
    # At each call they tell each other what it is: the same, and no error.
    assert len(facts) == 2 * 3
    assert all(first == second and first[1] is None for first, second in facts)
    assert len({str(call) for call, _ in facts}) == 3
