"""Trained networks at work: ``syncbn predict`` (`predict`) and ``syncbn export`` (`export`).

`images` finds and prepares the images that a user names, and `writers` write what the network says about them. `graphs`
makes ONNX, TorchScript or torch.export of a network.
"""
