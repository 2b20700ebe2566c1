"""Where a monitor writes beside TensorBoard: runs of other trackers, and a folder of plain files."""
