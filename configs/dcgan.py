"""A DCGAN that draws handwritten digits, like scikit-learn's.

Command:  python -m lmjax.train --config=configs/dcgan.py --workdir=DIR
          (needs `pip install --no-deps scikit-learn`, whose file of digits is read); the pictures
          that it draws are DIR/samples.png
Hardware: 2 CPU cores
Result:   after 3,000 steps the Frechet distance of 1,797 samples to the digits is 0.75, by a
          classifier's 256 hidden units; half of the digits are at 1.18 from the other half. All ten
          classes are drawn (measured).
"""

from ml_collections import FieldReference

from lmjax.config import call
from lmjax.data.images import Images, validation
from lmjax.engine.run import Run
from lmjax.evaluate.frechet import Frechet
from lmjax.models.dcgan import discriminator, generator
from lmjax.optim.by_path import by_path
from lmjax.optim.presets import adamw
from lmjax.optim.schedules import cosine
from lmjax.tasks.adversarial import Adversarial

VARIANTS = {
    "smoke": {
        "steps": 20,
        "batch_size": 16,
        "data.path": "glyphs",
        "task.generator.width": 8,
        "task.discriminator.width": 8,
        "evals.samples.steps": 20,
        "evals.samples.batch_size": 64,
    },
}


def get_config():
    steps = FieldReference(3000)
    size = FieldReference(8)
    data = call(Images, path="digits", size=size, channels=1)

    def adam():
        schedule = call(cosine, peak=4e-4, steps=steps, warmup_steps=0, final_fraction=0.1)
        return call(
            adamw, learning_rate=schedule, b1=0.5, b2=0.999, weight_decay=0.0, clip_norm=None
        )

    return call(
        Run,
        task=call(
            Adversarial,
            generator=call(generator, size=size, channels=1, width=64, latent_dim=32, start=2),
            discriminator=call(discriminator, size=size, width=64, start=2),
        ),
        optimizer=call(
            by_path,
            optimizers=[("^generator/", adam()), ("^discriminator/", adam())],
            average=0.995,
        ),
        data=data,
        steps=steps,
        batch_size=64,
        evals={"samples": call(Frechet, data=call(validation, of=data))},
        eval_every=500,
        save_every=1000,
        log_every=50,
    )
