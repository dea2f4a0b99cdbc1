"""What becomes of the model families of transformers: the table behind ``test_families.py`` and docs/families.md.

Every family is a tiny random model. It is ``exact`` where a cache that holds everything gives what the model's own
eager attention gives without any cache; ``hybrid`` where that is so, and states of other layers are left as
transformers has them; or refused, with a message that matches the pattern.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import transformers

OLD = tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 3)
"""Whether this is transformers 5.2, the oldest that is supported. Newer columns are tested with the newest release."""

EXACT, HYBRID, ABSENT = "exact", "hybrid", "absent"

NO_INTERFACE = "{name}.*no attention interface"
ITSELF = "{name}.*works on the keys and values of its cache itself"
OWN_CACHE = "{name}.*cache of its own kind"
NOTHING = "{name}.*there is nothing to compress"
SHARED = "{name}.*share keys and values"
NO_HEADS = "{name}.*no attention heads"
MASK = "{name}.*works on its attention mask itself"
INDEXED = "{name}.*DynamicIndexedLayer"
_WORDS = {
    EXACT: "exact",
    HYBRID: "exact, hybrid",
    ABSENT: "not there",
    NO_INTERFACE: "refused: no attention interface",
    ITSELF: "refused: works on what is cached itself",
    OWN_CACHE: "refused: needs a cache of its own kind",
    NOTHING: "refused: no layer with full attention",
    SHARED: "refused: layers share keys and values",
    NO_HEADS: "refused: no attention",
    MASK: "refused: works on its mask itself",
    INDEXED: "refused: an index picks the tokens",
}

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


class Family(NamedTuple):
    """One row: verdicts for transformers 5.2 and for the newest release, and the settings of the tiny model."""

    name: str
    old: str
    new: str
    settings: dict[str, Any]
    note: str = ""
    without: tuple[str, ...] = ()
    """Of :data:`SHAPE`, what the family's config does not know."""

    @property
    def verdict(self) -> str:
        """What this version of transformers is to give."""
        return self.old if OLD else self.new

    @property
    def refused(self) -> str | None:
        """The pattern of the refusal, if there is to be one."""
        verdict = self.verdict
        return None if verdict in (EXACT, HYBRID, ABSENT) else verdict.format(name=f"'{re.escape(self.name)}'")

    def config(self) -> Any:
        """Of the tiny model."""
        shape = {key: item for key, item in SHAPE.items() if key not in self.without}
        return transformers.CONFIG_MAPPING[self.name](**{**shape, **self.settings})


def _family(
    name: str, old: str = EXACT, new: str | None = None, note: str = "", without: tuple[str, ...] = (), **settings: Any
) -> Family:
    return Family(name, old, old if new is None else new, settings, note, without)


def _kinds(*kinds: str) -> dict[str, Any]:
    return {"num_hidden_layers": len(kinds), "layer_types": list(kinds)}


SLIDING = {**_kinds("sliding_attention", "full_attention"), "sliding_window": 16}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "n_inner": 96}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
MAMBA = {
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
    "mamba_expand": 2,
}
NO_ATTENTION = ("num_attention_heads", "num_key_value_heads")
WHOLE = "keys and values of different widths, cached whole by 5.2; later versions cache latents"
CACHED_STATE = "layers with states are left as they are"

