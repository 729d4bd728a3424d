"""Preferences: which of two texts is the better, or whether one is good."""

# B batch, S texts of each row of the batch, N = B S texts, T length, D embed.

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lmjax.core import ASIDE, Batch, Decoder, Mean, Output, Spec, TextDataset, Variables, Work
from lmjax.errors import UserError, did_you_mean
from lmjax.ops import preference as ops

PAIR = ("chosen", "rejected")
LABELLED = ("", "kl")
Reference = Literal["adapters_off", "frozen", "none"]
REFERENCE = "reference"  # in the branch `core.ASIDE`
REFERENCES = ("adapters_off", "frozen", "none")


@dataclass(frozen=True, kw_only=True)
class Dpo:
    """Direct preference optimization: `ops.preference.dpo_loss`, or `ipo_loss`, of each pair.

    Args:
      beta: how closely the policy is held to the reference; in IPO the paper's tau.
      label_smoothing: the probability that a preference is wrong (conservative DPO).
      form: "sigmoid" is DPO; "ipo" is of mean log-probabilities of tokens.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    form: Literal["sigmoid", "ipo"] = "sigmoid"

    def __post_init__(self) -> None:
        _check_positive("beta", self.beta)
        if self.form not in ("sigmoid", "ipo"):
            raise UserError(f"form is {self.form!r}." + did_you_mean(self.form, ("sigmoid", "ipo")))
        if not 0 <= self.label_smoothing < 0.5 or (self.form == "ipo" and self.label_smoothing):
            raise UserError(
                f"label_smoothing is {self.label_smoothing} and form {self.form!r}: it must be at "
                "least 0 and below 0.5, and 0 in IPO."
            )


@dataclass(frozen=True, kw_only=True)
class Orpo:
    """Odds ratio preference optimization, which needs no reference.

    Source: Hong et al., arXiv:2403.07691, equations 6 and 7: the loss of a pair is the negative
    log-likelihood of the chosen text, a mean over its tokens, less `weight` times the log sigmoid
    of `ops.preference.log_odds_ratio`, of mean log-probabilities too.

    Args:
      weight: the paper's lambda, trl's beta.
      likelihood: of what. "completion": the mean over pairs of the mean over the chosen text's
        tokens, as the paper has it. "tokens": the mean over all tokens of prompts and chosen texts
        alike, as trl has it; a microbatch then counts by its tokens, its odds ratios too.
    """

    weight: float = 0.1
    likelihood: Literal["completion", "tokens"] = "completion"

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise UserError(f"weight is {self.weight}: must not be negative.")
        if self.likelihood not in (allowed := ("completion", "tokens")):
            raise UserError(
                f"likelihood is {self.likelihood!r}." + did_you_mean(self.likelihood, allowed)
            )


@dataclass(frozen=True, kw_only=True)
class Kto:
    """Kahneman-Tversky optimization: `ops.preference.kto_loss` of each text, which has a label.

    The reference point is the mean log-ratio of texts behind prompts that they do not belong to,
    0 where that is negative (section 4.1 of the paper). It is of the rows that are seen together: a
    microbatch, or a slice of one, has its own, as with trl. So here alone a microbatched step is
    not the whole one. It should be of many rows.

    Args:
      beta: how closely the policy is held to the reference.
      desirable_weight, undesirable_weight: of texts of either kind; their numbers times these
        should be about equal.
    """

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        _check_positive("beta", self.beta)
        if self.desirable_weight < 0 or self.undesirable_weight < 0:
            raise UserError(
                f"desirable_weight is {self.desirable_weight} and undesirable_weight "
                f"{self.undesirable_weight}: neither may be negative."
            )


@dataclass(frozen=True, kw_only=True)
class Preference:
    """Tunes a decoder on preferences, by one of several objectives.

    Reads of a batch, for pairs, `chosen_tokens`, `chosen_targets`, `chosen_weights` and
    `chosen_segments`, and `rejected_...` likewise; for labelled texts (`Kto`) `tokens`, `targets`,
    `weights`, `labels` (1: desirable) and `kl_tokens`, `kl_targets`, `kl_weights`. Weights choose
    the completion's tokens among the targets; a row without any counts nothing.
    `data.preferences.Preferences` gives these.

    Rewards are beta times log (policy / reference) of a text; in ORPO, its mean log-probability.
    The reference is read without dropout, and no gradient goes through it.

    Args:
      model: any `core.Decoder` that carries no state from row to row.
      objective: `Dpo`, `Orpo` or `Kto`.
      reference: what the policy is compared with. "adapters_off": `model` is
        `adapt.adapted.adapted(...)`, and the reference is the model inside, on the same parameters;
        let the adapters alone train. "frozen": a second copy of the parameters, the branch
        "aside/reference", begins as the policy's equal and stays it: set `Run.trainable` to
        "^(?!aside/)", and where both start from other weights,
        WarmStart(rename=(("^aside/reference/", ""),)); from a run each, two of them, as
        configs/dpo.py:frozen has them. "none": ORPO's.
      vocab_chunk: if not 0, logits are made for so many tokens of the vocabulary at a time.
    """

    model: Decoder
    objective: Dpo | Orpo | Kto
    reference: Reference = "adapters_off"
    vocab_chunk: int = 0

    def __post_init__(self) -> None:
        if self.reference not in REFERENCES:
            hint = did_you_mean(self.reference, REFERENCES)
            raise UserError(f"reference is {self.reference!r}.{hint}")
        if self.vocab_chunk < 0:
            raise UserError(f"vocab_chunk is {self.vocab_chunk}: must not be negative.")
        if isinstance(self.objective, Orpo) != (self.reference == "none"):
            raise UserError(
                f"reference is {self.reference!r} and the objective "
                f"{type(self.objective).__name__}: Orpo has the reference 'none', the others "
                "'adapters_off' or 'frozen'."
            )
        if self.reference == "adapters_off" and getattr(self.model, "model", None) is None:
            raise UserError(
                "reference is 'adapters_off', and the model has no adapters: wrap it in "
                "lmjax.adapt.adapted.adapted, or set reference='frozen'."
            )
        if getattr(self.model, "stateful", False):
            raise UserError(
                "the model is stateful, and rows of preferences do not go on: set stateful=False."
            )

    @property
    def loss_unit(self) -> str:
        """Of the loss, if it is the logarithm of a probability."""
        of_log = getattr(self.objective, "form", "") == "sigmoid"
        return "nats" if of_log or isinstance(self.objective, Orpo) else ""

    @property
    def _sides(self) -> tuple[str, str]:
        """Prefixes of the batch's names: of the texts of a row."""
        return LABELLED if isinstance(self.objective, Kto) else PAIR

    def check(self, data: TextDataset) -> None:
        """Raises UserError where the data has other rows, longer texts or more tokens."""
        parts = ("tokens", "targets", "weights")
        needed = {_name(side, part) for side in self._sides for part in parts}
        labelled = isinstance(self.objective, Kto)
        needed |= {"labels"} if labelled else {"chosen_segments"}
        if missing := sorted(needed - set(data.example)):
            kind = "labelled" if labelled else "pairs"
            raise UserError(
                f"the data has no {', '.join(missing)}, which {type(self.objective).__name__} "
                f"needs: it has {', '.join(data.example)}. Use "
                f"lmjax.data.preferences.Preferences(kind={kind!r})."
            )
        length = data.example[_name(self._sides[0], "tokens")].shape[0]
        if length > self.model.max_length:
            raise UserError(
                f"data.length is {length}, and the model's max_length {self.model.max_length}: "
                "lower the first or raise the second."
            )
        if data.vocab_size > self.model.vocab_size:
            raise UserError(
                f"the tokenizer has {data.vocab_size} tokens, and the model's vocab_size is "
                f"{self.model.vocab_size}: a token beyond the vocabulary cannot be read. "
                f"Set the model's vocab_size to at least {data.vocab_size}."
            )

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """Makes the model's variables; with a frozen reference, its parameters twice."""
        variables = self.model.init(rng, batch[_name(self._sides[0], "tokens")])
        if self.reference != "frozen":
            return variables
        params = variables["params"]
        return {**variables, "params": {**params, ASIDE: {REFERENCE: params}}}

    def loss(self, variables: Variables, batch: Batch, rng: jax.Array, *, train: bool) -> Output:
        """The objective's loss, and what it says of the texts."""
        if isinstance(self.objective, Kto):
            return self._labelled(self.objective, variables, batch, rng, train)
        log_probs_BST, aux = self._policy(variables, batch, PAIR, rng, train)
        weights_BST = _stacked(batch, PAIR, "weights")
        present_B = (jnp.sum(weights_BST[:, 0], axis=1) > 0).astype(jnp.float32)
        chosen_B, rejected_B = _of_texts(ops.sequence_log_probs, log_probs_BST, weights_BST)
        if isinstance(self.objective, Orpo):
            loss, rewards, more = self._orpo(self.objective, log_probs_BST, batch, present_B)
        else:
            reference_BST = self._reference(variables, batch, PAIR)
            ratios_BST = log_probs_BST - reference_BST
            ratio_B = _of_texts(ops.sequence_log_probs, ratios_BST, weights_BST)
            loss_B = self._dpo(self.objective, ratios_BST, weights_BST)
            loss, more = Mean.of(loss_B, present_B), {}
            rewards = self.objective.beta * ratio_B[0], self.objective.beta * ratio_B[1]
        metrics = {
            "loss": loss,
            "chosen_log_prob": Mean.of(chosen_B, present_B),
            "rejected_log_prob": Mean.of(rejected_B, present_B),
            "chosen_reward": Mean.of(rewards[0], present_B),
            "rejected_reward": Mean.of(rewards[1], present_B),
            "reward_margin": Mean.of(rewards[0] - rewards[1], present_B),
            "reward_accuracy": Mean.of((rewards[0] > rewards[1]).astype(jnp.float32), present_B),
        }
        return Output(loss=loss, metrics={**aux, **metrics, **more})

    def work(self, example: Spec) -> Work:
        """Of each text that is learned from a forward and a backward pass, and what reads it only.

        The reference reads all texts, and so does the policy those of the reference point; units
        are the tokens of texts that are learned from.
        """
        length = example[_name(self._sides[0], "tokens")].shape[0]
        causal, full = self.model.flop_per_token(length)
        learned = 1 if isinstance(self.objective, Kto) else 2
        passes = 3 * learned + (2 - learned) + (0 if self.reference == "none" else 2)
        return Work(
            unit="tokens",
            units=learned * length,
            flop=passes * length * causal,
            flop_full=passes * length * full,
        )

    def count_params(self, params: Any) -> Mapping[str, int]:
        """Parameters by part of the model; a frozen reference is a part of its own."""
        policy = dict(params)
        reference = policy.pop(ASIDE, None)
        found = dict(self.model.count_params(policy))
        if reference is not None:
            found[REFERENCE] = sum(self.model.count_params(reference[REFERENCE]).values())
        return found

    def _labelled(
        self, kto: Kto, variables: Variables, batch: Batch, rng: jax.Array, train: bool
    ) -> Output:
        log_probs_BST, aux = self._policy(variables, batch, LABELLED[:1], rng, train)
        log_probs_BT, weights_BT = log_probs_BST[:, 0], batch["weights"]
        policy_BT = jax.lax.stop_gradient(self._policy(variables, batch, ("kl",), rng, False)[0])
        reference_BST = self._reference(variables, batch, LABELLED)
        present_B = (jnp.sum(weights_BT, axis=1) > 0).astype(jnp.float32)
        ratio_B = ops.sequence_log_probs(log_probs_BT - reference_BST[:, 0], weights_BT)
        apart_B = ops.sequence_log_probs(policy_BT[:, 0] - reference_BST[:, 1], batch["kl_weights"])
        num_rows = jnp.sum(present_B)
        kl = jnp.maximum(jnp.sum(apart_B * present_B) / jnp.maximum(num_rows, 1), 0)
        loss_B = ops.kto_loss(
            ratio_B,
            batch["labels"],
            kl,
            beta=kto.beta,
            desirable_weight=kto.desirable_weight,
            undesirable_weight=kto.undesirable_weight,
        )
        loss, log_prob_B = (
            Mean.of(loss_B, present_B),
            ops.sequence_log_probs(log_probs_BT, weights_BT),
        )
        metrics = {"loss": loss, "kl": Mean(kl * num_rows, num_rows)}
        desirable_B = present_B * (batch["labels"] > 0)
        for name, weights_B in (("chosen", desirable_B), ("rejected", present_B - desirable_B)):
            metrics[f"{name}_log_prob"] = Mean.of(log_prob_B, weights_B)
            metrics[f"{name}_reward"] = Mean.of(kto.beta * ratio_B, weights_B)
        return Output(loss=loss, metrics={**aux, **metrics})

    def _dpo(self, dpo: Dpo, ratios_BST: jax.Array, weights_BST: jax.Array) -> jax.Array:
        if dpo.form == "ipo":
            chosen_B, rejected_B = _of_texts(ops.mean_log_probs, ratios_BST, weights_BST)
            return ops.ipo_loss(chosen_B - rejected_B, beta=dpo.beta)
        chosen_B, rejected_B = _of_texts(ops.sequence_log_probs, ratios_BST, weights_BST)
        return ops.dpo_loss(
            chosen_B - rejected_B, beta=dpo.beta, label_smoothing=dpo.label_smoothing
        )

    def _orpo(
        self, orpo: Orpo, log_probs_BST: jax.Array, batch: Batch, present_B: jax.Array
    ) -> tuple[Mean, tuple[jax.Array, jax.Array], dict[str, Mean]]:
        """(loss, mean log-probabilities of both texts, what the loss is made of)."""
        weights_BST = _stacked(batch, PAIR, "weights")
        chosen_B, rejected_B = _of_texts(ops.mean_log_probs, log_probs_BST, weights_BST)
        # Rows that complete a batch have no tokens, and odds of 1 to 0.
        safe = [jnp.where(present_B > 0, x, -1.0) for x in (chosen_B, rejected_B)]
        odds_B = ops.log_odds_ratio(safe[0], safe[1])
        ratio = Mean.of(-jax.nn.log_sigmoid(odds_B), present_B)
        if orpo.likelihood == "completion":
            nll = Mean.of(-chosen_B, present_B)
            loss = Mean(nll.total + orpo.weight * ratio.total, nll.weight)
        else:
            read_BT = (batch["chosen_segments"] > 0).astype(jnp.float32)
            nll = Mean.of(-log_probs_BST[:, 0], read_BT)
            value = ratio.total / jnp.maximum(ratio.weight, 1)
            loss = Mean(nll.total + orpo.weight * value * nll.weight, nll.weight)
        more = {"nll": nll, "odds_ratio_loss": ratio, "log_odds_ratio": Mean.of(odds_B, present_B)}
        return loss, (chosen_B, rejected_B), more

    def _policy(
        self,
        variables: Variables,
        batch: Batch,
        sides: tuple[str, ...],
        rng: jax.Array,
        train: bool,
    ) -> tuple[jax.Array, dict[str, Mean]]:
        """(log-probability of each target [B, S, T], what the model measures by the way)."""
        if self.reference == "frozen":
            params = {name: x for name, x in variables["params"].items() if name != ASIDE}
            variables = {**variables, "params": params}
        return self._log_probs(self.model, variables, batch, sides, rng, train)

    def _reference(self, variables: Variables, batch: Batch, sides: tuple[str, ...]) -> jax.Array:
        """Likewise the reference's, which nothing changes."""
        model: Any = self.model
        if self.reference == "frozen":
            variables = {**variables, "params": variables["params"][ASIDE][REFERENCE]}
        else:
            model = model.model
        held = jax.lax.stop_gradient(dict(variables))
        found = self._log_probs(model, held, batch, sides, None, False)[0]
        return jax.lax.stop_gradient(found)

    def _log_probs(
        self,
        model: Any,
        variables: Variables,
        batch: Batch,
        sides: tuple[str, ...],
        rng: jax.Array | None,
        train: bool,
    ) -> tuple[jax.Array, dict[str, Mean]]:
        tokens_BST = _stacked(batch, sides, "tokens")
        targets_NT = _flat(_stacked(batch, sides, "targets"))
        rngs = {"dropout": rng} if train else None
        # What pads a row comes after its text, which is causal: no segments are needed.
        output = model.apply(variables, _flat(tokens_BST), train=train, rngs=rngs)
        found_NT = ops.token_log_probs(
            output.hidden_BTD, output.unembedding, targets_NT, vocab_chunk=self.vocab_chunk
        )
        return found_NT.reshape(tokens_BST.shape), dict(output.aux)


def _name(side: str, part: str) -> str:
    return f"{side}_{part}" if side else part


def _stacked(batch: Batch, sides: tuple[str, ...], part: str) -> jax.Array:
    """A row's texts beside each other, [B, S, T]: rows stay on their devices."""
    return jnp.stack([batch[_name(side, part)] for side in sides], axis=1)


def _flat(x_BST: jax.Array) -> jax.Array:
    return x_BST.reshape(-1, x_BST.shape[-1])


def _of_texts(
    measure: Any, x_BST: jax.Array, weights_BST: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A measure of the first and of the second text of each row, [B] each."""
    first_B, second_B = (measure(x_BST[:, i], weights_BST[:, i]) for i in range(2))
    return first_B, second_B


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise UserError(f"{name} is {value}: must be above 0.")
