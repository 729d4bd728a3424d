"""A T5 that was exported to int8 ONNX, as a folder of Hugging Face's; needs numpy and safetensors.

The package traceforge-title-model holds a FLAN-T5 small so: an encoder, and a decoder with its
output layer, each matrix as 8-bit integers with a scale and a zero point. Nodes have the paths of
the modules that they came from, which give the matrices their names.

ONNX files are protocol buffers; of them only what is needed is read:
https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
"""

import json

import numpy as np
from safetensors.numpy import save_file

CONFIG = {
    "architectures": ["T5ForConditionalGeneration"],
    "model_type": "t5",
    "is_encoder_decoder": True,
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 1024,
    "num_layers": 8,
    "num_decoder_layers": 8,
    "num_heads": 6,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "n_positions": 512,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.0,
}
GRAPH, NODE, INITIALIZER = 7, 1, 5  # numbers of fields
DTYPES = {1: np.float32, 2: np.uint8, 3: np.int8, 6: np.int32, 7: np.int64}
# The beginnings of names in the two files, and of the parameters that they are.
PREFIXES = {
    "m.shared.": "shared.",
    "m.lm_head.": "lm_head.",
    "m.decoder.": "decoder.",
    "enc.": "encoder.",
}


def varint(data, at):
    """(integer, what is behind it) at a place: seven bits a byte, the last below 128."""
    value = shift = 0
    while data[at] >= 128:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
    return value | data[at] << shift, at + 1


def varints(data):
    """Integers one after another."""
    at = 0
    while at < len(data):
        value, at = varint(data, at)
        yield value


def fields(data):
    """(number, value) of each field of a message: an integer, or bytes."""
    at = 0
    while at < len(data):
        key, at = varint(data, at)
        kind, size = key & 7, {1: 8, 5: 4}.get(key & 7)
        if kind != 5 and kind != 1:
            size, at = varint(data, at)
        if kind == 0:
            yield key >> 3, size
            continue
        yield key >> 3, data[at : at + size]
        at += size


def read(file):
    """({name: array} of the constants, [(operator, name, inputs)] of the nodes) of a file."""
    (graph,) = (value for number, value in fields(memoryview(file.read_bytes())) if number == GRAPH)
    arrays, nodes = {}, []
    for number, value in fields(graph):
        if number == INITIALIZER:
            about = list(fields(value))
            shape = [x for n, x in about if n == 1]
            held = dict(about)
            if held.get(2) not in DTYPES:
                continue
            if 9 in held:
                array = np.frombuffer(held[9], DTYPES[held[2]])
            elif 4 in held:  # few numbers are stored in fields of their own: floats,
                array = np.frombuffer(held[4], np.float32)
            else:  # or integers
                array = np.array(list(varints(held.get(5, held.get(7, b"\0")))))
            arrays[bytes(held[8]).decode()] = array.reshape(shape)
        elif number == NODE:
            about = [(n, bytes(x).decode()) for n, x in fields(value) if n in (1, 3, 4)]
            held = dict(about)
            nodes.append((held[4], held.get(3, ""), [x for n, x in about if n == 1]))
    return arrays, nodes


def parameters(file):
    """The weights of a file in float32, by the names of transformers."""
    arrays, nodes = read(file)
    found = {name: x for name, x in arrays.items() if name.endswith("layer_norm.weight")}

    def whole(name):
        """What was quantised: (q - zero point) * scale."""
        quantised = arrays[f"{name}_quantized"].astype(np.float32)
        zero = arrays[f"{name}_zero_point"].astype(np.float32)
        return (quantised - zero) * arrays[f"{name}_scale"]

    for name in arrays:
        if name.endswith(".weight_quantized"):
            found[name.removesuffix("_quantized")] = whole(name.removesuffix("_quantized"))
    for operator, path, inputs in nodes:
        if operator == "MatMulInteger" and inputs[1].endswith("_quantized"):
            name = path.removesuffix("/MatMul_quant").strip("/").replace("/", ".")
            found[f"{name}.weight"] = whole(inputs[1].removesuffix("_quantized")).T
    renamed = {}
    for name, array in found.items():
        prefix = next(p for p in PREFIXES if name.startswith(p))
        renamed[PREFIXES[prefix] + name.removeprefix(prefix)] = np.ascontiguousarray(array)
    return renamed


def write_folder(package, to):
    """Writes config.json, model.safetensors and the tokenizer of the package's folder of data."""
    encoder, decoder = (parameters(package / f"{name}.onnx") for name in ("encoder", "decoder"))
    shared = encoder.pop("encoder.embed_tokens.weight")
    np.testing.assert_array_equal(shared, decoder["shared.weight"])
    to.mkdir(parents=True, exist_ok=True)
    save_file({**encoder, **decoder}, to / "model.safetensors", metadata={"format": "pt"})
    (to / "config.json").write_text(json.dumps(CONFIG))
    (to / "tokenizer.json").write_bytes((package / "tokenizer.json").read_bytes())
    return to
