"""Numbers become pixels; nothing here knows a model."""
