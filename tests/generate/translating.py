"""A run that translates, by chance: what tests of translation load."""

import json

import jax
import numpy as np

from lmjax.config import build, call, to_dict
from lmjax.data.tokenizer import CharacterTokenizer
from lmjax.engine.state import paths_of
from lmjax.engine.streamed import write_checkpoint
from lmjax.models.transformer import transformer
from lmjax.sharding import unbox
from lmjax.tasks.translate import Translate

CHARACTERS = " .abcdefgh"
ROOM = 32


def write_run(folder):
    """A run of random weights as the engine leaves it, at steps 1, 2 and 3; nothing trains."""
    folder.mkdir(exist_ok=True)
    sizes = {"num_layers": 1, "dim": 16, "hidden": 24, "num_heads": 2, "max_length": ROOM}
    recorded = call(transformer, size="nano", vocab_size=11, start_id=10, vocab_multiple=1, **sizes)
    config = {"task": to_dict(call(Translate, model=recorded))}
    (folder / "config.json").write_text(json.dumps(config))
    model = build(recorded)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 4), np.int32))
    about = {
        "config": config,
        "tokenizer": CharacterTokenizer(CHARACTERS).to_json(),
        "fingerprint": "",
        "data": {"next_batch": 0, "left_out": []},
    }
    for step in (1, 2, 3):
        random = np.random.default_rng(step)
        arrays = {
            path: random.normal(size=x.shape).astype(np.float32)
            for path, x in paths_of(unbox(shapes)).items()
        }
        arrays["params/embed/table"][-1] = 0.0  # the end, which is to come late
        write_checkpoint(
            folder / "checkpoints",
            step,
            {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in arrays.items()},
            lambda path, arrays=arrays: iter([((0,) * arrays[path].ndim, arrays[path])]),
            about,
        )
    return str(folder)
