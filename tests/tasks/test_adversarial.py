import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax import sharding
from lmjax.data.images import Images
from lmjax.errors import UserError
from lmjax.models.dcgan import discriminator, generator
from lmjax.tasks.adversarial import Adversarial

TASK = Adversarial(
    generator=generator(size=8, channels=1, width=4, latent_dim=5),
    discriminator=discriminator(size=8, width=4),
)


@pytest.fixture(scope="module")
def case():
    random = np.random.default_rng(0)
    images = random.uniform(0, 1, (6, 8, 8, 1)).astype(np.float32)
    batch = {"images": images, "weights": np.array([1, 1, 0, 1, 1, 1], np.float32)}
    return sharding.unbox(TASK.init(jax.random.key(0), batch)), batch


def test_each_network_descends_its_own_loss(case):
    """The one gradient is that of two games played apart, each against a fixed opponent."""
    variables, batch = case
    rng = jax.random.key(1)

    def whole(params):
        return TASK.loss({**variables, "params": params}, batch, rng, train=True).loss.total

    def odds(params, x):
        return TASK.discriminator.apply({"params": params}, x, train=True)

    z_BZ = jax.random.normal(rng, (6, 5))

    def made(params):
        given = {"params": params, "batch_stats": variables["batch_stats"]["generator"]}
        return TASK.generator.apply(given, z_BZ, train=True, mutable=["batch_stats"])[0]

    params, weights = variables["params"], batch["weights"]

    def telling(own):
        real, fake = odds(own, batch["images"]), odds(own, made(params["generator"]))
        return jnp.sum(weights * (jnp.log1p(jnp.exp(-real)) + jnp.log1p(jnp.exp(fake))))

    def making(own):
        return jnp.sum(weights * jnp.log1p(jnp.exp(-odds(params["discriminator"], made(own)))))

    expected = {
        "generator": jax.grad(making)(params["generator"]),
        "discriminator": jax.grad(telling)(params["discriminator"]),
    }
    assert "discriminator" not in variables["batch_stats"]  # one layer that halves: no norm
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        jax.grad(whole)(params),
        expected,
    )


def test_state_follows_the_generator_and_evaluation_leaves_it(case):
    variables, batch = case
    output = TASK.loss(variables, batch, jax.random.key(1), train=True)
    changed = jax.tree.map(
        lambda a, b: bool(np.any(a != b)),
        output.model_state["batch_stats"],
        variables["batch_stats"],
    )
    assert all(jax.tree.leaves(changed))
    still = TASK.loss(variables, batch, jax.random.key(1), train=False)
    jax.tree.map(
        np.testing.assert_array_equal, still.model_state["batch_stats"], variables["batch_stats"]
    )
    assert float(output.loss.weight) == 5


def test_samples_are_images_of_the_latents(case):
    variables, _ = case
    latents = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
    made = TASK.predict(variables, {"latents": latents})["images"]
    assert made.shape == (3, 8, 8, 1) and 0 <= float(made.min()) <= float(made.max()) <= 1
    again = TASK.predict(variables, {"latents": latents[1:2]})["images"]
    np.testing.assert_allclose(again[0], made[1], atol=1e-6)


def test_counts_are_the_papers():
    """Of 64 x 64 pictures in colour: torch's DCGAN tutorial prints the same layers."""
    made = generator()
    z = jax.ShapeDtypeStruct((1, 100), jnp.float32)
    params = sharding.unbox(jax.eval_shape(made.init, jax.random.key(0), z)["params"])
    assert sum(x.size for x in jax.tree.leaves(params)) == 3_576_704 + 3


def test_what_does_not_fit_is_refused():
    with pytest.raises(
        UserError, match=r"images are \[16, 16, 1\], and the generator makes \[8, 8, 1"
    ):
        TASK.check(Images(path="glyphs", size=16))
    TASK.check(Images(path="glyphs"))
    with pytest.raises(UserError, match=r"size is 20, which 4 is not doubled to: give 16 or 32"):
        generator(size=20)
    with pytest.raises(UserError, match=r"real_label is 0\.2"):
        Adversarial(generator=TASK.generator, discriminator=TASK.discriminator, real_label=0.2)
