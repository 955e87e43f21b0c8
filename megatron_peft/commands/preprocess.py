"""Convert JSON lines to Megatron's indexed datasets (.bin and .idx), with the flags of Megatron's own tool.

megatron-peft data preprocess --input corpus.jsonl --output-prefix corpus --tokenizer-model HF_FOLDER --append-eod
writes corpus_text_document.bin and corpus_text_document.idx; train on them with --data-path corpus_text_document.
"""

from megatron_peft.cli.command import Command
from megatron_peft.data.preprocess import PreprocessSettings, preprocess


def run(settings: PreprocessSettings) -> int:
    """Write the datasets."""
    done = preprocess(settings)
    print(f"wrote {done.documents} documents, {done.tokens} tokens: {', '.join(done.prefixes)}")
    if done.empty_documents:
        print(f"{done.empty_documents} empty documents were left out.")
    return 0


main = Command("data preprocess", __doc__, PreprocessSettings, run)
