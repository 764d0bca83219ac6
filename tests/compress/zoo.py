"""A tiny random model of every family: hidden 16, four heads, three layers, and a batch it takes."""

import torch
import transformers as hf
from torch import nn

TEXT = {"vocab_size": 40, "pad_token_id": 0, "max_position_embeddings": 32}
SIZE = {"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 3, "intermediate_size": 24}
GROUPED = {**SIZE, **TEXT, "num_key_value_heads": 2, "head_dim": 4, "bos_token_id": 1, "eos_token_id": None}
IMAGE = {"image_size": 8, "patch_size": 4}
WHISPER = {
    **{"d_model": 16, "encoder_layers": 3, "decoder_layers": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_mel_bins": 6, "max_source_positions": 9},
    **{"vocab_size": 40, "max_target_positions": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    **{"decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None},
}
SOUND = {"conv_dim": (8, 8), "conv_kernel": (4, 4), "conv_stride": (4, 4), "num_conv_pos_embeddings": 4}
SOUND |= {"num_feat_extract_layers": 2, "num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer"}
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4}
T5 |= {"decoder_start_token_id": 0, "eos_token_id": None}
OPT = {**TEXT, "hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 3, "ffn_dim": 24}
OPT |= {"word_embed_proj_dim": 16, "bos_token_id": 1, "eos_token_id": None}
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 3, "n_head": 4, "n_inner": 24, "n_positions": 32}
GPT2 |= {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}

MODELS = {
    "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**TEXT, **SIZE)),
    "roberta": lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**TEXT, **SIZE)),
    "distilbert": lambda: hf.DistilBertForSequenceClassification(
        hf.DistilBertConfig(**TEXT, dim=16, hidden_dim=24, n_heads=4, n_layers=3)
    ),
    "electra": lambda: hf.ElectraForTokenClassification(hf.ElectraConfig(**TEXT, **SIZE, embedding_size=8)),
    "mpnet": lambda: hf.MPNetModel(hf.MPNetConfig(**{**TEXT, "pad_token_id": 1}, **SIZE)),
    "albert": lambda: hf.AlbertForSequenceClassification(hf.AlbertConfig(**TEXT, **SIZE, embedding_size=8)),
    "modernbert": lambda: hf.ModernBertForSequenceClassification(
        hf.ModernBertConfig(**TEXT, **SIZE, global_attn_every_n_layers=2, local_attention=4, cls_token_id=1)
    ),
    "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**SIZE, **IMAGE)),
    "deit": lambda: hf.DeiTForImageClassificationWithTeacher(hf.DeiTConfig(**SIZE, **IMAGE)),
    "dinov2": lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**SIZE, **IMAGE, mlp_ratio=2)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)),
    "opt": lambda: hf.OPTForCausalLM(hf.OPTConfig(**OPT)),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**GROUPED, sliding_window=4)),
    "whisper": lambda: hf.WhisperForConditionalGeneration(hf.WhisperConfig(**WHISPER)),
    "wav2vec2": lambda: hf.Wav2Vec2ForCTC(hf.Wav2Vec2Config(**SIZE, **SOUND, vocab_size=12)),
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)),
}
CAUSAL = ("gpt2", "opt", "llama", "qwen3", "mistral")
GROUPED_FAMILIES = ("llama", "qwen3", "mistral")


def build(make, seed: int = 0) -> nn.Module:
    """The model with weights large enough to matter, norms and biases included."""
    torch.manual_seed(seed)
    model = (MODELS[make] if isinstance(make, str) else make)().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    return model


def batch_for(family: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(3, 40, (2, 7))
    if family in ("vit", "deit", "dinov2"):
        return {"pixel_values": torch.randn(2, 3, 8, 8)}
    if family == "whisper":
        return {"input_features": torch.randn(2, 6, 18), "decoder_input_ids": ids}
    if family == "wav2vec2":
        return {"input_values": torch.randn(2, 160)}
    if family == "t5":
        return {"input_ids": ids, "decoder_input_ids": ids[:, :5]}
    return {"input_ids": ids}


def outputs(model: nn.Module, family: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch_for(family))[0]


def parameters(model: nn.Module, *paths: str | None) -> int:
    return sum(one.numel() for path in paths if path for one in model.get_submodule(path).parameters())


def has(model: nn.Module, path: str) -> bool:
    return path in dict(model.named_modules())
