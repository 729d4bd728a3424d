"""A Llama on tokens that `python -m lmjax.prepare` made: a small one, and any published size.

Command:  python -m lmjax.train --config=configs/prepare/train.py --workdir=runs/mine
              --config.data.path=OUT
Hardware: 2 CPU cores; for --config.task.model.size=1b and above see configs/llama.py
Result:   depends on the tokens; none is recorded.
"""

from ml_collections import FieldReference

from lmjax.config import call
from lmjax.data.packed import Tokens, validation, vocab_size
from lmjax.engine.run import Run
from lmjax.evaluate.losses import Losses
from lmjax.generate.samples import Samples
from lmjax.models.llama import llama3
from lmjax.optim.presets import adamw
from lmjax.optim.schedules import cosine
from lmjax.tasks.causal_lm import CausalLM

VARIANTS = {
    "smoke": {
        "steps": 8,
        "batch_size": 16,
        "optimizer.learning_rate.warmup_steps": 2,
        "data.length": 32,
        "task.model.num_layers": 2,
        "task.model.dim": 64,
        "task.model.num_heads": 4,
        "task.model.num_kv_heads": 2,
        "task.model.hidden": 128,
        "evals.valid.max_batches": 2,
        "evals.sample.max_tokens": 8,
    },
}


def get_config():
    steps = FieldReference(900)
    length = FieldReference(256)
    data = call(Tokens, path="OUT", length=length)
    model = call(
        llama3,
        size="nano",
        vocab_size=call(vocab_size, of=data),
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
            "sample": call(Samples, model=model, prompt="The "),
        },
        eval_every=300,
        save_every=300,
    )
