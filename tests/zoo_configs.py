"""Configs of the zoo: a default config of any architecture, shrunk to a few thousand parameters."""

import re

from transformers import PreTrainedConfig

from .zoo_exceptions import DEFAULT, EXCEPTIONS

VOCABULARY, WIDTH, HEADS, LAYERS = 99, 16, 2, 2

#: Fields that count words. Other vocabularies (codebooks, token types, sub-word characters) get other sizes, so that
#: the number of rows of a matrix tells what it is over.
WORDS = re.compile(r"(vocab_size|src_vocab_size|tgt_vocab_size|decoder_vocab_size|text_vocab_size|n_tokens|n_vocab)")
OTHER_VOCABULARIES = re.compile(r"\w*vocab_size\w*|codebook_size|num_codevectors_per_group|num_embeddings")
TOKEN_IDS = re.compile(r"\w*_token_ids?|\w*_token_index|\w*_token|\w*_idx|\w*_index|mask_token|bos_token|eos_token")
#: Numeric fields by name, the first pattern that matches wins.
SIZES = [
    (r"type_vocab_size|char_vocab_size", 2),
    (r"(max_\w*positions?_embeddings|n_positions|n_ctx|max_seq_len|max_(source|target|text)_positions"
     r"|max_relative_positions|context_length|model_max_length|relative_attention_max_distance)", 64),
    (r"num_\w*position_embeddings", 64),
    (r"(\w*_)?(attention_heads|num_heads|n_heads?|num_kv_heads|kv_n_heads|num_key_value_heads)", HEADS),
    (r"\w*num_(attention_heads|key_value_heads|value_heads|key_heads|linear_heads)(_per_layer)?", HEADS),
    (r"(linear|index|mamba|swa|resampler)?_?n?u?m?_?n?_?(heads|key_heads|value_heads)", HEADS),
    (r"\w*(head_dim|d_head|d_kv|dim_head|kv_channels|head_size)", WIDTH // HEADS),
    (r"(n_)?(\w*_)?(hidden_layers|num_layers|n_layers?|layers|depth|num_blocks)", LAYERS),
    (r"\w*(encoder|decoder)_layers|num_\w*hidden_layers|num_\w*layers_per_\w+", LAYERS),
    (r"\w*(intermediate_size|ffn_dim|ffn_hidden_size|d_ff|dim_ff|dff|mlp_dim|n_inner|d_inner|feedforward_dim"
     r"|dim_feedforward|linear_units|intermediate_dim)", 2 * WIDTH),
    (r"\w*(hidden_size|hidden_dim|d_model|n_embd|emb_dim|embed_dim|embedding_size|embedding_dim|model_dim|projection_dim"
     r"|project_dim|word_embed_proj_dim"
     r"|proj_size|projection_size|output_dim|output_proj_dims|classifier_proj_size)", WIDTH),
    (r"dim|hidden|width|embed_dim|adapter_(in|out)_dim|out_hidden_size|adapter_input_size|codevector_dim"
     r"|proj_codevector_dim", WIDTH),
    (r"\w*num_(local_)?experts|n_routed_experts|moe_num_experts|num_experts", 4),
    (r"\w*(experts_per_tok(en)?|top_k|topk|moe_k|moe_topk)", 1),
    (r"(n_group|topk_group|num_expert_group)", 1),
    (r"\w*image_size|resolution|max_img_size|pretrain_image_size|crop_size", 32),
    (r"num_queries|num_denoising|two_stage_num_proposals", 5),
    (r"num_mel_bins|mel_dim|feature_size|input_feat_per_channel|model_in_dim", 16),
    (r"\w*lora_rank|time_step_rank|mamba_dt_rank|laurel_rank|gated_norm_rank", 8),
    (r"state_size|mamba_d_state|ssm_state_size", 4),
    (r"hidden_size_per_layer_input", 8),
    (r"num_query_tokens|latent_query_num|resampler_num_latents|resampler_n_latents|num_latents|image_seq_length"
     r"|mm_tokens_per_image", 4),
    (r"num_conv_pos_embeddings", 8),
    (r"n(um)?_filters", 4),
    (r"num_conv_pos_embedding_groups", 2),
    (r"\w*chunk_size|block_size|sliding_window\w*", 8),
]  # fmt: skip
SIZES = [(re.compile(pattern), size) for pattern, size in SIZES]
UNTOUCHED = re.compile(r"(patch_size|chunk_size_feed_forward|kernel\w*|stride\w*|pad_index|first_k_dense_replace"
                       r"|vision_feature_layer|num_frames|num_channels)")  # fmt: skip
#: Fields whose default is None in a class that cannot do without them.
MISSING = {"head_dim": WIDTH // HEADS, "num_key_value_heads": HEADS}
DROPOUT = re.compile(r"\w*dropout\w*|\w*layerdrop\w*|drop_path_rate|\w*_pdrop")


def tiny_config(config_class: type[PreTrainedConfig], model: str = "", **changes) -> PreTrainedConfig:
    """A config of `config_class` with a hidden size of 16, two layers and 99 words wherever the class can have them.

    Args:
        config_class: the class of the config. Its default values are shrunk by the names of its fields.
        model: the name of a model class, for exceptions that hold for one class only.
        changes: fields that are set last. A dict for a nested config changes fields of it.
    """
    return _Shrinker().config(config_class, _merge(_exceptions(config_class, model), changes))


def _exceptions(config_class, model: str) -> dict:
    found = dict(EXCEPTIONS.get(config_class.model_type, {}))
    return _merge(found, EXCEPTIONS.get(model, {}))


def _merge(fields: dict, changes: dict) -> dict:
    merged = dict(fields)
    for name, value in changes.items():
        nested = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merge(merged[name], value) if nested else value
    return merged


def _two_kinds(layers: list) -> tuple:
    """Two of `layers`, of different kinds if there are such, full attention among them."""
    others = [layer for layer in layers if layer != layers[0]]
    if isinstance(layers[0], str) and others:
        return layers[0], next((layer for layer in others if layer in ("full_attention", "hybrid")), others[0])
    return layers[0], layers[-1]


def configs_of(config: PreTrainedConfig):
    """`config` and the configs in it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from configs_of(value)


def vocabulary_sizes(config: PreTrainedConfig) -> dict[str, int]:
    """Fields of a config, and of the configs in it, that count the entries of a vocabulary (not token types)."""
    found = {}
    for part in configs_of(config):
        for field, value in vars(part).items():
            words = "vocab" in field or field in ("n_tokens",)
            if words and isinstance(value, int) and value > 40:
                found[f"{part.model_type}.{field}"] = value
    return found


def words_of(config: PreTrainedConfig) -> int:
    """The number of words of the text vocabulary of a config."""
    fields = ("vocab_size", "src_vocab_size", "text_vocab_size", "input_vocab_size")
    return min(size for part in configs_of(config) for f in fields if (size := getattr(part, f, 0)) and size > 40)


_CROSS = {"is_decoder": True, "add_cross_attention": True}
#: The default parts of later versions, for those that have none (transformers 5.17) and ask for the parts as dicts.
PARTS = {
    "encoder-decoder": {"encoder": {"model_type": "bert"}, "decoder": {"model_type": "bert", **_CROSS}},
    "vision-encoder-decoder": {"encoder": {"model_type": "vit"}, "decoder": {"model_type": "bert", **_CROSS}},
    "speech-encoder-decoder": {"encoder": {"model_type": "wav2vec2"}, "decoder": {"model_type": "bert", **_CROSS}},
    "rag": {"question_encoder": {"model_type": "dpr"}, "generator": {"model_type": "bart"}},
}


def _new(config_class: type[PreTrainedConfig], **fields) -> PreTrainedConfig:
    if getattr(config_class, "has_no_defaults_at_init", False):
        for name, part in PARTS.get(config_class.model_type, {}).items():
            fields[name] = fields[name].to_dict() if name in fields else dict(part)
    return config_class(**fields)


class _Shrinker:
    """Token ids keep their identity over a tree of configs: one large id becomes the same small one everywhere."""

    def __init__(self):
        self.ids: dict[int, int] = {}

    def config(self, config_class, changes: dict, default: PreTrainedConfig | None = None) -> PreTrainedConfig:
        usual = {} if default is None else vars(_new(config_class))
        default = _new(config_class) if default is None else default
        fields, nested = {}, {}
        depths = {value for name, value in vars(default).items() if isinstance(value, int) and self._is_depth(name)}
        for name, value in vars(default).items():
            if name.startswith("_") or name in ("transformers_version", "architectures", "id2label", "label2id"):
                continue
            if isinstance(value, PreTrainedConfig):
                inner = changes.get(name)
                if isinstance(inner, PreTrainedConfig):
                    continue
                inner = _merge(EXCEPTIONS.get(value.model_type, {}), inner or {})
                nested[name] = self.config(type(value), inner, value)
                continue
            small = self.value(name, value, depths)
            if small is not value or isinstance(value, (int, str)) and usual.get(name, value) != value:
                fields[name] = small
        fields.update(nested)
        fields.update({name: value for name, value in changes.items() if name not in nested})
        return _new(config_class, **{name: value for name, value in fields.items() if value is not DEFAULT})

    @staticmethod
    def _is_depth(name: str) -> bool:
        return any(p.fullmatch(name) and size == LAYERS and "layer" in name for p, size in SIZES)

    def value(self, name: str, value, depths: set[int]):
        """`value` made small, or `value` itself where it can stay."""
        if value is None:
            return MISSING.get(name)
        if isinstance(value, (bool, str)):
            return value
        if isinstance(value, float):
            return 0.0 if DROPOUT.fullmatch(name) and value else value
        if isinstance(value, dict):
            return self.rope(value) if name == "rope_parameters" else value
        if isinstance(value, (list, tuple)):
            if TOKEN_IDS.fullmatch(name) and all(isinstance(item, int) for item in value):
                return [self.token_id(item) for item in value]
            if len(value) in depths and len(value) > LAYERS:
                return [self.value(name, item, set()) for item in _two_kinds(value)]
            return value
        if UNTOUCHED.fullmatch(name) or not isinstance(value, int):
            return value
        if WORDS.fullmatch(name):
            return VOCABULARY if value > 1 else value
        for pattern, size in SIZES:
            if pattern.fullmatch(name):
                return min(size, value) if value > 0 else value
        if OTHER_VOCABULARIES.fullmatch(name):
            return min(value, 128 if "code" in name or "embeddings" in name else 95)
        return self.token_id(value) if TOKEN_IDS.fullmatch(name) else value

    def token_id(self, value: int) -> int:
        if value < VOCABULARY - 30:
            return value
        return self.ids.setdefault(value, VOCABULARY - 1 - len(self.ids))

    def rope(self, parameters: dict) -> dict:
        changed = {}
        for name, value in parameters.items():
            if isinstance(value, dict):
                changed[name] = self.rope(value)
            elif name == "mrope_section":
                changed[name] = [2, 1, 1]
            elif isinstance(value, list) and name in ("long_factor", "short_factor"):
                changed[name] = [1.0] * (WIDTH // HEADS // 2)
            else:
                changed[name] = value
        return changed
