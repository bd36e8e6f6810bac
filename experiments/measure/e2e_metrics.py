"""The five metrics of the E2E NLG Challenge, each text against all references of its input.

As the challenge computed them: BLEU and NIST without regard to case, on the tokens of mteval-v13a;
METEOR, ROUGE-L and CIDEr by the evaluation of COCO captions, on the tokens of the Penn Treebank,
in lower case and without punctuation. Those need Java.
"""

from __future__ import annotations

import collections
import importlib.util
import math
import shutil
from collections.abc import Sequence


def score(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """All metrics, in the challenge's scales; BLEU and NIST only without Java or pycocoevalcap.

    Args:
      texts: what is judged.
      references: of each text, at least one.

    Raises:
      TypeError: for references that are not grouped by text.
      ValueError: for another number of references than of texts, a text without one, or no text.
    """
    if isinstance(texts, str) or any(isinstance(each, str) for each in references):
        raise TypeError('texts must be ["...", ...], and references [["...", ...], ...]; got a str')
    if not texts or len(texts) != len(references) or not all(references):
        raise ValueError(
            "there must be at least one text, and at least one reference for each; got "
            f"{len(texts)} texts and references for {sum(map(bool, references))}"
        )
    found = {"BLEU": bleu(texts, references), "NIST": nist(texts, references)}
    more = shutil.which("java") and importlib.util.find_spec("pycocoevalcap")
    return found | (coco(texts, references) if more else {})


def bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """BLEU-4, from 0 to 1; the length is compared with the closest reference's."""
    import sacrebleu

    most = max(map(len, references))
    streams = [[r[i] if i < len(r) else None for r in references] for i in range(most)]
    return sacrebleu.corpus_bleu(list(texts), streams, lowercase=True).score / 100


def nist(texts: Sequence[str], references: Sequence[Sequence[str]], longest: int = 5) -> float:
    """NIST-5 (Doddington, "Automatic Evaluation of Machine Translation Quality", 2002).

    n-grams that are found in a reference count with their information,
    log2(count of the first n-1 words / count of the n-gram) over all references; a text that is
    shorter than the mean reference is penalized. (The package nltk compares with one reference at
    a time, and gives other values.)
    """
    texts = [_words(text) for text in texts]
    references = [[_words(r) for r in each] for each in references]
    counts: collections.Counter = collections.Counter()
    for sentence in (r for each in references for r in each):
        counts[()] += len(sentence)
        for n in range(1, longest + 1):
            counts.update(_grams(sentence, n))
    total = 0.0
    for n in range(1, longest + 1):
        gained, grams = 0.0, 0
        for text, each in zip(texts, references, strict=True):
            found = collections.Counter(_grams(text, n))
            allowed: collections.Counter = collections.Counter()
            for reference in each:
                allowed |= collections.Counter(_grams(reference, n))
            gained += sum(
                count * math.log2(counts[gram[:-1]] / counts[gram])
                for gram, count in (found & allowed).items()
            )
            grams += max(0, len(text) - n + 1)
        total += gained / grams if grams else 0.0
    length = sum(map(len, texts))
    expected = sum(sum(map(len, each)) / len(each) for each in references)
    # The penalty is a half where a text has two thirds of the length.
    short = math.log(min(1.0, length / expected)) if length else -math.inf
    return total * math.exp(math.log(0.5) * (short / math.log(1.5)) ** 2)


def coco(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """METEOR, ROUGE-L and CIDEr."""
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    def words(groups):
        captions = [[{"caption": " ".join(text.split())} for text in group] for group in groups]
        return PTBTokenizer().tokenize(dict(enumerate(captions)))

    given, told = words(references), words([[text] for text in texts])
    return {
        name: float(scorer.compute_score(given, told)[0])
        for name, scorer in (("METEOR", Meteor()), ("ROUGE-L", Rouge()), ("CIDEr", Cider()))
    }


def _words(text: str) -> list[str]:
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    return Tokenizer13a()(text).lower().split()


def _grams(words: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
