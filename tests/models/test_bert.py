"""BERT: agreement with transformers on whole, packed and padded rows; sizes; devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax import sharding
from lmjax.engine.state import paths_of
from lmjax.errors import UserError
from lmjax.models.bert import bert
from lmjax.ops.losses import cross_entropy, logits
from lmjax.sharding import Layout, unbox
from tests.models import bert_reference
from tests.models.bert_reference import LENGTH, PADDING, ROWS, from_torch_names
from tests.models.test_families import same_gradients, shapes_of, variables_of
from tests.models.test_llama import abstract_params, count

SIZES = {
    "num_layers": 3,
    "dim": 32,
    "num_heads": 4,
    "hidden": 40,
    "vocab_size": 37,
    "max_length": 28,
    "token_head": True,
}


@functools.cache
def stored():
    return dict(np.load(bert_reference.PATH))


def weights_of(arrays, *, seed=0):
    """The reference's weights, by our names; the file holds gradients of their shapes."""
    names = {k.removeprefix("gradient:"): x.shape for k, x in arrays.items() if ":" in k}
    drawn = {name: bert_reference.weight(name, x, seed=seed) for name, x in names.items()}
    return from_torch_names(drawn, num_heads=4)


def measured(model, batch, chunk=0):
    """variables -> (loss, (logits, pooled)): that of the reference."""
    batch = {name: jnp.asarray(x) for name, x in batch.items()}
    probe_BD = jnp.resize(bert_reference.probe(), (len(batch["tokens"]), 32))

    def loss(variables, *, train=False, rngs=None):
        output = model.apply(
            variables,
            batch["tokens"],
            positions_BT=batch["positions"],
            segments_BT=batch["segments"],
            token_types_BT=batch["token_types"],
            train=train,
            rngs=rngs,
        )
        scored = output.predicting_BTD, output.unembedding
        nll_BT, _ = cross_entropy(*scored, batch["targets"], vocab_chunk=chunk)
        found = jnp.sum(nll_BT * batch["weights"]) / jnp.sum(batch["weights"])
        return found + jnp.sum(output.pooled_BD * probe_BD), (logits(*scored), output.pooled_BD)

    return loss


def agrees(arrays, *, seed=0):
    """Asserts equal logits, pooled vectors, loss and gradients."""
    model, weights = bert(**SIZES), weights_of(arrays, seed=seed)
    assert shapes_of(abstract_params(model)) == {k: x.shape for k, x in weights.items()}
    loss = measured(model, bert_reference.rows(seed=seed))
    made = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables_of(weights))
    (found, (scores, pooled)), gradients = made
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    close(found, arrays["loss"], rtol=1e-5)
    close(pooled, arrays["pooled"])
    close(scores[: 2 * ROWS], arrays["logits"][: 2 * ROWS])
    close(scores[2 * ROWS :, :-PADDING], arrays["logits"][2 * ROWS :, :-PADDING])
    names = {k.removeprefix("gradient:"): x for k, x in arrays.items() if ":" in k}
    same_gradients(gradients["params"], from_torch_names(names, num_heads=4), atol=1e-4)


def test_equals_stored_transformers_reference():
    """Of random weights that `bert_reference` gave to a model of transformers."""
    agrees(stored())


@pytest.mark.slow
def test_equals_live_transformers():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    agrees(bert_reference.measure(seed=1), seed=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "chunk"),
    [
        ({"data": 2, "tensor": 2, "context": 2}, 10),
        ({"data": 2, "fsdp": 2, "tensor": 2}, 0),
        ({"data": 2, "stage": 2, "tensor": 2}, 0),
    ],
)
def test_eight_devices_equal_one(devices, layout, chunk):
    """Rows, heads, the vocabulary with its bias, the length and the layers split."""
    model = bert(**{**SIZES, "num_layers": 2}, vocab_multiple=4)
    weights = weights_of(stored())
    for path, x in weights.items():
        if path.startswith("blocks"):
            weights[path] = x[:2]
    weights["embed/table"] = np.pad(weights["embed/table"], ((0, 3), (0, 0)))
    weights["head/bias"] = np.pad(weights["head/bias"], (0, 3))
    variables = variables_of(weights)
    batch = {name: np.concatenate([x, x[:2]]) for name, x in bert_reference.rows().items()}
    loss = measured(model, batch, chunk)

    def total(variables):
        return loss(variables)[0]

    def spread(variables):
        chosen = Layout(**layout)
        with sharding.use(chosen.mesh(devices), chosen):
            return total(variables)

    value, gradients = jax.jit(jax.value_and_grad(total))(variables)
    spread_value, spread_gradients = jax.jit(jax.value_and_grad(spread))(variables)
    np.testing.assert_allclose(spread_value, value, rtol=1e-5)
    same_gradients(spread_gradients["params"], paths_of(gradients["params"]), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"remat": "attention"}, {"remat": "full", "unroll": 3}])
