"""Which images make up which batch, on which rank and in which order.

`order` shuffles an epoch, `samplers` cut it into global batches and shares, `window_reader` reads ahead of need,
`batches` makes tensors; `dali` does so with NVIDIA DALI.
"""
