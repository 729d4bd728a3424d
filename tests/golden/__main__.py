"""`python -m tests.golden`: writes the stored form of every config anew."""

import json
from pathlib import Path

from lmjax.config import load_config, to_dict

here = Path(__file__).parent
for path in sorted((here.parents[1] / "configs").glob("*.py")):
    tree = to_dict(load_config(str(path)))
    (here / f"{path.stem}.json").write_text(json.dumps(tree, indent=1) + "\n")
    print(path.stem)
