"""Train the tokenizer of the shipped model on equal shares of every domain's text (run `scripts/build_text.py` first).

python scripts/train_tokenizer.py --text runs/text --out lightning_moe/assets/small_moe
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"
VOCABULARY = 4096

# Roles are plain text: pretraining never shows tokens made for roles, so their embeddings would be noise.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '### ' + message['role'] + ':\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\\n' }}{% endif %}"
)


def sample(folder: Path, *, characters: int) -> Iterator[str]:
    """Yield the first documents of each domain (they lie in hash order), up to `characters` per domain."""
    for path in sorted(folder.glob("*/train.jsonl")):
        left = characters
        with path.open(encoding="utf-8") as file:
            for line in file:
                text = json.loads(line)["text"][:left]
                left -= len(text)
                yield text
                if left <= 0:
                    break


def train(documents: Iterator[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE, single digits kept apart."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer=trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def main() -> None:
    """Parse the command line, train and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=Path("runs/text"), help="folder of the pretraining text")
    parser.add_argument("--out", type=Path, default=Path("lightning_moe/assets/small_moe"), help="folder to save into")
    parser.add_argument("--characters", type=int, default=3_000_000, help="characters of each domain to learn from")
    arguments = parser.parse_args()
    tokenizer = train(sample(arguments.text, characters=arguments.characters))
    tokenizer.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
