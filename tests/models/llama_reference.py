"""Llama and its kin of Hugging Face transformers, at random weights, by our names."""

from itertools import groupby

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.engine.state import paths_of
from lmjax.ops.losses import logits
from lmjax.tasks.causal_lm import CausalLM


def from_torch_names(weights, *, num_heads, num_kv_heads):
    """Weights of transformers' Llama, Mistral, Mixtral, Qwen or Gemma, as {path: array} of ours."""
    count = 1 + max(int(k.split(".")[2]) for k in weights if k.startswith("model.layers."))
    dense = [f"model.layers.{i}.mlp.gate_proj.weight" in weights for i in range(count)]
    runs = [[i for i, _ in run] for _, run in groupby(enumerate(dense), key=lambda x: x[1])]
    found = {
        "embed/table": weights["model.embed_tokens.weight"],
        "norm/scale": weights["model.norm.weight"],
    }
    if "lm_head.weight" in weights:
        found["unembed/table"] = weights["lm_head.weight"]
    for i, run in enumerate(runs):
        block = "blocks/block" if len(runs) == 1 else f"blocks/parts_{i}/block"
        found |= stacked(weights, run, block, num_heads=num_heads, num_kv_heads=num_kv_heads)
    return found


def stacked(weights, run, block, *, num_heads, num_kv_heads):
    """Those of a run of like layers, as a stack at the path `block`."""
    layers, first = len(run), f"model.layers.{run[0]}."

    def stack(name):
        return np.stack([weights[f"model.layers.{i}.{name}"] for i in run])

    def heads(name, count):
        """[L, heads * head_dim, D] -> [L, D, num_kv_heads, count, head_dim]"""
        w = stack(f"self_attn.{name}.weight")
        return np.moveaxis(w, 1, 2).reshape(layers, w.shape[2], num_kv_heads, count, -1)

    def transposed(name):
        return stack(name).swapaxes(1, 2)

    grouped = num_heads // num_kv_heads
    q, k, v = heads("q_proj", grouped), heads("k_proj", 1), heads("v_proj", 1)
    out = transposed("self_attn.o_proj.weight")
    found = {
        f"{block}/attention_norm/scale": stack("input_layernorm.weight"),
        f"{block}/attention/qkv/kernel": np.concatenate([q, k, v], axis=3),
        f"{block}/attention/out/kernel": out.reshape(layers, num_heads, -1, out.shape[2]),
    }
    if f"{first}pre_feedforward_layernorm.weight" in weights:  # Gemma
        norms = {
            "attention_post_norm": "post_attention",
            "mlp_norm": "pre_feedforward",
            "mlp_post_norm": "post_feedforward",
        }
    else:
        norms = {"mlp_norm": "post_attention"}
    for ours, theirs in norms.items():
        found[f"{block}/{ours}/scale"] = stack(f"{theirs}_layernorm.weight")
    if f"{first}self_attn.q_proj.bias" in weights:
        shapes = {"q": (grouped, -1), "k": (1, -1), "v": (1, -1)}
        biases = [
            stack(f"self_attn.{name}_proj.bias").reshape(layers, num_kv_heads, *shape)
            for name, shape in shapes.items()
        ]
        found[f"{block}/attention/qkv/bias"] = np.concatenate(biases, axis=2)
    if f"{first}self_attn.q_norm.weight" in weights:
        for name in ("q_norm", "k_norm"):
            found[f"{block}/attention/{name}/scale"] = stack(f"self_attn.{name}.weight")
    if f"{first}mlp.gate_proj.weight" in weights:
        for name in ("gate", "up", "down"):
            found[f"{block}/mlp/{name}/kernel"] = transposed(f"mlp.{name}_proj.weight")
    else:
        gate_up = stack("mlp.experts.gate_up_proj")  # [L, E, 2 F, D]
        for name, part in zip(("gate", "up"), np.split(gate_up, 2, axis=2), strict=True):
            found[f"{block}/mlp/{name}_kernel"] = part.swapaxes(2, 3)
        found[f"{block}/mlp/down_kernel"] = stack("mlp.experts.down_proj").swapaxes(2, 3)
        found[f"{block}/mlp/router_kernel"] = transposed("mlp.gate.weight")
    if f"{first}mlp.shared_expert_gate.weight" in weights:
        found[f"{block}/mlp/shared_gate"] = transposed("mlp.shared_expert_gate.weight")
        for name in ("gate", "up", "down"):
            theirs = f"mlp.shared_expert.{name}_proj.weight"
            found[f"{block}/mlp/shared/{name}/kernel"] = transposed(theirs)
    return found


def reference(model, tokens):
    """(weights, logits, loss, gradients) of a torch model, everything away from its start."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    output = model(torch.as_tensor(tokens), labels=torch.as_tensor(tokens))
    output.loss.backward()
    named = {k: p for k, p in model.named_parameters()}
    weights = {k: p.detach().numpy() for k, p in named.items()}
    gradients = {k: p.grad.numpy() for k, p in named.items()}
    return weights, output.logits.detach().numpy(), output.loss.item(), gradients


def ours(model, weights, tokens):
    """(logits, mean loss, {path: gradient}) of our model at these weights."""
    from flax.traverse_util import unflatten_dict

    params = jax.tree.map(jnp.asarray, unflatten_dict(weights, sep="/"))
    batch = {
        "tokens": jnp.asarray(tokens[:, :-1], jnp.int32),
        "targets": jnp.asarray(tokens[:, 1:], jnp.int32),
        "weights": jnp.ones(tokens[:, 1:].shape),
    }

    def loss(params):
        task = CausalLM(model=model)
        return task.loss({"params": params}, batch, jax.random.key(0), train=False).loss.value

    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    output = jax.jit(model.apply)({"params": params}, jnp.asarray(tokens, jnp.int32))
    found = np.asarray(logits(output.hidden_BTD, output.unembedding))
    return found, float(value), {k: np.asarray(v) for k, v in paths_of(gradients).items()}
