"""A small ResNet that reads handwritten digits: scikit-learn's, or any folder of pictures by class.

Command:  python -m lmjax.train --config=configs/digits.py --workdir=DIR
          (needs `pip install --no-deps scikit-learn`, whose file of digits is read; pictures of
          your own: --config.data.data.path=FOLDER --config.data.data.size=64
          --config.data.data.channels=3, and the crop's height and width)
Hardware: 2 CPU cores
Result:   accuracy 0.9974 on the 385 digits held out, after 600 steps (measured); scikit-learn's
          logistic regression on the same split 0.9688 (`python -m benchmarks.logistic
          configs/digits.py`)
"""

from ml_collections import FieldReference

from lmjax.config import call
from lmjax.data.augment.augmented import Augmented
from lmjax.data.augment.image import RandomCrop
from lmjax.data.images import Images, num_classes, validation
from lmjax.engine.run import Run
from lmjax.evaluate.losses import Losses
from lmjax.models.resnet import resnet
from lmjax.optim.presets import adamw
from lmjax.optim.schedules import cosine
from lmjax.tasks.classify import Classify

VARIANTS = {
    "smoke": {
        "steps": 20,
        "batch_size": 16,
        "data.data.path": "glyphs",
        "optimizer.learning_rate.warmup_steps": 2,
        "task.model.width": 8,
        "task.model.blocks": (1, 1),
        "evals.valid.max_batches": 2,
    },
}


def get_config():
    steps = FieldReference(600)
    pictures = call(Images, path="digits", size=8, channels=1)
    shifted = call(RandomCrop, height=8, width=8, padding=1)
    data = call(Augmented, data=pictures, arrays={"images": (shifted,)})
    model = call(
        resnet,
        depth=18,
        num_classes=call(num_classes, of=pictures),
        blocks=(1, 1, 1),
        width=32,
        stem="small",
    )
    schedule = call(cosine, peak=3e-3, steps=steps, warmup_steps=steps // 20)
    return call(
        Run,
        task=call(Classify, model=model),
        optimizer=call(adamw, learning_rate=schedule, b2=0.99),
        data=data,
        steps=steps,
        batch_size=128,
        evals={"valid": call(Losses, data=call(validation, of=pictures), batch_size=128)},
        eval_every=100,
        save_every=300,
    )
