"""The contract of docs/determinism.md: the token stream to the byte, losses to the bit or to 1e-5.

A small GPT learns a mixture of two corpora of packed documents for 50 steps in float32. What a run
reports at every step is compared, through deaths, resumes and moves to other layouts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from lmjax.core import Batch
from lmjax.data.mixture import Mixture
from lmjax.data.text import Text
from lmjax.data.vocabulary import Bytes
from lmjax.engine.curves import read_metrics
from lmjax.engine.loop import Run, train
from lmjax.models.gpt import gpt
from lmjax.models.moe import moe
from lmjax.optim.presets import adamw
from lmjax.optim.schedules import cosine
from lmjax.sharding import Layout
from lmjax.tasks.causal_lm import CausalLM

ROOT = Path(__file__).parents[1]
STEPS, B, T, SEED = 50, 8, 32, 3
TOLERANCE = 1e-5  # relative, of losses, over 50 steps in float32
LIMIT_S = 300

# Of batches 0, 1, 2, 39 and 40 below: another number of any library's is another token stream, and
# runs that began before it cannot go on after it.
GOLDEN = "ad826a49be6c542536ea243aab22fc4dd9bcf486cd019625722a1d71d9d3b463"


def write_corpora(folder: Path) -> None:
    """Two folders of documents, of words that hashes spell: the same for every library."""
    for name, count in (("many", 30), ("few", 5)):
        (folder / name).mkdir()
        for index in range(count):
            spelled = hashlib.sha512(f"{name} {index}".encode()).hexdigest() * 2
            words = [spelled[i : i + 1 + int(spelled[i], 16) % 5] for i in range(0, 200, 4)]
            text = " ".join(words[: 3 + int(spelled[-2:], 16) % 48]) + " é漢🎭"
            (folder / name / f"{index:02}.txt").write_text(text, "utf-8")


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpora")
    write_corpora(folder)
    return folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mortal(Mixture):
    """A mixture whose reader dies instead of giving batch `dies_at`, as a process would."""

    dies_at: int = -1

    def batches(self, *, start: int = 0, **options: Any) -> Iterator[Batch]:
        for number, batch in enumerate(super().batches(start=start, **options), start):
            if number == self.dies_at:
                raise Died
            yield batch


class Died(Exception):
    pass


def data(corpora: Path, **fields: Any) -> Mortal:
    """Documents packed, some of several bytes a character, two to one."""
    many = Text(path=str(corpora / "many"), length=T, vocabulary=Bytes(), valid_fraction=0.1)
    few = dataclasses.replace(many, path=str(corpora / "few"), valid_fraction=0)
    sources = {"many": many, "few": few}
    return Mortal(sources=sources, weights={"many": 2, "few": 1}, **fields)


def bits(batches: list[Batch]) -> list[dict[str, tuple[str, tuple[int, ...], bytes]]]:
    """All that there is to a batch's arrays."""
    return [{k: (v.dtype.str, v.shape, v.tobytes()) for k, v in b.items()} for b in batches]


def take(source: Mixture, count: int, **options: Any) -> list[Batch]:
    batches = source.batches(**{"batch_size": B, "seed": SEED, **options})
    taken = list(itertools.islice(batches, count))
    batches.close()
    return taken


