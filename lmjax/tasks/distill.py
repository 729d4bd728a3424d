"""A small decoder that learns from a large one."""

# Shape legend: B batch, T length, D student's embed, E teacher's embed.

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lmjax.core import (
    ASIDE,
    Batch,
    Decoder,
    DecoderOutput,
    Mean,
    Output,
    Spec,
    TextDataset,
    Variables,
    Work,
)
from lmjax.errors import UserError
from lmjax.layers.hidden import check_layers, num_layers_of
from lmjax.layers.linear import Linear
from lmjax.ops.divergence import divergence
from lmjax.ops.matmul import contract
from lmjax.tasks.causal_lm import CausalLM

TEACHER, PROJECTION = "teacher", "projection"  # (begin) names in the branch `core.ASIDE`


@dataclass(frozen=True, kw_only=True)
class Distill(CausalLM):
    """Next-token prediction with a frozen teacher's distributions as targets too.

    Source: Hinton et al., arXiv:1503.02531, section 2. A token's loss is
      alpha * temperature^2 * KL(p || q) + (1 - alpha) * nll + hidden * sum of mse,
    with p and q the teacher's and the student's softmax at this temperature
    (`ops.divergence.divergence`), nll as `CausalLM` descends it, and mse the mean over E of the
    squared difference between two hidden states: the student's, times a matrix that is learned
    where the widths differ, and the teacher's (Jiao et al., "TinyBERT", arXiv:1909.10351, equation
    8). There is one of the last hidden states, after the last norm, and one of each pair of
    `hidden_layers`, of what comes out of these layers (their section 3, "layer mapping"; Sun et
    al., "Patient Knowledge Distillation", arXiv:1908.09355, section 3, there normalised). Targets
    of weight 0 count nowhere.

    The student is `model`: its parameters lie where those of a run of it alone would, and whatever
    reads a run reads the student. The teacher's are the branch "aside/teacher", the matrices are
    "aside/projection" and, of the pair (0, 3), "aside/projection_0_3". They belong to a run as
    `trainable="^(?!aside/teacher/)"`, without which weight decay would move the teacher, and as an
    `init_from` that loads the teacher:
    `WarmStart(path=..., load="^aside/teacher/", rename=(("^aside/teacher/", ""),))`, which refuses
    one that was trained in other tokens; with `load=""` the student begins as its teacher. The
    teacher runs without dropout, and no gradient goes to it.

    The reported `loss` is the student's nll, `teacher_kl` the divergence at the temperature,
    `hidden_mse` the mse of the last hidden states, `hidden_mse_0_3` that of the pair (0, 3).

    Args:
      teacher: any `core.Decoder` that is not stateful.
      alpha: the teacher's share; 1 leaves the data's own next tokens out.
      temperature: of both distributions.
      top_k: if not 0, the teacher speaks of its k likeliest tokens alone, renormalised.
      hidden: weight of the hidden states' differences; 0 for none.
      hidden_layers: (layer of the student, layer of the teacher), from 0, of which the outputs are
        compared too: ((0, 3), (1, 7)) gives two layers every fourth of eight. Both models have
        layers of `layers.transformer.Stack`, and the mesh no stages. A residual stream may be of
        another size than what is normalised: look at the metrics before choosing `hidden`.
    """

    teacher: Decoder
    alpha: float = 0.5
    temperature: float = 2.0
    top_k: int = 0
    hidden: float = 0.0
    hidden_layers: Sequence[tuple[int, int]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise UserError(f"alpha is {self.alpha}: must be from 0 to 1.")
        if not 0 < self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature}: must be positive and finite.")
        if self.top_k < 0 or not 0 <= self.hidden < math.inf:
            raise UserError(
                f"top_k is {self.top_k} and hidden {self.hidden}: neither may be negative."
            )
        if self.hidden_layers and not self.hidden:
            raise UserError(
                f"hidden_layers is {list(self.hidden_layers)} and hidden 0: set hidden to the "
                "weight of their differences, or leave the layers out."
            )
        if len(set(map(tuple, self.hidden_layers))) < len(self.hidden_layers):
            raise UserError(f"hidden_layers is {list(self.hidden_layers)}: a pair stands twice.")
        if getattr(self.teacher, "stateful", False):
            raise UserError(
                "the teacher is stateful, and a teacher carries nothing from batch to batch: set "
                "its stateful=False."
            )

    def check(self, data: TextDataset) -> None:
        """Raises UserError where the data does not fit the student, or not the teacher."""
        super().check(data)
        try:
            CausalLM(model=self.teacher).check(data)
        except UserError as error:
            raise UserError(f"the teacher cannot read this data: {error}") from error
        for i, (whose, model) in enumerate((("student", self.model), ("teacher", self.teacher))):
            layers = [pair[i] for pair in self.hidden_layers]
            check_layers(layers, num_layers_of(model), whose=f"the {whose}")

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """The student's variables, and beside them the teacher's parameters and the projections."""
        variables = dict(super().init(rng, batch))
        taught, joined = jax.random.split(jax.random.fold_in(rng, 1))
        aside = {TEACHER: self.teacher.init(taught, batch["tokens"])["params"]}
        if self.hidden:
            D, E = (self._width(m, batch["tokens"]) for m in (self.model, self.teacher))
            for i, name in enumerate(self._compared.values() if D != E else ()):
                linear = Linear((E,), ("embed", None), use_bias=False)
                key = jax.random.fold_in(joined, i) if i else joined
                aside[name] = linear.init(key, jnp.zeros((1, D)))["params"]
        return {**variables, "params": {**variables["params"], ASIDE: aside}}

    def loss(self, variables: Variables, batch: Batch, rng: jax.Array, *, train: bool) -> Output:
        """What is descended, in training and in evaluation alike; the metrics tell it apart."""
        params = dict(variables["params"])
        aside = params.pop(ASIDE)
        own = {**variables, "params": params}
        output, state, learned = self.read(
            own, batch, rng, train=train, layers=[pair[0] for pair in self.hidden_layers]
        )
        of_data = self.judged(output, state, batch, train=train)
        taught, _, teaching = CausalLM(model=self.teacher).read(
            {"params": jax.lax.stop_gradient(aside[TEACHER])},
            batch,
            rng,
            train=False,
            layers=[pair[1] for pair in self.hidden_layers],
        )
        kl_BT = divergence(
            output.hidden_BTD,
            output.unembedding,
            taught.hidden_BTD,
            taught.unembedding,
            temperature=self.temperature,
            top_k=self.top_k,
            vocab_chunk=self.vocab_chunk,
        )
        kl = Mean.of(kl_BT, batch["weights"])
        total = (1 - self.alpha) * of_data.loss.total
        total += self.alpha * self.temperature**2 * kl.total
        metrics = {**of_data.metrics, "teacher_kl": kl}
        if self.hidden:
            states = zip(
                self._compared.items(),
                (output.hidden_BTD, *learned),
                (taught.hidden_BTD, *teaching),
                strict=True,
            )
            for (metric, projection), learned_BTD, teaching_BTE in states:
                mse_BT = _distance(learned_BTD, teaching_BTE, aside.get(projection))
                metrics[metric] = Mean.of(mse_BT, batch["weights"])
                total += self.hidden * metrics[metric].total
        return Output(
            loss=Mean(total, of_data.loss.weight),
            metrics=metrics,
            model_state=of_data.model_state,
        )

    def work(self, example: Spec) -> Work:
        """The student's three passes and the teacher's one; of projections nothing."""
        own, length = super().work(example), example["tokens"].shape[0]
        causal, full = self.teacher.flop_per_token(length)
        return Work(
            unit=own.unit,
            units=own.units,
            flop=own.flop + length * causal,
            flop_full=own.flop_full + length * full,
        )

    def count_params(self, params: Any) -> Mapping[str, int]:
        """The student's by part; then the teacher's and the projections', each in one number."""
        params = dict(params)
        aside = params.pop(ASIDE)
        found = dict(self.model.count_params(params))
        found[TEACHER] = sum(self.teacher.count_params(aside[TEACHER]).values())
        projections = [x for name, x in aside.items() if name.startswith(PROJECTION)]
        if projections:
            found[PROJECTION] = sum(x.size for x in jax.tree.leaves(projections))
        return found

    @property
    def _compared(self) -> dict[str, str]:
        """Metric -> projection of each difference of hidden states: of the last, then of pairs."""
        ends = ["", *(f"_{student}_{teacher}" for student, teacher in self.hidden_layers)]
        return {f"hidden_mse{end}": f"{PROJECTION}{end}" for end in ends}

    @staticmethod
    def _width(model: Decoder, tokens_BT: jax.Array) -> int:
        def hidden(rng: jax.Array) -> jax.Array:
            output: DecoderOutput = model.apply(model.init(rng, tokens_BT), tokens_BT)
            return output.hidden_BTD

        return jax.eval_shape(hidden, jax.eval_shape(lambda: jax.random.key(0))).shape[-1]


def _distance(
    hidden_BTD: jax.Array, teacher_BTE: jax.Array, projection: Mapping[str, Any] | None
) -> jax.Array:
    """The mean over E of the squared difference, float32 [B, T]."""
    if projection is not None:
        kernel_DE = projection["kernel"]
        hidden_BTD = contract(hidden_BTD, kernel_DE, dtype="float32", axes=((2,), (0,)))
    teacher_BTE = jax.lax.stop_gradient(teacher_BTE.astype(jnp.float32))
    return jnp.mean(jnp.square(hidden_BTD.astype(jnp.float32) - teacher_BTE), axis=-1)
