"""Trained networks at work: ``syncbn predict`` (`predict`) and ``syncbn export`` (`export`).

`images` finds and prepares the images that a user names, `writers` write what the network says, and `graphs` makes ONNX,
TorchScript and torch.export of a network.
"""
