"""Every observation counts once, whatever the batch size; and data that does not fit is refused."""

import dataclasses

import jax
import pytest

from lmjax.data.text import Text, validation
from lmjax.data.vocabulary import Bytes
from lmjax.engine.program import compile_program
from lmjax.engine.session import RunSession
from lmjax.errors import UserError
from lmjax.evaluate.losses import Losses
from lmjax.models.gpt import gpt
from lmjax.optim.presets import sgd
from lmjax.optim.schedules import constant
from lmjax.sharding import Layout
from lmjax.tasks.causal_lm import CausalLM

TASK = CausalLM(model=gpt(num_layers=1, dim=16, num_heads=2, vocab_size=257, max_length=16))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{i} bottles of beer on the wall.\n" for i in range(80)))
    return Text(path=str(path), vocabulary=Bytes(), length=16, packing="stream")


@pytest.fixture(scope="module")
def session(data):
    program = compile_program(
        TASK,
        sgd(learning_rate=constant(peak=0.1)),
        Layout(),
        data.example,
        batch_size=4,
        devices=jax.devices()[:1],
    )
    return RunSession(task=TASK, data=data, seed=0, program=program, state=program.init())


def test_the_result_does_not_depend_on_the_batch_size(session, data):
    held_out = validation(data)
    found = [Losses(data=held_out, batch_size=size)(session) for size in (1, 7, 64)]
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5)
    # The held-out text is counted in bytes, all but the first, which nothing predicts.
    num_bytes = held_out.num_examples * 16
    assert found[0]["bits_per_byte"] == pytest.approx(found[0]["loss"] / 0.6931472, rel=1e-4)
    assert num_bytes >= 200


def test_max_batches_stops_early(session, data):
    held_out = validation(data)
    one = Losses(data=held_out, batch_size=2, max_batches=1)(session)
    assert one != Losses(data=held_out, batch_size=2)(session)


def test_what_does_not_fit_is_refused(data):
    with pytest.raises(UserError, match=r"data.length is 32"):
        Losses(data=dataclasses.replace(data, length=32), batch_size=2).check(TASK, data, ways=1)
    other = dataclasses.replace(data, path=__file__)
    Losses(data=other, batch_size=2).check(TASK, data, ways=1)  # bytes are bytes
    with pytest.raises(UserError, match="batch_size is 6, which does not divide into 4"):
        Losses(data=data, batch_size=6).check(TASK, data, ways=4)
    with pytest.raises(UserError, match="batch_size is 0"):
        Losses(data=data, batch_size=0)
