"""What detectors share beside their layers: priors, decoding, the choice of boxes, the loss. torch and torchvision.ops alone.

Boxes are corners x1 y1 x2 y2 in pixels of the network's input, labels count from 0: torchvision's convention.
"""