def test_the_token_stream_is_the_same_for_every_reader(corpora):
    """Wherever it starts, in however many parts it is read."""
    source, size = data(corpora), 12
    whole = take(source, size)
    assert bits(take(source, size)) == bits(whole)
    assert bits(take(source, 1, seed=SEED + 1)) != bits(whole[:1])
    for start in (1, 7, 11):
        assert bits(take(source, size - start, start=start)) == bits(whole[start:])
    for shards in (2, 4, 8):
        parts = [take(source, size, shard=i, num_shards=shards) for i in range(shards)]
        joined = [
            {k: np.concatenate([part[k] for part in step]) for k in step[0]}
            for step in zip(*parts, strict=True)
        ]
        assert bits(joined) == bits(whole)
    assert any((b["segments"] > 1).any() for b in whole)  # packed


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_token_stream_is_the_same_for_any_number_of_workers(workers, corpora):
    source = data(corpora)
    whole, read = take(source, 12), dataclasses.replace(source, workers=workers)
    assert bits(take(read, 12)) == bits(whole)
    part = take(read, 9, start=3, shard=1, num_shards=2)
    assert bits(part) == bits([{k: v[B // 2 :] for k, v in b.items()} for b in whole[3:]])


def test_the_token_stream_is_the_one_of_every_machine_and_version(corpora):
    source, found = data(corpora), hashlib.sha256()
    for batch in [*take(source, 3), *take(source, 2, start=39)]:
        for name in sorted(batch):
            found.update(batch[name].tobytes())
    assert found.hexdigest() == GOLDEN, (
        "this version of lmjax, numpy or grain reads other batches than those before it: runs that "
        "began before would repeat or miss text. If that is meant, say so where versions are "
        "described, and store the new digest."
    )


def network(kind: str) -> CausalLM:
    sizes = {"num_layers": 2, "dim": 32, "vocab_size": 257, "vocab_multiple": 8, "max_length": T}
    if kind == "gpt":
        return CausalLM(model=gpt(num_heads=4, **sizes))
    experts = {"num_experts": 4, "experts_per_token": 2, "expert_hidden": 16}
    model = moe(num_heads=8, num_kv_heads=4, head_dim=8, num_shared_experts=1, **experts, **sizes)
    return CausalLM(model=model, aux_losses={"load_balance_loss": 0.01})


def run_on(
    corpora: Path,
    workdir: Path,
    devices: int,
    *,
    kind: str = "gpt",
    dies_at: int = -1,
    microbatches: int = 1,
    **axes: int,
) -> jax.Array | None:
    """Runs, or goes on with, the one run that all tests here compare; None where it dies."""
    run = Run(
        task=network(kind),
        optimizer=adamw(learning_rate=cosine(peak=3e-3, steps=STEPS, warmup_steps=5)),
        data=data(corpora, dies_at=dies_at),
        steps=STEPS,
        batch_size=B,
        seed=SEED,
        layout=Layout(**{"data": 1, **axes}),
        microbatches=microbatches,
        save_every=12,
        log_every=1,
    )
    try:
        return train(run, workdir, devices=jax.devices()[:devices], quiet=True)
    except Died:
        return None


def losses(workdir: Path) -> np.ndarray:
    """Of steps 1, 2, ..., each once."""
    rows = [row for row in read_metrics(workdir / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return np.array([row["loss"] for row in rows])


def close(found: np.ndarray, expected: np.ndarray) -> None:
    assert len(found) == len(expected) == STEPS
    np.testing.assert_allclose(found, expected, rtol=TOLERANCE, atol=0)


@pytest.fixture(scope="module", autouse=True)
def no_pictures():
    """They are no part of the contract, and slow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lmjax.engine.report.draw_curves", lambda *arguments, **options: None)
        yield


@pytest.fixture(scope="module")
def uninterrupted(corpora, tmp_path_factory):
    """(state, losses) of one device."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    state = run_on(corpora, folder, 1)
    found = losses(folder)
    assert found[-1] < 0.6 * found[0]  # it learns, so that differences could grow
    return jax.device_get(state), found


@pytest.mark.slow  # by default test_configs resumes a run, and test_launcher kills one
@pytest.mark.parametrize("deaths", [(21,), (5, 12, 13, 47)], ids=str)
def test_a_run_that_dies_and_is_started_again_is_bit_equal(
    deaths, corpora, uninterrupted, tmp_path
):
    """Whether before the first checkpoint, on one, or after one."""
    state, expected = uninterrupted
    for dies_at in deaths:
        assert run_on(corpora, tmp_path, 1, dies_at=dies_at) is None
    found = run_on(corpora, tmp_path, 1)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), state)
    np.testing.assert_array_equal(losses(tmp_path), expected)


@pytest.mark.slow
def test_a_run_that_moves_to_another_layout_agrees(corpora, uninterrupted, tmp_path):
    """From 4 devices to one, and what the 4 did until then."""
    assert run_on(corpora, tmp_path, 4, dies_at=30, data=2, fsdp=2) is None
    run_on(corpora, tmp_path, 1)
    close(losses(tmp_path), uninterrupted[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "axes",
    [
        ({"data": 8}, {"fsdp": 4}, {"tensor": 2}),
        ({"fsdp": 2, "tensor": 4}, {"stage": 2, "context": 2}, {"slices": 2}),
    ],
    ids=str,
)
def test_a_run_that_moves_from_8_to_4_to_2_to_1_agrees(axes, corpora, uninterrupted, tmp_path):
    """And what it moves through differs from the one-device run by rounding alone."""
    for devices, layout, dies_at in zip((8, 4, 2), axes, (13, 26, 39), strict=True):
        assert run_on(corpora, tmp_path, devices, dies_at=dies_at, **layout) is None
    state = run_on(corpora, tmp_path, 1)
    close(losses(tmp_path), uninterrupted[1])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
        jax.device_get(state.params),
        uninterrupted[0].params,
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt", "moe"])
def test_every_layout_agrees_over_50_steps(kind, corpora, tmp_path):
    run_on(corpora, tmp_path / "one", 1, kind=kind)
    expected = losses(tmp_path / "one")
    for number, (devices, options) in enumerate(
        [
            (1, {"microbatches": 8}),
            (2, {"data": 2, "microbatches": 4}),
            (4, {"fsdp": 4, "microbatches": 2}),
            (4, {"tensor": 4}),
            (4, {"context": 4}),
            (8, {"data": 8}),
            (8, {"fsdp": 2, "tensor": 2, "context": 2}),
            (8, {"slices": 2, "stage": 2, "expert": 2}),
        ]
    ):
        run_on(corpora, tmp_path / str(number), devices, kind=kind, **options)
        close(losses(tmp_path / str(number)), expected)


@pytest.mark.slow
def test_deaths_on_8_devices_are_bit_equal(corpora, tmp_path):
    axes = {"data": 2, "fsdp": 2, "tensor": 2, "microbatches": 2}
    whole = run_on(corpora, tmp_path / "whole", 8, **axes)
    for dies_at in (3, 17, 25, 49):
        assert run_on(corpora, tmp_path / "torn", 8, dies_at=dies_at, **axes) is None
    torn = run_on(corpora, tmp_path / "torn", 8, **axes)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(torn), jax.device_get(whole))
    np.testing.assert_array_equal(losses(tmp_path / "torn"), losses(tmp_path / "whole"))


CONFIG = """
from lmjax.config import call
from lmjax.data.mixture import Mixture
from lmjax.data.text import Text
from lmjax.data.vocabulary import Bytes
from lmjax.engine.loop import Run
from lmjax.models.gpt import gpt
from lmjax.optim.presets import adamw
from lmjax.optim.schedules import cosine
from lmjax.sharding import Layout
from lmjax.tasks.causal_lm import CausalLM

def get_config():
    def text(name, fraction):
        path = "{folder}/" + name
        return call(
            Text, path=path, length=32, vocabulary=call(Bytes), valid_fraction=fraction
        )
    model = call(gpt, num_layers=2, dim=32, num_heads=4, vocab_size=257, max_length=32)
    return call(
        Run,
        task=call(CausalLM, model=model),
        optimizer=call(adamw, learning_rate=call(cosine, peak=3e-3, steps=50, warmup_steps=5)),
        data=call(
            Mixture,
            sources=dict(many=text("many", 0.1), few=text("few", 0.0)),
            weights=dict(many=2.0, few=1.0),
        ),
        steps=50,
        batch_size=8,
        save_every=8,
        log_every=1,
    )
"""


class Commands:
    """The launcher in processes of its own, each with other hashes, each run with its own cache."""

    def __init__(self, folder: Path, corpora: Path) -> None:
        self.folder, self.count = folder, 0
        (folder / "config.py").write_text(CONFIG.replace("{folder}", str(corpora)))

    def start(self, name: str, devices: int, *flags: str, count: int = 1) -> list[subprocess.Popen]:
        """`count` processes of one run with `devices` devices each."""
        self.count += 1
        environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS",)}
        environment |= {
            "LMJAX_CACHE": str(self.folder / f"cache-{name}"),
            "PYTHONHASHSEED": str(self.count),
        }
        if count > 1:
            with socket.create_server(("", 0)) as server:
                address = f"{socket.gethostname()}:{server.getsockname()[1]}"
            environment |= {"LMJAX_COORDINATOR": address, "LMJAX_NUM_PROCESSES": str(count)}
        command = [sys.executable, "-m", "lmjax.train", f"--config={self.folder}/config.py"]
        command += [f"--workdir={self.folder / name}", f"--devices={devices}", *flags]
        return [
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment | ({"LMJAX_PROCESS_ID": str(i)} if count > 1 else {}),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for i in range(count)
        ]

    def whole(self, *arguments: Any, **options: Any) -> None:
        """Runs to the end."""
        for process in self.start(*arguments, **options):
            output = process.communicate(timeout=LIMIT_S)[0]
            assert process.returncode == 0, output

    def killed(self, step: int, name: str, *arguments: Any, **options: Any) -> None:
        """Runs until `step` is reported, and kills every process."""
        processes = self.start(name, *arguments, **options)
        metrics, deadline = self.folder / name / "metrics.jsonl", time.monotonic() + LIMIT_S
        while not (metrics.exists() and len(metrics.read_text().splitlines()) >= step):
            alive = all(process.poll() is None for process in processes)
            assert alive and time.monotonic() < deadline, processes[0].communicate()[0]
            time.sleep(0.01)
        for process in processes:
            process.send_signal(signal.SIGKILL)
        assert {process.wait() for process in processes} == {-signal.SIGKILL}


@pytest.mark.slow
def test_killed_processes_and_other_processes_agree(corpora, tmp_path):
    """Of 4 devices: bit-equal after -9, and to 1e-5 as two processes or after moving to them."""
    commands = Commands(tmp_path, corpora)
    commands.whole("whole", 4)
    expected = losses(tmp_path / "whole")
    assert len(expected) == STEPS

    commands.killed(12, "killed", 4)
    commands.killed(25, "killed", 4)
    commands.whole("killed", 4)
    np.testing.assert_array_equal(losses(tmp_path / "killed"), expected)

    commands.whole("two", 2, count=2)
    close(losses(tmp_path / "two"), expected)

    commands.killed(10, "moved", 8)
    commands.killed(25, "moved", 1, "--config.layout.fsdp=2", "--config.layout.data=1", count=2)
    commands.whole("moved", 1, "--config.microbatches=4")
    close(losses(tmp_path / "moved"), expected)
