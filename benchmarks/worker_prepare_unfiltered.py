"""`worker_prepare_lmjax` without what drops documents by rules: the whole corpus reaches tokens."""

from benchmarks.worker_prepare_lmjax import get_config as get_whole


def get_config():
    config = get_whole()
    for name in ("repetition", "gopher", "c4", "fineweb", "anonymise"):
        del config.stages[name]
    return config
