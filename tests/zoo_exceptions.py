"""Fields of the zoo's configs, and inputs of its models, that a rule by name gets wrong."""

import torch

#: A field that keeps the default of its class.
DEFAULT = object()

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_MROPE = {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}}
_MROPE_GLM = {"rope_parameters": {**_MROPE["rope_parameters"], "partial_rotary_factor": 1.0}}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1}
_CODEC = {"num_filters": 4, "hidden_size": 16, "upsample_groups": 16, "codebook_dim": 16,
          "vector_quantization_hidden_dimension": 16, "codebook_size": 128}  # fmt: skip
_SMALL_CONVNET = {"embedding_size": 8, "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}

#: Per model type, or per model class.
EXCEPTIONS: dict[str, dict] = {
    "bamba": {**_MAMBA, "layer_types": DEFAULT, "attn_layer_indices": [1]},
    "align_vision_model": {"width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 64},
    "blip-2": {"image_token_index": 90, "image_token_id": 90},
    "Blip2ForImageTextRetrieval": {"qformer_config": {"use_qformer_text_input": True}},
    "Blip2TextModelWithProjection": {"qformer_config": {"use_qformer_text_input": True}},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "bridgetower": {"num_attention_heads": 2, "hidden_size": 64, "contrastive_hidden_size": 16},
    "bridgetower_text_model": {"hidden_size": 64},
    "bridgetower_vision_model": {"hidden_size": 64},
    "bros": {"dim_bbox_sinusoid_emb_2d": 32, "dim_bbox_sinusoid_emb_1d": 4, "dim_bbox_projection": 8},
    "chameleon": {"vocabulary_map": {"<image>": 90, "IMGIMGA": 91}},
    "codegen": {"n_head": 4, "rotary_dim": 4},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "clvp_encoder": {"projection_dim": 16},
    "csm": {"codec_config": _CODEC},
    "clipseg": {"extract_layers": [0, 1], "conditional_layer": 0},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 1, "n_group": 1, "topk_group": 1},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "dense"]},
    "diffusion_gemma_text": {"num_experts": 4, "moe_intermediate_size": 16, "top_k_experts": 1},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 1, "n_shared_experts": 1},
    "emu3": {"vocabulary_map": {"<image>": 90, "<|visual token 000000|>": 91}},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [16, 16], "moe_num_experts": 4,
                             "rope_parameters": {**_MROPE["rope_parameters"], "mrope_section": [1, 1, 2]}},
    "esm": {"vocab_size": 99, "pad_token_id": 1, "mask_token_id": 32},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 4}},
    "gemma3n_text": {"num_kv_shared_layers": 0, "intermediate_size": 32, "activation_sparsity_pattern": [0.0, 0.0]},
    "gemma4_unified_text": {"num_kv_shared_layers": 0},
    "glm4v_text": _MROPE_GLM, "glm4v_moe_text": _MROPE_GLM, "glm_image_text": _MROPE_GLM, "glm_ocr_text": _MROPE_GLM,
    "glm46v": {"text_config": _MROPE_GLM},
    "glm5_next_text": {"index_topk": 16, "index_kpool": 16},
    "gptj": {"rotary_dim": 4},
    "gradium_phonon_tts": {"flow_head_config": {"condition_dim": 16}},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["linear_attention", "full_attention"]},
    "granite_speech5_encoder": {"context_size": 32},
    "granite_speech5_ctc": {"encoder_config": {"context_size": 32}},
    "grounding-dino": {"d_model": 32}, "mm-grounding-dino": {"d_model": 32},
    "hrm_text": {"num_layers_per_stack": 1, "num_hidden_layers": 8},
    "hunyuan_vl_text": {"rope_parameters": {**_MROPE["rope_parameters"], "mrope_section": [1, 1, 1, 1]}},
    "idefics2_perceiver": {"resampler_depth": 1},
    "instructblip": {"image_token_index": 90, "image_token_id": 90},
    "instructblipvideo": {"video_token_index": 90, "video_token_id": 90},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "layers_block_type": DEFAULT},
    "kyutai_speech_to_text": {"codec_config": _CODEC},
    "layoutlmv3": {"coordinate_size": 2, "shape_size": 4},
    "led": {"attention_window": 4, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "rope_parameters": _ROPE},
    "lilt": {"hidden_size": 48},
    "longcat_flash": {"moe_topk": 2, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "qk_head_dim": 16, "v_head_dim": 8,
                      "head_dim": 8},
    "mamba2": {"num_heads": 4, "head_dim": 8, "n_groups": 1},
    "mimo_v2_flash": {"head_dim": 16, "swa_head_dim": 16, "v_head_dim": 16, "swa_v_head_dim": 16,
                      "num_key_value_heads": 1, "swa_num_key_value_heads": 1},
    "mistral4": {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "qk_head_dim": 8, "v_head_dim": 8, "head_dim": 8},
    "mobilebert": {"intra_bottleneck_size": 16, "true_hidden_size": 16, "hidden_size": 32, "embedding_size": 16},
    "MobileBertForMaskedLM": {"hidden_size": 32, "embedding_size": 16},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "moonshine_streaming": {"num_key_value_heads": 2, "encoder_config": {"num_key_value_heads": 2}},
    "moshi": {"audio_encoder_config": _CODEC},
    "nemotron_h": {"mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 1, "ssm_state_size": 4,
                   "layers_block_type": ["linear_attention", "full_attention"]},
    "neomme": {"head_dim": 16},
    "paddleocr_vl_text": _MROPE, "qwen2_vl_text": _MROPE, "qwen2_5_vl_text": _MROPE, "qwen2_5_omni_text": _MROPE,
    "qwen2_5_omni_talker": _MROPE, "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 16},
    "paligemma": {"vision_config": {"image_size": 28}},
    "perceiver": {"d_latents": 16, "d_model": 16, "num_latents": 4, "num_self_attends_per_block": 1,
                  "num_blocks": 1, "num_self_attention_heads": 2, "num_cross_attention_heads": 2,
                  "qk_channels": 16, "v_channels": 16, "image_size": 16},
    "pix2struct_text_model": {"initializer_range": 0.02},
    "pocket_tts": {"flow_head_config": {"condition_dim": 16}},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 80, "vision_end_token_id": 81},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 80, "vision_end_token_id": 81},
    "qwen3_omni_moe_talker": {"spatial_merge_size": 2},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
                       "indexer_compress_ratio": 2},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 16},
    "reformer": {"axial_pos_shape": [8, 8], "axial_pos_embds_dim": [4, 12], "attn_layers": ["local", "lsh"],
                 "attention_head_size": 8, "feed_forward_size": 32, "num_buckets": 2, "local_attn_chunk_length": 8,
                 "lsh_attn_chunk_length": 8, "is_decoder": False},
    "ReformerModelWithLMHead": {"is_decoder": True},
    "shieldgemma2": {"yes_token_index": 90, "no_token_index": 91},
    "splinter": {"question_token_id": 90},
    "step3p5": {"sliding_window": 8},
    "t5gemma2_text": {"dropout_rate": 0.0},
    "T5GemmaEncoderModel": {"is_encoder_decoder": False},
    "tvp": {"max_img_size": 448},
    "vibevoice_asr": {"acoustic_tokenizer_chunk_size": 3200},
    "vilt": {"image_size": 64, "patch_size": 32, "num_images": 2, "modality_type_vocab_size": 2},
    "xlstm": {"embedding_dim": 64, "hidden_size": 64, "num_heads": 2},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 32, "attention_head_dim": 16, "mamba_d_state": 4, "mamba_dt_rank": 4,
              "num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    "zamba2": {"attention_hidden_size": 32, "attention_head_dim": 16, "n_mamba_heads": 4, "mamba_headdim": 8,
               "mamba_ngroups": 1, "layers_block_type": ["linear_attention", "hybrid"], "hybrid_layer_ids": [1]},
    "florence_vision": {"depths": [1, 1], "embed_dim": [8, 16], "num_heads": [1, 2], "num_groups": [1, 2],
                        "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1],
                        "patch_prenorm": [False, True], "window_size": 4, "projection_dim": 16},
    "siglip2_vision_model": {"patch_size": 4, "num_patches": 16},
    "resnet": _SMALL_CONVNET,
    "rt_detr_resnet": _SMALL_CONVNET,
    "janus_vqgan": {"base_channels": 32, "channel_multiplier": [1, 1], "embed_dim": 8, "latent_channels": 8},
    "chameleon_vqgan": {"base_channels": 32, "channel_multiplier": [1, 1], "attn_resolutions": None},
    "emu3_vqgan": {"base_channels": 32, "channel_multiplier": [1, 1]},
}  # fmt: skip


