"""`python -m benchmarks.convert [--gigabytes=1] [--rounds=5] [--folder=DIR]`: import and read.

A Llama of random weights in bfloat16 is written as one safetensors file. Then, in turns: the file
is read from the disk (its pages are dropped first), read again from memory, copied and synced, read
straight into arrays as `init_from` does, and imported, which writes a checkpoint of the same size
and syncs it. Prints medians and, of each round, ratios to reading from the disk and to the copy,
the bound of what writes as much. --folder says on which disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, models

from lmjax.convert.imports import import_folder
from lmjax.convert.weights import open_source

DIM, HIDDEN, HEADS, KV_HEADS, VOCAB = 2048, 8192, 32, 8, 32000
BLOCK = 2**24  # bytes read or copied at once


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=None)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        import_folder(write(folder / "tiny", dim=64, hidden=64, num_layers=1), folder / "warm")
        layer = 2 * (2 * DIM * DIM + 2 * DIM * DIM * KV_HEADS // HEADS + 3 * DIM * HIDDEN)
        num_layers = max(1, round((given.gigabytes * 1e9 - 4 * VOCAB * DIM) / layer))
        source = write(folder / "in", dim=DIM, hidden=HIDDEN, num_layers=num_layers)
        file, run = source / "model.safetensors", folder / "run"
        size = file.stat().st_size
        takes: dict[str, Callable[[], object]] = {
            "read, from the disk": lambda: read(file),
            "read, from memory": lambda: read(file),
            "copied and synced": lambda: copy(file, folder / "copy"),
            "read into arrays": lambda: into_arrays(source),
            "imported": lambda: import_folder(source, run),
        }
        took: dict[str, list[float]] = {what: [] for what in takes}
        for _ in range(given.rounds):
            for what, take in takes.items():
                (folder / "copy").unlink(missing_ok=True)
                shutil.rmtree(run, ignore_errors=True)
                if what != "read, from memory":
                    drop(file)
                began = time.perf_counter()
                take()
                took[what].append(time.perf_counter() - began)
    print(f"{size / 1e9:.2f} GB, {given.rounds} rounds, load {os.getloadavg()[0]:.1f}; medians:")
    for what, seconds in took.items():
        ratios = [
            statistics.median(a / b for a, b in zip(took[base], seconds, strict=True))
            for base in ("read, from the disk", "copied and synced")
        ]
        print(
            f"{what:20} {statistics.median(seconds):6.2f} s  "
            f"{size / 1e9 / statistics.median(seconds):5.2f} GB/s  "
            f"{ratios[0]:5.2f} of reading  {ratios[1]:5.2f} of copying"
        )


def write(folder: Path, *, dim: int, hidden: int, num_layers: int) -> Path:
    """A folder of Hugging Face's with random weights in bfloat16."""
    kv = dim * KV_HEADS // HEADS
    shapes: dict[str, tuple[int, ...]] = {"model.norm.weight": (dim,)}
    shapes |= {name: (VOCAB, dim) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    for layer in range(num_layers):
        for name, shape in {
            "self_attn.q_proj": (dim, dim),
            "self_attn.k_proj": (kv, dim),
            "self_attn.v_proj": (kv, dim),
            "self_attn.o_proj": (dim, dim),
            "mlp.gate_proj": (hidden, dim),
            "mlp.up_proj": (hidden, dim),
            "mlp.down_proj": (dim, hidden),
            "input_layernorm": (dim,),
            "post_attention_layernorm": (dim,),
        }.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    drawn = np.random.default_rng(0).normal(size=2**20).astype(ml_dtypes.bfloat16)
    folder.mkdir()
    weights = {name: np.resize(drawn, shape) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": dim,
        "intermediate_size": hidden,
        "num_hidden_layers": num_layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 2048,
    }
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def read(file: Path) -> None:
    """All of a file, block by block."""
    block = np.empty(BLOCK, np.uint8)
    with file.open("rb", buffering=0) as opened:
        while opened.readinto(block.data):
            pass


def copy(file: Path, to: Path) -> None:
    """A file, synced."""
    with file.open("rb") as source, to.open("wb") as target:
        shutil.copyfileobj(source, target, BLOCK)
        target.flush()
        os.fsync(target.fileno())


def into_arrays(source: Path) -> None:
    """The weights as arrays on the first device."""
    opened = open_source(str(source), {})
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {
        path: jax.ShapeDtypeStruct(entry["shape"], entry["dtype"], sharding=device)
        for path, entry in opened.manifest()["arrays"].items()
    }
    jax.block_until_ready(opened.read(wanted))


def drop(file: Path) -> None:
    """Drops what the machine holds of a file in memory, so that it is read from the disk."""
    if hasattr(os, "posix_fadvise"):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
