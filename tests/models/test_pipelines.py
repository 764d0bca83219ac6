"""Our models in transformers' pipelines, from a saved folder with its tokenizer or image processor."""

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, pipeline

from formwright.models.transformer import (
    TransformerConfig,
    TransformerForCausalLM,
    TransformerForImageClassification,
    TransformerForMaskedLM,
    TransformerForSequenceClassification,
    TransformerForTokenClassification,
)

WORDS = ["[PAD]", "[UNK]", "[MASK]", "a", "good", "bad", "film", "it", "was", "never", "seen"]
TEXTS = ["a good film", "it was never a bad film a good film was seen"]


@pytest.fixture(scope="module")
def tokenizer():
    made = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]", padding_side="left"
    )


def saved(kind, folder, tokenizer=None, **fields):
    torch.manual_seed(0)
    sizes = {"vocab_size": len(WORDS), "hidden_size": 16, "pad_token_id": 0, "init": "normal(std=0.3)"}
    model = kind(TransformerConfig(**sizes | fields)).eval()
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return model


def test_texts_are_classified_in_a_batch_as_one_by_one(tokenizer, tmp_path):
    labels = {"id2label": {0: "bad", 1: "good", 2: "mixed"}, "label2id": {"bad": 0, "good": 1, "mixed": 2}}
    saved(TransformerForSequenceClassification, tmp_path, tokenizer, **labels)
    classify = pipeline("text-classification", str(tmp_path), device="cpu")
    together, alone = classify(TEXTS, batch_size=2), [classify(text)[0] for text in TEXTS]
    for ours, single in zip(together, alone, strict=True):
        assert ours["label"] == single["label"]
        assert ours["label"] in labels["label2id"]
        assert ours["score"] == pytest.approx(single["score"], abs=1e-5)


@pytest.mark.parametrize("mixer", ["softmax", "mamba"])
def test_text_is_continued_in_a_batch_as_one_by_one(tokenizer, tmp_path, mixer):
    saved(TransformerForCausalLM, tmp_path, tokenizer, architecture="decoder", mixer=mixer, eos_token_id=None)
    write = pipeline("text-generation", str(tmp_path), device="cpu")
    asked = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}
    together = [out[0]["generated_text"] for out in write(TEXTS, batch_size=2, **asked)]
    assert together == [write(text, **asked)[0]["generated_text"] for text in TEXTS]
    assert all(together)


def test_a_mask_is_filled(tokenizer, tmp_path):
    model = saved(TransformerForMaskedLM, tmp_path, tokenizer)
    best = pipeline("fill-mask", str(tmp_path), device="cpu")("a [MASK] film")[0]
    ids = tokenizer("a [MASK] film", return_tensors="pt").input_ids
    assert best["token"] == int(model(ids).logits[0, 1].argmax())


def test_tokens_are_labelled(tokenizer, tmp_path):
    saved(TransformerForTokenClassification, tmp_path, tokenizer, num_labels=3)
    found = pipeline("token-classification", str(tmp_path), device="cpu", ignore_labels=[])(TEXTS[0])
    assert [entry["word"] for entry in found] == TEXTS[0].split()


def test_images_are_classified_in_a_batch_as_one_by_one(tmp_path):
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    saved(TransformerForImageClassification, tmp_path, vocab_size=0, image_size=8, patch_size=4, num_labels=3)
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    noise = np.random.default_rng(0).integers(0, 256, (2, 11, 9, 3), dtype=np.uint8)
    images = [Image.fromarray(pixels) for pixels in noise]
    classify = pipeline("image-classification", str(tmp_path), image_processor=processor, device="cpu")
    together, alone = classify(images, batch_size=2), [classify(image) for image in images]
    for ours, single in zip(together, alone, strict=True):
        assert [entry["label"] for entry in ours] == [entry["label"] for entry in single]
        assert ours[0]["score"] == pytest.approx(single[0]["score"], abs=1e-5)
