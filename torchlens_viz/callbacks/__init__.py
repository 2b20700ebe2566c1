"""A monitor as a callback of what trains networks."""
