"""`llama complete`: continues a text."""

from llama.cli.build import build_draft, build_llama, open_draft
from llama.cli.terminal import print_piece, require_stdout, status_line, text_or_stdin, to_json
from llama.errors import InputError
from llama.sampling_options import SamplingOptions
from llama.sampling_params import SamplingParams


def complete(
    text: str | None = None,
    *,
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    max_gen_len: int = 256,
    temperature: float = 0.6,
    top_p: float = 0.9,
    top_k: int | None = None,
    stop: str | list[str] | None = None,
    seed: int | None = None,
    max_seq_len: int | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    compile: bool = False,
    prompt_lookup: int | None = None,
    draft: str | None = None,
    json: bool = False,
    top_logprobs: int = 0,
) -> None:
    """Continue a text, printing the continuation while it is generated.

    For example: llama complete "The sun rises", or with a file: llama complete < FILE

    Args:
        text: the text, in quotes; by default standard input; one that begins with a dash comes last, after --
        ckpt_dir: the checkpoint: a folder in Meta's or Hugging Face's layout, or a GGUF file; by default
            SmolLM2-135M-Instruct, which is downloaded once
        tokenizer_path: the tokenizer file; by default the one that comes with the checkpoint
        max_gen_len: maximum number of new tokens
        temperature: sampling temperature; 0 always takes the most likely token
        top_p: sample only from the most likely tokens that together reach this probability (nucleus sampling)
        top_k: sample only from this many of the most likely tokens
        stop: a text at which generation stops, and which is not part of the output; may be given several times
        seed: random seed: the same seed samples the same tokens; by default a different one each time
        max_seq_len: maximum number of tokens of text and continuation together; by default 4096, or the model's own
            maximum if that is smaller, or draft's
        dtype: float32, float16 or bfloat16; by default bfloat16 if the device supports it or with quantize, else
            float16 on CUDA and float32 on the CPU; counts for draft, too
        quantize: int8 or int4: keep the weights in 8 or 4 bits, which takes about a half or a third of the memory, and
            loses some precision; counts for draft, too
        compile: compile the decoding step, so that it takes less time; compiling takes some 10 to 30 s, and only the
            first time, since its result is kept on disk; counts for draft, too
        prompt_lookup: speculative decoding: propose up to this many tokens at a time, those that followed when the
            latest ones occurred before; it takes less time where the continuation quotes the text
        draft: speculative decoding: the checkpoint of a smaller model with the same tokenizer, which proposes tokens;
            it takes less time where that often says the same
        json: print one JSON object instead, with the keys prompt, generation, tokens, logprobs, finish_reason (stop or
            length), prompt_tokens and completion_tokens; with prompt_lookup or draft also proposed_tokens and
            accepted_tokens
        top_logprobs: with json, also tell this many of the likeliest tokens in each token's place, under this key
    """
    # Checks everything before the model is loaded, which may take minutes.
    require_stdout()
    options: SamplingOptions = {"top_k": top_k, "stop": stop, "top_logprobs": top_logprobs}
    SamplingParams(max_gen_len, temperature, top_p, True, top_k=top_k, stop=stop, top_logprobs=top_logprobs, seed=seed)
    if top_logprobs and not json:
        raise InputError(f"top_logprobs={top_logprobs} are printed as JSON only: add --json")
    draft_checkpoint = open_draft(draft, prompt_lookup)
    prompt = text_or_stdin(text)
    llama = build_llama(
        ckpt_dir,
        tokenizer_path,
        max_seq_len,
        dtype,
        seed,
        quantize=quantize,
        compile=compile,
        prompt=prompt,
        draft=draft_checkpoint,
    )
    options["prompt_lookup_num_tokens"] = prompt_lookup
    options["draft_model"] = build_draft(draft_checkpoint, llama, dtype, quantize, compile)
    if json:
        (prediction,) = llama.text_completion(
            [prompt], temperature, top_p, max_gen_len, logprobs=True, details=True, **options
        )
        print(to_json({"prompt": prompt, **prediction}))
        return
    n_tokens = len(llama.tokenizer.encode(prompt, bos=getattr(llama.tokenizer, "add_bos", True), eos=False))
    try:
        with status_line(f"prefilling the prompt of {n_tokens} tokens ...") as remove_status:
            for piece in llama.text_completion_stream([prompt], temperature, top_p, max_gen_len, **options):
                remove_status()
                print_piece(piece.text)
    finally:
        print(flush=True)
