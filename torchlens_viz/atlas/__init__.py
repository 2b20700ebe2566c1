"""What several rooms found, brought together: a page that shows a network, `report`."""
