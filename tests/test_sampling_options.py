"""The options of calls as a user sees them: their names, their help, and what is asked for beside an answer."""

import inspect
import math

import pytest
import torch
from conftest import ScriptedModel, ScriptedTokenizer, tiny_model

from llama import Llama
from llama.sampling_options import BEAM_OPTIONS, OTHER_NAMES, SamplingOptions

METHODS = [name + stream for name in ("generate", "text_completion", "chat_completion") for stream in ("", "_stream")]
REFERENCE = {"prompt_tokens", "prompts", "dialogs", "max_gen_len", "temperature", "top_p", "logprobs", "echo"}


@pytest.fixture(scope="module")
def llama():
    return Llama(tiny_model(), ScriptedTokenizer())


@pytest.mark.parametrize("name", METHODS)
def test_help_shows_every_option_with_its_meaning(name):
    method = getattr(Llama, name)
    parameters, documentation = inspect.signature(method).parameters, inspect.getdoc(method)
    hidden = {"top_logprobs"} if name == "generate" else {*BEAM_OPTIONS} if name.endswith("_stream") else set()
    for option in SamplingOptions.__annotations__.keys() - hidden:
        assert parameters[option].kind is inspect.Parameter.KEYWORD_ONLY
        assert f"\n    {option}: " in documentation, option
    assert not hidden & parameters.keys()
    assert not any(f"\n    {option}: " in documentation for option in hidden)
    entries = documentation.partition("Args:\n")[2].partition("\n\n")[0].splitlines()
    assert all(line.startswith(("    ", "        ")) for line in entries)  # one indentation for all
    assert not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    assert "sampling_options" not in inspect.getdoc(method)  # nothing to be looked up elsewhere


def test_positional_arguments_are_those_of_the_reference():
    for name in METHODS:
        parameters = inspect.signature(getattr(Llama, name)).parameters
        positional = [key for key, p in parameters.items() if p.kind is not p.KEYWORD_ONLY]
        assert set(positional[1:]) <= REFERENCE, name


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("max_new_tokens", "it is called max_gen_len here"),
        ("max_tokens", "it is called max_gen_len here"),
        ("do_sample", "temperature=0 takes the likeliest token"),
        ("temprature", r"did you mean temperature\?"),
        ("beams", r"did you mean num_beams\?"),
        ("stop_sequence", "it is called stop here"),
        ("min_p", "give transformers' MinPLogitsWarper as logits_processor"),
        ("options", r"there are prompts, "),
        ("xyz", r"there are prompts, temperature, .*, top_logprobs"),
    ],
)
def test_an_unknown_option_is_refused_with_the_right_one(llama, option, message):
    with pytest.raises(TypeError, match=rf"^text_completion\(\) has no option '{option}': {message}"):
        llama.text_completion(["5"], **{option: 1})


def test_options_that_a_stream_always_refuses_say_why(llama):
    with pytest.raises(ValueError, match="no answer before it is done"):
        llama.generate_stream([[5]], 3, num_beams=2)
    with pytest.raises(TypeError, match="it is an option of generate and text_completion"):
        llama.text_completion_stream(["5"], echo=True)


def test_it_is_refused_before_a_missing_argument_is(llama):
    with pytest.raises(TypeError, match="it is called max_gen_len here"):
        llama.generate([[5]], max_new_tokens=3)
    for name in METHODS:
        with pytest.raises(TypeError, match=rf"^{name}\(\) has no option 'nonsense'"):
            getattr(llama, name)([[5]], nonsense=1)


def test_other_names_lead_to_options_that_exist():
    known = {*SamplingOptions.__annotations__, *REFERENCE}
    for advice in OTHER_NAMES.values():
        if advice.startswith("it is called "):
            assert advice.split()[3] in known, advice


# top_logprobs


