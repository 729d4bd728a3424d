"""A model whose modules are called otherwise than it knows."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator
from typing import Any, Generic, Protocol, TypeVar

import jax
from flax import linen as nn

from lmjax.core import Variables


class Interceptor(Protocol):
    """What stands before the methods of a model's modules (`nn.intercept_methods`)."""

    def __call__(
        self, run: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        """What the method gives."""
        ...

    def check(self) -> None:
        """Raises UserError where a whole call did not meet what it should."""
        ...


Seen = TypeVar("Seen", bound=Interceptor)


class Intercepted(abc.ABC, Generic[Seen]):
    """A model that is called under an interceptor; it is to a task whatever the model is.

    A frozen dataclass inherits it, with the model as its first field. What is not defined there is
    the model's own: `init_cache`, `vocab_size`, `flop_per_token`, ...
    """

    model: Any

    def __post_init__(self) -> None:
        # Whose protocols are honoured.
        innermost = getattr(self.model, "__wrapped__", self.model)
        object.__setattr__(self, "__wrapped__", innermost)

    @abc.abstractmethod
    def interceptor(self) -> Seen:
        """A new one for each call."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in type(self).__annotations__ or name == "model":
            raise AttributeError(name)
        return getattr(self.model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own method; of a model that is bound to variables."""
        with self._intercepting():
            return self.model(*args, **kwargs)

    def init(self, rng: Any, *args: Any, **kwargs: Any) -> Variables:
        """The variables, drawn as the model's own are.

        Raises UserError where a target is no product of the model, or cannot be what it is to be.
        """
        with self._intercepting() as seen:
            variables: Variables = self.model.init(rng, *args, **kwargs)
        seen.check()
        return variables

    def apply(self, variables: Variables, *args: Any, **kwargs: Any) -> Any:
        """Linen's own."""
        with self._intercepting():
            return self.model.apply(variables, *args, **kwargs)

    def seen(self, *example: Any) -> Seen:
        """The interceptor of an initialisation that is only traced.

        Args:
          example: what `init` takes beside the key; shapes will do.

        Raises UserError as `init`.
        """
        with self._intercepting() as seen:
            jax.eval_shape(self.model.init, jax.eval_shape(lambda: jax.random.key(0)), *example)
        seen.check()
        return seen

    @contextlib.contextmanager
    def _intercepting(self) -> Iterator[Seen]:
        seen = self.interceptor()
        with nn.intercept_methods(seen):
            yield seen