def _image(size: int):
    return lambda model, generator: torch.rand((1, 3, size, size), generator=generator)


def _ids(*shape: int, high: int = 60):
    return lambda model, generator: torch.randint(3, high, shape, generator=generator)


def _floats(*shape: int):
    return lambda model, generator: torch.rand(shape, generator=generator)


def _value(value):
    return lambda model, generator: value


def _spectrum(length: int):
    def make(model, generator):
        config = model.config
        config = getattr(config, "audio_config", None) or getattr(config, "encoder_config", None) or config
        return torch.rand((1, config.num_mel_bins, length), generator=generator)

    return make


_PLACED = _value(torch.tensor([[90, 90, 90, 90, 11, 12, 13]]))
_QFORMER = {"pixel_values": _image(32), "qformer_input_ids": _ids(1, 7), "input_ids": _PLACED}
#: Per model type, or per model class: a function of the model and a random generator, or None for an input to leave
#: out.
INPUTS: dict[str, dict] = {
    "BarkFineModel": {"codebook_idx": _value(1), "input_ids": _ids(1, 7, 8, high=90)},
    "CLIPSegForImageSegmentation": {"conditional_pixel_values": _image(32)},
    "dia": {"decoder_input_ids": _ids(1, 7, 9)},
    "instructblip": _QFORMER,
    "instructblipvideo": {"pixel_values": _floats(1, 2, 3, 32, 32), "qformer_input_ids": _ids(1, 7),
                          "input_ids": _value(torch.tensor([[90] * 8 + [11, 12, 13]])),
                          "attention_mask": _value(torch.ones(1, 11, dtype=torch.long))},
    "blip-2": {"pixel_values": _image(32)},
    "Blip2ForConditionalGeneration": {"input_ids": _PLACED},
    "Blip2Model": {"input_ids": _PLACED},
    "blt": {"use_cache": _value(False)},
    "grounding-dino": {"pixel_values": _image(128)},
    "mm-grounding-dino": {"pixel_values": _image(128)},
    "SplinterForPreTraining": {"input_ids": _value(torch.tensor([[5, 90, 6, 7, 90, 8, 9]]))},
    "MoshiForConditionalGeneration": {"user_audio_codes": _ids(1, 8, 7), "moshi_audio_codes": _ids(1, 8, 7)},
    "tvp": {"pixel_values": _floats(1, 2, 3, 448, 448)},
    "colmodernvbert": {"pixel_values": None},
    "colpali": {"pixel_values": None},
    "colqwen2": {"pixel_values": None},
    "flava": {"skip_unmasked_multimodal_encoder": _value(False), "return_loss": _value(False)},
    "idefics": {"pixel_values": _floats(1, 1, 3, 32, 32),
                "image_attention_mask": lambda m, g: torch.ones(1, 7, 1, dtype=torch.long)},
    "kosmos-2": {"pixel_values": _image(32), "image_embeds_position_mask":
                 lambda m, g: torch.tensor([[False] + [True] * 4 + [False] * 2])},
    "LukeForEntityClassification": {"entity_ids": _value(torch.tensor([[1]])),
                                    "entity_position_ids": _value(torch.tensor([[[1, 2, -1]]]))},
    "LukeForEntityPairClassification": {"entity_ids": _value(torch.tensor([[1, 2]])),
                                        "entity_position_ids": _value(torch.tensor([[[1, -1], [2, -1]]]))},
    "LukeForEntitySpanClassification": {"entity_ids": _value(torch.tensor([[1]])),
                                        "entity_position_ids": _value(torch.tensor([[[1, 2, -1]]])),
                                        "entity_start_positions": _value(torch.tensor([[1]])),
                                        "entity_end_positions": _value(torch.tensor([[2]]))},
    "lxmert": {"visual_feats": lambda m, g: torch.rand((1, 3, m.config.visual_feat_dim), generator=g),
               "visual_pos": _floats(1, 3, 4)},
    "musicgen_decoder": {"input_ids": _ids(4, 7)},
    "musicgen": {"decoder_input_ids": _ids(4, 7)},
    "musicgen_melody_decoder": {"input_ids": _ids(4, 7)},
    "musicgen_melody": {"decoder_input_ids": _ids(4, 7), "input_features": None},
    "pix2struct": {"flattened_patches": lambda m, g: torch.rand(
        (1, 5, 2 + m.config.vision_config.patch_embed_hidden_size), generator=g), "pixel_values": None},
    "rag": {"context_input_ids": _ids(5, 7), "context_attention_mask": _value(torch.ones(5, 7, dtype=torch.long)),
            "doc_scores": _floats(1, 5)},
    "siglip2": {"pixel_values": _floats(1, 4, 48), "pixel_attention_mask": _value(torch.ones(1, 4, dtype=torch.long)),
                "spatial_shapes": _value(torch.tensor([[2, 2]]))},
    "SpeechT5ForTextToSpeech": {"decoder_input_values": _floats(1, 4, 16)},
    "seamless_m4t": {"input_features": None},
    "seamless_m4t_v2": {"input_features": None},
    **{f"SeamlessM4T{version}ForSpeechTo{kind}": {"input_features": _floats(1, 32, 160)}
       for version in ("", "v2") for kind in ("Text", "Speech")},
    "speech-encoder-decoder": {"input_features": None},
    "whisper": {"input_features": _spectrum(128)},
    "voxtral": {"input_features": None},
    "voxtral_encoder": {"input_features": _spectrum(128)},
    "xclip": {"pixel_values": _floats(1, 8, 3, 32, 32)},
    "videoprism": {"pixel_values_videos": _floats(1, 4, 3, 32, 32)},
    "VisualBertForRegionToPhraseAlignment": {"region_to_phrase_position": _value(torch.zeros(1, 9, dtype=torch.long))},
    "PPDocLayoutV2ReadingOrder": {"boxes": _value(torch.zeros(1, 7, 4, dtype=torch.long))},
}  # fmt: skip
