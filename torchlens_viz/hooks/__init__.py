"""Recording a forward pass."""
