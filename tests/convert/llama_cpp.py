"""llama.cpp, by the package xllamacpp: what it makes of a GGUF file."""

import xllamacpp


def log_probabilities(path, text, *, count=20):
    """{token: log-probability} of the likeliest tokens after a text."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup = 64, 1, False
    params.n_gpu_layers, params.verbosity = 0, 0
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads = 1
    server = xllamacpp.Server(params)
    found = server.handle_completions(
        {
            "prompt": text,
            "max_tokens": 1,
            "logprobs": count,
            "temperature": -1.0,  # greedy, and probabilities before any sampler
        }
    )
    (first, *_) = found["choices"][0]["logprobs"]["content"]
    return {entry["id"]: entry["logprob"] for entry in first["top_logprobs"]}
