"""Two networks against each other: one makes examples, the other tells them from real ones."""

# B batch, Z latent dimensions.

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp

from lmjax.core import Batch, Dataset, Mean, Output, Spec, Variables, Work
from lmjax.errors import UserError
from lmjax.tasks.forward import forward


class Generator(Protocol):
    """Any linen module from random numbers to examples."""

    @property
    def latent_dim(self) -> int:
        """How many random numbers make an example."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an example."""
        ...

    def init(self, rng: jax.Array, z_BZ: jax.Array) -> Variables:
        """Makes the variables (linen's own method)."""
        ...

    def apply(self, variables: Variables, z_BZ: jax.Array, **arguments: Any) -> Any:
        """Calls the module with these variables (linen's own method)."""
        ...

    def __call__(self, z_BZ: jax.Array, *, train: bool = False) -> jax.Array:
        """An example of each row, float32 [B, *shape]."""
        ...

    def flop(self) -> float:
        """FLOP of making one example."""
        ...


class Discriminator(Protocol):
    """Any linen module from examples to the log-odds that they are real."""

    def init(self, rng: jax.Array, x: jax.Array) -> Variables:
        """Makes the variables (linen's own method)."""
        ...

    def apply(self, variables: Variables, x: jax.Array, **arguments: Any) -> Any:
        """Calls the module with these variables (linen's own method)."""
        ...

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """The log-odds of each row, float32 [B]."""
        ...

    def flop(self, shape: tuple[int, ...]) -> float:
        """FLOP of judging one example of this shape."""
        ...


@dataclass(frozen=True, kw_only=True)
class Adversarial:
    """The generative adversarial game: both networks' losses in one, in nats an example.

    Source: Goodfellow et al., arXiv:1406.2661, equation 1 and algorithm 1, the generator's loss the
    one that does not saturate (section 3). With d the probability that the discriminator gives,
      discriminator: -log d(x) - log(1 - d(g(z))), which moves it alone;
      generator:     -log d(g(z)), which moves it alone.
    What is descended is their sum, each with the other network's parameters held fast
    (`stop_gradient`), so that one gradient holds both networks' own. Two optimizers, by the
    branches "generator" and "discriminator" of the parameters, then step together (the paper's step
    one after the other). The discriminator's batches, real and made, are normalised apart, as in
    Radford et al., arXiv:1511.06434.

    Reads `images` of a batch, or what `reads` names, and `weights`, 0 for rows that count nothing.
    In evaluation the random numbers are those of the batch's rows by number, the same each time.

    Args:
      generator: any `Generator`.
      discriminator: any `Discriminator`.
      reads: the name in a batch of what is imitated.
      real_label: the probability that the discriminator learns to give what is real: below 1
        smooths one side (Salimans et al., arXiv:1606.03498, section 3.4).
    """

    loss_unit: ClassVar[str] = "nats"

    generator: Generator
    discriminator: Discriminator
    reads: str = "images"
    real_label: float = 1.0

    def __post_init__(self) -> None:
        if not 0.5 < self.real_label <= 1:
            raise UserError(f"real_label is {self.real_label}: must be above 0.5 and at most 1.")

    def check(self, data: Dataset) -> None:
        """Raises UserError where the data has no such examples, or others than are made."""
        if self.reads not in data.example or "weights" not in data.example:
            raise UserError(
                f"the data has no {self.reads}, or no weights: it has {', '.join(data.example)}. "
                "Use data of images, or set `reads`."
            )
        if (shape := tuple(data.example[self.reads].shape)) != tuple(self.generator.shape):
            raise UserError(
                f"the data's {self.reads} are {list(shape)}, and the generator makes "
                f"{list(self.generator.shape)}: give both the same size and channels."
            )

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """Both networks' variables, each collection with a branch for each network."""
        made, judging = jax.random.split(rng)
        z_BZ = jnp.zeros((len(batch[self.reads]), self.generator.latent_dim))
        variables = {
            "generator": self.generator.init(made, z_BZ),
            "discriminator": self.discriminator.init(judging, batch[self.reads]),
        }
        collections = sorted({name for held in variables.values() for name in held})
        return {
            name: {network: held[name] for network, held in variables.items() if name in held}
            for name in collections
        }

    def loss(self, variables: Variables, batch: Batch, rng: jax.Array, *, train: bool) -> Output:
        """Both losses' sum; the metrics tell them apart."""
        real, weights_B = batch[self.reads], batch["weights"]
        z_BZ = jax.random.normal(rng, (len(real), self.generator.latent_dim))
        made, state = self._run("generator", variables, {}, z_BZ, train)
        real_B, state = self._run("discriminator", variables, state, real, train)
        fixed = jax.lax.stop_gradient(made)
        fake_B, state = self._run("discriminator", variables, state, fixed, train)
        frozen = {**variables, "params": jax.lax.stop_gradient(variables["params"])}
        fooled_B, _ = self._run("discriminator", frozen, state, made, train)
        y = self.real_label if train else 1.0
        telling_B = jax.nn.softplus(-real_B) + (1 - y) * real_B + jax.nn.softplus(fake_B)
        making_B = jax.nn.softplus(-fooled_B)
        loss = Mean.of(telling_B + making_B, weights_B)
        metrics = {
            "loss": loss,
            "discriminator_loss": Mean.of(telling_B, weights_B),
            "generator_loss": Mean.of(making_B, weights_B),
            "real_told": Mean.of((real_B > 0).astype(jnp.float32), weights_B),
            "made_told": Mean.of((fake_B < 0).astype(jnp.float32), weights_B),
        }
        return Output(loss=loss, metrics=metrics, model_state=state)

    def predict(self, variables: Variables, batch: Batch) -> dict[str, jax.Array]:
        """What the generator makes of `latents` [B, Z], with the averaged statistics."""
        made = self._run("generator", variables, {}, batch["latents"], train=False)[0]
        return {self.reads: made}

    def work(self, example: Spec) -> Work:
        """Of one example: making one and judging two, with their gradients, and judging again.

        The backward passes of the discriminator: of its own loss twice in full, and once more to
        the generator's example alone.
        """
        making = self.generator.flop()
        judging = self.discriminator.flop(tuple(example[self.reads].shape))
        flop = 3 * making + 2 * 3 * judging + 2 * judging
        return Work(unit="examples", units=1, flop=flop, flop_full=flop)

    def count_params(self, params: Any) -> Mapping[str, int]:
        """Parameters of each network."""
        return {name: sum(x.size for x in jax.tree.leaves(part)) for name, part in params.items()}

    def _run(
        self, name: str, variables: Variables, state: Mapping[str, Any], x: jax.Array, train: bool
    ) -> tuple[Any, dict[str, Any]]:
        """(what a network makes of x, all collections of state after it).

        `state` is what earlier calls of this step left behind; of it the network goes on.
        """
        network = getattr(self, name)
        held = {c: branches for c, branches in variables.items() if c != "params"} | dict(state)
        own = {c: branches[name] for c, branches in held.items() if name in branches}
        given = {"params": variables["params"][name], **own}
        result, changed, _ = forward(network, given, x, train=train)
        return result, {
            c: {**branches, name: changed[c]} if c in changed else branches
            for c, branches in held.items()
        }
