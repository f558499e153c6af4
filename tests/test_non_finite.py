"""NaN and infinity: an error that says which layer computed them, and what to try."""

import pytest
import torch
from conftest import ScriptedModel, ScriptedTokenizer, tiny_model

from llama import Llama
from llama.non_finite import explain_non_finite


def test_the_message_names_the_first_layer_and_the_dtype():
    model = tiny_model()
    weight = model.layers[1].feed_forward.w1.weight
    with torch.no_grad():
        weight[3, 5] = float("nan")
    llama = Llama(model, ScriptedTokenizer())
    for temperature in (0, 0.6):
        with pytest.raises(ArithmeticError, match=r"layer 1 of 2, in float32: a weight is damaged"):
            llama.generate([[5, 6]], 3, temperature)
    with pytest.raises(ArithmeticError, match=r"layer 1 of 2, in float32"):  # rather than NaN among the scores
        llama.generate([[5, 6]], 0, logprobs=True, echo=True)
    with pytest.raises(ArithmeticError, match=r"layer 1 of 2, in float32"):
        list(llama.generate_stream([[5, 6]], 3))
    with pytest.raises(ArithmeticError, match=r"layer 1 of 2, in float32"):
        llama.generate([[5, 6]], 3, num_beams=2)
    with torch.no_grad():
        weight[3, 5] = 0
    assert len(llama.generate([[5, 6]], 3)[0][0]) <= 3  # later calls work
    assert not any(module._forward_hooks for module in model.modules())


def test_after_the_last_layer():
    model = tiny_model()
    with torch.no_grad():
        model.output.weight[7] = float("inf")
    assert "NaN or infinity, after the last layer, in float32: a weight is" in explain_non_finite(model, [5, 6])


def test_values_too_large_for_float16():
    model = tiny_model()
    with torch.no_grad():
        model.layers[0].feed_forward.w2.weight.mul_(1e5)
    llama = Llama(model.half(), ScriptedTokenizer())
    with pytest.raises(ArithmeticError, match=r"layer 0 of 2, in float16.*dtype=torch.bfloat16 or torch.float32"):
        llama.generate([[5, 6]], 3, 0)


def test_nan_after_some_new_tokens():
    """The message comes from all tokens so far: the prompt alone gives no NaN."""
    model = tiny_model()
    llama = Llama(model, ScriptedTokenizer(()))
    (tokens,), _ = llama.generate([[5, 6]], 4, 0)
    with torch.no_grad():
        model.tok_embeddings.weight[tokens[2]] = float("nan")
    with pytest.raises(ArithmeticError, match="first in layer 0 of 2"):
        llama.generate([[5, 6]], 8, 0)


def test_nan_in_one_of_several_beams():
    """The message comes from the tokens of that beam."""
    model = tiny_model()
    llama = Llama(model, ScriptedTokenizer(()))
    first_tokens, _ = llama.generate([[5, 6]], 1, num_beams=3, num_return_sequences=3)
    with torch.no_grad():
        model.tok_embeddings.weight[first_tokens[1]] = float("nan")
    with pytest.raises(ArithmeticError, match="first in layer 0 of 2"):
        llama.generate([[5, 6]], 8, num_beams=3)


def test_a_network_of_another_kind_and_a_logits_processor():
    class NaN(ScriptedModel):
        def forward(self, tokens, start_pos):
            return super().forward(tokens, start_pos) * float("nan")

    with pytest.raises(ArithmeticError, match=r"^the network computed NaN or infinity$"):
        Llama(NaN(), ScriptedTokenizer()).generate([[5, 6]], 3)
    assert explain_non_finite(tiny_model(), [5], processed=True).startswith("after the logits_processor, ")
