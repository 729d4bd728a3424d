"""`python -m lmjax.convert import --from=DIR --workdir=DIR`; back: `export --workdir=DIR --to=DIR`.

`import` reads config.json, safetensors and tokenizer of a folder, or a .gguf file, and writes a
workdir for `python -m lmjax.generate` and `init_from`. `export` writes a folder that transformers
loads, or, where --to ends in .gguf, a file that llama.cpp loads (--dtype=float32 or q8_0).

`import-adapter --from=DIR --base=WORKDIR --workdir=DIR` joins an adapter of peft's to a base,
`export-adapter --workdir=DIR --to=DIR` writes a run's adapter for peft, and `merge --workdir=DIR
--to=WORKDIR` writes a workdir whose weights hold what a run's adapters do.

`prune --workdir=DIR --to=WORKDIR --method=wanda --text=PATH` writes a workdir with half of the
weights of every product set to zero (another share: --sparsity=0.3; a pattern: --pattern=2:4), and
says what that does to the loss on the text's last tenth. --method=magnitude needs no text.

`quantize --workdir=DIR --to=WORKDIR --kind=int4 --text=PATH` writes a workdir whose products have
weights of few bits (int8, int4, nf4 or fp8; --block=64 of them share a scale; --targets=qkv,mlp/up
for some products), and says what that does to bytes, loss and accuracy. `dequantize --workdir=DIR
--to=WORKDIR` makes it plain again.

Exit codes: 0; 2 for a bad folder, file or flag.
"""

from __future__ import annotations

import time
from pathlib import Path

from absl import app, flags

from lmjax.errors import Exit, UserError, did_you_mean
from lmjax.flags import fail, parse_flags, speak

FROM = flags.DEFINE_string("from", None, "import: a folder of Hugging Face's, or a .gguf file")
TO = flags.DEFINE_string("to", None, "export: the folder, or .gguf file, that is written")
WORKDIR = flags.DEFINE_string("workdir", None, "folder of a run; import makes it")
TOKENIZER = flags.DEFINE_string(
    "tokenizer", None, "import: another folder or tokenizer.json than that of --from"
)
BASE = flags.DEFINE_string("base", None, "import-adapter: workdir that the adapter was trained on")
STEP = flags.DEFINE_integer("step", None, "which checkpoint is read; the newest if not given")
DTYPE = flags.DEFINE_string(
    "dtype",
    "same",
    "of the weights written: same, float32 or bfloat16; of a .gguf file float32 or q8_0",
)
METHOD = flags.DEFINE_string("method", "wanda", "prune: wanda or magnitude")
PATTERN = flags.DEFINE_string("pattern", "", "prune: of how many weights how many stay, as 2:4")
SPARSITY = flags.DEFINE_float("sparsity", 0.5, "prune: the share of zeros, where no pattern is")
TEXT = flags.DEFINE_string(
    "text", "", "prune, quantize: file, folder or glob of text; its last tenth is held out"
)
KIND = flags.DEFINE_string("kind", "", "quantize: int8, int4 (if not given), nf4 or fp8")
BLOCK = flags.DEFINE_integer("block", 0, "quantize: weights that share a scale; 64 if not given")
TARGETS = flags.DEFINE_list("targets", [], "quantize: products, as qkv,mlp/up; all if not given")
SHARD_GB = flags.DEFINE_float("shard_gb", 5.0, "export: the most of one file", lower_bound=1e-9)


def main(argv: list[str]) -> None:
    """Runs one of the commands."""
    speak()
    command, *rest = argv[1:] or [""]
    try:
        if command not in COMMANDS:
            raise UserError(f"{command!r} is no command." + did_you_mean(command, COMMANDS))
        if rest:
            raise UserError(f"unexpected arguments: {' '.join(rest)}.")
        import jax

        jax.config.update("jax_platforms", "cpu")  # not to take the devices of a run
        began = time.monotonic()
        done = COMMANDS[command]()
        print(f"{done} in {time.monotonic() - began:.1f} s")
    except (UserError, OSError) as error:
        fail(error, Exit.USAGE)


