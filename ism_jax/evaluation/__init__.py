"""Samples -> numbers and pictures: small images by a classifier, any by pretrained networks."""
