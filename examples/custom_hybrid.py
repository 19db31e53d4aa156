"""Composes a hybrid from a pattern, sizes it, compares states, and generates: `python examples/custom_hybrid.py`.

Two layers of Mamba to one of attention in a sliding window, and experts in every second layer. A pattern is plain
data: the same words stand in the [model] table of a run file for `crossover train`.
"""

import torch
from crossover.archs import LanguageModel, ModelConfig, build

WINDOW, TARGET = 128, 1_000_000


def hybrid(d_model: int) -> ModelConfig:
    """Six layers: the pattern repeats."""
    return ModelConfig(
        d_model=d_model,
        n_layers=6,
        vocab_size=256,
        pattern=("mamba+mlp", "mamba+moe", "local+mlp", "mamba+moe", "mamba+mlp", "local+moe"),
        mixer={"local": {"kind": "attention", "window": WINDOW, "n_kv_heads": 1}, "mamba": {"d_state": 16}},
        ffn={"moe": {"n_experts": 4, "top_k": 1}},
    )


def sized(n_params: int) -> LanguageModel:
    """The width whose model is nearest to a number of parameters. On the meta device counting allocates nothing."""
    widths = range(32, 257, 16)
    best = min(widths, key=lambda d: abs(build(hybrid(d), device="meta").n_params - n_params))
    return build(hybrid(best))


def main() -> None:
    """Prints sizes and states, then text."""
    torch.manual_seed(0)
    lm = sized(TARGET).eval()
    print(f"d_model {lm.config.d_model}: {lm.n_params:,} parameters, of which a token uses {lm.n_active_params:,}")

    print(f"\n{'layer':<12}{'state after 100 tokens':>24}{'after 10,000':>16}")
    short, long = (lm.init_state(1, n_tokens) for n_tokens in (100, 10_000))
    for (mixer, ffn), a, b in zip(lm.config.layers, short, long, strict=True):
        print(f"{mixer + '+' + (ffn or ''):<12}{a.nbytes:>18,} bytes{b.nbytes:>10,} bytes")

    # presets are sized by name alone: width, depth and ffn width are solved
    transformer = build("transformer", n_params=TARGET, device="meta")
    state_bytes = sum(layer.nbytes for layer in transformer.init_state(1, 10_000))
    print(f"\na Transformer of {transformer.n_params:,} parameters: {state_bytes:,} bytes after 10,000 tokens")

    prompts = [list(b"def main("), list(b"x")]
    generator = torch.Generator().manual_seed(0)
    for row in lm.generate(prompts, max_new_tokens=12, temperature=0.8, top_p=0.95, generator=generator):
        print(f"untrained, it writes {bytes(row.tolist())}")


if __name__ == "__main__":
    main()
