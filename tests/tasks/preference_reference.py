"""Losses and gradients of trl's own trainers on a table of logits, one row for each token.

`HF_HUB_OFFLINE=1 python -m tests.tasks.preference_reference` (with torch, transformers and trl
1.16.0) writes preference_reference.npz. The trainers' methods are called on an object that holds
what they read, with models that give the log-probabilities of the tables. trl has no conservative
DPO: that one alone is written out here.
"""

import collections
from pathlib import Path
from types import SimpleNamespace

import numpy as np

PATH = Path(__file__).with_suffix(".npz")
ROWS, LENGTH, VOCABULARY = 5, 9, 7
BETA, SMOOTHING, WEIGHT = 0.3, 0.2, 0.25
DESIRABLE, UNDESIRABLE = 1.5, 0.75
CASES = ("dpo", "cdpo", "ipo", "orpo", "kto", "kto_clamped")


def tables():
    """(policy, reference) logits of the next token, [V, V] each."""
    random = np.random.default_rng(3)
    return [random.normal(size=(VOCABULARY, VOCABULARY)).astype("f4") for _ in range(2)]


def texts(seed):
    """Ids [rows, length + 1], which of them are text, and which of the completion."""
    random = np.random.default_rng(seed)
    ids = random.integers(0, VOCABULARY, (ROWS, LENGTH + 1))
    prompts, sizes = random.integers(1, 5, ROWS), random.integers(6, LENGTH + 2, ROWS)
    at = np.arange(LENGTH + 1)
    real = (at < sizes[:, None]).astype("i4")
    return ids * real, real, real * (at >= prompts[:, None])


def labels():
    return np.array([1, 0, 0, 1, 0])


def batch(case):
    """The same texts as lmjax's data gives them."""
    found = {}
    kto = case.startswith("kto")
    for side, seed in zip(
        ("", "kl_") if kto else ("chosen_", "rejected_"), seeds(case), strict=True
    ):
        ids, real, said = texts(seed)
        found[f"{side}tokens"] = ids[:, :-1].astype("i4")
        found[f"{side}targets"] = ids[:, 1:].astype("i4")
        found[f"{side}segments"] = real[:, 1:].astype("i4")
        found[f"{side}weights"] = said[:, 1:].astype("f4")
    return found | ({"labels": labels().astype("i4")} if kto else {})


def seeds(case):
    """Of the two texts of a row; with the second of KTO's, its estimate is negative or not."""
    return {"kto": (11, 13), "kto_clamped": (11, 12)}.get(case, (11, 12))


def case(name):
    """(loss, its gradient by the policy's table, the reference point of KTO)."""
    import torch

    policy, reference = (torch.tensor(x) for x in tables())
    policy.requires_grad_()
    trainer = _trainer(_Table(policy), _Table(reference))
    first, second = (list(map(torch.as_tensor, texts(seed))) for seed in seeds(name))
    if name == "orpo":
        loss = _orpo(trainer, first, second)
    elif name.startswith("kto"):
        loss = _kto(trainer, first, second)
    else:
        loss = _dpo(trainer, first, second, name)
    (gradient,) = torch.autograd.grad(loss, policy)
    kl = trainer._metrics["train"]["kl"]
    return {
        "loss": np.float32(loss.item()),
        "gradient": gradient.numpy(),
        "kl": np.float32(kl[0] if kl else 0),
    }


class _Table:
    """A model as the trainers call it: the logits of the next token are a row of a table."""

    training = True
    is_gradient_checkpointing = False
    _modules = ()  # accelerate looks for compiled parts among these

    def __init__(self, logits):
        self.logits = logits

    def __call__(self, input_ids, attention_mask=None, labels=None, **_):
        import torch

        logits = self.logits[input_ids]
        if labels is None:
            return SimpleNamespace(logits=logits)
        targets, logits = labels[:, 1:], logits[:, :-1]
        logs = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        return SimpleNamespace(
            log_probs=torch.where(targets == -100, 0.0, logs),
            entropy=torch.zeros_like(logs),
            mean_logits=torch.zeros_like(logs),
            is_top1=torch.zeros_like(logs, dtype=torch.bool),
        )


def _trainer(policy, reference):
    def same(x):
        return x

    return SimpleNamespace(
        model=policy,
        ref_model=reference,
        accelerator=SimpleNamespace(
            device="cpu", gather=same, gather_for_metrics=same, unwrap_model=same
        ),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        beta=BETA,
        label_smoothing=0.0,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=False,
        f_divergence_type="reverse_kl",
        loss_weights=[1.0],
        use_weighting=False,
        calculate_KL=True,
        loss_type="kto",
        desirable_weight=DESIRABLE,
        undesirable_weight=UNDESIRABLE,
        is_encoder_decoder=False,
        padding_value=0,
        _total_train_tokens=0,
        _tp_size=1,
        _metrics={"train": collections.defaultdict(list)},
    )


def _dpo(trainer, first, second, name):
    import torch
    from trl import DPOTrainer

    ids, real, said = (torch.cat(both) for both in zip(first, second, strict=True))
    inputs = {"input_ids": ids, "attention_mask": real, "completion_mask": said}
    trainer.loss_types = ["ipo" if name == "ipo" else "sigmoid"]
    if name != "cdpo":
        return DPOTrainer._compute_loss(trainer, trainer.model, inputs, False)
    masked = ids.masked_fill(said == 0, -100)
    ratio = (trainer.model(ids, labels=masked).log_probs).sum(1)
    ratio = ratio - trainer.ref_model(ids, labels=masked).log_probs.sum(1)
    chosen, rejected = ratio.chunk(2)
    log = torch.nn.functional.logsigmoid
    margin = BETA * (chosen - rejected)
    return (-(1 - SMOOTHING) * log(margin) - SMOOTHING * log(-margin)).mean()


def _kto(trainer, first, second):
    import torch
    from trl import KTOTrainer

    names = ("input_ids", "attention_mask", "completion_mask")
    inputs = dict(zip(names, first, strict=True))
    inputs |= {f"KL_{name}": x for name, x in zip(names, second, strict=True)}
    trainer._compute_kl_logps = lambda *args: KTOTrainer._compute_kl_logps(trainer, *args)
    inputs["label"] = torch.as_tensor(labels() == 1)
    return KTOTrainer._compute_loss(trainer, trainer.model, inputs, False)


def _orpo(trainer, first, second):
    from trl.experimental.orpo import ORPOTrainer

    trainer.beta = WEIGHT
    inputs = {}
    for side, (ids, real, said) in (("chosen", first), ("rejected", second)):
        inputs[f"{side}_input_ids"], inputs[f"{side}_attention_mask"] = ids, real
        inputs[f"{side}_labels"] = ids.masked_fill(said == 0, -100)
    for name in ("concatenated_inputs", "get_batch_logps"):
        setattr(trainer, name, getattr(ORPOTrainer, name))
    trainer.odds_ratio_loss = lambda *args: ORPOTrainer.odds_ratio_loss(trainer, *args)
    trainer.concatenated_forward = lambda *args: ORPOTrainer.concatenated_forward(trainer, *args)
    return ORPOTrainer.get_batch_loss_metrics(trainer, trainer.model, inputs)[0]


def stored():
    return {f"{name}/{key}": x for name in CASES for key, x in case(name).items()}


if __name__ == "__main__":
    np.savez_compressed(PATH, **stored())
    print(f"wrote {PATH}, {PATH.stat().st_size} bytes")
