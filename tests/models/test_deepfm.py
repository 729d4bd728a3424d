import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax import sharding
from lmjax.data.movielens import GENRES, read_movielens
from lmjax.data.table import Table
from lmjax.errors import UserError
from lmjax.models.deepfm import deepfm


def test_scores_are_weights_pairs_and_a_perceptron():
    """Against equation 1 of the factorisation machine, pair by pair, and layers written out."""
    random = np.random.default_rng(0)
    model = deepfm(num_categories=9, dim=3, hidden=(4,), dropout=0.0)
    batch = {
        "categories": random.integers(0, 9, (5, 2)),
        "features": random.standard_normal((5, 2)).astype(np.float32),
    }
    params = sharding.unbox(model.init(jax.random.key(0), batch)["params"])
    params = jax.tree.map(
        lambda x: jnp.asarray(random.standard_normal(x.shape), jnp.float32), params
    )
    p = jax.device_get(params)
    expected = []
    for codes, x in zip(batch["categories"], batch["features"], strict=True):
        vectors = [p["table"]["table"][c] for c in codes]
        vectors += [x[f] * p["feature_vectors"][f] for f in range(2)]
        score = p["bias"][0] + sum(p["weights"][c] for c in codes) + x @ p["feature_weights"]
        score += sum(a @ b for a, b in itertools.combinations(vectors, 2))
        hidden = np.concatenate(vectors) @ p["hidden1"]["kernel"] + p["hidden1"]["bias"]
        expected.append(score + (np.maximum(hidden, 0) @ p["output"]["kernel"])[0])
    found = model.apply({"params": params}, batch).values_BC
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-4, atol=1e-5)
    counts = model.count_params(params)
    assert counts["table"] == 9 * 3 and counts["weights"] == 9


def test_ratings_are_joined_with_both_sides(tmp_path):
    (tmp_path / "ml-100k.user").write_text(
        "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n"
        "7\t24\tM\twriter\t85711\n"
    )
    (tmp_path / "ml-100k.item").write_text(
        "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
        '3\tFour "Rooms\t1995\tComedy Film-Noir\n'
    )
    (tmp_path / "ml-100k.inter").write_text(
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n7\t3\t4\t0\n7\t3\t3\t0\n"
    )
    rows = read_movielens(tmp_path)
    assert rows.cells[0][:6] == ["7", "3", "20s", "M", "writer", "1995"]
    assert [g for g, one in zip(GENRES, rows.cells[0][6:], strict=False) if one == "1"] == [
        "Comedy",
        "Film-Noir",
    ]
    assert [row[-1] for row in rows.cells] == ["yes", "no"]
    (tmp_path / "ml-100k.user").unlink()
    with pytest.raises(UserError, match=r"ml-100k.user cannot be read"):
        read_movielens(tmp_path)


def test_a_table_with_more_categories_is_refused():
    data = Table(
        path="made:movielens", target="liked", categorical=("user", "item"), numeric=GENRES
    )
    deepfm(num_categories=200).check(data)
    with pytest.raises(UserError, match="num_categories is 20: set it"):
        deepfm(num_categories=20).check(data)
    with pytest.raises(UserError, match="each must be at least 1"):
        deepfm(num_categories=0)
