"""Gradient ascent on images: `maximize`."""
