"""Convolution and pooling in forms that stay fast in compiled loops on CPU; the built-in ones elsewhere."""
