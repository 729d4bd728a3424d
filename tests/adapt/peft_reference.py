"""Adapters of peft on small models of transformers, at random weights.

`HF_HUB_OFFLINE=1 python -m tests.adapt.peft_reference` (with torch, transformers and peft 0.21.2)
writes peft_reference.npz.
"""

import json
import tempfile
from pathlib import Path

import numpy as np

from lmjax.convert.shards import read_file

PATH = Path(__file__).with_suffix(".npz")
LLAMA = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
}
BERT = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
STEPS = 80
SCHEDULE = {
    "init_r": 4,
    "target_r": 2,
    "tinit": 5,
    "tfinal": 20,
    "deltaT": 3,
    "total_step": STEPS,
    "lora_alpha": 8,
    "beta1": 0.85,
    "beta2": 0.85,
    "orth_reg_weight": 0.5,
}
RATE = 0.1


def tokens():
    return np.random.default_rng(5).integers(0, 32, (3, 11))


def configs(kind):
    from peft import AdaLoraConfig, IA3Config, LoraConfig

    if kind == "bert":
        return LoraConfig(r=3, target_modules=["query", "attention.output.dense"], use_dora=True)
    return {
        "lora": LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "o_proj", "up_proj"]),
        "rslora": LoraConfig(r=3, target_modules=["k_proj", "down_proj"], use_rslora=True),
        "dora": LoraConfig(r=3, target_modules=["q_proj", "v_proj", "o_proj"], use_dora=True),
        "ia3": IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
        # Only a model of a known task adds the penalty to its loss.
        "adalora": AdaLoraConfig(
            task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj", "down_proj"], **SCHEDULE
        ),
    }[kind]


def base(kind):
    import torch
    import transformers

    torch.manual_seed(7)
    if kind == "bert":
        model = transformers.BertModel(transformers.BertConfig(**BERT))
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def case(kind):
    """{name: array or text}: base, adapter as its folder holds it, output, loss and gradients."""
    import torch
    from peft import get_peft_model

    model = base(kind)
    found = {f"base/{k}": x.detach().numpy().copy() for k, x in model.state_dict().items()}
    tuned = get_peft_model(model, configs(kind))
    torch.manual_seed(8)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    ids = torch.as_tensor(tokens())
    if kind == "bert":
        output = tuned(input_ids=ids).last_hidden_state
        loss = output.square().mean()
    else:
        output = tuned(input_ids=ids).logits
        loss = torch.nn.functional.cross_entropy(output[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    for name, parameter in tuned.named_parameters():
        if parameter.requires_grad:
            plain = name.replace(".default", "").removeprefix("base_model.model.")
            found[f"gradient/{plain.removesuffix('.weight')}"] = parameter.grad.numpy()
    found |= {"output": output.detach().numpy(), "loss": np.float32(loss.item())}
    with tempfile.TemporaryDirectory() as folder:
        tuned.save_pretrained(folder)
        for name, tensor in read_file(Path(folder) / "adapter_model.safetensors").items():
            found[f"tensor/{name}"] = tensor.rows(0, tensor.shape[0])
        fields = json.loads((Path(folder) / "adapter_config.json").read_text())
    keep = {k: x for k, x in fields.items() if x is not None}
    return found | {"config": json.dumps(keep, sort_keys=True)}


def adalora_run():
    """80 SGD steps: the start's tensors, each step's loss without penalty, each step's ranks."""
    import torch
    from peft import get_peft_model

    torch.manual_seed(9)
    tuned = get_peft_model(base("adalora"), configs("adalora"))
    own = {k: p for k, p in tuned.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in own.values():
            parameter.add_(0.2 * torch.randn_like(parameter))

    def plain(name):
        return name.replace(".default", "").removeprefix("base_model.model.")

    found = {f"start/{plain(k)}": p.detach().numpy().copy() for k, p in own.items()}
    optimizer = torch.optim.SGD(own.values(), lr=RATE)
    ids = torch.as_tensor(tokens())
    losses, ranks = [], []
    for step in range(1, STEPS + 1):
        output = tuned(input_ids=ids, labels=ids)
        logits = output.logits[:, :-1].flatten(0, 1)
        losses.append(torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()).item())
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        tuned.base_model.update_and_allocate(step)
        ranks.append([int((p != 0).sum()) for k, p in sorted(own.items()) if "lora_E" in k])
    names = [plain(k) for k in sorted(own) if "lora_E" in k]
    return found | {"losses": np.float64(losses), "ranks": np.int32(ranks), "names": names}


def stored():
    found = {f"base/{k}": x.detach().numpy() for k, x in base("dora").state_dict().items()}
    for kind in ("dora", "ia3"):
        made = case(kind).items()
        found |= {f"{kind}/{k}": x for k, x in made if not k.startswith("base/")}
    return found | {f"run/{k}": x for k, x in adalora_run().items()}


if __name__ == "__main__":
    np.savez_compressed(PATH, **stored())
    print(f"wrote {PATH}, {PATH.stat().st_size} bytes")
