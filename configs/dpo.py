"""Tunes the weights of a run, or imported ones, on preferences: DPO with LoRA on every product.

The reference is the model with its adapters off, so there is no second copy of it. `frozen` has
one and trains all of the policy, which may start from another run than the reference. `orpo` needs
no reference; `kto` reads texts that are judged one by one, and of a pair both. The default pairs
are made up: questions with a friendly answer and a rude one.

Command:  python -m lmjax.convert import --from=DIR --workdir=runs/imported
          python -m lmjax.train --config=configs/dpo.py --workdir=runs/dpo
          (or configs/dpo.py:orpo, :kto; another start: --config.init_from.path=WORKDIR; other
          preferences: --config.data.path=FILE.jsonl; the result without adapters:
          python -m lmjax.convert merge --workdir=runs/dpo --to=DIR)
          python -m lmjax.train --config=configs/dpo.py:frozen --workdir=runs/dpo
          (the policy from another run: --config.init_from.0.path=WORKDIR, as one of configs/sft.py)
Hardware: 2 CPU cores for models of up to a few hundred million parameters
Result:   none yet: SmolLM2-135M went in 5 steps of 8 made pairs from a loss of 0.6931 to 0.6379
          (measured), and none was tuned to the end.
"""

from ml_collections import FieldReference

from lmjax.adapt.adapted import adapted
from lmjax.adapt.lora import Lora
from lmjax.config import call
from lmjax.data.preferences import Preferences, validation
from lmjax.data.vocabulary import Pretrained
from lmjax.engine.run import Run
from lmjax.engine.warm_start import WarmStart
from lmjax.evaluate.losses import Losses
from lmjax.models.saved import saved
from lmjax.optim.presets import adamw
from lmjax.optim.schedules import cosine
from lmjax.tasks.preference import Dpo, Kto, Orpo, Preference

REFERENCE = "^aside/reference/"
PRODUCTS = ("query", "key", "value", "attention/out", "gate", "up", "down")

VARIANTS = {
    "smoke": {
        "steps": 8,
        "batch_size": 16,
        "optimizer.learning_rate.warmup_steps": 2,
        "optimizer.learning_rate.peak": 2e-2,
        "task.model.adapters.0.dropout": 0.0,
        "data.length": 64,
        "evals.valid.max_batches": 2,
    },
    "frozen": {
        "task.model": call(saved, workdir="runs/imported", dtype="bfloat16", vocab_multiple=128),
        "task.reference": "frozen",
        "trainable": "^(?!aside/)",
        "optimizer.learning_rate.peak": 5e-6,
        "init_from": (
            call(WarmStart, path="runs/imported", load="^(?!aside/)"),
            call(WarmStart, path="runs/imported", load=REFERENCE, rename=((REFERENCE, ""),)),
        ),
    },
    "orpo": {
        "task.objective": call(Orpo),
        "task.reference": "none",
        "optimizer.learning_rate.peak": 2e-4,
    },
    "kto": {
        "task.objective": call(Kto),
        "data.kind": "labelled",
    },
}


def get_config():
    steps = FieldReference(200)
    workdir = FieldReference("runs/imported")
    data = call(Preferences, path="made", vocabulary=call(Pretrained, path=workdir), length=512)
    base = call(saved, workdir=workdir, dtype="bfloat16", remat="full", vocab_multiple=128)
    lora = call(Lora, targets=PRODUCTS, rank=8, alpha=16.0, dropout=0.05)
    model = call(adapted, model=base, adapters=(lora,))
    schedule = call(cosine, peak=5e-5, steps=steps, warmup_steps=steps // 20)
    return call(
        Run,
        task=call(Preference, model=model, objective=call(Dpo, beta=0.1)),
        optimizer=call(adamw, learning_rate=schedule, b2=0.99, weight_decay=0.0),
        data=data,
        steps=steps,
        batch_size=16,
        trainable="/lora/",
        evals={"valid": call(Losses, data=call(validation, of=data), batch_size=32)},
        eval_every=50,
        save_every=100,
        init_from=call(WarmStart, path=workdir, load="^(?!.*/lora/)"),
    )