@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"stop": ["17 2"]}, {"num_return_sequences": 2}], ids=str)
def test_top_logprobs_are_those_of_log_softmax(llama, options):
    """Computed by hand: from whole sequences, without a cache."""
    texts = ["5 6 7", "8 9 10 11 12"]
    options = {"temperature": 1.0, "top_p": 1.0, "max_gen_len": 6, "seed": 4} | options
    predictions = llama.text_completion(texts, logprobs=True, top_logprobs=3, **options)
    n = options.get("num_return_sequences", 1)
    for row, prediction in enumerate(predictions):
        prompt = llama.tokenizer.encode(texts[row // n], bos=True, eos=False)
        tokens = [int(token) for token in prediction["tokens"]]
        assert len(prediction["top_logprobs"]) == len(tokens) == len(prediction["logprobs"])
        with torch.inference_mode():
            logits = llama.model(torch.tensor([prompt + tokens]))[0]
        expected = torch.log_softmax(logits, dim=-1)[len(prompt) - 1 : -1]  # (tokens, vocab_size)
        for likeliest, logprobs in zip(prediction["top_logprobs"], expected, strict=True):
            values, ids = logprobs.topk(3)
            assert [entry["id"] for entry in likeliest] == ids.tolist()
            assert [int(entry["token"]) for entry in likeliest] == ids.tolist()
            assert [entry["logprob"] for entry in likeliest] == pytest.approx(values.tolist(), abs=1e-4)


@pytest.mark.parametrize("stop", [None, ["40 41"]], ids=["", "with a stop string"])
def test_top_logprobs_in_streams_belong_to_their_tokens(stop):
    llama = Llama(ScriptedModel(), ScriptedTokenizer())
    pieces = list(llama.text_completion_stream(["5"], 0, max_gen_len=4, logprobs=True, top_logprobs=2, stop=stop))
    for piece in pieces:
        if piece.token is not None:
            assert piece.top_logprobs[0] == (piece.token, piece.logprob)
            assert piece.top_logprobs[1][1] == pytest.approx(piece.logprob - 20)
    assert [piece.token for piece in pieces if piece.token is not None] == [6, 7, 8, 9]


def test_top_logprobs_of_an_echo_are_empty_and_more_than_there_are_is_all():
    llama = Llama(ScriptedModel(vocab_size=8), ScriptedTokenizer())
    (answer,) = llama.text_completion(["5 6"], 0, max_gen_len=1, logprobs=True, top_logprobs=100, echo=True)
    assert [len(likeliest) for likeliest in answer["top_logprobs"]] == [0, 0, 0, 8]
    assert sum(math.exp(entry["logprob"]) for entry in answer["top_logprobs"][-1]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_logprobs": 2}, "top_logprobs=2 needs logprobs=True"),
        ({"top_logprobs": -1, "logprobs": True}, "top_logprobs=-1 must be a whole number of at least 0"),
        ({"top_logprobs": 2, "logprobs": True, "num_beams": 2}, "leave top_logprobs out"),
    ],
)
def test_top_logprobs_are_refused_where_they_mean_nothing(llama, options, message):
    with pytest.raises(ValueError, match=message):
        llama.text_completion(["5"], **options)


def test_generate_has_no_place_for_top_logprobs(llama):
    with pytest.raises(ValueError, match="its stream and text_completion do"):
        llama.generate([[5]], 1, logprobs=True, top_logprobs=1)


# details


def test_details_of_texts_and_chats():
    llama = Llama(ScriptedModel(), ScriptedTokenizer(stop_tokens=(9,)))
    details = llama.text_completion(["5 6", "20"], 0, max_gen_len=5, details=True)
    assert details == [
        {"generation": "7 8", "finish_reason": "stop", "prompt_tokens": 3, "completion_tokens": 2},
        {"generation": "21 22 23 24 25", "finish_reason": "length", "prompt_tokens": 2, "completion_tokens": 5},
    ]
    (echoed,) = llama.text_completion(["5 6"], 0, max_gen_len=5, echo=True, stop="8", details=True)
    assert (echoed["generation"], echoed["finish_reason"]) == ("1 5 6 7 ", "stop")
    assert (echoed["prompt_tokens"], echoed["completion_tokens"]) == (3, 2)  # the text of the last begins with a space
    (nothing,) = llama.text_completion(["5 6"], max_gen_len=0, details=True)
    assert (nothing["finish_reason"], nothing["completion_tokens"]) == ("length", 0)


def test_details_of_chats(llama):
    class Format:
        def encode_dialog_prompt(self, dialog):
            return [5, 6, 7]

    chat = Llama(llama.model, llama.tokenizer, formatter=Format())
    (answer,) = chat.chat_completion([[{"role": "user", "content": "?"}]], 0, max_gen_len=2, details=True)
    assert answer.keys() == {"generation", "finish_reason", "prompt_tokens", "completion_tokens"}
    assert answer["prompt_tokens"] == 3


def test_details_of_beams(llama):
    (answer,) = llama.text_completion(["5 6"], max_gen_len=3, num_beams=2, details=True)
    assert answer["completion_tokens"] <= 3
    assert answer["finish_reason"] in ("stop", "length")


def test_without_them_the_keys_are_those_of_the_reference(llama):
    assert llama.text_completion(["5"], max_gen_len=2)[0].keys() == {"generation"}
    assert llama.text_completion(["5"], max_gen_len=2, logprobs=True)[0].keys() == {"generation", "tokens", "logprobs"}
    with pytest.raises(TypeError, match=r"generate\(\) has no option 'details'"):
        llama.generate([[5]], 1, details=True)
