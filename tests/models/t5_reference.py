"""Small T5 models of Hugging Face transformers, to be agreed with; `measure` needs torch.

`python -m tests.models.t5_reference` (with the extra `parity`) writes `t5_reference.npz`: sources
and targets, some of them padding, and logits, loss and gradients of a T5 v1.1 whose weights are
`weight(...)` of their names.
"""

import zlib
from pathlib import Path

import numpy as np

PATH = Path(__file__).with_name("t5_reference.npz")
HEADS = 3
CONFIG = {
    "vocab_size": 37,
    "d_model": 16,
    "d_kv": 6,
    "d_ff": 20,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": HEADS,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 10,
    "dropout_rate": 0.0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
# Kind -> what is not in CONFIG; the second is the original T5.
KINDS = {
    "v1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "v1.0": {"feed_forward_proj": "relu", "tie_word_embeddings": True},
}
SOURCE, TARGET = 19, 17
# For each row (first, behind the last) real token of source and of target.
REAL = (((4, 19), (3, 17)), ((0, 13), (0, 11)), ((0, 19), (0, 17)))


def weight(name, shape, *, seed=0):
    """A parameter that is far enough from its start, and the same on every machine."""
    drawn = np.random.RandomState(zlib.crc32(name.encode()) + seed).standard_normal(shape)
    if name.endswith("layer_norm.weight"):
        return (1 + 0.2 * drawn).astype(np.float32)
    return ((0.5 if "bias" in name or name == "shared.weight" else 0.25) * drawn).astype(np.float32)


def masks():
    """Which tokens are real, of sources and of targets, int64."""
    found = np.zeros((len(REAL), SOURCE), int), np.zeros((len(REAL), TARGET), int)
    for row, ends in enumerate(REAL):
        for mask, (start, stop) in zip(found, ends, strict=True):
            mask[row, start:stop] = 1
    return found


def model_of(kind, *, seed=0, **changes):
    """The model of transformers with weights of its own; both sides share the token embedding."""
    import torch
    import transformers

    settings = {**CONFIG, **KINDS[kind], **changes}
    config = transformers.T5Config(**settings, attn_implementation="eager")
    config.tie_word_embeddings = KINDS[kind]["tie_word_embeddings"]
    model = transformers.T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for side in (model.encoder, model.decoder):
            side.embed_tokens = model.shared
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(weight(name, parameter.shape, seed=seed)))
    return model


def measure(kind="v1.1", *, seed=0):
    """All that the reference holds, by name, as numpy arrays."""
    import torch

    model = model_of(kind, seed=seed)
    random = np.random.RandomState(seed)
    source = random.randint(2, CONFIG["vocab_size"], (len(REAL), SOURCE))
    tokens = random.randint(2, CONFIG["vocab_size"], (len(REAL), TARGET))
    source_mask, mask = masks()
    labels = np.roll(tokens, -1, axis=1)
    counted = mask * np.roll(mask, -1, axis=1)
    output = model(
        input_ids=torch.as_tensor(source),
        attention_mask=torch.as_tensor(source_mask),
        decoder_input_ids=torch.as_tensor(tokens),
        decoder_attention_mask=torch.as_tensor(mask),
        labels=torch.as_tensor(np.where(counted, labels, -100)),
    )
    output.loss.backward()
    arrays = {
        "source": source,
        "tokens": tokens,
        "targets": labels,
        "weights": counted,
        "logits": output.logits.detach().numpy(),
        "loss": output.loss.detach().numpy(),
    }
    for name, parameter in model.named_parameters():
        arrays[f"gradient:{name}"] = parameter.grad.numpy()
    return arrays


def from_torch_names(found):
    """Arrays of a T5 by our names: products turned round, heads apart, layers stacked."""
    found, ours = dict(found), {}

    def layers(name):
        some = []
        while name.format(len(some)) in found:
            some.append(found.pop(name.format(len(some))))
        return np.stack(some)

    def heads(name):
        w_LED = layers(f"{name}.weight")  # E = heads x head dim
        return w_LED.transpose(0, 2, 1).reshape(len(w_LED), w_LED.shape[2], HEADS, -1)

    for side, norm in (("encoder", "encoder_norm"), ("decoder", "norm")):
        block, to = side + ".block.{}.layer.", f"{side}/block"
        bias = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        ours[f"{side}_bias/bias"] = found.pop(bias)
        ours[f"{norm}/scale"] = found.pop(f"{side}.final_layer_norm.weight")
        attentions = [("0.SelfAttention", "attention")]
        if side == "decoder":
            attentions.append(("1.EncDecAttention", "cross_attention"))
        for theirs, name in attentions:
            q, k, v = (heads(f"{block}{theirs}.{x}") for x in "qkv")
            if name == "attention":
                ours[f"{to}/{name}/qkv/kernel"] = np.stack([q, k, v], axis=3)
            else:
                ours[f"{to}/{name}/q/kernel"] = q
                ours[f"{to}/{name}/kv/kernel"] = np.stack([k, v], axis=3)
            out_LDE = layers(f"{block}{theirs}.o.weight")
            L, D, _ = out_LDE.shape
            ours[f"{to}/{name}/out/kernel"] = out_LDE.transpose(0, 2, 1).reshape(L, HEADS, -1, D)
        last = len(attentions)
        names = {"wi_0": "gate", "wi_1": "up", "wi": "up", "wo": "down"}
        for theirs, name in names.items():
            if f"{block}{last}.DenseReluDense.{theirs}.weight".format(0) in found:
                kernel = layers(f"{block}{last}.DenseReluDense.{theirs}.weight")
                ours[f"{to}/mlp/{name}/kernel"] = kernel.transpose(0, 2, 1)
        norms = ["attention", "cross", "mlp"] if last == 2 else ["attention", "mlp"]
        for i, name in enumerate(norms):
            ours[f"{to}/{name}_norm/scale"] = layers(f"{block}{i}.layer_norm.weight")
    ours["embed/table"] = found.pop("shared.weight")
    if "lm_head.weight" in found:
        ours["unembed/table"] = found.pop("lm_head.weight")
    assert not found, sorted(found)
    return ours


if __name__ == "__main__":
    np.savez_compressed(PATH, **measure())
