"""Train the small tokenizer of the icons models on the captions of the training shards.

    python scripts/build_icons_tokenizer.py --shards data/icons/train --output configs/models/icons-tokenizer

CLIP's vocabulary of 49,408 entries would need more weights than the towers; 2,048 byte-pair entries cover icon names.
The end token has the highest id, as open_clip's ``argmax`` pooling requires.
"""

import argparse
import string
import tarfile
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

PAD, UNKNOWN, END = "<pad>", "<unk>", "<end>"


def captions(folder: Path) -> list[str]:
    """The distinct captions of all shards in a folder, sorted."""
    texts = set()
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                file = tar.extractfile(member) if member.name.endswith(".txt") else None
                if file is not None:
                    texts.add(file.read().decode())
    return sorted(texts)


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--vocabulary", type=int, default=2048)
    args = parser.parse_args()

    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN, end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=args.vocabulary - 1,
        special_tokens=[PAD, UNKNOWN],
        initial_alphabet=list(string.ascii_lowercase + string.digits + string.punctuation),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    texts = captions(args.shards)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([END])
    end = tokenizer.token_to_id(END)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, end)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, unk_token=UNKNOWN, eos_token=END)
    wrapped.save_pretrained(args.output)
    longest = max(len(tokenizer.encode(text).ids) for text in texts)
    print(f"{args.output}: {tokenizer.get_vocab_size()} entries, end id {end}, longest caption {longest} tokens")


if __name__ == "__main__":
    main()
