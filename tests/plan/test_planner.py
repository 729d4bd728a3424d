"""A plan from end to end on 8 imaginary CPU devices, and the command's answers to bad input."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import jax
import pytest

from lmjax.config import build, load_config
from lmjax.engine.run import draft_run
from lmjax.errors import UserError
from lmjax.plan.html import page
from lmjax.plan.planner import Plan, Trial, make_plan
from lmjax.plan.report import compare, sections
from lmjax.plan.search import attempt, changes_that_save, describe, layouts, mend, search
from lmjax.plan.topology import parse_topology

ROOT = Path(__file__).parents[2]
CONFIG = "configs/gpt2.py:smoke"
# One layer in a loop, no chunks: the cheapest to compile.
SMALL = {
    "task.model.unroll": "1",
    "task.vocab_chunk": "0",
    "task.model.remat": "full",
    "layout.fsdp": "4",
    "layout.data": "2",
}
CPU, GPU, TPU = (parse_topology(name) for name in ("cpu:8", "h100:8", "v5e:2x4"))


def load(change):
    return load_config(CONFIG, {**SMALL, **change})


@pytest.fixture(scope="module")
def plan():
    return make_plan(load({}), CPU, jax.devices()[:8], name=CONFIG, overrides=SMALL)


def test_what_a_plan_knows(plan):
    run = build(load({}))
    assert plan.mesh == {"data": 2, "fsdp": 4}
    assert plan.units_per_step == 16 * 32
    assert plan.compile.compiled and plan.fits and not plan.refusal
    parameters = sum(
        x.size
        for x in jax.tree.leaves(draft_run(run, devices=jax.devices()[:8]).abstract_state.params)
    )
    assert sum(plan.parameters.values()) <= parameters  # padding is none
    assert plan.run.units == run.steps * plan.units_per_step
    assert plan.times.step_s is None  # nobody lists the peaks of this CPU


def test_state_is_split_as_the_layout_says(plan):
    """Adam has two moments of each parameter; kernels lie on 4 devices, biases on each."""
    assert plan.memory["moments"] == pytest.approx(2 * plan.memory["parameters"], rel=0.01)
    assert plan.memory["gradients"] == plan.memory["parameters"]
    whole = make_plan(
        load({"layout.fsdp": "1", "layout.data": "8"}), CPU, jax.devices()[:8], compiles=False
    )
    assert 3 < whole.memory["parameters"] / plan.memory["parameters"] < 4
    assert not whole.compile.compiled


def test_collectives_of_sharded_parameters(plan):
    """Weights are gathered over fsdp in each layer, gradients reduced over both axes."""
    kinds = {(e.kind, e.axes) for e in plan.exchanges}
    assert ("all-gather", "fsdp") in kinds
    gathered = next(e for e in plan.exchanges if (e.kind, e.axes) == ("all-gather", "fsdp"))
    kernels = 12 * 64 * 64 * 4 * 2  # bytes of both layers' kernels
    assert gathered.bytes >= 2 * kernels * 3 / 4  # forward and backward, three parts of four
    reduced = {axis for e in plan.exchanges if e.kind != "all-gather" for axis in e.axes.split()}
    assert reduced == {"data", "fsdp"}


def test_json_and_compare(plan):
    told = json.loads(json.dumps(plan.to_dict()))
    assert compare(told, told) == []
    changed = json.loads(json.dumps(told))
    changed["memory"]["parameters"] *= 2
    changed["exchanges"][0]["bytes"] *= 2
    changed["topology"] = "v5e:4x4"
    changed["compile"]["wall_s"] += 1
    rows = {row[0]: row[1:] for row in compare(told, changed)}
    first = plan.exchanges[0]
    assert set(rows) == {
        "topology",
        "memory/parameters",
        f"exchanges/{first.kind} over {first.axes}/bytes",
    }
    assert rows["topology"] == ("v5e:4x4", "cpu:8", "")
    assert rows["memory/parameters"][2] == "-50.0%"


def test_gpus_are_estimated():
    plan = make_plan(load({}), GPU, jax.devices()[:8])
    assert plan.device_kind == "NVIDIA H100 80GB HBM3" and not plan.compile.compiled
    assert plan.times.mfu is not None and 0 < plan.times.mfu <= 1
    assert {e.axes for e in plan.exchanges} == {"data", "fsdp"}
    assert any("not compiled" in note for note in plan.notes)


def test_too_little_memory_is_said(plan, devices):
    tight = dataclasses.replace(TPU.chip, program_bytes=100e3)
    told = make_plan(load({}), dataclasses.replace(CPU, chip=tight), devices, compiles=False)
    assert not told.fits and told.largest
    assert "it does not fit" in [title for title, _ in sections(told)]
    assert "does not fit" in page(told)


def test_mend_tries_changes_alone_and_then_together(plan, monkeypatch):
    """`full` and chunks save 1, microbatches 2 and 3, others nothing; it fits once 5 are saved."""
    saved = {"task.model.remat=full": 1, "task.vocab_chunk": 1}
    saved |= {"microbatches=2": 2, "microbatches=4": 3}
    tried = []

    def pretend(load, change, topology, devices):
        tried.append(change)
        total = sum(saved.get(k, saved.get(f"{k}={v}", 0)) for k, v in change.items())
        return Trial(
            change=change,
            fits=total >= 5,
            memory_bytes=plan.memory_bytes - total,
            step_s=1.0,
            serial_s=1.0,
            mfu=0.5,
            bound="compute",
        )

    monkeypatch.setattr("lmjax.plan.search.attempt", pretend)
    trials = mend(lambda c: load({"task.model.remat": "none", **c}), plan, CPU, [])
    assert trials[0].fits and not trials[1].fits
    whole = {"task.model.remat": "full", "task.vocab_chunk": "8192", "microbatches": "4"}
    assert trials[0].change == whole
    assert len({str(sorted(t.change.items())) for t in trials}) == len(trials)
    assert tried.index({"microbatches": "2"}) < tried.index(trials[0].change)
    told = [title for title, _ in sections(dataclasses.replace(plan, trials=trials))]
    assert "changes that were tried" in told


def test_changes_are_of_fields_that_there_are():
    changes = changes_that_save(load({"task.model.remat": "none"}), {"data": 2, "tensor": 2})
    assert {"task.model.remat": "full"} in changes
    assert {"task.vocab_chunk": "8192"} in changes
    assert {"layout.data": "1", "layout.fsdp": "-1", "layout.tensor": "4"} in changes
    assert {"microbatches": "2"} in changes
    assert {"task.model.remat": "full"} not in changes_that_save(load({}), {})


def test_layouts_divide_the_devices():
    found = list(layouts(32, 2, experts=True))
    assert {s["slices"] for s in found} == {2}
    for sizes in found:
        product = 1
        for size in sizes.values():
            product *= size
        assert product == 32
    assert len({tuple(s.items()) for s in found}) == len(found)
    assert {s["expert"] for s in layouts(16, 1, experts=False)} == {1}


@pytest.mark.slow
def test_search_compiles_the_best_few(devices, monkeypatch):
    few = [dict(fsdp=4, data=2), dict(fsdp=8, data=1), dict(fsdp=1, data=8), dict(fsdp=3, data=1)]
    monkeypatch.setattr("lmjax.plan.search.layouts", lambda *sizes, **options: few)
    roomy = dataclasses.replace(CPU, chip=TPU.chip)
    said = []
    trials = search(load, {}, roomy, devices, compiles=1, say=said.append)
    assert "3 layouts divide" in said[0]  # 3 does not
    assert len(trials) == 1 and trials[0].fits and trials[0].step_s
    assert "fits" in describe(trials[0])


def test_a_change_that_does_not_divide_is_none(devices):
    assert attempt(load, {"layout.fsdp": "3"}, CPU, devices) is None


def test_page_shows_memory_and_time(plan):
    timed = dataclasses.replace(
        make_plan(load({}), GPU, jax.devices()[:8]), limit_bytes=plan.memory_bytes
    )
    text = page(timed)
    pictures = [part.partition("</svg>")[0] + "</svg>" for part in text.split("<svg")[1:]]
    assert len(pictures) == 2
    for picture in pictures:
        ElementTree.fromstring("<svg" + picture)
    assert "limit" in pictures[0] and "parameters" in pictures[0]
    assert "compute" in pictures[1] and "all-gather (fsdp)" in pictures[1]
    assert "<script" not in text and "http" not in text.replace("http://www.w3.org", "")


def test_what_cannot_be_traced_is_a_sentence(monkeypatch, devices):
    def broken(run, devices):
        raise TypeError("this product does not\nfit")

    monkeypatch.setattr("lmjax.plan.planner.draft_run", broken)
    with pytest.raises(UserError, match="cannot be traced for cpu:8: TypeError: this product"):
        make_plan(load({}), CPU, devices, name="x.py")


def test_what_the_compiler_refuses_is_a_sentence(monkeypatch, devices):
    draft = draft_run(build(load({})), devices=devices)
    tpu_like = dataclasses.replace(CPU, chip=TPU.chip)

    def refusing(message):
        def compile_step():
            raise RuntimeError(message)

        monkeypatch.setattr(
            "lmjax.plan.planner.draft_run",
            lambda run, devices: dataclasses.replace(draft, compile=compile_step),
        )
        return make_plan(load({}), tpu_like, devices, name="x.py")

    with pytest.raises(UserError, match="does not compile for cpu:8: RuntimeError: UNIMPLEMENTED"):
        refusing("UNIMPLEMENTED: no such thing\nat all")
    plan: Plan = refusing(
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (112.00G) exceeds available HBM (15.75G)."
    )
    assert not plan.fits and plan.largest
    kinds = ("gradients", "activations", "temporaries")
    assert sum(plan.memory[kind] for kind in kinds) == pytest.approx(112 * 2**30)


def command(*flags):
    return subprocess.run(
        [sys.executable, "-m", "lmjax.plan", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_command(tmp_path):
    overrides = [f"--config.{name}={value}" for name, value in SMALL.items()]
    files = [f"--json={tmp_path}/plan.json", f"--html={tmp_path}/plan.html"]
    done = command(f"--config={CONFIG}", "--topology=h100:8", *overrides, *files)
    assert done.returncode == 0, done.stderr
    for part in ("parameters", "all-gather", "Chinchilla", "memory of one device"):
        assert part in done.stdout
    told = json.loads((tmp_path / "plan.json").read_text())
    assert told["num_devices"] == 8 and told["memory_bytes"] > 0
    assert (tmp_path / "plan.html").read_text().startswith("<!doctype html>")


@pytest.mark.slow
@pytest.mark.parametrize(
    "topology, compiler, layout",
    [
        ("v5e:4x4", "libtpu", {"fsdp": 4, "tensor": 4}),
        ("2*v5e:2x2", "libtpu", {"slices": 2, "fsdp": 4}),
        ("h100:16", "jax_cuda12_plugin", {"fsdp": 16}),
    ],
)
def test_command_compiles_for_chips_that_are_not_there(topology, compiler, layout, tmp_path):
    if importlib.util.find_spec(compiler) is None:
        pytest.skip(f"{compiler} is not installed: extra plan-tpu or plan-gpu")
    flags = [f"--config.layout.{a}={n}" for a, n in {"data": 1, **layout}.items()]
    file = tmp_path / "plan.json"
    done = command(f"--config={CONFIG}", f"--topology={topology}", f"--json={file}", *flags)
    assert done.returncode == 0, done.stderr
    told = json.loads(file.read_text())
    assert told["compile"]["compiled"] and told["fits"] and told["mesh"] == layout
    assert {a for e in told["exchanges"] for a in e["axes"].split()} == set(layout)
    assert 0 < told["times"]["mfu"] <= 1
    seconds = [e["seconds"] for e in told["exchanges"]]
    assert told["times"]["network_s"] == pytest.approx(sum(seconds)) and min(seconds) > 0


@pytest.mark.parametrize(
    "flags, message",
    [
        ((f"--config={CONFIG}",), "--topology is not given. Known: v5e:4x4"),
        ((f"--config={CONFIG}", "--topology=v9:4x4"), "unknown topology 'v9:4x4'"),
        ((f"--config={CONFIG}", "--topology=cpu:2", "--compare=none.json"), "cannot be read"),
    ],
)
def test_command_with_bad_flags(flags, message):
    done = command(*flags)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
