"""The recurrent language model: sizes, its parts by hand, its cache, and the state it carries."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmjax import sharding
from lmjax.core import CARRY
from lmjax.data.text import Text
from lmjax.data.vocabulary import Bytes
from lmjax.engine.program import compile_program, draft_program
from lmjax.errors import UserError
from lmjax.generate.beam import BeamSearch
from lmjax.generate.decode import Decoding
from lmjax.models.lstm import lstm
from lmjax.ops.losses import logits
from lmjax.plan.flop import executed
from lmjax.sharding import Layout
from lmjax.tasks.causal_lm import CausalLM

SMALL = {"vocab_size": 19, "dim": 8, "units": 12, "num_layers": 2}


def abstract(model):
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return sharding.unbox(
        jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)), tokens)
    )


def made(model, *, scale=1.0):
    """Variables drawn in numpy, which compiles nothing; what is carried is zero."""
    random = np.random.default_rng(0)

    def draw(path, x):
        size = 0.1 if path[-1].key == "bias" else scale * x.shape[0] ** -0.5
        return (size * random.standard_normal(x.shape)).astype("f4")

    variables = abstract(model)
    carry = jax.tree.map(lambda x: np.zeros(x.shape, "f4"), variables.get(CARRY, {}))
    return {"params": jax.tree_util.tree_map_with_path(draw, variables["params"]), CARRY: carry}


def test_exact_parameter_count():
    """Vocabulary 10,000, embedding 256, 1,024 units, an output layer of its own with its bias."""
    model = lstm(vocab_size=10_000, tied=False)
    counts = model.count_params(abstract(model)["params"])
    assert sum(counts.values()) == 18_056_976
    padded = lstm(vocab_size=10_000, tied=False, vocab_multiple=128)
    assert padded.count_params(abstract(padded)["params"]) == counts


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def by_hand(params, tokens_T, *, layers, tied):
    """One row's logits [T, V] in numpy, float64."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    x = p["embed"]["table"][tokens_T]
    for layer in range(layers):
        own = p[f"layers_{layer}"]
        w, b, r = own["input"]["kernel"], own["input"]["bias"], own["recurrent"]["kernel"]
        hidden = cell = np.zeros(r.shape[0])
        found = []
        for x_D in x:
            i, f, g, o = (x_D @ w[:, k] + b[k] + hidden @ r[:, k] for k in range(4))
            cell = sigmoid(f + 1) * cell + sigmoid(i) * np.tanh(g)
            hidden = sigmoid(o) * np.tanh(cell)
            found.append(hidden)
        x = np.array(found)
    if tied:
        x = x @ p["project"]["kernel"] + p["project"]["bias"]
        return x @ p["embed"]["table"].T
    return x @ p["unembed"]["table"].T + p["unembed"]["bias"]


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_logits_equal_those_by_hand(tied):
    model = lstm(**SMALL, tied=tied)
    params = made(model)["params"]
    tokens = np.random.default_rng(1).integers(0, 19, (2, 6))

    @jax.jit
    def run(params, tokens):
        output = model.apply({"params": params}, tokens)
        return logits(output.hidden_BTD, output.unembedding)

    found = run(params, tokens)
    for row in range(2):
        expected = by_hand(params, tokens[row], layers=2, tied=tied)
        np.testing.assert_allclose(found[row], expected, rtol=1e-5, atol=1e-5)


def greedy(model, variables, prompt, count):
    """By the whole text again for each token."""
    text = list(prompt)

    @jax.jit
    def likeliest(padded):  # later tokens change nothing
        output = model.apply(variables, padded)
        return jnp.argmax(logits(output.hidden_BTD, output.unembedding)[0], axis=-1)

    for _ in range(count):
        padded = np.zeros((1, 24), np.int32)
        padded[0, : len(text)] = text
        text.append(int(likeliest(padded)[len(text) - 1]))
    return text[len(prompt) :]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_decoding_with_a_state_equals_the_whole_text_again(kind):
    """Prompts of unequal lengths, beyond the first bucket."""
    model = lstm(**SMALL, kind=kind, tied=False, stateful=True)
    variables = {"params": made(model, scale=4.0)["params"]}
    decoding = Decoding(model, smallest_cache=8)
    prompts = [[1, 2, 3], [5, 6, 7, 8, 9, 1, 2]]
    found = [[], []]
    for row, token in decoding.batch(
        variables, prompts, max_tokens=12, seeds=[0, 0], temperature=0.0
    ):
        found[row].append(token)
    expected = [greedy(model, variables, prompt, 12) for prompt in prompts]
    assert found == expected
    assert expected[0] != expected[1]