def _given(flag: flags.FlagHolder[str | None], command: str) -> Path:
    if not flag.value:
        raise UserError(f"{command} needs --{flag.name}=DIR.")
    return Path(flag.value).expanduser()


def _import() -> str:
    from lmjax.convert.imports import import_folder

    workdir = _given(WORKDIR, "import")
    tokenizer = Path(TOKENIZER.value).expanduser() if TOKENIZER.value else None
    weights = import_folder(_given(FROM, "import"), workdir, dtype=DTYPE.value, tokenizer=tokenizer)
    return f"{len(weights.tensors)} tensors of {weights.family.model_type} are now {workdir}"


def _export() -> str:
    from lmjax.convert.exports import export_folder

    to = _given(TO, "export")
    paths = export_folder(
        _given(WORKDIR, "export"),
        to,
        step=STEP.value,
        dtype=DTYPE.value,
        shard_bytes=int(SHARD_GB.value * 1e9),
    )
    return f"wrote {to} with {len(paths)} file(s) of weights"


def _import_adapter() -> str:
    from lmjax.convert.adapters import import_adapter

    command = "import-adapter"
    source, workdir = _given(FROM, command), _given(WORKDIR, command)
    adapter = import_adapter(source, _given(BASE, command), workdir, step=STEP.value)
    return f"{adapter.name} over {len(adapter.targets)} products is now {workdir}"


def _export_adapter() -> str:
    from lmjax.convert.adapters import export_adapter

    to = _given(TO, "export-adapter")
    name = export_adapter(_given(WORKDIR, "export-adapter"), to, step=STEP.value)
    return f"wrote {name} to {to}"


def _merge() -> str:
    from lmjax.convert.adapters import merge

    to = _given(TO, "merge")
    merge(_given(WORKDIR, "merge"), to, step=STEP.value)
    return f"wrote {to} without adapters"


def _prune() -> str:
    from lmjax.convert.pruned import prune

    to = _given(TO, "prune")
    found = prune(
        _given(WORKDIR, "prune"),
        to,
        method=METHOD.value,  # type: ignore[arg-type]  # an enum flag is a str to the type checker
        pattern=PATTERN.value or "",
        sparsity=SPARSITY.value or 0.0,
        text=TEXT.value or "",
        step=STEP.value,
    )
    for path, share in found.sparsity.items():
        print(f"{path}: {share:.2%} zeros")
    if TEXT.value:
        print(f"loss on the text's last tenth: {found.before:.4f} before, {found.after:.4f} after")
    return f"wrote {to}"


def _quantize() -> str:
    from lmjax.convert.quantized import quantize

    to = _given(TO, "quantize")
    found = quantize(
        _given(WORKDIR, "quantize"),
        to,
        kind=KIND.value or "",
        block=BLOCK.value or 0,
        targets=TARGETS.value or (),
        text=TEXT.value or "",
        step=STEP.value,
    )
    print(
        f"{found.share:.1%} of the weights take {found.bits:.3f} bits each; all take "
        f"{found.bytes_before / 1e6:.3f} MB before, {found.bytes_after / 1e6:.3f} MB after"
    )
    if found.before and found.after:
        print(
            f"on the text's last tenth: loss {found.before.loss:.4f} before, "
            f"{found.after.loss:.4f} after; next tokens right {found.before.accuracy:.2%} before, "
            f"{found.after.accuracy:.2%} after"
        )
    return f"wrote {to}"


def _dequantize() -> str:
    from lmjax.convert.quantized import dequantize

    to = _given(TO, "dequantize")
    dequantize(_given(WORKDIR, "dequantize"), to, step=STEP.value)
    return f"wrote {to}"


COMMANDS = {
    "import": _import,
    "export": _export,
    "import-adapter": _import_adapter,
    "export-adapter": _export_adapter,
    "merge": _merge,
    "prune": _prune,
    "quantize": _quantize,
    "dequantize": _dequantize,
}

if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
