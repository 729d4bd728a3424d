"""Linear regression of the progression of diabetes after a year (442 patients, 10 numbers).

Squared error, gradient descent with momentum over the whole training split in every step. With
`task.l2` it is ridge regression, l2 = alpha / 351 (`lmjax.ops.penalty`). The perceptron (mlp)
trains on batches of 32.

Command:  pip install --no-deps scikit-learn==1.9.1
          python -m lmjax.train --config=configs/diabetes.py --workdir=DIR
          (another model: --config=configs/diabetes.py:ridge, :huber, :mlp)
Hardware: 2 CPU cores, 6 cpu-seconds each
Result:   on the 91 patients held out (measured); scikit-learn 1.9.1 trained on the same rows
          | model | root mean squared error | R2 | predictions' largest difference, relative |
          |---|---|---|---|
          | linear | 57.73 | 0.415 | 4e-8 from LinearRegression |
          | ridge | 57.50 | 0.420 | 3e-8 from Ridge(alpha=17.55) |
          | linear with task.l1=0.05 | | | 3e-4 from Lasso(alpha=0.025) |
          | huber | 58.04 | 0.409 | |
          | mlp, two layers of 64 | 60.58 | 0.356 | |
"""

from ml_collections import FieldReference

from lmjax.config import call
from lmjax.data.table import Table, validation
from lmjax.engine.run import Run
from lmjax.evaluate.classification import Regression
from lmjax.evaluate.losses import Losses
from lmjax.models.mlp import mlp
from lmjax.optim.presets import adamw, sgd
from lmjax.optim.schedules import cosine
from lmjax.tasks.regress import Regress

VARIANTS = {
    "smoke": {
        "data.path": "made:diabetes",
        "steps": 20,
        "batch_size": 16,
        "optimizer.learning_rate.peak": 1e-2,
        "optimizer.momentum": 0.5,
    },
    "ridge": {"task.l2": 0.05},
    "huber": {"task.error": "huber", "task.delta": 0.5},
    "mlp": {
        "steps": 600,
        "batch_size": 32,
        "task.model.hidden": (64, 64),
        "optimizer": call(
            adamw, learning_rate=call(cosine, peak=2e-3, steps=600), weight_decay=0.5, b2=0.99
        ),
    },
}


def get_config():
    steps = FieldReference(1500)
    data = call(Table, path="diabetes", target="progression", kind="values", valid_fraction=0.2)
    held_out = call(validation, of=data)
    return call(
        Run,
        task=call(Regress, model=call(mlp, num_outputs=1, hidden=()), error="mse"),
        optimizer=call(
            sgd,
            learning_rate=call(cosine, peak=0.1, steps=steps, final_fraction=0.0),
            momentum=0.95,
            nesterov=True,
        ),
        data=data,
        steps=steps,
        batch_size=351,  # the whole training split
        evals={
            "valid": call(Losses, data=held_out, batch_size=64),
            "patients": call(Regression, data=held_out, batch_size=64),
        },
        save_every=1500,
        log_every=100,
    )
