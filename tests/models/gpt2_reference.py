"""GPT-2 of Hugging Face transformers as a reference.

`python -m tests.models.gpt2_reference` (with the extra `parity`) writes `gpt2_reference.npz`:
weights of a small model, a batch, and its logits, loss and gradients.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.core import Unembedding
from lmjax.engine.state import paths_of
from lmjax.ops.losses import logits
from lmjax.tasks.causal_lm import CausalLM


def from_torch_names(weights, *, num_heads):
    """Weights of transformers' GPT-2, by its names, as {path: array} of ours."""
    layers = 1 + max(int(k.split(".")[2]) for k in weights if k.startswith("transformer.h."))

    def stack(name):
        return np.stack([weights[f"transformer.h.{i}.{name}"] for i in range(layers)])

    table = weights["transformer.wte.weight"]
    dim = table.shape[1]
    head_dim = dim // num_heads
    # [L, D, 3 D], queries, keys, values one after another -> [L, D, heads, 3, head_dim]
    qkv = stack("attn.c_attn.weight").reshape(layers, dim, 3, num_heads, head_dim)
    qkv_bias = stack("attn.c_attn.bias").reshape(layers, 3, num_heads, head_dim)
    block = "blocks/block"
    return {
        "embed/table": table,
        "positions/table": weights["transformer.wpe.weight"],
        "norm/scale": weights["transformer.ln_f.weight"],
        "norm/bias": weights["transformer.ln_f.bias"],
        f"{block}/attention_norm/scale": stack("ln_1.weight"),
        f"{block}/attention_norm/bias": stack("ln_1.bias"),
        f"{block}/attention/qkv/kernel": qkv.swapaxes(2, 3),
        f"{block}/attention/qkv/bias": qkv_bias.swapaxes(1, 2),
        f"{block}/attention/out/kernel": stack("attn.c_proj.weight").reshape(
            layers, num_heads, head_dim, dim
        ),
        f"{block}/attention/out/bias": stack("attn.c_proj.bias"),
        f"{block}/mlp_norm/scale": stack("ln_2.weight"),
        f"{block}/mlp_norm/bias": stack("ln_2.bias"),
        f"{block}/mlp/up/kernel": stack("mlp.c_fc.weight"),
        f"{block}/mlp/up/bias": stack("mlp.c_fc.bias"),
        f"{block}/mlp/down/kernel": stack("mlp.c_proj.weight"),
        f"{block}/mlp/down/bias": stack("mlp.c_proj.bias"),
    }


def loss_and_gradients(model, weights, tokens):
    """(mean loss, {path: gradient}, logits) of our model at these weights, dropout off."""
    from flax.traverse_util import unflatten_dict

    rows = model.embed.num_rows - len(weights["embed/table"])
    padded = {**weights, "embed/table": np.pad(weights["embed/table"], ((0, rows), (0, 0)))}
    params = jax.tree.map(jnp.asarray, unflatten_dict(padded, sep="/"))
    batch = {
        "tokens": jnp.asarray(tokens[:, :-1]),
        "targets": jnp.asarray(tokens[:, 1:]),
        "weights": jnp.ones(tokens[:, 1:].shape),
    }
    task = CausalLM(model=model)

    def loss(params):
        return task.loss({"params": params}, batch, jax.random.key(0), train=False).loss.value

    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    output = model.apply({"params": params}, jnp.asarray(tokens))
    unembedding: Unembedding = output.unembedding
    found = {k: np.asarray(v) for k, v in paths_of(gradients).items()}
    assert not found["embed/table"][len(weights["embed/table"]) :].any()
    found["embed/table"] = found["embed/table"][: len(weights["embed/table"])]
    return float(value), found, np.asarray(logits(output.hidden_BTD, unembedding))


def main():
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=61, n_positions=24, n_embd=32, n_layer=3, n_head=4,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    with torch.no_grad():  # biases and scales away from 0 and 1, weights large enough to matter
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    tokens = torch.randint(0, 61, (3, 20))
    output = model(tokens, labels=tokens)
    output.loss.backward()
    arrays = {"tokens": tokens, "logits": output.logits, "loss": output.loss}
    for name, parameter in model.named_parameters():
        arrays |= {f"weight:{name}": parameter, f"gradient:{name}": parameter.grad}
    path = Path(__file__).with_suffix(".npz")
    np.savez_compressed(path, **{k: v.detach().numpy() for k, v in arrays.items()})


if __name__ == "__main__":
    main()
