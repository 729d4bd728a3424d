"""Ways of tuning a model that add few parameters to it: linen interceptors over `layers.Linear`.

No model knows of them. `adapted` wraps one; what it adds lies in the tree beside the kernel that it
tunes, as 'blocks/block/attention/qkv/lora/query_a', and `Run.trainable` names what trains.
"""
