"""Web text from raw files to tokens: clean, filtered, anonymised, deduplicated, split, tokenised.

The rules are Gopher's, FineWeb's, and C4's but for that lines must end as sentences do;
near-duplicates have a Jaccard index of 0.8 or more.

Command:  python -m lmjax.prepare --config=configs/prepare/web.py --workdir=OUT
              --config.sources.web.path=s3://bucket/crawl
          `:multilingual` keeps every language; then `configs/prepare/train.py` trains on OUT
Hardware: any; `--runner=ray` for a cluster
Result:   OUT/report.md, and token stores in OUT/tokens for `lmjax.data.packed.Tokens`
"""

from lmjax.config import call
from lmjax.data.vocabulary import BPE
from lmjax.prepare.pipeline import Prepare
from lmjax.prepare.read.source import Source
from lmjax.prepare.split import Split
from lmjax.prepare.stages.anonymise import Anonymise
from lmjax.prepare.stages.clean import Clean
from lmjax.prepare.stages.exact import Exact
from lmjax.prepare.stages.language import Language
from lmjax.prepare.stages.near import Near
from lmjax.prepare.stages.repetition import Repetition
from lmjax.prepare.stages.rules import C4, FineWeb, GopherQuality
from lmjax.prepare.tokenise import Tokenise

VARIANTS = {
    "smoke": {
        "sources.web.path": "docs",
        "sources.web.licence": "Apache-2.0",
        "shard_bytes": 1 << 18,
        "split.valid": 0.3,
        "tokens.vocabulary.vocab_size": 512,
    },
    # Every language: without the rules that know English words, or words at all.
    "multilingual": {
        "stages.language.languages": (),
        "stages.gopher.words": "script",
        "stages.gopher.min_mean_word_length": None,
        "stages.gopher.min_stop_words": None,
        "stages.c4.min_line_words": 1,
    },
}


def get_config():
    return call(
        Prepare,
        sources={
            "web": call(Source, path="crawl", licence="see each page"),
        },
        stages={
            "clean": call(Clean),
            "language": call(Language, languages=("en",), min_score=0.65),
            "gopher": call(GopherQuality),
            "repetition": call(Repetition),
            "c4": call(C4, terminal=(), min_sentences=None, drop_pages_with=("lorem ipsum",)),
            "fineweb": call(FineWeb),
            "anonymise": call(Anonymise),
            "lines": call(Exact, unit="line"),
            "exact": call(Exact),
            "near": call(Near),
        },
        split=call(Split, valid=0.005),
        tokens=call(Tokenise, vocabulary=call(BPE, vocab_size=32768)),
    )
