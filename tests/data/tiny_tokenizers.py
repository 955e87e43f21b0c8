"""Tokenizers small enough to train in a test."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = ["hello world, bonjour le monde", "the cat sat on the mat", "le chat noir dort", "Paris is in France"] * 8


def save_tokenizer(folder: Path, *, chat_template: str | None = CHATML, adds_bos: bool = False) -> Path:
    """A byte-level BPE tokenizer of 320 ids as a Hugging Face folder."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=320, special_tokens=specials, initial_alphabet=alphabet)
    )
    if adds_bos:
        bpe.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 3)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", bos_token="<s>")
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return folder