@pytest.mark.slow
def test_beams_have_states_of_their_own():
    """All continuations of 3 tokens, scored by the whole text, hold none better."""
    model = lstm(vocab_size=5, dim=6, units=8)
    variables = {"params": made(model, scale=4.0)["params"]}
    prompt, best = [1, 2, 3], (-np.inf, ())
    found = BeamSearch(Decoding(model)).search(variables, prompt, num_beams=25, max_tokens=3)[0]
    texts = np.array([[*prompt, *more] for more in itertools.product(range(5), repeat=3)])
    output = model.apply(variables, jnp.asarray(texts))
    scores = jax.nn.log_softmax(logits(output.hidden_BTD, output.unembedding))
    for text, score in zip(texts, np.asarray(scores), strict=True):
        total = sum(float(score[at, text[at + 1]]) for at in range(2, 5))
        best = max(best, (total / 3, tuple(text[3:])))
    assert found.tokens == best[1]
    assert found.score == pytest.approx(best[0], abs=1e-5)


def batch_of(tokens, **more):
    return {
        "tokens": jnp.asarray(tokens[:, :-1]),
        "targets": jnp.asarray(tokens[:, 1:]),
        "weights": jnp.ones(tokens[:, 1:].shape),
        **{name: jnp.asarray(x) for name, x in more.items()},
    }


def test_three_and_three_carried_tokens_are_six_exactly():
    """And a row that does not go on begins anew, as do all that is no training."""
    model = lstm(**SMALL, stateful=True)
    task = CausalLM(model=model)
    variables = made(model, scale=3.0)
    tokens = np.random.default_rng(0).integers(0, 19, (4, 7))
    zero = jax.tree.map(lambda x: np.repeat(x, 4, axis=0), variables[CARRY])
    assert jax.tree.map(jnp.shape, zero) == {"hidden": (4, 2, 12), "cell": (4, 2, 12)}

    @jax.jit
    def loss(carry, batch):
        given = {"params": variables["params"], CARRY: carry}
        output = task.loss(given, batch, jax.random.key(0), train=True)
        return output.loss.total, output.model_state[CARRY]

    total, after = loss(zero, batch_of(tokens, continues=np.zeros(4)))
    first, carry = loss(zero, batch_of(tokens[:, :4], continues=np.zeros(4)))
    second, parts = loss(carry, batch_of(tokens[:, 3:], continues=np.ones(4)))
    jax.tree.map(np.testing.assert_array_equal, parts, after)
    np.testing.assert_allclose(first + second, total, rtol=1e-6)
    some, mixed = loss(carry, batch_of(tokens[:, 3:], continues=np.array([1, 0, 0, 1])))
    fresh, anew = loss(zero, batch_of(tokens[:, 3:], continues=np.ones(4)))
    for name in mixed:
        np.testing.assert_array_equal(
            mixed[name][jnp.array([0, 3])], after[name][jnp.array([0, 3])]
        )
        np.testing.assert_array_equal(mixed[name][1:3], anew[name][1:3])
    assert len({float(x) for x in (second, some, fresh)}) == 3
    with_carry = {"params": variables["params"], CARRY: carry}
    tested = task.loss(with_carry, batch_of(tokens[:, 3:]), jax.random.key(0), train=False)
    np.testing.assert_allclose(tested.loss.total, fresh, rtol=1e-6)


