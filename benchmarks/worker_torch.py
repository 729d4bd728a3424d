"""Their side: Hugging Face's GPT-2 in torch, eager or compiled. Imports nothing of lmjax."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Any

from benchmarks.cases import CASES
from benchmarks.worker import serve


def main(name: str, mode: str) -> None:
    import torch
    import transformers

    case = CASES[name]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=case.vocab_size,
        n_positions=case.length,
        n_embd=case.dim,
        n_layer=case.num_layers,
        n_head=case.num_heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="sdpa",
    )
    began = time.perf_counter()
    model = transformers.GPT2LMHeadModel(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    tokens = torch.randint(0, case.vocab_size, (case.batch_size, case.length), device=device)
    forward = torch.compile(model) if mode == "compiled" else model
    low = case.dtype == "bfloat16"
    autocast = torch.autocast(device, torch.bfloat16) if low else contextlib.nullcontext()

    def run(steps: int) -> None:
        for _ in range(steps):
            with autocast:
                loss = forward(input_ids=tokens, labels=tokens).loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        assert torch.isfinite(loss).item()

    run(2)
    ready = {
        "compile_s": time.perf_counter() - began,
        "matmul_flop_per_s": matmul_peak(torch, device, case.dtype),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }
    serve(ready, run)


def matmul_peak(torch: Any, device: str, dtype: str) -> float:
    """FLOP/s of a large square product, the best of eight."""
    size = 2048 if device == "cpu" else 8192
    x = torch.randn(size, size, device=device, dtype=getattr(torch, dtype))
    best = float("inf")
    for _ in range(8):
        began = time.perf_counter()
        y = x @ x
        y[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - began)
    return 2.0 * size**3 / best


if __name__ == "__main__":
    main(*sys.argv[1:3])
