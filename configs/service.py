"""What a letter to a customer service is about: four networks of short texts, on a made table.

The table is synthetic (`lmjax.data.made_tickets`: 4,000 letters, six topics). Half of the letters
name a second topic that they are not about, which the order of the words tells, and 5 % of the
labels are wrong, in training and in what is held out: 0.95 is the best that any model can reach.
A table of one's own is named by data.path, data.text and data.target.

Command:  python -m lmjax.train --config=configs/service.py --workdir=DIR
          (other networks: --config=configs/service.py:flat, :lstm, :transformer)
Hardware: 2 CPU cores
Result:   on the 759 letters held out (measured); confusion.png in the workdir shows the mistakes
          | network | accuracy | macro-F1 | cpu-seconds |
          |---|---|---|---|
          | bag (this): the mean of the embeddings | 0.899 | 0.899 | 9 |
          | flat: embeddings side by side, 64 sigmoid units | 0.891 | 0.891 | 13 |
          | transformer: 2 layers of 64 | 0.930 | 0.931 | 109 |
          | lstm: 64 cells | 0.942 | 0.942 | 38 |
          | scikit-learn's TF-IDF, LogisticRegression(C=10): words | 0.899 | 0.899 | |
          | the same: words, pairs and triples | 0.945 | 0.945 | |
"""

from ml_collections import FieldReference

from lmjax.config import call
from lmjax.data.table import Table, validation
from lmjax.data.vocabulary import BPE
from lmjax.engine.run import Run
from lmjax.evaluate.classification import Classification
from lmjax.evaluate.losses import Losses
from lmjax.models.bert import bert
from lmjax.models.classifier import classifier
from lmjax.models.lstm import lstm
from lmjax.models.short_text import bag, flat
from lmjax.optim.presets import adamw
from lmjax.optim.schedules import cosine
from lmjax.tasks.classify import Classify

VOCAB_SIZE, LENGTH, TOPICS = 512, 48, 6
TEXT = {"vocab_size": VOCAB_SIZE, "max_length": LENGTH}

VARIANTS = {
    "smoke": {
        "steps": 20,
        "batch_size": 16,
        "optimizer.learning_rate.warmup_steps": 2,
        "optimizer.learning_rate.peak": 3e-2,
        "task.model.dim": 16,
    },
    "flat": {"task.model": call(flat, num_outputs=TOPICS, dim=32, hidden=(64,), **TEXT)},
    "lstm": {
        "task.model": call(
            classifier,
            encoder=call(lstm, dim=64, units=64, vocab_multiple=8, **TEXT),
            num_outputs=TOPICS,
            pooling="last",
        )
    },
    "transformer": {
        "task.model": call(
            classifier,
            encoder=call(
                bert, num_layers=2, dim=64, num_heads=4, pooler=False, vocab_multiple=8, **TEXT
            ),
            num_outputs=TOPICS,
            pooling="mean",
        )
    },
}


def get_config():
    steps = FieldReference(1000)
    data = call(
        Table,
        path="made:tickets",
        target="topic",
        text=("message",),
        vocabulary=call(BPE, vocab_size=VOCAB_SIZE),
        length=LENGTH,
    )
    held_out = call(validation, of=data)
    schedule = call(cosine, peak=3e-3, steps=steps, warmup_steps=steps // 20)
    return call(
        Run,
        task=call(Classify, model=call(bag, num_outputs=TOPICS, dim=64, **TEXT)),
        optimizer=call(adamw, learning_rate=schedule, b2=0.99),
        data=data,
        steps=steps,
        batch_size=64,
        evals={
            "valid": call(Losses, data=held_out, batch_size=64),
            "letters": call(Classification, data=held_out, batch_size=64),
        },
        eval_every=500,
        save_every=500,
        log_every=50,
    )
