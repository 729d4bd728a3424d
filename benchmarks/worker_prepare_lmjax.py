"""Our side of `benchmarks.prepare`: a config with datatrove's settings, for `lmjax.prepare`."""

from lmjax.config import call
from lmjax.data.vocabulary import Pretrained
from lmjax.prepare.pipeline import Prepare
from lmjax.prepare.read.source import Source
from lmjax.prepare.stages.anonymise import Anonymise
from lmjax.prepare.stages.exact import Exact
from lmjax.prepare.stages.near import Near
from lmjax.prepare.stages.repetition import Repetition
from lmjax.prepare.stages.rules import C4, FineWeb, GopherQuality
from lmjax.prepare.tokenise import Tokenise


def get_config():
    return call(
        Prepare,
        sources={"corpus": call(Source, path="corpus")},
        stages={
            "repetition": call(Repetition),
            "gopher": call(GopherQuality),
            "c4": call(C4, terminal=(), min_line_words=3, min_sentences=5),
            "fineweb": call(FineWeb, max_duplicate_line_characters=0.01, max_newlines_per_word=0.3),
            "anonymise": call(Anonymise, kinds=("email", "ip")),
            "near": call(Near, bands=14, rows=8),
            "exact": call(Exact),
        },
        split=None,
        tokens=call(Tokenise, vocabulary=call(Pretrained, path="tokenizer.json")),
        shard_bytes=16 << 20,
    )
