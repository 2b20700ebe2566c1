"""Networks by name: of torchvision, timm and transformers, of factories and of files."""
