"""Sizes of known models: arguments of `TransformerConfig` by name.

Taken from the models' published config.json; widths of the vocabulary are those of the stored
embedding, which is padded.
"""

PRESETS = {
    # the default of `treerl.config` on the built-in Countdown task
    "tiny": dict(
        vocab=21, layers=3, width=96, heads=4, kv_heads=2, head_dim=24, hidden=256, qk_norm=True
    ),
    "qwen2.5-0.5b": dict(
        vocab=151_936, layers=24, width=896, heads=14, kv_heads=2, head_dim=64, hidden=4864,
        qkv_bias=True, rope_theta=1e6,
    ),
    "qwen2.5-1.5b": dict(
        vocab=151_936, layers=28, width=1536, heads=12, kv_heads=2, head_dim=128, hidden=8960,
        qkv_bias=True, rope_theta=1e6,
    ),
    "qwen3-8b": dict(
        vocab=151_936, layers=36, width=4096, heads=32, kv_heads=8, head_dim=128, hidden=12_288,
        qk_norm=True, tied=False, rope_theta=1e6,
    ),
}  # fmt: skip
