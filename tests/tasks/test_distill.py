"""Distillation: equal to whole logits and to torch's KLDivLoss, chunked or not; what generates."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lmjax
from lmjax.config import load_config
from lmjax.convert.imports import import_folder
from lmjax.core import Unembedding
from lmjax.engine.run import draft_run
from lmjax.engine.warm_start import start
from lmjax.errors import UserError
from lmjax.models.gpt import gpt
from lmjax.models.llama import llama
from lmjax.ops.divergence import divergence
from lmjax.ops.losses import logits
from lmjax.sharding import unbox
from lmjax.tasks.causal_lm import CausalLM
from lmjax.tasks.distill import Distill
from tests.convert import folders

STUDENT = gpt(num_layers=1, dim=16, num_heads=2, vocab_size=30, max_length=12, vocab_multiple=16)
TEACHER = llama(num_layers=1, dim=24, num_heads=2, hidden=32, vocab_size=33, max_length=12)


def task_of(**fields):
    return Distill(model=STUDENT, teacher=TEACHER, **fields)


@pytest.fixture(scope="module")
def batch():
    random = np.random.default_rng(0)
    return {
        "tokens": random.integers(0, 30, (2, 12)).astype("i4"),
        "targets": random.integers(0, 30, (2, 12)).astype("i4"),
        "weights": random.integers(0, 2, (2, 12)).astype("f4"),
    }


@pytest.fixture(scope="module")
def variables(batch):
    made = jax.jit(lambda: unbox(task_of(hidden=1.0).init(jax.random.key(0), batch)))()
    return jax.tree.map(lambda x: 5 * x, made)


def parts(variables):
    own = dict(variables["params"])
    aside = own.pop("aside")
    return own, aside["teacher"], aside["projection"]["kernel"]


def naive(variables, batch, *, alpha, temperature, top_k, hidden):
    """The loss from whole logits of both, a sum and a mean over all tokens."""
    own, teacher, projection = parts(variables)
    s, t = (
        model.apply({"params": p}, batch["tokens"])
        for model, p in ((STUDENT, own), (TEACHER, teacher))
    )
    s_logits, t_logits = (logits(x.hidden_BTD, x.unembedding)[..., :30] for x in (s, t))
    log_q = jax.nn.log_softmax(s_logits / temperature)
    if top_k:
        lowest = jnp.sort(t_logits)[..., -top_k, None]
        t_logits = jnp.where(t_logits >= lowest, t_logits, -1e9)
    p = jax.nn.softmax(t_logits / temperature)
    kl = jnp.sum(jnp.where(p > 0, p * (jnp.log(jnp.maximum(p, 1e-30)) - log_q), 0.0), -1)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(s_logits), batch["targets"][..., None], -1)[
        ..., 0
    ]
    mse = jnp.mean((s.hidden_BTD @ projection - t.hidden_BTD) ** 2, -1)
    each = alpha * temperature**2 * kl + (1 - alpha) * nll + hidden * mse
    return jnp.sum(each * batch["weights"]) / jnp.sum(batch["weights"])


@pytest.mark.parametrize(
    ("top_k", "chunk"),
    [
        (4, 7),
        pytest.param(0, 7, marks=pytest.mark.slow),
        pytest.param(0, 0, marks=pytest.mark.slow),
        pytest.param(4, 0, marks=pytest.mark.slow),
        pytest.param(4, 3, marks=pytest.mark.slow),
        pytest.param(30, 7, marks=pytest.mark.slow),
    ],
)
def test_equals_whole_logits(variables, batch, top_k, chunk):
    """Value and gradient; and none goes to the teacher."""
    fields = {"alpha": 0.7, "temperature": 1.5, "top_k": top_k, "hidden": 0.3}
    task = task_of(vocab_chunk=chunk, **fields)

    def value(v):
        return task.loss(v, batch, jax.random.key(0), train=False).loss.value

    found, gradient = jax.jit(jax.value_and_grad(value))(variables)
    wanted, by_hand = jax.jit(jax.value_and_grad(lambda v: naive(v, batch, **fields)))(variables)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    _, of_teacher, _ = parts(gradient)
    assert not any(np.any(x) for x in jax.tree.leaves(of_teacher))
    own, _, projection = parts(gradient)
    wanted_own, _, wanted_projection = parts(by_hand)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        (own, projection),
        (wanted_own, wanted_projection),
    )
    assert np.any(projection)


@pytest.mark.parametrize("chunk", [pytest.param(0, marks=pytest.mark.slow), 4])
def test_equals_kldivloss_of_torch(chunk):
    stored = np.load(Path(__file__).with_name("distill_reference.npz"))
    eye = Unembedding(weights_VD=jnp.eye(11), vocab_size=11)
    teacher = jnp.asarray(stored["teacher"], jnp.float32)

    @jax.jit
    def found(student):
        kl_BT, back = jax.vjp(
            lambda s: divergence(
                s, eye, teacher, eye, temperature=float(stored["temperature"]), vocab_chunk=chunk
            ),
            student,
        )
        return kl_BT, back(jnp.ones_like(kl_BT))[0]

    kl_BT, gradient = found(jnp.asarray(stored["student"], jnp.float32))
    np.testing.assert_allclose(kl_BT, stored["kl"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, stored["gradient"], rtol=1e-5, atol=1e-6)


def test_counts_both_models(variables, batch):
    task = task_of(hidden=1.0)
    spec = {k: jax.ShapeDtypeStruct(v.shape[1:], v.dtype) for k, v in batch.items()}
    own, teacher, projection = parts(variables)
    found = task.count_params(variables["params"])
    assert found["projection"] == projection.size == 16 * 24
    assert found["teacher"] == sum(TEACHER.count_params(teacher).values())
    assert {k: found[k] for k in STUDENT.count_params(own)} == STUDENT.count_params(own)
    alone = CausalLM(model=STUDENT).work(spec)
    assert task.work(spec).flop == alone.flop + 12 * TEACHER.flop_per_token(12)[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alpha": 1.5}, "alpha"),
        ({"temperature": 0.0}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"hidden": -1.0}, "hidden"),
    ],
)
def test_refused(fields, message):
    with pytest.raises(UserError, match=message):
        task_of(**fields)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    base = tmp_path_factory.mktemp("teacher")
    source = folders.write(base / "in", folders.LLAMA, folders.drawn(folders.LLAMA))
    import_folder(source, base / "run")
    return str(base / "run")


@pytest.mark.slow
def test_the_student_is_what_a_run_gives(teacher, tmp_path):
    """Generation reads it alone; the teacher's parameters stay as they were loaded."""
    changes = {"init_from.path": teacher, "steps": 4, "eval_every": 0}
    config = load_config("configs/distill.py:smoke", changes)
    state = lmjax.train(config, str(tmp_path / "run"), quiet=True, devices=jax.devices()[:1])
    loaded = lmjax.load(teacher)
    taught = state.frozen["aside"]["teacher"]
    np.testing.assert_array_equal(
        taught["norm"]["scale"], loaded.variables["params"]["norm"]["scale"]
    )
    student = lmjax.load(str(tmp_path / "run"))
    assert "aside" not in student.variables["params"]
    own = {k: v for k, v in state.params.items() if k != "aside"}
    jax.tree.map(np.testing.assert_array_equal, student.variables["params"], own)
    assert isinstance(student.generate("so", max_tokens=4), str)


@pytest.mark.slow
def test_refuses_a_teacher_of_other_tokens(teacher, tmp_path):
    config = load_config("configs/distill.py:smoke", {"init_from.path": teacher})
    run = lmjax.build(config)
    other = dataclasses.replace(run, data=_Other(run.data))
    with pytest.raises(UserError, match=r"tokenizer of .* is another"):
        start(run.init_from, other, draft_run(run, devices=jax.devices()[:1]))


@dataclasses.dataclass(frozen=True)
class _Other:
    """A data set whose tokenizer is another one."""

    data: object
    fitted = {"tokenizer": "{}"}  # noqa: RUF012, nothing changes it

    def __getattr__(self, name):
        return getattr(self.data, name)
