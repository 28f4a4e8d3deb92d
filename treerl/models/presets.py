"""Sizes of known models: arguments of `TransformerConfig` by name.

Taken from the models' published config.json; widths of the vocabulary are those of the stored
embedding, which is padded.
"""

from treerl.models.transformer import Llama3Scaling

PRESETS = {
    # the default of `treerl.config` on the built-in Countdown task
    "tiny": dict(
        vocab=21, layers=3, width=96, heads=4, kv_heads=2, head_dim=24, hidden=256, qk_norm=True
    ),
    "smollm2-135m": dict(
        vocab=49_152, layers=30, width=576, heads=9, kv_heads=3, head_dim=64, hidden=1536, rope_theta=1e5, norm_eps=1e-5,
    ),
    "smollm2-360m": dict(
        vocab=49_152, layers=32, width=960, heads=15, kv_heads=5, head_dim=64, hidden=2560, rope_theta=1e5, norm_eps=1e-5,
    ),
    "smollm2-1.7b": dict(
        vocab=49_152, layers=24, width=2048, heads=32, kv_heads=32, head_dim=64, hidden=8192, rope_theta=130_000.0,
        norm_eps=1e-5,
    ),
    "gemma3-270m": dict(
        vocab=262_144, layers=18, width=640, heads=4, kv_heads=1, head_dim=256, hidden=2048, rope_theta=1e6, qk_norm=True,
        embed_scale=True, norm_plus_one=True, post_norms=True, activation="gelu_tanh", query_scalar=256.0,
        local=(*(True,) * 5, False) * 3, window=512,
    ),
    "gemma3-1b": dict(
        vocab=262_144, layers=26, width=1152, heads=4, kv_heads=1, head_dim=256, hidden=6912, rope_theta=1e6, qk_norm=True,
        embed_scale=True, norm_plus_one=True, post_norms=True, activation="gelu_tanh", query_scalar=256.0,
        local=((*(True,) * 5, False) * 5)[:26], window=512,
    ),
    "qwen3-0.6b": dict(
        vocab=151_936, layers=28, width=1024, heads=16, kv_heads=8, head_dim=128, hidden=3072, qk_norm=True, rope_theta=1e6,
    ),
    "qwen3-1.7b": dict(
        vocab=151_936, layers=28, width=2048, heads=16, kv_heads=8, head_dim=128, hidden=6144, qk_norm=True, rope_theta=1e6,
    ),
    "qwen3-4b": dict(
        vocab=151_936, layers=36, width=2560, heads=32, kv_heads=8, head_dim=128, hidden=9728, qk_norm=True, rope_theta=1e6,
    ),
    "llama3.2-1b": dict(
        vocab=128_256, layers=16, width=2048, heads=32, kv_heads=8, head_dim=64, hidden=8192, rope_theta=5e5, norm_eps=1e-5,
        rope_scaling=Llama3Scaling(32.0, 1.0, 4.0, 8192),
    ),
    "llama3.2-3b": dict(
        vocab=128_256, layers=28, width=3072, heads=24, kv_heads=8, head_dim=128, hidden=8192, rope_theta=5e5, norm_eps=1e-5,
        rope_scaling=Llama3Scaling(32.0, 1.0, 4.0, 8192),
    ),
    "llama3.1-8b": dict(
        vocab=128_256, layers=32, width=4096, heads=32, kv_heads=8, head_dim=128, hidden=14_336, rope_theta=5e5, norm_eps=1e-5,
        tied=False, rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 8192),
    ),
    "qwen2.5-0.5b": dict(
        vocab=151_936, layers=24, width=896, heads=14, kv_heads=2, head_dim=64, hidden=4864,
        qkv_bias=True, rope_theta=1e6,
    ),
    "qwen2.5-1.5b": dict(
        vocab=151_936, layers=28, width=1536, heads=12, kv_heads=2, head_dim=128, hidden=8960,
        qkv_bias=True, rope_theta=1e6,
    ),
    "qwen2.5-3b": dict(
        vocab=151_936, layers=36, width=2048, heads=16, kv_heads=2, head_dim=128, hidden=11_008,
        qkv_bias=True, rope_theta=1e6,
    ),
    "qwen2.5-7b": dict(
        vocab=152_064, layers=28, width=3584, heads=28, kv_heads=4, head_dim=128, hidden=18_944,
        qkv_bias=True, tied=False, rope_theta=1e6,
    ),
    "qwen3-8b": dict(
        vocab=151_936, layers=36, width=4096, heads=32, kv_heads=8, head_dim=128, hidden=12_288,
        qk_norm=True, tied=False, rope_theta=1e6,
    ),
}  # fmt: skip
