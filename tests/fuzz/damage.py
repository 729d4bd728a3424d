"""Trees of JSON with members gone, replaced or renamed."""

import copy

from hypothesis import strategies as st

from lmjax.config import leaves

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 2**70)
    | st.floats(allow_nan=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)


def mutate(data, tree, *, names=None, values=JSON):
    """A copy of the tree in which one to three members are other ones; it stays a dict.

    Args:
      names: dotted paths to choose from; those of all leaves if not given.
      values: what replaces a member.
    """
    tree = copy.deepcopy(tree)
    names = [name for name, _ in leaves(tree)] if names is None else names
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(names)).split(".")
        node, stop = tree, data.draw(st.integers(0, len(path) - 1))
        try:
            for key in path[:stop]:
                node = node[key] if isinstance(node, dict) else node[int(key)]
            key = path[stop] if isinstance(node, dict) else int(path[stop])
            node[key]
        except (KeyError, IndexError, TypeError, ValueError):
            continue  # gone already, or a name with a dot
        match data.draw(st.integers(0, 2)):
            case 0:
                del node[key]
            case 1:
                node[key] = copy.deepcopy(data.draw(values))
            case _ if isinstance(node, dict):
                node[data.draw(st.text(max_size=4))] = node.pop(key)
    return tree