def test_remat_and_unroll_change_no_number(change):
    arrays = stored()
    variables, batch = variables_of(weights_of(arrays)), bert_reference.rows()
    loss = measured(bert(**SIZES, **change), batch)
    (found, _), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables)
    np.testing.assert_allclose(found, arrays["loss"], rtol=1e-5)
    names = {k.removeprefix("gradient:"): x for k, x in arrays.items() if ":" in k}
    same_gradients(gradients["params"], from_torch_names(names, num_heads=4), atol=1e-4)


@pytest.mark.slow
def test_dropout_acts_in_training_only_and_bfloat16_is_near():
    arrays = stored()
    variables, batch = variables_of(weights_of(arrays)), bert_reference.rows()
    train = jax.jit(
        lambda rng: measured(bert(**SIZES), batch)(variables, train=True, rngs={"dropout": rng})[0]
    )
    first, other = (float(train(jax.random.key(seed))) for seed in (0, 1))
    assert first != other and abs(first - arrays["loss"]) > 1e-3
    calm = jax.jit(lambda: measured(bert(**SIZES, dropout=0.0), batch)(variables, train=True)[0])
    np.testing.assert_allclose(calm(), arrays["loss"], rtol=1e-5)
    low = jax.jit(measured(bert(**SIZES, dtype="bfloat16"), batch))(variables)
    np.testing.assert_allclose(low[1][1], arrays["pooled"], atol=0.1)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"size": "base"}, 109_482_240),
        ({"size": "large"}, 335_141_888),
        ({"size": "tiny"}, 4_385_920),
        ({"size": "minilm-l6"}, 22_713_216),
        ({"size": "base", "pooler": False, "token_head": True}, 109_514_298),
        ({"size": "base", "vocab_multiple": 128, "token_head": True}, 110_104_890),
    ],
)
def test_exact_parameter_counts(arguments, expected):
    """Those of BertModel and BertForMaskedLM; rows that pad the vocabulary do not count."""
    assert count(bert(**arguments)) == expected


@pytest.mark.slow
@pytest.mark.parametrize("std", [0.02, 0.05])
def test_initialisation_is_as_the_table_says(std):
    sizes = {**SIZES, "dim": 64, "hidden": 256, "vocab_size": 500, "max_length": 100}
    model = bert(**sizes, **({} if std == 0.02 else {"init_std": std}))
    made = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    for path, x in paths_of(unbox(made)["params"]).items():
        if path.endswith(("kernel", "table")):
            error = 5 * std / np.sqrt(2 * x.size)  # five deviations of the estimate
            assert abs(np.std(x) - std) < error and abs(np.mean(x)) < 2 * error, path
        else:
            assert np.all(x == float(path.endswith("scale"))), path


def test_flop_counts_attention_in_full_and_the_heads():
    sizes = {**SIZES, "num_layers": 1, "token_head": False}
    block = 2 * (4 * 32 * 32 + 2 * 32 * 40) + 4 * 32 * 8
    assert bert(**sizes, pooler=False).flop_per_token(8) == (block, block)
    assert bert(**sizes).flop_per_token(8)[0] == block + 2 * 32 * 32 / 8
    whole = bert(**{**sizes, "token_head": True}, pooler=False)
    assert whole.flop_per_token(8)[1] == block + 2 * 32 * (32 + 37)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": "Base"}, "no preset of size 'Base'. Did you mean 'base'"),
        ({"num_heads": 5}, "dim 32 is no multiple of num_heads 5"),
        ({"hidden": 0}, "hidden is 0"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"epsilon": 0.0}, "epsilon is 0.0"),
        ({"init_std": 0.0}, "init_std is 0.0"),
        ({"activation": "relu"}, "activation is 'relu'"),
    ],
)
def test_wrong_settings_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        bert(**{**SIZES, **change})


def test_a_row_that_is_too_long_is_refused():
    model = bert(**SIZES)
    tokens = jax.ShapeDtypeStruct((1, LENGTH + 5), jnp.int32)
    with pytest.raises(UserError, match="29 tokens are longer than the model's max_length 28"):
        jax.eval_shape(model.init, jax.random.key(0), tokens)