def program_of(folder, *, devices=1, layout=None, model=None, **options):
    data = Text(path=folder, length=8, vocabulary=Bytes(), packing="documents", order="continued")
    fields = {"vocab_size": 257, "dim": 16, "units": 16, "num_layers": 2, "vocab_multiple": 8}
    task = CausalLM(model=lstm(**fields, stateful=True, **(model or {})))
    program = compile_program(
        task,
        optax.adam(1e-2),
        layout or Layout(),
        data.example,
        batch_size=16,
        devices=jax.devices()[:devices],
        **options,
    )
    return data, program


def trained(folder, *, steps=4, **options):
    data, program = program_of(folder, **options)
    state, losses = program.init(), []
    for batch in itertools.islice(data.batches(batch_size=16, seed=0), steps):
        state, metrics = program.train_step(state, program.put(batch))
        losses.append(float(metrics["loss"].value))
    return losses, state


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Documents of unequal lengths, which end within rows."""
    path = tmp_path_factory.mktemp("documents")
    random = np.random.default_rng(0)
    for number in range(6):
        words = random.choice(["one", "two", "three", "four"], 200 + 37 * number)
        (path / f"{number}.txt").write_text(" ".join(words))
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"microbatches": 4},
        {"devices": 8, "layout": Layout(data=2, fsdp=2, tensor=2), "microbatches": 2},
        {"devices": 8, "layout": Layout(data=1, fsdp=2, context=2, tensor=2)},
        {"devices": 8, "layout": Layout(slices=2, fsdp=2, expert=2)},
        {"devices": 8, "model": {"dtype": "bfloat16"}, "layout": Layout(data=4, fsdp=2)},
    ],
    ids=["microbatched", "tensor", "context", "slices", "bfloat16"],
)
def test_cut_and_split_it_trains_the_same(folder, options):
    options = {**options}
    tolerance = 1e-5 if "model" not in options else 2e-2
    losses, state = trained(folder, model=options.get("model"))
    found, split = trained(folder, **options)
    np.testing.assert_allclose(found, losses, rtol=tolerance)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=10 * tolerance),
        split.model_state[CARRY],
        state.model_state[CARRY],
    )


@pytest.mark.slow
def test_variational_dropout_is_the_same_on_eight_devices(folder):
    model = {"dropout": 0.3, "dropout_kind": "variational"}
    one, _ = trained(folder, model=model)
    eight, _ = trained(folder, model=model, devices=8, layout=Layout(data=2, fsdp=2, tensor=2))
    np.testing.assert_allclose(eight, one, rtol=1e-5)
    plain, _ = trained(folder, model={"dropout": 0.3})
    assert one[0] != plain[0]


def test_the_step_costs_what_it_says(folder):
    """Every product of forward and backward pass, once."""
    data = Text(path=folder, length=8, vocabulary=Bytes(), order="continued")
    task = CausalLM(model=lstm(vocab_size=257, dim=16, units=24, num_layers=2, stateful=True))
    draft = draft_program(
        task,
        optax.sgd(0.1),
        Layout(),
        data.example,
        batch_size=4,
        devices=jax.devices()[:1],
    )
    found = executed(draft.jaxpr)
    assert sum(sum(part.values()) for part in found.values()) == 4 * task.work(data.example).flop
    assert {"layers_0/input", "layers_1/recurrent", "project", "logits"} <= set(found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"recurrent_dropout": -0.1}, "recurrent_dropout is -0.1"),
        ({"dropout_kind": "variatonal"}, "Did you mean 'variational'"),
        ({"units": 0}, "units is 0"),
    ],
)
def test_wrong_settings_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        lstm(**{**SMALL, **change})


def test_data_that_does_not_go_on_is_refused_by_a_stateful_model(folder):
    data = Text(path=folder, length=8, vocabulary=Bytes())
    model = lstm(vocab_size=257, stateful=True)
    with pytest.raises(UserError, match=r'data\.order="continued"'):
        CausalLM(model=model).check(data)


def test_no_pipeline_of_recurrent_layers(folder):
    data = Text(path=folder, length=8, vocabulary=Bytes())
    with pytest.raises(UserError, match="do not run as a pipeline"):
        draft_program(
            CausalLM(model=lstm(vocab_size=257, dim=8, units=8)),
            optax.sgd(0.1),
            Layout(stage=2),
            data.example,
            batch_size=4,
            devices=jax.devices()[:2],
        )