FAMILIES = [
    _family("afmoe", **SLIDING, **MOE, num_local_experts=4),
    _family("apertus"),
    _family("arcee"),
    _family("bamba", OWN_CACHE, HYBRID, CACHED_STATE, attn_layer_indices=[1], **MAMBA),
    _family("biogpt"),
    _family("bitnet"),
    _family("bloom", NO_INTERFACE, note="ALiBi", n_layer=2, n_head=4),
    _family("codegen", NO_INTERFACE, **GPT2, n_ctx=512, rotary_dim=8),
    _family("cohere"),
    _family("cohere2", **SLIDING),
    _family("cwm", **SLIDING),
    _family("deepseek_v2", EXACT, ITSELF, WHOLE, **LATENT, **ROUTED),
    _family("deepseek_v3", EXACT, ITSELF, WHOLE, **LATENT, **ROUTED),
    _family("diffllama", NO_INTERFACE, ITSELF),
    _family("doge", ITSELF),
    _family("dots1", **SLIDING, **ROUTED, n_shared_experts=1),
    _family("ernie4_5"),
    _family("exaone4", **SLIDING),
    _family("falcon", NO_INTERFACE, without=("head_dim",)),
    _family("falcon_h1", OWN_CACHE, HYBRID, "every layer has full attention and a state", **MAMBA, mamba_d_ssm=128),
    _family("falcon_mamba", NO_HEADS, without=NO_ATTENTION),
    _family("flex_olmo", num_experts=2, num_experts_per_tok=1),
    _family("gemma"),
    _family("gemma2", note="logits are capped", **SLIDING, attn_logit_softcapping=3.0, query_pre_attn_scalar=16),
    _family("gemma3_text", **SLIDING),
    _family(
        "gemma3n_text",
        SHARED,
        **_kinds(*["sliding_attention", "full_attention"] * 2),
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=97,
        hidden_size_per_layer_input=8,
    ),
    _family("glm"),
    _family("glm4"),
    _family("glm4_moe", **ROUTED),
    _family("glm4_moe_lite", EXACT, ITSELF, WHOLE, **LATENT, **ROUTED),
    _family("glm_moe_dsa", MASK, INDEXED, **LATENT, **ROUTED),
    _family("gpt2", **GPT2),
    _family("gpt_bigcode", **GPT2),
    _family("gpt_neo", NO_INTERFACE, num_layers=2, num_heads=4, attention_types=[[["global"], 2]]),
    _family("gpt_neox"),
    _family("gpt_oss", note="a learned logit in every softmax", **SLIDING, num_local_experts=4, num_experts_per_tok=2),
    _family("gptj", NO_INTERFACE, **GPT2, rotary_dim=8),
    _family("granite", attention_multiplier=0.37),
    _family("granitemoe", num_local_experts=2, num_experts_per_tok=1, attention_multiplier=0.37),
    _family(
        "granitemoehybrid",
        OWN_CACHE,
        HYBRID,
        CACHED_STATE,
        **_kinds("mamba", "attention"),
        **MAMBA,
        num_local_experts=2,
    ),
    _family("helium"),
    _family("hunyuan_v1_dense"),
    _family("jais2"),
    _family(
        "jamba",
        OWN_CACHE,
        HYBRID,
        "a prompt must come in one forward: with every further one its states begin anew, in any cache",
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=2,
        use_mamba_kernels=False,
        mamba_d_state=8,
    ),
    _family("kimi_linear", ABSENT, ITSELF, "latents", **_kinds("linear_attention", "full_attention"), **LATENT),
    _family("lfm2", OWN_CACHE, HYBRID, CACHED_STATE, **_kinds("conv", "full_attention")),
    _family("lfm2_moe", OWN_CACHE, HYBRID, CACHED_STATE, **_kinds("conv", "full_attention"), **MOE),
    _family("llama"),
    _family(
        "llama4_text",
        note="layers with chunked attention are left as they are",
        **_kinds("chunked_attention", "full_attention"),
        no_rope_layers=[1, 0],
        attention_chunk_size=16,
        num_local_experts=2,
        intermediate_size_mlp=96,
    ),
    _family("longcat_flash", EXACT, ITSELF, WHOLE, **LATENT, **ROUTED, num_layers=1, expert_ffn_hidden_size=32),
    _family("mamba", NO_HEADS, without=NO_ATTENTION),
    _family("mamba2", NO_HEADS, without=NO_ATTENTION, num_heads=8),
    _family("minimax", OWN_CACHE, **_kinds("linear_attention", "full_attention"), num_local_experts=2, block_size=16),
    _family("minimax_m2", num_local_experts=4, num_experts_per_tok=2, rotary_dim=8),
    _family("ministral", **SLIDING),
    _family("mistral", note="without a sliding window (from version 0.2 of the model)", sliding_window=None),
    _family("mistral", NOTHING, note="with one, which every layer has (version 0.1)", sliding_window=16),
    _family("mixtral", num_local_experts=4, sliding_window=None),
    _family("modernbert-decoder", **SLIDING),
    _family("mpt", NO_INTERFACE, note="ALiBi", d_model=64, n_heads=4, n_layers=2, max_seq_len=512),
    _family("nanochat"),
    _family("nemotron", NO_INTERFACE, EXACT),
    _family("nemotron_h", ABSENT, HYBRID, CACHED_STATE, **_kinds("linear_attention", "full_attention")),
    _family("olmo"),
    _family("olmo2"),
    _family("olmo3", **SLIDING),
    _family("olmoe", num_experts=2, num_experts_per_tok=1),
    _family("opt", ffn_dim=96, word_embed_proj_dim=64),
    _family("persimmon"),
    _family("phi"),
    _family("phi3", note="its window is wider than its context, so that no layer slides", sliding_window=1024),
    _family("phimoe", num_local_experts=2, sliding_window=None),
    _family("qwen2", **SLIDING, use_sliding_window=True),
    _family("qwen2_moe", **MOE, shared_expert_intermediate_size=32),
    _family("qwen3"),
    _family("qwen3_5_text", OWN_CACHE, HYBRID, CACHED_STATE, **_kinds("linear_attention", "full_attention"), **LINEAR),
    _family("qwen3_moe", **MOE),
    _family(
        "qwen3_next",
        OWN_CACHE,
        HYBRID,
        CACHED_STATE,
        **_kinds("linear_attention", "full_attention"),
        **LINEAR,
        **MOE,
        shared_expert_intermediate_size=32,
    ),
    _family("recurrent_gemma", NO_INTERFACE, NOTHING, lru_width=64, attention_window_size=16),
    _family("seed_oss"),
    _family("smollm3"),
    _family("solar_open", **ROUTED),
    _family("stablelm"),
    _family("starcoder2", sliding_window=None),
    _family("vaultgemma", note="logits are capped", **SLIDING, attn_logit_softcapping=3.0, query_pre_attn_scalar=16),
    _family("xglm", NO_INTERFACE, d_model=64, ffn_dim=96, num_layers=2, attention_heads=4),
    _family("youtu", EXACT, ITSELF, WHOLE, **LATENT),
    _family(
        "zamba2",
        OWN_CACHE,
        HYBRID,
        "layers with full attention have a state too",
        layers_block_type=["mamba", "hybrid"],
        use_mem_rope=True,
        n_mamba_heads=8,
        mamba_d_state=8,
        chunk_size=16,
    ),
]


def table() -> str:
    """The rows as docs/families.md has them."""
    head = ["| family | transformers 5.2 | newest transformers 5 | |", "|---|---|---|---|"]
    rows = [f"| {item.name} | {_WORDS[item.old]} | {_WORDS[item.new]} | {item.note} |" for item in FAMILIES]
    return "\n".join([*head, *rows])
