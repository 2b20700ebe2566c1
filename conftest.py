"""What pytest allows in its top-level conftest alone."""

pytest_plugins = ["pytester"]
