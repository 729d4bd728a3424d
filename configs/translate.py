"""A small Transformer that translates, as in "Attention Is All You Need": English to German.

2 + 2 layers, 128 wide, post-norm, one table of 4,000 tokens, label smoothing, Noam's schedule.
Without --config.data.path it learns to spell out numbers, which needs no file.

Command:  scripts/help_pairs.py says how to make pairs.jsonl of the help pages of LibreOffice; then
          python -m lmjax.train --config=configs/translate.py --workdir=DIR
              --config.data.path=pairs.jsonl --config.data.document_field=document
          python -m lmjax.evaluate.translate --workdir=DIR --average=5 --num_beams=4
Hardware: 2 CPU cores
Result:   English to German, 36,195 pairs to train on and 2,929 held out by page. BLEU of all that
          is held out: 9.3 of copying the source, 17.6 of a word dictionary (IBM model 1), 24.4 of
          this run with the mean of its last 5 checkpoints, 26.1 with 4 beams too (measured).
"""

from ml_collections import FieldReference

from lmjax.config import call
from lmjax.data.parallel import Parallel, validation
from lmjax.data.vocabulary import BPE
from lmjax.engine.run import Run
from lmjax.evaluate.losses import Losses
from lmjax.evaluate.translation import Translations
from lmjax.models.transformer import transformer
from lmjax.optim.presets import adamw
from lmjax.optim.schedules import noam
from lmjax.tasks.translate import Translate

VARIANTS = {
    "smoke": {
        "steps": 20,
        "data.length": 64,
        "data.vocabulary.vocab_size": 320,
        "task.model.num_layers": 1,
        "task.model.dim": 32,
        "task.model.hidden": 64,
        "task.model.dropout": 0.0,
        "optimizer.learning_rate.warmup_steps": 4,
        "optimizer.learning_rate.scale": 0.1,
        "evals.valid.batch_size": 16,
        "evals.valid.max_batches": 2,
        "evals.translations.num_pairs": 4,
    },
}


def get_config():
    length = FieldReference(128)
    vocab_size = FieldReference(4000)
    dim = FieldReference(128)
    data = call(
        Parallel,
        path="numbers",
        vocabulary=call(BPE, vocab_size=vocab_size),
        length=length,
        valid_fraction=0.05,
    )
    held_out = call(validation, of=data)
    model = call(
        transformer,
        size="nano",
        dim=dim,
        vocab_size=vocab_size,
        max_length=length,
        start_id=vocab_size - 1,
        dtype="bfloat16",
        vocab_multiple=8,
        unroll=2,
    )
    schedule = call(noam, dim=dim, warmup_steps=300, scale=1.0)
    return call(
        Run,
        task=call(Translate, model=model),
        optimizer=call(
            adamw,
            learning_rate=schedule,
            b2=0.98,
            epsilon=1e-9,
            weight_decay=0.0,
            clip_norm=None,
        ),
        data=data,
        steps=3600,
        batch_size=16,
        evals={
            "valid": call(Losses, data=held_out, batch_size=64),
            "translations": call(Translations, model=model, data=held_out, num_pairs=100),
        },
        eval_every=500,
        save_every=100,
        keep_last=6,
        log_every=20,
    )
