"""The network as it is given: its layers, kernels, weights, inputs."""
